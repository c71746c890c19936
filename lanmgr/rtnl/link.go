package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// skipStats is RTEXT_FILTER_SKIP_STATS (include/uapi/linux/rtnetlink.h): counters are most of a dump's size.
const skipStats = 1 << 3

// Links dumps the links of the namespace, but for lo, sorted by index. The library's own dump knows neither the
// settings of a bridge nor those of a port. It reads much that k8slan does not need, so that observing a LAN takes
// twice as long.
func (c *Conn) Links() ([]segment.Link, error) {
	newRequest := func() *nl.NetlinkRequest {
		req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
		req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
		return req
	}
	links, err := dump(c, newRequest, unix.RTM_NEWLINK, parseLink)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	slices.SortFunc(links, func(a, b segment.Link) int { return a.Index - b.Index })
	return links, nil
}

// parseLink reads a link from the kernel's message. It leaves out lo, which every namespace has.
func parseLink(m []byte) (l segment.Link, want bool, err error) {
	if len(m) < unix.SizeofIfInfomsg {
		return l, false, fmt.Errorf("link in a message of %d bytes: %w", len(m), unix.EINVAL)
	}
	flags := binary.NativeEndian.Uint32(m[8:]) // ifi_flags
	if flags&unix.IFF_LOOPBACK != 0 {
		return l, false, nil
	}
	index := int32(binary.NativeEndian.Uint32(m[4:])) // ifi_index
	l.Index, l.Up = int(index), flags&unix.IFF_UP != 0
	l.Type, l.LacksIPv6 = "device", true // unless attributes say otherwise
	for a := (attributes{rest: m[unix.SizeofIfInfomsg:]}); ; {
		if !a.next() {
			return l, a.err == nil, a.err
		}
		switch a.kind {
		case unix.IFLA_IFNAME:
			l.Name = text(a.value)
		case unix.IFLA_IFALIAS:
			l.Alias = text(a.value)
		case unix.IFLA_ADDRESS:
			l.MAC = net.HardwareAddr(a.value)
		case unix.IFLA_MTU:
			l.MTU = int(number(a.value))
		case unix.IFLA_MASTER:
			l.Master = int(number(a.value))
		case unix.IFLA_PROMISCUITY:
			l.Promisc = int(number(a.value))
		case unix.IFLA_PROP_LIST:
			l.AltNames, err = parseAltNames(a.value)
		case unix.IFLA_LINKINFO:
			err = parseLinkInfo(&l, a.value)
		case unix.IFLA_AF_SPEC:
			err = parseIPv6(&l, a.value)
		}
		if err != nil {
			return l, false, err
		}
	}
}

func parseAltNames(b []byte) (names []string, err error) {
	a := attributes{rest: b}
	for a.next() {
		if a.kind == unix.IFLA_ALT_IFNAME {
			names = append(names, text(a.value))
		}
	}
	return names, a.err
}

// parseIPv6 reads whether a link has IPv6 switched on, and whether it would give itself no address then. The kernel
// reports nothing of IPv6 for a link without it (inet6_fill_link_af in net/ipv6/addrconf.c).
func parseIPv6(l *segment.Link, b []byte) error {
	const (
		disableIPv6 = 26 // DEVCONF_DISABLE_IPV6 (include/uapi/linux/ipv6.h), of an array of int32
		addrGenMode = 8  // IFLA_INET6_ADDR_GEN_MODE (include/uapi/linux/if_link.h)
		none        = 1  // IN6_ADDR_GEN_MODE_NONE
	)
	families := attributes{rest: b}
	for families.next() {
		if families.kind != unix.AF_INET6 {
			continue
		}
		l.LacksIPv6 = false
		settings := attributes{rest: families.value}
		for settings.next() {
			switch {
			case settings.kind == unix.IFLA_INET6_CONF && len(settings.value) >= 4*(disableIPv6+1):
				l.IPv6 = binary.NativeEndian.Uint32(settings.value[4*disableIPv6:]) == 0
			case settings.kind == addrGenMode:
				l.NoIPv6 = number(settings.value) == none
			}
		}
		if settings.err != nil {
			return settings.err
		}
	}
	return families.err
}

// parseLinkInfo reads the settings that a link has because of its type, and those of a bridge's port.
func parseLinkInfo(l *segment.Link, b []byte) error {
	infos := attributes{rest: b}
	for infos.next() { // the type comes first (rtnl_link_info_fill in net/core/rtnetlink.c)
		var parse func(*segment.Link, uint16, []byte)
		switch {
		case infos.kind == nl.IFLA_INFO_KIND:
			l.Type = text(infos.value)
			continue
		case infos.kind == nl.IFLA_INFO_DATA && l.Type == "bridge":
			parse, l.Learned = parseBridge, -1
		case infos.kind == nl.IFLA_INFO_DATA && l.Type == "vxlan":
			parse = parseVXLAN
		case infos.kind == nl.IFLA_INFO_SLAVE_DATA:
			parse = parsePort
		default:
			continue
		}
		data := attributes{rest: infos.value}
		for data.next() {
			parse(l, data.kind, data.value)
		}
		if data.err != nil {
			return data.err
		}
	}
	return infos.err
}

// fdbLearned is IFLA_BR_FDB_N_LEARNED (include/uapi/linux/if_link.h), which kernels before 6.7 do not have.
const fdbLearned = 48

func parseBridge(l *segment.Link, kind uint16, value []byte) {
	switch kind {
	case nl.IFLA_BR_STP_STATE:
		l.Bridge.STP = number(value) != 0
	case nl.IFLA_BR_VLAN_FILTERING:
		l.Bridge.VLANFiltering = number(value) != 0
	case nl.IFLA_BR_MCAST_SNOOPING:
		l.Bridge.MulticastSnooping = number(value) != 0
	case fdbLearned:
		l.Learned = int(number(value))
	}
}

func parseVXLAN(l *segment.Link, kind uint16, value []byte) {
	switch kind {
	case nl.IFLA_VXLAN_ID:
		l.VXLAN.VNI = number(value)
	case nl.IFLA_VXLAN_PORT:
		if len(value) == 2 {
			l.VXLAN.Port = binary.BigEndian.Uint16(value)
		}
	case nl.IFLA_VXLAN_LINK:
		l.VXLAN.UnderlayIndex = int(number(value))
	case nl.IFLA_VXLAN_GROUP, nl.IFLA_VXLAN_GROUP6:
		l.VXLAN.Group, _ = netip.AddrFromSlice(value)
	case nl.IFLA_VXLAN_LEARNING:
		l.VXLAN.NoLearning = number(value) == 0
	case nl.IFLA_VXLAN_LOCAL, nl.IFLA_VXLAN_LOCAL6:
		l.VXLAN.Local, _ = netip.AddrFromSlice(value)
	}
}

func parsePort(l *segment.Link, kind uint16, value []byte) {
	switch kind {
	case nl.IFLA_BRPORT_GROUP_FWD_MASK:
		l.ForwardMask = uint16(number(value))
	case nl.IFLA_BRPORT_NEIGH_SUPPRESS:
		l.Suppress = number(value) != 0
	case nl.IFLA_BRPORT_LEARNING:
		l.NoLearning = number(value) == 0
	}
}

// SwitchOff switches off settings of a bridge, in one message. It does not name the others: a kernel that was built
// without VLAN filtering refuses even to switch it off.
func (c *Conn) SwitchOff(bridge int, off segment.BridgeState) error {
	return c.setLinkInfo(bridge, "bridge", func(data *nl.RtAttr) {
		if off.STP {
			data.AddRtAttr(nl.IFLA_BR_STP_STATE, nl.Uint32Attr(0))
		}
		if off.VLANFiltering {
			data.AddRtAttr(nl.IFLA_BR_VLAN_FILTERING, nl.Uint8Attr(0))
		}
		if off.MulticastSnooping {
			data.AddRtAttr(nl.IFLA_BR_MCAST_SNOOPING, nl.Uint8Attr(0))
		}
	})
}

// FlushFDB deletes what a bridge has learned.
func (c *Conn) FlushFDB(bridge int) error {
	return c.setLinkInfo(bridge, "bridge", func(data *nl.RtAttr) { data.AddRtAttr(nl.IFLA_BR_FDB_FLUSH, nil) })
}

// ChangeVXLAN changes a VXLAN's group and source, TTL and learning, in one message. Group and source may be none, which
// is the unspecified address of the family in the message.
func (c *Conn) ChangeVXLAN(index int, v segment.VXLAN, ttl uint8) error {
	none, group, local := netip.IPv6Unspecified(), nl.IFLA_VXLAN_GROUP6, nl.IFLA_VXLAN_LOCAL6
	if v.Group.Is4() || v.Local.Is4() {
		none, group, local = netip.IPv4Unspecified(), nl.IFLA_VXLAN_GROUP, nl.IFLA_VXLAN_LOCAL
	}
	orNone := func(a netip.Addr) []byte {
		if !a.IsValid() {
			a = none
		}
		return a.AsSlice()
	}
	learning := uint8(1)
	if v.NoLearning {
		learning = 0
	}
	return c.setLinkInfo(index, "vxlan", func(data *nl.RtAttr) {
		data.AddRtAttr(nl.IFLA_VXLAN_ID, nl.Uint32Attr(v.VNI))
		data.AddRtAttr(group, orNone(v.Group))
		data.AddRtAttr(local, orNone(v.Local))
		data.AddRtAttr(nl.IFLA_VXLAN_TTL, nl.Uint8Attr(ttl))
		data.AddRtAttr(nl.IFLA_VXLAN_LEARNING, nl.Uint8Attr(learning))
	})
}

// setLinkInfo changes settings that a link has because of its type.
func (c *Conn) setLinkInfo(index int, kind string, fill func(data *nl.RtAttr)) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated(kind))
	fill(info.AddRtAttr(nl.IFLA_INFO_DATA, nil))
	req.AddData(info)
	return c.change(req)
}

// DeleteGroup deletes every link of a link group, in one message. It is no error if there is none.
func (c *Conn) DeleteGroup(group uint32) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
	if err := c.change(req); !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}
