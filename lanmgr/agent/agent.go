// Package agent reconciles one node with the LAN objects: it plans the node's segments and hands them to the manager,
// advertises spokes to kubelet, and reports in events and in the node's LANNode.
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

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
	"github.com/k8slan/k8slan/lanmgr/notify"
	"github.com/k8slan/k8slan/lanmgr/retry"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Manager reconciles the node's segments. lanmgr.Manager implements it.
type Manager interface {
	Set(want []segment.Segment)
	Enqueue(netns string)
	Reports() []lanmgr.Report
	Observed() bool
	Removed(lan segment.LAN, netns string) bool
	Changed() <-chan struct{}
}

// Kernel reads what the agent needs to know of the node. kernel.Node implements it.
type Kernel interface {
	Underlays(ctx context.Context) (kernel.Underlays, error)
	Records() ([]segment.Segment, error)
	Watch(ctx context.Context, onEvent func(netns string)) error
}

// Firewall drops VXLAN packets that do not come from a member of their LAN. firewall.Filter implements it.
type Firewall interface {
	Set(lans []firewall.LAN)
	Err() error
	Changed() <-chan struct{}
}

// EVPN exchanges routes of LANs with discovery evpn. evpn.Instance implements it.
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
	Node    string // name of the Node object
	Version string // of k8slan, for the LANNode

	// Informers and Client use one cache. It holds every LAN, this node's Node and this node's LANNode.
	Informers cache.Informers
	Client    client.Client
	// APIReader reads from the API server, not from the cache.
	APIReader client.Reader
	// Peers is a cache of every LANNode, transformed by StripPeer. The agent starts to use it when a LAN needs it: its
	// discovery is unicast, or its peers are strict.
	Peers cache.Informers
	VTEPs []netip.Prefix // ranges of VTEPs, the preferred ones first; empty: any address

	Kernel   Kernel
	Manager  Manager
	Firewall Firewall
	EVPN     EVPN // nil: LANs with discovery evpn wait
	// Reflectors is the Service whose pods are the route reflectors. The zero name: there is none.
	Reflectors types.NamespacedName
	Advertise  func([]Spoke)               // receives all spokes for kubelet; it must not block
	OnPublish  func(v1beta1.LANNodeStatus) // receives each status for the LANNode; may be nil
	Events     events.EventRecorder
	Log        *slog.Logger
}

// Agent reconciles one node with the LAN objects.
type Agent struct {
	Config
	publisher     *publisher
	peers         *peers
	inputsChanged notify.Flag // LANs, the Node, its underlays, peers or reflectors changed
	hostChanged   notify.Flag // the node's links, addresses or routes may have changed
	ready         atomic.Bool

	mu        sync.Mutex
	underlays *kernel.Underlays // nil: not known yet

	// Only the goroutine of Run uses the fields below.
	plans       []Plan // first those of LAN objects, then those on demand
	objectCount int    // number of plans of LAN objects
	thisNode    Node
	planned     bool              // plans are valid
	records     []segment.Segment // left by an earlier run; nil once the manager has observed all of them
	lans        map[types.UID]*v1beta1.LAN
	sessions    []v1beta1.BGPSession
	advertised  []Spoke
	eventSent   map[types.UID]Problem // by LAN, the problem in its last event
}

// New returns an agent that does nothing until Run.
func New(c Config) *Agent {
	return &Agent{
		Config:        c,
		publisher:     newPublisher(c.Node, c.Client, c.APIReader, c.Log),
		peers:         newPeers(c.Node),
		inputsChanged: notify.New(),
		hostChanged:   notify.New(),
		eventSent:     make(map[types.UID]Problem),
	}
}

// Ready returns nil once the node's LANs are known and the manager has worked on each.
func (a *Agent) Ready() error {
	if !a.ready.Load() {
		return fmt.Errorf("the LANs of node %s are not known or not all worked on yet", a.Node)
	}
	return nil
}

// Run works until ctx ends, and then leaves everything in place. It plans nothing before it knows the API server's
// objects and the node's underlays. While the API server is away, it changes no plan.
func (a *Agent) Run(ctx context.Context) error {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	tasks.Go(func() { a.watchKernel(ctx) })
	tasks.Go(func() { a.readUnderlays(ctx) })
	if !a.watchObjects(ctx) {
		return nil // ctx has ended
	}
	tasks.Go(func() { a.publisher.run(ctx) })
	tasks.Go(func() { a.watchPeers(ctx) })
	var evpnChanged <-chan struct{} // without EVPN it never receives
	if a.EVPN != nil {
		tasks.Go(func() { a.runEVPN(ctx) })
		evpnChanged = a.EVPN.Changed()
	}

	timer := retry.NewTimer(retry.Default)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.inputsChanged:
		case <-timer.C:
		case <-a.Firewall.Changed():
		case <-a.Manager.Changed():
			if a.planOnDemand() {
				a.setWant()
			}
			a.report()
			continue
		case <-evpnChanged:
			if a.setWant() {
				a.report()
			}
			continue
		}
		if err := a.plan(ctx); err != nil {
			if timer.Failed(err) {
				a.Log.Error("cannot plan this node's LANs, they stay unchanged", "err", err)
			}
			continue
		}
		timer.Succeeded()
		a.report()
	}
}

// plan decides what the node should have of each LAN, and gives that to the manager.
func (a *Agent) plan(ctx context.Context) error {
	a.mu.Lock()
	underlays := a.underlays
	a.mu.Unlock()
	if underlays == nil {
		return nil // readUnderlays sets inputsChanged when they are known
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

// prepare does what has to be done before the first plan. It creates the LANNode: the controller concludes from a Node
// without one that the node has nothing of any LAN. And it reads the records of an earlier run.
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

// planOnDemand plans the segments on demand that the manager has found, and reports whether the plans changed.
func (a *Agent) planOnDemand() (changed bool) {
	if !a.planned {
		return false
	}
	onDemand := plansOnDemand(a.plans[:a.objectCount], a.lans, a.Manager.Reports(), a.thisNode)
	same := func(x, y Plan) bool { return x.Segment.Equal(y.Segment) }
	if slices.EqualFunc(onDemand, a.plans[a.objectCount:], same) {
		return false
	}
	a.plans = append(a.plans[:a.objectCount:a.objectCount], onDemand...)
	oneLANPerVNI(a.plans)
	return true
}

// setWant gives the manager the planned segments, completed by what is known of other nodes. It reports whether a LAN's
// EVPN problem or a BGP session changed, which has to be published.
func (a *Agent) setWant() (changed bool) {
	if !a.planned {
		return false
	}
	if a.EVPN != nil {
		before := a.sessions
		a.sessions = sessionStatus(a.EVPN.Sessions())
		changed = !slices.Equal(before, a.sessions)
	}
	firewallErr := a.Firewall.Err()
	segments, needPeers := make([]segment.Segment, len(a.plans)), make(map[types.UID]bool)
	for i := range a.plans {
		p := &a.plans[i]
		if p.Unicast || p.Strict {
			a.peers.need()
			needPeers[types.UID(p.Segment.LAN.UID)] = true
		}
		if p.Strict && p.Problem.Reason == "" && firewallErr != nil {
			p.Problem = firewallProblem(firewallErr)
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
	a.peers.keepOnly(needPeers)
	a.setFirewall()
	a.Manager.Set(segments)
	return changed
}

// setFirewall gives the firewall the strict LANs and their members.
func (a *Agent) setFirewall() {
	a.Firewall.Set(StrictLANs(a.plans, a.have(), a.peers.membersFor))
}

// have returns what the node has, by network namespace, as far as that is known.
func (a *Agent) have() map[string]segment.Segment {
	if a.Manager.Observed() {
		a.records = nil
	}
	have := make(map[string]segment.Segment)
	for _, r := range a.records {
		have[r.Netns] = r
	}
	for _, r := range a.Manager.Reports() {
		have[r.Segment.Netns] = r.Segment
	}
	return have
}

// internalIPs returns the addresses by which the cluster knows a node, the main one first.
func internalIPs(node *corev1.Node) []netip.Addr {
	var ips []netip.Addr
	for _, a := range node.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP {
			ips = append(ips, ip)
		}
	}
	return ips
}
