// Package fabric joins a node's LANs to EVPN: who is attached and what bridges hear is told to other routers, and what those tell becomes
// part of the LANs' segments.
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
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Kernel tells of who is on the ports of LANs' bridges; kernel.Node does.
type Kernel interface {
	WatchFDB(ctx context.Context, tell kernel.FDBEvents) error
	LocalMACs(netns string) ([][6]byte, error)
	// WatchBindings tells which addresses stations on the LAN's ports show that they have.
	WatchBindings(ctx context.Context, netns string, tell kernel.Bindings) error
}

// Config is what a fabric works with.
type Config struct {
	AS       uint32
	RouterID netip.Addr // an IPv4 address, no other router's
	Peers    []bgp.Peer // besides the cluster's own reflectors
	// ReflectorPassword is that of the sessions with those; empty: none.
	ReflectorPassword string
	Kernel            Kernel
	WithdrawOnStop    bool // its end is no restart: the others forget its routes at once
	Log               *slog.Logger
}

// Instance is one node's part in EVPN.
type Instance struct {
	Config
	speaker       *bgp.Speaker
	changed       chan struct{}
	claimsChanged chan struct{} // has a value whenever a LAN may have got its first claim here, or lost the last

	mu           sync.Mutex
	reflectors   []netip.AddrPort
	peers        []bgp.Peer // all
	peersFailed  bool       // the speaker could not take them all
	table        *macvrf.Table
	lans         map[string]macvrf.LAN // by netns
	vnis         map[string]uint32     // by netns
	partial      bool
	sessions     []bgp.Session
	bindingsFull map[string]bool // by netns: it was said that stations show more addresses than are told
	macsFull     map[string]bool // by netns: it was said that more MACs speak than are told
	advertiseErr string          // what the last failure to tell routes said
	lingering    []lingeringRoutes
	lingerTimer  *time.Timer // for what is leaving
}

// lingeringRoutes are routes that are told until then, though they are the node's no more.
type lingeringRoutes struct {
	routes []macvrf.Route
	until  time.Time
}

// lingerTime is how long a LAN that has left EVPN is told of, where somebody is attached: it has another discovery. Other nodes hear of that a
// moment sooner or later, and send by routes until then.
const lingerTime = 5 * time.Second

// New returns a fabric that hears and tells nothing until Run.
func New(c Config) *Instance {
	f := &Instance{
		Config: c, changed: make(chan struct{}, 1), claimsChanged: make(chan struct{}, 1), peers: c.Peers,
		table: macvrf.New(c.AS, c.RouterID), vnis: map[string]uint32{}, partial: true, bindingsFull: map[string]bool{}, macsFull: map[string]bool{},
	}
	f.lingerTimer = time.AfterFunc(lingerTime, func() { f.handle(func(time.Time) {}) })
	f.lingerTimer.Stop()
	f.speaker = bgp.NewSpeaker(bgp.Config{AS: c.AS, RouterID: c.RouterID, OnUpdate: f.receive, WithdrawOnStop: c.WithdrawOnStop, Log: c.Log})
	return f
}

// Run speaks with the peers and hears the bridges until ctx ends, or one of both fails.
func (f *Instance) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var tasks sync.WaitGroup
	var errs [2]error
	tasks.Go(func() {
		defer cancel()
		errs[0] = f.speaker.Run(ctx)
	})
	tasks.Go(func() {
		defer cancel()
		errs[1] = f.Kernel.WatchFDB(ctx, kernel.FDBEvents{Learned: f.learnLocal, Removed: f.forgetLocal, Overflow: f.relistAll})
	})
	tasks.Go(func() { f.watchBindings(ctx) })
	f.mu.Lock()
	err := f.speaker.SetPeers(ctx, f.peers)
	f.mu.Unlock()
	if err != nil {
		cancel()
	}
	tasks.Wait()
	f.lingerTimer.Stop()
	return errors.Join(err, errs[0], errs[1])
}

// SetReflectors says where the cluster's reflectors are; it replaces what was said before. What one has told that is gone stays until the
// others have told it or taken it back, or bgp.Kept has gone by.
func (f *Instance) SetReflectors(ctx context.Context, at []netip.AddrPort) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reflectors = at
	return f.setPeers(ctx)
}

// SetPeers says whom to speak with besides those, and the password of the sessions with them; it replaces what was said before. Where a
// session stands, another password counts once it has ended.
func (f *Instance) SetPeers(ctx context.Context, peers []bgp.Peer, reflectorPassword string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.Peers, f.ReflectorPassword = peers, reflectorPassword
	return f.setPeers(ctx)
}

func (f *Instance) setPeers(ctx context.Context) error {
	peers := slices.Clone(f.Peers)
	for _, a := range f.reflectors {
		peers = append(peers, bgp.Peer{Address: a.Addr(), Port: a.Port(), AS: f.AS, Password: f.ReflectorPassword, IPv6VTEPs: true})
	}
	if slices.Equal(peers, f.peers) && !f.peersFailed {
		return nil
	}
	f.peers = peers
	f.sessions = slices.DeleteFunc(slices.Clone(f.sessions), func(s bgp.Session) bool { return !slices.ContainsFunc(peers, s.Peer.EqualExceptPassword) })
	err := f.speaker.SetPeers(ctx, peers)
	f.peersFailed = err != nil
	return err
}

// Changed has a value whenever Fill may fill in something else.
func (f *Instance) Changed() <-chan struct{} { return f.changed }

// Sessions is how it stands with each peer.
func (f *Instance) Sessions() []bgp.Session { return f.speaker.Sessions() }

// Set says which LANs the node takes part in, by the names of their network namespaces; it replaces what was said before. Of one that is
// new, the MACs on its ports are asked for: their events were before.
func (f *Instance) Set(lans map[string]macvrf.LAN) {
	f.mu.Lock()
	same := maps.EqualFunc(lans, f.lans, macvrf.LAN.Equal)
	f.lans = lans
	f.mu.Unlock()
	if same {
		return
	}
	f.handle(func(now time.Time) {
		var list []macvrf.LAN
		vnis := make(map[string]uint32, len(lans))
		for netns, lan := range lans {
			list, vnis[netns] = append(list, lan), lan.VNI
		}
		told := f.table.Advertised()
		f.table.Set(now, list)
		f.linger(now, slices.DeleteFunc(told, func(r macvrf.Route) bool {
			return slices.ContainsFunc(list, func(l macvrf.LAN) bool { return l.VNI == r.VNI })
		}))
		for netns, vni := range vnis {
			if f.vnis[netns] != vni {
				f.readLocalMACs(now, netns, vni)
			}
		}
		f.vnis = vnis
		gone := func(netns string, _ bool) bool { _, here := lans[netns]; return !here }
		maps.DeleteFunc(f.bindingsFull, gone)
		maps.DeleteFunc(f.macsFull, gone)
	})
	signal(f.claimsChanged)
}

// linger has routes told for some time yet.
func (f *Instance) linger(now time.Time, routes []macvrf.Route) {
	if len(routes) > 0 {
		f.lingering = append(f.lingering, lingeringRoutes{routes, now.Add(lingerTime)})
		f.lingerTimer.Reset(lingerTime)
	}
}

// routes are the routes to tell. What is leaving comes first: a LAN may be back.
func (f *Instance) routes(now time.Time) (routes []macvrf.Route) {
	f.lingering = slices.DeleteFunc(f.lingering, func(l lingeringRoutes) bool { return !l.until.After(now) })
	for _, l := range f.lingering {
		routes = append(routes, l.routes...)
	}
	return append(routes, f.table.Advertised()...)
}

// Fill writes into a segment what others have told of its LAN; what is not known stays as it is.
func (f *Instance) Fill(s *segment.Segment) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if remotes, fdb, ok := f.table.Forwarding(s.VXLAN.VNI); ok && f.vnis[s.Netns] == s.VXLAN.VNI {
		s.Remotes, s.FDB, s.Neighbors, s.Partial = remotes, fdb, f.table.Neighbors(s.VXLAN.VNI), f.partial
	}
}

// Problems is what keeps a LAN from being whole.
type Problems struct {
	NoPeers    bool           // there is nobody to speak with
	Down       []bgp.Session  // all there are, where none is up
	Duplicates []macvrf.MAC   // are on this node and on another
	Withheld   []bgp.Peer     // are there, and told nothing of the LAN: they take no routes with an IPv6 VTEP
	Refused    macvrf.Refusal // is one of the routes that cannot be used
	Refusals   int            // is how many these are
}

// Problemss is that of a LAN, by the name of its network namespace.
func (f *Instance) Problems(netns string) (t Problems) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t.NoPeers = len(f.peers) == 0
	if !slices.ContainsFunc(f.sessions, func(s bgp.Session) bool { return s.Up }) {
		t.Down = f.sessions
	}
	vni, ok := f.vnis[netns]
	if !ok {
		return t
	}
	t.Duplicates = f.table.Duplicates(vni)
	t.Refused, t.Refusals = f.table.Refused(vni)
	for _, s := range f.sessions {
		if s.Up && !s.Peer.IPv6VTEPs && f.lans[netns].VTEP.Is6() {
			t.Withheld = append(t.Withheld, s.Peer)
		}
	}
	return t
}

// Count is how much there is of a LAN, by the name of its network namespace; ok is false if the node takes no part in it.
func (f *Instance) Count(netns string) (c macvrf.Count, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	vni, ok := f.vnis[netns]
	if !ok {
		return c, false
	}
	return f.table.Count(vni)
}

// receive takes in what other routers tell.
func (f *Instance) receive(h bgp.Update) {
	f.handle(func(now time.Time) {
		for _, r := range h.Routes {
			f.table.Import(now, r)
		}
		for _, k := range h.Withdrawn {
			f.table.Withdraw(now, k)
		}
		f.partial = h.Partial
		if h.Sessions != nil {
			f.setSessions(h.Sessions)
		}
	})
}

// setSessions logs what is another than before.
func (f *Instance) setSessions(sessions []bgp.Session) {
	for _, s := range sessions {
		if i := slices.IndexFunc(f.sessions, func(o bgp.Session) bool { return o.Peer.EqualExceptPassword(s.Peer) && o.Up == s.Up && o.Why == s.Why }); i >= 0 {
			continue
		}
		if s.Up {
			f.Log.Info("BGP session is up", "peer", s.Peer)
		} else {
			f.Log.Warn("BGP session is down", "peer", s.Peer, "why", s.Why)
		}
	}
	f.sessions = sessions
}

func (f *Instance) learnLocal(netns string, mac [6]byte) {
	f.handle(func(now time.Time) {
		if vni, ok := f.vnis[netns]; ok && f.table.LearnLocal(now, vni, mac) && !f.macsFull[netns] {
			f.macsFull[netns] = true
			f.Log.Warn("more MACs speak on this node than others are told of, what is sent to the rest is flooded", "netns", netns, "told", macvrf.MaxMACs)
		}
	})
}

func (f *Instance) forgetLocal(netns string, mac [6]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if vni, ok := f.vnis[netns]; ok && f.table.ForgetLocal(time.Now(), vni, mac) {
		f.publish()
	}
}

// relistAll asks for the MACs on every LAN's ports.
func (f *Instance) relistAll() {
	f.handle(func(now time.Time) {
		for netns, vni := range f.vnis {
			f.readLocalMACs(now, netns, vni)
		}
	})
}

// relist asks for those on one LAN's.
func (f *Instance) relist(netns string) {
	f.handle(func(now time.Time) {
		if vni, ok := f.vnis[netns]; ok {
			f.readLocalMACs(now, netns, vni)
		}
	})
}

func (f *Instance) readLocalMACs(now time.Time, netns string, vni uint32) {
	macs, err := f.Kernel.LocalMACs(netns)
	if err != nil {
		f.Log.Error("cannot read which MACs are on a LAN, those that speak from now on are heard", "netns", netns, "err", err)
		return
	}
	all := make([]macvrf.MAC, len(macs))
	for i, mac := range macs {
		all[i] = mac
	}
	f.table.SetLocal(now, vni, all)
}

// handle does what follows from an event: the others are told, and the segments get what they have to have.
func (f *Instance) handle(event func(now time.Time)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	event(time.Now())
	f.publish()
}

// publish does what follows from a change of the table; f.mu is held.
func (f *Instance) publish() {
	failed := ""
	if err := f.speaker.Set(f.routes(time.Now())); err != nil {
		failed = err.Error()
	}
	if failed != "" && failed != f.advertiseErr {
		f.Log.Error("cannot tell all routes, trying again at the next event", "err", failed)
	}
	f.advertiseErr = failed
	signal(f.changed)
}

// signal puts a value into a one-slot channel that may have one already.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
