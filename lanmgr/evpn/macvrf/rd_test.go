package macvrf_test

import (
	"slices"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// No two LANs of a node have the same RD, although an RD has no room for a whole VNI.
func TestRDsOfLANsDiffer(t *testing.T) {
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

// A LAN gets the RD that it asks for, even from another LAN; the others keep theirs.
func TestLANGetsRequestedRD(t *testing.T) {
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
	with := func(l macvrf.LAN, number uint16) macvrf.LAN { l.RD = number; return l }
	for _, step := range []struct {
		lans []macvrf.LAN
		want []uint16
	}{
		{[]macvrf.LAN{five, six}, []uint16{5, 6}},
		{[]macvrf.LAN{five, with(six, 5)}, []uint16{6, 5}},
		{[]macvrf.LAN{with(five, 5), with(six, 5)}, []uint16{6, 5}},
		{[]macvrf.LAN{with(five, 5), with(six, 300)}, []uint16{5, 300}},
		{[]macvrf.LAN{five, six}, []uint16{5, 6}},
		{[]macvrf.LAN{with(six, 300), five}, []uint16{300, 5}},
	} {
		if have := numbers(step.lans...); !slices.Equal(have, step.want) {
			t.Errorf("%+v have %v, want %v", step.lans, have, step.want)
		}
	}
}
