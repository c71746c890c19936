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
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// evpnMember is the pod's part in EVPN.
type evpnMember struct {
	*evpn.Instance
	pod *podKernel
}

// startEVPN joins the LAN to EVPN, where that is configured. At its end the pod takes back what it has told.
func (s *Sidecar) startEVPN(ctx context.Context, fail context.CancelCauseFunc, c Config) task {
	if c.Discovery != EVPNDiscovery {
		s.locked(func() { s.evpn = nil })
		return startTask(ctx, func(context.Context) {})
	}
	self := &podKernel{changed: make(chan struct{}, 1)}
	joined := &evpnMember{evpn.New(evpn.Config{
		AS: c.EVPN.AS, RouterID: c.routerID(), Peers: c.EVPN.peers, ReflectorPassword: c.EVPN.reflectorPassword, Kernel: self, WithdrawOnStop: true, Log: s.Log,
	}), self}
	s.locked(func() { s.evpn = joined })
	signal(s.changed)
	return startTask(ctx, func(ctx context.Context) {
		var follow sync.WaitGroup
		follow.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case <-joined.Changed():
					signal(s.changed)
				}
			}
		})
		if err := joined.Run(ctx); err != nil && ctx.Err() == nil {
			fail(err)
		}
		follow.Wait()
	})
}

func (s *Sidecar) evpnMember() *evpnMember {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.evpn
}

// setReflectors tells the fabric where the pods of its reflectors' Service are.
func (s *Sidecar) setReflectors(ctx context.Context, reflectors *Service, parts []discoveryv1.EndpointSlice) {
	joined := s.evpnMember()
	if joined == nil || reflectors == nil {
		return
	}
	theirs := slices.DeleteFunc(slices.Clone(parts), func(part discoveryv1.EndpointSlice) bool { return serviceOf(part) != *reflectors })
	if err := joined.SetReflectors(ctx, evpn.ReflectorEndpoints(theirs)); err != nil {
		s.Log.Error("cannot speak with every reflector, trying again when one changes", "service", reflectors, "err", err)
	}
}

// fill adds to what the pod should have what others have told, if anything yet.
func (m *evpnMember) fill(want *segment.PodVXLAN) {
	want.VXLAN.NoLearning = true
	told := segment.Segment{Netns: want.VXLAN.Name, VXLAN: want.VXLAN}
	if m != nil {
		m.Fill(&told)
	}
	want.FDB = told.FDB
	want.Partial = want.Partial || told.Partial || told.Remotes == nil
	want.Remotes = sorted(append(want.Remotes, told.Remotes...))
}

// setEVPN tells others that the pod is in the LAN, with the address that its interface has.
func (s *Sidecar) setEVPN(joined *evpnMember, want segment.PodVXLAN, have segment.PodVXLANState) {
	v, mac := want.VXLAN, macvrf.MAC(have.Link.MAC)
	joined.Set(map[string]macvrf.LAN{v.Name: {VNI: v.VNI, VTEP: v.Local, Claimed: true, Attached: []macvrf.MAC{mac}}})
	var addresses []netip.Addr
	for _, a := range have.Addresses {
		addresses = append(addresses, a.Addr())
	}
	trouble := problemText(joined.Problems(v.Name))
	s.mu.Lock()
	defer s.mu.Unlock()
	joined.pod.set(mac, addresses)
	if trouble != s.evpnProblem && trouble != "" {
		s.Log.Warn("the LAN is not whole", "why", trouble)
	}
	s.evpnProblem = trouble
}

// problemText is what of a LAN's routes does not go together; that no session is up, the sessions tell themselves.
func problemText(t evpn.Problems) string {
	var all []string
	if len(t.Duplicates) > 0 {
		all = append(all, fmt.Sprintf("%s is this interface's, and is told from elsewhere: give vxlan.mac, or pods names of their own", t.Duplicates[0]))
	}
	if len(t.Withheld) > 0 {
		all = append(all, fmt.Sprintf("%s is told nothing, for the pod's address is IPv6: give it ipv6-vteps if it takes them", t.Withheld[0]))
	}
	if t.Refusals > 0 {
		all = append(all, t.Refused.String())
	}
	return strings.Join(all, "; ")
}

// sessionsErr is why nothing is known from other routers; nil where a session is up.
func sessionsErr(sessions []bgp.Session) error {
	if len(sessions) == 0 {
		return errors.New("there is nobody to speak BGP with yet")
	}
	if slices.ContainsFunc(sessions, func(s bgp.Session) bool { return s.Up }) {
		return nil
	}
	return fmt.Errorf("no BGP session is up, to %s: %s", sessions[0].Peer, sessions[0].Why)
}

// podKernel is the pod as its fabric sees it: in no bridge, so that nobody else is there.
type podKernel struct {
	changed chan struct{}

	mu        sync.Mutex
	mac       [6]byte
	addresses []netip.Addr
}

// set says what its interface has.
func (st *podKernel) set(mac [6]byte, addresses []netip.Addr) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.mac == mac && slices.Equal(st.addresses, addresses) {
		return
	}
	st.mac, st.addresses = mac, addresses
	signal(st.changed)
}

// WatchFDB is for fabric.Stations: nobody comes or goes.
func (st *podKernel) WatchFDB(ctx context.Context, _ kernel.FDBEvents) error {
	<-ctx.Done()
	return nil
}

// LocalMACs is for fabric.Stations.
func (st *podKernel) LocalMACs(string) ([][6]byte, error) { return nil, nil }

// WatchBindings is for fabric.Stations: the interface's own addresses.
func (st *podKernel) WatchBindings(ctx context.Context, _ string, tell kernel.Bindings) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-st.changed:
		}
		st.mu.Lock()
		mac, addresses := st.mac, st.addresses
		st.mu.Unlock()
		for _, a := range addresses {
			tell.Bound(mac, a)
		}
	}
}

// needsNewInstance says whether it takes another speaker than before.
func (c *Config) needsNewInstance(old Config) bool {
	return c.Discovery != old.Discovery || c.EVPN.AS != old.EVPN.AS || c.routerID() != old.routerID()
}

// watchedServices are the Services whose endpoints have to be known.
func (c *Config) watchedServices() []Service {
	asked := slices.Clone(c.Services)
	if r := c.EVPN.Reflectors; c.Discovery == EVPNDiscovery && r != nil && !slices.Contains(asked, *r) {
		asked = append(asked, *r)
	}
	return asked
}
