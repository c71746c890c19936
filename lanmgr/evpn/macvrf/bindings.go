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
	maxBindingsPerMAC = 16
	maxBindingsPerLAN = 8192
	replaceInterval   = time.Minute
)

// A station's first frame may show its address before the bridge has told that the station is here: the last addresses of whom the bridge
// knows nothing are kept for so long.
const (
	maxPending  = 64
	pendingTime = 10 * time.Second
)

// binding is an address that somebody has shown who was not known to be here.
type binding struct {
	at  time.Time
	mac MAC
	ip  netip.Addr
}

// Bind says that a station on a port here has shown by ARP or neighbour discovery that it has an address. told says whether others are told something
// else since; full, that the address is one too many.
func (t *Table) Bind(now time.Time, vni uint32, mac MAC, ip netip.Addr) (told, full bool) {
	l := t.lans[vni]
	if l == nil || mac[0]&1 != 0 || !isHostAddress(ip) {
		return false, false
	}
	s := l.macs[mac]
	if s == nil || !s.local() {
		l.pending = append(l.pending[max(0, len(l.pending)-maxPending+1):], binding{now, mac, ip})
		return false, false
	}
	return l.bind(now, mac, ip)
}

// isHostAddress says whether an address can be that of one station.
func isHostAddress(ip netip.Addr) bool {
	return ip.IsValid() && !ip.Is4In6() && ip.Zone() == "" && !ip.IsUnspecified() && !ip.IsMulticast() && !ip.IsLoopback() &&
		ip != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// bind gives an address to a MAC that is here: whoever showed it last has it.
func (l *lan) bind(now time.Time, mac MAC, ip netip.Addr) (told, full bool) {
	s := l.macs[mac]
	owner, owned := l.bindings[ip]
	switch {
	case owned && owner == mac:
		s.addresses = append(slices.DeleteFunc(s.addresses, func(a netip.Addr) bool { return a == ip }), ip) // is the newest
		return false, false
	case len(s.addresses) >= maxBindingsPerMAC:
		if full = true; now.Sub(s.replacedAt) < replaceInterval {
			return false, full
		}
		s.replacedAt = now
		l.unbind(s.addresses[0])
	case len(l.bindings) >= maxBindingsPerLAN && !owned:
		return false, true
	}
	l.unbind(ip)
	l.neighbors = nil
	l.bindings[ip], s.addresses = mac, append(s.addresses, ip)
	return true, full
}

// unbind takes an address from the MAC here that has it, if one has.
func (l *lan) unbind(ip netip.Addr) {
	if mac, ok := l.bindings[ip]; ok {
		l.neighbors = nil
		delete(l.bindings, ip)
		s := l.macs[mac]
		s.addresses = slices.DeleteFunc(s.addresses, func(a netip.Addr) bool { return a == ip })
	}
}

// updateBindings has a MAC that is here have what it showed before that was known; one that is not loses all.
func (l *lan) updateBindings(now time.Time, mac MAC) {
	s := l.macs[mac]
	if !s.local() {
		for _, ip := range s.addresses {
			delete(l.bindings, ip)
		}
		s.addresses, s.replacedAt = nil, time.Time{}
		return
	}
	for _, e := range l.pending {
		if e.mac == mac && now.Sub(e.at) < pendingTime {
			l.bind(now, mac, e.ip)
		}
	}
	l.pending = slices.DeleteFunc(l.pending, func(e binding) bool { return e.mac == mac })
}

// Neighbors are the stations on other nodes that the node is to answer for, sorted by address; nil where it is not to, or takes no part in the LAN. An
// address that several have is nobody's: they answer themselves. Nobody changes the list.
func (t *Table) Neighbors(vni uint32) []segment.Neighbor {
	l := t.lans[vni]
	if l == nil || !l.Suppress {
		return nil
	}
	if l.neighbors == nil {
		l.neighbors = l.remoteNeighbors()
	}
	return l.neighbors
}

func (l *lan) remoteNeighbors() []segment.Neighbor {
	has, several := map[netip.Addr]MAC{}, map[netip.Addr]bool{}
	for ip := range l.bindings {
		several[ip] = true
	}
	for mac, s := range l.macs {
		_, behind := s.remoteVTEP()
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
		if isHostAddress(ip) && !several[ip] {
			neighbors = append(neighbors, segment.Neighbor{IP: ip, MAC: mac})
		}
	}
	slices.SortFunc(neighbors, func(a, b segment.Neighbor) int { return a.IP.Compare(b.IP) })
	return neighbors
}
