package sidecar

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// evpnMember takes part in EVPN for the pod.
type evpnMember struct {
	*evpn.Instance
	pod *podKernel
}

// startEVPN joins the LAN to EVPN if that is configured. At the end of the task the pod withdraws its routes.
func (s *Sidecar) startEVPN(ctx context.Context, fail context.CancelCauseFunc, c Config) task {
	if c.Discovery != EVPNDiscovery {
		s.locked(func() { s.evpn = nil })
		return startTask(ctx, func(context.Context) {})
	}
	pod := newPodKernel()
	member := &evpnMember{evpn.New(evpn.Config{
		AS: c.EVPN.AS, RouterID: c.routerID(), Peers: c.EVPN.peers, ReflectorPassword: c.EVPN.reflectorPassword,
		Kernel: pod, WithdrawOnStop: true, Log: s.Log,
	}), pod}
	s.locked(func() { s.evpn = member })
	s.changed.Set()
	return startTask(ctx, func(ctx context.Context) {
		var changes sync.WaitGroup
		defer changes.Wait()
		changes.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case <-member.Changed():
					s.changed.Set()
				}
			}
		})
		if err := member.Run(ctx); err != nil && ctx.Err() == nil {
			fail(err)
		}
	})
}

func (s *Sidecar) evpnMember() *evpnMember {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.evpn
}

// setBGPPeers replaces the peers that are configured.
func (s *Sidecar) setBGPPeers(ctx context.Context, c Config) {
	member := s.evpnMember()
	if member == nil {
		return
	}
	if err := member.SetPeers(ctx, c.EVPN.peers, c.EVPN.reflectorPassword); err != nil {
		s.Log.Error("cannot set all BGP peers", "err", err)
	}
}

// setReflectors replaces the addresses of the reflectors by those of their Service's endpoints.
func (s *Sidecar) setReflectors(ctx context.Context, service *Service, parts []discoveryv1.EndpointSlice) {
	member := s.evpnMember()
	if member == nil || service == nil {
		return
	}
	parts = slices.DeleteFunc(slices.Clone(parts), func(part discoveryv1.EndpointSlice) bool {
		return serviceOf(part) != *service
	})
	if err := member.SetReflectors(ctx, evpn.ReflectorEndpoints(parts)); err != nil {
		s.Log.Error("cannot set all reflectors as BGP peers, trying again when one changes",
			"service", service, "err", err)
	}
}

// fill adds the routes that were received to the desired interface. m may be nil: then none are known yet.
func (m *evpnMember) fill(want *segment.PodVXLAN) {
	want.VXLAN.NoLearning = true
	lan := segment.Segment{Netns: want.VXLAN.Name, VXLAN: want.VXLAN}
	if m != nil {
		m.Fill(&lan)
	}
	want.FDB = lan.FDB
	want.Partial = want.Partial || lan.Partial || lan.Remotes == nil
	want.Remotes = sorted(append(want.Remotes, lan.Remotes...))
}

// advertise advertises the MAC and the addresses that the interface has, and logs problems.
func (s *Sidecar) advertise(member *evpnMember, want segment.PodVXLAN, have segment.PodVXLANState) {
	v, mac := want.VXLAN, macvrf.MAC(have.Link.MAC)
	lan := macvrf.LAN{VNI: v.VNI, VTEP: v.Local, Claimed: true, Attached: []macvrf.MAC{mac}}
	member.Set(map[string]macvrf.LAN{v.Name: lan})
	var addresses []netip.Addr
	for _, a := range have.Addresses {
		addresses = append(addresses, a.Addr())
	}
	problem := problemText(member.Problems(v.Name))
	s.mu.Lock()
	defer s.mu.Unlock()
	member.pod.set(mac, addresses)
	if problem != s.evpnProblem && problem != "" {
		s.Log.Warn("not all pods of the LAN can be reached", "why", problem)
	}
	s.evpnProblem = problem
}

// problemText describes problems with routes. Sessions that are down are logged when they go down.
func problemText(p evpn.Problems) string {
	var all []string
	if len(p.Duplicates) > 0 {
		all = append(all, fmt.Sprintf("%s is the MAC of this interface and is advertised from elsewhere, too: "+
			"set vxlan.mac, or give pods different names", p.Duplicates[0]))
	}
	if len(p.Withheld) > 0 {
		all = append(all, fmt.Sprintf("%s gets no routes, because the pod's address is IPv6: "+
			"give it ipv6-vteps if it accepts them", p.Withheld[0]))
	}
	if p.Refusals > 0 {
		all = append(all, p.Refused.String())
	}
	return strings.Join(all, "; ")
}

// sessionsErr returns why no routes are received; nil if a session is up.
func sessionsErr(sessions []bgp.Session) error {
	if len(sessions) == 0 {
		return errors.New("there are no BGP peers yet")
	}
	if slices.ContainsFunc(sessions, func(s bgp.Session) bool { return s.Up }) {
		return nil
	}
	return fmt.Errorf("no BGP session is up, to %s: %s", sessions[0].Peer, sessions[0].Why)
}

// needsNewInstance reports whether another evpn.Instance than before is needed.
func (c *Config) needsNewInstance(old Config) bool {
	return c.Discovery != old.Discovery || c.EVPN.AS != old.EVPN.AS || c.routerID() != old.routerID()
}

// watchedServices returns the Services whose endpoints are needed.
func (c *Config) watchedServices() []Service {
	watched := slices.Clone(c.Services)
	if r := c.EVPN.Reflectors; c.Discovery == EVPNDiscovery && r != nil && !slices.Contains(watched, *r) {
		watched = append(watched, *r)
	}
	return watched
}
