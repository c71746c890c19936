package evpn

import (
	"context"
	"net/netip"
	"slices"

	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
)

// ReflectorEndpoints returns the addresses and ports of the pods of a reflectors' Service, ready or not, sorted and
// without duplicates.
func ReflectorEndpoints(parts []discoveryv1.EndpointSlice) []netip.AddrPort {
	var all []netip.AddrPort
	for _, part := range parts {
		for _, port := range part.Ports {
			for _, endpoint := range part.Endpoints {
				// The addresses of an endpoint are those of one pod; consumers may use the first only
				// (Endpoint.Addresses in k8s.io/api/discovery/v1).
				if len(endpoint.Addresses) == 0 || port.Port == nil {
					continue
				}
				if address, err := netip.ParseAddr(endpoint.Addresses[0]); err == nil {
					all = append(all, netip.AddrPortFrom(address.Unmap(), uint16(*port.Port)))
				}
			}
		}
	}
	slices.SortFunc(all, netip.AddrPort.Compare)
	return slices.Compact(all)
}

// SetReflectors replaces the addresses of the cluster's reflectors. The routes of one that is removed stay until others
// have sent or withdrawn them, or for bgp.StaleTime.
func (e *Instance) SetReflectors(ctx context.Context, at []netip.AddrPort) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.reflectors = at
	return e.setPeers(ctx)
}

// SetPeers replaces the other peers, and the password of the sessions with reflectors. A session that is up uses a new
// password from its next connection on.
func (e *Instance) SetPeers(ctx context.Context, peers []bgp.Peer, reflectorPassword string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.Peers, e.ReflectorPassword = peers, reflectorPassword
	return e.setPeers(ctx)
}

func (e *Instance) setPeers(ctx context.Context) error {
	peers := slices.Clone(e.Peers)
	for _, a := range e.reflectors {
		peers = append(peers, bgp.Peer{
			Address: a.Addr(), Port: a.Port(), AS: e.AS, Password: e.ReflectorPassword, IPv6VTEPs: true,
		})
	}
	if slices.Equal(peers, e.peers) && !e.peersFailed {
		return nil
	}
	e.peers = peers
	e.sessions = slices.DeleteFunc(slices.Clone(e.sessions), func(s bgp.Session) bool {
		return !slices.ContainsFunc(peers, s.Peer.EqualExceptPassword)
	})
	err := e.speaker.SetPeers(ctx, peers)
	e.peersFailed = err != nil
	return err
}

// Sessions returns the sessions with the peers.
func (e *Instance) Sessions() []bgp.Session { return e.speaker.Sessions() }

// setSessions stores the sessions, and logs those whose state has changed.
func (e *Instance) setSessions(sessions []bgp.Session) {
	for _, s := range sessions {
		unchanged := func(old bgp.Session) bool {
			return old.Peer.EqualExceptPassword(s.Peer) && old.Up == s.Up && old.Why == s.Why
		}
		switch {
		case slices.ContainsFunc(e.sessions, unchanged):
		case s.Up:
			e.Log.Info("BGP session is up", "peer", s.Peer)
		default:
			e.Log.Warn("BGP session is down", "peer", s.Peer, "why", s.Why)
		}
	}
	e.sessions = sessions
}
