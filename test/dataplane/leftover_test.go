package dataplane

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/netlab"
)

// A daemon may be killed between creating a namespace's file and mounting the namespace there, or the other way round.
func TestNamespaceFileWithoutItsNamespaceIsRemoved(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	m := a.manage(t)
	file := filepath.Join(a.Run, "netns", "lan-half")
	must(t, os.MkdirAll(filepath.Dir(file), 0o755))
	must(t, os.WriteFile(file, nil, 0o444))
	m.Set(nil)
	a.awaitState(t, lan("half", 120), "nothing", func(have segment.State) bool { return !have.StaleName })
	if exists(file) {
		t.Errorf("%s is still there", file)
	}
}

// The runtime waits for the plugin, and the plugin for the lock of the LAN, but only until its context ends.
func TestClaimEndsWithItsContextWhileLocked(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	s := a.withUnderlay(t, lan("locked", 121, "spoke"))
	a.reconcile(t, s)
	holder, err := os.OpenFile(filepath.Join(a.Run, "lock", s.Netns), os.O_CREATE|os.O_RDWR, 0o600)
	must(t, err)
	must(t, unix.Flock(int(holder.Fd()), unix.LOCK_EX))

	st := host{Namespace: netlab.NewPod(t)}
	st.request = request(s, "spoke", segment.Veth, st.Namespace)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.kernel.Claim(ctx, st.request); !errors.Is(err, context.Canceled) {
		t.Errorf("claim while another process has the lock: %v", err)
	}
	holder.Close()
	if _, err := a.kernel.Claim(t.Context(), st.request); err != nil {
		t.Errorf("claim after the lock is free: %v", err)
	}
}

// An attach to a LAN that was just removed leaves no lock file.
func TestClaimOfAnAbsentLANLeavesNothing(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	s := lan("none", 122, "spoke")
	r := request(s, "spoke", segment.Veth, netlab.NewPod(t))
	if _, err := a.kernel.Claim(t.Context(), r); !errors.Is(err, kernel.ErrNoLAN) {
		t.Errorf("claim: %v", err)
	}
	expectNothing(t, a)
}

// Many spokes are removed in one step: one by one each would take 16 ms, in which no other pod can attach.
func TestManySpokesAreRemovedAtOnce(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	var spokes []string
	for i := range 40 {
		spokes = append(spokes, fmt.Sprintf("spoke-%d", i))
	}
	many, few := a.withUnderlay(t, lan("many", 123, spokes...)), a.withUnderlay(t, lan("many", 123, spokes[:10]...))
	a.reconcile(t, few)
	want := describe(a.observe(t, few))
	a.reconcile(t, many)
	stays := a.attach(t, many, spokes[0], segment.Veth)
	goes := a.attach(t, many, spokes[20], segment.Veth)
	bothWays(t, stays, goes)
	a.reconcile(t, few)
	bothWays(t, stays, goes) // the spoke of one is removed, but it is attached
	a.release(t, stays)
	a.release(t, goes)
	a.reconcile(t, few)
	if got := describe(a.observe(t, few)); got != want {
		t.Errorf("the segment is\n%s\nwant\n%s", got, want)
	}
}

// A pod's sandbox stays and no DEL comes: the daemon ends the claim when kubelet no longer has the pod.
func TestClaimIsEndedThoughItsSandboxStays(t *testing.T) {
	t.Parallel()
	netlab.NeedDevices(t)
	h, s := nodeWithLAN(t)
	m := h.manage(t)
	m.runs(t, s)
	empty := h.links(t, s)
	for _, kind := range []segment.Kind{segment.Veth, segment.Macvtap} {
		pod := h.attachByPlugin(t, s, "srl", kind)
		claims := h.observe(t, s).Claims()
		if len(claims) != 1 {
			t.Fatalf("claims %+v", claims)
		}
		must(t, m.Release(t.Context(), s.Netns, claims[0]))
		if links := pod.Links(t); len(links) != 0 {
			t.Errorf("%s: the pod still has %v", kind, links)
		}
		if now, devices := h.links(t, s), h.devices(t); now != empty || len(devices) != 0 {
			t.Errorf("%s: left are %v and\n%s\nwant\n%s", kind, devices, now, empty)
		}
		m.awaitReports(t, "no claim", func(reports []lanmgr.Report) bool { return len(reports[0].Claims) == 0 })
		must(t, m.Release(t.Context(), s.Netns, claims[0])) // the claim has ended already
	}
}
