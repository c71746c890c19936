package evpn

import (
	"slices"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// Problems says why hosts on other nodes may be out of reach.
type Problems struct {
	NoPeers    bool           // there are no peers
	Down       []bgp.Session  // all sessions, if none is up
	Duplicates []macvrf.MAC   // on this node and on another
	Withheld   []bgp.Peer     // connected peers that get no routes of the LAN: they accept no IPv6 VTEP
	Refused    macvrf.Refusal // one of the routes that cannot be used
	Refusals   int            // how many these are
}

// Problems returns the problems of a LAN, by its netns.
func (e *Instance) Problems(netns string) (p Problems) {
	e.mu.Lock()
	defer e.mu.Unlock()
	p.NoPeers = len(e.peers) == 0
	if !slices.ContainsFunc(e.sessions, func(s bgp.Session) bool { return s.Up }) {
		p.Down = e.sessions
	}
	vni, ok := e.vnis[netns]
	if !ok {
		return p
	}
	p.Duplicates = e.table.Duplicates(vni)
	p.Refused, p.Refusals = e.table.Refused(vni)
	for _, s := range e.sessions {
		if s.Up && !s.Peer.IPv6VTEPs && e.lans[netns].VTEP.Is6() {
			p.Withheld = append(p.Withheld, s.Peer)
		}
	}
	return p
}

// Count counts the routes and MACs of a LAN, by its netns. ok is false if the node takes no part in the LAN.
func (e *Instance) Count(netns string) (c macvrf.Count, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	vni, ok := e.vnis[netns]
	if !ok {
		return c, false
	}
	return e.table.Count(vni)
}
