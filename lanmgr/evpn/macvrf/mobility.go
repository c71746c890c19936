package macvrf

import (
	"net/netip"
	"slices"
	"time"
)

// macEntry is what the MAC-VRF knows of one MAC.
type macEntry struct {
	routes     []macRoute  // of others
	learned    bool        // by the bridge, on a local port
	attached   bool        // it is the MAC of a pod that is attached on this node
	advertised bool        // by this node
	sequence   uint32      // of the route that advertises it
	moves      []time.Time // when it moved to this node lately
	frozen     bool        // it is a duplicate: each node keeps it where it is
	lastVTEP   netip.Addr  // behind which it was last

	addresses  []netip.Addr // bound to it on this node, the newest last
	replacedAt time.Time    // when the oldest of them was last replaced
}

// macRoute is one route that says behind which VTEP a MAC is.
type macRoute struct {
	key      Key
	vtep     netip.Addr
	sequence uint32
	sticky   bool
}

// preferredTo orders routes of one MAC: the higher sequence wins, then the lower VTEP (RFC 7432, 15). A sticky route
// wins over any other (15.2).
func (r macRoute) preferredTo(other macRoute) bool {
	switch {
	case r.sticky != other.sticky:
		return r.sticky
	case r.sequence != other.sequence:
		return r.sequence > other.sequence
	}
	return r.vtep.Less(other.vtep)
}

// bestRoute returns the preferred route of the other nodes.
func (e *macEntry) bestRoute() (best macRoute, ok bool) {
	for _, r := range e.routes {
		if !ok || r.preferredTo(best) {
			best, ok = r, true
		}
	}
	return best, ok
}

func (e *macEntry) routeIndex(k Key) int {
	return slices.IndexFunc(e.routes, func(r macRoute) bool { return r.key == k })
}

func (e *macEntry) local() bool { return e.learned || e.attached }

// remoteVTEP returns the VTEP behind which the MAC is; ok is false if it is on this node.
func (e *macEntry) remoteVTEP() (vtep netip.Addr, ok bool) {
	if e.advertised || e.frozen {
		return vtep, false
	}
	best, ok := e.bestRoute()
	return best.vtep, ok
}

// A MAC that moves to this node duplicateMoves times within duplicateSpan is on two nodes (RFC 7432, 15.1). It is
// frozen until duplicateSpan has passed without a move.
const (
	duplicateMoves = 5
	duplicateSpan  = 180 * time.Second
)

// recordMove records that the MAC has moved from another node to this one.
func (e *macEntry) recordMove(now time.Time) {
	e.moves = slices.DeleteFunc(e.moves, func(t time.Time) bool { return now.Sub(t) > duplicateSpan })
	e.moves = append(e.moves, now)
	e.frozen = len(e.moves) >= duplicateMoves
}

// unfreeze lets the MAC move again if it has not moved for duplicateSpan.
func (e *macEntry) unfreeze(now time.Time) {
	if e.frozen && now.Sub(e.moves[len(e.moves)-1]) > duplicateSpan {
		e.frozen, e.moves = false, nil
	}
}

// MaxMACs is how many MACs of a LAN a node advertises, besides those of attached pods. Frames to the others are
// flooded. Each advertised MAC costs every daemon and reflector some 10 KB, and a pod may send from as many MACs as it
// likes.
const MaxMACs = 8192

// decide selects the node that has a MAC, and advertises the MAC if it is this one. appeared says that the MAC has just
// sent a frame on a local port, or that its pod has just been attached.
func (l *lan) decide(now time.Time, mac MAC, appeared bool) {
	e := l.macs[mac]
	e.unfreeze(now)
	best, remote := e.bestRoute()
	own := macRoute{vtep: l.VTEP, sequence: e.sequence}
	switch {
	case !l.Claimed || !e.local():
		e.advertised, e.sequence, e.frozen = false, 0, false
	case !remote:
		e.advertised = e.advertised || e.attached || len(l.advertised) < MaxMACs
	case e.frozen:
	case e.advertised && own.preferredTo(best):
	case appeared && !best.sticky:
		e.advertised, e.sequence = true, max(best.sequence, best.sequence+1) // the highest number does not wrap
		e.recordMove(now)
	default:
		e.advertised, e.sequence = false, 0
	}
	l.updateBindings(now, mac)
	l.noteDecision(mac, e, remote)
}

// noteDecision updates what the LAN keeps about a MAC besides its entry.
func (l *lan) noteDecision(mac MAC, e *macEntry, remote bool) {
	l.neighbors = nil
	l.changed[mac] = true
	if e.advertised {
		l.advertised[mac] = e
	} else {
		delete(l.advertised, mac)
	}
	if e.frozen && remote {
		l.duplicates[mac] = true
	} else {
		delete(l.duplicates, mac)
	}
	if !e.local() && !remote {
		delete(l.macs, mac)
	} else if vtep := l.vtepOf(e); vtep != e.lastVTEP {
		if e.lastVTEP.IsValid() {
			l.moves++
		}
		e.lastVTEP = vtep
	}
}

// vtepOf returns the VTEP behind which a MAC is, that of this node included.
func (l *lan) vtepOf(e *macEntry) netip.Addr {
	if vtep, ok := e.remoteVTEP(); ok {
		return vtep
	}
	return l.VTEP
}

// entry returns the entry of a MAC; it adds one if there is none.
func (l *lan) entry(mac MAC) *macEntry {
	e := l.macs[mac]
	if e == nil {
		e = &macEntry{}
		l.macs[mac] = e
	}
	return e
}
