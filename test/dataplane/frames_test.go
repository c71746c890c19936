package dataplane

import (
	"testing"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// Every frame has bytes of its own, so the receiver expects exactly what was sent, with VLAN tags in place, and no
// frame besides.
func TestEveryFramePassesBetweenPods(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	s := lan("frames", 222, "a1", "a2", "b1")
	a.reconcile(t, a.withUnderlay(t, s))
	b.reconcile(t, b.withUnderlay(t, s))
	a1 := a.attach(t, s, "a1", segment.Veth)
	t.Run("within a node", func(t *testing.T) {
		a2 := a.attach(t, s, "a2", segment.Veth)
		catalogCrosses(t, a1, a2)
		catalogCrosses(t, a2, a1)
		a.release(t, a2)
	})
	t.Run("across nodes", func(t *testing.T) {
		b1 := b.attach(t, s, "b1", segment.Veth)
		catalogCrosses(t, a1, b1)
		catalogCrosses(t, b1, a1)
	})
}

func TestEveryFramePassesBetweenVMsAndPods(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	s := lan("taps", 223, "pod", "vm", "far")
	a.reconcile(t, a.withUnderlay(t, s))
	b.reconcile(t, b.withUnderlay(t, s))
	vm := a.attach(t, s, "vm", segment.Macvtap)
	t.Run("to and from a pod of the node", func(t *testing.T) {
		pod := a.attach(t, s, "pod", segment.Veth)
		catalogCrosses(t, pod, vm)
		catalogCrosses(t, vm, pod)
		doubleTaggedCrosses(t, vm, pod)
		a.release(t, pod)
	})
	t.Run("to and from a pod of another node", func(t *testing.T) {
		far := b.attach(t, s, "far", segment.Veth)
		catalogCrosses(t, far, vm)
		catalogCrosses(t, vm, far)
		doubleTaggedCrosses(t, vm, far)
		b.release(t, far)
	})
	t.Run("to and from a VM of another node", func(t *testing.T) {
		far := b.attach(t, s, "far", segment.Macvtap)
		catalogCrosses(t, far, vm)
		catalogCrosses(t, vm, far)
		doubleTaggedCrosses(t, vm, far)
		doubleTaggedCrosses(t, far, vm)
	})
}

func catalogCrosses(t *testing.T, from, to *host) {
	t.Helper()
	for _, f := range frames.Catalog(from.MAC, from.MTU) {
		t.Run(f.Name, func(t *testing.T) {
			if f.Passes {
				crosses(t, from, to, f.Bytes)
			} else {
				isDropped(t, from, to, f.Bytes)
			}
		})
	}
}

// doubleTaggedCrosses sends what a packet socket cannot send: two tags around a payload of the full MTU.
func doubleTaggedCrosses(t *testing.T, from, to *host) {
	t.Helper()
	var full []byte
	for _, f := range frames.Catalog(from.MAC, from.MTU) {
		if f.Name == "full-mtu-8021q" {
			full = f.Bytes
		}
	}
	t.Run("full-mtu-qinq", func(t *testing.T) { crosses(t, from, to, frames.Tag(full, frames.Dot1AD, 200)) })
}

func TestLANsWithDifferentVNIsAreSeparate(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	one, other := lan("one", 31, "one-a", "one-b"), lan("other", 32, "other-a", "other-b")
	for _, s := range []segment.Segment{one, other} {
		a.reconcile(t, a.withUnderlay(t, s))
		b.reconcile(t, b.withUnderlay(t, s))
	}
	oneA, oneB := a.attach(t, one, "one-a", segment.Veth), b.attach(t, one, "one-b", segment.Veth)
	otherA, otherB := a.attach(t, other, "other-a", segment.Veth), b.attach(t, other, "other-b", segment.Veth)
	catalogCrosses(t, oneA, oneB)
	catalogCrosses(t, oneB, oneA)
	// The first frame that the other LAN's pods receive is their own.
	crosses(t, otherA, otherB, frames.Stream(nil, otherA.MAC, 1, 1))
	crosses(t, otherB, otherA, frames.Stream(nil, otherB.MAC, 1, 2))
}

func TestClaimSetsRequestedNameMACAndMTU(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	s := lan("asked", 40, "plain", "asked")
	a.reconcile(t, a.withUnderlay(t, s))
	b.reconcile(t, b.withUnderlay(t, s))
	want := segment.MAC(s.LAN, "plain").String()
	for _, h := range []node{a, b, a} {
		st := h.claim(t, s, "plain", segment.Veth)
		expectLink(t, st.Namespace, ifname, want, lanMTU)
		h.release(t, st)
	}
	pod := netlab.NewPod(t)
	asked := request(s, "asked", segment.Veth, pod)
	asked.Interface, asked.MTU, asked.MAC = "e1-1", 1280, segment.MAC(s.LAN, "someone else")
	if _, err := a.kernel.Claim(t.Context(), asked); err != nil {
		t.Fatal(err)
	}
	expectLink(t, pod, "e1-1", asked.MAC.String(), 1280)
	if err := a.kernel.CheckClaim(t.Context(), asked); err != nil {
		t.Errorf("CHECK after ADD: %v", err)
	}
}

func expectLink(t *testing.T, ns netlab.Namespace, name, mac string, mtu int) {
	t.Helper()
	l, err := ns.Netlink(t).LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	if got := l.Attrs().HardwareAddr.String(); got != mac || l.Attrs().MTU != mtu {
		t.Errorf("%s has %s and MTU %d, want %s and %d", name, got, l.Attrs().MTU, mac, mtu)
	}
}
