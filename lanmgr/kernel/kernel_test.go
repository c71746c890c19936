package kernel_test

import (
	"context"
	"net/netip"
	"os"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/netns"
)

func TestMain(m *testing.M) { netns.Main(m) }

func lab(t *testing.T) (*kernel.Node, segment.Segment) {
	t.Helper()
	u := netns.NewUnderlay(t, 1500)
	host := u.Join(t, "worker1")
	n := kernel.New(kernel.Paths{Run: host.Run, HostNetns: host.Path})
	t.Cleanup(func() {
		if _, err := n.Reconcile(context.Background(), "lab", segment.Teardown); err != nil {
			t.Error(err)
		}
		n.Close()
	})
	under, err := n.Underlays(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	d, ok := under.Devices["eth1"]
	if !ok || !d.IPv6.IsLinkLocalUnicast() || !d.Up || !d.Carrier || d.IPv6Off {
		t.Fatalf("underlays are %+v, want eth1 up with a link-local address", under)
	}
	return n, segment.Segment{
		LAN: segment.LAN{Namespace: "default", Name: "lab", UID: "1"}, Netns: "lab", Bridge: "br222", MTU: 1422,
		VXLAN:  segment.VXLAN{Name: "vx222", VNI: 222, Port: 4789, Group: netip.MustParseAddr("ff02::14"), Underlay: "eth1", UnderlayIndex: d.Index},
		Spokes: []string{"srl", "vm"},
	}
}

func build(t *testing.T, n *kernel.Node, want segment.Segment) []segment.Op {
	t.Helper()
	ops, err := n.Reconcile(t.Context(), want.Netns, func(have segment.State) []segment.Op { return segment.Diff(want, have) })
	if err != nil {
		t.Fatal(err)
	}
	return ops
}

func TestSegmentIsBuiltOnceAndTakenAway(t *testing.T) {
	n, want := lab(t)
	if ops := build(t, n, want); len(ops) == 0 {
		t.Fatal("nothing was done to build a segment")
	}
	if ops := build(t, n, want); len(ops) != 0 {
		t.Errorf("a segment that stands was changed: %v", ops)
	}
	if _, err := n.Reconcile(t.Context(), want.Netns, segment.Teardown); err != nil {
		t.Fatal(err)
	}
	s, err := n.Observe(t.Context(), want.Netns)
	if err != nil {
		t.Fatal(err)
	}
	if s.Exists || s.Lost || s.Record != nil || len(s.Links) != 0 {
		t.Errorf("left after teardown: %+v", s)
	}
}

func claim(t *testing.T, n *kernel.Node, spoke string, kind segment.Kind, sandbox, pod string) (kernel.ClaimRequest, kernel.Attachment) {
	t.Helper()
	r := kernel.ClaimRequest{
		Netns: "lab", Spoke: spoke, Kind: kind, Sandbox: sandbox, Interface: "net1", PodNetns: pod,
		PodNamespace: "default", Pod: "pod-" + sandbox, PodUID: "u-" + sandbox,
	}
	a, err := n.Claim(context.Background(), r)
	if err != nil {
		t.Fatalf("claim %s as %s by %s: %v", spoke, kind, sandbox, err)
	}
	if err := n.CheckClaim(t.Context(), r); err != nil {
		t.Errorf("check right after the claim: %v", err)
	}
	return r, a
}

func TestTakeOverBetweenKinds(t *testing.T) {
	if os.Geteuid() != 0 {
		netns.NeedDevices(t)
	}
	kinds := []segment.Kind{segment.Veth, segment.Macvtap}
	for _, first := range kinds {
		for _, second := range kinds {
			t.Run(string(first)+" to "+string(second), func(t *testing.T) {
				n, want := lab(t)
				build(t, n, want)
				old, _ := claim(t, n, "srl", first, "old", netns.NewPod(t).Path)
				if ops := build(t, n, want); len(ops) != 0 {
					t.Errorf("with one attachment there was still to do: %v", ops)
				}
				next, a := claim(t, n, "srl", second, "next", netns.NewPod(t).Path)
				if a.MAC.String() != segment.MAC(want.LAN, "srl").String() || a.MTU != want.MTU {
					t.Errorf("the second got %+v", a)
				}
				if second == segment.Macvtap && a.TapMajor == 0 {
					t.Error("the macvtap has no device")
				}
				if err := n.Release(t.Context(), "lab", "srl", old.ID()); err != nil {
					t.Fatal(err)
				}
				if err := n.CheckClaim(t.Context(), next); err != nil {
					t.Errorf("after the late release of the first: %v", err)
				}
				if ops := build(t, n, want); len(ops) != 0 {
					t.Errorf("with the second attached there was still to do: %v", ops)
				}
				if err := n.Release(t.Context(), "lab", "srl", next.ID()); err != nil {
					t.Fatal(err)
				}
				build(t, n, want)
				claims, err := n.Claims(t.Context(), "lab")
				if err != nil || len(claims) != 0 {
					t.Errorf("claims after release: %v, %v", claims, err)
				}
			})
		}
	}
}
