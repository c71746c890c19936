package rtnl

import (
	"encoding/binary"
	"net"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// message joins a header and attributes, as the kernel sends them.
func message(header []byte, attributes ...*nl.RtAttr) []byte {
	for _, a := range attributes {
		header = append(header, a.Serialize()...)
	}
	return header
}

func ifinfo(index int32, flags uint32) []byte {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags = index, flags
	return msg.Serialize()
}

func attribute(kind int, value []byte, children ...*nl.RtAttr) *nl.RtAttr {
	a := nl.NewRtAttr(kind, value)
	for _, c := range children {
		a.AddChild(c)
	}
	return a
}

func name(s string) []byte { return nl.ZeroTerminated(s) }

// inet6 is what the kernel reports of IPv6 for a link.
func inet6(disabled uint32, addrGenMode uint8) *nl.RtAttr {
	settings := make([]byte, 4*60)
	binary.NativeEndian.PutUint32(settings[4*26:], disabled)
	return attribute(unix.IFLA_AF_SPEC, nil, attribute(unix.AF_INET6, nil,
		attribute(unix.IFLA_INET6_CONF, settings), attribute(8, nl.Uint8Attr(addrGenMode))))
}

func bridgeMessage() []byte {
	return message(ifinfo(2, unix.IFF_UP),
		attribute(unix.IFLA_IFNAME, name("br222")), attribute(unix.IFLA_MTU, nl.Uint32Attr(1500)),
		attribute(unix.IFLA_ADDRESS, []byte{2, 0, 0, 0, 0, 1}), inet6(0, 1),
		attribute(unix.IFLA_LINKINFO, nil, attribute(nl.IFLA_INFO_KIND, name("bridge")),
			attribute(nl.IFLA_INFO_DATA, nil,
				attribute(nl.IFLA_BR_STP_STATE, nl.Uint32Attr(1)),
				attribute(nl.IFLA_BR_VLAN_FILTERING, nl.Uint8Attr(1)),
				attribute(nl.IFLA_BR_MCAST_SNOOPING, nl.Uint8Attr(0)), attribute(fdbLearned, nl.Uint32Attr(7)))))
}

func vxlanMessage() []byte {
	return message(ifinfo(3, 0),
		attribute(unix.IFLA_IFNAME, name("vx222")), attribute(unix.IFLA_MASTER, nl.Uint32Attr(2)), inet6(1, 0),
		attribute(unix.IFLA_LINKINFO|unix.NLA_F_NESTED, nil, attribute(nl.IFLA_INFO_KIND, name("vxlan")),
			attribute(nl.IFLA_INFO_DATA, nil, attribute(nl.IFLA_VXLAN_ID, nl.Uint32Attr(222)),
				attribute(nl.IFLA_VXLAN_PORT, []byte{0x12, 0xb5}), attribute(nl.IFLA_VXLAN_LINK, nl.Uint32Attr(4)),
				attribute(nl.IFLA_VXLAN_GROUP6, netip.MustParseAddr("ff02::14").AsSlice()),
				attribute(nl.IFLA_VXLAN_LOCAL6, netip.MustParseAddr("fe80::1").AsSlice()),
				attribute(nl.IFLA_VXLAN_LEARNING, nl.Uint8Attr(0))),
			attribute(nl.IFLA_INFO_SLAVE_DATA, nil,
				attribute(nl.IFLA_BRPORT_GROUP_FWD_MASK, nl.Uint16Attr(0xfffd)),
				attribute(nl.IFLA_BRPORT_NEIGH_SUPPRESS, nl.Uint8Attr(1)),
				attribute(nl.IFLA_BRPORT_LEARNING, nl.Uint8Attr(0)))))
}

func plugMessage() []byte {
	return message(ifinfo(5, unix.IFF_UP),
		attribute(unix.IFLA_IFNAME, name("srl_p")), attribute(unix.IFLA_IFALIAS, name("macvtap spoke=srl")),
		attribute(unix.IFLA_PROMISCUITY, nl.Uint32Attr(1)),
		attribute(unix.IFLA_PROP_LIST, nil,
			attribute(unix.IFLA_ALT_IFNAME, name("k0123456789abcd")), attribute(unix.IFLA_ALT_IFNAME, name("srl"))),
		attribute(unix.IFLA_LINKINFO, nil, attribute(nl.IFLA_INFO_KIND, name("veth"))))
}

func TestLinkIsParsed(t *testing.T) {
	for _, tt := range []struct {
		message []byte
		want    segment.Link
	}{
		{bridgeMessage(), segment.Link{
			Index: 2, Name: "br222", Type: "bridge", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1500, Up: true,
			IPv6: true, NoIPv6: true, Bridge: segment.BridgeState{STP: true, VLANFiltering: true}, Learned: 7,
		}},
		{vxlanMessage(), segment.Link{
			Index: 3, Name: "vx222", Type: "vxlan", Master: 2, ForwardMask: 0xfffd, Suppress: true, NoLearning: true,
			VXLAN: segment.VXLANState{
				VNI: 222, Port: 4789, UnderlayIndex: 4, NoLearning: true,
				Group: netip.MustParseAddr("ff02::14"), Local: netip.MustParseAddr("fe80::1"),
			},
		}},
		{plugMessage(), segment.Link{
			Index: 5, Name: "srl_p", Type: "veth", Alias: "macvtap spoke=srl", Up: true,
			AltNames: []string{"k0123456789abcd", "srl"}, Promisc: 1, LacksIPv6: true,
		}},
		{message(ifinfo(6, 0), attribute(unix.IFLA_IFNAME, name("eth0"))), segment.Link{
			Index: 6, Name: "eth0", Type: "device", LacksIPv6: true,
		}},
	} {
		got, want, err := parseLink(tt.message)
		if err != nil || !want || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("parsed %+v, %t, %v; want %+v", got, want, err, tt.want)
		}
	}
}

func TestLoopbackIsLeftOut(t *testing.T) {
	if _, want, err := parseLink(message(ifinfo(1, unix.IFF_LOOPBACK))); want || err != nil {
		t.Errorf("lo is listed, or not understood: %v", err)
	}
}

func TestDamagedLinkIsAnError(t *testing.T) {
	cut := bridgeMessage()
	for what, m := range map[string][]byte{
		"nothing": nil, "cut short": cut[:len(cut)-3], "attribute of no length": append(ifinfo(1, 0), 0, 0, 0, 0),
	} {
		if l, _, err := parseLink(m); err == nil {
			t.Errorf("%s: parsed as %+v", what, l)
		}
	}
}

// neighbor is a struct ndmsg (include/uapi/linux/neighbour.h).
func neighbor(index uint32, state uint16, flags uint8) []byte {
	b := []byte{unix.AF_BRIDGE, 0, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, index)
	return append(binary.NativeEndian.AppendUint16(b, state), flags, 0)
}

func TestEntryIsParsed(t *testing.T) {
	mac, vtep := [6]byte{2, 0, 0, 0, 0, 1}, netip.MustParseAddr("192.0.2.1")
	hardware := attribute(unix.NDA_LLADDR, mac[:])
	times := make([]byte, 16)
	binary.NativeEndian.PutUint32(times[8:], 250)
	for _, tt := range []struct {
		name                             string
		message                          []byte
		want                             Entry
		ok                               bool
		inVXLAN, isExternal, isPermanent bool
	}{
		{
			name: "a bridge's",
			message: message(neighbor(5, unix.NUD_REACHABLE, unix.NTF_MASTER), hardware,
				attribute(unix.NDA_MASTER, nl.Uint32Attr(2)), attribute(unix.NDA_CACHEINFO, times)),
			want: Entry{
				Index: 5, State: unix.NUD_REACHABLE, Flags: unix.NTF_MASTER, MAC: mac, Master: 2,
				Age: 2500 * time.Millisecond,
			},
			ok: true,
		},
		{
			name: "a VXLAN's",
			message: message(neighbor(3, unix.NUD_PERMANENT, unix.NTF_SELF|unix.NTF_EXT_LEARNED), hardware,
				attribute(unix.NDA_DST, vtep.AsSlice())),
			want: Entry{
				Index: 3, State: unix.NUD_PERMANENT, Flags: unix.NTF_SELF | unix.NTF_EXT_LEARNED, MAC: mac, VTEP: vtep,
			},
			ok: true, inVXLAN: true, isExternal: true, isPermanent: true,
		},
		{
			name:    "one with a port of its own",
			message: message(neighbor(3, 0, unix.NTF_SELF), hardware, attribute(unix.NDA_PORT, []byte{0x12, 0xb5})),
		},
		{name: "one without a MAC", message: message(neighbor(3, 0, 0))},
		{name: "one cut short", message: message(neighbor(3, 0, 0), hardware)[:20]},
		{name: "nothing"},
	} {
		got, ok := ParseEntry(tt.message)
		if ok != tt.ok || ok && got != tt.want {
			t.Errorf("%s: parsed %+v, %t; want %+v, %t", tt.name, got, ok, tt.want, tt.ok)
		}
		read := [3]bool{got.InVXLAN(), got.IsExternal(), got.IsPermanent()}
		if ok && read != [3]bool{tt.inVXLAN, tt.isExternal, tt.isPermanent} {
			t.Errorf("%s: the entry's flags and state are misread: %+v", tt.name, got)
		}
	}
}

func datagram(kinds ...uint16) (b []byte) {
	for _, kind := range kinds {
		b = binary.NativeEndian.AppendUint32(b, unix.SizeofNlMsghdr+4)
		b = binary.NativeEndian.AppendUint16(b, kind)
		b = append(b, make([]byte, 10)...)
		b = append(b, byte(kind), 0, 0, 0)
	}
	return b
}

func TestMessagesOfADatagramAreReadOneByOne(t *testing.T) {
	rest := datagram(16, 17, 18)
	for kind := uint16(16); kind <= 18; kind++ {
		var m Message
		var ok bool
		if m, rest, ok = NextMessage(rest); !ok || m.Type != kind || m.Payload[0] != byte(kind) {
			t.Fatalf("read %+v, %t; want a message of type %d", m, ok, kind)
		}
	}
	if len(rest) != 0 {
		t.Errorf("%d bytes are left", len(rest))
	}
	for what, b := range map[string][]byte{
		"nothing": nil, "cut short": datagram(16)[:18], "a message of no length": make([]byte, 16),
	} {
		if m, _, ok := NextMessage(b); ok {
			t.Errorf("%s: read %+v", what, m)
		}
	}
}

// FuzzParsers checks that no message makes a parser panic, and that NextMessage always comes to an end.
func FuzzParsers(f *testing.F) {
	for _, seed := range [][]byte{
		bridgeMessage(), vxlanMessage(), plugMessage(), datagram(unix.RTM_NEWNEIGH, unix.RTM_DELROUTE), nil,
		message(neighbor(5, 2, 4),
			attribute(unix.NDA_LLADDR, []byte{2, 0, 0, 0, 0, 1}), attribute(unix.NDA_CACHEINFO, make([]byte, 16))),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if l, want, err := parseLink(b); want && err != nil {
			t.Errorf("parsed %+v in spite of %v", l, err)
		}
		ParseEntry(b)
		for rest, ok := b, true; ok; {
			before := len(rest)
			if _, rest, ok = NextMessage(rest); ok && len(rest) >= before {
				t.Fatalf("%d of %d bytes are left after a message", len(rest), before)
			}
		}
	})
}
