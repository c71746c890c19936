package macvrf

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// forwarding returns the remotes and FDB entries of the LAN. It computes again only what has changed.
func (l *lan) forwarding() (remotes []netip.Addr, fdb []segment.FDBEntry) {
	if l.remotes == nil {
		remotes := slices.Collect(maps.Values(l.flood))
		slices.SortFunc(remotes, netip.Addr.Compare)
		l.remotes = append([]netip.Addr{}, slices.Compact(remotes)...)
	}
	if len(l.changed) > 0 {
		l.fdb, l.changed = l.mergeChanged(), map[MAC]bool{}
	}
	return l.remotes, l.fdb
}

// mergeChanged returns a copy of fdb in which the entries of the MACs in changed are up to date.
func (l *lan) mergeChanged() []segment.FDBEntry {
	fdb := make([]segment.FDBEntry, 0, len(l.fdb)+len(l.changed))
	changed := slices.SortedFunc(maps.Keys(l.changed), MAC.compare)
	for _, e := range l.fdb {
		for len(changed) > 0 && changed[0].compare(e.MAC) < 0 {
			fdb, changed = l.appendEntry(fdb, changed[0]), changed[1:]
		}
		if !l.changed[e.MAC] {
			fdb = append(fdb, e)
		}
	}
	for _, mac := range changed {
		fdb = l.appendEntry(fdb, mac)
	}
	return fdb
}

// appendEntry appends the FDB entry of a MAC if it is behind a remote.
func (l *lan) appendEntry(fdb []segment.FDBEntry, mac MAC) []segment.FDBEntry {
	if e := l.macs[mac]; e != nil {
		if vtep, ok := e.remoteVTEP(); ok {
			return append(fdb, segment.FDBEntry{MAC: mac, VTEP: vtep, Local: e.learned})
		}
	}
	return fdb
}
