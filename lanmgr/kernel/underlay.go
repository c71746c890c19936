package kernel

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/rtnl"
)

// Underlays are the links of the node's own netns that can carry a LAN to other nodes.
type Underlays struct {
	Devices map[string]Underlay // by name
	Default string              // the device of the default route, IPv4 before IPv6; empty if there is none
}

// Underlay is one such link.
type Underlay struct {
	Index   int
	MTU     int // bytes
	Up      bool
	Carrier bool
	IPv4    netip.Addr // first address of the family; the zero Addr if there is none
	IPv6    netip.Addr // link-local is preferred
	IPv6Off bool       // net.ipv6.conf.<device>.disable_ipv6

	// Addresses are those that other nodes can send to, in the kernel's order, without link-local ones and without IPv6
	// ones that are temporary, deprecated or tentative.
	Addresses []netip.Addr
	// Sources are all addresses that packets from it may have, sorted. They include tentative ones, which come into use
	// without an event.
	Sources []netip.Addr
}

// Underlays reads the links, addresses and default routes of the node's own netns.
func (n *Node) Underlays(context.Context) (Underlays, error) {
	c, err := n.dialHost()
	if err != nil {
		return Underlays{}, err
	}
	defer c.close()
	u := Underlays{Devices: map[string]Underlay{}}
	links, err := rtnl.RetryDump(func() ([]netlink.Link, error) { return c.LinkList() })
	if err != nil {
		return u, fmt.Errorf("list the node's links: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		a := l.Attrs()
		if a.RawFlags&unix.IFF_LOOPBACK != 0 {
			continue
		}
		names[a.Index] = a.Name
		u.Devices[a.Name] = Underlay{
			Index: a.Index, MTU: a.MTU, Up: a.RawFlags&unix.IFF_UP != 0, Carrier: a.RawFlags&unix.IFF_LOWER_UP != 0,
		}
	}
	addrs, err := rtnl.RetryDump(func() ([]netlink.Addr, error) { return c.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return u, fmt.Errorf("list the node's addresses: %w", err)
	}
	for _, a := range addrs {
		if name, ok := names[a.LinkIndex]; ok {
			u.Devices[name] = u.Devices[name].withAddress(a.IP, a.Flags)
		}
	}
	if u.Default, err = c.defaultDevice(names); err != nil {
		return u, err
	}
	return u, netns.Do(c.ns, func() error { return readIPv6Off(u.Devices) })
}

// transient are the flags of addresses that cannot be relied on: they are not valid yet, or not for long.
const transient = unix.IFA_F_TEMPORARY | unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED

// withAddress adds an address of the device.
func (d Underlay) withAddress(ip net.IP, flags int) Underlay {
	a, ok := netip.AddrFromSlice(ip)
	if a = a.Unmap(); !ok {
		return d
	}
	at, found := slices.BinarySearchFunc(d.Sources, a, netip.Addr.Compare)
	if !found && flags&unix.IFA_F_DADFAILED == 0 {
		d.Sources = slices.Insert(d.Sources, at, a)
	}
	if !a.IsLinkLocalUnicast() && flags&transient == 0 {
		d.Addresses = append(d.Addresses, a)
	}
	switch {
	case a.Is4() && !d.IPv4.IsValid():
		d.IPv4 = a
	case a.Is6() && (!d.IPv6.IsValid() || a.IsLinkLocalUnicast() && !d.IPv6.IsLinkLocalUnicast()):
		d.IPv6 = a
	}
	return d
}

// defaultRoutes lists the default routes of the main table.
func (c *conn) defaultRoutes(family int) ([]netlink.Route, error) {
	const by = netlink.RT_FILTER_TABLE | netlink.RT_FILTER_DST
	return rtnl.RetryDump(func() ([]netlink.Route, error) {
		return c.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN, Dst: nil}, by)
	})
}

// defaultDevice returns the device of the default route with the lowest metric.
func (c *conn) defaultDevice(names map[int]string) (string, error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := c.defaultRoutes(family)
		if err != nil {
			return "", fmt.Errorf("list the node's default routes: %w", err)
		}
		best, metric := "", 0
		for _, r := range routes {
			index := r.LinkIndex
			if index == 0 && len(r.MultiPath) > 0 {
				index = r.MultiPath[0].LinkIndex
			}
			if name, ok := names[index]; ok && (best == "" || r.Priority < metric) {
				best, metric = name, r.Priority
			}
		}
		if best != "" {
			return best, nil
		}
	}
	return "", nil
}
