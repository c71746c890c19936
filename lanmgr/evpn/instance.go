// Package evpn joins a node's LANs to EVPN: it advertises the MACs and IP–MAC bindings on the node to other routers,
// and fills the routes that those advertise into the LANs' segments.
package evpn

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/notify"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Kernel reports the MACs and IP–MAC bindings on the ports of LANs' bridges. kernel.Node implements it.
type Kernel interface {
	WatchFDB(ctx context.Context, events watch.FDBEvents) error
	LocalMACs(netns string) ([][6]byte, error)
	WatchBindings(ctx context.Context, netns string, events watch.BindingEvents) error
}

// Config configures an Instance.
type Config struct {
	AS       uint32
	RouterID netip.Addr // an IPv4 address that no other router has as its ID
	Peers    []bgp.Peer // besides the cluster's own reflectors
	// ReflectorPassword is the password of the sessions with those; empty: none.
	ReflectorPassword string
	Kernel            Kernel
	WithdrawOnStop    bool // as bgp.Config has it
	Log               *slog.Logger
}

// Instance takes part in EVPN for one node.
type Instance struct {
	Config
	speaker       *bgp.Speaker
	changed       notify.Flag // Fill may fill in something else
	claimsChanged notify.Flag // a LAN may have got its first claim, or lost its last

	mu          sync.Mutex
	reflectors  []netip.AddrPort
	peers       []bgp.Peer // all
	peersFailed bool       // the speaker could not set them all
	table       *macvrf.Table
	lans        map[string]macvrf.LAN // by netns
	vnis        map[string]uint32     // by netns
	partial     bool                  // peers may not have sent all routes yet
	sessions    []bgp.Session

	bindingsFull map[string]bool // by netns: it is logged that a limit on advertised addresses was exceeded
	macsFull     map[string]bool // by netns: it is logged that the limit on advertised MACs was exceeded
	advertiseErr string          // the last failure to advertise routes, as logged

	lingering   []lingeringRoutes
	lingerTimer *time.Timer // fires when lingering routes are due to be withdrawn
}

// New returns an instance that does nothing until Run is called.
func New(c Config) *Instance {
	e := &Instance{
		Config: c, changed: notify.New(), claimsChanged: notify.New(), peers: c.Peers,
		table: macvrf.New(c.AS, c.RouterID), vnis: map[string]uint32{}, partial: true,
		bindingsFull: map[string]bool{}, macsFull: map[string]bool{},
	}
	e.lingerTimer = time.AfterFunc(lingerTime, func() { e.handle(func(time.Time) {}) })
	e.lingerTimer.Stop()
	e.speaker = bgp.NewSpeaker(bgp.Config{
		AS: c.AS, RouterID: c.RouterID, OnUpdate: e.receive, WithdrawOnStop: c.WithdrawOnStop, Log: c.Log,
	})
	return e
}

// Run holds the sessions with the peers and watches the bridges until ctx ends, or one of the two fails.
func (e *Instance) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var tasks sync.WaitGroup
	var errs [2]error
	tasks.Go(func() {
		defer cancel()
		errs[0] = e.speaker.Run(ctx)
	})
	tasks.Go(func() {
		defer cancel()
		events := watch.FDBEvents{Learned: e.learnLocal, Removed: e.forgetLocal, Overflow: e.relistAll}
		errs[1] = e.Kernel.WatchFDB(ctx, events)
	})
	tasks.Go(func() { e.watchBindings(ctx) })
	e.mu.Lock()
	err := e.speaker.SetPeers(ctx, e.peers)
	e.mu.Unlock()
	if err != nil {
		cancel()
	}
	tasks.Wait()
	e.lingerTimer.Stop()
	return errors.Join(err, errs[0], errs[1])
}

// Changed receives after each change of what Fill may fill in.
func (e *Instance) Changed() <-chan struct{} { return e.changed }

// Set replaces the LANs that the node takes part in, by netns. It lists the local MACs of those that are new, because
// their events were before.
func (e *Instance) Set(lans map[string]macvrf.LAN) {
	e.mu.Lock()
	same := maps.EqualFunc(lans, e.lans, macvrf.LAN.Equal)
	e.lans = lans
	e.mu.Unlock()
	if same {
		return
	}
	e.handle(func(now time.Time) {
		var list []macvrf.LAN
		vnis := make(map[string]uint32, len(lans))
		for netns, lan := range lans {
			list, vnis[netns] = append(list, lan), lan.VNI
		}
		advertised := e.table.Advertised()
		e.table.Set(now, list)
		e.linger(now, slices.DeleteFunc(advertised, func(r macvrf.Route) bool {
			return slices.ContainsFunc(list, func(l macvrf.LAN) bool { return l.VNI == r.VNI })
		}))
		for netns, vni := range vnis {
			if e.vnis[netns] != vni {
				e.readLocalMACs(now, netns, vni)
			}
		}
		e.vnis = vnis
		removed := func(netns string, _ bool) bool { _, ok := lans[netns]; return !ok }
		maps.DeleteFunc(e.bindingsFull, removed)
		maps.DeleteFunc(e.macsFull, removed)
	})
	e.claimsChanged.Set()
}

// Fill writes the remotes, FDB entries and neighbours of a LAN into its segment. If the node takes no part in the LAN,
// the segment stays unchanged.
func (e *Instance) Fill(s *segment.Segment) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if remotes, fdb, ok := e.table.Forwarding(s.VXLAN.VNI); ok && e.vnis[s.Netns] == s.VXLAN.VNI {
		s.Remotes, s.FDB, s.Neighbors, s.Partial = remotes, fdb, e.table.Neighbors(s.VXLAN.VNI), e.partial
	}
}

// receive applies an update from the speaker.
func (e *Instance) receive(u bgp.Update) {
	e.handle(func(now time.Time) {
		for _, r := range u.Routes {
			e.table.Import(now, r)
		}
		for _, k := range u.Withdrawn {
			e.table.Withdraw(now, k)
		}
		e.partial = u.Partial
		if u.Sessions != nil {
			e.setSessions(u.Sessions)
		}
	})
}

// handle applies an event to the table and publishes what follows from it.
func (e *Instance) handle(event func(now time.Time)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	event(time.Now())
	e.publish()
}

// publish advertises the table's routes, and signals that segments may change; e.mu is held.
func (e *Instance) publish() {
	text := ""
	if err := e.speaker.Set(e.routes(time.Now())); err != nil {
		text = err.Error()
	}
	if text != "" && text != e.advertiseErr {
		e.Log.Error("cannot advertise all routes, trying again at the next event", "err", text)
	}
	e.advertiseErr = text
	e.changed.Set()
}
