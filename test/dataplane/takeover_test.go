package dataplane

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
)

// kubelet allocates a spoke to the next pod while the sandbox of the last one may still exist.
func TestNewSandboxTakesOverASpoke(t *testing.T) {
	t.Parallel()
	for _, old := range []segment.Kind{segment.Veth, segment.Macvtap} {
		for _, successor := range []segment.Kind{segment.Veth, segment.Macvtap} {
			t.Run(fmt.Sprintf("%s to %s", old, successor), func(t *testing.T) {
				t.Parallel()
				expectTakeover(t, old, successor)
			})
		}
	}
}

func expectTakeover(t *testing.T, oldKind, newKind segment.Kind) {
	t.Helper()
	a, b := twoNodes(t)
	s := lan("handed", 71, "far", "spoke")
	onA, mac := a.withUnderlay(t, s), segment.MAC(s.LAN, "spoke")
	a.reconcile(t, onA)
	b.reconcile(t, b.withUnderlay(t, s))
	fresh := describe(a.observe(t, s))
	far := b.attach(t, s, "far", segment.Veth)
	oldPod, newPod := a.sandbox(t), a.sandbox(t)
	oldNetwork, newNetwork := network(s, "spoke", oldKind, nil), network(s, "spoke", newKind, nil)
	oldWire, _ := oldPod.add(t, s, oldNetwork)
	crosses(t, oldWire, far, frames.Stream(nil, mac, 1, 1))
	crosses(t, far, oldWire, frames.Stream(mac, far.MAC, 1, 2))

	// The old pod's namespace and QEMU's open tap still exist.
	wire, result := newPod.add(t, s, newNetwork)
	expectLink(t, newPod.Namespace, ifname, mac.String(), lanMTU)
	if links := oldPod.Links(t); len(links) != 0 {
		t.Errorf("the old pod still has %v", links)
	}
	for range 3 { // the old pod's DEL comes late, and twice
		if devices := a.devices(t); len(devices) != 1 || devices[0].ClaimID != segment.ClaimID(newPod.id, ifname) {
			t.Errorf("CDI devices are %v", devices)
		}
		newPod.mustCall(t, "CHECK", with(newNetwork, keys{"prevResult": json.RawMessage(result)}))
		crosses(t, wire, far, frames.Stream(nil, mac, 1, 3))
		crosses(t, far, wire, frames.Stream(mac, far.MAC, 1, 4))
		oldPod.mustCall(t, "DEL", oldNetwork)
	}
	if ops := a.reconcile(t, onA); len(ops) != 0 {
		t.Errorf("after the take-over the daemon did %v", ops)
	}
	for range 2 {
		newPod.mustCall(t, "DEL", newNetwork)
	}
	a.reconcile(t, onA) // the VXLAN goes down
	if now := describe(a.observe(t, s)); now != fresh {
		t.Errorf("after both pods ended the segment is\n%s\nwant\n%s", now, fresh)
	}
}

func bothWays(t *testing.T, one, other *host) {
	t.Helper()
	crosses(t, one, other, frames.Stream(nil, one.MAC, 1, 1))
	crosses(t, other, one, frames.Stream(one.MAC, other.MAC, 1, 2))
}

// A runtime may remove a pod's namespace without a DEL: the next pod can have the spoke all the same.
func TestSpokeIsFreeAfterItsPodsNamespaceIsRemoved(t *testing.T) {
	t.Parallel()
	for _, kind := range []segment.Kind{segment.Veth, segment.Macvtap} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			a, _ := twoNodes(t)
			m := a.manage(t)
			s := a.withUnderlay(t, lan("died", 72, "spoke", "other"))
			m.runs(t, s)
			fresh := describe(a.observe(t, s))
			t.Run("pod", func(t *testing.T) { a.attach(t, s, "spoke", kind) })
			a.awaitState(t, s, "the spoke to be free", func(have segment.State) bool { return describe(have) == fresh })
			bothWays(t, a.attach(t, s, "spoke", kind), a.attach(t, s, "other", segment.Veth))
		})
	}
}
