package agent_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// segmentOnDemand returns a segment as the CNI plugin makes it for a VNI.
func segmentOnDemand() segment.Segment {
	return segment.Segment{
		LAN: segment.LAN{Name: "megalos:5001"}, Netns: "megalos-5001", Bridge: "br5001", MTU: 1442,
		VXLAN: segment.VXLAN{
			Name: "vx5001", VNI: 5001, Port: 4789, NoLearning: true,
			Local: netip.MustParseAddr("192.0.2.1"), Underlay: "eth0", UnderlayIndex: 2,
		},
		AllowedNamespaces: []string{"*"}, OnDemand: true,
	}
}

// find has the manager observe a segment that the plugin has made.
func (m *fakeManager) find(s segment.Segment, claims ...segment.Claim) {
	m.change(func() {
		m.claims[s.Netns] = claims
		m.reports = append(m.reports, lanmgr.Report{Segment: s, Leaving: true, Claims: claims})
	})
}

// onDemandWorld returns a world whose underlay has the VTEP of segmentOnDemand.
func onDemandWorld(t *testing.T, f *fakeEVPN) *world {
	w := newWorld(t)
	device := w.kernel.underlays.Devices["eth0"]
	device.Addresses = []netip.Addr{segmentOnDemand().VXLAN.Local}
	w.kernel.underlays.Devices["eth0"] = device
	if f != nil {
		f.board, f.changed = w.board, make(chan struct{}, 1)
		w.evpn = f
	}
	w.start()
	w.awaitAdvertised("")
	return w
}

// A segment on demand is kept, joined to EVPN and reported while a pod is attached. It is not advertised to kubelet.
func TestSegmentOnDemandStaysWithItsPods(t *testing.T) {
	f := &fakeEVPN{fill: segment.Segment{Remotes: []netip.Addr{netip.MustParseAddr("192.0.2.2")}}}
	w := onDemandWorld(t, f)
	pod := claim(segment.SpokeOnDemand(segment.ClaimID("r1", "net1")), "r1")
	w.manager.find(segmentOnDemand(), pod)
	lanNode := w.awaitStatus("the LAN to be Ready", ready)
	s := lanNode.Status.Segments[0]
	if s.LAN != "megalos:5001" || s.VNI != 5001 || s.VTEP != "192.0.2.1" || s.Offered != 0 || len(s.Attachments) != 1 ||
		s.Attachments[0].Pod != "default/r1" {
		t.Errorf("the LANNode has %+v", s)
	}
	w.await(t, "the LAN to be joined to EVPN", f.has(map[string]macvrf.LAN{"megalos-5001": {
		VNI: 5001, VTEP: segmentOnDemand().VXLAN.Local, Claimed: true, Attached: []macvrf.MAC{macvrf.MAC(pod.MAC)},
	}}))
	w.await(t, "imported routes in the segment", func() bool {
		_, want := w.manager.wanted()
		return len(want) == 1 && len(want[0].Remotes) == 1 && want[0].Recorded().Equal(segmentOnDemand())
	})
	w.manager.change(func() { w.manager.claims = map[string][]segment.Claim{} })
	w.awaitStatus("no segment", func(s v1beta1.LANNodeStatus) bool { return len(s.Segments) == 0 })
	w.await(t, "no LAN in EVPN", f.has(map[string]macvrf.LAN{}))
	if w.advertised() != "" {
		t.Errorf("%s advertised", w.advertised())
	}
}

// A segment on demand is not reported as leaving while a pod is attached. The manager does report it as leaving until
// it gets the plan.
func TestSegmentOnDemandIsNotReportedAsLeaving(t *testing.T) {
	w := onDemandWorld(t, &fakeEVPN{})
	w.manager.change(func() { w.manager.hold = true })
	w.manager.find(segmentOnDemand(), claim(segment.SpokeOnDemand(segment.ClaimID("r1", "net1")), "r1"))
	lanNode := w.awaitStatus("the LAN", func(s v1beta1.LANNodeStatus) bool { return len(s.Segments) == 1 })
	if s := lanNode.Status.Segments[0]; s.State != v1beta1.SegmentNotReady || len(s.Attachments) != 1 || !s.OnDemand() {
		t.Errorf("the LANNode has %+v", s)
	}
	w.manager.change(func() { w.manager.hold = false })
	w.awaitStatus("the LAN to be Ready", ready)
}

func TestSegmentOnDemandReportsItsProblems(t *testing.T) {
	w := onDemandWorld(t, nil)
	w.manager.find(segmentOnDemand(), claim(segment.SpokeOnDemand(segment.ClaimID("r1", "net1")), "r1"))
	reason := func(want string) {
		t.Helper()
		w.awaitStatus(want, func(s v1beta1.LANNodeStatus) bool {
			return len(s.Segments) == 1 && s.Segments[0].State == v1beta1.SegmentDegraded &&
				s.Segments[0].Reason == want &&
				s.Segments[0].Message != ""
		})
	}
	reason(v1beta1.ReasonBGPDown)
	w.kernel.change(func() { w.kernel.underlays = kernel.Underlays{Devices: map[string]kernel.Underlay{}} })
	reason(v1beta1.ReasonUnderlayMissing)
}

// A LAN object has precedence over a segment on demand with the same network namespace.
func TestNetnsBelongsToTheLANObject(t *testing.T) {
	w := newWorld(t, lab(nil))
	w.start()
	w.awaitStatus("the object's LAN", ready)
	w.manager.find(segmentOnDemand(), claim(segment.SpokeOnDemand(segment.ClaimID("r1", "net1")), "r1"))
	wanted := func(names ...string) func() bool {
		return func() bool {
			_, want := w.manager.wanted()
			var have []string
			for _, s := range want {
				have = append(have, s.LAN.String())
			}
			return slices.Equal(have, names)
		}
	}
	w.await(t, "segments of both", wanted("default/lab", "megalos:5001"))
	w.update(func(l *v1beta1.LAN) { l.Status.Holds.NS = "megalos-5001" })
	w.await(t, "the object's segment only", wanted("default/lab"))
}

// The plugin does not know a LAN object that does not select the node. A segment with its VNI is not joined to the LAN.
func TestSegmentOnDemandWithTheVNIOfALANIsNotJoined(t *testing.T) {
	w := newWorld(t, lab(func(l *v1beta1.LAN) {
		l.Spec.NodeSelector = map[string]v1beta1.LabelValue{"zone": "elsewhere"}
		l.Status.Holds.VNI = 5001
	}))
	device := w.kernel.underlays.Devices["eth0"]
	device.Addresses = []netip.Addr{segmentOnDemand().VXLAN.Local}
	w.kernel.underlays.Devices["eth0"] = device
	f := &fakeEVPN{board: w.board, changed: make(chan struct{}, 1)}
	w.evpn = f
	w.start()
	w.manager.find(segmentOnDemand(), claim(segment.SpokeOnDemand(segment.ClaimID("r1", "net1")), "r1"))
	w.awaitStatus("problem VNITaken", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 1 && s.Segments[0].Reason == v1beta1.ReasonVNITaken &&
			strings.Contains(s.Segments[0].Message, "LAN default/lab")
	})
	w.await(t, "no LAN in EVPN", f.has(map[string]macvrf.LAN{}))
}
