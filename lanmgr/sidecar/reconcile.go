package sidecar

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/retry"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// reconcileLoop reconciles the interface whenever something may have changed, and again after a failure.
func (s *Sidecar) reconcileLoop(ctx context.Context) error {
	timer := retry.NewTimer(retry.Default)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.changed:
		case <-timer.C:
		}
		err := s.reconcile(ctx)
		var hook *hookError
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.As(err, &hook):
			return err
		case err != nil:
			if timer.Failed(err) {
				s.Log.Error("the interface is not as it should be, trying again", "err", err)
			}
		default:
			timer.Succeeded()
		}
		s.locked(func() { s.buildErr, s.built = err, err == nil })
	}
}

// hookError says that an up hook failed.
type hookError struct{ error }

// reconcile makes the interface as it should be.
func (s *Sidecar) reconcile(ctx context.Context) error {
	s.mu.Lock()
	config, all, member, oldName := s.config, s.endpoints, s.evpn, s.want.VXLAN.Name
	s.mu.Unlock()
	want, peers, err := s.desired(config, all, member)
	if err != nil {
		return err
	}
	if oldName != "" && oldName != want.VXLAN.Name {
		if err := s.netns.Remove(oldName); err != nil {
			return fmt.Errorf("remove %s: %w", oldName, err)
		}
	}
	s.locked(func() { s.want = want })
	have, err := s.applyAndPrepare(ctx, config, want)
	if err != nil {
		return err
	}
	if member != nil && have.Link.Index != 0 {
		s.advertise(member, want, have)
	}
	if all != nil {
		s.locked(func() { s.peers = peers })
		s.peersChanged.Set()
	}
	return nil
}

// desired returns what the interface should be, and which of the Services' endpoints are peers.
func (s *Sidecar) desired(
	c Config, all endpoints, member *evpnMember,
) (w segment.PodVXLAN, peers endpoints, err error) {
	address, mtu, err := s.addressAndMTU(c)
	if err != nil {
		return w, nil, err
	}
	peers = all.peers(address, c.IP)
	configured := endpoints{Service{}: c.Peers}.peers(address, c.IP)
	w = segment.PodVXLAN{
		VXLAN: segment.VXLAN{Name: c.VXLAN.Interface, VNI: c.VXLAN.VNI, Port: c.VXLAN.Port, Local: address},
		MTU:   mtu, MAC: c.mac(), Addresses: c.VXLAN.Addresses,
		Remotes: sorted(append(peers.union(), configured.union()...)), Partial: all == nil,
	}
	if c.Discovery == EVPNDiscovery {
		member.fill(&w)
	}
	return w, peers, nil
}

// applyAndPrepare makes the interface as it should be, and runs the up hook on an interface that is new.
func (s *Sidecar) applyAndPrepare(
	ctx context.Context, config Config, want segment.PodVXLAN,
) (segment.PodVXLANState, error) {
	for {
		have, unprepared, err := s.apply(ctx, config, want)
		if err != nil || !unprepared {
			return have, err
		}
		if len(config.Hooks.Up) > 0 {
			iface := "IFACE=" + want.VXLAN.Name
			if err := runHook(ctx, s.Log, "up", config.Hooks, config.Hooks.Up, s.Environment, iface); err != nil {
				return have, &hookError{err}
			}
		}
		want.Prepared = true
	}
}

// apply observes the interface and applies the operations that differ. unprepared says that it has an interface now on
// which the up hook has not run.
func (s *Sidecar) apply(
	ctx context.Context, config Config, want segment.PodVXLAN,
) (have segment.PodVXLANState, unprepared bool, err error) {
	if have, err = s.netns.Observe(want.VXLAN.Name); err != nil {
		return have, false, err
	}
	ops, err := segment.DiffPodVXLAN(want, have)
	if err != nil {
		return have, false, err
	}
	remotes := want.Remotes
	if want.Partial {
		remotes = sorted(append(slices.Clone(have.Link.VXLAN.Remotes), remotes...))
	}
	s.setFilter(config, want.VXLAN, remotes)
	unprepared = !want.Prepared && !have.Prepared()
	for _, op := range ops {
		if _, ok := op.(segment.AddVXLAN); ok && !want.Prepared {
			unprepared = true
		}
		s.Log.Debug("applying", "op", op.String())
	}
	if err := s.netns.Apply(ctx, ops); err != nil {
		return have, false, err
	}
	if len(ops) > 0 {
		s.Log.Info("interface changed", "interface", want.VXLAN.Name, "ops", len(ops), "peers", len(want.Remotes))
	}
	s.locked(func() { s.remotes = len(remotes) })
	return have, unprepared, nil
}

// overhead4 and overhead6 are the bytes that VXLAN adds to a frame's payload: inner Ethernet, VXLAN, UDP and IP
// headers. kubelan subtracts the same, so that its pods have the same MTU. Frames with VLAN tags have less room. With
// discovery evpn pods have the MTU of nodes' LANs instead, which leaves room for two tags.
const (
	overhead4 = 50
	overhead6 = 70
)

// addressAndMTU returns the pod's address that is the VTEP, and the MTU of the interface.
func (s *Sidecar) addressAndMTU(c Config) (address netip.Addr, mtu int, err error) {
	if i := slices.IndexFunc(c.IP, c.isOfFamily); i >= 0 {
		address = c.IP[i]
	} else if address, err = s.netns.SourceAddress(c.IPFamily != "ipv6", c.IPFamily != "ipv4"); err != nil {
		return address, 0, err
	}
	if !address.IsValid() {
		return address, 0, errors.New("the pod has no default route to take an address from: set ip, from status.podIP")
	}
	link, mtu, err := s.netns.LinkByAddress(address)
	switch {
	case err != nil:
		return address, 0, err
	case link == "":
		return address, 0, fmt.Errorf(
			"no interface of the pod has the address %s: set ip from status.podIP, or leave it out", address)
	case c.VXLAN.MTU > 0:
		return address, c.VXLAN.MTU, nil
	}
	return address, mtu - c.overhead(address), nil
}

func (c *Config) overhead(address netip.Addr) int {
	switch {
	case c.Discovery == EVPNDiscovery && address.Is4():
		return segment.Overhead4
	case c.Discovery == EVPNDiscovery:
		return segment.Overhead6
	case address.Is4():
		return overhead4
	}
	return overhead6
}

// mac returns the MAC of the interface: as configured, else derived from the pod's name; nil if that is not known.
func (c *Config) mac() net.HardwareAddr {
	if mac, err := net.ParseMAC(c.VXLAN.MAC); err == nil {
		return mac
	}
	if c.Namespace == "" || c.Pod == "" {
		return nil
	}
	return segment.PodVXLANMAC(c.Namespace, c.Pod, c.VXLAN.Interface)
}

// setFilter makes the firewall drop VXLAN packets from sources other than the remotes, if strict_peers is set.
func (s *Sidecar) setFilter(c Config, v segment.VXLAN, remotes []netip.Addr) {
	var lans []firewall.LAN
	if c.StrictPeers {
		lans = []firewall.LAN{{Name: v.Name, Port: v.Port, VNI: v.VNI, Members: remotes}}
	}
	s.filter.Set(lans)
}

// removeInterface removes the interface and the firewall's table.
func (s *Sidecar) removeInterface() error {
	name := s.want.VXLAN.Name
	if name == "" {
		return nil
	}
	err := s.netns.Remove(name)
	if s.config.StrictPeers {
		err = errors.Join(err, firewall.Remove("", s.filterName))
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	s.Log.Info("interface removed", "interface", name)
	return nil
}
