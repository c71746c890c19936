package bgp

import (
	"context"
	"time"

	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// Update says what has changed.
type Update struct {
	Routes    []macvrf.Route // new ones, and those that replace the one with their key
	Withdrawn []macvrf.Key
	Sessions  []Session // all, by address, if one has changed
	Partial   bool      // peers may not have sent all routes yet: a route that is absent may still exist
}

// receivePaths records paths that a peer has sent.
func (s *Speaker) receivePaths(ctx context.Context, paths []*apiutil.Path) {
	s.mu.Lock()
	for _, p := range paths {
		if _, known := s.sessions[p.PeerAddress]; !known || p.Family != bgp.RF_EVPN {
			continue
		}
		key, ok := keyOf(p)
		if !ok || key.RD.Of(s.RouterID) { // FRR sends a node's routes back to the node
			continue
		}
		if p.Withdrawal {
			s.adjRIBsIn.withdraw(p.PeerAddress, key, time.Now())
		} else if r, ok := routeOf(p); ok {
			s.adjRIBsIn.add(p.PeerAddress, r)
		}
	}
	s.mu.Unlock()
	s.publish(ctx, nil)
}

// publish calls OnUpdate if routes have changed or sessions is set, unless Run is ending. sessions returns the
// sessions; nil: none has changed.
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
	u := Update{Partial: !s.synced}
	u.Routes, u.Withdrawn = s.adjRIBsIn.changes()
	changed := before != s.synced || len(u.Routes)+len(u.Withdrawn) > 0
	s.mu.Unlock()
	if sessions != nil {
		u.Sessions = sessions()
	}
	if changed || u.Sessions != nil {
		s.OnUpdate(u)
	}
}
