package macvrf

import (
	"net/netip"
	"slices"
	"time"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Of the addresses that stations show, so many are told: of one MAC, and of all on a LAN here. Who shows more loses the one that it has not
// shown for the longest, but once in so long a time at most, so that nobody has the others told of something else all the time.
const (
	maxAddresses    = 16
	maxLANAddresses = 8192
	turnover        = time.Minute
)

// A station's first frame may show its address before the bridge has told that the station is here: the last addresses of whom the bridge
// knows nothing are kept for so long.
const (
	maxEarly = 64
	earlyFor = 10 * time.Second
)

// shown is an address that somebody has shown who was not known to be here.
type shown struct {
	at  time.Time
	mac MAC
	ip  netip.Addr
}

// Bind says that a station on a port here has shown by ARP or neighbour discovery that it has an address. told says whether others are told something
// else since; full, that the address is one too many.
func (t *Table) Bind(now time.Time, vni uint32, mac MAC, ip netip.Addr) (told, full bool) {
	l := t.lans[vni]
	if l == nil || mac[0]&1 != 0 || !isStations(ip) {
		return false, false
	}
	s := l.macs[mac]
	if s == nil || !s.here() {
		l.early = append(l.early[max(0, len(l.early)-maxEarly+1):], shown{now, mac, ip})
		return false, false
	}
	return l.show(now, mac, ip)
}

// isStations says whether an address can be that of one station.
func isStations(ip netip.Addr) bool {
	return ip.IsValid() && !ip.Is4In6() && ip.Zone() == "" && !ip.IsUnspecified() && !ip.IsMulticast() && !ip.IsLoopback() &&
		ip != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// show gives an address to a MAC that is here: whoever showed it last has it.
func (l *lan) show(now time.Time, mac MAC, ip netip.Addr) (told, full bool) {
	s := l.macs[mac]
	owner, owned := l.owners[ip]
	switch {
	case owned && owner == mac:
		s.addresses = append(slices.DeleteFunc(s.addresses, func(a netip.Addr) bool { return a == ip }), ip) // is the newest
		return false, false
	case len(s.addresses) >= maxAddresses:
		if full = true; now.Sub(s.replaced) < turnover {
			return false, full
		}
		s.replaced = now
		l.hide(s.addresses[0])
	case len(l.owners) >= maxLANAddresses && !owned:
		return false, true
	}
	l.hide(ip)
	l.neighbors = nil
	l.owners[ip], s.addresses = mac, append(s.addresses, ip)
	return true, full
}

// hide takes an address from the MAC here that has it, if one has.
func (l *lan) hide(ip netip.Addr) {
	if mac, ok := l.owners[ip]; ok {
		l.neighbors = nil
		delete(l.owners, ip)
		s := l.macs[mac]
		s.addresses = slices.DeleteFunc(s.addresses, func(a netip.Addr) bool { return a == ip })
	}
}

// settleAddresses has a MAC that is here have what it showed before that was known; one that is not loses all.
func (l *lan) settleAddresses(now time.Time, mac MAC) {
	s := l.macs[mac]
	if !s.here() {
		for _, ip := range s.addresses {
			delete(l.owners, ip)
		}
		s.addresses, s.replaced = nil, time.Time{}
		return
	}
	for _, e := range l.early {
		if e.mac == mac && now.Sub(e.at) < earlyFor {
			l.show(now, mac, e.ip)
		}
	}
	l.early = slices.DeleteFunc(l.early, func(e shown) bool { return e.mac == mac })
}

// Neighbors are the stations on other nodes that the node is to answer for, sorted by address; nil where it is not to, or takes no part in the LAN. An
// address that several have is nobody's: they answer themselves. Nobody changes the list.
func (t *Table) Neighbors(vni uint32) []segment.Neighbor {
	l := t.lans[vni]
	if l == nil || !l.Suppress {
		return nil
	}
	if l.neighbors == nil {
		l.neighbors = l.elsewhere()
	}
	return l.neighbors
}

func (l *lan) elsewhere() []segment.Neighbor {
	has, several := map[netip.Addr]MAC{}, map[netip.Addr]bool{}
	for ip := range l.owners {
		several[ip] = true
	}
	for mac, s := range l.macs {
		_, behind := s.entry()
		for _, o := range s.routes {
			ip := o.key.IP
			if other, ok := has[ip]; ok && other != mac || !behind {
				several[ip] = true
			}
			has[ip] = mac
		}
	}
	neighbors := []segment.Neighbor{}
	for ip, mac := range has {
		if isStations(ip) && !several[ip] {
			neighbors = append(neighbors, segment.Neighbor{IP: ip, MAC: mac})
		}
	}
	slices.SortFunc(neighbors, func(a, b segment.Neighbor) int { return a.IP.Compare(b.IP) })
	return neighbors
}
