package dataplane

import (
	"testing"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
)

// kubelet gives a spoke to the next pod while the sandbox of the last one may still be dying.
func TestNextPodTakesASpokeOverFromADyingSandbox(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		old, new segment.Kind
	}{
		{"pod to pod", segment.Veth, segment.Veth},
		{"pod to VM", segment.Veth, segment.Macvtap},
		{"VM to pod", segment.Macvtap, segment.Veth},
		{"VM to VM", segment.Macvtap, segment.Macvtap},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a, b := twoNodes(t)
			s := lan("handed", 71, "far", "spoke")
			a.reconcile(t, a.withUnderlay(t, s))
			b.reconcile(t, b.withUnderlay(t, s))
			fresh := describe(a.observe(t, s))
			far := b.attach(t, s, "far", segment.Veth)
			old := a.attach(t, s, "spoke", c.old)
			bothWays(t, old, far)

			// The old pod's namespace, and QEMU's hold on its tap, are still there.
			next := a.attach(t, s, "spoke", c.new)
			bothWays(t, next, far)
			if links := old.Links(t); len(links) != 0 {
				t.Errorf("the old pod still has %v", links)
			}
			if old.MAC.String() != next.MAC.String() {
				t.Errorf("the spoke's MAC was %s and is %s, want the same", old.MAC, next.MAC)
			}

			a.release(t, old) // its DEL comes late, and twice
			a.release(t, old)
			if ops := a.reconcile(t, a.withUnderlay(t, s)); len(ops) != 0 {
				t.Errorf("after the take-over the daemon had to do %v", ops)
			}
			bothWays(t, next, far)

			a.release(t, next)
			a.release(t, next)
			a.reconcile(t, a.withUnderlay(t, s)) // the VXLAN goes down
			if now := describe(a.observe(t, s)); now != fresh {
				t.Errorf("after both have gone the segment is\n%s\nwant\n%s", now, fresh)
			}
		})
	}
}

func bothWays(t *testing.T, one, other *host) {
	t.Helper()
	crosses(t, one, other, frames.Stream(nil, one.MAC, 1, 1))
	crosses(t, other, one, frames.Stream(one.MAC, other.MAC, 1, 2))
}

// A runtime may kill a pod's namespace without any DEL: the spoke waits for the next pod all the same.
func TestSpokeIsFreeAfterItsPodsNamespaceDied(t *testing.T) {
	t.Parallel()
	for _, kind := range []segment.Kind{segment.Veth, segment.Macvtap} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			a, _ := twoNodes(t)
			m := a.manage(t)
			s := a.withUnderlay(t, lan("died", 72, "spoke", "other"))
			m.runs(t, s)
			fresh := describe(a.observe(t, s))
			t.Run("pod", func(t *testing.T) {
				a.attach(t, s, "spoke", kind)
			})
			a.awaitState(t, s, "the spoke to be free", func(have segment.State) bool { return describe(have) == fresh })
			bothWays(t, a.attach(t, s, "spoke", kind), a.attach(t, s, "other", segment.Veth))
		})
	}
}
