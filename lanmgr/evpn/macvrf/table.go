package macvrf

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Table is what one node knows of EVPN. It is for one goroutine.
type Table struct {
	as     uint32
	router netip.Addr
	lans   map[uint32]*lan // by VNI
	routes map[Key]Route   // of others; also those of no LAN here, for LANs that come later
}

// New returns the table of a router with that AS and ID, which is an IPv4 address.
func New(as uint32, router netip.Addr) *Table {
	return &Table{as: as, router: router, lans: map[uint32]*lan{}, routes: map[Key]Route{}}
}

// Set says which LANs the node takes part in; it replaces what was said before.
func (t *Table) Set(now time.Time, lans []LAN) {
	stay := make(map[uint32]bool, len(lans))
	for _, l := range lans {
		stay[l.VNI] = true
	}
	for vni := range t.lans {
		if !stay[vni] {
			delete(t.lans, vni)
		}
	}
	numbers := t.rdNumbers(lans)
	for _, l := range lans {
		t.setLAN(now, l)
		t.lans[l.VNI].rd = routerRD(t.router, numbers[l.VNI])
	}
}

// rdNumbers gives each LAN a number for its RD that no other has here: what it asks for, else the one that it has, else its VNI if that fits, or
// the next that is free.
func (t *Table) rdNumbers(lans []LAN) map[uint32]uint16 {
	type wish struct {
		rank   int // who comes first
		vni    uint32
		number uint16
	}
	var wishes []wish
	for _, l := range lans {
		w, here := wish{3, l.VNI, uint16(l.VNI)}, t.lans[l.VNI]
		switch {
		case l.RD != 0 && here != nil && here.rdNumber() == l.RD:
			w.rank, w.number = 0, l.RD
		case l.RD != 0:
			w.rank, w.number = 1, l.RD
		case here != nil && here.RD == 0:
			w.rank, w.number = 2, here.rdNumber()
		}
		wishes = append(wishes, w)
	}
	slices.SortFunc(wishes, func(a, b wish) int { return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.vni, b.vni)) })
	numbers, taken := make(map[uint32]uint16, len(lans)), make(map[uint16]bool, len(lans))
	for _, w := range wishes {
		for taken[w.number] {
			w.number++
		}
		numbers[w.vni], taken[w.number] = w.number, true
	}
	return numbers
}

func (t *Table) setLAN(now time.Time, want LAN) {
	l := t.lans[want.VNI]
	if l != nil && l.LAN.Equal(want) {
		return
	}
	anew := l == nil || l.VTEP != want.VTEP || !slices.Equal(l.Import, want.Import) || !slices.Equal(l.Export, want.Export)
	if l == nil {
		l = &lan{fdb: []segment.FDBEntry{}, macs: map[MAC]*macEntry{}, advertised: map[MAC]*macEntry{}, duplicates: map[MAC]bool{}, changed: map[MAC]bool{}, bindings: map[netip.Addr]MAC{}}
		t.lans[want.VNI] = l
	}
	claimed, otherwise := want.Claimed && !l.Claimed, want.Claimed != l.Claimed
	l.LAN = want
	l.export = slices.Clone(want.Export)
	if len(l.export) == 0 {
		l.export = []Target{NewTarget(t.as, want.VNI)}
	}
	if anew {
		t.reimport(now, l)
	}
	attached := make(map[MAC]bool, len(want.Attached))
	for _, mac := range want.Attached {
		attached[mac] = true
		l.entry(mac)
	}
	for mac, s := range l.macs { // of which settle deletes none but mac
		comes := attached[mac] && (!s.attached || claimed)
		if otherwise || s.attached != attached[mac] {
			s.attached = attached[mac]
			l.decide(now, mac, comes)
		}
	}
}

// reimport reads a LAN's routes again: other ones are its own now, or can be used. What is here stays.
func (t *Table) reimport(now time.Time, l *lan) {
	l.flood, l.refused, l.remotes = map[Key]netip.Addr{}, map[Key]Reason{}, nil
	moves := l.moves
	for mac, s := range maps.Clone(l.macs) {
		s.routes = nil
		l.decide(now, mac, false)
	}
	for _, r := range t.routes {
		if slices.Contains(t.importers(r), l) {
			l.importRoute(now, r)
		}
	}
	l.moves = moves // nobody went anywhere
}

func (l *lan) rdNumber() uint16 { return uint16(l.rd[6])<<8 | uint16(l.rd[7]) }

// importers are the LANs that a route is of, by its targets.
func (t *Table) importers(r Route) (lans []*lan) {
	for _, l := range t.lans {
		if slices.ContainsFunc(r.Targets, l.imports) {
			lans = append(lans, l)
		}
	}
	return lans
}

// imports says whether routes with that target are the LAN's. FRR, too, looks at the number alone, for the AS of others may be another
// (map_vni_to_rt in bgpd/bgp_evpn.c).
func (l *lan) imports(t Target) bool {
	if slices.Contains(l.export, t) { // of the LAN's other nodes
		return true
	}
	if len(l.Import) > 0 {
		return slices.Contains(l.Import, t)
	}
	number, ok := t.number()
	return ok && number == l.VNI
}

// Import takes a route of another. Kinds that do not matter to a LAN are passed over.
func (t *Table) Import(now time.Time, r Route) {
	if r.Type != MACIP && r.Type != Multicast {
		return
	}
	if old, ok := t.routes[r.Key]; ok {
		if old.Equal(r) {
			return
		}
		if !slices.Equal(old.Targets, r.Targets) {
			t.Withdraw(now, r.Key)
		}
	}
	t.routes[r.Key] = r
	for _, l := range t.importers(r) {
		l.importRoute(now, r)
	}
}

// Withdraw is the end of a route of another.
func (t *Table) Withdraw(now time.Time, k Key) {
	r, ok := t.routes[k]
	if !ok {
		return
	}
	delete(t.routes, k)
	for _, l := range t.importers(r) {
		l.withdrawRoute(now, k)
	}
}

// LearnLocal says that a MAC has shown itself on a port here; Lose that it is on none any more. full is true where others are not told of it, for there are
// too many.
func (t *Table) LearnLocal(now time.Time, vni uint32, mac MAC) (full bool) {
	l := t.lans[vni]
	if l == nil || mac[0]&1 != 0 {
		return false
	}
	l.entry(mac).learned = true
	l.decide(now, mac, true)
	return l.Claimed && l.advertised[mac] == nil && len(l.advertised) >= MaxMACs
}

// ForgetLocal says that a MAC is on no port here any more: it has been silent for long, or its port is gone. changed is false where nobody knew it to be on
// one: a bridge tells of each entry that is written to it, too.
func (t *Table) ForgetLocal(now time.Time, vni uint32, mac MAC) (changed bool) {
	l := t.lans[vni]
	if l == nil || l.macs[mac] == nil || !l.macs[mac].learned {
		return false
	}
	l.macs[mac].learned = false
	l.decide(now, mac, false)
	return true
}

// SetLocal says which MACs are on ports here, all of them: those that are not among them are not any more.
func (t *Table) SetLocal(now time.Time, vni uint32, macs []MAC) {
	l := t.lans[vni]
	if l == nil {
		return
	}
	here := make(map[MAC]bool, len(macs))
	for _, mac := range macs {
		if here[mac] = true; l.macs[mac] == nil || !l.macs[mac].learned {
			t.LearnLocal(now, vni, mac)
		}
	}
	for mac, s := range maps.Clone(l.macs) {
		if s.learned && !here[mac] {
			t.ForgetLocal(now, vni, mac)
		}
	}
}

// Advertised are the routes that the node tells the others, sorted.
func (t *Table) Advertised() []Route {
	var routes []Route
	for _, l := range t.lans {
		routes = append(routes, l.routes()...)
	}
	slices.SortFunc(routes, func(a, b Route) int { return a.compare(b.Key) })
	return routes
}

// Forwarding is what the LAN's segment has to have: who gets what is flooded, sorted, each once, and behind which VTEPs MACs are, sorted; neither
// is nil. ok is false if the node takes no part in such a LAN. Nobody changes the lists.
func (t *Table) Forwarding(vni uint32) (remotes []netip.Addr, fdb []segment.FDBEntry, ok bool) {
	l := t.lans[vni]
	if l == nil {
		return nil, nil, false
	}
	remotes, fdb = l.forwarding()
	return remotes, fdb, true
}

// Duplicates are the MACs of a LAN that are on this node and on another, sorted.
func (t *Table) Duplicates(vni uint32) []MAC {
	if t.lans[vni] == nil {
		return nil
	}
	return slices.SortedFunc(maps.Keys(t.lans[vni].duplicates), MAC.compare)
}

// Count is how much there is of a LAN; ok is false if the node takes no part in it.
func (t *Table) Count(vni uint32) (c Count, ok bool) {
	l := t.lans[vni]
	if l == nil {
		return c, false
	}
	return l.count(), true
}

// Refused is how many routes of a LAN cannot be used, and one of them, which stays the same as long as it can be: a router may tell very many.
func (t *Table) Refused(vni uint32) (one Refusal, all int) {
	l := t.lans[vni]
	if l == nil || len(l.refused) == 0 {
		return one, 0
	}
	if _, still := l.refused[l.sampleRefused]; !still {
		for l.sampleRefused = range l.refused {
			break
		}
	}
	return Refusal{t.routes[l.sampleRefused], l.refused[l.sampleRefused]}, len(l.refused)
}
