package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/agent"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// board wakes await when something changed.
type board struct {
	mu      sync.Mutex
	changed chan struct{}
}

func (b *board) changedNow() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *board) await(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		b.mu.Lock()
		changed := b.changed
		b.mu.Unlock()
		if done() {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

// fakeManager builds the segments of Set at once, except those in refuse.
type fakeManager struct {
	*board
	changed chan struct{}

	mu         sync.Mutex
	sets       int
	want       []segment.Segment
	claims     map[string][]segment.Claim // by netns
	refuse     map[string]error           // by netns
	hold       bool                       // reports stay unchanged
	unobserved bool                       // no segment was observed yet
	enqueued   []string
	reports    []lanmgr.Report
}

func (m *fakeManager) Set(want []segment.Segment) {
	m.mu.Lock()
	m.sets++
	m.want = slices.Clone(want)
	m.mu.Unlock()
	m.work()
}

func (m *fakeManager) work() {
	m.mu.Lock()
	if !m.hold {
		old := m.reports
		m.reports = nil
		wanted := map[string]bool{}
		for _, s := range m.want {
			wanted[s.Netns] = true
			err := m.refuse[s.Netns]
			report := lanmgr.Report{Segment: s, Built: err == nil, Err: err, Claims: m.claims[s.Netns]}
			m.reports = append(m.reports, report)
		}
		for _, r := range old {
			if claims := m.claims[r.Segment.Netns]; !wanted[r.Segment.Netns] && len(claims) > 0 {
				m.reports = append(m.reports, lanmgr.Report{Segment: r.Segment, Leaving: true, Claims: claims})
			}
		}
	}
	m.mu.Unlock()
	select {
	case m.changed <- struct{}{}:
	default:
	}
	m.changedNow()
}

// change calls f, and then reports what the manager has.
func (m *fakeManager) change(f func()) {
	m.mu.Lock()
	f()
	m.mu.Unlock()
	m.work()
}

func (m *fakeManager) Enqueue(netns string) {
	m.mu.Lock()
	m.enqueued = append(m.enqueued, netns)
	m.mu.Unlock()
	m.changedNow()
}

func (m *fakeManager) Observed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.unobserved && m.sets > 0 // a manager does nothing before its first Set
}

func (m *fakeManager) Removed(lan segment.LAN, netns string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	isIt := func(r lanmgr.Report) bool { return r.Segment.Netns == netns && r.Segment.LAN == lan }
	return !m.hold && !slices.ContainsFunc(m.reports, isIt)
}

func (m *fakeManager) Changed() <-chan struct{} { return m.changed }

func (m *fakeManager) Reports() []lanmgr.Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.reports)
}

func (m *fakeManager) wanted() (sets int, want []segment.Segment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sets, m.want
}

// fakeKernel has the underlays of worker1.
type fakeKernel struct {
	events chan string

	mu        sync.Mutex
	underlays kernel.Underlays
	records   []segment.Segment
	err       error
}

func (k *fakeKernel) Records() ([]segment.Segment, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.records, nil
}

func (k *fakeKernel) Underlays(context.Context) (kernel.Underlays, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	u := k.underlays
	u.Devices = map[string]kernel.Underlay{}
	for name, d := range k.underlays.Devices {
		u.Devices[name] = d
	}
	return u, k.err
}

func (k *fakeKernel) Watch(ctx context.Context, onEvent func(string)) error {
	onEvent("")
	for {
		select {
		case <-ctx.Done():
			return nil
		case netns := <-k.events:
			onEvent(netns)
		}
	}
}

func (k *fakeKernel) change(f func()) {
	k.mu.Lock()
	f()
	k.mu.Unlock()
	k.events <- ""
}

// fakeInformers watches the fake API.
type fakeInformers struct {
	cache.Informers
	api  client.WithWatch
	done chan struct{}
}

type fakeInformer struct {
	cache.Informer
	watch watch.Interface
	last  map[string]runtime.Object
	done  chan struct{}
}

func (f *fakeInformers) GetInformer(
	ctx context.Context,
	obj client.Object,
	_ ...cache.InformerGetOption,
) (cache.Informer, error) {
	var list client.ObjectList
	switch obj.(type) {
	case *v1beta1.LAN:
		list = &v1beta1.LANList{}
	case *v1beta1.LANNode:
		list = &v1beta1.LANNodeList{}
	case *discoveryv1.EndpointSlice:
		list = &discoveryv1.EndpointSliceList{}
	default:
		list = &corev1.NodeList{}
	}
	w, err := f.api.Watch(ctx, list)
	if err != nil {
		return nil, err
	}
	if err := f.api.List(ctx, list); err != nil {
		return nil, err
	}
	last := map[string]runtime.Object{}
	err = meta.EachListItem(list, func(obj runtime.Object) error {
		key, err := toolscache.MetaNamespaceKeyFunc(obj)
		last[key] = obj
		return err
	})
	return &fakeInformer{watch: w, last: last, done: f.done}, err
}

func (f *fakeInformer) AddEventHandler(
	handler toolscache.ResourceEventHandler,
) (toolscache.ResourceEventHandlerRegistration, error) {
	go func() {
		defer f.watch.Stop()
		for {
			select {
			case <-f.done:
				return
			case e := <-f.watch.ResultChan():
				key, err := toolscache.MetaNamespaceKeyFunc(e.Object)
				if err != nil {
					return // the watch has ended
				}
				switch e.Type {
				case watch.Added:
					handler.OnAdd(e.Object, false)
				case watch.Modified:
					handler.OnUpdate(f.last[key], e.Object)
				case watch.Deleted:
					handler.OnDelete(e.Object)
				}
				f.last[key] = e.Object
			}
		}
	}()
	return synced{}, nil
}

// synced is the registration of a handler whose initial list is empty: these informers report changes only.
type synced struct{}

func (synced) HasSynced() bool                          { return true }
func (synced) HasSyncedChecker() toolscache.DoneChecker { return synced{} }
func (synced) Name() string                             { return "nothing" }

func (synced) Done() <-chan struct{} {
	done := make(chan struct{})
	close(done)
	return done
}

// world is an agent with fakes of everything around it.
type world struct {
	*board
	t        *testing.T
	api      client.WithWatch
	manager  *fakeManager
	kernel   *fakeKernel
	agent    *agent.Agent
	firewall *fakeFirewall
	events   *events.FakeRecorder
	evpn     agent.EVPN // nil: none

	reflectors types.NamespacedName

	mu             sync.Mutex
	away           error // if set, the API server's error for every request
	writes         int   // number of writes of the LANNode's status
	leastAttached  int32 // the fewest attachments in one of these writes
	advertisements [][]agent.Spoke
}

// newWorld returns a world with the Node worker1 and these objects; start starts the agent.
func newWorld(t *testing.T, lans ...client.Object) *world {
	t.Helper()
	scheme := runtime.NewScheme()
	err := errors.Join(corev1.AddToScheme(scheme), discoveryv1.AddToScheme(scheme), v1beta1.AddToScheme(scheme))
	if err != nil {
		t.Fatal(err)
	}
	b := &board{changed: make(chan struct{})}
	here := worker1()
	w := &world{
		board: b,
		t:     t,
		manager: &fakeManager{
			board:   b,
			changed: make(chan struct{}, 1),
			claims:  map[string][]segment.Claim{},
			refuse:  map[string]error{},
		},
		kernel:   &fakeKernel{events: make(chan string), underlays: here.Underlays},
		firewall: &fakeFirewall{board: b, changed: make(chan struct{}, 1)},
		events:   events.NewFakeRecorder(1000),
	}
	self := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: here.Name, Labels: here.Labels, UID: "uid-worker1"}}
	w.api = interceptor.NewClient(
		fake.NewClientBuilder().WithScheme(scheme).WithObjects(append(lans, self)...).
			WithStatusSubresource(&v1beta1.LAN{}, &v1beta1.LANNode{}).Build(),
		interceptor.Funcs{
			Get: func(
				ctx context.Context, c client.WithWatch, key client.ObjectKey, obj client.Object,
				opts ...client.GetOption,
			) error {
				return w.unlessAway(func() error { return c.Get(ctx, key, obj, opts...) })
			},
			Create: func(
				ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.CreateOption,
			) error {
				return w.unlessAway(func() error { return c.Create(ctx, obj, opts...) })
			},
			SubResourceUpdate: func(
				ctx context.Context, c client.Client, sub string, obj client.Object,
				opts ...client.SubResourceUpdateOption,
			) error {
				if lanNode, ours := obj.(*v1beta1.LANNode); ours {
					w.mu.Lock()
					w.writes++
					if w.leastAttached = min(w.leastAttached, lanNode.Status.Attached); w.writes == 1 {
						w.leastAttached = lanNode.Status.Attached
					}
					w.mu.Unlock()
				}
				return w.unlessAway(func() error { return c.SubResource(sub).Update(ctx, obj, opts...) })
			},
		})
	return w
}

func (w *world) unlessAway(call func() error) error {
	defer w.changedNow()
	w.mu.Lock()
	away := w.away
	w.mu.Unlock()
	if away != nil {
		return away
	}
	return call()
}

func (w *world) setAway(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.away = err
}

func (w *world) start() (stop func()) {
	w.t.Helper()
	done := make(chan struct{})
	w.agent = agent.New(agent.Config{
		Node: "worker1", Version: "v1.2.3",
		Informers: &fakeInformers{api: w.api, done: done}, Client: w.api, APIReader: w.api,
		Peers:  &fakeInformers{api: w.api, done: done},
		Kernel: w.kernel, Manager: w.manager, Firewall: w.firewall, Events: w.events,
		EVPN: w.evpn, Reflectors: w.reflectors,
		Advertise: func(spokes []agent.Spoke) {
			w.mu.Lock()
			w.advertisements = append(w.advertisements, spokes)
			w.mu.Unlock()
			w.changedNow()
		},
		Log: slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- w.agent.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			w.t.Errorf("Run: %v", err)
		}
		close(done)
	})
	w.t.Cleanup(stop)
	return stop
}

// advertised returns the spokes that were advertised last, as "srl vm(unhealthy)".
func (w *world) advertised() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.advertisements) == 0 {
		return "none yet"
	}
	var words []string
	for _, s := range w.advertisements[len(w.advertisements)-1] {
		word := s.Name
		if !s.Healthy {
			word += "(unhealthy)"
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

func (w *world) awaitAdvertised(want string) {
	w.t.Helper()
	w.await(w.t, "spokes "+want+" to be advertised", func() bool { return w.advertised() == want })
}

// awaitStatus waits until want accepts the LANNode's status.
func (w *world) awaitStatus(what string, want func(v1beta1.LANNodeStatus) bool) *v1beta1.LANNode {
	w.t.Helper()
	lanNode := &v1beta1.LANNode{}
	w.await(w.t, what, func() bool {
		// read uses a list, because a get through the interceptor would wake this wait.
		if err := w.read(lanNode); err != nil {
			return false
		}
		return want(lanNode.Status)
	})
	return lanNode
}

func (w *world) read(lanNode *v1beta1.LANNode) error {
	var list v1beta1.LANNodeList
	if err := w.api.List(context.Background(), &list); err != nil {
		return err
	}
	if len(list.Items) != 1 {
		return errors.New("no LANNode")
	}
	*lanNode = list.Items[0]
	return nil
}

func (w *world) written() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.writes
}

// update changes the LAN's spec and its status. The fake API needs an update for each.
func (w *world) update(change func(*v1beta1.LAN)) {
	w.t.Helper()
	lan := &v1beta1.LAN{}
	if err := w.api.Get(context.Background(), client.ObjectKey{Namespace: "default", Name: "lab"}, lan); err != nil {
		w.t.Fatal(err)
	}
	change(lan)
	lan.Generation++ // as the API server does
	status := lan.Status
	if err := w.api.Update(context.Background(), lan); err != nil {
		w.t.Fatal(err)
	}
	lan.Status = status
	if err := w.api.Status().Update(context.Background(), lan); err != nil {
		w.t.Fatal(err)
	}
}

func claim(spoke, pod string) segment.Claim {
	return segment.Claim{
		ID: segment.ClaimID(pod, "net1"), Spoke: spoke, Kind: segment.Veth,
		PodNamespace: "default", Pod: pod, Interface: "net1",
		MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Since: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}
}

func ready(s v1beta1.LANNodeStatus) bool {
	return len(s.Segments) == 1 && s.Segments[0].State == v1beta1.SegmentReady
}

func TestAdmittedLANIsBuiltAdvertisedAndReported(t *testing.T) {
	w := newWorld(t, lab(nil))
	w.start()
	w.awaitAdvertised("srl vm")
	lanNode := w.awaitStatus("Ready", ready)

	want := v1beta1.SegmentStatus{
		LAN: "default/lab", UID: "uid-lab", Generation: 3, State: v1beta1.SegmentReady,
		NS: "default.lab", VNI: 222, Port: 4789, Underlay: "eth0", VTEP: "fe80::1", MTU: 1422, Offered: 2,
	}
	if got := lanNode.Status.Segments[0]; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("segment\n%+v, want\n%+v", got, want)
	}
	if s := lanNode.Status; s.LANs != 1 || s.Ready != 1 || s.Attached != 0 || s.Version != "v1.2.3" {
		t.Errorf("status = %+v", s)
	}
	if o := lanNode.OwnerReferences; len(o) != 1 || o[0].Kind != "Node" || o[0].Name != "worker1" ||
		o[0].UID != "uid-worker1" {
		t.Errorf("owners = %+v, want the Node", o)
	}
	if err := w.agent.Ready(); err != nil {
		t.Error(err)
	}
	if len(w.events.Events) != 0 {
		t.Errorf("event for a LAN without a problem: %s", <-w.events.Events)
	}
}

func TestNodeWithoutLANsReportsItself(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.awaitAdvertised("")
	w.awaitStatus("a version", func(s v1beta1.LANNodeStatus) bool {
		return s.Version == "v1.2.3" && len(s.Segments) == 0
	})
}

func TestNothingIsPlannedBeforeTheNodesLinksAreKnown(t *testing.T) {
	w := newWorld(t, lab(nil))
	w.kernel.err = errors.New("netlink is busy")
	w.start()
	w.kernel.events <- "" // the watch runs; the first observation fails
	if sets, _ := w.manager.wanted(); sets != 0 || w.advertised() != "none yet" || w.agent.Ready() == nil {
		t.Errorf("%d sets, %q advertised, Ready %v; want nothing yet", sets, w.advertised(), w.agent.Ready())
	}
	w.kernel.change(func() { w.kernel.err = nil })
	w.awaitAdvertised("srl vm")
}

func TestMissingUnderlayMakesSpokesUnhealthyAndSendsOneEvent(t *testing.T) {
	w := newWorld(t, lab(func(l *v1beta1.LAN) { l.Spec.VXLANDevMap = map[string]v1beta1.Device{"worker1": "eth7"} }))
	w.start()
	w.awaitAdvertised("srl(unhealthy) vm(unhealthy)")
	const sentence = `no device "eth7" (spec.vxlanDevMap.worker1). ` +
		`Create it, or change spec.vxlanDevMap.worker1; pods wait until then`
	w.awaitStatus("UnderlayMissing", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 1 && s.Segments[0].State == v1beta1.SegmentNotReady && s.Segments[0].Offered == 0 &&
			s.Segments[0].Reason == v1beta1.ReasonUnderlayMissing && s.Segments[0].Message == sentence
	})
	if got, want := <-w.events.Events, "Warning UnderlayMissing worker1: "+sentence; got != want {
		t.Errorf("event %q, want %q", got, want)
	}

	w.kernel.change(func() { w.kernel.underlays.Devices["eth7"] = device(7, 1500) })
	w.awaitAdvertised("srl vm")
	w.awaitStatus("Ready", ready)
	if got := <-w.events.Events; got != "Normal Ready worker1: the segment is ready, its spokes are advertised" {
		t.Errorf("event %q", got)
	}
	if len(w.events.Events) != 0 {
		t.Errorf("an unexpected event: %s", <-w.events.Events)
	}
}

func TestUnderlayWithoutCarrierDegradesTheLANAndKeepsSpokesHealthy(t *testing.T) {
	w := newWorld(t, lab(nil))
	w.start()
	w.awaitAdvertised("srl vm")
	w.kernel.change(func() {
		d := device(2, 1500)
		d.Carrier = false
		w.kernel.underlays.Devices["eth0"] = d
	})
	w.awaitStatus("Degraded", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 1 && s.Segments[0].State == v1beta1.SegmentDegraded &&
			s.Segments[0].Reason == v1beta1.ReasonUnderlayDown && s.Segments[0].Offered == 2
	})
	w.awaitAdvertised("srl vm")
}

// An underlay that is back does not have the VXLAN yet.
func TestSpokesAreHealthyOnlyOnceTheVXLANIsBuilt(t *testing.T) {
	w := newWorld(t, lab(func(l *v1beta1.LAN) { l.Spec.DefaultVXLANDev = "eth7" }))
	w.start()
	w.awaitAdvertised("srl(unhealthy) vm(unhealthy)")
	w.manager.change(func() { w.manager.hold = true })
	w.kernel.change(func() { w.kernel.underlays.Devices["eth7"] = device(7, 1500) })
	w.await(t, "a segment with its VXLAN", func() bool {
		_, want := w.manager.wanted()
		return len(want) == 1 && want[0].VXLAN.UnderlayIndex == 7
	})
	w.awaitStatus("being built", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 1 && s.Segments[0].Message == "is being built" && s.Segments[0].Reason == ""
	})
	if got := w.advertised(); got != "srl(unhealthy) vm(unhealthy)" {
		t.Errorf("%q advertised before the VXLAN is built", got)
	}
	w.manager.change(func() { w.manager.hold = false })
	w.awaitAdvertised("srl vm")
}

func TestErrorsOfTheKernelAreReported(t *testing.T) {
	for _, c := range []struct {
		err             error
		reason, message string
	}{
		{
			fmt.Errorf("add vxlan: %w", &kernel.VNITaken{VNI: 222, Port: 4789, By: "flannel.1"}),
			v1beta1.ReasonVNITaken,
			`vxlan vx222: VNI 222 on UDP port 4789 is in use by "flannel.1" on this node; ` +
				`choose another vni or vxlanPort; pods wait until then`,
		},
		{
			errors.New("add bridge br222: operation not permitted"), v1beta1.ReasonBuildFailed,
			"add bridge br222: operation not permitted. It is tried again; pods wait until it succeeds",
		},
	} {
		w := newWorld(t, lab(nil))
		w.manager.refuse["default.lab"] = c.err
		stop := w.start()
		w.awaitAdvertised("srl(unhealthy) vm(unhealthy)")
		w.awaitStatus(c.reason, func(s v1beta1.LANNodeStatus) bool {
			return len(s.Segments) == 1 && s.Segments[0].Reason == c.reason && s.Segments[0].Message == c.message
		})
		if got := <-w.events.Events; got != "Warning "+c.reason+" worker1: "+c.message {
			t.Errorf("event %q", got)
		}
		stop()
	}
}

func TestSpokesFollowTheSpec(t *testing.T) {
	w := newWorld(t, lab(nil))
	w.start()
	w.awaitAdvertised("srl vm")
	w.update(func(l *v1beta1.LAN) { l.Spec.Spokes = []string{"srl", "ceos"} })
	w.awaitAdvertised("srl") // ceos is not held yet
	w.update(func(l *v1beta1.LAN) { l.Status.Holds.Spokes = []string{"srl", "ceos"} })
	w.awaitAdvertised("ceos srl")
}

func TestNodeLabelsDecideWhetherTheNodeHasALAN(t *testing.T) {
	w := newWorld(t, lab(func(l *v1beta1.LAN) { l.Spec.NodeSelector = map[string]v1beta1.LabelValue{"rack": "b"} }))
	w.start()
	w.awaitAdvertised("")
	self := &corev1.Node{}
	if err := w.api.Get(context.Background(), client.ObjectKey{Name: "worker1"}, self); err != nil {
		t.Fatal(err)
	}
	self.Labels["rack"] = "b"
	if err := w.api.Update(context.Background(), self); err != nil {
		t.Fatal(err)
	}
	w.awaitAdvertised("srl vm")
}

func TestDeletedLANLeavesWithItsLastPod(t *testing.T) {
	lan := lab(nil)
	w := newWorld(t, lan)
	w.manager.claims["default.lab"] = []segment.Claim{claim("srl", "srl-1")}
	w.start()
	w.awaitStatus("attached", func(s v1beta1.LANNodeStatus) bool { return s.Attached == 1 })
	if err := w.api.Delete(context.Background(), lan); err != nil {
		t.Fatal(err)
	}
	w.awaitAdvertised("")
	w.awaitStatus("Leaving", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 1 && s.Segments[0].State == v1beta1.SegmentLeaving &&
			s.Segments[0].UID == "uid-lab" &&
			s.Segments[0].Message == "stays until its pods are gone: default/srl-1 (spoke srl)" &&
			len(s.Segments[0].Attachments) == 1
	})
	w.manager.change(func() { w.manager.claims, w.manager.reports = nil, nil })
	w.awaitStatus("the segment to be removed", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 0 && s.Attached == 0
	})
}

// The controller's finalizer keeps the LAN object until every node has acknowledged the deletion.
func TestDeletedLANIsAcknowledgedOnceNothingOfItIsLeft(t *testing.T) {
	keep := func(name string) func(*v1beta1.LAN) {
		return func(l *v1beta1.LAN) {
			l.Name, l.UID, l.Finalizers = name, types.UID("uid-"+name), []string{v1beta1.Finalizer}
		}
	}
	lan, never := lab(keep("lab")), lab(keep("never"))
	never.Status.Holds = nil
	w := newWorld(t, lan, never)
	w.manager.claims["default.lab"] = []segment.Claim{claim("srl", "srl-1")}
	w.start()
	w.awaitStatus("attached", func(s v1beta1.LANNodeStatus) bool { return s.Attached == 1 && s.Gone == nil })
	for _, l := range []*v1beta1.LAN{lan, never} {
		if err := w.api.Delete(context.Background(), l); err != nil {
			t.Fatal(err)
		}
	}
	gone := func(names ...string) func(v1beta1.LANNodeStatus) bool {
		return func(s v1beta1.LANNodeStatus) bool {
			return slices.EqualFunc(s.Gone, names, func(g v1beta1.GoneLAN, name string) bool {
				return g.LAN == "default/"+name && g.UID == types.UID("uid-"+name) && g.Generation > 0
			})
		}
	}
	w.awaitStatus("acknowledgement of the LAN that was never built", gone("never"))
	w.awaitStatus("the other LAN to be leaving", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 1 && s.Segments[0].State == v1beta1.SegmentLeaving && s.Attached == 1 &&
			gone("never")(s)
	})
	if got := w.advertised(); got != "" {
		t.Errorf("%q advertised, of a LAN that is being deleted", got)
	}
	w.manager.change(func() { w.manager.claims, w.manager.reports = nil, nil })
	w.awaitStatus("acknowledgement of both LANs", gone("lab", "never"))

	if err := w.api.Get(context.Background(), client.ObjectKeyFromObject(lan), lan); err != nil {
		t.Fatal(err)
	}
	lan.Finalizers = nil
	if err := w.api.Update(context.Background(), lan); err != nil {
		t.Fatal(err)
	}
	w.awaitStatus("the deleted object to leave the status", gone("never"))
}

// After a restart, no attachment may be missing in the LANNode while the daemon still observes.
func TestNothingIsPublishedBeforeEverySegmentIsObserved(t *testing.T) {
	w := newWorld(t, lab(nil))
	w.manager.claims["default.lab"] = []segment.Claim{claim("srl", "srl-1")}
	stop := w.start()
	w.awaitStatus("attached", func(s v1beta1.LANNodeStatus) bool { return s.Attached == 1 })
	stop()

	w.manager.change(func() {
		w.manager.want, w.manager.reports, w.manager.unobserved, w.manager.hold = nil, nil, true, true
	})
	sets, _ := w.manager.wanted()
	writes := w.written()
	w.start()
	w.await(t, "the first Set", func() bool { now, _ := w.manager.wanted(); return now > sets })
	<-time.After(400 * time.Millisecond) // twice the interval between writes
	w.manager.change(func() { w.manager.unobserved, w.manager.hold = false, false })
	w.awaitAdvertised("srl vm")
	w.update(func(l *v1beta1.LAN) { l.Spec.Spokes = []string{"srl", "vm", "more"} })
	w.awaitStatus("the new generation", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 1 && s.Segments[0].Generation == 4
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.leastAttached != 1 || w.writes != writes+1 {
		t.Errorf("%d writes, one of them with %d attachments; want 1 write, and 1 attachment in each",
			w.writes-writes, w.leastAttached)
	}
}

// The controller removes a LAN without the acknowledgement of a Node that has no LANNode.
func TestLANNodeExistsBeforeAnySegment(t *testing.T) {
	w := newWorld(t, lab(nil))
	w.setAway(apierrors.NewServiceUnavailable("away"))
	w.start()
	w.kernel.events <- "default.lab" // the agent runs
	if sets, _ := w.manager.wanted(); sets != 0 {
		t.Errorf("%d sets, though the LANNode could not be created", sets)
	}
	w.setAway(nil)
	w.awaitAdvertised("srl vm")
	w.awaitStatus("Ready", ready)
}

// A daemon that starts while spec.mtu is wrong, or while the underlay is missing, reads from the record with which MTU
// pods are attached.
func TestLANKeepsItsMTUThroughARestart(t *testing.T) {
	jumbo := func(l *v1beta1.LAN) { l.Spec.DefaultVXLANDev = "jumbo" }
	plan, _ := agent.NewPlan(lab(jumbo), worker1(), segment.Segment{})
	for name, test := range map[string]struct {
		lan  func(*v1beta1.LAN)
		away bool
	}{
		"spec.mtu too large": {lan: func(l *v1beta1.LAN) { jumbo(l); l.Spec.MTU = 9500 }},
		"underlay missing":   {lan: jumbo, away: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, lab(test.lan))
			w.kernel.records = []segment.Segment{plan.Segment}
			if test.away {
				delete(w.kernel.underlays.Devices, "jumbo")
			}
			w.start()
			w.awaitAdvertised("srl(unhealthy) vm(unhealthy)")
			_, want := w.manager.wanted()
			if have := want[0]; have.MTU != 8922 || (have.VXLAN == plan.Segment.VXLAN) == test.away {
				t.Errorf("the manager got %+v, the record has %+v", have, plan.Segment)
			}
		})
	}
}

func TestRecreatedLANWaitsForItsPredecessor(t *testing.T) {
	w := newWorld(t, lab(nil))
	w.manager.hold = true
	old := segment.Segment{
		LAN:    segment.LAN{Namespace: "default", Name: "lab", UID: "uid-old"},
		Netns:  "default.lab",
		Spokes: []string{"srl", "vm"},
	}
	w.manager.reports = []lanmgr.Report{{Segment: old, Leaving: true, Claims: []segment.Claim{claim("srl", "srl-1")}}}
	w.start()
	w.awaitStatus("the old LAN to be leaving", func(s v1beta1.LANNodeStatus) bool {
		return len(s.Segments) == 1 && s.Segments[0].UID == "uid-old" && s.Segments[0].State == v1beta1.SegmentLeaving
	})
	if got := w.advertised(); got != "" {
		t.Errorf("%q advertised while the node has the old LAN", got)
	}
	w.manager.change(func() { w.manager.hold = false })
	w.awaitAdvertised("srl vm")
}

func TestBurstOfAttachmentsTakesFewWrites(t *testing.T) {
	const pods = 64
	w := newWorld(t, lab(func(l *v1beta1.LAN) {
		l.Spec.Spokes = nil
		for n := range pods {
			l.Spec.Spokes = append(l.Spec.Spokes, fmt.Sprint("s", n))
		}
		l.Status.Holds.Spokes = l.Spec.Spokes
	}))
	w.start()
	w.awaitStatus("Ready", ready)
	before := w.written()
	for n := range pods {
		w.manager.change(func() {
			claims := slices.Clone(w.manager.claims["default.lab"])
			w.manager.claims["default.lab"] = append(claims, claim(fmt.Sprint("s", n), fmt.Sprint("pod-", n)))
		})
	}
	w.awaitStatus("all attached", func(s v1beta1.LANNodeStatus) bool { return s.Attached == pods })
	// On a busy machine the burst may last longer than the interval between writes.
	if writes := w.written() - before; writes > 4 {
		t.Errorf("%d attachments took %d writes", pods, writes)
	}
	w.manager.change(func() {}) // a report without a change
	w.kernel.events <- "default.lab"
	w.await(t, "the event", func() bool {
		w.manager.mu.Lock()
		defer w.manager.mu.Unlock()
		return len(w.manager.enqueued) > 0
	})
	if writes := w.written() - before; writes > 4 {
		t.Errorf("%d writes without a change", writes)
	}
}

func TestNothingChangesWhileTheAPIServerIsAway(t *testing.T) {
	w := newWorld(t, lab(nil))
	w.start()
	w.awaitAdvertised("srl vm")
	w.awaitStatus("Ready", ready)
	w.setAway(apierrors.NewServiceUnavailable("away"))
	sets, _ := w.manager.wanted()
	writes := w.written()

	w.manager.change(func() { w.manager.claims["default.lab"] = []segment.Claim{claim("srl", "srl-1")} })
	w.kernel.change(func() { w.kernel.underlays.Devices["eth9"] = device(9, 1500) }) // a reason to plan again
	w.await(t, "a failed write", func() bool { return w.written() > writes+1 })
	if now, _ := w.manager.wanted(); now != sets || w.advertised() != "srl vm" {
		t.Errorf("%d more sets, %q advertised; want no change", now-sets, w.advertised())
	}
	w.setAway(nil)
	w.awaitStatus("attached", func(s v1beta1.LANNodeStatus) bool { return s.Attached == 1 })
}

func TestDeletedOrEditedLANNodeIsWrittenAgain(t *testing.T) {
	w := newWorld(t, lab(nil))
	w.start()
	lanNode := w.awaitStatus("Ready", ready)
	if err := w.api.Delete(context.Background(), lanNode); err != nil {
		t.Fatal(err)
	}
	lanNode = w.awaitStatus("Ready again", ready)
	lanNode.Status.Segments = nil
	if err := w.api.Status().Update(context.Background(), lanNode); err != nil {
		t.Fatal(err)
	}
	w.awaitStatus("Ready once more", ready)
}

func TestLANNodeOfAnEarlierNodeGetsTheNewOwner(t *testing.T) {
	old := &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: "worker1", OwnerReferences: []metav1.OwnerReference{
		{APIVersion: "v1", Kind: "Node", Name: "worker1", UID: "uid-before"},
	}}}
	w := newWorld(t, lab(nil), old)
	w.start()
	lanNode := w.awaitStatus("Ready", ready)
	if o := lanNode.OwnerReferences; len(o) != 1 || o[0].UID != "uid-worker1" {
		t.Errorf("owners = %+v", o)
	}
}

func TestOlderOfTwoLANsWithOneNetnsIsPlanned(t *testing.T) {
	later := lab(func(l *v1beta1.LAN) {
		l.Name, l.UID = "later", "uid-later"
		l.CreationTimestamp = metav1.NewTime(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
		l.Spec.Spokes, l.Status.Holds.Spokes = []string{"other"}, []string{"other"}
	})
	w := newWorld(t, lab(nil), later)
	w.start()
	w.awaitAdvertised("srl vm")
	if _, want := w.manager.wanted(); len(want) != 1 || want[0].LAN.Name != "lab" {
		t.Errorf("want %+v", want)
	}
}

// The API server accepts objects up to 1.5 MiB (etcd's request limit).
func TestLANNodeOfAThousandAttachmentsIsSmall(t *testing.T) {
	var plans []agent.Plan
	var reports []lanmgr.Report
	for n := range 500 {
		s := segment.Segment{
			LAN: segment.LAN{
				Namespace: "a-namespace-of-usual-length",
				Name:      fmt.Sprint("lan-", n),
				UID:       "5f6c0a4e-8f0e-4d34-9b5c-0c4c2b0f1d2e",
			},
			Netns: fmt.Sprint("netns-", n), MTU: 1422, Spokes: []string{fmt.Sprint("a", n), fmt.Sprint("b", n)},
			VXLAN: segment.VXLAN{
				Name: "vx", VNI: uint32(n), Underlay: "eth0", UnderlayIndex: 2, Group: netip.MustParseAddr("ff02::14"),
			},
		}
		plans = append(plans, agent.Plan{Segment: s, VTEP: netip.MustParseAddr("fe80::5054:ff:fe12:3456")})
		reports = append(reports, lanmgr.Report{Segment: s, Built: true, Claims: []segment.Claim{
			claim(s.Spokes[0], "a-deployment-of-routers-6d4cf56db6-x2v8j"),
			claim(s.Spokes[1], "a-deployment-of-routers-6d4cf56db6-k7w2p"),
		}})
	}
	status := agent.Status(plans, reports, kernel.Underlays{}, nil, "v1.0.0")
	size, err := json.Marshal(status)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes for 500 LANs and 1,000 attachments", len(size))
	if status.Attached != 1000 || status.Ready != 500 || len(size) > 700_000 {
		t.Errorf("%d attached, %d ready, %d bytes", status.Attached, status.Ready, len(size))
	}
}
