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

// PodNetns is the network namespace of the program itself, in a pod.
type PodNetns struct{ conn *conn }

// OpenPodNetns connects to the program's network namespace. No method of PodNetns enters a namespace, because that
// needs CAP_SYS_ADMIN; CAP_NET_ADMIN is enough.
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
func (p *PodNetns) Close() { p.conn.close() }

// Observe reads a VXLAN of that name, and those that an earlier run has left under other names.
func (p *PodNetns) Observe(name string) (s segment.PodVXLANState, err error) {
	links, err := p.conn.links()
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
	if err := p.conn.readFDB(&s.Link); err != nil {
		return s, fmt.Errorf("list the remotes of %s: %w", name, err)
	}
	addresses, err := rtnl.RetryDump(func() ([]netlink.Addr, error) { return p.conn.AddrList(nil, netlink.FAMILY_ALL) })
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

// Apply applies operations of segment.DiffPodVXLAN, up to the first that fails.
func (p *PodNetns) Apply(ctx context.Context, ops []segment.Op) error {
	for _, op := range ops {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := p.apply(op); err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
	}
	return nil
}

func (p *PodNetns) apply(op segment.Op) error {
	switch op := op.(type) {
	case segment.AddVXLAN:
		return addVXLAN(p.conn, p.conn, op)
	case segment.AddAddress:
		if op.Address.Addr().Is6() {
			if err := allowIPv6(op.Name); err != nil {
				return err
			}
		}
	}
	return p.conn.apply(op)
}

// Remove deletes a VXLAN of that name. It is no error if there is none. A link of another type stays.
func (p *PodNetns) Remove(name string) error {
	l, ok, err := p.conn.link(name)
	if err != nil || !ok || l.Type() != "vxlan" {
		return err
	}
	return p.conn.delLink(name)
}

// FrameCounts returns how many frames an interface has received and sent.
func (p *PodNetns) FrameCounts(name string) (received, sent uint64, err error) {
	l, ok, err := p.conn.link(name)
	if err != nil || !ok || l.Attrs().Statistics == nil {
		return 0, 0, err
	}
	s := l.Attrs().Statistics
	return s.RxPackets, s.TxPackets, nil
}

// SourceAddress returns the source address of packets by a default route, or the zero Addr if there is none. Where both
// families are asked for, IPv4 comes first.
func (p *PodNetns) SourceAddress(ipv4, ipv6 bool) (netip.Addr, error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if family == netlink.FAMILY_V4 && !ipv4 || family == netlink.FAMILY_V6 && !ipv6 {
			continue
		}
		routes, err := p.conn.defaultRoutes(family)
		if err != nil {
			return netip.Addr{}, fmt.Errorf("list the pod's default routes: %w", err)
		}
		for _, r := range routes {
			if a, ok := netip.AddrFromSlice(r.Src); ok {
				return a.Unmap(), nil
			}
			if a, err := p.firstAddress(r.LinkIndex, family); err != nil || a.IsValid() {
				return a, err
			}
		}
	}
	return netip.Addr{}, nil
}

// firstAddress returns the first address of a link with a scope beyond the link.
func (p *PodNetns) firstAddress(index, family int) (netip.Addr, error) {
	all, err := rtnl.RetryDump(func() ([]netlink.Addr, error) { return p.conn.AddrList(nil, family) })
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list the pod's addresses: %w", err)
	}
	for _, a := range all {
		usable := a.LinkIndex == index && a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&transient == 0
		if ip, ok := netip.AddrFromSlice(a.IP); ok && usable {
			return ip.Unmap(), nil
		}
	}
	return netip.Addr{}, nil
}

// LinkByAddress returns the link that has an address, and its MTU in bytes. It returns no name if no link has it.
func (p *PodNetns) LinkByAddress(address netip.Addr) (name string, mtu int, err error) {
	all, err := rtnl.RetryDump(func() ([]netlink.Addr, error) { return p.conn.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return "", 0, fmt.Errorf("list the pod's addresses: %w", err)
	}
	for _, a := range all {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == address {
			l, err := p.conn.LinkByIndex(a.LinkIndex)
			if err != nil {
				return "", 0, fmt.Errorf("look up the link with %s: %w", address, err)
			}
			return l.Attrs().Name, l.Attrs().MTU, nil
		}
	}
	return "", 0, nil
}

// addAddress adds an address to a link. It is no error if the link has it.
func (c *conn) addAddress(l netlink.Link, a netip.Prefix) error {
	if err := c.AddrAdd(l, &netlink.Addr{IPNet: ipNet(a)}); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// delAddress removes an address from a link. It is no error if the link does not have it.
func (c *conn) delAddress(l netlink.Link, a netip.Prefix) error {
	if err := c.AddrDel(l, &netlink.Addr{IPNet: ipNet(a)}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return err
	}
	return nil
}
