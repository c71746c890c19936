package bgp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

// Session is the state of the session with a peer.
type Session struct {
	Peer  Peer
	Up    bool
	Since time.Time // when it came up or went down
	Why   string    // it is down, as far as that is known

	sent, received  uint64 // OPEN messages until the last poll
	passwordChanged bool   // the peer has another password since the session came up
}

// Sessions returns the sessions, sorted by address.
func (s *Speaker) Sessions() []Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.SortedFunc(maps.Values(s.sessions), func(a, b Session) int {
		return a.Peer.Address.Compare(b.Peer.Address)
	})
}

// SetPeers replaces the peers. A session goes on if its peer is the same or differs only in its password, which then
// counts from the next connection on. The routes of a peer that is removed stay as after the loss of its session.
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
	if p.AS != s.AS { // the routes of other nodes come back from another AS with the nodes' own AS in their path
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

// receiveState records that a session came up or went down.
func (s *Speaker) receiveState(ctx context.Context, p apiutil.Peer, at time.Time) {
	if s.setState(ctx, p, at) {
		s.publish(ctx, s.Sessions)
	}
}

func (s *Speaker) setState(ctx context.Context, p apiutil.Peer, at time.Time) (changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	session, ok := s.sessions[p.State.NeighborAddress]
	up := p.State.SessionState == bgp.BGP_FSM_ESTABLISHED
	if !ok || up == session.Up {
		return false
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
	return true
}

// recreatePeer makes the next session use the new password of a peer; s.mu is held.
func (s *Speaker) recreatePeer(ctx context.Context, old Peer) error {
	if err := s.removePeer(ctx, old); err != nil {
		return err
	}
	return s.addPeer(ctx, s.peers[old.Address])
}

// pollSessions finds out why sessions are down, and publishes the reasons that have changed.
func (s *Speaker) pollSessions(ctx context.Context) {
	if s.updateReasons(ctx) {
		s.publish(ctx, s.Sessions)
	}
}

func (s *Speaker) updateReasons(ctx context.Context) (changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.server == nil {
		return false
	}
	down := false
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
		s.Log.Error("cannot list the BGP sessions", "err", err)
	}
	if down || err != nil {
		s.pollTimer.Reset(pollInterval)
	}
	return changed
}

// whyDown returns why there is no session, by how many OPEN messages were sent and received since the last poll.
func whyDown(as uint32, p Peer, sent, received uint64) string {
	switch {
	case sent == 0 && p.Password != "":
		return "no TCP connection; a wrong password looks like this, too"
	case sent == 0:
		return "no TCP connection; a password that is missing looks like this, too"
	case received == 0:
		return "it connects and says nothing; it may not expect this node"
	}
	return fmt.Sprintf("the two do not agree; it should have AS %d, and expect AS %d", p.AS, as)
}
