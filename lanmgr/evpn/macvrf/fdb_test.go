package macvrf_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// The kernel has a MAC on a local port until it reports otherwise: an entry for a remote has to replace that.
func TestFDBEntrySaysWhetherMACIsLocal(t *testing.T) {
	m := nodes(1)
	m[0].LearnLocal(began, 222, mac(9))
	m[0].Import(began, route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.MAC, r.Sequence = mac(9), 1 }))
	for _, local := range []bool{true, false} {
		if _, fdb, _ := m[0].Forwarding(222); len(fdb) != 1 || fdb[0].Local != local {
			t.Errorf("entries %+v, want one with Local %t", fdb, local)
		}
		m[0].ForgetLocal(began, 222, mac(9))
	}
}

// The FDB of a LAN is the same whether routes come one by one or all at once, and it is sorted.
func TestFDBMatchesRoutes(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	step, want := nodes(1)[0], map[macvrf.MAC]netip.Addr{}
	for i := range 3000 {
		r := route(macvrf.MACIP, byte(2+rng.IntN(5)), func(r *macvrf.Route) {
			r.RD, r.MAC = macvrf.RD{1}, mac(byte(rng.IntN(200)))
		})
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
