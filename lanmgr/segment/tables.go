package segment

import (
	"bytes"
	"net/netip"
	"slices"
)

// remotes sets the remotes of a VXLAN without a group. New ones are added before a group is removed, and present ones
// keep receiving all the time.
func (d *diff) remotes(l Link) {
	want := d.want.VXLAN
	if !want.Unicast() {
		return
	}
	add, del := diffRemotes(d.want.Remotes, l.VXLAN.Remotes)
	if len(add) > 0 {
		d.do(AddRemotes{want.Name, add})
	}
	if l.Index != 0 && !sameEnds(want, l.VXLAN) {
		d.do(SetVXLAN{want})
	}
	if d.want.Remotes != nil && !d.want.Partial && len(del) > 0 {
		d.do(DelRemotes{Name: want.Name, Remotes: del, Learned: !want.NoLearning})
	}
	d.fdb(l)
}

// fdb sets the entries of the VXLAN and its bridge for MACs behind remotes. Without a claim the VXLAN is down, and it
// loses such entries whenever it is set down (vxlan_stop in drivers/net/vxlan/vxlan_core.c).
func (d *diff) fdb(l Link) {
	want := d.want.FDB
	switch {
	case !d.want.VXLAN.NoLearning:
		want = []FDBEntry{} // it learns
	case len(d.claims) == 0 && !d.inPod:
		return
	}
	add, del := diffFDB(want, l.VXLAN.FDB)
	if len(add) > 0 {
		d.do(SetFDB{d.want.VXLAN.Name, add})
	}
	if want != nil && !(d.want.Partial && d.want.VXLAN.NoLearning) && len(del) > 0 {
		d.do(DelFDB{d.want.VXLAN.Name, del})
	}
}

// leastIPv6 is the smallest MTU of a link with IPv6, in bytes (IPV6_MIN_MTU in include/uapi/linux/in6.h).
const leastIPv6 = 1280

// neighbors has the bridge answer for hosts behind the VXLAN, or no longer: then it first deletes its neighbors.
// isNewPort says that the VXLAN becomes a port, with default settings.
func (d *diff) neighbors(port Link, isNewPort bool) {
	name, bridge := d.want.Bridge, Link{}
	if !d.newBridge {
		bridge = d.links[name]
	}
	suppressed, discovers := port.Suppress && !isNewPort, bridge.IPv6 && !d.silenced
	if !d.want.VXLAN.SuppressNeighbors {
		if len(bridge.Neighbors) > 0 {
			d.do(DelNeighbors{name, bridge.Neighbors})
		}
		if suppressed {
			d.do(SetSuppress{port.Name, false})
		}
		if discovers {
			d.do(SetNeighborDiscovery{name, false})
		}
		return
	}
	if !suppressed {
		d.do(SetSuppress{port.Name, true})
	}
	want := d.want.supported(d.want.Neighbors)
	switch {
	case bridge.LacksIPv6 && bridge.MTU >= leastIPv6: // the kernel is without it; with a small MTU, SetMTU adds it
		want = onlyIPv4(want)
	case d.want.MTU >= leastIPv6 && !discovers:
		d.do(SetNeighborDiscovery{name, true})
	}
	if want == nil || len(d.claims) == 0 {
		return
	}
	have := bridge.Neighbors
	if !discovers { // with IPv6 off, it has lost its IPv6 neighbors
		have = onlyIPv4(have)
	}
	add, del := diffNeighbors(want, have)
	if len(add) > 0 {
		d.do(AddNeighbors{name, add})
	}
	if !d.want.Partial && len(del) > 0 {
		d.do(DelNeighbors{name, del})
	}
}

// supported returns the neighbors that a bridge of the segment's MTU can have.
func (s Segment) supported(neighbors []Neighbor) []Neighbor {
	if s.MTU >= leastIPv6 {
		return neighbors
	}
	return onlyIPv4(neighbors)
}

func onlyIPv4(neighbors []Neighbor) []Neighbor {
	return slices.DeleteFunc(slices.Clone(neighbors), func(n Neighbor) bool { return n.IP.Is6() })
}

// OnlyTablesDiffer reports whether two desired states with known tables differ in remotes, FDB and neighbors at most.
func OnlyTablesDiffer(was, want Segment) bool {
	rest := want
	rest.Remotes, rest.FDB, rest.Neighbors = was.Remotes, was.FDB, was.Neighbors
	known := was.Remotes != nil && want.Remotes != nil &&
		(was.FDB == nil) == (want.FDB == nil) && (was.Neighbors == nil) == (want.Neighbors == nil)
	return known && want.VXLAN.UnderlayIndex != 0 && want.VXLAN.Unicast() && rest.Equal(was)
}

// DiffTables returns the operations from one desired state to another if OnlyTablesDiffer. Without a claim on this
// node, the kernel has only the remotes.
func DiffTables(was, want Segment, claimed bool) (ops []Op) {
	addRemotes, delRemotes := diffRemotes(want.Remotes, was.Remotes)
	var addFDB []FDBEntry
	var delFDB []FDBState
	var addNeighbors, delNeighbors []Neighbor
	if claimed {
		addFDB, delFDB = diffWantedFDB(want.FDB, was.FDB)
		addNeighbors, delNeighbors = diffNeighbors(want.supported(want.Neighbors), want.supported(was.Neighbors))
	}
	if want.Partial {
		delRemotes, delFDB, delNeighbors = nil, nil, nil
	}
	if len(addRemotes) > 0 {
		ops = append(ops, AddRemotes{want.VXLAN.Name, addRemotes})
	}
	if len(delRemotes) > 0 {
		ops = append(ops, DelRemotes{Name: want.VXLAN.Name, Remotes: delRemotes, Learned: !want.VXLAN.NoLearning})
	}
	if len(addFDB) > 0 {
		ops = append(ops, SetFDB{want.VXLAN.Name, addFDB})
	}
	if len(delFDB) > 0 {
		ops = append(ops, DelFDB{want.VXLAN.Name, delFDB})
	}
	if len(addNeighbors) > 0 {
		ops = append(ops, AddNeighbors{want.Bridge, addNeighbors})
	}
	if len(delNeighbors) > 0 {
		ops = append(ops, DelNeighbors{want.Bridge, delNeighbors})
	}
	return ops
}

// diffRemotes compares remotes.
func diffRemotes(want, have []netip.Addr) (add, del []netip.Addr) {
	return diffSorted(want, have, netip.Addr.Compare, func(netip.Addr, netip.Addr) bool { return true })
}

// diffNeighbors compares neighbors; one with another MAC is added.
func diffNeighbors(want, have []Neighbor) (add, del []Neighbor) {
	return diffSorted(want, have,
		func(w, h Neighbor) int { return w.IP.Compare(h.IP) },
		func(w, h Neighbor) bool { return w == h })
}

// diffFDB compares the wanted FDB with the kernel's; an entry with another remote is added. If the bridge lacks its
// half of an entry, the MAC was seen on a port of this node. That stays so, unless the desired state knows it (Local):
// it may not know it yet.
func diffFDB(want []FDBEntry, have []FDBState) (add []FDBEntry, del []FDBState) {
	return diffSorted(want, have,
		func(w FDBEntry, h FDBState) int { return bytes.Compare(w.MAC[:], h.MAC[:]) },
		func(w FDBEntry, h FDBState) bool {
			return unmapped(w.VTEP) == unmapped(h.VTEP) && !(w.Local && !h.Bridge)
		})
}

// diffWantedFDB compares the FDBs of two desired states; an entry is added that has another remote, or that has become
// Local.
func diffWantedFDB(want, was []FDBEntry) (add []FDBEntry, del []FDBState) {
	add, gone := diffSorted(want, was,
		func(w, h FDBEntry) int { return bytes.Compare(w.MAC[:], h.MAC[:]) },
		func(w, h FDBEntry) bool { return w.VTEP == h.VTEP && !(w.Local && !h.Local) })
	for _, e := range gone {
		del = append(del, FDBState{e, true})
	}
	return add, del
}

// diffSorted compares two lists that are sorted by the same key. It returns what to add, the elements of want that are
// missing in have or not the same there, and what to delete, the elements of have that are missing in want.
func diffSorted[W, H any](want []W, have []H, compare func(W, H) int, same func(W, H) bool) (add []W, del []H) {
	for len(want) > 0 && len(have) > 0 {
		switch order := compare(want[0], have[0]); {
		case order < 0:
			add, want = append(add, want[0]), want[1:]
		case order > 0:
			del, have = append(del, have[0]), have[1:]
		default:
			if !same(want[0], have[0]) {
				add = append(add, want[0])
			}
			want, have = want[1:], have[1:]
		}
	}
	return append(add, want...), append(del, have...)
}
