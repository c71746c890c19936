package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/rtnl"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// LocalMACs returns the MACs on a LAN's local ports. A LAN that is not on the node has none.
func (n *Node) LocalMACs(netnsName string) (macs [][6]byte, err error) {
	o := n.acquire(netnsName)
	if o == nil {
		return nil, nil
	}
	defer n.put(o)
	r, err := o.conn.requests()
	if err != nil {
		return nil, err
	}
	links, err := r.Links()
	if err != nil {
		return nil, fmt.Errorf("read the MACs on %s: %w", netnsName, err)
	}
	vxlans := map[int]bool{}
	for _, l := range links {
		if l.Type == "vxlan" {
			vxlans[l.Index] = true
		}
	}
	for _, l := range links {
		if l.Type != "bridge" {
			continue
		}
		entries, err := r.BridgeFDB(l.Index)
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return nil, fmt.Errorf("read the MACs on %s: %w", netnsName, err)
		}
		for _, e := range entries {
			if e.Master == l.Index && !vxlans[e.Index] && !e.InVXLAN() && !e.IsExternal() && !e.IsPermanent() {
				macs = append(macs, e.MAC)
			}
		}
	}
	return macs, nil
}

// MACs lists the MACs of a segment, sorted: those learned on its ports, and those behind VTEPs, learned or advertised.
func (n *Node) MACs(ctx context.Context, netnsName string) ([]segment.MACEntry, error) {
	state, err := n.Observe(ctx, netnsName)
	if err != nil {
		return nil, err
	}
	o := n.acquire(netnsName)
	if o == nil {
		return nil, fmt.Errorf("the LAN is not on this node: there is no namespace %s", n.netnsPath(netnsName))
	}
	defer n.put(o)
	r, err := o.conn.requests()
	if err != nil {
		return nil, err
	}
	entries, err := r.FDB()
	if err != nil {
		return nil, fmt.Errorf("read the MACs on %s: %w", netnsName, err)
	}
	links := map[int]segment.Link{}
	for _, l := range state.Links {
		links[l.Index] = l
	}
	places := map[[6]byte]segment.MACEntry{}
	for _, e := range entries {
		link := links[e.Index]
		spoke, isPort := link.Spoke()
		switch {
		case e.MAC == [6]byte{}:
		case e.InVXLAN() && link.Type == "vxlan" && e.VTEP.IsValid():
			if places[e.MAC].Spoke == "" { // a bridge that has the MAC on a port does not send to its VXLAN
				places[e.MAC] = segment.MACEntry{MAC: net.HardwareAddr(e.MAC[:]).String(), VTEP: e.VTEP}
			}
		case !e.InVXLAN() && isPort && !e.IsPermanent():
			places[e.MAC] = segment.MACEntry{MAC: net.HardwareAddr(e.MAC[:]).String(), Spoke: spoke, LastSeen: e.Age}
		}
	}
	byMAC := func(a, b segment.MACEntry) int { return strings.Compare(a.MAC, b.MAC) }
	return slices.SortedFunc(maps.Values(places), byMAC), nil
}

// flooded is the MAC of the entries for remotes in a VXLAN's FDB (all_zeros_mac in drivers/net/vxlan/vxlan_core.c).
var flooded = make(net.HardwareAddr, 6)

// changeRemotes adds or deletes remotes one by one. It names no device, because the kernel would look for it in the
// LAN's namespace (vxlan_fdb_parse). The node's routes decide by which device a packet leaves.
func (c *conn) changeRemotes(vxlan string, remotes []netip.Addr, change func(*netlink.Neigh) error) error {
	return c.with(vxlan, func(l netlink.Link) error {
		for _, r := range remotes {
			err := change(&netlink.Neigh{
				LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, HardwareAddr: flooded, IP: r.AsSlice(),
				Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT,
			})
			if err != nil {
				return fmt.Errorf("remote %s: %w", r, err)
			}
		}
		return nil
	})
}

// forgetBehind deletes the MACs that a VXLAN has learned behind these remotes. It deletes an entry by its MAC without
// the remote: one that has moved there from a link-local address has a device, which cannot be named (see
// changeRemotes).
func (c *conn) forgetBehind(vxlan string, remotes []netip.Addr) error {
	return c.with(vxlan, func(l netlink.Link) error {
		index := l.Attrs().Index
		entries, err := rtnl.RetryDump(func() ([]netlink.Neigh, error) { return c.NeighList(index, unix.AF_BRIDGE) })
		if err != nil {
			return fmt.Errorf("list what it has learned: %w", err)
		}
		for _, e := range entries {
			remote, _ := netip.AddrFromSlice(e.IP)
			isLearned := e.Flags&netlink.NTF_SELF != 0 && e.State&netlink.NUD_PERMANENT == 0
			if !isLearned || !slices.Contains(remotes, remote.Unmap()) {
				continue
			}
			any := net.IPv6unspecified
			if remote.Unmap().Is4() {
				any = net.IPv4zero
			}
			err := c.delNeighbor(&netlink.Neigh{
				LinkIndex: index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF,
				HardwareAddr: e.HardwareAddr, IP: any,
			})
			if err != nil {
				return fmt.Errorf("forget %s behind %s: %w", e.HardwareAddr, remote, err)
			}
		}
		return nil
	})
}

// setFDB writes entries with one request for both halves of each: the VXLAN's and the bridge's. The VXLAN accepts their
// state, and does not age them because they are external (vxlan_fdb_parse and vxlan_cleanup in
// drivers/net/vxlan/vxlan_core.c).
func (c *conn) setFDB(o segment.SetFDB) error {
	return c.with(o.Name, func(l netlink.Link) error {
		for _, e := range o.Entries {
			err := c.NeighSet(&netlink.Neigh{
				LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, HardwareAddr: e.MAC[:], IP: e.VTEP.AsSlice(),
				State: netlink.NUD_REACHABLE, Flags: netlink.NTF_SELF | netlink.NTF_MASTER | netlink.NTF_EXT_LEARNED,
			})
			if err != nil {
				return fmt.Errorf("%s behind %s: %w", net.HardwareAddr(e.MAC[:]), e.VTEP, err)
			}
		}
		return nil
	})
}

// delFDB deletes entries with a request for each half: with one for both, the kernel leaves the second half where the
// first is gone (rtnl_fdb_del in net/core/rtnetlink.c).
func (c *conn) delFDB(o segment.DelFDB) error {
	return c.with(o.Name, func(l netlink.Link) error {
		for _, e := range o.Entries {
			n := netlink.Neigh{LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, HardwareAddr: e.MAC[:]}
			if e.Bridge {
				n.Flags = netlink.NTF_MASTER
				if err := c.delNeighbor(&n); err != nil {
					return fmt.Errorf("%s on the bridge: %w", n.HardwareAddr, err)
				}
			}
			if e.VTEP.IsValid() {
				n.Flags, n.IP = netlink.NTF_SELF, e.VTEP.AsSlice()
				if err := c.delNeighbor(&n); err != nil {
					return fmt.Errorf("%s behind %s: %w", n.HardwareAddr, e.VTEP, err)
				}
			}
		}
		return nil
	})
}

// delNeighbor deletes an entry of an FDB or a neighbour table. It is no error if the entry is gone.
func (c *conn) delNeighbor(n *netlink.Neigh) error {
	if err := c.NeighDel(n); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// readRemotes reads the remotes of each VXLAN that may have some. The kernel also dumps what the VXLAN and its bridge
// have learned on that port (rtnl_fdb_dump in net/core/rtnetlink.c has no finer filter).
func (c *conn) readRemotes(s *segment.State) error {
	for i := range s.Links {
		if !s.MayHaveRemotes(s.Links[i]) {
			continue
		}
		if err := c.readFDB(&s.Links[i]); err != nil {
			return fmt.Errorf("list the remotes of %s: %w", s.Links[i].Name, err)
		}
	}
	return nil
}

// readFDB reads a VXLAN's remotes, and the MACs that a program has set behind them.
func (c *conn) readFDB(vxlan *segment.Link) error {
	r, err := c.requests()
	if err != nil {
		return err
	}
	entries, err := r.PortFDB(vxlan.Index)
	if err != nil {
		return err
	}
	fdb := map[[6]byte]segment.FDBState{}
	for _, e := range entries {
		if e.Index != vxlan.Index {
			continue
		}
		entry := fdb[e.MAC]
		entry.MAC = e.MAC
		switch {
		case e.InVXLAN() && e.MAC == [6]byte{} && e.VTEP.IsValid() && !e.VTEP.IsMulticast():
			vxlan.VXLAN.Remotes = append(vxlan.VXLAN.Remotes, e.VTEP)
			continue
		case !e.IsExternal():
			continue
		case e.InVXLAN():
			entry.VTEP = e.VTEP
		default:
			entry.Bridge = true
		}
		fdb[e.MAC] = entry
	}
	slices.SortFunc(vxlan.VXLAN.Remotes, netip.Addr.Compare)
	byMAC := func(a, b segment.FDBState) int { return bytes.Compare(a.MAC[:], b.MAC[:]) }
	vxlan.VXLAN.FDB = slices.SortedFunc(maps.Values(fdb), byMAC)
	return nil
}
