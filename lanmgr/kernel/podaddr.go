package kernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/rtnl"
)

// Addressing is the addresses of a pod's interface, with their prefix lengths, and the routes through it.
type Addressing struct {
	Addresses []netip.Prefix
	Routes    []Route
}

// Route is one route through a pod's interface.
type Route struct {
	Destination netip.Prefix
	Gateway     netip.Addr // invalid: the destination is on the link
	MTU, AdvMSS int        // bytes; 0: the link's
	Priority    int        // 0: the kernel's default
	Table       *int       // nil: main
	Scope       *int       // nil: link for an IPv4 route without a gateway, else global
}

// dadTime is how long duplicate address detection may take: it is over after 1 to 2 seconds (RFC 4862, with a random
// delay of up to 1 s before the one probe), and Linux may take 1 s to see a new link's carrier.
const dadTime = 5 * time.Second

// SetAddresses sets the addresses and routes of a pod's interface. It returns when the addresses can be used: for IPv6,
// after duplicate address detection in the LAN.
func (n *Node) SetAddresses(ctx context.Context, podNetns, ifname string, want Addressing) error {
	ns, err := netns.Open(podNetns)
	if err != nil {
		return fmt.Errorf("pod's network namespace: %w", err)
	}
	c, err := dial(ns)
	if err != nil {
		return err
	}
	defer c.close()
	link, err := c.LinkByName(ifname)
	if err != nil {
		return fmt.Errorf("pod's interface %s: %w", ifname, err)
	}
	settle, stop, err := c.startAddressing(link, want.Addresses)
	if err != nil {
		return err
	}
	defer stop()
	for _, a := range want.Addresses {
		if err := c.AddrAdd(link, &netlink.Addr{IPNet: ipNet(a)}); err != nil {
			return fmt.Errorf("give %s the address %s: %w", ifname, a, err)
		}
	}
	if err := settle(ctx); err != nil {
		return err
	}
	for _, r := range want.Routes {
		if err := c.RouteAddEcmp(r.netlink(link.Attrs().Index)); err != nil {
			return fmt.Errorf("give the pod a route to %s by %s through %s: %w", r.Destination, r.Gateway, ifname, err)
		}
	}
	return nil
}

// startAddressing prepares the link for addresses. settle waits until those of IPv6 can be used.
func (c *conn) startAddressing(link netlink.Link, addresses []netip.Prefix) (
	settle func(context.Context) error, stop func(), err error,
) {
	pending := map[netip.Addr]bool{}
	for _, a := range addresses {
		if a.Addr().Is6() {
			pending[a.Addr()] = true
		}
	}
	if len(pending) == 0 {
		return func(context.Context) error { return nil }, func() {}, nil
	}
	if err := netns.Do(c.ns, func() error { return allowIPv6(link.Attrs().Name) }); err != nil {
		return nil, nil, err
	}
	// This is before the first address is set, so that no change of one is missed.
	updates, done := make(chan netlink.AddrUpdate), make(chan struct{})
	if err := netlink.AddrSubscribeAt(c.ns, updates, done); err != nil {
		return nil, nil, fmt.Errorf("watch the pod's addresses: %w", err)
	}
	settle = func(ctx context.Context) error { return awaitAddresses(ctx, link.Attrs().Index, pending, updates) }
	stop = func() {
		close(done)
		for range updates { // the sender ends after its last update
		}
	}
	return settle, stop, nil
}

// awaitAddresses returns when none of the pending addresses is tentative any more.
func awaitAddresses(
	ctx context.Context, index int, pending map[netip.Addr]bool, updates <-chan netlink.AddrUpdate,
) error {
	ctx, cancel := context.WithTimeout(ctx, dadTime)
	defer cancel()
	for len(pending) > 0 {
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for duplicate address detection of %d addresses: %w", len(pending), ctx.Err())
		case u, ok := <-updates:
			if !ok {
				return errors.New("wait for duplicate address detection: the kernel ended the subscription")
			}
			addr, _ := netip.AddrFromSlice(u.LinkAddress.IP)
			switch {
			case u.LinkIndex != index || !pending[addr]:
			case u.Flags&unix.IFA_F_DADFAILED != 0 || !u.NewAddr:
				return fmt.Errorf("address %s is in use in the LAN already (duplicate address detection)", addr)
			case u.Flags&unix.IFA_F_TENTATIVE == 0:
				delete(pending, addr)
			}
		}
	}
	return nil
}

// Addresses lists the addresses of a pod's interface, with their prefix lengths.
func (n *Node) Addresses(_ context.Context, podNetns, ifname string) ([]netip.Prefix, error) {
	ns, err := netns.Open(podNetns)
	if err != nil {
		return nil, fmt.Errorf("pod's network namespace: %w", err)
	}
	c, err := dial(ns)
	if err != nil {
		return nil, err
	}
	defer c.close()
	link, err := c.LinkByName(ifname)
	if err != nil {
		return nil, fmt.Errorf("pod's interface %s: %w", ifname, err)
	}
	addrs, err := rtnl.RetryDump(func() ([]netlink.Addr, error) { return c.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list the addresses of %s: %w", ifname, err)
	}
	var prefixes []netip.Prefix
	for _, a := range addrs {
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			ones, _ := a.Mask.Size()
			prefixes = append(prefixes, netip.PrefixFrom(addr.Unmap(), ones))
		}
	}
	return prefixes, nil
}

// netlink returns the route in the library's form.
func (r Route) netlink(index int) *netlink.Route {
	route := &netlink.Route{
		LinkIndex: index, Dst: ipNet(r.Destination),
		MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority,
	}
	if r.Gateway.IsValid() {
		route.Gw = r.Gateway.AsSlice()
	} else if r.Destination.Addr().Is4() {
		route.Scope = netlink.SCOPE_LINK
	}
	if r.Table != nil {
		route.Table = *r.Table
	}
	if r.Scope != nil {
		route.Scope = netlink.Scope(*r.Scope)
	}
	return route
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
