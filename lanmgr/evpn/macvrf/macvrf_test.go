package macvrf_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

var began = time.Unix(1_800_000_000, 0)

// mac is a station's address by its number.
func mac(n byte) macvrf.MAC { return macvrf.MAC{2, 0, 0, 0, 0, n} }

func vtep(n byte) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, n}) }

// node is one of several that tell each other their routes.
type node struct {
	*macvrf.Table
	vtep netip.Addr
	told map[macvrf.Key]macvrf.Route // what the others have of it
}

func newNode(n byte) *node {
	return &node{Table: macvrf.New(65000, vtep(n)), vtep: vtep(n), told: map[macvrf.Key]macvrf.Route{}}
}

// nodes take part in LAN 222, with these MACs of pods.
func nodes(n int, attached ...macvrf.MAC) mesh {
	var m mesh
	for i := range n {
		o := newNode(byte(i + 1))
		o.Set(began, []macvrf.LAN{{VNI: 222, VTEP: o.vtep, Claimed: true, Attached: attached}})
		m = append(m, o)
	}
	return m
}

type mesh []*node

// tell has each node hear what the others have to tell, until nobody has anything new; it fails if that never ends.
func (m mesh) tell(t *testing.T, now time.Time) {
	t.Helper()
	for range 50 {
		quiet := true
		for _, from := range m {
			own := map[macvrf.Key]macvrf.Route{}
			for _, r := range from.Advertised() {
				own[r.Key] = r
			}
			for key := range from.told {
				if _, ok := own[key]; !ok {
					quiet = false
					m.others(from, func(o *node) { o.Withdraw(now, key) })
				}
			}
			for key, r := range own {
				if before, ok := from.told[key]; !ok || !before.Equal(r) {
					quiet = false
					m.others(from, func(o *node) { o.Import(now, r) })
				}
			}
			from.told = own
		}
		for _, n := range m { // what is behind another is on no port: the bridge has it on the VXLAN
			_, fdb, _ := n.Forwarding(222)
			for _, e := range fdb {
				n.ForgetLocal(now, 222, e.MAC)
			}
		}
		if quiet {
			return
		}
	}
	t.Fatal("the nodes never come to an end")
}

func (m mesh) others(but *node, do func(*node)) {
	for _, o := range m {
		if o != but {
			do(o)
		}
	}
}

// state is what a node has of LAN 222, in words.
func state(n *node) string {
	var words []string
	for _, r := range n.Advertised() {
		if r.Type == macvrf.Multicast {
			words = slices.Insert(words, 0, "tells itself")
		} else {
			words = append(words, fmt.Sprintf("tells %d seq %d", r.MAC[5], r.Sequence))
		}
	}
	remotes, fdb, _ := n.Forwarding(222)
	for _, r := range remotes {
		words = append(words, fmt.Sprintf("floods %d", r.As4()[3]))
	}
	for _, e := range fdb {
		words = append(words, fmt.Sprintf("%d behind %d", e.MAC[5], e.VTEP.As4()[3]))
	}
	for _, d := range n.Duplicates(222) {
		words = append(words, fmt.Sprintf("%d twice", d[5]))
	}
	return strings.Join(words, ", ")
}

func expect(t *testing.T, when string, n *node, want string) {
	t.Helper()
	if got := state(n); got != want {
		t.Errorf("%s: node %d\n has %s\nwant %s", when, n.vtep.As4()[3], got, want)
	}
}

func TestAMACMovesThereAndBack(t *testing.T) {
	m := nodes(3)
	m.tell(t, began)
	if remotes, fdb, ok := nodes(1)[0].Forwarding(222); remotes == nil || fdb == nil || !ok {
		t.Error("that there is nothing is taken for not known")
	}
	expect(t, "nobody has spoken", m[0], "tells itself, floods 2, floods 3")
	for i, step := range []struct {
		speaks int
		want   [3]string
	}{
		{0, [3]string{"tells itself, tells 9 seq 0, floods 2, floods 3", "tells itself, floods 1, floods 3, 9 behind 1", "tells itself, floods 1, floods 2, 9 behind 1"}},
		{1, [3]string{"tells itself, floods 2, floods 3, 9 behind 2", "tells itself, tells 9 seq 1, floods 1, floods 3", "tells itself, floods 1, floods 2, 9 behind 2"}},
		{0, [3]string{"tells itself, tells 9 seq 2, floods 2, floods 3", "tells itself, floods 1, floods 3, 9 behind 1", "tells itself, floods 1, floods 2, 9 behind 1"}},
		{0, [3]string{"tells itself, tells 9 seq 2, floods 2, floods 3", "tells itself, floods 1, floods 3, 9 behind 1", "tells itself, floods 1, floods 2, 9 behind 1"}},
	} {
		m[step.speaks].LearnLocal(began, 222, mac(9))
		m.tell(t, began)
		for n, want := range step.want {
			expect(t, fmt.Sprintf("step %d", i), m[n], want)
		}
	}
	m[0].ForgetLocal(began, 222, mac(9))
	m.tell(t, began)
	expect(t, "silent everywhere", m[0], "tells itself, floods 2, floods 3")
	expect(t, "silent everywhere", m[2], "tells itself, floods 1, floods 2")
}

// Of a LAN it is known how many routes and MACs there are, and how often one has moved, whoever it moved between.
// A pod may speak from as many MACs as it likes; others are told of so many, and of every attached pod's own.
func TestMACsAreBounded(t *testing.T) {
	n := nodes(1, mac(1))[0]
	speaks := func(i int) (full bool) {
		return n.LearnLocal(began, 222, macvrf.MAC{6, 0, byte(i >> 16), byte(i >> 8), byte(i), 1})
	}
	for i := range macvrf.MaxMACs - 1 { // mac(1) is told, too
		if speaks(i) {
			t.Fatalf("full at %d", i)
		}
	}
	told := func() int { return len(n.Advertised()) - 1 } // but the route of type 3
	if !speaks(1<<20) || told() != macvrf.MaxMACs {
		t.Errorf("%d are told, %d may be", told(), macvrf.MaxMACs)
	}
	n.Set(began, []macvrf.LAN{{VNI: 222, VTEP: n.vtep, Claimed: true, Attached: []macvrf.MAC{mac(1), mac(2)}}})
	if told() != macvrf.MaxMACs+1 {
		t.Error("another pod is attached, and not told of")
	}
	n.ForgetLocal(began, 222, macvrf.MAC{6, 0, 0, 0, 0, 1})
	n.ForgetLocal(began, 222, macvrf.MAC{6, 0, 0, 0, 1, 1})
	if speaks(1<<20+1) || told() != macvrf.MaxMACs {
		t.Errorf("%d are told once there is room", told())
	}
}

func TestWhatThereIsOfALANIsCounted(t *testing.T) {
	m := nodes(3)
	a, b, c := m[0], m[1], m[2]
	count := func(when string, n *node, want macvrf.Count) {
		t.Helper()
		if have, ok := n.Count(222); !ok || have != want {
			t.Errorf("%s node %s counts %+v, want %+v", when, n.vtep, have, want)
		}
	}
	a.LearnLocal(began, 222, mac(1))
	a.LearnLocal(began, 222, mac(2))
	m.tell(t, began)
	count("at first", a, macvrf.Count{Advertised: 3, Used: 2, Local: 2})
	count("at first", c, macvrf.Count{Advertised: 1, Used: 4, Remote: 2})
	b.LearnLocal(began, 222, mac(1))
	m.tell(t, began)
	for _, n := range m {
		want := macvrf.Count{Advertised: 1, Used: 4, Remote: 2, Moves: 1}
		if n != c {
			want = macvrf.Count{Advertised: 2, Used: 3, Local: 1, Remote: 1, Moves: 1}
		}
		count("after a move", n, want)
	}
	b.ForgetLocal(began, 222, mac(1)) // and speaks again: it did not move
	m.tell(t, began)
	b.LearnLocal(began, 222, mac(1))
	m.tell(t, began)
	count("after a silence", c, macvrf.Count{Advertised: 1, Used: 4, Remote: 2, Moves: 1})
	c.Set(began, []macvrf.LAN{{VNI: 222, VTEP: vtep(9), Claimed: true}})
	count("with another address", c, macvrf.Count{Advertised: 1, Used: 4, Remote: 2, Moves: 1})
	other := macvrf.Route{Key: macvrf.Key{Type: macvrf.Multicast, RD: macvrf.RD{9}}, VTEP: vtep(7), VNI: 223, Targets: []macvrf.Target{macvrf.NewTarget(1, 222)}}
	c.Import(began, other)
	count("with a route of another VNI", c, macvrf.Count{Advertised: 1, Used: 4, Refused: 1, Remote: 2, Moves: 1})
	for range 5 {
		a.LearnLocal(began, 222, mac(1))
		m.tell(t, began)
		b.LearnLocal(began, 222, mac(1))
		m.tell(t, began)
	}
	if have, _ := a.Count(222); have.Duplicate != 1 || have.Local != 1 || have.Remote != 0 {
		t.Errorf("of a MAC that speaks on two nodes, one of them counts %+v", have)
	}
	if _, ok := a.Count(223); ok {
		t.Error("there is a count of a LAN that is not here")
	}
}

// The kernel has a MAC on a port here until it says otherwise: an entry that points elsewhere has to take its place.
func TestAnEntryKnowsWhetherItsMACWasHere(t *testing.T) {
	m := nodes(1)
	m[0].LearnLocal(began, 222, mac(9))
	m[0].Import(began, route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.MAC, r.Sequence = mac(9), 1 }))
	for _, here := range []bool{true, false} {
		if _, fdb, _ := m[0].Forwarding(222); len(fdb) != 1 || fdb[0].Local != here {
			t.Errorf("entries %+v, want one with Here %t", fdb, here)
		}
		m[0].ForgetLocal(began, 222, mac(9))
	}
}

func TestAPodThatNeverSpokeIsTold(t *testing.T) {
	m := nodes(2)
	with := func(claimed bool, macs ...macvrf.MAC) []macvrf.LAN {
		return []macvrf.LAN{{VNI: 222, VTEP: m[0].vtep, Claimed: claimed, Attached: macs}}
	}
	m[0].Set(began, with(true, mac(7)))
	m.tell(t, began)
	expect(t, "attached", m[1], "tells itself, floods 1, 7 behind 1")
	m[0].LearnLocal(began, 222, mac(7))
	m[0].ForgetLocal(began, 222, mac(7))
	m.tell(t, began)
	expect(t, "silent for long", m[1], "tells itself, floods 1, 7 behind 1")
	m[0].Set(began, with(true))
	m.tell(t, began)
	expect(t, "detached", m[1], "tells itself, floods 1")
	m[0].Set(began, with(false, mac(7)))
	m.tell(t, began)
	expect(t, "a LAN that nobody uses here", m[0], "floods 2")
	expect(t, "a LAN that nobody uses there", m[1], "tells itself")
}

// A pod that is made anew on another node is there at once, though the node it was on has not told that it is gone.
func TestAPodMadeAnewElsewhereIsThereAtOnce(t *testing.T) {
	m := nodes(3)
	m[0].Set(began, []macvrf.LAN{{VNI: 222, VTEP: m[0].vtep, Claimed: true, Attached: []macvrf.MAC{mac(7)}}})
	m.tell(t, began)
	m[1].Set(began, []macvrf.LAN{{VNI: 222, VTEP: m[1].vtep, Claimed: true, Attached: []macvrf.MAC{mac(7)}}})
	m.tell(t, began)
	expect(t, "on both", m[2], "tells itself, floods 1, floods 2, 7 behind 2")
	expect(t, "on both", m[0], "tells itself, floods 2, floods 3, 7 behind 2")
	m[1].Set(began, []macvrf.LAN{{VNI: 222, VTEP: m[1].vtep, Claimed: true}})
	m.tell(t, began)
	expect(t, "back on the first alone", m[2], "tells itself, floods 1, floods 2, 7 behind 1")
}

// Two nodes that tell of one MAC at the same time agree: the lower VTEP has it.
func TestATieGoesToTheLowerVTEP(t *testing.T) {
	m := nodes(3, mac(7))
	m.tell(t, began)
	expect(t, "all tell it", m[0], "tells itself, tells 7 seq 0, floods 2, floods 3")
	for _, n := range m[1:] {
		_, fdb, _ := n.Forwarding(222)
		if len(fdb) != 1 || fdb[0].VTEP != vtep(1) {
			t.Errorf("node %s has %v", n.vtep, fdb)
		}
	}
}

func TestAMACOnTwoNodesIsLeftAlone(t *testing.T) {
	m := nodes(3)
	now := began
	for range 20 {
		for _, n := range m[:2] {
			now = now.Add(time.Second)
			n.LearnLocal(now, 222, mac(9))
			m.tell(t, now)
		}
	}
	for _, n := range m[:2] {
		if d := n.Duplicates(222); !slices.Equal(d, []macvrf.MAC{mac(9)}) {
			t.Errorf("node %s has duplicates %v", n.vtep, d)
		}
		if _, fdb, _ := n.Forwarding(222); len(fdb) > 0 {
			t.Errorf("node %s sends what is for its own station to %v", n.vtep, fdb)
		}
	}
	third := state(m[2])
	for _, n := range m[:2] {
		now = now.Add(time.Second)
		n.LearnLocal(now, 222, mac(9))
		m.tell(t, now)
	}
	expect(t, "while they go on", m[2], third)

	m[0].ForgetLocal(now, 222, mac(9))
	m.tell(t, now)
	expect(t, "one is gone", m[2], "tells itself, floods 1, floods 2, 9 behind 2")
	if d := append(m[0].Duplicates(222), m[1].Duplicates(222)...); len(d) > 0 {
		t.Errorf("duplicates %v", d)
	}

	now = now.Add(time.Hour) // moves that are far apart are moves
	for i := range 20 {
		now = now.Add(time.Minute)
		m[i%2].LearnLocal(now, 222, mac(8))
		m.tell(t, now)
		expect(t, "moves by the minute", m[2], fmt.Sprintf("tells itself, floods 1, floods 2, 8 behind %d, 9 behind 2", i%2+1))
	}
}

func TestWhoIsLeftAloneIsTakenUpAfterAQuietTime(t *testing.T) {
	m := nodes(2)
	now := began
	for i := range 20 {
		m[i%2].LearnLocal(now, 222, mac(9))
		m.tell(t, now)
	}
	now = now.Add(time.Hour)
	m[0].LearnLocal(now, 222, mac(9))
	m.tell(t, now)
	m[1].LearnLocal(now, 222, mac(9))
	m.tell(t, now)
	_, fdb, _ := m[0].Forwarding(222)
	if len(m[0].Duplicates(222)) > 0 || len(fdb) != 1 || fdb[0].VTEP != vtep(2) {
		t.Errorf("node 1: %s", state(m[0]))
	}
}

// route is one that others tell of LAN 222.
func route(kind macvrf.RouteType, from byte, change func(*macvrf.Route)) macvrf.Route {
	r := macvrf.Route{
		Key: macvrf.Key{Type: kind, RD: macvrf.RD{1: 1, 5: from, 7: 1}}, VTEP: vtep(from), VNI: 222,
		Targets: []macvrf.Target{macvrf.NewTarget(65000, 222)},
	}
	if r.IP = r.VTEP; kind == macvrf.MACIP {
		r.IP, r.MAC = netip.Addr{}, mac(9)
	}
	if change != nil {
		change(&r)
	}
	return r
}

func TestRoutesThatCannotBeUsedSayWhy(t *testing.T) {
	for _, tt := range []struct {
		name string
		r    macvrf.Route
		want macvrf.Reason
	}{
		{"own VTEP", route(macvrf.MACIP, 1, nil), macvrf.OwnVTEP},
		{"own VTEP, flooded", route(macvrf.Multicast, 1, nil), macvrf.OwnVTEP},
		{"no VTEP", route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.VTEP = netip.Addr{} }), macvrf.InvalidVTEP},
		{"a group as VTEP", route(macvrf.Multicast, 2, func(r *macvrf.Route) { r.VTEP = netip.MustParseAddr("239.1.1.1") }), macvrf.InvalidVTEP},
		{"link-local", route(macvrf.Multicast, 2, func(r *macvrf.Route) { r.VTEP = netip.MustParseAddr("fe80::1") }), macvrf.InvalidVTEP},
		{"IPv6", route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.VTEP = netip.MustParseAddr("2001:db8::1") }), macvrf.OtherFamily},
		{"IPv4 in IPv6", route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.VTEP = netip.MustParseAddr("::ffff:192.0.2.2") }), macvrf.OtherFamily},
		{"another VNI", route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.VNI = 223 }), macvrf.OtherVNI},
		{"MPLS", route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.Unsupported = true }), macvrf.Encapsulation},
		{"VLAN-aware", route(macvrf.Multicast, 2, func(r *macvrf.Route) { r.Tag = 5 }), macvrf.VLANAware},
		{"a group's MAC", route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.MAC = macvrf.MAC{1, 0, 0x5e, 0, 0, 1} }), macvrf.InvalidMAC},
		{"no MAC", route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.MAC = macvrf.MAC{} }), macvrf.InvalidMAC},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := nodes(1)[0]
			n.Import(began, tt.r)
			n.Import(began, route(macvrf.MACIP, 3, func(r *macvrf.Route) { r.MAC = mac(1) }))
			expect(t, "beside it", n, "tells itself, 1 behind 3")
			refused, all := n.Refused(222)
			if all != 1 || refused.Reason != tt.want || !strings.Contains(refused.String(), tt.r.VTEP.String()) {
				t.Errorf("%d refused, %v", all, refused)
			}
			n.Withdraw(began, tt.r.Key)
			if refused, all := n.Refused(222); all > 0 {
				t.Errorf("still refused: %v", refused)
			}
		})
	}
}

// A route that becomes unusable is as good as gone, and a MAC with several routes goes with the last of them.
func TestARouteThatChanges(t *testing.T) {
	n := nodes(1)[0]
	withIP := func(ip string) macvrf.Route {
		return route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.IP = netip.MustParseAddr(ip) })
	}
	n.Import(began, withIP("10.0.0.9"))
	n.Import(began, withIP("fd00::9"))
	n.Import(began, route(macvrf.Multicast, 2, nil))
	n.Withdraw(began, withIP("10.0.0.9").Key)
	expect(t, "one of two gone", n, "tells itself, floods 2, 9 behind 2")
	bad := withIP("fd00::9")
	bad.VNI = 5
	n.Import(began, bad)
	expect(t, "the other unusable", n, "tells itself, floods 2")
	n.Import(began, withIP("fd00::9"))
	other := withIP("fd00::9")
	other.Targets = []macvrf.Target{macvrf.NewTarget(65000, 223)}
	n.Import(began, other)
	expect(t, "of another LAN now", n, "tells itself, floods 2")
	n.Import(began, route(macvrf.Multicast, 2, func(r *macvrf.Route) { r.VTEP = vtep(4) }))
	expect(t, "another VTEP", n, "tells itself, floods 4")
}

func TestAMACThatShallNotMoveIsNotTaken(t *testing.T) {
	n := nodes(1)[0]
	n.Import(began, route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.Sticky = true }))
	n.LearnLocal(began, 222, mac(9))
	expect(t, "seen here", n, "tells itself, 9 behind 2")
}

func TestTheHighestSequenceIsNotPassed(t *testing.T) {
	n := nodes(1)[0]
	n.Import(began, route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.Sequence = 1<<32 - 1 }))
	n.LearnLocal(began, 222, mac(9))
	if own := n.Advertised(); own[0].Sequence != 1<<32-1 {
		t.Errorf("tells %+v", own)
	}
}

func TestRoutesAreSortedByTheirTargets(t *testing.T) {
	n := newNode(1)
	foreign, err := macvrf.ParseTarget("64512:7")
	if err != nil {
		t.Fatal(err)
	}
	// Routes that come before the LAN are its own as well.
	n.Import(began, route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.Targets = []macvrf.Target{macvrf.NewTarget(4_200_000_001, 222)} }))
	n.Import(began, route(macvrf.MACIP, 3, func(r *macvrf.Route) { r.MAC, r.Targets = mac(3), []macvrf.Target{foreign} }))
	lan := macvrf.LAN{VNI: 222, VTEP: n.vtep, Claimed: true}
	n.Set(began, []macvrf.LAN{lan})
	expect(t, "any AS", n, "tells itself, 9 behind 2")
	lan.Import, lan.Export = []macvrf.Target{foreign}, []macvrf.Target{foreign}
	n.Set(began, []macvrf.LAN{lan})
	expect(t, "a target of its own", n, "tells itself, 3 behind 3")
	if own := n.Advertised(); !slices.Equal(own[0].Targets, lan.Export) {
		t.Errorf("tells %v", own)
	}
	n.Set(began, nil)
	if _, _, ok := n.Forwarding(222); ok || len(n.Advertised()) > 0 {
		t.Error("the LAN is still there")
	}
}

func TestTargetsAreRead(t *testing.T) {
	for text, want := range map[string]macvrf.Target{
		"65000:222":        {0, 2, 0xfd, 0xe8, 0, 0, 0, 222},
		"65000:16777215":   {0, 2, 0xfd, 0xe8, 0, 0xff, 0xff, 0xff},
		"4200000000:65535": {2, 2, 0xfa, 0x56, 0xea, 0, 0xff, 0xff},
	} {
		if got, err := macvrf.ParseTarget(text); err != nil || got != want {
			t.Errorf("%s: %x, %v", text, got, err)
		}
	}
	for _, bad := range []string{"", "65000", "65000:", ":1", "a:b", "70000:70000", "-1:1", "1:4294967296", "1:2:3"} {
		if got, err := macvrf.ParseTarget(bad); err == nil {
			t.Errorf("%q is read as %x", bad, got)
		}
	}
}

// No two LANs of a node have the same RD, though it has no room for a whole VNI.
func TestEachLANHasAnRDOfItsOwn(t *testing.T) {
	n := newNode(1)
	var lans []macvrf.LAN
	for _, vni := range []uint32{5, 65541, 131077, 6, 65535, 16777215} {
		lans = append(lans, macvrf.LAN{VNI: vni, VTEP: n.vtep, Claimed: true})
		n.Set(began, lans)
	}
	seen := map[macvrf.RD]bool{}
	for _, r := range n.Advertised() {
		seen[r.RD] = true
	}
	if len(seen) != len(lans) {
		t.Errorf("%d RDs for %d LANs: %v", len(seen), len(lans), seen)
	}
}

// A LAN has the RD that it asks for, whoever had it, and the others keep theirs.
func TestALANHasTheRDItAsksFor(t *testing.T) {
	n := newNode(1)
	numbers := func(lans ...macvrf.LAN) (have []uint16) {
		for i := range lans {
			lans[i].VTEP, lans[i].Claimed = n.vtep, true
		}
		n.Set(began, lans)
		for _, l := range lans {
			for _, r := range n.Advertised() {
				if r.VNI == l.VNI {
					have = append(have, uint16(r.RD[6])<<8|uint16(r.RD[7]))
				}
			}
		}
		return have
	}
	five, six := macvrf.LAN{VNI: 5}, macvrf.LAN{VNI: 6}
	asks := func(l macvrf.LAN, number uint16) macvrf.LAN { l.RD = number; return l }
	for _, step := range []struct {
		lans []macvrf.LAN
		want []uint16
	}{
		{[]macvrf.LAN{five, six}, []uint16{5, 6}},
		{[]macvrf.LAN{five, asks(six, 5)}, []uint16{6, 5}},
		{[]macvrf.LAN{asks(five, 5), asks(six, 5)}, []uint16{6, 5}},
		{[]macvrf.LAN{asks(five, 5), asks(six, 300)}, []uint16{5, 300}},
		{[]macvrf.LAN{five, six}, []uint16{5, 6}},
		{[]macvrf.LAN{asks(six, 300), five}, []uint16{300, 5}},
	} {
		if have := numbers(step.lans...); !slices.Equal(have, step.want) {
			t.Errorf("%+v have %v, want %v", step.lans, have, step.want)
		}
	}
}

// What a LAN's nodes tell is its own, whatever it imports; a target that is changed with the old one beside it loses no route.
func TestATargetIsChangedWithoutLoss(t *testing.T) {
	m := nodes(2, mac(7))
	m[1].Set(began, []macvrf.LAN{{VNI: 222, VTEP: m[1].vtep, Claimed: true, Attached: []macvrf.MAC{mac(8)}}})
	old, next := macvrf.NewTarget(65000, 222), macvrf.NewTarget(64512, 7)
	for _, step := range []struct{ imports, exports []macvrf.Target }{
		{[]macvrf.Target{next}, nil},
		{nil, []macvrf.Target{next, old}},
		{nil, []macvrf.Target{next}},
		{[]macvrf.Target{old}, []macvrf.Target{next}},
	} {
		for _, n := range m {
			attached := []macvrf.MAC{mac(7)}
			if n == m[1] {
				attached = []macvrf.MAC{mac(8)}
			}
			n.Set(began, []macvrf.LAN{{VNI: 222, VTEP: n.vtep, Claimed: true, Attached: attached, Import: step.imports, Export: step.exports}})
			m.tell(t, began)
			expect(t, fmt.Sprint(step), m[0], "tells itself, tells 7 seq 0, floods 2, 8 behind 2")
			expect(t, fmt.Sprint(step), m[1], "tells itself, tells 8 seq 0, floods 1, 7 behind 1")
		}
	}
}

// What a station shows to have is told as long as it is here, of whoever showed it last, here or elsewhere.
func TestAnAddressIsToldOfWhoShowedItLast(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	n := nodes(1, mac(7))[0]
	now := began
	has := func(when, want string) {
		t.Helper()
		var words []string
		for _, r := range n.Advertised() {
			if r.Type == macvrf.MACIP && r.IP.IsValid() {
				words = append(words, fmt.Sprintf("%d has %s", r.MAC[5], r.IP))
			} else if r.Type == macvrf.MACIP {
				words = append(words, fmt.Sprintf("%d", r.MAC[5]))
			}
		}
		if have := strings.Join(words, ", "); have != want {
			t.Errorf("%s: told %s, want %s", when, have, want)
		}
	}
	show := func(m macvrf.MAC, ip netip.Addr) bool {
		t.Helper()
		told, full := n.Bind(now, 222, m, ip)
		if full {
			t.Errorf("%s is one too many", ip)
		}
		return told
	}
	if !show(mac(7), a) || show(mac(7), a) || !show(mac(7), b) {
		t.Error("what is new, or what is known, is not told apart")
	}
	has("a pod shows two", "7, 7 has 10.0.0.1, 7 has fd00::1")
	show(mac(8), a) // its first frame; the bridge has not told of it yet
	has("somebody who is not here", "7, 7 has 10.0.0.1, 7 has fd00::1")
	n.LearnLocal(now, 222, mac(8))
	has("who is here now", "7, 7 has fd00::1, 8, 8 has 10.0.0.1")
	n.Import(now, route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.MAC, r.IP = mac(9), b }))
	has("shown elsewhere", "7, 8, 8 has 10.0.0.1")
	show(mac(7), b)
	has("and here again", "7, 7 has fd00::1, 8, 8 has 10.0.0.1")
	n.Import(now, route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.MAC, r.Sequence = mac(8), 1 }))
	has("the MAC elsewhere, and on its port here still", "7, 7 has fd00::1")
	n.ForgetLocal(now, 222, mac(8))
	n.LearnLocal(now, 222, mac(8))
	has("gone and back", "7, 7 has fd00::1, 8")
	show(mac(6), a)
	now = now.Add(time.Minute)
	n.LearnLocal(now, 222, mac(6))
	has("shown long before", "6, 7, 7 has fd00::1, 8")
	for _, bad := range []string{"0.0.0.0", "::", "ff02::1", "224.0.0.5", "255.255.255.255", "127.0.0.1", "::1", "::ffff:10.0.0.1"} {
		if show(mac(7), netip.MustParseAddr(bad)) {
			t.Errorf("%s is told", bad)
		}
	}
	n.Set(now, nil)
	if told, _ := n.Bind(now, 222, mac(7), a); told {
		t.Error("told of a LAN that is not here")
	}
}

// A node answers for whom one other node alone tells of; an address that two have is left to them.
func TestNeighborsAreStationsOnOthers(t *testing.T) {
	n := nodes(1, mac(7))[0]
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	has := func(m byte, ip netip.Addr, from byte) macvrf.Route {
		return route(macvrf.MACIP, from, func(r *macvrf.Route) { r.MAC, r.IP = mac(m), ip })
	}
	expect := func(when string, want ...segment.Neighbor) {
		t.Helper()
		if have := n.Neighbors(222); have == nil || !slices.Equal(have, want) {
			t.Errorf("%s: %v, want %v", when, have, want)
		}
	}
	one, other := segment.Neighbor{IP: a, MAC: mac(9)}, segment.Neighbor{IP: b, MAC: mac(9)}
	n.Import(began, has(9, a, 2))
	if n.Neighbors(222) != nil || n.Neighbors(223) != nil {
		t.Error("a LAN that does not want them has neighbours")
	}
	n.Set(began, []macvrf.LAN{{VNI: 222, VTEP: n.vtep, Claimed: true, Attached: []macvrf.MAC{mac(7)}, Suppress: true}})
	expect("one", one)
	n.Import(began, has(9, b, 2))
	n.Import(began, has(9, netip.Addr{}, 2))
	n.Import(began, has(9, netip.MustParseAddr("ff02::1"), 2))
	n.Import(began, has(9, a, 3))
	expect("two, one of them told by two", one, other)
	n.Import(began, has(8, a, 3))
	expect("somebody else has one of them", other)
	n.Bind(began, 222, mac(7), b)
	expect("and somebody here the other")
	n.Withdraw(began, has(8, a, 3).Key)
	n.Bind(began, 222, mac(7), a)
	n.Import(began, has(6, a, 3))
	n.Withdraw(began, has(6, a, 3).Key)
	expect("nobody here has the one any more", one)
	n.LearnLocal(began, 222, mac(9))
	expect("it is here itself")
	n.ForgetLocal(began, 222, mac(9))
	n.Set(began, []macvrf.LAN{{VNI: 222, VTEP: n.vtep, Claimed: true, Suppress: true}})
	expect("and gone, and so is the pod", one, other)
	n.Withdraw(began, has(9, a, 2).Key)
	n.Withdraw(began, has(9, a, 3).Key)
	expect("one is told no more", other)
}

// A station that shows a thousand addresses has sixteen of them told, and does not have the others told of a new one all the time.
func TestAddressesAreBounded(t *testing.T) {
	n := nodes(1, mac(7))[0]
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
	count := func() int { return len(n.Advertised()) - 2 }
	changes, refused := 0, 0
	for i := range 1000 {
		told, full := n.Bind(began, 222, mac(7), at(i))
		if told {
			changes++
		}
		if full {
			refused++
		}
	}
	if count() != 16 || changes != 17 || refused != 984 {
		t.Errorf("%d told, after %d changes; %d too many", count(), changes, refused)
	}
	n.Bind(began, 222, mac(7), at(1)) // is the newest now
	n.Bind(began.Add(time.Minute), 222, mac(7), at(2000))
	has := func(ip netip.Addr) bool {
		return slices.ContainsFunc(n.Advertised(), func(r macvrf.Route) bool { return r.IP == ip })
	}
	if count() != 16 || !has(at(1)) || has(at(2)) || !has(at(2000)) {
		t.Errorf("%d told; the newest %t, the oldest %t, the new %t", count(), has(at(1)), has(at(2)), has(at(2000)))
	}
	for i := range 1000 { // by others
		m := macvrf.MAC{2, 1, 0, 0, byte(i >> 8), byte(i)}
		n.LearnLocal(began, 222, m)
		for j := range 16 {
			n.Bind(began, 222, m, netip.AddrFrom4([4]byte{11, byte(i >> 8), byte(i), byte(j)}))
		}
	}
	if count() != 8192+1000 {
		t.Errorf("%d told of all", count()-1000)
	}
	for i := range 1000 { // nobody is here
		n.Bind(began, 222, macvrf.MAC{2, 2, 0, 0, byte(i >> 8), byte(i)}, at(i))
	}
}

// Whatever happens in whichever order, the nodes agree on who has each MAC: who spoke last, if the others heard of it in between.
func TestNodesAgreeWhateverHappens(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		m, now := nodes(4), began
		last := map[macvrf.MAC]int{} // on which node it spoke last; -1: on several at once
		for range 60 {
			now = now.Add(time.Minute)
			n, station := rng.IntN(len(m)), mac(byte(rng.IntN(5)))
			if rng.IntN(4) == 0 {
				for _, o := range m {
					o.ForgetLocal(now, 222, station)
				}
				delete(last, station)
			} else {
				m[n].LearnLocal(now, 222, station)
				last[station] = n
				if seed%2 == 1 {
					m[rng.IntN(len(m))].LearnLocal(now, 222, station)
					last[station] = -1
				}
			}
			m.tell(t, now)
		}
		owners := map[macvrf.MAC]int{}
		for i, n := range m {
			for _, r := range n.Advertised() {
				if _, twice := owners[r.MAC]; twice && r.Type == macvrf.MACIP {
					t.Fatalf("seed %d: two nodes tell %s", seed, r.MAC)
				} else if r.Type == macvrf.MACIP {
					owners[r.MAC] = i
				}
			}
		}
		if got, want := slices.SortedFunc(maps.Keys(owners), compare), slices.SortedFunc(maps.Keys(last), compare); !slices.Equal(got, want) {
			t.Fatalf("seed %d: %v are told, %v have spoken", seed, got, want)
		}
		for station, at := range owners {
			if last[station] >= 0 && last[station] != at {
				t.Fatalf("seed %d: node %d tells %s, which spoke last on %d", seed, at+1, station, last[station]+1)
			}
			for i, n := range m {
				_, fdb, _ := n.Forwarding(222)
				e := slices.IndexFunc(fdb, func(e segment.FDBEntry) bool { return e.MAC == station })
				if (e >= 0) != (i != at) || e >= 0 && fdb[e].VTEP != m[at].vtep {
					t.Fatalf("seed %d: node %d has %v, %s is on %d", seed, i+1, fdb, station, at+1)
				}
			}
		}
	}
}

func compare(a, b macvrf.MAC) int { return slices.Compare(a[:], b[:]) }

// What a LAN's segment has to have is the same, whether routes come one by one or all at once, and is sorted.
func TestTheForwardingTableIsThatOfItsRoutes(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	step, want := nodes(1)[0], map[macvrf.MAC]netip.Addr{}
	for i := range 3000 {
		r := route(macvrf.MACIP, byte(2+rng.IntN(5)), func(r *macvrf.Route) { r.RD = macvrf.RD{1}; r.MAC = mac(byte(rng.IntN(200))) })
		if rng.IntN(3) == 0 {
			step.Withdraw(began, r.Key)
			delete(want, r.MAC)
		} else {
			step.Import(began, r)
			want[r.MAC] = r.VTEP
		}
		if i%7 > 0 {
			continue
		}
		_, fdb, _ := step.Forwarding(222)
		var list []segment.FDBEntry
		for m, v := range want {
			list = append(list, segment.FDBEntry{MAC: m, VTEP: v})
		}
		slices.SortFunc(list, func(a, b segment.FDBEntry) int { return slices.Compare(a.MAC[:], b.MAC[:]) })
		if !slices.Equal(fdb, list) {
			t.Fatalf("after %d: %v, want %v", i, fdb, list)
		}
	}
}

// Whatever a route says, nothing but what a station could have becomes an entry, and another LAN is not touched.
func FuzzRoute(f *testing.F) {
	add := func(r macvrf.Route) {
		f.Add(byte(r.Type), r.RD[:], r.Tag, r.MAC[:], r.IP.AsSlice(), r.VTEP.AsSlice(), r.VNI, r.Targets[0][:], r.Unsupported, r.Sequence, r.Sticky)
	}
	add(route(macvrf.MACIP, 2, nil))
	add(route(macvrf.Multicast, 2, nil))
	f.Fuzz(func(t *testing.T, kind byte, rd []byte, tag uint32, mac, ip, vtep []byte, vni uint32, target []byte, other bool, sequence uint32, sticky bool) {
		n := newNode(1)
		n.Set(began, []macvrf.LAN{{VNI: 222, VTEP: n.vtep, Claimed: true}, {VNI: 223, VTEP: n.vtep, Claimed: true, Import: []macvrf.Target{{9, 9}}}})
		r := macvrf.Route{VNI: vni, Targets: make([]macvrf.Target, 1), Unsupported: other, Sequence: sequence, Sticky: sticky}
		r.Type, r.Tag = macvrf.RouteType(kind), tag
		copy(r.RD[:], rd)
		copy(r.MAC[:], mac)
		copy(r.Targets[0][:], target)
		r.IP, _ = netip.AddrFromSlice(ip)
		r.VTEP, _ = netip.AddrFromSlice(vtep)
		n.Import(began, r)
		remotes, fdb, _ := n.Forwarding(222)
		for _, e := range fdb {
			if e.MAC[0]&1 != 0 || e.MAC == [6]byte{} || !e.VTEP.Is4() || e.VTEP == n.vtep || e.VTEP.IsMulticast() || e.VTEP.IsUnspecified() {
				t.Errorf("entry %v", e)
			}
		}
		for _, v := range remotes {
			if !v.Is4() || v == n.vtep || v.IsMulticast() || v.IsUnspecified() {
				t.Errorf("remote %v", v)
			}
		}
		_, refused := n.Refused(222)
		if got := len(remotes) + len(fdb) + refused; got > 1 {
			t.Errorf("one route became %d things", got)
		}
		if r.Targets[0] != (macvrf.Target{9, 9}) {
			if remotes, fdb, _ := n.Forwarding(223); len(remotes)+len(fdb) > 0 {
				t.Errorf("the other LAN has %v %v", remotes, fdb)
			}
		}
		n.Withdraw(began, r.Key)
		remotes, fdb, _ = n.Forwarding(222)
		if _, refused := n.Refused(222); len(remotes)+len(fdb)+refused > 0 {
			t.Errorf("left: %v %v, %d refused", remotes, fdb, refused)
		}
	})
}
