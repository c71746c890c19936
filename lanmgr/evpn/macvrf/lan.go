package macvrf

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// LAN is a LAN as the node takes part in it.
type LAN struct {
	VNI      uint32
	VTEP     netip.Addr // the node's
	Claimed  bool       // a pod here is attached: without one, nothing is told
	Attached []MAC      // of pods that may not have spoken yet, and need not
	Import   []Target   // routes that bear one of these, or of Export, are the LAN's; none: those whose number is the VNI, of any AS
	Export   []Target   // that the node's routes bear; none: AS:VNI
	Suppress bool       // the node answers for stations on others
	RD       uint16     // the number in the RD of the node's routes, unless another LAN has asked for it; 0: any
}

// Equal says whether two are the same.
func (l LAN) Equal(o LAN) bool {
	return l.VNI == o.VNI && l.VTEP == o.VTEP && l.Claimed == o.Claimed && slices.Equal(l.Attached, o.Attached) &&
		slices.Equal(l.Import, o.Import) && slices.Equal(l.Export, o.Export) && l.RD == o.RD && l.Suppress == o.Suppress
}

// lan is what is known of a LAN.
type lan struct {
	LAN
	rd            RD
	export        []Target
	flood         map[Key]netip.Addr // VTEPs, by the routes that tell them
	macs          map[MAC]*macEntry
	advertised    map[MAC]*macEntry // of those, whom routes of ours tell
	refused       map[Key]Reason
	sampleRefused Key // of those, the one that is named for all
	duplicates    map[MAC]bool
	moves         uint64
	bindings      map[netip.Addr]MAC // of addresses that stations here have shown
	pending       []binding
	neighbors     []segment.Neighbor // sorted; nil: to be made anew. Nobody changes it

	remotes []netip.Addr       // sorted; nil: to be made anew. Nobody changes it
	fdb     []segment.FDBEntry // sorted, but for those of changed. Nobody changes it
	changed map[MAC]bool       // whose entry may be another since
}

// macEntry is what is known of who has a MAC.
type macEntry struct {
	routes     []macRoute  // of others
	learned    bool        // on a port here, as the bridge says
	attached   bool        // the MAC of a pod here
	advertised bool        // by a route of ours
	sequence   uint32      // of that route
	moves      []time.Time // when it was taken from another lately
	frozen     bool        // two have it: each node leaves it where it is
	lastVTEP   netip.Addr  // the VTEP of who was last known to have it

	addresses  []netip.Addr // that it has shown here, the newest last
	replacedAt time.Time    // when one of them last gave way to another
}

// macRoute is one route that tells where a MAC is.
type macRoute struct {
	key      Key
	vtep     netip.Addr
	sequence uint32
	sticky   bool
}

// preferredTo says which of two offers counts: the higher sequence, then the lower VTEP (RFC 7432, 15). One that shall not move
// counts more than any that may (15.2).
func (o macRoute) preferredTo(other macRoute) bool {
	switch {
	case o.sticky != other.sticky:
		return o.sticky
	case o.sequence != other.sequence:
		return o.sequence > other.sequence
	}
	return o.vtep.Less(other.vtep)
}

// bestRoute is the offer of another that counts.
func (s *macEntry) bestRoute() (best macRoute, ok bool) {
	for _, o := range s.routes {
		if !ok || o.preferredTo(best) {
			best, ok = o, true
		}
	}
	return best, ok
}

func (s *macEntry) local() bool { return s.learned || s.attached }

// A MAC that is taken back and forth so often within that time is on two nodes (RFC 7432, 15.1). It is left alone until so
// much time has passed without a move.
const (
	duplicateMoves = 5
	duplicateSpan  = 180 * time.Second
)

// recordMove notes that the MAC was taken from another.
func (s *macEntry) recordMove(now time.Time) {
	s.moves = slices.DeleteFunc(s.moves, func(t time.Time) bool { return now.Sub(t) > duplicateSpan })
	s.moves = append(s.moves, now)
	s.frozen = len(s.moves) >= duplicateMoves
}

// unfreeze ends the time in which the MAC is left alone.
func (s *macEntry) unfreeze(now time.Time) {
	if s.frozen && now.Sub(s.moves[len(s.moves)-1]) > duplicateSpan {
		s.frozen, s.moves = false, nil
	}
}

// MaxMACs is how many MACs of a LAN a node tells the others of, those of attached pods aside. What is sent to the rest is flooded. Each
// takes some 10 KB of every daemon and reflector, and a pod may speak from as many as it likes.
const MaxMACs = 8192

// decide decides who has a MAC. spoke: it has just shown itself on a port here, or its pod has been attached.
func (l *lan) decide(now time.Time, mac MAC, spoke bool) {
	s := l.macs[mac]
	s.unfreeze(now)
	best, other := s.bestRoute()
	mine := macRoute{vtep: l.VTEP, sequence: s.sequence}
	switch {
	case !l.Claimed || !s.local():
		s.advertised, s.sequence, s.frozen = false, 0, false
	case !other:
		s.advertised = s.advertised || s.attached || len(l.advertised) < MaxMACs
	case s.frozen:
	case s.advertised && mine.preferredTo(best):
	case spoke && !best.sticky:
		s.advertised, s.sequence = true, max(best.sequence, best.sequence+1) // the highest stays
		s.recordMove(now)
	default:
		s.advertised, s.sequence = false, 0
	}
	l.updateBindings(now, mac)
	l.neighbors = nil
	if s.advertised {
		l.advertised[mac] = s
	} else {
		delete(l.advertised, mac)
	}
	if !s.local() && !other {
		delete(l.macs, mac)
	} else if at := l.vtepOf(s); at != s.lastVTEP {
		if s.lastVTEP.IsValid() {
			l.moves++
		}
		s.lastVTEP = at
	}
	if l.changed[mac] = true; s.frozen && other {
		l.duplicates[mac] = true
	} else {
		delete(l.duplicates, mac)
	}
}

// vtepOf is the VTEP of who has a MAC, of those that somebody has.
func (l *lan) vtepOf(s *macEntry) netip.Addr {
	if vtep, ok := s.remoteVTEP(); ok {
		return vtep
	}
	return l.VTEP
}

// remoteVTEP is the VTEP behind which a MAC is; none where it is here.
func (s *macEntry) remoteVTEP() (vtep netip.Addr, ok bool) {
	if s.advertised || s.frozen {
		return vtep, false
	}
	best, ok := s.bestRoute()
	return best.vtep, ok
}

// entryy finds or makes what is known of a MAC.
func (l *lan) entry(mac MAC) *macEntry {
	s := l.macs[mac]
	if s == nil {
		s = &macEntry{}
		l.macs[mac] = s
	}
	return s
}

// importRoute takes a route of another in the place of what its key told before.
func (l *lan) importRoute(now time.Time, r Route) {
	if refusal := l.refusalReason(r); refusal != "" {
		l.withdrawRoute(now, r.Key)
		if len(l.refused) == 0 {
			l.sampleRefused = r.Key
		}
		l.refused[r.Key] = refusal
		return
	}
	delete(l.refused, r.Key)
	if r.Type == Multicast {
		if l.flood[r.Key] != r.VTEP {
			l.flood[r.Key], l.remotes = r.VTEP, nil
		}
		return
	}
	s, o := l.entry(r.MAC), macRoute{r.Key, r.VTEP, r.Sequence, r.Sticky}
	if i := s.routeIndex(r.Key); i >= 0 {
		s.routes[i] = o
	} else {
		s.routes = append(s.routes, o)
		if owner, here := l.bindings[r.IP]; here && owner != r.MAC { // another has shown it, elsewhere
			l.unbind(r.IP)
		}
	}
	l.decide(now, r.MAC, false)
}

// withdrawRoute is the end of a route of another.
func (l *lan) withdrawRoute(now time.Time, k Key) {
	delete(l.refused, k)
	if _, ok := l.flood[k]; ok {
		delete(l.flood, k)
		l.remotes = nil
	}
	s := l.macs[k.MAC]
	if s == nil || k.Type != MACIP {
		return
	}
	if i := s.routeIndex(k); i >= 0 {
		s.routes = slices.Delete(s.routes, i, i+1)
		l.decide(now, k.MAC, false)
	}
}

func (s *macEntry) routeIndex(k Key) int {
	return slices.IndexFunc(s.routes, func(o macRoute) bool { return o.key == k })
}

// Refusal is a route of a LAN that cannot be used.
type Refusal struct {
	Route  Route
	Reason Reason
}

// Reason is why a route cannot be used.
type Reason string

// The reasons.
const (
	OwnVTEP       Reason = "its VTEP is this node's own"
	InvalidVTEP   Reason = "its VTEP is no address that packets could be sent to"
	OtherFamily   Reason = "its VTEP is of the other IP version"
	OtherVNI      Reason = "it bears another VNI than the LAN"
	Encapsulation Reason = "it is not for VXLAN with a copy to each VTEP"
	VLANAware     Reason = "it has an Ethernet tag: it is of a VLAN-aware bundle"
	InvalidMAC    Reason = "its MAC is none that a station could have"
)

func (r Refusal) String() string {
	what := fmt.Sprintf("the route of type %d from VTEP %s", r.Route.Type, r.Route.VTEP)
	if r.Route.Type == MACIP {
		what += " for " + r.Route.MAC.String()
	}
	return fmt.Sprintf("%s is not used: %s", what, r.Reason)
}

// refusalReason says why a route cannot be used; empty if it can.
func (l *lan) refusalReason(r Route) Reason {
	v := r.VTEP
	switch {
	case !v.IsValid() || v.IsUnspecified() || v.IsMulticast() || v.IsLoopback() || v.IsLinkLocalUnicast() || v.Zone() != "":
		return InvalidVTEP
	case v == l.VTEP:
		return OwnVTEP
	case v.BitLen() != l.VTEP.BitLen() || v.Is4In6():
		return OtherFamily
	case r.Unsupported:
		return Encapsulation
	case r.VNI != l.VNI:
		return OtherVNI
	case r.Tag != 0:
		return VLANAware
	case r.Type == MACIP && (r.MAC == MAC{} || r.MAC[0]&1 != 0):
		return InvalidMAC
	}
	return ""
}

// Count is how much there is of a LAN.
type Count struct {
	Advertised, Used, Refused int    // routes: the node's, others' that count, and others' that cannot be used
	Local, Remote, Duplicate  int    // MACs: on this node, on others, and on both
	Moves                     uint64 // of MACs from one of the nodes to another, since the LAN is here
}

func (l *lan) count() Count {
	c := Count{Advertised: len(l.routes()), Used: len(l.flood), Refused: len(l.refused), Duplicate: len(l.duplicates), Moves: l.moves}
	for mac, s := range l.macs {
		c.Used += len(s.routes)
		if _, elsewhere := s.remoteVTEP(); elsewhere {
			c.Remote++
		} else if !l.duplicates[mac] {
			c.Local++
		}
	}
	return c
}

// routes are the node's routes in the LAN.
func (l *lan) routes() []Route {
	if !l.Claimed || !l.VTEP.IsValid() {
		return nil
	}
	route := Route{Key: Key{Type: Multicast, RD: l.rd, IP: l.VTEP}, VTEP: l.VTEP, VNI: l.VNI, Targets: l.export}
	routes := []Route{route}
	route.Key = Key{Type: MACIP, RD: l.rd}
	for mac, s := range l.advertised {
		route.MAC, route.Sequence, route.IP = mac, s.sequence, netip.Addr{}
		routes = append(routes, route)
		for _, route.IP = range s.addresses {
			routes = append(routes, route)
		}
	}
	return routes
}

// forwarding is what the LAN's segment has to have. Of what stays the same nothing is looked at again but the list it is in.
func (l *lan) forwarding() (remotes []netip.Addr, fdb []segment.FDBEntry) {
	if l.remotes == nil {
		remotes := slices.Collect(maps.Values(l.flood))
		slices.SortFunc(remotes, netip.Addr.Compare)
		l.remotes = append([]netip.Addr{}, slices.Compact(remotes)...)
	}
	if len(l.changed) > 0 {
		fdb := make([]segment.FDBEntry, 0, len(l.fdb)+len(l.changed))
		news := slices.SortedFunc(maps.Keys(l.changed), MAC.compare)
		for _, e := range l.fdb {
			for len(news) > 0 && news[0].compare(e.MAC) < 0 {
				fdb, news = l.appendEntry(fdb, news[0]), news[1:]
			}
			if !l.changed[e.MAC] {
				fdb = append(fdb, e)
			}
		}
		for _, mac := range news {
			fdb = l.appendEntry(fdb, mac)
		}
		l.fdb, l.changed = fdb, map[MAC]bool{}
	}
	return l.remotes, l.fdb
}

func (l *lan) appendEntry(fdb []segment.FDBEntry, mac MAC) []segment.FDBEntry {
	if s := l.macs[mac]; s != nil {
		if vtep, ok := s.remoteVTEP(); ok {
			return append(fdb, segment.FDBEntry{MAC: mac, VTEP: vtep, Local: s.learned})
		}
	}
	return fdb
}

func (m MAC) compare(o MAC) int { return slices.Compare(m[:], o[:]) }
