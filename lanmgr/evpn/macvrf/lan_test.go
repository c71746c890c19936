package macvrf_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// A LAN's routes and MACs are counted, and so are moves of MACs, between whichever nodes.
func TestRoutesMACsAndMovesAreCounted(t *testing.T) {
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
	m.exchange(t, began)
	count("at first", a, macvrf.Count{Advertised: 3, Used: 2, Local: 2})
	count("at first", c, macvrf.Count{Advertised: 1, Used: 4, Remote: 2})
	b.LearnLocal(began, 222, mac(1))
	m.exchange(t, began)
	for _, n := range m {
		want := macvrf.Count{Advertised: 1, Used: 4, Remote: 2, Moves: 1}
		if n != c {
			want = macvrf.Count{Advertised: 2, Used: 3, Local: 1, Remote: 1, Moves: 1}
		}
		count("after a move", n, want)
	}
	b.ForgetLocal(began, 222, mac(1)) // and is learned again: it did not move
	m.exchange(t, began)
	b.LearnLocal(began, 222, mac(1))
	m.exchange(t, began)
	count("aged out and learned again", c, macvrf.Count{Advertised: 1, Used: 4, Remote: 2, Moves: 1})
	c.Set(began, []macvrf.LAN{{VNI: 222, VTEP: vtep(9), Claimed: true}})
	count("with another VTEP", c, macvrf.Count{Advertised: 1, Used: 4, Remote: 2, Moves: 1})
	other := macvrf.Route{
		Key: macvrf.Key{Type: macvrf.Multicast, RD: macvrf.RD{9}}, VTEP: vtep(7), VNI: 223,
		Targets: []macvrf.Target{macvrf.NewTarget(1, 222)},
	}
	c.Import(began, other)
	count("with a route of another VNI", c, macvrf.Count{Advertised: 1, Used: 4, Refused: 1, Remote: 2, Moves: 1})
	for range 5 {
		a.LearnLocal(began, 222, mac(1))
		m.exchange(t, began)
		b.LearnLocal(began, 222, mac(1))
		m.exchange(t, began)
	}
	if have, _ := a.Count(222); have.Duplicate != 1 || have.Local != 1 || have.Remote != 0 {
		t.Errorf("with a MAC on two nodes one of them counts %+v", have)
	}
	if _, ok := a.Count(223); ok {
		t.Error("there is a count of a LAN that the node takes no part in")
	}
}

// A route that cannot be used any more counts as withdrawn. A MAC with several routes stays until the last is
// withdrawn.
func TestChangedRouteReplacesOldOne(t *testing.T) {
	n := nodes(1)[0]
	withIP := func(ip string) macvrf.Route {
		return route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.IP = netip.MustParseAddr(ip) })
	}
	n.Import(began, withIP("10.0.0.9"))
	n.Import(began, withIP("fd00::9"))
	n.Import(began, route(macvrf.Multicast, 2, nil))
	n.Withdraw(began, withIP("10.0.0.9").Key)
	expect(t, "one of two withdrawn", n, "advertises itself, floods 2, 9 behind 2")
	bad := withIP("fd00::9")
	bad.VNI = 5
	n.Import(began, bad)
	expect(t, "the other refused", n, "advertises itself, floods 2")
	n.Import(began, withIP("fd00::9"))
	other := withIP("fd00::9")
	other.Targets = []macvrf.Target{macvrf.NewTarget(65000, 223)}
	n.Import(began, other)
	expect(t, "for another LAN now", n, "advertises itself, floods 2")
	n.Import(began, route(macvrf.Multicast, 2, func(r *macvrf.Route) { r.VTEP = vtep(4) }))
	expect(t, "another VTEP", n, "advertises itself, floods 4")
}

func TestRoutesAreImportedByTarget(t *testing.T) {
	n := newNode(1)
	foreign, err := macvrf.ParseTarget("64512:7")
	if err != nil {
		t.Fatal(err)
	}
	// The LAN also imports routes that were received before it was set.
	n.Import(began, route(macvrf.MACIP, 2, func(r *macvrf.Route) {
		r.Targets = []macvrf.Target{macvrf.NewTarget(4_200_000_001, 222)}
	}))
	n.Import(began, route(macvrf.MACIP, 3, func(r *macvrf.Route) {
		r.MAC, r.Targets = mac(3), []macvrf.Target{foreign}
	}))
	lan := macvrf.LAN{VNI: 222, VTEP: n.vtep, Claimed: true}
	n.Set(began, []macvrf.LAN{lan})
	expect(t, "any AS", n, "advertises itself, 9 behind 2")
	lan.Import, lan.Export = []macvrf.Target{foreign}, []macvrf.Target{foreign}
	n.Set(began, []macvrf.LAN{lan})
	expect(t, "a target of its own", n, "advertises itself, 3 behind 3")
	if own := n.Advertised(); !slices.Equal(own[0].Targets, lan.Export) {
		t.Errorf("advertises %v", own)
	}
	n.Set(began, nil)
	if _, _, ok := n.Forwarding(222); ok || len(n.Advertised()) > 0 {
		t.Error("the node still has the LAN")
	}
}

// A LAN imports the routes of its own nodes whatever it imports besides. Changing its target, with the old one kept for
// a while, loses no route.
func TestTargetChangesWithoutLoss(t *testing.T) {
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
			n.Set(began, []macvrf.LAN{{
				VNI: 222, VTEP: n.vtep, Claimed: true, Attached: attached, Import: step.imports, Export: step.exports,
			}})
			m.exchange(t, began)
			expect(t, fmt.Sprint(step), m[0], "advertises itself, advertises 7 seq 0, floods 2, 8 behind 2")
			expect(t, fmt.Sprint(step), m[1], "advertises itself, advertises 8 seq 0, floods 1, 7 behind 1")
		}
	}
}
