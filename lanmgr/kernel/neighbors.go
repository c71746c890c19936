package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/rtnl"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// readNeighbors reads the neighbours that were set on a segment's bridge, if it may have any.
func (c *conn) readNeighbors(s *segment.State) error {
	if !s.MayHaveNeighbors() {
		return nil
	}
	for i := range s.Links {
		bridge := &s.Links[i]
		if bridge.Type != "bridge" {
			continue
		}
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			list, err := rtnl.RetryDump(func() ([]netlink.Neigh, error) { return c.NeighList(bridge.Index, family) })
			if err != nil {
				return fmt.Errorf("list the neighbours of %s: %w", bridge.Name, err)
			}
			for _, n := range list {
				ip, ok := netip.AddrFromSlice(n.IP)
				if ok && n.Flags&netlink.NTF_EXT_LEARNED != 0 && len(n.HardwareAddr) == 6 {
					neighbor := segment.Neighbor{IP: ip.Unmap(), MAC: [6]byte(n.HardwareAddr)}
					bridge.Neighbors = append(bridge.Neighbors, neighbor)
				}
			}
		}
		slices.SortFunc(bridge.Neighbors, func(a, b segment.Neighbor) int { return a.IP.Compare(b.IP) })
	}
	return nil
}

// changeNeighbors sets or deletes neighbours of a bridge. They are permanent, because the kernel drops others while the
// bridge has no carrier, or when no program uses them (neigh_flush_dev and neigh_timer_handler in
// net/core/neighbour.c). A kernel without IPv6 refuses those of IPv6, which is no error.
func (c *conn) changeNeighbors(bridge string, neighbors []segment.Neighbor, change func(*netlink.Neigh) error) error {
	return c.with(bridge, func(l netlink.Link) error {
		for _, n := range neighbors {
			family := unix.AF_INET
			if n.IP.Is6() {
				family = unix.AF_INET6
			}
			err := change(&netlink.Neigh{
				LinkIndex: l.Attrs().Index, Family: family, IP: n.IP.AsSlice(), HardwareAddr: n.MAC[:],
				State: netlink.NUD_PERMANENT, Flags: netlink.NTF_EXT_LEARNED,
			})
			if err != nil && !(n.IP.Is6() && errors.Is(err, unix.EAFNOSUPPORT)) {
				return fmt.Errorf("neighbour %s: %w", n.IP, err)
			}
		}
		return nil
	})
}
