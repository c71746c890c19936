package dataplane

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// solicited is the group MAC that a solicitation for fd00::<last octets> is sent to.
func solicited(last byte) net.HardwareAddr { return net.HardwareAddr{0x33, 0x33, 0xff, 0, 0, last} }

// expectAnswer expects the node to answer a question, with an answer that holds the MAC and the words.
func expectAnswer(t *testing.T, asks, other *host, question []byte, mac net.HardwareAddr, words ...[]byte) {
	t.Helper()
	isDropped(t, asks, other, question)
	_, err := netlab.Await(asks, frameTimeout, func(got []byte) bool {
		for _, w := range append(words, mac) {
			if !bytes.Contains(got, w) {
				return false
			}
		}
		return bytes.Equal(got[:6], asks.MAC)
	})
	if err != nil {
		t.Fatalf("no answer from the node: %v", err)
	}
}

// suppressing is a node with a LAN that is built without and with suppression, and a pod that asks for another node's
// pod.
type suppressing struct {
	node
	off, on      segment.Segment
	one, two     *host  // one is on the node
	asks4, asks6 []byte // questions for two
}

// newSuppressing makes two nodes with the LAN and a pod each. The first node knows the other node's pod.
func newSuppressing(t *testing.T) *suppressing {
	t.Helper()
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 443)
	onA, onB = withEVPN(onA), withEVPN(onB)
	onA.Remotes, onB.Remotes = []netip.Addr{onB.VXLAN.Local}, []netip.Addr{onA.VXLAN.Local}
	a.reconcile(t, onA)
	b.reconcile(t, onB)
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	far := [6]byte(two.MAC)
	onA.FDB = []segment.FDBEntry{{MAC: far, VTEP: onB.VXLAN.Local}}
	onB.FDB = []segment.FDBEntry{{MAC: [6]byte(one.MAC), VTEP: onA.VXLAN.Local}}
	a.reconcile(t, onA)
	b.reconcile(t, onB)
	on := onA
	on.VXLAN.SuppressNeighbors = true
	on.Neighbors = []segment.Neighbor{
		{IP: netip.MustParseAddr("10.0.0.2"), MAC: far}, {IP: netip.MustParseAddr("fd00::2"), MAC: far},
	}
	return &suppressing{
		node: a, off: onA, on: on, one: one, two: two,
		asks4: arp(1, broadcast, one.MAC, "10.0.0.1", "10.0.0.2"),
		asks6: neighborDiscovery(135, solicited(2), one.MAC, "fd00::1", "ff02::1:ff00:2", "fd00::2"),
	}
}

// change reconciles the node and expects operations for suppression only.
func (n *suppressing) change(t *testing.T, to segment.Segment) {
	t.Helper()
	for _, op := range n.reconcile(t, to) {
		switch op.(type) {
		case segment.WriteRecord, segment.SetSuppress, segment.SetNeighborDiscovery,
			segment.AddNeighbors, segment.DelNeighbors:
		default:
			t.Errorf("did %s", op)
		}
	}
}

// With suppression a node answers for hosts on other nodes that it knows, and floods questions for all others. It is
// switched on and off while the LAN is in use, and leaves nothing.
func TestNodeAnswersARPAndNDForRemoteHosts(t *testing.T) {
	t.Parallel()
	n := newSuppressing(t)
	crosses(t, n.one, n.two, n.asks4)
	crosses(t, n.one, n.two, n.asks6)
	n.change(t, n.on)
	if ops := n.reconcile(t, n.on); len(ops) > 0 {
		t.Errorf("reconciling again did %v", ops)
	}
	n.expectAnswers(t)
	n.expectNothingOnTheUnderlay(t)
	n.expectEntriesKeptUntilImport(t)

	fewer := n.on
	fewer.Neighbors = n.on.Neighbors[:1]
	n.change(t, fewer)
	crosses(t, n.one, n.two, n.asks6)

	there, back := startStream(t, 1, n.one, n.two), startStream(t, 2, n.two, n.one)
	for range 20 {
		n.change(t, n.off)
		n.change(t, n.on)
	}
	there.expectAll(t)
	back.expectAll(t)
	expectAnswer(t, n.one, n.two, n.asks4, n.two.MAC, []byte{10, 0, 0, 2})
	n.change(t, n.off)
	n.expectNothingLeft(t)
}

// expectAnswers expects the node to answer for the pod that it knows, and to flood other questions.
func (n *suppressing) expectAnswers(t *testing.T) {
	t.Helper()
	one, two := n.one, n.two
	expectAnswer(t, one, two, n.asks4, two.MAC, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 2}, []byte{10, 0, 0, 2})
	expectAnswer(t, one, two, n.asks6, two.MAC, []byte{136, 0}, netip.MustParseAddr("fd00::2").AsSlice())
	crosses(t, one, two, arp(1, broadcast, one.MAC, "10.0.0.1", "10.0.0.3"))
	crosses(t, one, two, neighborDiscovery(135, solicited(3), one.MAC, "fd00::1", "ff02::1:ff00:3", "fd00::3"))
	isDropped(t, one, two, arp(1, broadcast, one.MAC, "10.0.0.1", "10.0.0.1")) // gratuitous ARP
}

// expectNothingOnTheUnderlay expects that questions which the node answers are not sent to the other node, and that the
// bridge's own IPv6 sends nothing.
func (n *suppressing) expectNothingOnTheUnderlay(t *testing.T) {
	t.Helper()
	packets := func() uint64 {
		link, err := n.lanNetns(n.on).Netlink(t).LinkByName(n.on.VXLAN.Name)
		must(t, err)
		return link.Attrs().Statistics.TxPackets
	}
	sent := packets()
	for range 100 {
		must(t, n.one.Send(n.asks4))
		must(t, n.one.Send(n.asks6))
	}
	expectAnswer(t, n.one, n.two, n.asks6, n.two.MAC, []byte{136, 0})
	if over := packets() - sent; over != 1 {
		t.Errorf("200 questions and the one after them are %d packets on the underlay, want 1", over)
	}
	const report = 1500 * time.Millisecond // the kernel would send a report of groups within a second
	quiet, cancel := context.WithTimeout(t.Context(), report)
	defer cancel()
	must(t, expectSilence(quiet, n.two, func(frame []byte) bool { return !bytes.Equal(frame[6:12], n.one.MAC) }))
}

// expectEntriesKeptUntilImport starts another daemon, which has no routes yet, and expects it to change nothing.
func (n *suppressing) expectEntriesKeptUntilImport(t *testing.T) {
	t.Helper()
	n.kernel = n.newKernel(t)
	nothing, partial := n.on, n.on
	nothing.Remotes, nothing.FDB, nothing.Neighbors = nil, nil, nil
	partial.Neighbors, partial.FDB, partial.Partial = []segment.Neighbor{}, []segment.FDBEntry{}, true
	for _, s := range []segment.Segment{nothing, partial} {
		if ops := n.reconcile(t, s); len(ops) > 0 {
			t.Errorf("before all routes are imported did %v", ops)
		}
	}
	expectAnswer(t, n.one, n.two, n.asks6, n.two.MAC, []byte{136, 0})
}

// expectNothingLeft expects that suppression is off and has left no entries.
func (n *suppressing) expectNothingLeft(t *testing.T) {
	t.Helper()
	have := n.observe(t, n.off)
	bridge, _ := have.Link(n.off.Bridge)
	port, _ := have.Link(n.off.VXLAN.Name)
	link, err := n.lanNetns(n.off).Netlink(t).LinkByName(n.off.Bridge)
	must(t, err)
	left, err := n.lanNetns(n.off).Netlink(t).NeighList(link.Attrs().Index, 0)
	must(t, err)
	hasMAC := func(n netlink.Neigh) bool { return len(n.HardwareAddr) > 0 }
	if port.Suppress || bridge.IPv6 || slices.ContainsFunc(left, hasMAC) {
		t.Errorf("left: suppression %t, IPv6 %t, neighbors %v", port.Suppress, bridge.IPv6, left)
	}
	crosses(t, n.one, n.two, n.asks4)
	crosses(t, n.one, n.two, n.asks6)
	crosses(t, n.one, n.two, frames.Stream(n.two.MAC, n.one.MAC, 3, 1))
}

// A bridge whose MTU is too small for IPv6 has no IPv6, as in a kernel without it, and gets it with a larger MTU.
func TestBridgeWithASmallMTUHasNoIPv6(t *testing.T) {
	t.Parallel()
	h, _, s, _ := unicastHosts(t, families["IPv4"], 445)
	s = withEVPN(s)
	s.VXLAN.SuppressNeighbors = true
	for _, mtu := range []int{1279, 1280} {
		s.MTU = mtu
		h.reconcile(t, s)
		if ops := h.reconcile(t, s); len(ops) > 0 {
			t.Errorf("MTU %d: reconciling again did %v", mtu, ops)
		}
		bridge, _ := h.observe(t, s).Link(s.Bridge)
		if bridge.LacksIPv6 != (mtu < 1280) || bridge.IPv6 == bridge.LacksIPv6 {
			t.Errorf("MTU %d: lacks IPv6 %t, has it on %t", mtu, bridge.LacksIPv6, bridge.IPv6)
		}
	}
}

// A node with suppression has the bindings of a pod on another node in its bridge's neighbor table while the pod is
// attached.
func TestNeighborsFollowRoutes(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 444)
	onB.VXLAN.SuppressNeighbors = true
	a.reconcile(t, withEVPN(onA))
	b.reconcile(t, withEVPN(onB))
	reflector := startReflector(t, netip.AddrPort{})
	a.startSpeaker(t, onA, 1, reflector.at)
	second := b.startSpeaker(t, onB, 2, reflector.at)
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	second.awaitRemote(t, onA.VXLAN.Local, one.MAC)
	reachesInTime(t, one, two, arp(1, broadcast, one.MAC, "10.0.0.1", "10.0.0.1"))
	reachesInTime(t, one, two, neighborDiscovery(136, two.MAC, one.MAC, "fd00::1", "fd00::2", "fd00::1"))
	neighbors := func(want ...segment.Neighbor) {
		t.Helper()
		b.awaitState(t, onB, "neighbours", func(have segment.State) bool {
			bridge, _ := have.Link(onB.Bridge)
			return slices.Equal(bridge.Neighbors, want)
		})
	}
	mac := [6]byte(one.MAC)
	neighbors(
		segment.Neighbor{IP: netip.MustParseAddr("10.0.0.1"), MAC: mac},
		segment.Neighbor{IP: netip.MustParseAddr("fd00::1"), MAC: mac},
	)
	second.awaitSettled(t)
	expectAnswer(t, two, one, arp(1, broadcast, two.MAC, "10.0.0.2", "10.0.0.1"), one.MAC, []byte{10, 0, 0, 1})
	a.release(t, one)
	neighbors()
	have := a.observe(t, onA)
	if bridge, _ := have.Link(onA.Bridge); len(bridge.Neighbors) > 0 || bridge.IPv6 {
		t.Errorf("a node without suppression has neighbours %v, IPv6 %t", bridge.Neighbors, bridge.IPv6)
	}
}
