package kernel

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"

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
