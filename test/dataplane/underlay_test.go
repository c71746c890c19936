package dataplane

import (
	"fmt"
	"strings"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

func TestLANReturnsWithItsUnderlay(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	ma, mb := a.manage(t), b.manage(t)
	s := lan("cut", 81, "here", "near", "far")
	ma.runs(t, a.withUnderlay(t, s))
	mb.runs(t, b.withUnderlay(t, s))
	here, near := a.attach(t, s, "here", segment.Veth), a.attach(t, s, "near", segment.Veth)
	far := b.attach(t, s, "far", segment.Veth)
	bothWays(t, here, far)
	must(t, near.Drain())
	before, index := describe(a.observe(t, s)), a.withUnderlay(t, s).VXLAN.UnderlayIndex

	a.PullOut(t)
	a.awaitState(t, s, "the VXLAN to go", func(have segment.State) bool {
		_, ok := have.Link(s.VXLAN.Name)
		return !ok
	})
	gone := s // the desired state without the device
	gone.VXLAN.UnderlayIndex = 0
	ma.runs(t, gone)
	crosses(t, here, near, frames.Stream(nil, here.MAC, 2, 1)) // frames within the node still pass

	a.PlugIn(t)
	again := a.withUnderlay(t, s)
	ma.runs(t, again)
	a.AwaitCarrier(t, netlab.UnderlayDevice)
	crosses(t, here, far, frames.Stream(nil, here.MAC, 2, 2))
	crosses(t, far, here, frames.Stream(nil, far.MAC, 2, 3))
	// Only the ifindex of the new device differs.
	old, now := fmt.Sprintf("UnderlayIndex:%d}", index), fmt.Sprintf("UnderlayIndex:%d}", again.VXLAN.UnderlayIndex)
	if got, want := describe(a.observe(t, s)), strings.Replace(before, old, now, 1); got != want {
		t.Errorf("the segment is\n%s\nwant\n%s", got, want)
	}
}
