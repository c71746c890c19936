package agent_test

import (
	"context"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// fakeEVPN has the same routes for every LAN.
type fakeEVPN struct {
	*board
	changed chan struct{}

	mu         sync.Mutex
	lans       map[string]macvrf.LAN
	fill       segment.Segment
	problems   evpn.Problems
	peers      []bgp.Session
	reflectors []netip.AddrPort
}

func (f *fakeEVPN) Sessions() []bgp.Session {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.peers
}

func (f *fakeEVPN) SetReflectors(_ context.Context, at []netip.AddrPort) error {
	defer f.changedNow()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reflectors = at
	return nil
}

// hasReflectors returns a function that reports whether these are the reflectors.
func (f *fakeEVPN) hasReflectors(want ...string) func() bool {
	return func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		have := []string{}
		for _, a := range f.reflectors {
			have = append(have, a.String())
		}
		return slices.Equal(have, want)
	}
}

func (f *fakeEVPN) Problems(string) evpn.Problems {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.problems
}

// change calls change and reports the change to the agent.
func (f *fakeEVPN) change(change func()) {
	f.mu.Lock()
	change()
	f.mu.Unlock()
	f.changed <- struct{}{}
}

func (f *fakeEVPN) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

func (f *fakeEVPN) Set(lans map[string]macvrf.LAN) {
	defer f.changedNow()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lans = lans
}

func (f *fakeEVPN) has(want map[string]macvrf.LAN) func() bool {
	return func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return reflect.DeepEqual(f.lans, want)
	}
}

func (f *fakeEVPN) Fill(s *segment.Segment) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s.Remotes, s.FDB, s.Partial = f.fill.Remotes, f.fill.FDB, f.fill.Partial
}

func (f *fakeEVPN) Changed() <-chan struct{} { return f.changed }

// localVTEP is the address of the underlay in newEVPNWorld, remoteVTEP that of another router.
var localVTEP, remoteVTEP = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")

// newEVPNWorld returns a world with EVPN and these LANs, whose underlay has localVTEP.
func newEVPNWorld(t *testing.T, lans ...client.Object) (*world, *fakeEVPN) {
	w := newWorld(t, lans...)
	device := w.kernel.underlays.Devices["eth0"]
	device.Addresses = []netip.Addr{localVTEP}
	w.kernel.underlays.Devices["eth0"] = device
	f := &fakeEVPN{board: w.board, changed: make(chan struct{}, 1)}
	w.evpn = f
	return w, f
}

// evpnLAN returns a LAN with discovery evpn, and what EVPN gets of it.
func evpnLAN() (*v1beta1.LAN, macvrf.LAN) {
	object := lab(func(l *v1beta1.LAN) {
		l.Spec.Discovery = v1beta1.EVPN
		l.Spec.EVPN = &v1beta1.EVPNOptions{
			ImportTargets: []v1beta1.RouteTarget{"64512:7"},
			ExportTargets: []v1beta1.RouteTarget{"65000:8", "65000:222"},
			RD:            7,
		}
	})
	return object, macvrf.LAN{
		VNI: 222, VTEP: localVTEP, RD: 7,
		Import: []macvrf.Target{macvrf.NewTarget(64512, 7)},
		Export: []macvrf.Target{macvrf.NewTarget(65000, 222), macvrf.NewTarget(65000, 8)},
	}
}

// A LAN with discovery evpn is joined to EVPN with the MACs of its pods, and imported routes are part of its segment.
func TestEVPNLANIsJoinedToEVPN(t *testing.T) {
	object, lan := evpnLAN()
	w, f := newEVPNWorld(t, object)
	w.start()
	w.await(t, "the LAN to be joined", f.has(map[string]macvrf.LAN{"default.lab": lan}))

	vm := claim("vm", "vm-1")
	vm.Kind = segment.Macvtap
	w.manager.change(func() { w.manager.claims["default.lab"] = []segment.Claim{claim("srl", "pod-1"), vm} })
	lan.Claimed, lan.Attached = true, []macvrf.MAC{macvrf.MAC(claim("srl", "pod-1").MAC)}
	what := "the MAC of the pod to be advertised, and not that of the VM"
	w.await(t, what, f.has(map[string]macvrf.LAN{"default.lab": lan}))

	f.change(func() {
		f.fill = segment.Segment{
			Remotes: []netip.Addr{remoteVTEP},
			FDB:     []segment.FDBEntry{{MAC: [6]byte{2}, VTEP: remoteVTEP}},
			Partial: true,
		}
	})
	w.await(t, "imported routes in the segment", func() bool {
		_, want := w.manager.wanted()
		return len(want) == 1 && want[0].VXLAN.NoLearning && len(want[0].Remotes) == 1 && len(want[0].FDB) == 1 &&
			want[0].Partial
	})

	w.update(func(l *v1beta1.LAN) { l.Spec.NodeSelector = map[string]v1beta1.LabelValue{"role": "other"} })
	w.awaitStatus("the LAN to be leaving", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 1 && s.Segments[0].State == v1beta1.SegmentLeaving
	})
	if !f.has(map[string]macvrf.LAN{"default.lab": lan})() {
		t.Error("the MAC of an attached pod is no longer advertised")
	}
	w.update(func(l *v1beta1.LAN) { l.Spec.NodeSelector = nil })
	w.awaitStatus("the LAN to be ready again", ready)

	w.update(func(l *v1beta1.LAN) { l.Spec.EVPN.ImportTargets = nil; l.Spec.EVPN.RD = 0 })
	lan.Import, lan.RD = nil, 0
	w.await(t, "other targets", f.has(map[string]macvrf.LAN{"default.lab": lan}))

	w.update(func(l *v1beta1.LAN) { l.Spec.Discovery = v1beta1.Multicast })
	w.await(t, "the LAN to leave EVPN", func() bool {
		_, want := w.manager.wanted()
		return f.has(map[string]macvrf.LAN{})() && len(want) == 1 && !want[0].VXLAN.NoLearning && want[0].FDB == nil
	})
}

func TestProblemsOfEVPNDegradeTheLAN(t *testing.T) {
	object, _ := evpnLAN()
	w, f := newEVPNWorld(t, object)
	w.start()
	w.awaitStatus("the LAN to be ready", ready)
	peer := bgp.Peer{Address: remoteVTEP, AS: 65000}
	refusal := macvrf.Refusal{
		Route:  macvrf.Route{Key: macvrf.Key{Type: macvrf.Multicast}, VTEP: remoteVTEP},
		Reason: macvrf.OtherVNI,
	}
	for _, c := range []struct {
		name            string
		problems        evpn.Problems
		reason, message string
	}{
		{
			"a session that is down",
			evpn.Problems{Down: []bgp.Session{{Peer: peer, Why: "no TCP connection"}}},
			v1beta1.ReasonBGPDown, "192.0.2.2:179 of AS 65000 (no TCP connection)",
		},
		{"no peers", evpn.Problems{NoPeers: true}, v1beta1.ReasonBGPDown, "evpn.reflectors.replicas"},
		{
			"MACs on two nodes",
			evpn.Problems{Duplicates: []macvrf.MAC{{2, 1}, {2, 2}}},
			v1beta1.ReasonMACTwice, "02:01:00:00:00:00 speaks on this node and on another, and 1 other MAC",
		},
		{
			"a refused route",
			evpn.Problems{Refused: refusal, Refusals: 1},
			v1beta1.ReasonRoutesRefused, "from VTEP 192.0.2.2 is not used: its VNI is not that of the LAN",
		},
		{
			"several refused routes",
			evpn.Problems{Refused: refusal, Refusals: 2},
			v1beta1.ReasonRoutesRefused, "its VNI is not that of the LAN; other routes are refused, too",
		},
		{
			"a peer that gets no routes",
			evpn.Problems{Withheld: []bgp.Peer{peer}},
			v1beta1.ReasonRoutesWithheld, "192.0.2.2:179 of AS 65000: no route of the LAN is advertised",
		},
	} {
		f.change(func() { f.problems = c.problems })
		w.awaitStatus(c.name, func(s v1beta1.LANNodeStatus) bool {
			return len(s.Segments) == 1 && s.Segments[0].State == v1beta1.SegmentDegraded &&
				s.Segments[0].Reason == c.reason && strings.Contains(s.Segments[0].Message, c.message) &&
				s.Segments[0].Offered == 2
		})
	}
	f.change(func() { f.problems = evpn.Problems{} })
	w.awaitStatus("the LAN to be ready again", ready)
}

// One session of several that is down is no LAN's problem, but it is in the status.
func TestBGPSessionsAreInTheStatus(t *testing.T) {
	object, _ := evpnLAN()
	w, f := newEVPNWorld(t, object)
	w.start()
	since := time.Date(2026, 11, 21, 12, 0, 0, 500, time.UTC)
	session := func(at string, up bool, why string) bgp.Session {
		peer := bgp.Peer{Address: netip.MustParseAddr(at), AS: 65000, Password: "secret"}
		return bgp.Session{Peer: peer, Up: up, Since: since, Why: why}
	}
	f.change(func() {
		f.peers = []bgp.Session{session("192.0.2.8", true, ""), session("2001:db8::9", false, "no TCP connection")}
	})
	w.awaitStatus("the sessions in the status", func(s v1beta1.LANNodeStatus) bool {
		at := metav1.NewTime(since.Truncate(time.Second))
		return ready(s) && equality.Semantic.DeepEqual(s.Sessions, []v1beta1.BGPSession{
			{Peer: "192.0.2.8:179", AS: 65000, State: v1beta1.SessionUp, Since: at},
			{Peer: "[2001:db8::9]:179", AS: 65000, State: v1beta1.SessionDown, Since: at, Message: "no TCP connection"},
		})
	})
}

// The agent uses every pod of the Service as a reflector, ready or not, and no pod of another Service.
func TestReflectorsAreThePodsOfTheirService(t *testing.T) {
	slice := func(namespace, service, name string, port int32, addresses ...string) *discoveryv1.EndpointSlice {
		s := &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: namespace,
				Name:      name,
				Labels:    map[string]string{discoveryv1.LabelServiceName: service},
			},
			AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Port: &port}},
		}
		for i, a := range addresses {
			ready := i > 0
			conditions := discoveryv1.EndpointConditions{Ready: &ready}
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}, Conditions: conditions})
		}
		return s
	}
	w := newWorld(t,
		slice("k8slan-system", "reflectors", "one", 1790, "10.244.2.5", "10.244.1.7"),
		slice("k8slan-system", "others", "two", 1790, "10.244.1.8"),
		slice("default", "reflectors", "three", 1790, "10.244.1.9"))
	f := &fakeEVPN{board: w.board, changed: make(chan struct{}, 1)}
	w.evpn, w.reflectors = f, types.NamespacedName{Namespace: "k8slan-system", Name: "reflectors"}
	stop := w.start()
	defer stop()
	w.await(t, "two reflectors", f.hasReflectors("10.244.1.7:1790", "10.244.2.5:1790"))

	moved := &discoveryv1.EndpointSlice{}
	if err := w.api.Get(t.Context(), types.NamespacedName{Namespace: "k8slan-system", Name: "one"}, moved); err != nil {
		t.Fatal(err)
	}
	moved.Endpoints[1].Addresses[0] = "10.244.2.9"
	if err := w.api.Update(t.Context(), moved); err != nil {
		t.Fatal(err)
	}
	w.await(t, "the reflector that has moved", f.hasReflectors("10.244.2.5:1790", "10.244.2.9:1790"))
	if err := w.api.Delete(t.Context(), moved); err != nil {
		t.Fatal(err)
	}
	w.await(t, "no reflectors", f.hasReflectors())
}

// EVPN routes carry no port, so only the older of two LANs with one VNI is joined.
func TestTwoEVPNLANsWithOneVNIAreNotMixed(t *testing.T) {
	older := lab(func(l *v1beta1.LAN) { l.Spec.Discovery = v1beta1.EVPN })
	younger := lab(func(l *v1beta1.LAN) {
		l.Spec.Discovery, l.Name, l.UID = v1beta1.EVPN, "other", "uid-other"
		l.CreationTimestamp.Time = older.CreationTimestamp.Add(time.Hour)
		l.Status.Holds.NS, l.Status.Holds.Port, l.Status.Holds.Spokes = "default.other", 4790, nil
	})
	w, f := newEVPNWorld(t, older, younger)
	w.start()
	w.await(t, "the older LAN to be joined", f.has(map[string]macvrf.LAN{"default.lab": {VNI: 222, VTEP: localVTEP}}))
	w.awaitStatus("the problem of the other", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 2 && s.Segments[0].State == v1beta1.SegmentReady &&
			s.Segments[1].Reason == v1beta1.ReasonVNITaken &&
			strings.Contains(s.Segments[1].Message, "default/lab")
	})
}
