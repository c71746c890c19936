package macvrf_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

func TestMACMovesThereAndBack(t *testing.T) {
	m := nodes(3)
	m.exchange(t, began)
	if remotes, fdb, ok := nodes(1)[0].Forwarding(222); remotes == nil || fdb == nil || !ok {
		t.Error("an empty list is nil")
	}
	expect(t, "no MAC is learned", m[0], "advertises itself, floods 2, floods 3")
	for i, step := range []struct {
		learns int
		want   [3]string
	}{
		{0, [3]string{
			"advertises itself, advertises 9 seq 0, floods 2, floods 3",
			"advertises itself, floods 1, floods 3, 9 behind 1",
			"advertises itself, floods 1, floods 2, 9 behind 1",
		}},
		{1, [3]string{
			"advertises itself, floods 2, floods 3, 9 behind 2",
			"advertises itself, advertises 9 seq 1, floods 1, floods 3",
			"advertises itself, floods 1, floods 2, 9 behind 2",
		}},
		{0, [3]string{
			"advertises itself, advertises 9 seq 2, floods 2, floods 3",
			"advertises itself, floods 1, floods 3, 9 behind 1",
			"advertises itself, floods 1, floods 2, 9 behind 1",
		}},
		{0, [3]string{
			"advertises itself, advertises 9 seq 2, floods 2, floods 3",
			"advertises itself, floods 1, floods 3, 9 behind 1",
			"advertises itself, floods 1, floods 2, 9 behind 1",
		}},
	} {
		m[step.learns].LearnLocal(began, 222, mac(9))
		m.exchange(t, began)
		for n, want := range step.want {
			expect(t, fmt.Sprintf("step %d", i), m[n], want)
		}
	}
	m[0].ForgetLocal(began, 222, mac(9))
	m.exchange(t, began)
	expect(t, "aged out everywhere", m[0], "advertises itself, floods 2, floods 3")
	expect(t, "aged out everywhere", m[2], "advertises itself, floods 1, floods 2")
}

// A pod may send from as many MACs as it likes; the node advertises MaxMACs of them, and those of all attached pods.
func TestAdvertisedMACsAreBounded(t *testing.T) {
	n := nodes(1, mac(1))[0]
	learn := func(i int) (full bool) {
		return n.LearnLocal(began, 222, macvrf.MAC{6, 0, byte(i >> 16), byte(i >> 8), byte(i), 1})
	}
	for i := range macvrf.MaxMACs - 1 { // mac(1) is advertised, too
		if learn(i) {
			t.Fatalf("full at %d", i)
		}
	}
	advertised := func() int { return len(n.Advertised()) - 1 } // without the Multicast route
	if !learn(1<<20) || advertised() != macvrf.MaxMACs {
		t.Errorf("%d are advertised, want %d", advertised(), macvrf.MaxMACs)
	}
	n.Set(began, []macvrf.LAN{{VNI: 222, VTEP: n.vtep, Claimed: true, Attached: []macvrf.MAC{mac(1), mac(2)}}})
	if advertised() != macvrf.MaxMACs+1 {
		t.Error("the MAC of another attached pod is not advertised")
	}
	n.ForgetLocal(began, 222, macvrf.MAC{6, 0, 0, 0, 0, 1})
	n.ForgetLocal(began, 222, macvrf.MAC{6, 0, 0, 0, 1, 1})
	if learn(1<<20+1) || advertised() != macvrf.MaxMACs {
		t.Errorf("%d are advertised once there is room", advertised())
	}
}

func TestSilentPodIsAdvertised(t *testing.T) {
	m := nodes(2)
	with := func(claimed bool, macs ...macvrf.MAC) []macvrf.LAN {
		return []macvrf.LAN{{VNI: 222, VTEP: m[0].vtep, Claimed: claimed, Attached: macs}}
	}
	m[0].Set(began, with(true, mac(7)))
	m.exchange(t, began)
	expect(t, "attached", m[1], "advertises itself, floods 1, 7 behind 1")
	m[0].LearnLocal(began, 222, mac(7))
	m[0].ForgetLocal(began, 222, mac(7))
	m.exchange(t, began)
	expect(t, "aged out", m[1], "advertises itself, floods 1, 7 behind 1")
	m[0].Set(began, with(true))
	m.exchange(t, began)
	expect(t, "detached", m[1], "advertises itself, floods 1")
	m[0].Set(began, with(false, mac(7)))
	m.exchange(t, began)
	expect(t, "without claims on this node", m[0], "floods 2")
	expect(t, "without claims on the other node", m[1], "advertises itself")
}

// A pod that is recreated on another node moves at once, although its old node has not withdrawn it.
func TestPodRecreatedOnAnotherNodeMovesAtOnce(t *testing.T) {
	m := nodes(3)
	m[0].Set(began, []macvrf.LAN{{VNI: 222, VTEP: m[0].vtep, Claimed: true, Attached: []macvrf.MAC{mac(7)}}})
	m.exchange(t, began)
	m[1].Set(began, []macvrf.LAN{{VNI: 222, VTEP: m[1].vtep, Claimed: true, Attached: []macvrf.MAC{mac(7)}}})
	m.exchange(t, began)
	expect(t, "on both", m[2], "advertises itself, floods 1, floods 2, 7 behind 2")
	expect(t, "on both", m[0], "advertises itself, floods 2, floods 3, 7 behind 2")
	m[1].Set(began, []macvrf.LAN{{VNI: 222, VTEP: m[1].vtep, Claimed: true}})
	m.exchange(t, began)
	expect(t, "on the first only", m[2], "advertises itself, floods 1, floods 2, 7 behind 1")
}

// Nodes that advertise one MAC at the same time agree: the lower VTEP has it.
func TestLowerVTEPWinsATie(t *testing.T) {
	m := nodes(3, mac(7))
	m.exchange(t, began)
	expect(t, "all advertise it", m[0], "advertises itself, advertises 7 seq 0, floods 2, floods 3")
	for _, n := range m[1:] {
		_, fdb, _ := n.Forwarding(222)
		if len(fdb) != 1 || fdb[0].VTEP != vtep(1) {
			t.Errorf("node %s has %v", n.vtep, fdb)
		}
	}
}

func TestDuplicateMACIsFrozen(t *testing.T) {
	m := nodes(3)
	now := began
	for range 20 {
		for _, n := range m[:2] {
			now = now.Add(time.Second)
			n.LearnLocal(now, 222, mac(9))
			m.exchange(t, now)
		}
	}
	for _, n := range m[:2] {
		if d := n.Duplicates(222); !slices.Equal(d, []macvrf.MAC{mac(9)}) {
			t.Errorf("node %s has duplicates %v", n.vtep, d)
		}
		if _, fdb, _ := n.Forwarding(222); len(fdb) > 0 {
			t.Errorf("node %s sends frames for its own host to %v", n.vtep, fdb)
		}
	}
	third := state(m[2])
	for _, n := range m[:2] {
		now = now.Add(time.Second)
		n.LearnLocal(now, 222, mac(9))
		m.exchange(t, now)
	}
	expect(t, "both still send", m[2], third)

	m[0].ForgetLocal(now, 222, mac(9))
	m.exchange(t, now)
	expect(t, "aged out on one", m[2], "advertises itself, floods 1, floods 2, 9 behind 2")
	if d := append(m[0].Duplicates(222), m[1].Duplicates(222)...); len(d) > 0 {
		t.Errorf("duplicates %v", d)
	}

	now = now.Add(time.Hour) // moves that are far apart do not make a duplicate
	for i := range 20 {
		now = now.Add(time.Minute)
		m[i%2].LearnLocal(now, 222, mac(8))
		m.exchange(t, now)
		want := fmt.Sprintf("advertises itself, floods 1, floods 2, 8 behind %d, 9 behind 2", i%2+1)
		expect(t, "moves every minute", m[2], want)
	}
}

func TestFrozenMACMovesAgainAfterQuietTime(t *testing.T) {
	m := nodes(2)
	now := began
	for i := range 20 {
		m[i%2].LearnLocal(now, 222, mac(9))
		m.exchange(t, now)
	}
	now = now.Add(time.Hour)
	m[0].LearnLocal(now, 222, mac(9))
	m.exchange(t, now)
	m[1].LearnLocal(now, 222, mac(9))
	m.exchange(t, now)
	_, fdb, _ := m[0].Forwarding(222)
	if len(m[0].Duplicates(222)) > 0 || len(fdb) != 1 || fdb[0].VTEP != vtep(2) {
		t.Errorf("node 1: %s", state(m[0]))
	}
}

func TestStickyMACDoesNotMove(t *testing.T) {
	n := nodes(1)[0]
	n.Import(began, route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.Sticky = true }))
	n.LearnLocal(began, 222, mac(9))
	expect(t, "learned", n, "advertises itself, 9 behind 2")
}

func TestSequenceDoesNotWrap(t *testing.T) {
	n := nodes(1)[0]
	n.Import(began, route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.Sequence = 1<<32 - 1 }))
	n.LearnLocal(began, 222, mac(9))
	if own := n.Advertised(); own[0].Sequence != 1<<32-1 {
		t.Errorf("advertises %+v", own)
	}
}

// In whichever order MACs move, the nodes agree on who has each: the node that learned it last, if the others have
// received its route in between.
func TestNodesAgreeOnEachMAC(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		m, now := nodes(4), began
		last := map[macvrf.MAC]int{} // the node that learned it last; -1: several did at once
		for range 60 {
			now = now.Add(time.Minute)
			n, host := rng.IntN(len(m)), mac(byte(rng.IntN(5)))
			if rng.IntN(4) == 0 {
				for _, o := range m {
					o.ForgetLocal(now, 222, host)
				}
				delete(last, host)
			} else {
				m[n].LearnLocal(now, 222, host)
				last[host] = n
				if seed%2 == 1 {
					m[rng.IntN(len(m))].LearnLocal(now, 222, host)
					last[host] = -1
				}
			}
			m.exchange(t, now)
		}
		owners := map[macvrf.MAC]int{}
		for i, n := range m {
			for _, r := range n.Advertised() {
				if _, twice := owners[r.MAC]; twice && r.Type == macvrf.MACIP {
					t.Fatalf("seed %d: two nodes advertise %s", seed, r.MAC)
				} else if r.Type == macvrf.MACIP {
					owners[r.MAC] = i
				}
			}
		}
		have, want := slices.SortedFunc(maps.Keys(owners), compare), slices.SortedFunc(maps.Keys(last), compare)
		if !slices.Equal(have, want) {
			t.Fatalf("seed %d: %v are advertised, %v were learned", seed, have, want)
		}
		for host, at := range owners {
			if last[host] >= 0 && last[host] != at {
				t.Fatalf("seed %d: node %d advertises %s, which %d learned last", seed, at+1, host, last[host]+1)
			}
			for i, n := range m {
				_, fdb, _ := n.Forwarding(222)
				e := slices.IndexFunc(fdb, func(e segment.FDBEntry) bool { return e.MAC == host })
				if (e >= 0) != (i != at) || e >= 0 && fdb[e].VTEP != m[at].vtep {
					t.Fatalf("seed %d: node %d has %v, %s is on %d", seed, i+1, fdb, host, at+1)
				}
			}
		}
	}
}
