package macvrf_test

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// A node answers for addresses that exactly one host has, on another node.
func TestNeighborsAreHostsOnOtherNodes(t *testing.T) {
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
		t.Error("a LAN without suppression has neighbours")
	}
	n.Set(began, []macvrf.LAN{{VNI: 222, VTEP: n.vtep, Claimed: true, Attached: []macvrf.MAC{mac(7)}, Suppress: true}})
	expect("one", one)
	n.Import(began, has(9, b, 2))
	n.Import(began, has(9, netip.Addr{}, 2))
	n.Import(began, has(9, netip.MustParseAddr("ff02::1"), 2))
	n.Import(began, has(9, a, 3))
	expect("two, one of them advertised by two nodes", one, other)
	n.Import(began, has(8, a, 3))
	expect("another host has one of them", other)
	n.Bind(began, 222, mac(7), b)
	expect("and a local host the other")
	n.Withdraw(began, has(8, a, 3).Key)
	n.Bind(began, 222, mac(7), a)
	n.Import(began, has(6, a, 3))
	n.Withdraw(began, has(6, a, 3).Key)
	expect("no local host has the one any more", one)
	n.LearnLocal(began, 222, mac(9))
	expect("the host has moved to this node")
	n.ForgetLocal(began, 222, mac(9))
	n.Set(began, []macvrf.LAN{{VNI: 222, VTEP: n.vtep, Claimed: true, Suppress: true}})
	expect("it has aged out, and the pod is detached", one, other)
	n.Withdraw(began, has(9, a, 2).Key)
	n.Withdraw(began, has(9, a, 3).Key)
	expect("one is withdrawn", other)
}
