package dataplane

import (
	"fmt"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
)

func TestEditingSpokesLosesNoFrameOfOthers(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	ma, mb := a.manage(t), b.manage(t)
	base := lan("edited", 61, "left", "right", "near")
	ma.runs(t, a.withUnderlay(t, base))
	mb.runs(t, b.withUnderlay(t, base))
	left, near := a.attach(t, base, "left", segment.Veth), a.attach(t, base, "near", segment.Veth)
	right := b.attach(t, base, "right", segment.Veth)
	// Both MACs are learned before, so that no frame is flooded.
	crosses(t, left, right, frames.Stream(nil, left.MAC, 9, 0))
	if _, err := next(near, frameTimeout); err != nil {
		t.Fatal(err)
	}
	streams := []*stream{
		startStream(t, 1, left, right),
		startStream(t, 2, right, near),
		startStream(t, 3, near, left),
	}
	for rounds := range 10 {
		s := base
		s.Generation = int64(rounds + 2)
		s.AllowedNamespaces = []string{fmt.Sprintf("namespace-%d", rounds)}
		for i := range 1 + rounds%8 {
			s.Spokes = append(s.Spokes, fmt.Sprintf("new%d", (rounds+i)%10))
		}
		ma.runs(t, a.withUnderlay(t, s))
		mb.runs(t, b.withUnderlay(t, s))
		pod := a.attach(t, s, s.Spokes[len(s.Spokes)-1], segment.Veth)
		a.release(t, pod)
	}
	for _, s := range streams {
		s.expectAll(t)
	}
}

func TestRestartingTheDaemonLosesNoFrame(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	m := a.manage(t)
	s := a.withUnderlay(t, lan("restarted", 63, "left", "right"))
	m.runs(t, s)
	b.reconcile(t, b.withUnderlay(t, s))
	left, right := a.attach(t, s, "left", segment.Veth), b.attach(t, s, "right", segment.Veth)
	bothWays(t, left, right)
	there, back := startStream(t, 1, left, right), startStream(t, 2, right, left)
	for range 3 {
		m.stop()
		m = a.manage(t)
		m.runs(t, s)
	}
	there.expectAll(t)
	back.expectAll(t)
}

func TestRemovedSpokeStaysUntilItsPodEnds(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	m := a.manage(t)
	s := a.withUnderlay(t, lan("withdrawn", 62, "stays", "goes"))
	m.runs(t, s)
	stays, goes := a.attach(t, s, "stays", segment.Veth), a.attach(t, s, "goes", segment.Veth)
	s.Spokes = s.Spokes[:1]
	s.Generation++
	m.runs(t, s)
	crosses(t, stays, goes, frames.Stream(nil, stays.MAC, 1, 0))
	crosses(t, goes, stays, frames.Stream(nil, goes.MAC, 1, 1))
	a.release(t, goes)
	a.awaitState(t, s, "the withdrawn spoke to go", func(have segment.State) bool {
		_, ok := have.Link(segment.PortName("goes"))
		return !ok
	})
}
