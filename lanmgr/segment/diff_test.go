package segment_test

import (
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

var lab = segment.Segment{
	LAN:   segment.LAN{Namespace: "default", Name: "lab", UID: "1"},
	Netns: "knlvrf", Bridge: "br2", MTU: 1422,
	VXLAN: segment.VXLAN{
		Name: "vx2", VNI: 222, Port: 4789, Group: netip.MustParseAddr("ff02::14"), Underlay: "eth1", UnderlayIndex: 7,
	},
	Spokes: []string{"srl", "vm"},
}

// unicast returns the segment with remotes instead of a group.
func unicast(local string, remotes ...string) segment.Segment {
	s := lab
	s.VXLAN.Group, s.VXLAN.Local = netip.Addr{}, netip.MustParseAddr(local)
	for _, r := range remotes {
		s.Remotes = append(s.Remotes, netip.MustParseAddr(r))
	}
	return s
}

// built returns the state of a node that has the segment, without claims.
func built(s segment.Segment) segment.State {
	record := s.Recorded()
	port := segment.Link{
		Type: "veth", Master: 1, Up: true, MTU: segment.PortMTU(s.MTU), ForwardMask: segment.ForwardMask,
	}
	state := segment.State{
		Netns: s.Netns, Exists: true, Silent: true, Record: &record,
		Links: []segment.Link{
			{Index: 1, Name: s.Bridge, Type: "bridge", MTU: s.MTU, Up: true},
			{
				Index: 2, Name: s.VXLAN.Name, Type: "vxlan", Master: 1, MTU: s.MTU, ForwardMask: segment.ForwardMask,
				VXLAN: segment.VXLANState{
					VNI: s.VXLAN.VNI, Port: s.VXLAN.Port, Group: s.VXLAN.Group, Local: s.VXLAN.Local,
					Remotes: s.Remotes, UnderlayIndex: s.VXLAN.UnderlayIndex,
				},
			},
		},
	}
	for i, spoke := range s.Spokes {
		p := port
		p.Index, p.Name, p.AltNames = 10+2*i, segment.PortName(spoke), []string{spoke}
		state.Links = append(state.Links, p,
			segment.Link{Index: 11 + 2*i, Name: segment.PlugName(spoke), Type: "veth", MTU: s.MTU, Up: true})
	}
	return state
}

// change returns the state with one link changed.
func change(s segment.State, name string, f func(*segment.Link)) segment.State {
	s.Links = slices.Clone(s.Links)
	for i := range s.Links {
		if s.Links[i].Name == name {
			f(&s.Links[i])
		}
	}
	return s
}

func without(s segment.State, names ...string) segment.State {
	s.Links = slices.DeleteFunc(slices.Clone(s.Links), func(l segment.Link) bool {
		return slices.Contains(names, l.Name)
	})
	return s
}

// attached returns the state with a pod on the spoke.
func attached(s segment.State, spoke string) segment.State {
	s = change(s, segment.PortName(spoke), func(l *segment.Link) { l.Up, l.AltNames = false, nil })
	s = change(s, "vx2", func(l *segment.Link) { l.Up = true })
	c := claim(spoke, segment.Veth)
	s.Links = append(s.Links, segment.Link{
		Index: 99, Name: c.ID, AltNames: []string{spoke}, Alias: c.Alias(), Type: "veth", Master: 1,
		MTU: lab.MTU, Up: true, ForwardMask: segment.ForwardMask,
	})
	return s
}

// attachedVM returns the state with a VM on the spoke.
func attachedVM(s segment.State, spoke string) segment.State {
	s = change(s, "vx2", func(l *segment.Link) { l.Up = true })
	c := claim(spoke, segment.Macvtap)
	return change(s, segment.PlugName(spoke), func(l *segment.Link) {
		l.AltNames, l.Alias, l.Promisc = []string{c.ID}, c.Alias(), 1
	})
}

func claim(spoke string, kind segment.Kind) segment.Claim {
	return segment.Claim{
		ID: segment.ClaimID("c0ffee", "net1"), Spoke: spoke, Kind: kind,
		PodNamespace: "default", Pod: "pod-1", PodUID: "u1", Interface: "net1", Sandbox: "c0ffee",
		MAC: segment.MAC(lab.LAN, spoke), Since: time.Unix(1_800_000_000, 0).UTC(),
	}
}

// text returns operations as text, one a line.
func text(ops []segment.Op) string {
	var lines []string
	for _, op := range ops {
		lines = append(lines, op.String())
	}
	return strings.Join(lines, "\n")
}

func TestDiffOfACompleteSegmentIsEmpty(t *testing.T) {
	for name, have := range map[string]segment.State{
		"waiting":      built(lab),
		"pod attached": attached(built(lab), "srl"),
		"VM attached":  attachedVM(built(lab), "vm"),
		"a link with another kind of name": func() segment.State {
			s := built(lab)
			s.Links = append(s.Links, segment.Link{Index: 50, Name: "mirror0", Type: "veth", Master: 1})
			return s
		}(),
	} {
		if ops := segment.Diff(lab, have); len(ops) > 0 {
			t.Errorf("%s: the operations are:\n%s", name, text(ops))
		}
	}
}

func TestDiffRepairsWhatIsMissingOrChanged(t *testing.T) {
	with := func(s segment.State, f func(*segment.State)) segment.State { f(&s); return s }
	only := func(spokes ...string) segment.Segment { s := lab; s.Spokes = spokes; return s }
	more := lab
	more.Spokes = []string{"host", "srl", "vm"}
	fewer := lab
	fewer.Spokes = []string{"vm"}
	bigger := only("srl")
	bigger.MTU = 8922
	moved := lab
	moved.VXLAN.UnderlayIndex = 9
	gone := lab
	gone.VXLAN.UnderlayIndex = 0
	finished := lab
	finished.TxChecksumOff = []string{"srl"}
	mixed := change(built(finished), "srl_b", func(l *segment.Link) { l.TxChecksum = segment.TxChecksumMixed })
	mixed = change(mixed, "srl_p", func(l *segment.Link) { l.TxChecksum = segment.TxChecksumOff })
	const (
		off = " tx off tso off tx-udp-segmentation off tx-sctp-segmentation off"
		on  = " tx on tso on tx-udp-segmentation on tx-sctp-segmentation on"

		addMulticast = "ip link add vx2 mtu 1422 master br2 type vxlan id 222 dstport 4789 group ff02::14 dev eth1"
	)
	veth := claim("srl", segment.Veth).ID
	four := unicast("192.0.2.1", "192.0.2.2", "192.0.2.4")
	six := unicast("2001:db8::1", "2001:db8::2")
	sixMore := unicast("2001:db8::1", "2001:db8::2", "2001:db8::3")
	moved6 := unicast("2001:db8::9", "2001:db8::2")
	unknown := six
	unknown.Remotes = nil
	unknown4 := four
	unknown4.Remotes = nil
	both := change(built(lab), "vx2", func(l *segment.Link) { l.VXLAN.Remotes = six.Remotes })
	stray := built(lab)
	stray.Links = append(stray.Links, segment.Link{Index: 60, Name: segment.ClaimID("dead", "net1"), Type: "veth"})

	for _, tt := range []struct {
		name string
		want segment.Segment
		have segment.State
		ops  string
	}{
		{
			"the name of the netns is lost", lab,
			with(built(lab), func(s *segment.State) { s.Exists, s.LostName = false, true }),
			"ip netns attach knlvrf",
		},
		{
			"br_netfilter was loaded", lab,
			with(built(lab), func(s *segment.State) { s.Silent = false }),
			segment.Silence{}.String(),
		},
		{
			"a plug has IPv6 on", lab,
			change(built(lab), "vm_p", func(l *segment.Link) { l.IPv6 = true }),
			segment.Silence{}.String(),
		},
		{
			"the record is lost", lab,
			with(built(lab), func(s *segment.State) { s.Record = nil }),
			"record knlvrf",
		},
		{
			"checksums are to be complete", finished, built(lab),
			"record knlvrf\nethtool -K srl_b" + off + "\nethtool -K srl_p" + off,
		},
		{"one setting for checksums was changed", finished, mixed, "ethtool -K srl_b" + off},
		{
			"checksums are left to hardware again", lab, mixed,
			"ethtool -K srl_b" + on + "\nethtool -K srl_p" + on + "\nrecord knlvrf",
		},
		{
			"STP was switched on", lab,
			change(built(lab), "br2", func(l *segment.Link) { l.Bridge.STP = true }),
			"ip link set br2 type bridge stp_state 0",
		},
		{"the VXLAN was deleted", lab, without(built(lab), "vx2"), addMulticast},
		{
			"the VXLAN was deleted under a pod", lab, without(attached(built(lab), "srl"), "vx2"),
			addMulticast + "\nip link set vx2 up",
		},
		{
			"the last claim ended", lab,
			change(built(lab), "vx2", func(l *segment.Link) { l.Up = true }),
			"ip link set vx2 down",
		},
		{"the underlay has another index", moved, built(lab), "record knlvrf\nip link del vx2\n" + addMulticast},
		{"the underlay is gone", gone, built(lab), "record knlvrf\nip link del vx2"},
		{
			"a remote is added", sixMore, built(six),
			"bridge fdb append 00:00:00:00:00:00 dev vx2 dst 2001:db8::3",
		},
		{
			"a remote is deleted", six, built(sixMore),
			"bridge fdb del 00:00:00:00:00:00 dev vx2 dst 2001:db8::3 && bridge fdb flush dev vx2 dst 2001:db8::3",
		},
		{
			"a remote has another address", unicast("192.0.2.1", "192.0.2.2", "192.0.2.3"), built(four),
			"bridge fdb append 00:00:00:00:00:00 dev vx2 dst 192.0.2.3\n" +
				"bridge fdb del 00:00:00:00:00:00 dev vx2 dst 192.0.2.4 && bridge fdb flush dev vx2 dst 192.0.2.4",
		},
		{"the remotes are not known", unknown, built(sixMore), ""},
		{"the remotes that replace a group are not known", unknown, built(lab), "record knlvrf"},
		{"the remotes of another family that replace a group are not known", unknown4, built(lab), "record knlvrf"},
		{
			"remotes replace a group", six, built(lab),
			"record knlvrf\nbridge fdb append 00:00:00:00:00:00 dev vx2 dst 2001:db8::2\n" +
				"ip link set vx2 type vxlan id 222 local 2001:db8::1",
		},
		{
			"a group replaces remotes", lab, built(six),
			"ip link set vx2 type vxlan id 222 group ff02::14\n" +
				"bridge fdb del 00:00:00:00:00:00 dev vx2 dst 2001:db8::2\nrecord knlvrf",
		},
		{
			"a group has remotes beside it", lab, both,
			"bridge fdb del 00:00:00:00:00:00 dev vx2 dst 2001:db8::2",
		},
		{
			"this node has another address", moved6, built(six),
			"record knlvrf\nip link set vx2 type vxlan id 222 local 2001:db8::9",
		},
		{
			"the remotes are of another family", four, built(lab),
			"record knlvrf\nip link del vx2\n" +
				"ip link add vx2 mtu 1422 master br2 type vxlan id 222 dstport 4789 local 192.0.2.1 dev eth1\n" +
				"bridge fdb append 00:00:00:00:00:00 dev vx2 dst 192.0.2.2 dst 192.0.2.4",
		},
		{
			"a spoke is added", more, built(lab),
			"record knlvrf\nip link add host_b mtu 1426 master br2 up type veth peer name host_p mtu 1422 address " +
				segment.MAC(lab.LAN, "host").String() + " up\nip link property add host_b altname host",
		},
		{"a spoke is removed", fewer, built(lab), "record knlvrf\nip link del srl_b"},
		{
			"several spokes are removed", only("host"), built(only("host", "srl", "vm")),
			"record knlvrf\nip link del srl_b vm_b",
		},
		{"a spoke is removed under a pod", fewer, attached(built(lab), "srl"), "record knlvrf"},
		{"a spoke is removed under a VM", only("srl"), attachedVM(built(lab), "vm"), "record knlvrf"},
		{
			"a port was taken out of the bridge", lab,
			change(built(lab), "srl_b", func(l *segment.Link) { l.Master, l.ForwardMask = 0, 0 }),
			"ip link set srl_b master br2\nip link set srl_b type bridge_slave group_fwd_mask 0xfffd",
		},
		{
			"a mask was changed", lab,
			change(built(lab), "vx2", func(l *segment.Link) { l.ForwardMask = 0 }),
			"ip link set vx2 type bridge_slave group_fwd_mask 0xfffd",
		},
		{
			"an altname was removed", lab,
			change(built(lab), "vm_b", func(l *segment.Link) { l.AltNames = nil }),
			"ip link property add vm_b altname vm",
		},
		{
			"a pod is gone", lab, without(attached(built(lab), "srl"), veth),
			"ip link set vx2 down\nip link property add srl_b altname srl\nip link set srl_b up",
		},
		{
			"the macvtap of a VM may be gone", lab,
			change(attachedVM(built(lab), "vm"), "vm_p", func(l *segment.Link) { l.Promisc = 0 }),
			"verify claim " + claim("vm", segment.Macvtap).ID + " on vm",
		},
		{
			"the altname of a pod's veth was removed", lab,
			change(attached(built(lab), "srl"), veth, func(l *segment.Link) { l.AltNames = nil }),
			"ip link property add " + veth + " altname srl",
		},
		{"an attach was never finished", lab, stray, "ip link del " + segment.ClaimID("dead", "net1")},
		{
			"the MTU is raised under a pod", bigger,
			attached(built(only("srl")), "srl"),
			"record knlvrf\nip link set br2 mtu 8922\nip link set vx2 mtu 8922\nip link set " + veth +
				" mtu 8922\nip link set srl_p mtu 8922\nip link set srl_b mtu 8926",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if ops := text(segment.Diff(tt.want, tt.have)); ops != tt.ops {
				t.Errorf("the operations are:\n%s\nwant:\n%s", ops, tt.ops)
			}
		})
	}
}

func TestDiffDeletesNoLinkOfAClaim(t *testing.T) {
	for name, have := range map[string]segment.State{
		"pod": attached(built(lab), "srl"), "VM": attachedVM(built(lab), "vm"),
	} {
		carriers := []string{claim("srl", segment.Veth).ID, "vm_b", "vm_p"}
		other := lab
		other.Spokes, other.MTU, other.VXLAN.UnderlayIndex = []string{"host"}, 9000, 9
		for _, op := range segment.Diff(other, have) {
			var names []string
			switch o := op.(type) {
			case segment.DelLink:
				names = []string{o.Name}
			case segment.DelLinks:
				names = o.Names
			}
			for _, carrier := range carriers {
				if slices.Contains(names, carrier) && (name == "VM" || carrier == carriers[0]) {
					t.Errorf("under a %s: %s", name, op)
				}
			}
		}
	}
}

func TestTeardownFreesTheVNIFirst(t *testing.T) {
	want := "ip link del vx2\nip link del group 27448\nip link del br2\nrecord del knlvrf\nip netns del knlvrf"
	if ops := text(segment.Teardown(attached(built(lab), "srl"))); ops != want {
		t.Errorf("the operations are:\n%s\nwant:\n%s", ops, want)
	}
	if ops := segment.Teardown(segment.State{Netns: "knlvrf"}); len(ops) > 0 {
		t.Errorf("for a segment without anything on the node, the operations are:\n%s", text(ops))
	}
}

func TestPortsAreBuiltLikeSpokesWithTheirOwnMACs(t *testing.T) {
	s := lab
	s.Spokes, s.Node = []string{"web_0", "web_1"}, "worker1"
	ops := segment.Diff(s, segment.State{Netns: s.Netns})
	for _, port := range s.Spokes {
		want := segment.AddPair{Spoke: port, MAC: s.PlugMAC(port), MTU: s.MTU, Bridge: s.Bridge}
		if !slices.ContainsFunc(ops, func(op segment.Op) bool { return op.String() == want.String() }) {
			t.Errorf("%s is not among the operations %v", want, ops)
		}
	}
	if ops := segment.Diff(s, built(s)); len(ops) > 0 {
		t.Errorf("the operations for a complete segment are %v", ops)
	}
	grown := s
	grown.Spokes = []string{"web_0", "web_1", "web_2"}
	if ops := segment.Diff(grown, built(s)); len(ops) != 3 { // the record, the pair and its name
		t.Errorf("the operations for one port more are %v", ops)
	}
	smaller := s
	smaller.Spokes = []string{"web_0"}
	if ops := segment.Diff(smaller, attached(built(s), "web_1")); len(ops) != 1 { // the record
		t.Errorf("the operations for one port less, with a claim, are %v", ops)
	}
}

// A spoke on demand consists of its claim's veth, and is removed with it.
func TestSpokeOnDemandHasNoStandingPair(t *testing.T) {
	id := segment.ClaimID("c1", "net1")
	spoke := segment.SpokeOnDemand(id)
	if !segment.IsOnDemand(spoke) {
		t.Fatalf("%q is not on demand", spoke)
	}
	for _, other := range []string{"srl", "web_0", id} {
		if segment.IsOnDemand(other) {
			t.Fatalf("%q is on demand", other)
		}
	}
	claim := segment.Claim{
		ID: id, Spoke: spoke, Kind: segment.Veth, PodNamespace: "default", Pod: "r1", Interface: "net1", Sandbox: "c1",
		Network: segment.NetworkMark("katlab-a"), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1},
		Since: time.Unix(1000, 0).UTC(),
	}
	if got, ok := segment.ParseAlias(id, claim.Alias()); !ok || !reflect.DeepEqual(got, claim) {
		t.Fatalf("the alias %q is read as %+v", claim.Alias(), got)
	}
	want := segment.Segment{
		LAN: segment.LAN{Name: "megalos:5"}, Netns: "megalos-5", Bridge: "br5", MTU: 1442, OnDemand: true,
	}
	have := segment.State{
		Netns: want.Netns, Exists: true, Silent: true, Record: &want,
		Links: []segment.Link{
			{Index: 2, Name: "br5", Type: "bridge", MTU: 1442, Up: true},
			{
				Index: 3, Name: id, Type: "veth", MTU: 1442, Up: true, Master: 2, ForwardMask: segment.ForwardMask,
				AltNames: []string{spoke}, Alias: claim.Alias(),
			},
		},
	}
	if ops := segment.Diff(want, have); len(ops) != 0 {
		t.Errorf("the operations for a complete segment are %v", ops)
	}
	have.Links[1].AltNames, have.Links[1].Master = nil, 0
	repair := "ip link property add " + id + " altname " + spoke
	if ops := segment.Diff(want, have); len(ops) != 3 || ops[0].String() != repair {
		t.Errorf("without altname and master, the operations are %v", ops)
	}
	have.Links[1].Up = false // the plugin was killed before its last step
	if ops := segment.Diff(want, have); len(ops) != 1 || ops[0].String() != "ip link del "+id {
		t.Errorf("for an unfinished attach, the operations are %v", ops)
	}
}

// Every attach leads to an observation of the whole segment.
func BenchmarkDiffOfALargeSegment(b *testing.B) {
	large := lab
	large.Spokes = nil
	for i := range 500 {
		large.Spokes = append(large.Spokes, fmt.Sprintf("spoke-%d", i))
	}
	have := built(large)
	for _, spoke := range large.Spokes {
		have = change(have, segment.PortName(spoke), func(l *segment.Link) { l.Up, l.AltNames = false, nil })
		c := claim(spoke, segment.Veth)
		c.ID = segment.ClaimID(spoke, "net1")
		have.Links = append(have.Links, segment.Link{
			Index: 5000 + len(have.Links), Name: c.ID, AltNames: []string{spoke}, Alias: c.Alias(),
			Type: "veth", Master: 1, MTU: large.MTU, Up: true, ForwardMask: segment.ForwardMask,
		})
	}
	have = change(have, large.VXLAN.Name, func(l *segment.Link) { l.Up = true })
	for b.Loop() {
		if ops := segment.Diff(large, have); len(ops) > 0 {
			b.Fatalf("the operations are %v", ops)
		}
	}
}
