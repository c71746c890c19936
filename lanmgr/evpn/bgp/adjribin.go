package bgp

import (
	"net/netip"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// adjRIBsIn is what each peer has told, and what of it counts. A route outlives its session: it is stale until it is told again, and goes
// where all has been told again, another peer that knows takes it back, or nobody has told it for long. So it does not depend on what
// a peer knows of graceful restart, nor when a reflector that has just started says that it has told everything.
type adjRIBsIn struct {
	peers   map[netip.Addr]*adjRIBIn
	best    map[macvrf.Key]macvrf.Route
	changed map[macvrf.Key]bool // may count for something else since changes
	serial  uint64
}

// adjRIBIn is what one peer has told.
type adjRIBIn struct {
	up         bool
	staleUntil time.Time // what is stale goes then; zero: nothing is
	routes     map[macvrf.Key]receivedRoute
}

type receivedRoute struct {
	macvrf.Route
	stale  bool
	serial uint64 // later ones have larger
}

func newAdjRIBsIn() *adjRIBsIn {
	return &adjRIBsIn{peers: map[netip.Addr]*adjRIBIn{}, best: map[macvrf.Key]macvrf.Route{}, changed: map[macvrf.Key]bool{}}
}

func (r *adjRIBsIn) peer(address netip.Addr) *adjRIBIn {
	p := r.peers[address]
	if p == nil {
		p = &adjRIBIn{routes: map[macvrf.Key]receivedRoute{}}
		r.peers[address] = p
	}
	return p
}

func (r *adjRIBsIn) add(from netip.Addr, route macvrf.Route) {
	r.serial++
	r.peer(from).routes[route.Key] = receivedRoute{Route: route, serial: r.serial}
	r.changed[route.Key] = true
}

// withdraw is a route that is taken back. A peer that has told all that it has to tell speaks for those that are lost, too: with a node
// dies the reflector that was on it.
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

// synced says whether the peer is there and has told all that it has to tell.
func (p *adjRIBIn) synced(now time.Time) bool { return p.up && !p.staleUntil.After(now) }

// sessionUp is the start of a session: all is told again within Settling.
func (r *adjRIBsIn) sessionUp(from netip.Addr, now time.Time) {
	p := r.peer(from)
	p.up, p.staleUntil = true, now.Add(SyncTime)
}

// sessionDown is its end, or the end of the peer. What was told stays for Kept, and for longer while no peer is there to tell better.
func (r *adjRIBsIn) sessionDown(from netip.Addr, now time.Time) {
	p := r.peer(from)
	p.up, p.staleUntil = false, now.Add(StaleTime)
	for key, h := range p.routes {
		h.stale = true
		p.routes[key] = h
		r.changed[key] = true
	}
}

// expire takes away what is stale and was not told again in time, and says when there is more to take away; zero: that is not known.
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
	for key, h := range p.routes {
		if h.stale {
			delete(p.routes, key)
			r.changed[key] = true
		}
	}
}

// anySynced says whether there is a peer that has told all that it has to tell.
func (r *adjRIBsIn) anySynced(now time.Time) bool {
	for _, p := range r.peers {
		if p.synced(now) {
			return true
		}
	}
	return false
}

// allSynced says whether all has been told once that the peers which are there have to tell.
func (r *adjRIBsIn) allSynced() bool {
	settled := false
	for _, p := range r.peers {
		if p.up && !p.staleUntil.IsZero() {
			return false
		}
		settled = settled || p.up
	}
	return settled
}

// changes are what counts now and did not, or not so, at the last call, and what counts no more.
func (r *adjRIBsIn) changes() (routes []macvrf.Route, gone []macvrf.Key) {
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
			gone = append(gone, key)
		}
	}
	clear(r.changed)
	return routes, gone
}

// bestRoute is which of the routes with that key counts: they are all of one router, told by several. One that is not stale comes
// before one that is, then the higher sequence, then the later one.
func (r *adjRIBsIn) bestRoute(key macvrf.Key) (best macvrf.Route, ok bool) {
	var b receivedRoute
	for _, p := range r.peers {
		h, told := p.routes[key]
		switch {
		case !told:
		case !ok, h.stale != b.stale && b.stale, h.stale == b.stale && h.Sequence > b.Sequence,
			h.stale == b.stale && h.Sequence == b.Sequence && h.serial > b.serial:
			b, ok = h, true
		}
	}
	return b.Route, ok
}
