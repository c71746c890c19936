package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/rtnl"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// PodNetns is the network namespace that the program itself is in: a pod's.
type PodNetns struct{ conn *conn }

// OpenPodNetns connects to it. Nothing of Own enters a namespace: that needs CAP_SYS_ADMIN, and who has CAP_NET_ADMIN alone shall be able to use it.
func OpenPodNetns() (*PodNetns, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	c := &conn{Handle: h, ns: netns.None()}
	if err := c.dialRTNL(); err != nil {
		c.close()
		return nil, err
	}
	return &PodNetns{c}, nil
}

// Close ends the connection.
func (o *PodNetns) Close() { o.conn.close() }

// Observe reads a VXLAN of that name as it is, and what there is under other names from before.
func (o *PodNetns) Observe(name string) (s segment.PodVXLANState, err error) {
	links, err := o.conn.links()
	if err != nil {
		return s, err
	}
	for _, l := range links {
		if l.Name != name && l.Type == "vxlan" && segment.Marked(l) {
			s.Others = append(s.Others, l)
		}
	}
	i := slices.IndexFunc(links, func(l segment.Link) bool { return l.Name == name })
	if i < 0 {
		return s, nil
	}
	s.Link = links[i]
	if s.Link.Type != "vxlan" {
		return s, nil
	}
	if err := o.conn.readFDB(&s.Link); err != nil {
		return s, fmt.Errorf("list the remotes of %s: %w", name, err)
	}
	addresses, err := rtnl.RetryDump(func() ([]netlink.Addr, error) { return o.conn.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return s, fmt.Errorf("list the addresses of %s: %w", name, err)
	}
	for _, a := range addresses {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && a.LinkIndex == s.Link.Index {
			bits, _ := a.Mask.Size()
			s.Addresses = append(s.Addresses, netip.PrefixFrom(ip.Unmap(), bits))
		}
	}
	return s, nil
}

// Apply does operations of segment.DiffAlone one after the other, up to the first that fails.
func (o *PodNetns) Apply(ctx context.Context, ops []segment.Op) error {
	for _, op := range ops {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := o.apply(op); err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
	}
	return nil
}

func (o *PodNetns) apply(op segment.Op) error {
	switch op := op.(type) {
	case segment.AddVXLAN:
		return addVXLAN(o.conn, o.conn, op)
	case segment.AddAddress:
		if op.Address.Addr().Is6() {
			if err := allowIPv6(op.Name); err != nil {
				return err
			}
		}
	}
	return o.conn.apply(op)
}

// Remove deletes a VXLAN of that name; one that is not there is no error, and what is no VXLAN stays.
func (o *PodNetns) Remove(name string) error {
	l, ok, err := o.conn.link(name)
	if err != nil || !ok || l.Type() != "vxlan" {
		return err
	}
	return o.conn.delLink(name)
}

// FrameCounts are how many frames an interface has received and sent since it is there.
func (o *PodNetns) FrameCounts(name string) (received, sent uint64, err error) {
	l, ok, err := o.conn.link(name)
	if err != nil || !ok || l.Attrs().Statistics == nil {
		return 0, 0, err
	}
	s := l.Attrs().Statistics
	return s.RxPackets, s.TxPackets, nil
}

// SourceAddress is the address that packets by a default route have, that of IPv4 before that of IPv6 where both would do; the zero Addr if there
// is none.
func (o *PodNetns) SourceAddress(ipv4, ipv6 bool) (netip.Addr, error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if family == netlink.FAMILY_V4 && !ipv4 || family == netlink.FAMILY_V6 && !ipv6 {
			continue
		}
		routes, err := rtnl.RetryDump(func() ([]netlink.Route, error) {
			return o.conn.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN, Dst: nil}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		})
		if err != nil {
			return netip.Addr{}, fmt.Errorf("list the pod's default routes: %w", err)
		}
		for _, r := range routes {
			if a, ok := netip.AddrFromSlice(r.Src); ok {
				return a.Unmap(), nil
			}
			if a, err := o.firstAddress(r.LinkIndex, family); err != nil || a.IsValid() {
				return a, err
			}
		}
	}
	return netip.Addr{}, nil
}

// firstAddress is the first of a link's that reaches further than the link.
func (o *PodNetns) firstAddress(index, family int) (netip.Addr, error) {
	all, err := rtnl.RetryDump(func() ([]netlink.Addr, error) { return o.conn.AddrList(nil, family) })
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list the pod's addresses: %w", err)
	}
	for _, a := range all {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && a.LinkIndex == index && a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&passing == 0 {
			return ip.Unmap(), nil
		}
	}
	return netip.Addr{}, nil
}

// LinkByAddress is the link that has an address, and its MTU in bytes; none if no link has it.
func (o *PodNetns) LinkByAddress(address netip.Addr) (name string, mtu int, err error) {
	all, err := rtnl.RetryDump(func() ([]netlink.Addr, error) { return o.conn.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return "", 0, fmt.Errorf("list the pod's addresses: %w", err)
	}
	for _, a := range all {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == address {
			l, err := o.conn.LinkByIndex(a.LinkIndex)
			if err != nil {
				return "", 0, fmt.Errorf("look up the link with %s: %w", address, err)
			}
			return l.Attrs().Name, l.Attrs().MTU, nil
		}
	}
	return "", 0, nil
}

// addAddress gives a link an address; one that it has is no error.
func (c *conn) addAddress(l netlink.Link, a netip.Prefix) error {
	if err := c.AddrAdd(l, &netlink.Addr{IPNet: ipNet(a)}); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// delAddress takes an address off a link; one that it has not is no error.
func (c *conn) delAddress(l netlink.Link, a netip.Prefix) error {
	if err := c.AddrDel(l, &netlink.Addr{IPNet: ipNet(a)}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return err
	}
	return nil
}
