package watch

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/rtnl"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/lanmgr/snoop"
	"github.com/k8slan/k8slan/lanmgr/sockfilter"
)

// FDBEvents receives changes of the MACs on local ports, which LANs' bridges learn from frames.
type FDBEvents struct {
	// Learned is called when a bridge has learned a MAC on a port of this node.
	Learned func(netnsName string, mac [6]byte)
	// Removed is called when a MAC is on no port of this node any more: it has aged, its port is gone, or it is behind
	// a VTEP.
	Removed func(netnsName string, mac [6]byte)
	// Overflow is called when changes were lost: Node.LocalMACs has the present MACs.
	Overflow func()
}

// WatchFDB reports changes of the MACs on local ports until the context ends. It reports those of a segment from when
// that was first observed; Node.LocalMACs has those from before.
func (n Node) WatchFDB(ctx context.Context, events FDBEvents) error {
	handle := func(datagram []byte, netnsID int) {
		name, ok := n.SegmentByNetnsID(netnsID)
		if !ok {
			return
		}
		m, _, ok := rtnl.NextMessage(datagram)
		if !ok {
			return
		}
		e, ok := rtnl.ParseEntry(m.Payload)
		switch {
		case !ok || e.InVXLAN() || e.IsPermanent():
		case m.Type == unix.RTM_NEWNEIGH && !e.IsExternal() && !n.IsVXLAN(name, e.Index):
			events.Learned(name, e.MAC)
		default:
			events.Removed(name, e.MAC)
		}
	}
	fdb := subscription{allNetns: true, groups: []int{unix.RTNLGRP_NEIGH}, filter: sockfilter.BridgeFDB()}
	run, err := n.rtnetlink(fdb, handle, events.Overflow)()
	if err != nil {
		return fmt.Errorf("watch the MACs on LANs: %w", err)
	}
	events.Overflow() // from here on no change can be missed
	return run(ctx)
}

// BindingEvents receives the bindings that hosts on a LAN's local ports show.
type BindingEvents struct {
	// Bound is called when a host has shown by ARP or neighbour discovery that it has the address.
	Bound func(mac [6]byte, ip netip.Addr)
	// Recreated is called when the LAN is in another network namespace, of which nothing was reported so far:
	// Node.LocalMACs has its MACs.
	Recreated func()
}

// WatchBindings reports the bindings of a LAN while its namespace is open, and again when another namespace has its
// name, until the context ends. Frames from other nodes and frames to hosts do not count.
func (n Node) WatchBindings(ctx context.Context, netnsName string, events BindingEvents) error {
	begun := func() {} // the caller knows the MACs at the start
	for ctx.Err() == nil {
		err := n.WhileOpen(ctx, netnsName, func(ctx context.Context, netns *kernel.OpenNetns) error {
			return watchBindings(ctx, netns, begun, events.Bound)
		})
		if err != nil {
			return fmt.Errorf("watch ARP on %s: %w", netnsName, err)
		}
		begun = events.Recreated
	}
	return nil
}

func watchBindings(
	ctx context.Context, netns *kernel.OpenNetns, begun func(), bound func(mac [6]byte, ip netip.Addr),
) error {
	var s *snoop.Socket
	err := netns.Do(func() (err error) {
		s, err = snoop.Open()
		return err
	})
	if err != nil {
		return err
	}
	defer s.Close()
	begun()
	return s.Run(ctx, func(index int) (snoop.Role, error) { return role(netns, index) }, bound)
}

// role returns what a link is in a LAN. A port is a link in the bridge that is not the VXLAN. A plug, between a port
// and a macvtap, receives what is sent to its VM.
func role(netns *kernel.OpenNetns, index int) (snoop.Role, error) {
	l, ok, err := netns.Link(index)
	switch {
	case err != nil || !ok:
		return snoop.Unknown, err
	case l.Type() == "vxlan" || l.Type() == "bridge":
		return snoop.Ignored, nil
	case l.Attrs().MasterIndex != 0:
		return snoop.Port, nil
	case strings.HasSuffix(l.Attrs().Name, segment.PlugName("")):
		return snoop.Ignored, nil
	}
	return snoop.Unknown, nil
}
