// Package bgp holds a node's sessions with other routers, and the reflector's with nodes: EVPN routes of evpn's kind in and out. The protocol
// is gobgp's.
package bgp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// Peer is a router to speak with.
type Peer struct {
	Address   netip.Addr
	Port      uint16 // 0: 179
	AS        uint32
	HoldTime  time.Duration // whole seconds, 3 at least; 0: HoldTime
	Multihop  uint8         // how many hops away a router of another AS may be; 0: it is on the link
	Password  string        `json:"-"` // of TCP MD5 (RFC 2385); empty: none
	Source    netip.Addr    // the session's own end; the zero Addr leaves it to the node's routes
	IPv6VTEPs bool          // it takes routes with an IPv6 VTEP. FRR 8.4 closes the session over one
}

// At is where the peer is connected to.
func (p Peer) At() netip.AddrPort {
	if p.Port == 0 {
		return netip.AddrPortFrom(p.Address, bgp.BGP_PORT)
	}
	return netip.AddrPortFrom(p.Address, p.Port)
}

// String names the peer, and not its password.
func (p Peer) String() string { return fmt.Sprintf("%s of AS %d", p.At(), p.AS) }

// LogValue is String: a log in JSON would else tell the password.
func (p Peer) LogValue() slog.Value { return slog.StringValue(p.String()) }

// EqualExceptPassword says whether two differ in their passwords at most.
func (p Peer) EqualExceptPassword(o Peer) bool {
	p.Password = o.Password
	return p == o
}

// The times of sessions.
const (
	// HoldTime is how long a peer may be silent; it is asked to speak three times as often.
	HoldTime = 9 * time.Second
	// RestartTime is how long others keep the routes of a node whose session is lost: a daemon that restarts is back by then.
	RestartTime = 20 * time.Second
	// StaleTime is how long a node keeps what a peer told that is lost, if it has others and none of them takes it back.
	StaleTime = 2 * time.Minute
	// SyncTime is for how long after a session has come up what was told before may be told again. A reflector that has restarted
	// has not heard all nodes sooner: of its end they know after HoldTime at the latest, and try to connect every connectRetry.
	SyncTime = HoldTime + 2*connectRetry
	// connectRetry is how long after a failed attempt to connect there is another.
	connectRetry = 3 * time.Second
	// pollInterval is how often it is asked why a session is down: gobgp tells of no attempt that failed.
	pollInterval = 2 * connectRetry
)

// Session is how it stands with a peer.
type Session struct {
	Peer  Peer
	Up    bool
	Since time.Time // that it is up or down
	Why   string    // it is down, as far as that is known

	sent, received  uint64 // OPEN messages at the last look
	passwordChanged bool   // the peer has another password since
}

// Config is what a speaker works with.
type Config struct {
	AS       uint32
	RouterID netip.Addr // an IPv4 address, nobody else's
	// OnUpdate is told what others tell, by one goroutine at a time, and is not called any more once Run has returned.
	OnUpdate func(Update)
	// WithdrawOnStop says that who ends does not come back: the others forget its routes at once.
	WithdrawOnStop bool
	Log            *slog.Logger
}

// Update is what has changed.
type Update struct {
	Routes    []macvrf.Route // new ones, and such as take the place of those with their keys
	Withdrawn []macvrf.Key
	Sessions  []Session // all of them, by address, if one has changed
	Partial   bool      // there may be more routes that nobody has told yet: what stands and is not told is not gone
}

// Speaker tells other routers a node's routes and hears theirs. It connects, and never listens: port 179 of the node may be
// somebody else's.
type Speaker struct {
	Config
	publishing sync.Mutex // Hear is being called

	mu         sync.Mutex
	server     *server.BgpServer // nil while Run does not run
	peers      map[netip.Addr]Peer
	sessions   map[netip.Addr]Session
	adjRIBOut  map[macvrf.Key]macvrf.Route
	want       map[macvrf.Key]macvrf.Route
	adjRIBsIn  *adjRIBsIn
	synced     bool        // the rib has settled once
	staleTimer *time.Timer // for the rib
	pollTimer  *time.Timer // at sessions that are down
}

// NewSpeaker returns a speaker that does nothing until Run.
func NewSpeaker(c Config) *Speaker {
	return &Speaker{
		Config: c, peers: map[netip.Addr]Peer{}, sessions: map[netip.Addr]Session{},
		adjRIBOut: map[macvrf.Key]macvrf.Route{}, want: map[macvrf.Key]macvrf.Route{}, adjRIBsIn: newAdjRIBsIn(),
	}
}

// Run speaks until ctx ends. Then it goes without a word, so that the others keep the node's routes for NodeRestart; who Leaves says so.
func (s *Speaker) Run(ctx context.Context) error {
	srv := newServer(s.Log)
	served := make(chan struct{})
	go func() { defer close(served); srv.Serve() }()
	if err := s.start(ctx, srv); err != nil {
		srv.Stop()
		<-served
		if ctx.Err() != nil {
			err = nil // it is not to start any more
		}
		return err
	}
	<-ctx.Done()
	s.publishing.Lock() // who still hears of something now ends before
	s.mu.Lock()
	for address, session := range s.sessions {
		if session.Up {
			s.adjRIBsIn.sessionDown(address, time.Now())
		}
	}
	s.server = nil
	s.staleTimer.Stop()
	s.pollTimer.Stop()
	s.mu.Unlock()
	s.publishing.Unlock()
	// The watch has ended with ctx, before the server withdraws what it has heard.
	err := srv.StopBgp(context.WithoutCancel(ctx), &api.StopBgpRequest{AllowGracefulRestart: !s.WithdrawOnStop})
	<-served
	return err
}

func (s *Speaker) start(ctx context.Context, srv *server.BgpServer) error {
	err := srv.StartBgp(ctx, &api.StartBgpRequest{Global: &api.Global{Asn: s.AS, RouterId: s.RouterID.String(), ListenPort: -1}})
	if err != nil {
		return fmt.Errorf("start BGP with AS %d and router ID %s: %w", s.AS, s.RouterID, err)
	}
	if err := rejectReceivedRoutes(ctx, srv); err != nil {
		return err
	}
	if err := filterIPv6VTEPs(ctx, srv); err != nil {
		return err
	}
	err = srv.WatchEvent(ctx, server.WatchEventMessageCallbacks{
		OnPathUpdate: func(paths []*apiutil.Path, _ time.Time) { s.receivePaths(ctx, paths) },
		OnPeerUpdate: func(e *apiutil.WatchEventMessage_PeerEvent, at time.Time) {
			if e.Type == apiutil.PEER_EVENT_STATE {
				s.receiveState(ctx, e.Peer, at)
			}
		},
	}, server.WatchUpdate(false, "", ""), server.WatchPeer())
	if err != nil {
		return fmt.Errorf("watch routes: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.server, s.adjRIBOut = srv, map[macvrf.Key]macvrf.Route{}
	s.staleTimer = time.AfterFunc(time.Hour, func() { s.publish(ctx, func() []Session { return nil }) })
	s.pollTimer = time.AfterFunc(pollInterval, func() { s.pollSessions(ctx) })
	for _, p := range s.peers {
		if err := s.addPeer(ctx, p); err != nil {
			return err
		}
	}
	return s.advertise()
}

// Set says which routes to tell; it replaces what was said before. What is the same is not told again.
func (s *Speaker) Set(own []macvrf.Route) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.want = make(map[macvrf.Key]macvrf.Route, len(own))
	for _, r := range own {
		s.want[r.Key] = r
	}
	return s.advertise()
}

// advertise brings what is told in line with what is to be; s.mu is held. What is new comes before what is gone.
func (s *Speaker) advertise() error {
	if s.server == nil {
		return nil
	}
	var add, lower, del []*apiutil.Path
	var keys []macvrf.Key
	var errs []error
	for key, r := range s.want {
		old, told := s.adjRIBOut[key]
		if told && old.Equal(r) {
			continue
		}
		p, err := pathOf(r)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if told && r.Sequence < old.Sequence { // gobgp refuses that (fixupApiPath in pkg/server/server.go)
			lower = append(lower, withdrawal(p))
		}
		add, keys, s.adjRIBOut[key] = append(add, p), append(keys, key), r
	}
	for key, r := range s.adjRIBOut {
		if _, ok := s.want[key]; ok {
			continue
		}
		if p, err := pathOf(r); err == nil { // it was told
			del = append(del, withdrawal(p))
		}
		delete(s.adjRIBOut, key)
	}
	if len(lower) > 0 {
		errs = append(errs, s.server.DeletePath(apiutil.DeletePathRequest{Paths: lower}))
	}
	if len(add) > 0 {
		results, err := s.server.AddPath(apiutil.AddPathRequest{Paths: add})
		for i, result := range results {
			if result.Error != nil {
				delete(s.adjRIBOut, keys[i])
				errs = append(errs, fmt.Errorf("tell the route %s: %w", add[i].Nlri, result.Error))
			}
		}
		if len(results) == 0 && err != nil {
			errs = append(errs, fmt.Errorf("tell %d routes: %w", len(add), err))
		}
	}
	if len(del) > 0 {
		errs = append(errs, s.server.DeletePath(apiutil.DeletePathRequest{Paths: del}))
	}
	return errors.Join(errs...)
}

// SetPeers says whom to speak with; it replaces what was said before. A session whose peer is the same goes on, also where the password is
// another: that counts from the next connection on. What another has told stays as when its session is lost.
func (s *Speaker) SetPeers(ctx context.Context, peers []Peer) error {
	want := make(map[netip.Addr]Peer, len(peers))
	for _, p := range peers {
		want[p.Address] = p
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.peers
	s.peers = want
	if s.server == nil {
		return nil
	}
	var errs []error
	for address, p := range old {
		next, session := want[address], s.sessions[address]
		if next == p || session.Up && next.EqualExceptPassword(p) {
			session.passwordChanged = session.passwordChanged || next != p
			s.sessions[address] = session
			continue
		}
		errs = append(errs, s.removePeer(ctx, p))
		delete(old, address)
	}
	for address, p := range want {
		if _, stays := old[address]; stays {
			continue
		}
		if err := s.addPeer(ctx, p); err != nil {
			errs = append(errs, err)
			s.sessions[address] = Session{Peer: p, Since: time.Now(), Why: err.Error()}
			delete(want, address) // so that the next call tries again
		}
	}
	s.staleTimer.Reset(0)
	return errors.Join(errs...)
}

func (s *Speaker) removePeer(ctx context.Context, p Peer) error {
	delete(s.sessions, p.Address)
	s.adjRIBsIn.sessionDown(p.Address, time.Now())
	err := s.server.DeletePeer(ctx, &api.DeletePeerRequest{Address: p.Address.String()})
	if err == nil && p.IPv6VTEPs {
		err = s.server.DeleteDefinedSet(ctx, &api.DeleteDefinedSetRequest{DefinedSet: ipv6VTEPsEntry(p)})
	}
	if err != nil {
		return fmt.Errorf("remove the peer %s: %w", p, err)
	}
	return nil
}

func (s *Speaker) addPeer(ctx context.Context, p Peer) error {
	s.sessions[p.Address] = Session{Peer: p, Since: time.Now(), Why: "is being connected"}
	s.pollTimer.Reset(pollInterval)
	if p.IPv6VTEPs {
		if err := s.server.AddDefinedSet(ctx, &api.AddDefinedSetRequest{DefinedSet: ipv6VTEPsEntry(p)}); err != nil {
			return fmt.Errorf("allow the peer %s routes with an IPv6 VTEP: %w", p, err)
		}
	}
	peer := &api.Peer{
		Conf:            &api.PeerConf{NeighborAddress: p.Address.String(), PeerAsn: p.AS, AuthPassword: p.Password},
		Timers:          timers(p.HoldTime),
		Transport:       &api.Transport{RemotePort: uint32(p.Port)},
		GracefulRestart: gracefulRestart(RestartTime),
		AfiSafis:        families(),
	}
	if p.Source.IsValid() {
		peer.Transport.LocalAddress = p.Source.String()
	}
	if p.AS != s.AS { // nodes are of one AS, and a router of another tells each of the others, with that AS in their routes
		peer.Conf.AllowOwnAsn = 1
	}
	if p.Multihop > 0 {
		peer.EbgpMultihop = &api.EbgpMultihop{Enabled: true, MultihopTtl: uint32(p.Multihop)}
	}
	if err := s.server.AddPeer(ctx, &api.AddPeerRequest{Peer: peer}); err != nil {
		return fmt.Errorf("add the peer %s: %w", p, err)
	}
	return nil
}

// rejectReceivedRoutes has gobgp's own table hold our routes alone: from others' it would make sequence numbers of its own (fixupApiPath in
// pkg/server/server.go). What peers tell is heard before that is decided.
func rejectReceivedRoutes(ctx context.Context, srv *server.BgpServer) error {
	policy := &api.Policy{Name: "ours", Statements: []*api.Statement{{
		Name:       "ours",
		Conditions: &api.Conditions{RouteType: api.Conditions_ROUTE_TYPE_LOCAL},
		Actions:    &api.Actions{RouteAction: api.RouteAction_ROUTE_ACTION_ACCEPT},
	}}}
	err := srv.AddPolicy(ctx, &api.AddPolicyRequest{Policy: policy})
	if err == nil {
		err = srv.AddPolicyAssignment(ctx, &api.AddPolicyAssignmentRequest{Assignment: &api.PolicyAssignment{
			Name: "global", Direction: api.PolicyDirection_POLICY_DIRECTION_IMPORT,
			Policies: []*api.Policy{policy}, DefaultAction: api.RouteAction_ROUTE_ACTION_REJECT,
		}})
	}
	if err != nil {
		return fmt.Errorf("keep others' routes out of gobgp's table: %w", err)
	}
	return nil
}

// ipv6VTEPs is the set of peers that take routes with an IPv6 VTEP.
const ipv6VTEPs = "ipv6-vteps"

// filterIPv6VTEPs keeps routes with an IPv6 VTEP from every peer that is not in the set: as long as that is empty, from all of them
// (NeighborCondition.Evaluate in gobgp's internal/pkg/table).
func filterIPv6VTEPs(ctx context.Context, srv *server.BgpServer) error {
	policy := &api.Policy{Name: ipv6VTEPs, Statements: []*api.Statement{{
		Name: ipv6VTEPs,
		Conditions: &api.Conditions{
			NeighborSet:   &api.MatchSet{Type: api.MatchSet_TYPE_INVERT, Name: ipv6VTEPs},
			NextHopInList: []string{"::/0"},
		},
		Actions: &api.Actions{RouteAction: api.RouteAction_ROUTE_ACTION_REJECT},
	}}}
	err := srv.AddDefinedSet(ctx, &api.AddDefinedSetRequest{DefinedSet: &api.DefinedSet{DefinedType: api.DefinedType_DEFINED_TYPE_NEIGHBOR, Name: ipv6VTEPs}})
	if err == nil {
		err = srv.AddPolicy(ctx, &api.AddPolicyRequest{Policy: policy})
	}
	if err == nil {
		err = srv.AddPolicyAssignment(ctx, &api.AddPolicyAssignmentRequest{Assignment: &api.PolicyAssignment{
			Name: "global", Direction: api.PolicyDirection_POLICY_DIRECTION_EXPORT,
			Policies: []*api.Policy{policy}, DefaultAction: api.RouteAction_ROUTE_ACTION_ACCEPT,
		}})
	}
	if err != nil {
		return fmt.Errorf("keep routes with an IPv6 VTEP from peers that cannot take them: %w", err)
	}
	return nil
}

// ipv6VTEPsEntry is what of the set is one peer's. The set changes only so: one that takes its place is not the policy's.
func ipv6VTEPsEntry(p Peer) *api.DefinedSet {
	return &api.DefinedSet{
		DefinedType: api.DefinedType_DEFINED_TYPE_NEIGHBOR, Name: ipv6VTEPs,
		List: []string{netip.PrefixFrom(p.Address, p.Address.BitLen()).String()},
	}
}

// receivePaths notes what a peer tells.
func (s *Speaker) receivePaths(ctx context.Context, paths []*apiutil.Path) {
	s.mu.Lock()
	for _, p := range paths {
		if _, known := s.sessions[p.PeerAddress]; !known || p.Family != bgp.RF_EVPN {
			continue
		}
		key, ok := keyOf(p)
		if !ok || key.RD.Of(s.RouterID) { // FRR tells a node's routes to the node, too
			continue
		}
		if p.Withdrawal {
			s.adjRIBsIn.withdraw(p.PeerAddress, key, time.Now())
		} else if r, ok := routeOf(p); ok {
			s.adjRIBsIn.add(p.PeerAddress, r)
		}
	}
	s.mu.Unlock()
	s.publish(ctx, func() []Session { return nil })
}

// receiveState notes how it stands with a peer.
func (s *Speaker) receiveState(ctx context.Context, p apiutil.Peer, at time.Time) {
	s.mu.Lock()
	session, ok := s.sessions[p.State.NeighborAddress]
	up := p.State.SessionState == bgp.BGP_FSM_ESTABLISHED
	if !ok || up == session.Up {
		s.mu.Unlock()
		return
	}
	session.Up, session.Since, session.Why = up, at, ""
	if up {
		s.adjRIBsIn.sessionUp(session.Peer.Address, at)
	} else {
		s.adjRIBsIn.sessionDown(session.Peer.Address, at)
		session.Why = p.State.DisconnectMessage
		s.pollTimer.Reset(pollInterval)
	}
	s.sessions[session.Peer.Address] = session
	if session.passwordChanged && !up && s.server != nil {
		if err := s.recreatePeer(ctx, session.Peer); err != nil {
			s.Log.Error("cannot connect with the new password, restart the daemon", "peer", session.Peer, "err", err)
		}
	}
	s.mu.Unlock()
	s.publish(ctx, s.Sessions)
}

// recreatePeer has the next session be as the peer is now; s.mu is held.
func (s *Speaker) recreatePeer(ctx context.Context, old Peer) error {
	if err := s.removePeer(ctx, old); err != nil {
		return err
	}
	return s.addPeer(ctx, s.peers[old.Address])
}

// Sessions is how it stands with each peer, by address.
func (s *Speaker) Sessions() []Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.SortedFunc(maps.Values(s.sessions), func(a, b Session) int { return a.Peer.Address.Compare(b.Peer.Address) })
}

// pollSessions finds out why sessions are down, and passes it on if that is another reason than before.
func (s *Speaker) pollSessions(ctx context.Context) {
	s.mu.Lock()
	if s.server == nil {
		s.mu.Unlock()
		return
	}
	changed, down := false, false
	err := s.server.ListPeer(ctx, &api.ListPeerRequest{}, func(p *api.Peer) {
		address, err := netip.ParseAddr(p.Conf.NeighborAddress)
		session, ok := s.sessions[address]
		if err != nil || !ok {
			return
		}
		sent, received := p.State.Messages.Sent.Open, p.State.Messages.Received.Open
		if !session.Up {
			why := whyDown(s.AS, session.Peer, sent-session.sent, received-session.received)
			changed, down = changed || why != session.Why, true
			session.Why = why
		}
		session.sent, session.received = sent, received
		s.sessions[address] = session
	})
	if err != nil {
		s.Log.Error("cannot look at the BGP sessions", "err", err)
	}
	if down || err != nil {
		s.pollTimer.Reset(pollInterval)
	}
	s.mu.Unlock()
	if changed {
		s.publish(ctx, s.Sessions)
	}
}

// whyDown says why there is no session, by how many OPEN messages have been sent and received lately.
func whyDown(as uint32, p Peer, sent, received uint64) string {
	switch {
	case sent == 0 && p.Password != "":
		return "no TCP connection; a wrong password looks like this, too"
	case sent == 0:
		return "no TCP connection; a password that is missing looks like this, too"
	case received == 0:
		return "it connects and says nothing; it may not expect this node"
	}
	return fmt.Sprintf("the two do not agree; it is to be of AS %d, and to expect AS %d", p.AS, as)
}

// publish passes on what has changed, unless Run is ending.
func (s *Speaker) publish(ctx context.Context, sessions func() []Session) {
	s.publishing.Lock()
	defer s.publishing.Unlock()
	if ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	next := s.adjRIBsIn.expire(time.Now())
	if !next.IsZero() {
		s.staleTimer.Reset(time.Until(next))
	}
	before := s.synced
	s.synced = s.synced || s.adjRIBsIn.allSynced()
	h := Update{Partial: !s.synced}
	h.Routes, h.Withdrawn = s.adjRIBsIn.changes()
	changed := before != s.synced || len(h.Routes)+len(h.Withdrawn) > 0
	s.mu.Unlock()
	if h.Sessions = sessions(); changed || h.Sessions != nil {
		s.OnUpdate(h)
	}
}
