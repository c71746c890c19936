package macvrf

import (
	"net/netip"
	"slices"
	"time"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// LAN is a LAN as the node takes part in it.
type LAN struct {
	VNI      uint32
	VTEP     netip.Addr // of this node
	Claimed  bool       // the LAN has an attachment on this node; without one, the node advertises nothing
	Attached []MAC      // of attached pods, which are advertised before they send a frame
	Import   []Target   // it imports routes with one of these or of Export; empty: of any AS with the VNI
	Export   []Target   // of the routes that the node advertises; empty: AS:VNI
	Suppress bool       // the node answers for hosts on other nodes
	RD       uint16     // the number in the RD of the node's routes, unless another LAN has asked for it; 0: any
}

// Equal reports whether two LANs are the same.
func (l LAN) Equal(o LAN) bool {
	return l.VNI == o.VNI && l.VTEP == o.VTEP && l.Claimed == o.Claimed && slices.Equal(l.Attached, o.Attached) &&
		slices.Equal(l.Import, o.Import) && slices.Equal(l.Export, o.Export) && l.RD == o.RD && l.Suppress == o.Suppress
}

// lan is the MAC-VRF of one LAN. Its lists are replaced, never changed in place.
type lan struct {
	LAN
	rd            RD
	export        []Target
	flood         map[Key]netip.Addr // VTEPs by their Multicast routes
	macs          map[MAC]*macEntry
	advertised    map[MAC]*macEntry // the entries of macs that this node advertises
	refused       map[Key]Reason
	sampleRefused Key // the key in refused that messages name
	duplicates    map[MAC]bool
	moves         uint64
	bindings      map[netip.Addr]MAC // of local hosts
	pending       []binding          // of MACs that the bridge has not reported yet
	neighbors     []segment.Neighbor // sorted; nil: to be computed
	remotes       []netip.Addr       // sorted; nil: to be computed
	fdb           []segment.FDBEntry // sorted; out of date for the MACs in changed
	changed       map[MAC]bool       // MACs whose FDB entry may differ from that in fdb
}

func newLAN() *lan {
	return &lan{
		macs: map[MAC]*macEntry{}, advertised: map[MAC]*macEntry{}, duplicates: map[MAC]bool{},
		bindings: map[netip.Addr]MAC{}, fdb: []segment.FDBEntry{}, changed: map[MAC]bool{},
	}
}

// imports reports whether the LAN imports routes with that target. Like FRR, it compares the number without the AS,
// because other routers may have another AS (map_vni_to_rt in bgpd/bgp_evpn.c).
func (l *lan) imports(t Target) bool {
	if slices.Contains(l.export, t) { // the LAN's other nodes export it
		return true
	}
	if len(l.Import) > 0 {
		return slices.Contains(l.Import, t)
	}
	number, ok := t.number()
	return ok && number == l.VNI
}

// importRoute adds a route to the LAN, or replaces the one with its key.
func (l *lan) importRoute(now time.Time, r Route) {
	if reason := l.refusalReason(r); reason != "" {
		l.withdrawRoute(now, r.Key)
		if len(l.refused) == 0 {
			l.sampleRefused = r.Key
		}
		l.refused[r.Key] = reason
		return
	}
	delete(l.refused, r.Key)
	if r.Type == Multicast {
		if l.flood[r.Key] != r.VTEP {
			l.flood[r.Key], l.remotes = r.VTEP, nil
		}
		return
	}
	e, route := l.entry(r.MAC), macRoute{r.Key, r.VTEP, r.Sequence, r.Sticky}
	if i := e.routeIndex(r.Key); i >= 0 {
		e.routes[i] = route
	} else {
		e.routes = append(e.routes, route)
		if mac, ok := l.bindings[r.IP]; ok && mac != r.MAC { // the address is bound on another node since
			l.unbind(r.IP)
		}
	}
	l.decide(now, r.MAC, false)
}

// withdrawRoute removes a route from the LAN.
func (l *lan) withdrawRoute(now time.Time, k Key) {
	delete(l.refused, k)
	if _, ok := l.flood[k]; ok {
		delete(l.flood, k)
		l.remotes = nil
	}
	e := l.macs[k.MAC]
	if e == nil || k.Type != MACIP {
		return
	}
	if i := e.routeIndex(k); i >= 0 {
		e.routes = slices.Delete(e.routes, i, i+1)
		l.decide(now, k.MAC, false)
	}
}

// routes returns the routes that the node advertises for the LAN.
func (l *lan) routes() []Route {
	if !l.Claimed || !l.VTEP.IsValid() {
		return nil
	}
	route := Route{Key: Key{Type: Multicast, RD: l.rd, IP: l.VTEP}, VTEP: l.VTEP, VNI: l.VNI, Targets: l.export}
	routes := []Route{route}
	route.Key = Key{Type: MACIP, RD: l.rd}
	for mac, e := range l.advertised {
		route.MAC, route.Sequence, route.IP = mac, e.sequence, netip.Addr{}
		routes = append(routes, route)
		for _, route.IP = range e.addresses {
			routes = append(routes, route)
		}
	}
	return routes
}

// Count counts the routes and MACs of a LAN.
type Count struct {
	Advertised int    // routes of this node
	Used       int    // routes of others
	Refused    int    // routes of others that cannot be used
	Local      int    // MACs on this node
	Remote     int    // MACs on other nodes
	Duplicate  int    // MACs on this node and on another
	Moves      uint64 // of MACs from one node to another, since the node takes part in the LAN
}

func (l *lan) count() Count {
	c := Count{
		Advertised: len(l.routes()), Used: len(l.flood), Refused: len(l.refused),
		Duplicate: len(l.duplicates), Moves: l.moves,
	}
	for mac, e := range l.macs {
		c.Used += len(e.routes)
		if _, remote := e.remoteVTEP(); remote {
			c.Remote++
		} else if !l.duplicates[mac] {
			c.Local++
		}
	}
	return c
}
