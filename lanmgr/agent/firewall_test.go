package agent_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/agent"
	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// fakeFirewall keeps the LANs of Set, and returns err.
type fakeFirewall struct {
	*board
	changed chan struct{}

	mu   sync.Mutex
	lans []firewall.LAN
	err  error
}

func (f *fakeFirewall) Set(lans []firewall.LAN) {
	f.mu.Lock()
	f.lans = slices.Clone(lans)
	f.mu.Unlock()
	f.changedNow()
}

func (f *fakeFirewall) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *fakeFirewall) Changed() <-chan struct{} { return f.changed }

func (f *fakeFirewall) refuse(err error) {
	f.mu.Lock()
	f.err = err
	f.mu.Unlock()
	f.changed <- struct{}{}
}

// filtered returns LANs as text: "default/lab 222:4789 192.0.2.2 fe80::2", "unknown" for members that are not known.
func filtered(lans []firewall.LAN) string {
	var texts []string
	for _, l := range lans {
		text := fmt.Sprintf("%s %d:%d", l.Name, l.VNI, l.Port)
		for _, m := range l.Members {
			text += " " + m.String()
		}
		if l.Members == nil {
			text += " unknown"
		}
		texts = append(texts, text)
	}
	return strings.Join(texts, "; ")
}

// awaitFiltered waits until these LANs are strict, with these members.
func (w *world) awaitFiltered(want string) {
	w.t.Helper()
	w.await(w.t, "strict LANs "+want, func() bool {
		w.firewall.mu.Lock()
		defer w.firewall.mu.Unlock()
		return filtered(w.firewall.lans) == want
	})
}

// withUnderlay sets the addresses of a peer's underlay device.
func withUnderlay(n *v1beta1.LANNode, addresses ...string) *v1beta1.LANNode {
	n.Status.Segments[0].Underlay = "eth0"
	n.Status.Underlays = []v1beta1.NodeUnderlay{
		{Name: "eth0", Addresses: addresses},
		{Name: "eth1", Addresses: []string{"198.51.100.1"}},
	}
	return n
}

func TestMembersAreTheOtherNodesOfTheLAN(t *testing.T) {
	w := newWorld(t, lab(unicast))
	stop := w.start()
	w.awaitFiltered("default/lab 222:4789")
	w.peer(withUnderlay(peer("worker2", "uid-lab", "192.0.2.2", 0), "192.0.2.2", "fe80::2")) // no pod is attached there
	w.awaitFiltered("default/lab 222:4789 192.0.2.2 fe80::2")
	w.peer(peer("worker3", "uid-lab", "192.0.2.3", 1)) // of a version that reports no addresses
	w.awaitFiltered("default/lab 222:4789 192.0.2.2 192.0.2.3 fe80::2")
	w.peer(withUnderlay(peer("worker4", "uid-other", "192.0.2.4", 1), "192.0.2.4")) // another LAN
	w.peer(withUnderlay(peer("worker2", "uid-lab", "192.0.2.22", 1), "192.0.2.22")) // is back with another address
	w.awaitFiltered("default/lab 222:4789 192.0.2.3 192.0.2.22")
	w.awaitRemotes("192.0.2.3 192.0.2.22")
	if err := w.api.Delete(t.Context(), peer("worker3", "uid-lab", "", 1)); err != nil {
		t.Fatal(err)
	}
	w.awaitFiltered("default/lab 222:4789 192.0.2.22")

	w.update(func(l *v1beta1.LAN) { l.Spec.StrictPeers = ptr.To(false) })
	w.awaitFiltered("")
	w.update(func(l *v1beta1.LAN) { l.Spec.Discovery, l.Spec.StrictPeers = "", nil })
	w.awaitRemotes("unknown")
	w.awaitFiltered("")
	w.update(func(l *v1beta1.LAN) { l.Spec.StrictPeers = ptr.To(true) })
	w.awaitFiltered("default/lab 222:4789 192.0.2.22")
	stop()
}

func TestLANThatAcceptsNonMembersIsDegraded(t *testing.T) {
	w := newWorld(t, lab(unicast))
	stop := w.start()
	degraded := func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 1 && s.Segments[0].State == v1beta1.SegmentDegraded &&
			s.Segments[0].Reason == v1beta1.ReasonNonMembersAccepted &&
			strings.Contains(s.Segments[0].Message, "no nftables here: the LAN accepts VXLAN packets") &&
			s.Segments[0].Offered > 0
	}
	ready := func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 1 && s.Segments[0].State == v1beta1.SegmentReady
	}
	w.awaitStatus("ready", ready)
	w.firewall.refuse(errors.New("no nftables here"))
	w.awaitStatus("the LAN to be degraded, with healthy spokes", degraded)
	w.update(func(l *v1beta1.LAN) { l.Spec.StrictPeers = ptr.To(false) })
	w.awaitStatus("the LAN to be ready, because it accepts all packets", ready)
	stop()
}

func TestLANNodeHasTheAddressesOfUsedUnderlays(t *testing.T) {
	w := newWorld(t, lab(nil))
	devices := w.kernel.underlays.Devices
	devices["eth0"] = withAddresses(devices["eth0"], "192.0.2.1", "2001:db8::1", "fe80::1")
	devices["jumbo"] = withAddresses(devices["jumbo"], "203.0.113.1")
	stop := w.start()
	w.awaitStatus("the addresses of eth0, and no others", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Underlays) == 1 && s.Underlays[0].Name == "eth0" &&
			slices.Equal(s.Underlays[0].Addresses, []string{"192.0.2.1", "2001:db8::1", "fe80::1"})
	})
	stop()
}

// A segment that is leaving, or that is left by an earlier daemon, keeps the members that it has.
func TestLeavingSegmentsKeepTheirMembers(t *testing.T) {
	members := func(lan types.UID) []netip.Addr { return []netip.Addr{netip.MustParseAddr("192.0.2.2")} }
	here := func(name string, vni uint32) segment.Segment {
		return segment.Segment{
			LAN:   segment.LAN{Namespace: "default", Name: name},
			Netns: name,
			VXLAN: segment.VXLAN{VNI: vni, Port: 4789},
		}
	}
	strict, open := agent.Plan{Segment: here("strict", 1), Strict: true}, agent.Plan{Segment: here("open", 2)}
	moved := here("strict", 1)
	moved.VXLAN.Port = 8472 // not reconciled yet
	have := agent.StrictLANs([]agent.Plan{strict, open}, map[string]segment.Segment{
		"strict": moved, "open": open.Segment, "old": here("old", 3), "lost": {Netns: "lost"},
	}, members)
	want := "default/strict 1:4789 192.0.2.2; default/old 3:4789 unknown; default/strict 1:8472 unknown"
	if filtered(have) != want {
		t.Errorf("strict LANs are %s, want %s", filtered(have), want)
	}
}

func withAddresses(d kernel.Underlay, addresses ...string) kernel.Underlay {
	for _, a := range addresses {
		d.Sources = append(d.Sources, netip.MustParseAddr(a))
	}
	return d
}
