package bgp

import (
	"net/netip"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// rib is what each peer has told, and what of it counts. A route outlives its session: it is stale until it is told again, and goes
// where all has been told again, another peer that knows takes it back, or nobody has told it for long. So it does not depend on what
// a peer knows of graceful restart, nor when a reflector that has just started says that it has told everything.
type rib struct {
	peers   map[netip.Addr]*heardFrom
	counts  map[macvrf.Key]macvrf.Route
	changed map[macvrf.Key]bool // may count for something else since changes
	serial  uint64
}

// heardFrom is what one peer has told.
type heardFrom struct {
	up     bool
	sweep  time.Time // what is stale goes then; zero: nothing is
	routes map[macvrf.Key]heard
}

type heard struct {
	macvrf.Route
	stale  bool
	serial uint64 // later ones have larger
}

func newRIB() *rib {
	return &rib{peers: map[netip.Addr]*heardFrom{}, counts: map[macvrf.Key]macvrf.Route{}, changed: map[macvrf.Key]bool{}}
}

func (r *rib) peer(address netip.Addr) *heardFrom {
	p := r.peers[address]
	if p == nil {
		p = &heardFrom{routes: map[macvrf.Key]heard{}}
		r.peers[address] = p
	}
	return p
}

func (r *rib) learn(from netip.Addr, route macvrf.Route) {
	r.serial++
	r.peer(from).routes[route.Key] = heard{Route: route, serial: r.serial}
	r.changed[route.Key] = true
}

// forget is a route that is taken back. A peer that has told all that it has to tell speaks for those that are lost, too: with a node
// dies the reflector that was on it.
func (r *rib) forget(from netip.Addr, key macvrf.Key, now time.Time) {
	p := r.peer(from)
	delete(p.routes, key)
	r.changed[key] = true
	if !p.settled(now) {
		return
	}
	for _, other := range r.peers {
		if other.routes[key].stale {
			delete(other.routes, key)
		}
	}
}

// settled says whether the peer is there and has told all that it has to tell.
func (p *heardFrom) settled(now time.Time) bool { return p.up && !p.sweep.After(now) }

// up is the start of a session: all is told again within Settling.
func (r *rib) up(from netip.Addr, now time.Time) {
	p := r.peer(from)
	p.up, p.sweep = true, now.Add(Settling)
}

// down is its end, or the end of the peer. What was told stays for Kept, and for longer while no peer is there to tell better.
func (r *rib) down(from netip.Addr, now time.Time) {
	p := r.peer(from)
	p.up, p.sweep = false, now.Add(Kept)
	for key, h := range p.routes {
		h.stale = true
		p.routes[key] = h
		r.changed[key] = true
	}
}

// clean takes away what is stale and was not told again in time, and says when there is more to take away; zero: that is not known.
func (r *rib) clean(now time.Time) (next time.Time) {
	for address, p := range r.peers {
		switch {
		case p.sweep.IsZero():
		case p.sweep.After(now):
			if next.IsZero() || p.sweep.Before(next) {
				next = p.sweep
			}
		case p.up:
			r.sweep(p)
		case r.settledOne(now):
			r.sweep(p)
			delete(r.peers, address)
		}
	}
	return next
}

func (r *rib) sweep(p *heardFrom) {
	p.sweep = time.Time{}
	for key, h := range p.routes {
		if h.stale {
			delete(p.routes, key)
			r.changed[key] = true
		}
	}
}

// settledOne says whether there is a peer that has told all that it has to tell.
func (r *rib) settledOne(now time.Time) bool {
	for _, p := range r.peers {
		if p.settled(now) {
			return true
		}
	}
	return false
}

// settled says whether all has been told once that the peers which are there have to tell.
func (r *rib) settled() bool {
	settled := false
	for _, p := range r.peers {
		if p.up && !p.sweep.IsZero() {
			return false
		}
		settled = settled || p.up
	}
	return settled
}

// changes are what counts now and did not, or not so, at the last call, and what counts no more.
func (r *rib) changes() (routes []macvrf.Route, gone []macvrf.Key) {
	for key := range r.changed {
		best, ok := r.best(key)
		old, had := r.counts[key]
		switch {
		case ok && had && old.Equal(best):
		case ok:
			r.counts[key] = best
			routes = append(routes, best)
		case had:
			delete(r.counts, key)
			gone = append(gone, key)
		}
	}
	clear(r.changed)
	return routes, gone
}

// best is which of the routes with that key counts: they are all of one router, told by several. One that is not stale comes
// before one that is, then the higher sequence, then the later one.
func (r *rib) best(key macvrf.Key) (best macvrf.Route, ok bool) {
	var b heard
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
