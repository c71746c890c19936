package dataplane

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// family is what differs between LANs over IPv4 and IPv6.
type family struct {
	overhead int
	bits     int
	vteps    [2]netip.Addr // those of the two nodes
}

var families = map[string]family{
	"IPv4": {58, 24, [2]netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")}},
	"IPv6": {78, 64, [2]netip.Addr{netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")}},
}

// unicastHosts makes two nodes with addresses of a family, and returns the LAN as each of them should have it.
func unicastHosts(t *testing.T, f family, vni uint32) (a, b node, onA, onB segment.Segment) {
	t.Helper()
	a, b = twoNodes(t)
	s := lan(fmt.Sprintf("u%d", vni), vni, "one", "two")
	s.MTU = underlayMTU - f.overhead
	lans := [2]segment.Segment{}
	for i, h := range []node{a, b} {
		h.addUnderlayAddress(t, netip.PrefixFrom(f.vteps[i], f.bits))
		lans[i] = h.withUnderlay(t, unicast(s, f.vteps[i], f.vteps[1-i]))
	}
	return a, b, lans[0], lans[1]
}

// unicastPods is unicastHosts with the LAN built and a pod attached on each node.
func unicastPods(t *testing.T, f family, vni uint32) (a, b node, onA, onB segment.Segment, one, two *host) {
	t.Helper()
	a, b, onA, onB = unicastHosts(t, f, vni)
	a.reconcile(t, onA)
	b.reconcile(t, onB)
	return a, b, onA, onB, a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
}

// unicast returns the LAN with remotes in place of its group.
func unicast(s segment.Segment, local netip.Addr, remotes ...netip.Addr) segment.Segment {
	s.VXLAN.Group, s.VXLAN.Local = netip.Addr{}, local
	s.Remotes = append([]netip.Addr{}, remotes...)
	slices.SortFunc(s.Remotes, netip.Addr.Compare)
	return s
}

// addUnderlayAddress adds an address that can be used at once to the underlay device.
func (n node) addUnderlayAddress(t *testing.T, p netip.Prefix) {
	t.Helper()
	device, err := n.Netlink(t).LinkByName(netlab.UnderlayDevice)
	must(t, err)
	addr, err := netlink.ParseAddr(p.String())
	must(t, err)
	addr.Flags = unix.IFA_F_NODAD
	must(t, n.Netlink(t).AddrAdd(device, addr))
}

func TestUnicastLANCarriesEveryFrame(t *testing.T) {
	t.Parallel()
	for name, f := range families {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b, onA, onB := unicastHosts(t, f, 301)
			a.reconcile(t, onA)
			b.reconcile(t, onB)
			if ops := append(a.reconcile(t, onA), b.reconcile(t, onB)...); len(ops) > 0 {
				t.Errorf("reconciling again did %v", ops)
			}
			one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
			catalogCrosses(t, one, two)
			catalogCrosses(t, two, one)
			vm := b.attach(t, onB, "two", segment.Macvtap)
			doubleTaggedCrosses(t, vm, one)
		})
	}
}

// One remote beside a thousand is added as one entry; the others are not written.
func TestOneMoreRemoteIsOneWrite(t *testing.T) {
	t.Parallel()
	a, _, s, _ := unicastHosts(t, families["IPv4"], 302)
	s.Remotes = nil
	for i := range 1000 {
		s.Remotes = append(s.Remotes, netip.AddrFrom4([4]byte{10, 1, byte(i / 250), byte(1 + i%250)}))
	}
	bare := s
	bare.Remotes = []netip.Addr{}
	a.reconcile(t, bare)
	began := time.Now()
	a.reconcile(t, s)
	took := time.Since(began)
	link, err := a.lanNetns(s).Netlink(t).LinkByName(s.VXLAN.Name)
	must(t, err)
	handle := a.lanNetns(s).Netlink(t)
	a.reconcile(t, bare)
	began = time.Now()
	for _, r := range s.Remotes {
		must(t, handle.NeighAppend(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE,
			Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT,
			HardwareAddr: make([]byte, 6), IP: r.AsSlice(),
		}))
	}
	t.Logf("1,000 remotes: %v, with bare netlink %v", took, time.Since(began))
	began = time.Now()
	if ops := a.reconcile(t, s); len(ops) > 0 {
		t.Errorf("did %v", ops)
	}
	t.Logf("observing them: %v", time.Since(began))
	updates, done := make(chan netlink.NeighUpdate, 4096), make(chan struct{})
	must(t, a.lanNetns(s).Do(func() error { return netlink.NeighSubscribe(updates, done) }))
	defer close(done)

	more := s
	more.Remotes = append(slices.Clone(s.Remotes), netip.MustParseAddr("10.9.9.9"))
	began = time.Now()
	ops := a.reconcile(t, more)
	t.Logf("one more, with the observation: %v", time.Since(began))
	if len(ops) != 1 || ops[0].String() != "bridge fdb append 00:00:00:00:00:00 dev vx302 dst 10.9.9.9" {
		t.Errorf("did %v", ops)
	}
	const removal = "bridge fdb del 00:00:00:00:00:00 dev vx302 dst 10.9.9.9 && " +
		"bridge fdb flush dev vx302 dst 10.9.9.9"
	if ops := a.reconcile(t, s); len(ops) != 1 || ops[0].String() != removal {
		t.Errorf("did %v", ops)
	}
	for _, want := range []uint16{unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH} {
		select {
		case u := <-updates:
			if u.Type != want || u.IP.String() != "10.9.9.9" {
				t.Errorf("event %d for %v, want %d for 10.9.9.9", u.Type, u.IP, want)
			}
		case <-time.After(frameTimeout):
			t.Fatal("the kernel reports no change")
		}
	}
	select {
	case u := <-updates:
		t.Errorf("another event: %+v", u)
	default:
	}
}

// Unknown remotes are kept; an empty list removes them.
func TestUnknownRemotesAreKept(t *testing.T) {
	t.Parallel()
	a, _, s, _ := unicastHosts(t, families["IPv6"], 303)
	a.reconcile(t, s)
	unknown, none := s, s
	unknown.Remotes, none.Remotes = nil, []netip.Addr{}
	if ops := a.reconcile(t, unknown); len(ops) > 0 {
		t.Errorf("did %v", ops)
	}
	if ops := a.reconcile(t, none); len(ops) != 1 {
		t.Errorf("did %v, want the one remote to be deleted", ops)
	}
}

// A node gets another address: its silent pod is reached there, although its MAC was learned behind the old one.
func TestMACsLearnedBehindARemoteAreRemovedWithIt(t *testing.T) {
	t.Parallel()
	for name, f := range families {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b, onA, onB, one, two := unicastPods(t, f, 307)
			crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 1))
			was, is := f.vteps[1], f.vteps[1].Next()
			device, err := b.Netlink(t).LinkByName(netlab.UnderlayDevice)
			must(t, err)
			old := &net.IPNet{IP: was.AsSlice(), Mask: net.CIDRMask(f.bits, was.BitLen())}
			must(t, b.Netlink(t).AddrDel(device, &netlink.Addr{IPNet: old}))
			b.addUnderlayAddress(t, netip.PrefixFrom(is, f.bits))
			b.reconcile(t, unicast(onB, is, f.vteps[0]))
			a.reconcile(t, unicast(onA, f.vteps[0], is))
			crosses(t, one, two, frames.Stream(two.MAC, one.MAC, 9, 2))
		})
	}
}

// A LAN in use changes between multicast and unicast: the VXLANs stay, and no frame between pods is lost. Flooded
// frames are lost from the time when one node has left the group until the other has.
func TestDiscoveryChangesWithoutLoss(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv6"], 304)
	multicast := func(s segment.Segment) segment.Segment {
		s.VXLAN.Group, s.VXLAN.Local, s.Remotes = netip.MustParseAddr("ff02::14"), netip.Addr{}, nil
		return s
	}
	a.reconcile(t, multicast(onA))
	b.reconcile(t, multicast(onB))
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 1)) // both MACs are learned
	crosses(t, one, two, frames.Stream(nil, one.MAC, 9, 1))
	links := func() string { return describe(a.observe(t, onA)) + describe(b.observe(t, onB)) }
	before := links()
	change := func() (ops []segment.Op) {
		ops = append(ops, a.reconcile(t, onA)...)
		ops = append(ops, b.reconcile(t, onB)...)
		ops = append(ops, a.reconcile(t, multicast(onA))...)
		return append(ops, b.reconcile(t, multicast(onB))...)
	}

	there, back := startStream(t, 1, one, two), startStream(t, 2, two, one)
	for range 20 {
		for _, op := range change() {
			switch op.(type) {
			case segment.WriteRecord, segment.SetVXLAN, segment.AddRemotes, segment.DelRemotes:
			default:
				t.Errorf("did %s", op)
			}
		}
	}
	if kernel.RejoinsGroups() {
		there.expectAll(t)
		back.expectAll(t)
	} else {
		t.Logf("this kernel leaves and joins groups only as a VXLAN goes down and up: of 40 changes %+v, %+v",
			there.finish(), back.finish())
	}
	if after := links(); after != before {
		t.Errorf("the segments are\n%s\nwant\n%s", after, before)
	}

	flood := *two
	flood.Attachment.MAC = nil
	flooded := startStream(t, 3, one, &flood)
	change()
	t.Logf("of the flooded frames, in one change there and back: %+v", flooded.finish())
}

// A VXLAN that was made without a group joins a group that it gets, and another one after that.
func TestVXLANJoinsItsNewGroup(t *testing.T) {
	t.Parallel()
	for name, f := range families {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b, onA, onB, one, two := unicastPods(t, f, 307)
			group := func(s segment.Segment, last byte) segment.Segment {
				s.VXLAN.Group, s.VXLAN.Local, s.Remotes = netip.AddrFrom4([4]byte{239, 1, 1, last}), netip.Addr{}, nil
				if f.vteps[0].Is6() {
					s.VXLAN.Group = netip.MustParseAddr(fmt.Sprintf("ff02::%x", last))
				}
				return s
			}
			for i, s := range [][2]segment.Segment{
				{group(onA, 20), group(onB, 20)},
				{group(onA, 21), group(onB, 21)},
				{onA, onB},
				{group(onA, 22), group(onB, 22)},
			} {
				a.reconcile(t, s[0])
				b.reconcile(t, s[1])
				crosses(t, one, two, frames.Stream(nil, one.MAC, 11, uint64(2*i))) // flooded
				crosses(t, two, one, frames.Stream(nil, two.MAC, 11, uint64(2*i+1)))
			}
		})
	}
}

// An interrupted change back to multicast is finished and leaves no remote.
func TestInterruptedChangeOfDiscoveryIsFinished(t *testing.T) {
	t.Parallel()
	a, _, s, _ := unicastHosts(t, families["IPv6"], 305)
	multicast := s
	multicast.VXLAN.Group, multicast.VXLAN.Local, multicast.Remotes = netip.MustParseAddr("ff02::14"), netip.Addr{}, nil
	for _, change := range []struct{ from, to segment.Segment }{{multicast, s}, {s, multicast}} {
		for k := range 5 {
			a.reconcile(t, change.from)
			reconcileWith(t, a.kernel, s.Netns, killedAfter(k, diffTo(change.to)))
			a.reconcile(t, change.to)
			ops := segment.Diff(change.to, a.observe(t, change.to))
			if len(ops) > 0 || !slices.Equal(a.remotes(t, s), change.to.Remotes) {
				t.Errorf("after %d steps: has remotes %v, to do %v", k, a.remotes(t, s), ops)
			}
		}
	}
}

// remotes returns the unicast remotes in the VXLAN's table.
func (n node) remotes(t *testing.T, s segment.Segment) (remotes []netip.Addr) {
	t.Helper()
	link, err := n.lanNetns(s).Netlink(t).LinkByName(s.VXLAN.Name)
	must(t, err)
	entries, err := n.lanNetns(s).Netlink(t).NeighList(link.Attrs().Index, unix.AF_BRIDGE)
	must(t, err)
	for _, e := range entries {
		if r, ok := netip.AddrFromSlice(e.IP); ok && e.Flags&netlink.NTF_SELF != 0 && !r.IsMulticast() {
			remotes = append(remotes, r.Unmap())
		}
	}
	slices.SortFunc(remotes, netip.Addr.Compare)
	return remotes
}

// A remote that is deleted or added by hand is repaired.
func TestRemotesChangedByHandAreRepaired(t *testing.T) {
	a, _, s, _ := unicastHosts(t, families["IPv4"], 306)
	m := a.manage(t)
	m.runs(t, s)
	inside := a.lanNetns(s).Netlink(t)
	link, err := inside.LinkByName(s.VXLAN.Name)
	must(t, err)
	entry := func(ip string) *netlink.Neigh {
		return &netlink.Neigh{
			LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE,
			Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT,
			HardwareAddr: make([]byte, 6), IP: netip.MustParseAddr(ip).AsSlice(),
		}
	}
	for _, change := range []func() error{
		func() error { return inside.NeighDel(entry(s.Remotes[0].String())) },
		func() error { return inside.NeighAppend(entry("192.0.2.99")) },
	} {
		began := time.Now()
		must(t, change())
		a.awaitState(t, s, "the remotes to be as they were", func(have segment.State) bool {
			l, ok := have.Link(s.VXLAN.Name)
			return ok && slices.Equal(l.VXLAN.Remotes, s.Remotes)
		})
		if took := time.Since(began); took > time.Second {
			t.Errorf("took %v", took)
		}
	}
}
