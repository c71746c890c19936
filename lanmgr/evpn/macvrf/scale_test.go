package macvrf_test

import (
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// Measures how long the table takes for a thousand nodes with ten MACs each, and how large it is.
func TestThousandNodes(t *testing.T) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	n := nodes(1)[0]
	began := time.Now()
	at := func(i, m int) macvrf.Route {
		return route(macvrf.MACIP, 2, func(r *macvrf.Route) {
			r.RD = macvrf.RD{1: 1, 4: byte(i >> 8), 5: byte(i)}
			r.VTEP = netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
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
	t.Logf("11,000 routes: %v, %d KiB; one more move: %v",
		all, (after.HeapAlloc-before.HeapAlloc)>>10, time.Since(began)/moves)
}

// A router may advertise very many routes that cannot be used. Refused names one of them, the same one until it is
// withdrawn, and does not go through the others.
func TestOneOfManyRefusedRoutesIsNamed(t *testing.T) {
	n := nodes(1)[0]
	bad := func(i int) macvrf.Route {
		return route(macvrf.MACIP, 2, func(r *macvrf.Route) {
			r.VNI, r.MAC = 223, macvrf.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)}
		})
	}
	n.Import(began, bad(1))
	sample, total := n.Refused(222)
	if total != 1 || sample.Reason != macvrf.OtherVNI {
		t.Fatalf("%d refused, %v", total, sample)
	}
	measure := func() time.Duration {
		const calls = 1000
		began := time.Now()
		for range calls {
			n.Refused(222)
		}
		return time.Since(began) / calls
	}
	first := measure()
	for i := range 10_000 {
		n.Import(began, bad(i))
	}
	t.Logf("naming one of 10,000 takes %v, of one %v", measure(), first)
	if same, total := n.Refused(222); total != 10_000 || same.Route.Key != sample.Route.Key {
		t.Errorf("of %d routes %v is named, was %v", total, same, sample)
	}
	if allocations := testing.AllocsPerRun(10, func() { n.Refused(222) }); allocations > 0 {
		t.Errorf("Refused allocates %v times", allocations)
	}
	n.Withdraw(began, sample.Route.Key)
	other, total := n.Refused(222)
	if total != 9_999 || other.Route.Key == sample.Route.Key || other.Reason != macvrf.OtherVNI {
		t.Errorf("of %d routes %v is named, which is withdrawn", total, other)
	}
}
