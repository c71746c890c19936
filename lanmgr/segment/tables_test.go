package segment_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// withFDB returns a unicast segment that does not learn. at has the last octets of MACs and of their remotes.
func withFDB(at map[byte]byte) segment.Segment {
	s := unicast("192.0.2.1", "192.0.2.2", "192.0.2.3")
	s.VXLAN.NoLearning, s.FDB = true, []segment.FDBEntry{}
	for _, mac := range slices.Sorted(maps.Keys(at)) {
		s.FDB = append(s.FDB, segment.FDBEntry{
			MAC: [6]byte{2, 0, 0, 0, 0, mac}, VTEP: netip.AddrFrom4([4]byte{192, 0, 2, at[mac]}),
		})
	}
	return s
}

// stateWithFDB returns the state of a node that has the segment, with a claim and both halves of each entry.
func stateWithFDB(s segment.Segment) segment.State {
	return change(attached(built(s), "srl"), "vx2", func(l *segment.Link) {
		l.NoLearning, l.VXLAN.NoLearning = true, true
		for _, e := range s.FDB {
			l.VXLAN.FDB = append(l.VXLAN.FDB, segment.FDBState{FDBEntry: e, Bridge: true})
		}
	})
}

// FDB operations as text. Their arguments are the last octets of MACs and of remotes.
func setFDB(mac, remote byte) string {
	return fmt.Sprintf("bridge fdb replace 02:00:00:00:00:%02x dev vx2 dst 192.0.2.%d self master extern_learn",
		mac, remote)
}

func delSelf(mac, remote byte) string {
	return fmt.Sprintf("bridge fdb del 02:00:00:00:00:%02x dev vx2 dst 192.0.2.%d self", mac, remote)
}

func delMaster(mac byte) string {
	return fmt.Sprintf("bridge fdb del 02:00:00:00:00:%02x dev vx2 master", mac)
}

func delFDB(mac, remote byte) string { return delSelf(mac, remote) + "; " + delMaster(mac) }

// diffTest is one comparison of a desired state with the state of a node.
type diffTest struct {
	name string
	want segment.Segment
	have segment.State
	ops  []string
}

func (tt diffTest) run(t *testing.T) {
	t.Run(tt.name, func(t *testing.T) {
		if ops, want := text(segment.Diff(tt.want, tt.have)), strings.Join(tt.ops, "\n"); ops != want {
			t.Errorf("the operations are:\n%s\nwant:\n%s", ops, want)
		}
	})
}

func TestDiffOfTheFDB(t *testing.T) {
	const (
		noLearning = "ip link set vx2 type vxlan id 222 local 192.0.2.1 nolearning"
		portOff    = "bridge link set dev vx2 learning off"
	)
	one, none := withFDB(map[byte]byte{9: 2}), withFDB(nil)
	unknown, partial := one, none
	unknown.FDB = nil
	partial.Partial, partial.Remotes = true, partial.Remotes[:1]
	partialMoved := withFDB(map[byte]byte{9: 3})
	partialMoved.Partial = true
	learning := unicast("192.0.2.1", "192.0.2.2", "192.0.2.3")
	multicast := lab
	multicast.VXLAN.Group = netip.MustParseAddr("239.0.0.1")
	entry := func(f func(*segment.FDBState)) segment.State {
		return change(stateWithFDB(one), "vx2", func(l *segment.Link) {
			l.VXLAN.FDB = slices.Clone(l.VXLAN.FDB)
			f(&l.VXLAN.FDB[0])
		})
	}
	withoutBridge := entry(func(e *segment.FDBState) { e.Bridge = false })
	withoutVXLAN := entry(func(e *segment.FDBState) { e.VTEP = netip.Addr{} })
	for _, tt := range []diffTest{
		{"the same", one, stateWithFDB(one), nil},
		{
			"MACs are added", withFDB(map[byte]byte{8: 2, 9: 2, 10: 3}), stateWithFDB(one),
			[]string{setFDB(8, 2) + "; " + setFDB(10, 3)},
		},
		{"a MAC is deleted", none, stateWithFDB(one), []string{delFDB(9, 2)}},
		{"a MAC has another remote", withFDB(map[byte]byte{9: 3}), stateWithFDB(one), []string{setFDB(9, 3)}},
		{"the FDB is not known", unknown, stateWithFDB(one), nil},
		{"the FDB is partial", partial, stateWithFDB(one), nil},
		{"the FDB is partial, and a MAC has another remote", partialMoved, stateWithFDB(one), []string{setFDB(9, 3)}},
		{"the MAC was seen on this node", one, withoutBridge, nil},
		{"the MAC was seen on this node, and is deleted", none, withoutBridge, []string{delSelf(9, 2)}},
		{"the VXLAN's half is missing", one, withoutVXLAN, []string{setFDB(9, 2)}},
		{"the VXLAN's half is missing, and the MAC is deleted", none, withoutVXLAN, []string{delMaster(9)}},
		{
			"many MACs are added", withFDB(map[byte]byte{1: 2, 2: 2, 3: 2, 4: 2, 5: 2}), stateWithFDB(none),
			[]string{setFDB(1, 2) + "; " + setFDB(2, 2) + "; " + setFDB(3, 2) + "; and 2 more"},
		},
		{
			"learning of the bridge was switched on", one,
			change(stateWithFDB(one), "vx2", func(l *segment.Link) { l.NoLearning = false }),
			[]string{portOff},
		},
		{
			"learning of the VXLAN was switched on", one,
			change(stateWithFDB(one), "vx2", func(l *segment.Link) { l.VXLAN.NoLearning = false }),
			[]string{noLearning},
		},
		{
			"the VXLAN was taken out of the bridge", one,
			change(stateWithFDB(one), "vx2", func(l *segment.Link) { l.Master, l.NoLearning = 0, false }),
			[]string{
				"ip link set vx2 master br2", "ip link set vx2 type bridge_slave group_fwd_mask 0xfffd", portOff,
			},
		},
		{
			"the VXLAN was deleted", one, without(stateWithFDB(one), "vx2"), []string{
				"ip link add vx2 mtu 1422 master br2 type vxlan id 222 dstport 4789" +
					" local 192.0.2.1 dev eth1 nolearning",
				"bridge fdb append 00:00:00:00:00:00 dev vx2 dst 192.0.2.2 dst 192.0.2.3", setFDB(9, 2),
				"ip link set vx2 up",
			},
		},
		{
			"there is no claim", one,
			change(built(none), "vx2", func(l *segment.Link) { l.NoLearning, l.VXLAN.NoLearning = true, true }),
			nil,
		},
		{
			"learning is switched off", one, attached(built(learning), "srl"),
			[]string{"record knlvrf", portOff, noLearning, setFDB(9, 2)},
		},
		{"partial tables replace a group", partial, attached(built(lab), "srl"), []string{"record knlvrf"}},
		{
			"learning is switched on", learning, stateWithFDB(one), []string{
				"record knlvrf", "bridge link set dev vx2 learning on",
				"ip link set vx2 type vxlan id 222 local 192.0.2.1", delFDB(9, 2),
			},
		},
		{
			"a group replaces the tables", multicast, stateWithFDB(one), []string{
				"ip link set vx2 type vxlan id 222 group 239.0.0.1",
				"bridge fdb del 00:00:00:00:00:00 dev vx2 dst 192.0.2.2 dst 192.0.2.3",
				delFDB(9, 2), "record knlvrf", "bridge link set dev vx2 learning on",
			},
		},
	} {
		tt.run(t)
	}
}

// A MAC that was on a port of this node before is Local: its entry replaces what the bridge has of it.
func TestLocalEntryReplacesTheBridges(t *testing.T) {
	before := withFDB(map[byte]byte{8: 2, 9: 2})
	after := withFDB(map[byte]byte{8: 2, 9: 2})
	after.FDB[1].Local = true
	onPort := change(stateWithFDB(before), "vx2", func(l *segment.Link) {
		for i := range l.VXLAN.FDB {
			l.VXLAN.FDB[i].Bridge = false
		}
	})
	for _, tt := range []diffTest{
		{"both are on ports, and one is Local", after, onPort, []string{setFDB(9, 2)}},
		{"both are behind the VXLAN", after, stateWithFDB(before), nil},
	} {
		tt.run(t)
	}
	if ops := text(segment.DiffTables(before, after, true)); ops != setFDB(9, 2) {
		t.Errorf("a MAC that becomes Local leads to the operations\n%s\nwant:\n%s", ops, setFDB(9, 2))
	}
	if ops := segment.DiffTables(after, after, true); len(ops) > 0 {
		t.Errorf("a MAC that stays Local leads to the operations\n%s", text(ops))
	}
	if ops := segment.DiffTables(after, before, true); len(ops) > 0 {
		t.Errorf("a MAC that is no longer Local leads to the operations\n%s", text(ops))
	}
}

// Without an observation, the operations are those between the two desired states.
func TestDiffOfTablesWithoutAnObservation(t *testing.T) {
	was, want := withFDB(map[byte]byte{7: 2, 8: 2, 9: 2}), withFDB(map[byte]byte{8: 3, 9: 2, 10: 2})
	was.Remotes = []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.4")}
	const (
		add = "bridge fdb append 00:00:00:00:00:00 dev vx2 dst 192.0.2.3"
		del = "bridge fdb del 00:00:00:00:00:00 dev vx2 dst 192.0.2.4"
	)
	set := setFDB(8, 3) + "; " + setFDB(10, 2)
	partial := want
	partial.Partial = true
	for _, tt := range []struct {
		name    string
		want    segment.Segment
		claimed bool
		ops     []string
	}{
		{"with a claim", want, true, []string{add, del, set, delFDB(7, 2)}},
		{"without a claim", want, false, []string{add, del}},
		{"with partial tables", partial, true, []string{add, set}},
	} {
		if ops, want := text(segment.DiffTables(was, tt.want, tt.claimed)), strings.Join(tt.ops, "\n"); ops != want {
			t.Errorf("%s, the operations are:\n%s\nwant:\n%s", tt.name, ops, want)
		}
	}
}

// A node answers for hosts on other nodes if that is wanted. If it no longer is, its bridge first deletes its
// neighbors.
func TestDiffOfTheNeighbors(t *testing.T) {
	const (
		add4     = "ip neigh replace 10.0.0.9 lladdr 02:00:00:00:00:09 dev br2 nud permanent extern_learn"
		add6     = "ip neigh replace fd00::9 lladdr 02:00:00:00:00:09 dev br2 nud permanent extern_learn"
		suppress = "bridge link set dev vx2 neigh_suppress on"
		ipv6     = "sysctl net.ipv6.conf.br2.addr_gen_mode=1 net.ipv6.conf.br2.accept_ra=0" +
			" net.ipv6.conf.br2.disable_ipv6=0"
	)
	changed4 := strings.ReplaceAll(add4, ":09", ":08")
	off := withFDB(map[byte]byte{9: 2})
	on, unknown := off, off
	on.VXLAN.SuppressNeighbors, unknown.VXLAN.SuppressNeighbors = true, true
	mac := [6]byte{2, 0, 0, 0, 0, 9}
	on.Neighbors = []segment.Neighbor{
		{IP: netip.MustParseAddr("10.0.0.9"), MAC: mac}, {IP: netip.MustParseAddr("fd00::9"), MAC: mac},
	}
	offSmall := off
	small, others := on, on
	offSmall.MTU, small.MTU = 1279, 1279
	others.Neighbors = []segment.Neighbor{{IP: on.Neighbors[0].IP, MAC: [6]byte{2, 0, 0, 0, 0, 8}}}
	partial := others
	partial.Partial = true
	answering := func(s segment.Segment) segment.State {
		state := change(stateWithFDB(s), "vx2", func(l *segment.Link) { l.Suppress = true })
		return change(state, "br2", func(l *segment.Link) {
			l.Neighbors, l.IPv6, l.NoIPv6 = s.Neighbors, s.MTU >= 1280, true
		})
	}
	lacking := func(state segment.State, mtu int) segment.State {
		return change(state, "br2", func(l *segment.Link) { l.LacksIPv6, l.MTU = true, mtu })
	}
	for _, tt := range []diffTest{
		{"the same", on, answering(on), nil},
		{"switched on", on, stateWithFDB(off), []string{"record knlvrf", suppress, ipv6, add4 + "; " + add6}},
		{
			"switched off", off, answering(on), []string{
				"record knlvrf", "ip neigh del 10.0.0.9 dev br2; ip neigh del fd00::9 dev br2",
				"bridge link set dev vx2 neigh_suppress off", "sysctl net.ipv6.conf.br2.disable_ipv6=1",
			},
		},
		{"the neighbors are not known", unknown, answering(on), nil},
		{
			"one has another MAC, one is deleted", others, answering(on),
			[]string{changed4, "ip neigh del fd00::9 dev br2"},
		},
		{"the neighbors are partial", partial, answering(on), []string{changed4}},
		{
			"the MTU is too small for IPv6", small, stateWithFDB(offSmall),
			[]string{"record knlvrf", suppress, add4},
		},
		{
			"IPv6 was switched off", on,
			change(answering(on), "br2", func(l *segment.Link) { l.IPv6 = false }),
			[]string{ipv6, add6},
		},
		{
			"the kernel lacks IPv6, first observation", on, lacking(stateWithFDB(off), off.MTU),
			[]string{"record knlvrf", suppress, add4},
		},
		{
			"the kernel lacks IPv6", on,
			lacking(change(answering(on), "br2", func(l *segment.Link) {
				l.Neighbors, l.IPv6 = on.Neighbors[:1], false
			}), off.MTU),
			nil,
		},
		{
			"the MTU becomes large enough for IPv6", on, lacking(stateWithFDB(off), 1279),
			[]string{"record knlvrf", "ip link set br2 mtu 1422", suppress, ipv6, add4 + "; " + add6},
		},
		{
			"the bridge has an IPv6 address", on,
			change(answering(on), "br2", func(l *segment.Link) { l.NoIPv6 = false }),
			[]string{segment.Silence{}.String(), ipv6, add6},
		},
		{
			"the VXLAN was taken out of the bridge", on,
			change(answering(on), "vx2", func(l *segment.Link) { l.Master = 0 }),
			[]string{
				"ip link set vx2 master br2", "ip link set vx2 type bridge_slave group_fwd_mask 0xfffd",
				"bridge link set dev vx2 learning off", suppress,
			},
		},
	} {
		tt.have = change(tt.have, claim("srl", segment.Veth).ID, func(l *segment.Link) { l.MTU = tt.want.MTU })
		tt.run(t)
	}
	if !segment.OnlyTablesDiffer(on, others) || segment.OnlyTablesDiffer(on, unknown) ||
		segment.OnlyTablesDiffer(on, off) {
		t.Error("OnlyTablesDiffer is wrong about known neighbors, unknown ones, or none wanted")
	}
	want := changed4 + "\nip neigh del fd00::9 dev br2"
	if ops := text(segment.DiffTables(on, others, true)); ops != want {
		t.Errorf("without an observation, the operations are:\n%s\nwant:\n%s", ops, want)
	}
	withoutNeighbors := small
	withoutNeighbors.Neighbors = []segment.Neighbor{}
	if ops := text(segment.DiffTables(withoutNeighbors, small, true)); ops != add4 {
		t.Errorf("with an MTU too small for IPv6, the operations are:\n%s\nwant:\n%s", ops, add4)
	}
}
