package macvrf

import (
	"net/netip"
	"slices"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Neighbors returns the hosts on other nodes that this node answers for, sorted by address. It returns nil if the LAN
// does not suppress ARP, or if the node takes no part in it. The node does not answer for an address that several hosts
// have: they answer themselves. The caller must not change the list.
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
	macOf, excluded := map[netip.Addr]MAC{}, map[netip.Addr]bool{}
	for ip := range l.bindings {
		excluded[ip] = true
	}
	for mac, e := range l.macs {
		_, remote := e.remoteVTEP()
		for _, r := range e.routes {
			ip := r.key.IP
			if other, ok := macOf[ip]; ok && other != mac || !remote {
				excluded[ip] = true
			}
			macOf[ip] = mac
		}
	}
	neighbors := []segment.Neighbor{}
	for ip, mac := range macOf {
		if isHostAddress(ip) && !excluded[ip] {
			neighbors = append(neighbors, segment.Neighbor{IP: ip, MAC: mac})
		}
	}
	slices.SortFunc(neighbors, func(a, b segment.Neighbor) int { return a.IP.Compare(b.IP) })
	return neighbors
}
