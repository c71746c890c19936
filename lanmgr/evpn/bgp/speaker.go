// Package bgp holds the BGP sessions of a node's speaker and of a reflector. It converts between macvrf's routes and
// those of gobgp, which speaks the protocol.
package bgp

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/server"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// The times of sessions.
const (
	// HoldTime is how long a peer may send nothing; it is asked for keepalives three times as often.
	HoldTime = 9 * time.Second
	// RestartTime is how long peers keep the routes of a node whose session is lost. A daemon that restarts is back by
	// then.
	RestartTime = 20 * time.Second
	// StaleTime is how long a node keeps the routes of a peer whose session is lost, if other peers do not withdraw
	// them.
	StaleTime = 2 * time.Minute
	// SyncTime is how long after the start of a session a peer may still send routes that it had before. A reflector
	// that has restarted needs that long to receive them from all nodes: they notice its end after HoldTime at the
	// latest, and try to connect every connectRetry.
	SyncTime = HoldTime + 2*connectRetry
	// connectRetry is the time between a failed attempt to connect and the next one.
	connectRetry = 3 * time.Second
	// pollInterval is how often the speaker asks gobgp why a session is down: gobgp reports no failed attempts.
	pollInterval = 2 * connectRetry
)

// Config configures a Speaker.
type Config struct {
	AS       uint32
	RouterID netip.Addr // an IPv4 address that no other router has as its ID
	// OnUpdate receives what has changed. One goroutine calls it at a time, and none after Run has returned.
	OnUpdate func(Update)
	// WithdrawOnStop makes Run withdraw all routes at its end. Without it peers keep them for RestartTime.
	WithdrawOnStop bool
	Log            *slog.Logger
}

// Speaker advertises a node's routes to its peers and receives theirs. It connects to them and never listens: another
// program on the node may have port 179.
type Speaker struct {
	Config
	publishing sync.Mutex // held while OnUpdate is called; taken before mu

	mu         sync.Mutex
	server     *server.BgpServer // nil unless Run is running
	peers      map[netip.Addr]Peer
	sessions   map[netip.Addr]Session
	want       map[macvrf.Key]macvrf.Route // to advertise
	adjRIBOut  map[macvrf.Key]macvrf.Route // advertised
	adjRIBsIn  *adjRIBsIn
	synced     bool        // all peers had sent their routes at some time
	staleTimer *time.Timer // fires when stale routes in adjRIBsIn are due
	pollTimer  *time.Timer // fires when sessions that are down are due to be polled
}

// NewSpeaker returns a speaker that does nothing until Run is called.
func NewSpeaker(c Config) *Speaker {
	return &Speaker{
		Config: c, peers: map[netip.Addr]Peer{}, sessions: map[netip.Addr]Session{},
		want: map[macvrf.Key]macvrf.Route{}, adjRIBOut: map[macvrf.Key]macvrf.Route{}, adjRIBsIn: newAdjRIBsIn(),
	}
}

// Run holds the sessions until ctx ends. Unless WithdrawOnStop is set it then closes them without a notification, so
// that peers keep the node's routes for RestartTime.
func (s *Speaker) Run(ctx context.Context) error {
	srv := newServer(s.Log)
	served := make(chan struct{})
	go func() { defer close(served); srv.Serve() }()
	if err := s.start(ctx, srv); err != nil {
		srv.Stop()
		<-served
		if ctx.Err() != nil {
			err = nil // the failure comes from the end of ctx
		}
		return err
	}
	<-ctx.Done()
	s.detach()
	// The watch has ended with ctx, so s does not see that the server drops the routes it has received.
	err := srv.StopBgp(context.WithoutCancel(ctx), &api.StopBgpRequest{AllowGracefulRestart: !s.WithdrawOnStop})
	<-served
	return err
}

// detach waits until OnUpdate has returned, and marks all received routes as stale.
func (s *Speaker) detach() {
	s.publishing.Lock()
	defer s.publishing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for address, session := range s.sessions {
		if session.Up {
			s.adjRIBsIn.sessionDown(address, time.Now())
		}
	}
	s.server = nil
	s.staleTimer.Stop()
	s.pollTimer.Stop()
}

func (s *Speaker) start(ctx context.Context, srv *server.BgpServer) error {
	global := &api.Global{Asn: s.AS, RouterId: s.RouterID.String(), ListenPort: -1}
	if err := srv.StartBgp(ctx, &api.StartBgpRequest{Global: global}); err != nil {
		return fmt.Errorf("start BGP with AS %d and router ID %s: %w", s.AS, s.RouterID, err)
	}
	if err := rejectReceivedRoutes(ctx, srv); err != nil {
		return err
	}
	if err := filterIPv6VTEPs(ctx, srv); err != nil {
		return err
	}
	err := srv.WatchEvent(ctx, server.WatchEventMessageCallbacks{
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
	s.staleTimer = time.AfterFunc(time.Hour, func() { s.publish(ctx, nil) })
	s.pollTimer = time.AfterFunc(pollInterval, func() { s.pollSessions(ctx) })
	for _, p := range s.peers {
		if err := s.addPeer(ctx, p); err != nil {
			return err
		}
	}
	return s.advertise()
}
