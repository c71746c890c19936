package macvrf_test

import (
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// A thousand nodes with ten MACs each: how long the table takes, and how large it is.
func TestThousandNodes(t *testing.T) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	n := nodes(1)[0]
	began := time.Now()
	at := func(i, m int) macvrf.Route {
		return route(macvrf.MACIP, 2, func(r *macvrf.Route) {
			r.RD, r.VTEP = macvrf.RD{1: 1, 4: byte(i >> 8), 5: byte(i)}, netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
			r.MAC = macvrf.MAC{2, byte(m), byte(i >> 8), byte(i), 1, 1}
		})
	}
	for i := range 1000 {
		f := at(i, 0)
		f.Type, f.MAC, f.IP = macvrf.Multicast, macvrf.MAC{}, f.VTEP
		n.Import(began, f)
		for m := range 10 {
			n.Import(began, at(i, m))
		}
	}
	remotes, fdb, _ := n.Forwarding(222)
	if len(remotes) != 1000 || len(fdb) != 10_000 {
		t.Fatalf("%d remotes, %d MACs", len(remotes), len(fdb))
	}
	all := time.Since(began)
	runtime.GC()
	runtime.ReadMemStats(&after)
	began = time.Now()
	const moves = 1000
	for i := range moves {
		r := at(i%1000, 0)
		r.VTEP = vtep(byte(1 + i%200 + 2))
		n.Import(began, r)
		n.Forwarding(222)
		n.Advertised()
	}
	t.Logf("11,000 routes: %v, %d KiB; one more move: %v", all, (after.HeapAlloc-before.HeapAlloc)>>10, time.Since(began)/moves)
}

// A router may tell very many routes that cannot be used. One is named for all, the same one as long as it is told, and none else is looked at.
func TestOfTenThousandRefusedRoutesOneIsNamed(t *testing.T) {
	n := nodes(1)[0]
	bad := func(i int) macvrf.Route {
		return route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.VNI, r.MAC = 223, macvrf.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)} })
	}
	n.Import(began, bad(1))
	one, all := n.Refused(222)
	if all != 1 || one.Reason != macvrf.OtherVNI {
		t.Fatalf("%d refused, %v", all, one)
	}
	of := func() time.Duration {
		const often = 1000
		began := time.Now()
		for range often {
			n.Refused(222)
		}
		return time.Since(began) / often
	}
	ofOne := of()
	for i := range 10_000 {
		n.Import(began, bad(i))
	}
	t.Logf("to name one of 10,000 takes %v, of one %v", of(), ofOne)
	if same, all := n.Refused(222); all != 10_000 || same.Route.Key != one.Route.Key {
		t.Errorf("of %d %v is named, was %v", all, same, one)
	}
	if made := testing.AllocsPerRun(10, func() { n.Refused(222) }); made > 0 {
		t.Errorf("to name one %v things are made", made)
	}
	n.Withdraw(began, one.Route.Key)
	if other, all := n.Refused(222); all != 9_999 || other.Route.Key == one.Route.Key || other.Reason != macvrf.OtherVNI {
		t.Errorf("of %d %v is named, which is told no more", all, other)
	}
}
