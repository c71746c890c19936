// Package node makes one node carry its LANs: LAN objects in; segments for the manager, spokes for kubelet, events and the node's
// LANNode out.
package agent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Manager makes the node have segments; lanmgr.Manager is one.
type Manager interface {
	Set(want []segment.Segment)
	Enqueue(netns string)
	Reports() []lanmgr.Report
	Observed() bool
	Removed(lan segment.LAN, netns string) bool
	Changed() <-chan struct{}
}

// Kernel is what the agent asks of the node; kernel.Node is one.
type Kernel interface {
	Underlays(ctx context.Context) (kernel.Underlays, error)
	Records() ([]segment.Segment, error)
	Watch(ctx context.Context, poke func(netns string)) error
}

// Firewall keeps VXLAN packets of others than a LAN's nodes from its pods; strangers.Filter is one.
type Firewall interface {
	Set(lans []firewall.LAN)
	Err() error
	Changed() <-chan struct{}
}

// EVPN is what the node learns and tells of LANs with discovery evpn; fabric.Fabric is one.
type EVPN interface {
	Run(ctx context.Context) error
	Set(lans map[string]macvrf.LAN)
	SetReflectors(ctx context.Context, at []netip.AddrPort) error
	Fill(s *segment.Segment)
	Problems(netns string) evpn.Problems
	Sessions() []bgp.Session
	Changed() <-chan struct{}
}

// Config is what an agent works with.
type Config struct {
	Node    string // the Node object's name
	Version string // of k8slan, for the LANNode

	// Informers and Client are those of one cache: every LAN, and of Nodes and LANNodes the node's own. Live reads past it.
	Informers cache.Informers
	Client    client.Client
	APIReader client.Reader
	// Peers is a cache of every LANNode, as PeerOf leaves them. It is asked once a LAN's discovery is unicast, or its peers are strict.
	Peers cache.Informers
	VTEPs []netip.Prefix // ranges in which VTEPs are; empty: anywhere

	Kernel   Kernel
	Manager  Manager
	Firewall Firewall
	EVPN     EVPN // what LANs with discovery evpn are joined to; nil: they wait
	// Reflectors is the Service whose pods the fabric is told as reflectors; the zero name: there is none.
	Reflectors types.NamespacedName
	Advertise  func([]Spoke)               // the whole set for kubelet, never blocks
	OnPublish  func(v1beta1.LANNodeStatus) // is shown what the LANNode is to say; nil: nobody is
	Events     events.EventRecorder
	Log        *slog.Logger
}

// Agent is what makes one node carry its LANs.
type Agent struct {
	Config
	publisher     *publisher
	peers         *peers
	inputsChanged chan struct{} // one slot: LANs, the Node or its underlays changed
	hostChanged   chan struct{} // one slot: the node's links, addresses or routes may have changed
	ready         atomic.Bool

	mu        sync.Mutex
	underlays *kernel.Underlays // nil: not known yet

	// Of the main loop alone.
	plans       []Plan // of LAN objects, and then those on demand
	objectCount int    // how many are of LAN objects
	thisNode    Node
	planned     bool
	records     []segment.Segment // of an earlier run; nil once the manager has looked at all that it left
	lans        map[types.UID]*v1beta1.LAN
	sessions    []v1beta1.BGPSession
	advertised  []Spoke
	eventSent   map[types.UID]Problem // what the last event on a LAN said
}

// New returns an agent that does nothing until Run.
func New(c Config) *Agent {
	return &Agent{
		Config:        c,
		publisher:     newPublisher(c.Node, c.Client, c.APIReader, c.Log),
		peers:         newPeers(c.Node),
		inputsChanged: make(chan struct{}, 1),
		hostChanged:   make(chan struct{}, 1),
		eventSent:     make(map[types.UID]Problem),
	}
}

// Ready is nil once the node's LANs are known and each was worked on.
func (a *Agent) Ready() error {
	if !a.ready.Load() {
		return fmt.Errorf("the LANs of node %s are not known or not all worked on yet", a.Node)
	}
	return nil
}

// Run works until ctx ends, and then leaves everything as it is. Nothing is decided before the API server's objects and the
// node's underlays are known; while the API server is away, all stays as it was.
func (a *Agent) Run(ctx context.Context) error {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	tasks.Go(func() { a.watchKernel(ctx) })
	tasks.Go(func() { a.readUnderlays(ctx) })
	if err := a.watchObjects(ctx); err != nil {
		return nil // ctx has ended
	}
	tasks.Go(func() { a.publisher.run(ctx) })
	tasks.Go(func() { a.watchPeers(ctx) })
	var learnt <-chan struct{} // never, without a fabric
	if a.EVPN != nil {
		tasks.Go(func() { a.runEVPN(ctx) })
		learnt = a.EVPN.Changed()
	}
	signal(a.inputsChanged)

	retry := newRetry()
	defer retry.stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.inputsChanged:
		case <-retry.timer.C:
		case <-a.Firewall.Changed():
		case <-a.Manager.Changed():
			if a.planOnDemand() {
				a.setWant()
			}
			a.report()
			continue
		case <-learnt:
			if a.setWant() {
				a.report()
			}
			continue
		}
		if err := a.plan(ctx); err != nil {
			retry.failed(a.Log, "cannot plan this node's LANs, all stays as it is", err)
			continue
		}
		retry.succeeded()
		a.report()
	}
}

// plan decides what the node should have of each LAN, and has the manager make it.
func (a *Agent) plan(ctx context.Context) error {
	a.mu.Lock()
	underlays := a.underlays
	a.mu.Unlock()
	if underlays == nil {
		return nil // readUnderlays signals when they are known
	}
	var self corev1.Node
	if err := a.Client.Get(ctx, client.ObjectKey{Name: a.Node}, &self); err != nil {
		return fmt.Errorf("get Node %s: %w", a.Node, err)
	}
	var lans v1beta1.LANList
	if err := a.Client.List(ctx, &lans); err != nil {
		return fmt.Errorf("list LANs: %w", err)
	}
	a.lans = make(map[types.UID]*v1beta1.LAN, len(lans.Items))
	for i := range lans.Items {
		a.lans[lans.Items[i].UID] = &lans.Items[i]
	}
	if !a.planned {
		if err := a.prepare(ctx, &self); err != nil {
			return err
		}
	}
	a.thisNode = Node{
		Name: a.Node, Labels: self.Labels, Addresses: internalIPs(&self), Underlays: *underlays, VTEPs: a.VTEPs,
		EVPN: a.EVPN != nil,
	}
	if err := a.setReflectors(ctx); err != nil {
		return err
	}
	a.plans, a.planned = planAll(lans.Items, a.thisNode, a.have()), true
	a.objectCount = len(a.plans)
	oneLANPerVNI(a.plans)
	a.planOnDemand()
	a.setWant()
	a.publisher.setOwner(&self)
	return nil
}

// planOnDemand plans the LANs that no object wants, as the manager has found them, and says whether they are others than before.
func (a *Agent) planOnDemand() (changed bool) {
	if !a.planned {
		return false
	}
	now := plansOnDemand(a.plans[:a.objectCount], a.lans, a.Manager.Reports(), a.thisNode)
	if slices.EqualFunc(now, a.plans[a.objectCount:], func(x, y Plan) bool { return x.Segment.Equal(y.Segment) }) {
		return false
	}
	a.plans = append(a.plans[:a.objectCount:a.objectCount], now...)
	oneLANPerVNI(a.plans)
	return true
}

// setWant has the manager make what is planned, with what is known of other nodes, and says whether there is news of the fabric to report:
// a LAN's problem, or a session.
func (a *Agent) setWant() (changed bool) {
	if !a.planned {
		return false
	}
	if a.EVPN != nil {
		before := a.sessions
		a.sessions = sessionsOf(a.EVPN.Sessions())
		changed = !slices.Equal(before, a.sessions)
	}
	unfiltered := a.Firewall.Err()
	segments, asking := make([]segment.Segment, len(a.plans)), make(map[types.UID]bool)
	for i := range a.plans {
		p := &a.plans[i]
		if p.Unicast || p.Strict {
			a.peers.need()
			asking[types.UID(p.Segment.LAN.UID)] = true
		}
		if p.Strict && p.Problem.Reason == "" && unfiltered != nil {
			p.Problem = firewallProblem(unfiltered)
		}
		segments[i] = p.Segment
		switch {
		case p.Unicast:
			segments[i].Remotes = a.peers.remotesFor(types.UID(p.Segment.LAN.UID), p.VTEP)
		case p.EVPN && a.EVPN != nil:
			a.EVPN.Fill(&segments[i])
			changed = p.setEVPNProblem(a.EVPN.Problems(p.Segment.Netns)) || changed
		}
	}
	a.peers.keepOnly(asking)
	a.setFirewall()
	a.Manager.Set(segments)
	return changed
}

// internalIPs are the addresses by which the cluster knows a node, the main one first.
func internalIPs(node *corev1.Node) []netip.Addr {
	var ips []netip.Addr
	for _, a := range node.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP {
			ips = append(ips, ip)
		}
	}
	return ips
}

// setFirewall says who is heard in which LAN.
func (a *Agent) setFirewall() {
	a.Firewall.Set(StrictLANs(a.plans, a.have(), a.peers.membersFor))
}

// prepare is what has to be before the first plan. The LANNode has to exist: the controller takes a Node without one for a node
// that has nothing of any LAN. And what an earlier run had has to be known.
func (a *Agent) prepare(ctx context.Context, self *corev1.Node) error {
	records, err := a.Kernel.Records()
	if err != nil {
		return err
	}
	if err := a.publisher.ensureExists(ctx, self); err != nil {
		return err
	}
	a.records = records
	return nil
}

// have is what the node has, by netns, as far as it is known.
func (a *Agent) have() map[string]segment.Segment {
	if a.Manager.Observed() {
		a.records = nil
	}
	now := make(map[string]segment.Segment)
	for _, r := range a.records {
		now[r.Netns] = r
	}
	for _, r := range a.Manager.Reports() {
		now[r.Segment.Netns] = r.Segment
	}
	return now
}

// planAll plans every LAN. Where two seem to hold one netns, because the news of one is older than that of the other, the
// one created first has it.
func planAll(lans []v1beta1.LAN, node Node, now map[string]segment.Segment) []Plan {
	byAge := slices.Clone(lans)
	slices.SortFunc(byAge, func(x, y v1beta1.LAN) int {
		return cmp.Or(x.CreationTimestamp.Compare(y.CreationTimestamp.Time), cmp.Compare(x.UID, y.UID))
	})
	var plans []Plan
	taken := make(map[string]bool)
	for i := range byAge {
		lan := &byAge[i]
		if lan.Status.Holds == nil {
			continue
		}
		here := now[lan.Status.Holds.NS]
		if here.LAN.UID != string(lan.UID) {
			here = segment.Segment{}
		}
		p, ok := NewPlan(lan, node, here)
		if !ok || taken[p.Segment.Netns] {
			continue
		}
		taken[p.Segment.Netns] = true
		plans = append(plans, p)
	}
	return plans
}

// report tells kubelet, the API server and people what became of the plans.
func (a *Agent) report() {
	if !a.planned {
		return
	}
	a.mu.Lock()
	underlays := *a.underlays
	a.mu.Unlock()
	gone := a.removedLANs()
	reports := a.Manager.Reports()
	a.setFirewall() // what was leaving may be gone
	if a.EVPN != nil {
		a.EVPN.Set(evpnLANs(a.plans, reports))
	}
	if offers := Advertised(a.plans, reports); a.advertised == nil || !slices.Equal(offers, a.advertised) {
		a.advertised = offers
		a.Advertise(offers)
	}
	if a.Manager.Observed() { // before, attachments would seem to be gone
		status := Status(a.plans, reports, underlays, gone, a.Version)
		status.Sessions = a.sessions
		a.publisher.set(status)
		if a.OnPublish != nil {
			a.OnPublish(status)
		}
	}
	a.sendEvents(reports)

	byNetns := reportsByNetns(reports)
	a.ready.Store(!slices.ContainsFunc(a.plans, func(p Plan) bool {
		_, worked := byNetns[p.Segment.Netns]
		return !worked
	}))
}

// removedLANs are the LANs that are being deleted and of which the node has nothing left. Their spokes are no longer offered then: the
// plan without them came before.
func (a *Agent) removedLANs() []v1beta1.GoneLAN {
	var gone []v1beta1.GoneLAN
	for _, lan := range a.lans {
		key := segment.LAN{Namespace: lan.Namespace, Name: lan.Name, UID: string(lan.UID)}
		if !lan.DeletionTimestamp.IsZero() && a.Manager.Removed(key, lan.Effective().NS) {
			gone = append(gone, v1beta1.GoneLAN{LAN: key.String(), UID: lan.UID, Generation: lan.Generation})
		}
	}
	slices.SortFunc(gone, func(x, y v1beta1.GoneLAN) int { return cmp.Compare(x.UID, y.UID) })
	return gone
}

// sendEvents writes an event on each LAN whose segment got a problem or lost it.
func (a *Agent) sendEvents(reports []lanmgr.Report) {
	byNetns := reportsByNetns(reports)
	told := make(map[types.UID]Problem, len(a.eventSent))
	for _, p := range a.plans[:a.objectCount] {
		uid := types.UID(p.Segment.LAN.UID)
		before := a.eventSent[uid]
		now, well := p.Problem, false
		if r, ok := byNetns[p.Segment.Netns]; ok && !r.Leaving && r.Segment.LAN == p.Segment.LAN {
			now = problemOf(p, r)
			well = healthy(p, r) && now.Reason == ""
		}
		switch {
		case now.Reason != "" && now != before:
			a.sendEvent(uid, corev1.EventTypeWarning, now.Reason, now.Message)
		case before.Reason != "" && well:
			a.sendEvent(uid, corev1.EventTypeNormal, "Ready", "all is well again, spokes are offered")
		case before.Reason != "" && now.Reason == "":
			now = before // being built: not well yet
		}
		if now.Reason != "" {
			told[uid] = now
		}
	}
	a.eventSent = told
}

// maxNote is the API's limit for an event's note (NoteLengthLimit in pkg/apis/core/validation/events.go).
const maxNote = 1024

func (a *Agent) sendEvent(uid types.UID, kind, reason, message string) {
	lan := a.lans[uid]
	note := a.Node + ": " + message
	if len(note) > maxNote {
		note = note[:maxNote]
	}
	a.Events.Eventf(lan, nil, kind, reason, "BuildSegment", "%s", note)
	level := slog.LevelInfo
	if kind == corev1.EventTypeWarning {
		level = slog.LevelWarn
	}
	a.Log.Log(context.Background(), level, message, "lan", lan.Namespace+"/"+lan.Name, "reason", reason)
}

// watchKernel passes the kernel's hints on.
func (a *Agent) watchKernel(ctx context.Context) {
	retry := newRetry()
	defer retry.stop()
	for {
		err := a.Kernel.Watch(ctx, func(netns string) {
			if netns == "" {
				signal(a.hostChanged)
			} else {
				a.Manager.Enqueue(netns)
			}
		})
		if ctx.Err() != nil {
			return
		}
		retry.failed(a.Log, "cannot watch the kernel, trying again", err)
		select {
		case <-ctx.Done():
			return
		case <-retry.timer.C:
		}
	}
}

// underlaysInterval is the least time between two looks at the node's underlays: on a busy node its links change all the time.
const underlaysInterval = 50 * time.Millisecond

// readUnderlays reads the node's underlays when they may have changed, and has the LANs planned anew when they have.
func (a *Agent) readUnderlays(ctx context.Context) {
	retry := newRetry()
	defer retry.stop()
	signal(a.hostChanged)
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.hostChanged:
		case <-retry.timer.C:
		}
		began := time.Now()
		underlays, err := a.Kernel.Underlays(ctx)
		if err != nil {
			retry.failed(a.Log, "cannot read the node's links, LANs stay as they are", err)
			continue
		}
		retry.succeeded()
		a.mu.Lock()
		changed := a.underlays == nil || !reflect.DeepEqual(*a.underlays, underlays)
		a.underlays = &underlays
		a.mu.Unlock()
		if changed {
			signal(a.inputsChanged)
		}
		rest := time.NewTimer(max(underlaysInterval, 4*time.Since(began)))
		select {
		case <-ctx.Done():
			rest.Stop()
			return
		case <-rest.C:
		}
	}
}

// signal puts a value into a one-slot channel that may have one already.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
