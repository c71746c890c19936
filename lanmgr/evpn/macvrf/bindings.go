package macvrf

import (
	"net/netip"
	"slices"
	"time"
)

// The limits on advertised addresses, per MAC and per LAN. Beyond the limit of its MAC a new address replaces the
// oldest, at most once in replaceInterval, so that no host can make the node send updates all the time.
const (
	maxBindingsPerMAC = 16
	maxBindingsPerLAN = 8192
	replaceInterval   = time.Minute
)

// A host's first frame may show its address before the bridge has reported its MAC. The last maxPending bindings of
// unknown MACs are kept for pendingTime.
const (
	maxPending  = 64
	pendingTime = 10 * time.Second
)

// binding is an address that a MAC had before the bridge reported the MAC.
type binding struct {
	at  time.Time
	mac MAC
	ip  netip.Addr
}

// Bind records that a host on a local port has shown by ARP or neighbour discovery that it has an address. changed says
// that the node advertises other routes since; full, that the address exceeds a limit.
func (t *Table) Bind(now time.Time, vni uint32, mac MAC, ip netip.Addr) (changed, full bool) {
	l := t.lans[vni]
	if l == nil || mac[0]&1 != 0 || !isHostAddress(ip) {
		return false, false
	}
	e := l.macs[mac]
	if e == nil || !e.local() {
		l.pending = append(l.pending[max(0, len(l.pending)-maxPending+1):], binding{now, mac, ip})
		return false, false
	}
	return l.bind(now, mac, ip)
}

// isHostAddress reports whether one host can have the address.
func isHostAddress(ip netip.Addr) bool {
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	return ip.IsValid() && !ip.Is4In6() && ip.Zone() == "" &&
		!ip.IsUnspecified() && !ip.IsMulticast() && !ip.IsLoopback() && ip != broadcast
}

// bind binds an address to a local MAC; the last host that shows an address has it.
func (l *lan) bind(now time.Time, mac MAC, ip netip.Addr) (changed, full bool) {
	e := l.macs[mac]
	owner, bound := l.bindings[ip]
	switch {
	case bound && owner == mac:
		others := slices.DeleteFunc(e.addresses, func(a netip.Addr) bool { return a == ip })
		e.addresses = append(others, ip) // it is the newest now
		return false, false
	case len(e.addresses) >= maxBindingsPerMAC:
		if full = true; now.Sub(e.replacedAt) < replaceInterval {
			return false, full
		}
		e.replacedAt = now
		l.unbind(e.addresses[0])
	case len(l.bindings) >= maxBindingsPerLAN && !bound:
		return false, true
	}
	l.unbind(ip)
	l.neighbors = nil
	l.bindings[ip], e.addresses = mac, append(e.addresses, ip)
	return true, full
}

// unbind removes an address from the local MAC that has it, if one has.
func (l *lan) unbind(ip netip.Addr) {
	if mac, ok := l.bindings[ip]; ok {
		l.neighbors = nil
		delete(l.bindings, ip)
		e := l.macs[mac]
		e.addresses = slices.DeleteFunc(e.addresses, func(a netip.Addr) bool { return a == ip })
	}
}

// updateBindings binds the pending addresses of a MAC that is local, and removes all addresses of one that is not.
func (l *lan) updateBindings(now time.Time, mac MAC) {
	e := l.macs[mac]
	if !e.local() {
		for _, ip := range e.addresses {
			delete(l.bindings, ip)
		}
		e.addresses, e.replacedAt = nil, time.Time{}
		return
	}
	for _, b := range l.pending {
		if b.mac == mac && now.Sub(b.at) < pendingTime {
			l.bind(now, mac, b.ip)
		}
	}
	l.pending = slices.DeleteFunc(l.pending, func(b binding) bool { return b.mac == mac })
}
