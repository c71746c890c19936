package bgp

import (
	"net/netip"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// adjRIBsIn holds the Adj-RIB-In of each peer, and the best route of each key.
//
// A route outlives its session: it is stale until it is received again. It is deleted once a peer has sent all its
// routes again without it, once another peer that has sent all withdraws it, or after StaleTime. So it does not matter
// what a peer knows of graceful restart, nor when a reflector that has just started sends its End-of-RIB.
type adjRIBsIn struct {
	peers   map[netip.Addr]*adjRIBIn
	best    map[macvrf.Key]macvrf.Route
	changed map[macvrf.Key]bool // keys whose best route may have changed since the last call of changes
	serial  uint64
}

// adjRIBIn holds the routes received from one peer.
type adjRIBIn struct {
	up         bool
	staleUntil time.Time // stale routes are deleted then; zero: there are none
	routes     map[macvrf.Key]receivedRoute
}

type receivedRoute struct {
	macvrf.Route
	stale  bool
	serial uint64 // larger in routes received later
}

func newAdjRIBsIn() *adjRIBsIn {
	return &adjRIBsIn{
		peers: map[netip.Addr]*adjRIBIn{}, best: map[macvrf.Key]macvrf.Route{}, changed: map[macvrf.Key]bool{},
	}
}

func (r *adjRIBsIn) peer(address netip.Addr) *adjRIBIn {
	p := r.peers[address]
	if p == nil {
		p = &adjRIBIn{routes: map[macvrf.Key]receivedRoute{}}
		r.peers[address] = p
	}
	return p
}

// add records a route that a peer advertises.
func (r *adjRIBsIn) add(from netip.Addr, route macvrf.Route) {
	r.serial++
	r.peer(from).routes[route.Key] = receivedRoute{Route: route, serial: r.serial}
	r.changed[route.Key] = true
}

// withdraw records that a peer withdraws a route. If the peer has sent all its routes, the stale routes of other peers
// with that key are deleted, too: when a node dies, the reflector that was on it cannot withdraw the node's routes.
func (r *adjRIBsIn) withdraw(from netip.Addr, key macvrf.Key, now time.Time) {
	p := r.peer(from)
	delete(p.routes, key)
	r.changed[key] = true
	if !p.synced(now) {
		return
	}
	for _, other := range r.peers {
		if other.routes[key].stale {
			delete(other.routes, key)
		}
	}
}

// synced reports whether the peer is up and has sent all its routes.
func (p *adjRIBIn) synced(now time.Time) bool { return p.up && !p.staleUntil.After(now) }

// sessionUp records the start of a session: the peer sends all its routes again within SyncTime.
func (r *adjRIBsIn) sessionUp(from netip.Addr, now time.Time) {
	p := r.peer(from)
	p.up, p.staleUntil = true, now.Add(SyncTime)
}

// sessionDown records the end of a session, or that the peer was removed. Its routes stay for StaleTime, and longer
// while no other peer is up.
func (r *adjRIBsIn) sessionDown(from netip.Addr, now time.Time) {
	p := r.peer(from)
	p.up, p.staleUntil = false, now.Add(StaleTime)
	for key, route := range p.routes {
		route.stale = true
		p.routes[key] = route
		r.changed[key] = true
	}
}

// expire deletes stale routes whose time is over. It returns when the next ones are due; zero: that is not known.
func (r *adjRIBsIn) expire(now time.Time) (next time.Time) {
	for address, p := range r.peers {
		switch {
		case p.staleUntil.IsZero():
		case p.staleUntil.After(now):
			if next.IsZero() || p.staleUntil.Before(next) {
				next = p.staleUntil
			}
		case p.up:
			r.deleteStale(p)
		case r.anySynced(now):
			r.deleteStale(p)
			delete(r.peers, address)
		}
	}
	return next
}

func (r *adjRIBsIn) deleteStale(p *adjRIBIn) {
	p.staleUntil = time.Time{}
	for key, route := range p.routes {
		if route.stale {
			delete(p.routes, key)
			r.changed[key] = true
		}
	}
}

// anySynced reports whether some peer is up and has sent all its routes.
func (r *adjRIBsIn) anySynced(now time.Time) bool {
	for _, p := range r.peers {
		if p.synced(now) {
			return true
		}
	}
	return false
}

// allSynced reports whether a peer is up, and all that are have sent their routes.
func (r *adjRIBsIn) allSynced() bool {
	synced := false
	for _, p := range r.peers {
		if p.up && !p.staleUntil.IsZero() {
			return false
		}
		synced = synced || p.up
	}
	return synced
}

// changes returns the best routes that are new or differ since its last call, and the keys that have no route any more.
func (r *adjRIBsIn) changes() (routes []macvrf.Route, withdrawn []macvrf.Key) {
	for key := range r.changed {
		best, ok := r.bestRoute(key)
		old, had := r.best[key]
		switch {
		case ok && had && old.Equal(best):
		case ok:
			r.best[key] = best
			routes = append(routes, best)
		case had:
			delete(r.best, key)
			withdrawn = append(withdrawn, key)
		}
	}
	clear(r.changed)
	return routes, withdrawn
}

// bestRoute selects one of the routes with a key. All are of one router, received from several peers. A route that is
// not stale is better than a stale one, then the one with the higher sequence, then the one received later.
func (r *adjRIBsIn) bestRoute(key macvrf.Key) (best macvrf.Route, ok bool) {
	var b receivedRoute
	for _, p := range r.peers {
		route, received := p.routes[key]
		switch {
		case !received:
		case !ok, route.betterThan(b):
			b, ok = route, true
		}
	}
	return b.Route, ok
}

func (route receivedRoute) betterThan(other receivedRoute) bool {
	switch {
	case route.stale != other.stale:
		return other.stale
	case route.Sequence != other.Sequence:
		return route.Sequence > other.Sequence
	}
	return route.serial > other.serial
}
