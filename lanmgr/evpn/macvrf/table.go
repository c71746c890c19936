// Package macvrf holds the MAC-VRF of each LAN that a node takes part in (RFC 7432, RFC 8365). It gets the routes of
// other routers and the MACs on the node's own ports; it returns remotes, FDB entries and the routes that the node
// advertises. It does no I/O.
package macvrf

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Table holds the MAC-VRFs of one node. It belongs to one goroutine.
type Table struct {
	as     uint32
	router netip.Addr
	lans   map[uint32]*lan // by VNI
	routes map[Key]Route   // received from others; LANs that come later import from these, too
}

// New returns the table of a router with that AS and ID. The ID is an IPv4 address.
func New(as uint32, router netip.Addr) *Table {
	return &Table{as: as, router: router, lans: map[uint32]*lan{}, routes: map[Key]Route{}}
}

// Set replaces the LANs that the node takes part in.
func (t *Table) Set(now time.Time, lans []LAN) {
	wanted := make(map[uint32]bool, len(lans))
	for _, l := range lans {
		wanted[l.VNI] = true
	}
	for vni := range t.lans {
		if !wanted[vni] {
			delete(t.lans, vni)
		}
	}
	numbers := t.rdNumbers(lans)
	for _, l := range lans {
		t.setLAN(now, l)
		t.lans[l.VNI].rd = routerRD(t.router, numbers[l.VNI])
	}
}

func (t *Table) setLAN(now time.Time, want LAN) {
	l := t.lans[want.VNI]
	if l != nil && l.LAN.Equal(want) {
		return
	}
	routesDiffer := l == nil || l.VTEP != want.VTEP ||
		!slices.Equal(l.Import, want.Import) || !slices.Equal(l.Export, want.Export)
	if l == nil {
		l = newLAN()
		t.lans[want.VNI] = l
	}
	claimed, claimChanged := want.Claimed && !l.Claimed, want.Claimed != l.Claimed
	l.LAN = want
	l.export = slices.Clone(want.Export)
	if len(l.export) == 0 {
		l.export = []Target{NewTarget(t.as, want.VNI)}
	}
	if routesDiffer {
		t.reimport(now, l)
	}
	attached := make(map[MAC]bool, len(want.Attached))
	for _, mac := range want.Attached {
		attached[mac] = true
		l.entry(mac)
	}
	for mac, e := range l.macs { // decide deletes no entry but that of mac
		appeared := attached[mac] && (!e.attached || claimed)
		if claimChanged || e.attached != attached[mac] {
			e.attached = attached[mac]
			l.decide(now, mac, appeared)
		}
	}
}

// reimport imports all routes into a LAN again, because its targets or its VTEP have changed. Local MACs stay.
func (t *Table) reimport(now time.Time, l *lan) {
	l.flood, l.refused, l.remotes = map[Key]netip.Addr{}, map[Key]Reason{}, nil
	moves := l.moves
	for mac, e := range maps.Clone(l.macs) {
		e.routes = nil
		l.decide(now, mac, false)
	}
	for _, r := range t.routes {
		if slices.Contains(t.importers(r), l) {
			l.importRoute(now, r)
		}
	}
	l.moves = moves // no MAC has moved
}

// importers returns the LANs that import a route.
func (t *Table) importers(r Route) (lans []*lan) {
	for _, l := range t.lans {
		if slices.ContainsFunc(r.Targets, l.imports) {
			lans = append(lans, l)
		}
	}
	return lans
}

// Import adds a route that was received, or replaces the one with its key. Route types that no LAN uses are ignored.
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

// Withdraw removes a route that was withdrawn.
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

// LearnLocal records that the bridge has learned a MAC on a local port. full is true if the MAC is not advertised
// because the LAN has MaxMACs already.
func (t *Table) LearnLocal(now time.Time, vni uint32, mac MAC) (full bool) {
	l := t.lans[vni]
	if l == nil || mac[0]&1 != 0 {
		return false
	}
	l.entry(mac).learned = true
	l.decide(now, mac, true)
	return l.Claimed && l.advertised[mac] == nil && len(l.advertised) >= MaxMACs
}

// ForgetLocal records that a MAC is on no local port any more: it has aged out, or its port was removed. changed is
// false if it was not known to be on one: a bridge reports each entry that is written to it, too.
func (t *Table) ForgetLocal(now time.Time, vni uint32, mac MAC) (changed bool) {
	l := t.lans[vni]
	if l == nil || l.macs[mac] == nil || !l.macs[mac].learned {
		return false
	}
	l.macs[mac].learned = false
	l.decide(now, mac, false)
	return true
}

// SetLocal replaces the MACs that are on local ports.
func (t *Table) SetLocal(now time.Time, vni uint32, macs []MAC) {
	l := t.lans[vni]
	if l == nil {
		return
	}
	local := make(map[MAC]bool, len(macs))
	for _, mac := range macs {
		local[mac] = true
		if l.macs[mac] == nil || !l.macs[mac].learned {
			t.LearnLocal(now, vni, mac)
		}
	}
	for mac, e := range maps.Clone(l.macs) {
		if e.learned && !local[mac] {
			t.ForgetLocal(now, vni, mac)
		}
	}
}

// Advertised returns the routes that the node advertises, sorted.
func (t *Table) Advertised() []Route {
	var routes []Route
	for _, l := range t.lans {
		routes = append(routes, l.routes()...)
	}
	slices.SortFunc(routes, func(a, b Route) int { return a.compare(b.Key) })
	return routes
}

// Forwarding returns a LAN's remotes, sorted and without duplicates, and its FDB entries, sorted. Neither is nil. ok is
// false if the node takes no part in the LAN. The caller must not change the lists.
func (t *Table) Forwarding(vni uint32) (remotes []netip.Addr, fdb []segment.FDBEntry, ok bool) {
	l := t.lans[vni]
	if l == nil {
		return nil, nil, false
	}
	remotes, fdb = l.forwarding()
	return remotes, fdb, true
}

// Duplicates returns the MACs of a LAN that are on this node and on another, sorted.
func (t *Table) Duplicates(vni uint32) []MAC {
	if t.lans[vni] == nil {
		return nil
	}
	return slices.SortedFunc(maps.Keys(t.lans[vni].duplicates), MAC.compare)
}

// Count counts a LAN's routes and MACs. ok is false if the node takes no part in the LAN.
func (t *Table) Count(vni uint32) (c Count, ok bool) {
	l := t.lans[vni]
	if l == nil {
		return c, false
	}
	return l.count(), true
}

// Refused returns how many routes of a LAN cannot be used, and one of them. That one stays the same while it is
// refused: a router may advertise very many.
func (t *Table) Refused(vni uint32) (sample Refusal, total int) {
	l := t.lans[vni]
	if l == nil || len(l.refused) == 0 {
		return sample, 0
	}
	if _, still := l.refused[l.sampleRefused]; !still {
		for l.sampleRefused = range l.refused {
			break
		}
	}
	return Refusal{t.routes[l.sampleRefused], l.refused[l.sampleRefused]}, len(l.refused)
}
