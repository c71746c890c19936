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
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// FDBEvents is what the bridges of LANs tell of who is on their own ports.
type FDBEvents struct {
	// Learned says that a MAC has shown itself on a port of the LAN's bridge here; Left, that it is on none any more: it has been silent
	// for long, its port is gone, or it was told to be elsewhere.
	Learned, Removed func(netnsName string, mac [6]byte)
	// Overflow says that some of that was lost: Node.Stations tells how it is.
	Overflow func()
}

// WatchFDB tells of the MACs on local ports until the context ends. Those of a segment are told from when it was first
// observed; Node.Stations tells of those before.
func (n *Node) WatchFDB(ctx context.Context, tell FDBEvents) error {
	f, err := n.subscribe(true, ofBridges, unix.RTNLGRP_NEIGH)
	if err != nil {
		return fmt.Errorf("watch the MACs on LANs: %w", err)
	}
	tell.Overflow()
	return receive(ctx, f, func(msg []byte, from int) {
		name, ok := n.byNumber(from)
		if !ok || len(msg) < unix.SizeofNlMsghdr {
			return
		}
		length := int(nl.NativeEndian().Uint32(msg))
		if length < unix.SizeofNlMsghdr || length > len(msg) {
			return
		}
		e, ok := parseEntry(msg[unix.SizeofNlMsghdr:length])
		switch {
		case !ok || e.self() || e.state&netlink.NUD_PERMANENT != 0:
		case nl.NativeEndian().Uint16(msg[4:]) == unix.RTM_NEWNEIGH && !e.told() && !n.isVXLAN(name, e.index):
			tell.Learned(name, e.mac)
		default:
			tell.Removed(name, e.mac)
		}
	}, tell.Overflow)
}

// noteVXLAN notes which of a segment's links is its VXLAN: until learning is off on that port, the bridge tells of those behind it as well.
func (n *Node) noteVXLAN(h *held, links []segment.Link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h.vxlan = 0
	for _, l := range links {
		if l.Type == "vxlan" {
			h.vxlan = l.Index
		}
	}
}

func (n *Node) isVXLAN(name string, index int) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.held[name]
	return h != nil && h.vxlan == index
}

// LocalMACs are the MACs on a LAN's own ports now. A LAN that is not on the node has none.
func (n *Node) LocalMACs(netnsName string) (macs [][6]byte, err error) {
	h := n.inHand(netnsName)
	if h == nil {
		return nil, nil
	}
	defer n.giveBack(h)
	links, err := h.conn.links()
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
		msgs, err := h.conn.dumpFDB(func(*nl.IfInfomsg) {}, nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(l.Index))))
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return nil, fmt.Errorf("read the MACs on %s: %w", netnsName, err)
		}
		for _, m := range msgs {
			e, ok := parseEntry(m)
			if ok && e.master == l.Index && !vxlans[e.index] && !e.self() && !e.told() && e.state&netlink.NUD_PERMANENT == 0 {
				macs = append(macs, e.mac)
			}
		}
	}
	return macs, nil
}

// MACs is where a segment has MACs, sorted: those that have spoken on its ports, and those behind VTEPs, told or learnt.
func (n *Node) MACs(ctx context.Context, netnsName string) ([]segment.MACEntry, error) {
	state, err := n.Observe(ctx, netnsName)
	if err != nil {
		return nil, err
	}
	h := n.inHand(netnsName)
	if h == nil {
		return nil, fmt.Errorf("the LAN is not on this node: there is no namespace %s", n.netnsPath(netnsName))
	}
	defer n.giveBack(h)
	msgs, err := h.conn.dumpFDB(func(*nl.IfInfomsg) {})
	if err != nil {
		return nil, fmt.Errorf("read the MACs on %s: %w", netnsName, err)
	}
	links := map[int]segment.Link{}
	for _, l := range state.Links {
		links[l.Index] = l
	}
	places := map[[6]byte]segment.MACEntry{}
	for _, m := range msgs {
		e, ok := parseEntry(m)
		link := links[e.index]
		spoke, isPort := link.Spoke()
		switch {
		case !ok || e.mac == [6]byte{}:
		case e.self() && link.Type == "vxlan" && e.dst.IsValid():
			if places[e.mac].Spoke == "" { // a bridge with the MAC on a port does not ask its VXLAN
				places[e.mac] = segment.MACEntry{MAC: net.HardwareAddr(e.mac[:]).String(), VTEP: e.dst}
			}
		case !e.self() && isPort && e.state&netlink.NUD_PERMANENT == 0:
			places[e.mac] = segment.MACEntry{MAC: net.HardwareAddr(e.mac[:]).String(), Spoke: spoke, LastSeen: e.age}
		}
	}
	return slices.SortedFunc(maps.Values(places), func(a, b segment.MACEntry) int { return strings.Compare(a.MAC, b.MAC) }), nil
}

// ofBridges is a socket filter that lets the events of bridges' forwarding tables pass, those of VXLANs' own aside.
var ofBridges = []unix.SockFilter{
	{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: unix.SizeofNlMsghdr}, // ndm_family
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AF_BRIDGE, Jf: 3},
	{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: unix.SizeofNlMsghdr + 10}, // ndm_flags
	{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: netlink.NTF_SELF, Jt: 1},
	{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 18},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0},
}

// flooded is the address under which a VXLAN's table has those who get what is flooded (all_zeros_mac in
// drivers/net/vxlan/vxlan_core.c).
var flooded = make(net.HardwareAddr, 6)

// changeRemotes adds or deletes remotes one by one. No device is named: the kernel would look for it in the LAN's namespace
// (vxlan_fdb_parse), so the node's routes say by which device a packet leaves.
func (c *conn) changeRemotes(vxlan string, remotes []netip.Addr, change func(*netlink.Neigh) error) error {
	return c.with(vxlan, func(l netlink.Link) error {
		for _, r := range remotes {
			err := change(&netlink.Neigh{
				LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT,
				HardwareAddr: flooded, IP: r.AsSlice(),
			})
			if err != nil {
				return fmt.Errorf("remote %s: %w", r, err)
			}
		}
		return nil
	})
}

// forgetBehind deletes what a VXLAN has learnt to be behind these remotes. An entry is deleted by its MAC alone: one that has moved there
// from a link-local address bears a device, which cannot be named (see changeRemotes).
func (c *conn) forgetBehind(vxlan string, remotes []netip.Addr) error {
	return c.with(vxlan, func(l netlink.Link) error {
		entries, err := retryDump(func() ([]netlink.Neigh, error) { return c.NeighList(l.Attrs().Index, unix.AF_BRIDGE) })
		if err != nil {
			return fmt.Errorf("list what it has learnt: %w", err)
		}
		for _, e := range entries {
			remote, _ := netip.AddrFromSlice(e.IP)
			if e.Flags&netlink.NTF_SELF == 0 || e.State&netlink.NUD_PERMANENT != 0 || !slices.Contains(remotes, remote.Unmap()) {
				continue
			}
			any := net.IPv6unspecified
			if remote.Unmap().Is4() {
				any = net.IPv4zero
			}
			err := c.forget(&netlink.Neigh{
				LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, HardwareAddr: e.HardwareAddr, IP: any,
			})
			if err != nil {
				return fmt.Errorf("forget %s behind %s: %w", e.HardwareAddr, remote, err)
			}
		}
		return nil
	})
}

// setFDB writes both halves of entries, each in one request. They are of a state that the VXLAN takes and that does not age because they
// come from outside (vxlan_fdb_parse and vxlan_cleanup in drivers/net/vxlan/vxlan_core.c).
func (c *conn) setFDB(o segment.SetFDB) error {
	return c.with(o.Name, func(l netlink.Link) error {
		for _, e := range o.Entries {
			err := c.NeighSet(&netlink.Neigh{
				LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_REACHABLE,
				Flags: netlink.NTF_SELF | netlink.NTF_MASTER | netlink.NTF_EXT_LEARNED, HardwareAddr: e.MAC[:], IP: e.VTEP.AsSlice(),
			})
			if err != nil {
				return fmt.Errorf("%s behind %s: %w", net.HardwareAddr(e.MAC[:]), e.VTEP, err)
			}
		}
		return nil
	})
}

// delFDB deletes the halves of entries, each in a request of its own: of one for both the kernel leaves the second where the first is
// gone (rtnl_fdb_del in net/core/rtnetlink.c).
func (c *conn) delFDB(o segment.DelFDB) error {
	return c.with(o.Name, func(l netlink.Link) error {
		for _, e := range o.Entries {
			n := netlink.Neigh{LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, HardwareAddr: e.MAC[:]}
			if e.Bridge {
				n.Flags = netlink.NTF_MASTER
				if err := c.forget(&n); err != nil {
					return fmt.Errorf("%s on the bridge: %w", n.HardwareAddr, err)
				}
			}
			if e.VTEP.IsValid() {
				n.Flags, n.IP = netlink.NTF_SELF, e.VTEP.AsSlice()
				if err := c.forget(&n); err != nil {
					return fmt.Errorf("%s behind %s: %w", n.HardwareAddr, e.VTEP, err)
				}
			}
		}
		return nil
	})
}

// forget deletes an entry of a table; one that is gone is no error.
func (c *conn) forget(n *netlink.Neigh) error {
	if err := c.NeighDel(n); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// askRemotes asks each VXLAN that may have them for the remotes to which it sends what is flooded. The kernel tells what else
// the VXLAN and its bridge have learnt of that port as well (rtnl_fdb_dump in net/core/rtnetlink.c has no finer filter).
func (c *conn) askRemotes(s *segment.State) error {
	for i := range s.Links {
		if !s.MayHaveRemotes(s.Links[i]) {
			continue
		}
		if err := c.askTable(&s.Links[i]); err != nil {
			return fmt.Errorf("list the remotes of %s: %w", s.Links[i].Name, err)
		}
	}
	return nil
}

// askTable reads what a VXLAN has been told: remotes, and MACs behind them.
func (c *conn) askTable(vxlan *segment.Link) error {
	msgs, err := c.dumpFDB(func(msg *nl.IfInfomsg) { msg.Index = int32(vxlan.Index) })
	if err != nil {
		return err
	}
	fdb := map[[6]byte]segment.FDBState{}
	for _, m := range msgs {
		e, ok := parseEntry(m)
		if !ok || e.index != vxlan.Index {
			continue
		}
		entry := fdb[e.mac]
		entry.MAC = e.mac
		switch {
		case e.self() && e.mac == [6]byte{} && e.dst.IsValid() && !e.dst.IsMulticast():
			vxlan.VXLAN.Remotes = append(vxlan.VXLAN.Remotes, e.dst)
			continue
		case !e.told():
			continue
		case e.self():
			entry.VTEP = e.dst
		default:
			entry.Bridge = true
		}
		fdb[e.mac] = entry
	}
	slices.SortFunc(vxlan.VXLAN.Remotes, netip.Addr.Compare)
	vxlan.VXLAN.FDB = slices.SortedFunc(maps.Values(fdb), func(a, b segment.FDBState) int { return bytes.Compare(a.MAC[:], b.MAC[:]) })
	return nil
}

// dumpFDB dumps the part of forwarding tables that the request is made to name.
func (c *conn) dumpFDB(name func(*nl.IfInfomsg), attrs ...*nl.RtAttr) (msgs [][]byte, err error) {
	for range dumpTries {
		req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, unix.NLM_F_DUMP)
		msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
		name(msg)
		req.AddData(msg)
		for _, a := range attrs {
			req.AddData(a)
		}
		msgs, err = c.execute(req, unix.RTM_NEWNEIGH)
		if !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	return msgs, err
}

// entry is one of a forwarding table: a bridge's, or a VXLAN's own.
type entry struct {
	index  int // of the port, or of the VXLAN
	state  uint16
	flags  uint8
	mac    [6]byte
	dst    netip.Addr    // a VXLAN's
	master int           // of a bridge's: the bridge
	age    time.Duration // since a frame, or who told it, brought it last
}

// self says whether it is a VXLAN's own; told, whether somebody has told it and not a frame.
func (e entry) self() bool { return e.flags&netlink.NTF_SELF != 0 }

func (e entry) told() bool { return e.flags&netlink.NTF_EXT_LEARNED != 0 }

// clockTick is the unit in which the kernel tells times to programs (USER_HZ), on all but Alpha.
const clockTick = time.Second / 100

// parseEntry reads an entry such as k8slan or the kernel makes: one with a port, VNI or device of its own is somebody else's.
func parseEntry(m []byte) (e entry, ok bool) {
	const size = 12 // of struct ndmsg (include/uapi/linux/neighbour.h)
	if len(m) < size {
		return e, false
	}
	e.index, e.state, e.flags = int(nl.NativeEndian().Uint32(m[4:])), nl.NativeEndian().Uint16(m[8:]), m[10]
	attrs, err := nl.ParseRouteAttr(m[size:])
	if err != nil {
		return e, false
	}
	for _, a := range attrs {
		switch a.Attr.Type {
		case unix.NDA_LLADDR:
			ok = copy(e.mac[:], a.Value) == len(e.mac)
		case unix.NDA_DST:
			e.dst, _ = netip.AddrFromSlice(a.Value)
		case unix.NDA_MASTER:
			e.master = int(nl.NativeEndian().Uint32(a.Value))
		case unix.NDA_CACHEINFO: // the third of struct nda_cacheinfo, ndm_updated (include/uapi/linux/neighbour.h)
			if len(a.Value) >= 12 {
				e.age = time.Duration(nl.NativeEndian().Uint32(a.Value[8:])) * clockTick
			}
		case unix.NDA_PORT, unix.NDA_VNI, unix.NDA_IFINDEX:
			return e, false
		}
	}
	return e, ok
}
