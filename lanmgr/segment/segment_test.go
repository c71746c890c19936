package segment_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
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
	LAN: segment.LAN{Namespace: "default", Name: "lab", UID: "1"}, Netns: "knlvrf", Bridge: "br2", MTU: 1422,
	VXLAN:  segment.VXLAN{Name: "vx2", VNI: 222, Port: 4789, Group: netip.MustParseAddr("ff02::14"), Underlay: "eth1", UnderlayIndex: 7},
	Spokes: []string{"srl", "vm"},
}

// unicast is the segment with remotes instead of a group.
func unicast(local string, remotes ...string) segment.Segment {
	s := lab
	s.VXLAN.Group, s.VXLAN.Local = netip.Addr{}, netip.MustParseAddr(local)
	for _, r := range remotes {
		s.Remotes = append(s.Remotes, netip.MustParseAddr(r))
	}
	return s
}

// built is the state of a node that has the segment, with nothing attached.
func built(s segment.Segment) segment.State {
	record := s.Recorded()
	port := segment.Link{Type: "veth", Master: 1, Up: true, MTU: segment.PortMTU(s.MTU), ForwardMask: segment.ForwardMask}
	state := segment.State{
		Netns: s.Netns, Exists: true, Silent: true, Record: &record,
		Links: []segment.Link{
			{Index: 1, Name: s.Bridge, Type: "bridge", MTU: s.MTU, Up: true},
			{
				Index: 2, Name: s.VXLAN.Name, Type: "vxlan", Master: 1, MTU: s.MTU, ForwardMask: segment.ForwardMask,
				VXLAN: segment.VXLANState{VNI: s.VXLAN.VNI, Port: s.VXLAN.Port, Group: s.VXLAN.Group, Local: s.VXLAN.Local, Remotes: s.Remotes, UnderlayIndex: s.VXLAN.UnderlayIndex},
			},
		},
	}
	for i, spoke := range s.Spokes {
		p := port
		p.Index, p.Name, p.AltNames = 10+2*i, segment.PortName(spoke), []string{spoke}
		state.Links = append(state.Links, p, segment.Link{Index: 11 + 2*i, Name: segment.PlugName(spoke), Type: "veth", MTU: s.MTU, Up: true})
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
	s.Links = slices.DeleteFunc(slices.Clone(s.Links), func(l segment.Link) bool { return slices.Contains(names, l.Name) })
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
	return change(s, segment.PlugName(spoke), func(l *segment.Link) { l.AltNames, l.Alias, l.Promisc = []string{c.ID}, c.Alias(), 1 })
}

func claim(spoke string, kind segment.Kind) segment.Claim {
	return segment.Claim{
		ID: segment.ClaimID("c0ffee", "net1"), Spoke: spoke, Kind: kind, PodNamespace: "default", Pod: "pod-1", PodUID: "u1",
		Interface: "net1", Sandbox: "c0ffee", MAC: segment.MAC(lab.LAN, spoke), Since: time.Unix(1_800_000_000, 0).UTC(),
	}
}

func text(ops []segment.Op) string {
	var lines []string
	for _, op := range ops {
		lines = append(lines, op.String())
	}
	return strings.Join(lines, "\n")
}

func TestWhatStandsIsLeftAlone(t *testing.T) {
	for name, have := range map[string]segment.State{
		"waiting":      built(lab),
		"pod attached": attached(built(lab), "srl"),
		"VM attached":  attachedVM(built(lab), "vm"),
		"a stranger's link": func() segment.State {
			s := built(lab)
			s.Links = append(s.Links, segment.Link{Index: 50, Name: "mirror0", Type: "veth", Master: 1})
			return s
		}(),
	} {
		if ops := segment.Diff(lab, have); len(ops) > 0 {
			t.Errorf("%s: to do:\n%s", name, text(ops))
		}
	}
}

func TestDiffMendsWhatIsMissingOrChanged(t *testing.T) {
	more := lab
	more.Spokes = []string{"host", "srl", "vm"}
	fewer := lab
	fewer.Spokes = []string{"vm"}
	bigger := lab
	bigger.MTU = 8922
	moved := lab
	moved.VXLAN.UnderlayIndex = 9
	gone := lab
	gone.VXLAN.UnderlayIndex = 0
	finished := lab
	finished.TxChecksumOff = []string{"srl"}
	mixed := change(built(finished), "srl_b", func(l *segment.Link) { l.TxChecksum = segment.TxChecksumMixed })
	mixed = change(mixed, "srl_p", func(l *segment.Link) { l.TxChecksum = segment.TxChecksumOff })
	const off, on = " tx off tso off tx-udp-segmentation off tx-sctp-segmentation off", " tx on tso on tx-udp-segmentation on tx-sctp-segmentation on"
	four := unicast("192.0.2.1", "192.0.2.2", "192.0.2.4")
	six, sixMore := unicast("2001:db8::1", "2001:db8::2"), unicast("2001:db8::1", "2001:db8::2", "2001:db8::3")
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
		{"name of the netns taken away", lab, func() segment.State { s := built(lab); s.Exists, s.LostName = false, true; return s }(), `ip netns attach knlvrf`},
		{"br_netfilter loaded", lab, func() segment.State { s := built(lab); s.Silent = false; return s }(), segment.Silence{}.String()},
		{"IPv6 switched on for a plug", lab, change(built(lab), "vm_p", func(l *segment.Link) { l.IPv6 = true }), segment.Silence{}.String()},
		{"record gone", lab, func() segment.State { s := built(lab); s.Record = nil; return s }(), "record knlvrf"},
		{"checksums to be finished", finished, built(lab), "record knlvrf\nethtool -K srl_b" + off + "\nethtool -K srl_p" + off},
		{"one switched back by hand", finished, mixed, "ethtool -K srl_b" + off},
		{"left to hardware again", lab, mixed, "ethtool -K srl_b" + on + "\nethtool -K srl_p" + on + "\nrecord knlvrf"},
		{"STP switched on", lab, change(built(lab), "br2", func(l *segment.Link) { l.Bridge.STP = true }), "ip link set br2 type bridge stp_state 0"},
		{"VXLAN deleted", lab, without(built(lab), "vx2"), "ip link add vx2 mtu 1422 master br2 type vxlan id 222 dstport 4789 group ff02::14 dev eth1"},
		{
			"VXLAN deleted with a pod attached", lab, without(attached(built(lab), "srl"), "vx2"),
			"ip link add vx2 mtu 1422 master br2 type vxlan id 222 dstport 4789 group ff02::14 dev eth1\nip link set vx2 up",
		},
		{"last claim gone", lab, change(built(lab), "vx2", func(l *segment.Link) { l.Up = true }), "ip link set vx2 down"},
		{
			"underlay moved", moved, built(lab),
			"record knlvrf\nip link del vx2\nip link add vx2 mtu 1422 master br2 type vxlan id 222 dstport 4789 group ff02::14 dev eth1",
		},
		{"underlay gone", gone, built(lab), "record knlvrf\nip link del vx2"},
		{"remote added", sixMore, built(six), "bridge fdb append 00:00:00:00:00:00 dev vx2 dst 2001:db8::3"},
		{"remote gone", six, built(sixMore), "bridge fdb del 00:00:00:00:00:00 dev vx2 dst 2001:db8::3 && bridge fdb flush dev vx2 dst 2001:db8::3"},
		{
			"remote with another address", unicast("192.0.2.1", "192.0.2.2", "192.0.2.3"), built(four),
			"bridge fdb append 00:00:00:00:00:00 dev vx2 dst 192.0.2.3\nbridge fdb del 00:00:00:00:00:00 dev vx2 dst 192.0.2.4 && bridge fdb flush dev vx2 dst 192.0.2.4",
		},
		{"remotes not known", unknown, built(sixMore), ""},
		{"remotes not known, instead of a group", unknown, built(lab), "record knlvrf"},
		{"remotes not known, of another family", unknown4, built(lab), "record knlvrf"},
		{
			"multicast to unicast", six, built(lab),
			"record knlvrf\nbridge fdb append 00:00:00:00:00:00 dev vx2 dst 2001:db8::2\nip link set vx2 type vxlan id 222 local 2001:db8::1",
		},
		{
			"unicast to multicast", lab, built(six),
			"ip link set vx2 type vxlan id 222 group ff02::14\nbridge fdb del 00:00:00:00:00:00 dev vx2 dst 2001:db8::2\nrecord knlvrf",
		},
		{"multicast with remotes left", lab, both, "bridge fdb del 00:00:00:00:00:00 dev vx2 dst 2001:db8::2"},
		{"another address of this node", moved6, built(six), "record knlvrf\nip link set vx2 type vxlan id 222 local 2001:db8::9"},
		{
			"unicast of another family", four, built(lab),
			"record knlvrf\nip link del vx2\nip link add vx2 mtu 1422 master br2 type vxlan id 222 dstport 4789 local 192.0.2.1 dev eth1\n" +
				"bridge fdb append 00:00:00:00:00:00 dev vx2 dst 192.0.2.2 dst 192.0.2.4",
		},
		{
			"spoke added", more, built(lab),
			"record knlvrf\nip link add host_b mtu 1426 master br2 up type veth peer name host_p mtu 1422 address " +
				segment.MAC(lab.LAN, "host").String() + " up\nip link property add host_b altname host",
		},
		{"spoke removed", fewer, built(lab), "record knlvrf\nip link del srl_b"},
		{
			"several spokes removed", func() segment.Segment { s := lab; s.Spokes = []string{"host"}; return s }(), func() segment.State {
				s := lab
				s.Spokes = []string{"host", "srl", "vm"}
				return built(s)
			}(), "record knlvrf\nip link del srl_b vm_b",
		},
		{"spoke removed under a pod", fewer, attached(built(lab), "srl"), "record knlvrf"},
		{"spoke removed under a VM", func() segment.Segment { s := lab; s.Spokes = []string{"srl"}; return s }(), attachedVM(built(lab), "vm"), "record knlvrf"},
		{"port taken out of the bridge", lab, change(built(lab), "srl_b", func(l *segment.Link) { l.Master, l.ForwardMask = 0, 0 }), "ip link set srl_b master br2\nip link set srl_b type bridge_slave group_fwd_mask 0xfffd"},
		{"mask changed", lab, change(built(lab), "vx2", func(l *segment.Link) { l.ForwardMask = 0 }), "ip link set vx2 type bridge_slave group_fwd_mask 0xfffd"},
		{"altname taken away", lab, change(built(lab), "vm_b", func(l *segment.Link) { l.AltNames = nil }), "ip link property add vm_b altname vm"},
		{
			"pod gone", lab, func() segment.State {
				s := attached(built(lab), "srl")
				return without(s, claim("srl", segment.Veth).ID)
			}(),
			"ip link set vx2 down\nip link property add srl_b altname srl\nip link set srl_b up",
		},
		{"VM's macvtap in doubt", lab, change(attachedVM(built(lab), "vm"), "vm_p", func(l *segment.Link) { l.Promisc = 0 }), "settle vm " + claim("vm", segment.Macvtap).ID},
		{
			"altname of a pod's link taken away", lab,
			change(attached(built(lab), "srl"), claim("srl", segment.Veth).ID, func(l *segment.Link) { l.AltNames = nil }),
			"ip link property add " + claim("srl", segment.Veth).ID + " altname srl",
		},
		{"attach that never finished", lab, stray, "ip link del " + segment.ClaimID("dead", "net1")},
		{
			"MTU raised with a pod attached", func() segment.Segment { s := bigger; s.Spokes = []string{"srl"}; return s }(),
			func() segment.State {
				one := lab
				one.Spokes = []string{"srl"}
				return attached(built(one), "srl")
			}(),
			"record knlvrf\nip link set br2 mtu 8922\nip link set vx2 mtu 8922\nip link set " + claim("srl", segment.Veth).ID +
				" mtu 8922\nip link set srl_p mtu 8922\nip link set srl_b mtu 8926",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if ops := text(segment.Diff(tt.want, tt.have)); ops != tt.ops {
				t.Errorf("to do:\n%s\nwant:\n%s", ops, tt.ops)
			}
		})
	}
}

func TestRemotesArePartOfTheWishButNotOfTheRecord(t *testing.T) {
	one, two := unicast("192.0.2.1", "192.0.2.2"), unicast("192.0.2.1", "192.0.2.2", "192.0.2.3")
	none, unknown := one, one
	none.Remotes, unknown.Remotes = []netip.Addr{}, nil
	if one.Equal(two) || none.Equal(unknown) || !one.Equal(unicast("192.0.2.1", "192.0.2.2")) {
		t.Error("two wishes that differ in their remotes alone are taken for the same, or one for two")
	}
	b, err := json.Marshal(one)
	if err != nil {
		t.Fatal(err)
	}
	var read segment.Segment
	if err := json.Unmarshal(b, &read); err != nil || !read.Equal(one.Recorded()) || !read.Equal(two.Recorded()) {
		t.Errorf("read back %+v, %v", read, err)
	}
}

func TestNothingAttachedIsDeleted(t *testing.T) {
	for name, have := range map[string]segment.State{"pod": attached(built(lab), "srl"), "VM": attachedVM(built(lab), "vm")} {
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
					t.Errorf("%s attached: %s", name, op)
				}
			}
		}
	}
}

func TestTeardownFreesTheVNIFirst(t *testing.T) {
	want := "ip link del vx2\nip link del group 27448\nip link del br2\nrecord del knlvrf\nip netns del knlvrf"
	if ops := text(segment.Teardown(attached(built(lab), "srl"))); ops != want {
		t.Errorf("to do:\n%s\nwant:\n%s", ops, want)
	}
	if ops := segment.Teardown(segment.State{Netns: "knlvrf"}); len(ops) > 0 {
		t.Errorf("where there is nothing, to do:\n%s", text(ops))
	}
}

func TestAliasTellsTheClaim(t *testing.T) {
	want := claim("srl", segment.Veth)
	got, ok := segment.ParseAlias(want.ID, want.Alias())
	if !ok || got.Alias() != want.Alias() || !got.Since.Equal(want.Since) || got.MAC.String() != want.MAC.String() {
		t.Errorf("read back %+v, want %+v", got, want)
	}
	if !got.OfSandbox("c0ffee") || got.OfSandbox("decaf") {
		t.Error("the claim does not know its sandbox")
	}
	long := want
	long.Pod, long.PodNamespace, long.Sandbox = strings.Repeat("p", 253), strings.Repeat("n", 63), strings.Repeat("a", 64)
	got, ok = segment.ParseAlias(long.ID, long.Alias())
	if len(long.Alias()) > 255 || !ok || got.Spoke != "srl" || !got.OfSandbox(long.Sandbox) {
		t.Errorf("a long alias of %d bytes reads back as %+v", len(long.Alias()), got)
	}
	if _, ok := segment.ParseAlias("k", "uplink to spine 3"); ok {
		t.Error("somebody's own alias was read as a claim")
	}
}

func TestMACIsStableAndLocal(t *testing.T) {
	other := segment.LAN{Namespace: "default", Name: "lab", UID: "2"} // deleted and made again
	a := segment.MAC(lab.LAN, "srl")
	if a.String() != segment.MAC(other, "srl").String() {
		t.Error("the MAC changed with the LAN's UID")
	}
	if a.String() == segment.MAC(lab.LAN, "vm").String() {
		t.Error("two spokes have one MAC")
	}
	if a[0]&3 != 2 {
		t.Errorf("%s is not a locally administered unicast address", net.HardwareAddr(a))
	}
}

func TestNamespacesThatMayAttach(t *testing.T) {
	open := lab
	open.AllowedNamespaces = []string{"blue"}
	all := lab
	all.AllowedNamespaces = []string{"*"}
	for _, tt := range []struct {
		segment   segment.Segment
		namespace string
		want      bool
	}{{lab, "default", true}, {lab, "blue", false}, {open, "blue", true}, {open, "red", false}, {all, "red", true}} {
		if got := tt.segment.Allows(tt.namespace); got != tt.want {
			t.Errorf("%v open to %s: %v", tt.segment.AllowedNamespaces, tt.namespace, got)
		}
	}
}

// Every attach leads to a look at the whole segment.
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
			Index: 5000 + len(have.Links), Name: c.ID, AltNames: []string{spoke}, Alias: c.Alias(), Type: "veth", Master: 1,
			MTU: large.MTU, Up: true, ForwardMask: segment.ForwardMask,
		})
	}
	have = change(have, large.VXLAN.Name, func(l *segment.Link) { l.Up = true })
	for b.Loop() {
		if ops := segment.Diff(large, have); len(ops) > 0 {
			b.Fatalf("to do: %v", ops)
		}
	}
}

func TestSpokesWithFinishedChecksumsArePartOfTheWish(t *testing.T) {
	other := lab
	other.TxChecksumOff = []string{"srl"}
	if lab.Equal(other) || !other.Equal(other) {
		t.Error("two wishes that differ in txChecksumOff alone are taken for the same, or one for two")
	}
}

func TestAClaimIsOfItsPodHoweverLongTheName(t *testing.T) {
	for _, pod := range []string{"srl-1", strings.Repeat("long-", 50)} {
		c := claim("srl", segment.Veth)
		c.Pod = pod
		got, _ := segment.ParseAlias(c.ID, c.Alias())
		if !got.IsOf("default", pod) {
			t.Errorf("%+v is not of its pod %s", got, pod)
		}
		if got.IsOf("default", "srl-12") || got.IsOf("other", pod) || got.IsOf("default", "another") {
			t.Errorf("%+v is of another pod, too", got)
		}
	}
}

func TestPortsAreCountedFrom0AndNothingElseIsTakenForOne(t *testing.T) {
	for name, want := range map[string]string{"web_0": "web 0 true", "a.b-c_499": "a.b-c 499 true"} {
		pool, number, ok := segment.PoolOf(name)
		if got := fmt.Sprint(pool, " ", number, " ", ok); got != want || segment.Port(pool, number) != name {
			t.Errorf("%s is taken for %s", name, got)
		}
	}
	for _, name := range []string{"", "web", "web-3", "web.3", "_3", "web_", "web_03", "web_+3", "web_-3", "web_x", "web_3_b"} {
		if pool, number, ok := segment.PoolOf(name); ok {
			t.Errorf("%q is taken for port %d of %q", name, number, pool)
		}
	}
}

func TestMACsOfPortsDifferByNodeAndThoseByOrdinalDoNot(t *testing.T) {
	on := func(node string) segment.Segment {
		s := lab
		s.Spokes, s.MACByOrdinal, s.Node = []string{"db_0", "srl", "web_0"}, []string{"db"}, node
		return s
	}
	one, two := on("worker1"), on("worker2")
	if one.Equal(two) || one.Equal(lab) {
		t.Error("two nodes' wishes are the same, and so their MACs would be")
	}
	mac := func(s segment.Segment, spoke, pod string) string {
		t.Helper()
		m, err := s.PodMAC(spoke, pod)
		if err != nil {
			t.Fatal(err)
		}
		if m[0] != 0x02 || len(m) != 6 {
			t.Errorf("%s has the MAC %s, which is no locally administered one", spoke, m)
		}
		return m.String()
	}
	if mac(one, "srl", "srl-1") != segment.MAC(lab.LAN, "srl").String() || mac(two, "srl", "x") != mac(one, "srl", "y") {
		t.Error("a single spoke's MAC depends on something else than LAN and spoke")
	}
	if mac(one, "web_0", "web-0") == mac(two, "web_0", "web-0") || mac(one, "web_0", "a") != mac(one, "web_0", "b") {
		t.Error("a port's MAC is the same on two nodes, or depends on the pod")
	}
	if mac(one, "db_0", "db-1") != mac(two, "db_7", "db-1") || mac(one, "db_0", "db-1") == mac(one, "db_0", "db-2") {
		t.Error("a MAC by ordinal depends on something else than that")
	}
	for _, pod := range []string{"", "nameless", "db-", "db-x", "db-01", "-1"} {
		if m, err := one.PodMAC("db_0", pod); !errors.Is(err, segment.ErrNoOrdinal) {
			t.Errorf("the pod %q has the MAC %s, %v", pod, m, err)
		}
	}
}

func TestPortsAreBuiltLikeSpokesWithTheirOwnMACs(t *testing.T) {
	s := lab
	s.Spokes, s.Node = []string{"web_0", "web_1"}, "worker1"
	ops := segment.Diff(s, segment.State{Netns: s.Netns})
	for _, port := range s.Spokes {
		want := segment.AddPair{Spoke: port, MAC: s.PlugMAC(port), MTU: s.MTU, Bridge: s.Bridge}
		if !slices.ContainsFunc(ops, func(op segment.Op) bool { return op.String() == want.String() }) {
			t.Errorf("%s is not among %v", want, ops)
		}
	}
	if ops := segment.Diff(s, built(s)); len(ops) > 0 {
		t.Errorf("to do where all stands: %v", ops)
	}
	grown := s
	grown.Spokes = []string{"web_0", "web_1", "web_2"}
	if ops := segment.Diff(grown, built(s)); len(ops) != 3 { // the record, the pair and its name
		t.Errorf("for one port more: %v", ops)
	}
	smaller := s
	smaller.Spokes = []string{"web_0"}
	if ops := segment.Diff(smaller, attached(built(s), "web_1")); len(ops) != 1 { // the record
		t.Errorf("for one port less, which is in use: %v", ops)
	}
}

// told is a unicast segment that is told where MACs are, by their last octet and the remote's.
func told(at map[byte]byte) segment.Segment {
	s := unicast("192.0.2.1", "192.0.2.2", "192.0.2.3")
	s.VXLAN.NoLearning, s.FDB = true, []segment.FDBEntry{}
	for _, mac := range slices.Sorted(maps.Keys(at)) {
		s.FDB = append(s.FDB, segment.FDBEntry{MAC: [6]byte{2, 0, 0, 0, 0, mac}, VTEP: netip.AddrFrom4([4]byte{192, 0, 2, at[mac]})})
	}
	return s
}

// toldState is the state of a node that has it, with both halves of each entry.
func toldState(s segment.Segment) segment.State {
	return change(attached(built(s), "srl"), "vx2", func(l *segment.Link) {
		l.NoLearning, l.VXLAN.NoLearning = true, true
		for _, e := range s.FDB {
			l.VXLAN.FDB = append(l.VXLAN.FDB, segment.FDBState{FDBEntry: e, Bridge: true})
		}
	})
}

func TestAVXLANIsToldWhereMACsAre(t *testing.T) {
	const (
		set       = "bridge fdb replace 02:00:00:00:00:%02x dev vx2 dst 192.0.2.%d self master extern_learn"
		del       = "bridge fdb del 02:00:00:00:00:%02x dev vx2 dst 192.0.2.%d self"
		delBridge = "bridge fdb del 02:00:00:00:00:%02x dev vx2 master"
	)
	one, none := told(map[byte]byte{9: 2}), told(nil)
	unknown, partial := one, none
	unknown.FDB = nil
	partial.Partial, partial.Remotes = true, partial.Remotes[:1]
	learning := unicast("192.0.2.1", "192.0.2.2", "192.0.2.3")
	half := func(f func(*segment.FDBState)) segment.State {
		return change(toldState(one), "vx2", func(l *segment.Link) {
			l.VXLAN.FDB = slices.Clone(l.VXLAN.FDB)
			f(&l.VXLAN.FDB[0])
		})
	}
	for _, tt := range []struct {
		name string
		want segment.Segment
		have segment.State
		ops  []string
	}{
		{"as it should be", one, toldState(one), nil},
		{"a MAC more", told(map[byte]byte{8: 2, 9: 2, 10: 3}), toldState(one), []string{fmt.Sprintf(set+"; "+set, 8, 2, 10, 3)}},
		{"a MAC gone", none, toldState(one), []string{fmt.Sprintf(del+"; "+delBridge, 9, 2, 9)}},
		{"a MAC elsewhere", told(map[byte]byte{9: 3}), toldState(one), []string{fmt.Sprintf(set, 9, 3)}},
		{"not known", unknown, toldState(one), nil},
		{"some not known", partial, toldState(one), nil},
		{"some not known, one elsewhere", func() segment.Segment { s := told(map[byte]byte{9: 3}); s.Partial = true; return s }(), toldState(one), []string{fmt.Sprintf(set, 9, 3)}},
		{"the MAC has shown itself here", one, half(func(e *segment.FDBState) { e.Bridge = false }), nil},
		{"and is believed", none, half(func(e *segment.FDBState) { e.Bridge = false }), []string{fmt.Sprintf(del, 9, 2)}},
		{"the VXLAN's half taken away", one, half(func(e *segment.FDBState) { e.VTEP = netip.Addr{} }), []string{fmt.Sprintf(set, 9, 2)}},
		{"the bridge's half left", none, half(func(e *segment.FDBState) { e.VTEP = netip.Addr{} }), []string{fmt.Sprintf(delBridge, 9)}},
		{"very many", told(map[byte]byte{1: 2, 2: 2, 3: 2, 4: 2, 5: 2}), toldState(none), []string{fmt.Sprintf(set+"; "+set+"; "+set, 1, 2, 2, 2, 3, 2) + "; and 2 more"}},
		{"the bridge learns by hand", one, change(toldState(one), "vx2", func(l *segment.Link) { l.NoLearning = false }), []string{"bridge link set dev vx2 learning off"}},
		{"the VXLAN learns by hand", one, change(toldState(one), "vx2", func(l *segment.Link) { l.VXLAN.NoLearning = false }), []string{"ip link set vx2 type vxlan id 222 local 192.0.2.1 nolearning"}},
		{
			"the VXLAN taken out of the bridge", one, change(toldState(one), "vx2", func(l *segment.Link) { l.Master, l.NoLearning = 0, false }),
			[]string{"ip link set vx2 master br2", "ip link set vx2 type bridge_slave group_fwd_mask 0xfffd", "bridge link set dev vx2 learning off"},
		},
		{
			"the VXLAN deleted", one, without(toldState(one), "vx2"), []string{
				"ip link add vx2 mtu 1422 master br2 type vxlan id 222 dstport 4789 local 192.0.2.1 dev eth1 nolearning",
				"bridge fdb append 00:00:00:00:00:00 dev vx2 dst 192.0.2.2 dst 192.0.2.3", fmt.Sprintf(set, 9, 2),
				"ip link set vx2 up",
			},
		},
		{"nobody is attached", one, change(built(none), "vx2", func(l *segment.Link) { l.NoLearning, l.VXLAN.NoLearning = true, true }), nil},
		{"from learning", one, attached(built(learning), "srl"), []string{
			"record knlvrf", "bridge link set dev vx2 learning off", "ip link set vx2 type vxlan id 222 local 192.0.2.1 nolearning", fmt.Sprintf(set, 9, 2),
		}},
		{"from a group, some not known", partial, attached(built(lab), "srl"), []string{"record knlvrf"}},
		{"to learning", learning, toldState(one), []string{
			"record knlvrf", "bridge link set dev vx2 learning on", "ip link set vx2 type vxlan id 222 local 192.0.2.1", fmt.Sprintf(del+"; "+delBridge, 9, 2, 9),
		}},
		{"to a group", func() segment.Segment {
			s := lab
			s.VXLAN.Group = netip.MustParseAddr("239.0.0.1")
			return s
		}(), toldState(one), []string{
			"ip link set vx2 type vxlan id 222 group 239.0.0.1", "bridge fdb del 00:00:00:00:00:00 dev vx2 dst 192.0.2.2 dst 192.0.2.3",
			fmt.Sprintf(del+"; "+delBridge, 9, 2, 9), "record knlvrf", "bridge link set dev vx2 learning on",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if ops, want := text(segment.Diff(tt.want, tt.have)), strings.Join(tt.ops, "\n"); ops != want {
				t.Errorf("to do:\n%s\nwant:\n%s", ops, want)
			}
		})
	}
	if one.Equal(none) || none.Equal(unknown) || none.Equal(partial) || !one.Recorded().Equal(none.Recorded()) {
		t.Error("wishes that differ in what is told are taken for the same, or their records for different ones")
	}
}

// A node answers for others' stations where that is wanted; where it is not any more, its bridge forgets them first.
func TestANodeAnswersForStationsItIsToldOf(t *testing.T) {
	const (
		add4     = "ip neigh replace 10.0.0.9 lladdr 02:00:00:00:00:09 dev br2 nud permanent extern_learn"
		add6     = "ip neigh replace fd00::9 lladdr 02:00:00:00:00:09 dev br2 nud permanent extern_learn"
		suppress = "bridge link set dev vx2 neigh_suppress on"
		ipv6     = "sysctl net.ipv6.conf.br2.addr_gen_mode=1 net.ipv6.conf.br2.accept_ra=0 net.ipv6.conf.br2.disable_ipv6=0"
	)
	off := told(map[byte]byte{9: 2})
	on, unknown := off, off
	on.VXLAN.SuppressNeighbors, unknown.VXLAN.SuppressNeighbors = true, true
	mac := [6]byte{2, 0, 0, 0, 0, 9}
	on.Neighbors = []segment.Neighbor{{IP: netip.MustParseAddr("10.0.0.9"), MAC: mac}, {IP: netip.MustParseAddr("fd00::9"), MAC: mac}}
	offSmall := off
	small, others := on, on
	offSmall.MTU, small.MTU = 1279, 1279
	others.Neighbors = []segment.Neighbor{{IP: on.Neighbors[0].IP, MAC: [6]byte{2, 0, 0, 0, 0, 8}}}
	partial := others
	partial.Partial = true
	answering := func(s segment.Segment) segment.State {
		state := change(toldState(s), "vx2", func(l *segment.Link) { l.Suppress = true })
		return change(state, "br2", func(l *segment.Link) { l.Neighbors, l.IPv6, l.NoIPv6 = s.Neighbors, s.MTU >= 1280, true })
	}
	at := func(s segment.Segment, link string, f func(*segment.Link)) segment.State {
		return change(answering(s), link, f)
	}
	lacking := func(state segment.State, mtu int) segment.State {
		return change(state, "br2", func(l *segment.Link) { l.LacksIPv6, l.MTU = true, mtu })
	}
	for _, tt := range []struct {
		name string
		want segment.Segment
		have segment.State
		ops  []string
	}{
		{"as it should be", on, answering(on), nil},
		{"switched on", on, toldState(off), []string{"record knlvrf", suppress, ipv6, add4 + "; " + add6}},
		{"switched off", off, answering(on), []string{"record knlvrf", "ip neigh del 10.0.0.9 dev br2; ip neigh del fd00::9 dev br2", "bridge link set dev vx2 neigh_suppress off", "sysctl net.ipv6.conf.br2.disable_ipv6=1"}},
		{"not known", unknown, answering(on), nil},
		{"another MAC, and one gone", others, answering(on), []string{strings.ReplaceAll(add4, ":09", ":08"), "ip neigh del fd00::9 dev br2"}},
		{"one gone, some not known", partial, answering(on), []string{strings.ReplaceAll(add4, ":09", ":08")}},
		{"a LAN too small for IPv6", small, toldState(offSmall), []string{"record knlvrf", suppress, add4}},
		{"IPv6 switched off by hand", on, at(on, "br2", func(l *segment.Link) { l.IPv6 = false }), []string{ipv6, add6}},
		{"a kernel without IPv6, first look", on, lacking(toldState(off), off.MTU), []string{"record knlvrf", suppress, add4}},
		{"a kernel without IPv6", on, lacking(change(answering(on), "br2", func(l *segment.Link) { l.Neighbors, l.IPv6 = on.Neighbors[:1], false }), off.MTU), nil},
		{"MTU raised to one for IPv6", on, lacking(toldState(off), 1279), []string{"record knlvrf", "ip link set br2 mtu 1422", suppress, ipv6, add4 + "; " + add6}},
		{"IPv6 with an address", on, at(on, "br2", func(l *segment.Link) { l.NoIPv6 = false }), []string{
			"sysctl net.ipv6.conf.all.disable_ipv6=1 net.bridge.bridge-nf-call-{iptables,ip6tables,arptables}=0", ipv6, add6,
		}},
		{"the VXLAN taken out of the bridge", on, at(on, "vx2", func(l *segment.Link) { l.Master = 0 }), []string{
			"ip link set vx2 master br2", "ip link set vx2 type bridge_slave group_fwd_mask 0xfffd", "bridge link set dev vx2 learning off", suppress,
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			have := change(tt.have, claim("srl", segment.Veth).ID, func(l *segment.Link) { l.MTU = tt.want.MTU })
			if ops, want := text(segment.Diff(tt.want, have)), strings.Join(tt.ops, "\n"); ops != want {
				t.Errorf("to do:\n%s\nwant:\n%s", ops, want)
			}
		})
	}
	if !segment.OnlyTablesDiffer(on, others) || segment.OnlyTablesDiffer(on, unknown) || segment.OnlyTablesDiffer(on, off) {
		t.Error("a change of neighbours is not told from one of what is wanted")
	}
	if ops, want := text(segment.DiffTables(on, others, true)), strings.ReplaceAll(add4, ":09", ":08")+"\nip neigh del fd00::9 dev br2"; ops != want {
		t.Errorf("told:\n%s\nwant:\n%s", ops, want)
	}
	nobody := small
	nobody.Neighbors = []segment.Neighbor{}
	if ops := text(segment.DiffTables(nobody, small, true)); ops != add4 {
		t.Errorf("in a LAN too small for IPv6 told:\n%s\nwant:\n%s", ops, add4)
	}
	if on.Equal(others) || on.Equal(unknown) || !on.Recorded().Equal(others.Recorded()) {
		t.Error("wishes that differ in neighbours are taken for the same, or their records for different ones")
	}
}

// A spoke that is made with its claim has no standing pair, and goes with it.
func TestASpokeOnDemandIsItsClaimsLinkAlone(t *testing.T) {
	id := segment.ClaimID("c1", "net1")
	spoke := segment.SpokeOnDemand(id)
	if !segment.IsOnDemand(spoke) || segment.IsOnDemand("srl") || segment.IsOnDemand("web_0") || segment.IsOnDemand(id) {
		t.Fatalf("%q is not told from others", spoke)
	}
	claim := segment.Claim{
		ID: id, Spoke: spoke, Kind: segment.Veth, PodNamespace: "default", Pod: "r1", Interface: "net1", Sandbox: "c1",
		Network: segment.NetworkMark("katlab-a"), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Since: time.Unix(1000, 0).UTC(),
	}
	if got, ok := segment.ParseAlias(id, claim.Alias()); !ok || !reflect.DeepEqual(got, claim) {
		t.Fatalf("alias %q is read as %+v", claim.Alias(), got)
	}
	want := segment.Segment{LAN: segment.LAN{Name: "megalos:5"}, Netns: "megalos-5", Bridge: "br5", MTU: 1442, OnDemand: true}
	have := segment.State{
		Netns: want.Netns, Exists: true, Silent: true, Record: &want,
		Links: []segment.Link{
			{Index: 2, Name: "br5", Type: "bridge", MTU: 1442, Up: true},
			{Index: 3, Name: id, Type: "veth", MTU: 1442, Up: true, Master: 2, ForwardMask: segment.ForwardMask, AltNames: []string{spoke}, Alias: claim.Alias()},
		},
	}
	if ops := segment.Diff(want, have); len(ops) != 0 {
		t.Errorf("to do: %v", ops)
	}
	have.Links[1].AltNames, have.Links[1].Master = nil, 0
	var did []string
	for _, op := range segment.Diff(want, have) {
		did = append(did, op.String())
	}
	if want := "ip link property add " + id + " altname " + spoke; len(did) != 3 || did[0] != want {
		t.Errorf("repaired by %q", did)
	}
	have.Links[1].Up = false // made, and its plugin was killed
	if ops := segment.Diff(want, have); len(ops) != 1 || ops[0].String() != "ip link del "+id {
		t.Errorf("what never was attached: %v", ops)
	}
}
