package dataplane

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// filter starts the daemon's filter on the node.
func (n node) filter(t *testing.T) (f *firewall.Filter, stop func()) {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	f = firewall.New(n.Path, firewall.TableName, log)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		must(t, <-ended)
	})
	t.Cleanup(stop)
	return f, stop
}

// strict returns a LAN as the filter gets it, with these members.
func strict(s segment.Segment, members ...netip.Addr) firewall.LAN {
	members = append([]netip.Addr{}, members...)
	return firewall.LAN{Name: s.LAN.String(), Port: s.VXLAN.Port, VNI: s.VXLAN.VNI, Members: members}
}

// nft calls f with a connection to the node's nftables.
func (n node) nft(t *testing.T, f func(*nftables.Conn) error) error {
	t.Helper()
	ns, err := vnetns.GetFromPath(n.Path)
	must(t, err)
	defer ns.Close()
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	must(t, err)
	return f(c)
}

var table = &nftables.Table{Name: "k8slan", Family: nftables.TableFamilyINet}

func setOf(name string) *nftables.Set { return &nftables.Set{Table: table, Name: name} }

// elements counts the elements of a set; -1 if there is no such set.
func (n node) elements(t *testing.T, set string) int {
	t.Helper()
	count := -1
	err := n.nft(t, func(c *nftables.Conn) error {
		list, err := c.GetSetElements(setOf(set))
		if err == nil {
			count = len(list)
		}
		return err
	})
	if err != nil && !strings.Contains(err.Error(), unix.ENOENT.Error()) {
		t.Fatal(err)
	}
	return count
}

// drops counts the packets of non-members that the filter has dropped for the LAN; -1 if it has no such LAN.
func drops(f *firewall.Filter, s segment.Segment) int {
	packets, ok := f.Dropped()[s.LAN.String()]
	if !ok {
		return -1
	}
	return int(packets)
}

// encapsulated returns a frame as the payload of a VXLAN's UDP packet (RFC 7348, section 5).
func encapsulated(vni uint32, frame []byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{0x08, 0, 0, 0}, vni<<8)
	return append(b, frame...)
}

// sender returns a function that sends VXLAN packets from one address of the node to another.
func (n node) sender(t *testing.T, from, to netip.Addr, s segment.Segment) func(frame []byte) {
	t.Helper()
	var c *net.UDPConn
	must(t, n.Do(func() (err error) {
		local, remote := netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, s.VXLAN.Port)
		c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(local), net.UDPAddrFromAddrPort(remote))
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return func(frame []byte) {
		t.Helper()
		_, err := c.Write(encapsulated(s.VXLAN.VNI, frame))
		must(t, err)
	}
}

// fragments sends a VXLAN packet in two IPv6 fragments; the first has only the UDP header.
func (n node) fragments(t *testing.T, from, to netip.Addr, s segment.Segment, frame []byte) {
	t.Helper()
	payload := encapsulated(s.VXLAN.VNI, frame)
	udp := binary.BigEndian.AppendUint16(nil, 50000)
	udp = binary.BigEndian.AppendUint16(udp, s.VXLAN.Port)
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(payload)))
	udp = append(udp, 0, 0)
	udp = append(udp, payload...)
	pseudo := slices.Concat(from.AsSlice(), to.AsSlice(), binary.BigEndian.AppendUint32(nil, uint32(len(udp))),
		[]byte{0, 0, 0, unix.IPPROTO_UDP}, udp)
	binary.BigEndian.PutUint16(udp[6:], onesComplement(pseudo))
	packet := func(offset int, more bool, part []byte) []byte {
		b := []byte{0x60, 0, 0, 0}
		b = binary.BigEndian.AppendUint16(b, uint16(8+len(part)))
		b = append(b, unix.IPPROTO_FRAGMENT, 64)
		b = append(b, from.AsSlice()...)
		b = append(b, to.AsSlice()...)
		place := uint16(offset)
		if more {
			place |= 1
		}
		b = append(b, unix.IPPROTO_UDP, 0)
		b = binary.BigEndian.AppendUint16(b, place)
		b = append(b, 0, 0, 0, 7)
		return append(b, part...)
	}
	must(t, n.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, p := range [][]byte{packet(0, true, udp[:8]), packet(8, false, udp[8:])} {
			if err := unix.Sendto(fd, p, 0, &unix.SockaddrInet6{Addr: to.As16()}); err != nil {
				return err
			}
		}
		return nil
	}))
}

func onesComplement(b []byte) uint16 {
	var sum uint32
	for i, octet := range b {
		if i%2 == 0 {
			sum += uint32(octet) << 8
		} else {
			sum += uint32(octet)
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// nonMemberFrame is a broadcast frame of a host behind a non-member.
func nonMemberFrame(seq uint64) []byte {
	return frames.Stream(nil, segment.MAC(segment.LAN{}, "non-member"), 66, seq)
}

// expectNext expects the next frame that a host receives to be that one.
func expectNext(t *testing.T, h *host, frame []byte) {
	t.Helper()
	got, err := next(h, frameTimeout)
	must(t, err)
	if !slices.Equal(got, frame) {
		t.Fatalf("received\n%x, want\n%x", got, frame)
	}
}

func TestStrictLANAcceptsOnlyMembers(t *testing.T) {
	t.Parallel()
	for name, f := range families {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			expectOnlyMembers(t, f)
		})
	}
}

func expectOnlyMembers(t *testing.T, f family) {
	t.Helper()
	a, b, onA, onB := unicastHosts(t, f, 311)
	open := a.withUnderlay(t, unicast(lan("open", 312, "three"), f.vteps[0]))
	a.reconcile(t, onA)
	a.reconcile(t, open)
	b.reconcile(t, onB)
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	three := a.attach(t, open, "three", segment.Veth)
	other := addNode(t, a.underlay, "nonmember")
	address := f.vteps[1].Next().Next()
	other.addUnderlayAddress(t, netip.PrefixFrom(address, f.bits))
	send, sendOpen := other.sender(t, address, f.vteps[0], onA), other.sender(t, address, f.vteps[0], open)
	sendFragments := func(frame []byte) { other.fragments(t, address, f.vteps[0], onA, frame) }
	if address.Is4() { // the kernel always reassembles IPv4
		sendFragments = send
	}

	// Without a filter the frames of a non-member are accepted.
	send(nonMemberFrame(1))
	expectNext(t, one, nonMemberFrame(1))
	sendFragments(nonMemberFrame(2))
	expectNext(t, one, nonMemberFrame(2))

	filter, stop := a.filter(t)
	filter.Set([]firewall.LAN{strict(onA, f.vteps[1])})
	eventually(t, "the filter", func() bool { return drops(filter, onA) == 0 })
	for i := range uint64(10) {
		sendFragments(nonMemberFrame(i))
	}
	for i := range uint64(10) {
		send(nonMemberFrame(i))
	}
	eventually(t, "the packets of the non-member to be dropped", func() bool { return drops(filter, onA) >= 10 })
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 1))
	crosses(t, one, two, frames.Stream(two.MAC, one.MAC, 9, 1))
	sendOpen(nonMemberFrame(3)) // to a LAN that is not strict
	expectNext(t, three, nonMemberFrame(3))

	expectAddressCounts(t, a, filter, onA, f, one, two)
	stop()
	expectFilterWithoutDaemon(t, a, onA, f.vteps[1], send, one, two)
}

// expectAddressCounts expects a node of the LAN to be a non-member while the filter has other addresses.
func expectAddressCounts(t *testing.T, a node, filter *firewall.Filter, s segment.Segment, f family, one, two *host) {
	t.Helper()
	member := f.vteps[1]
	filter.Set([]firewall.LAN{strict(s, member.Next(), member.Next().Next().Next())})
	before := drops(filter, s)
	eventually(t, "the other node to be a non-member", func() bool {
		must(t, two.Send(frames.Stream(nil, two.MAC, 9, 2)))
		return drops(filter, s) > before
	})
	filter.Set([]firewall.LAN{strict(s, member)})
	set := map[bool]string{true: "members4", false: "members6"}[member.Is4()]
	eventually(t, "the one member", func() bool { return a.elements(t, set) == 1 })
	again := frames.Stream(nil, two.MAC, 9, 3)
	must(t, two.Send(again))
	_, err := netlab.Await(one, frameTimeout, func(frame []byte) bool { return slices.Equal(frame, again) })
	must(t, err)
}

// expectFilterWithoutDaemon expects the filter to drop and count while the daemon does not run, and before it knows the
// members; a removed filter drops nothing.
func expectFilterWithoutDaemon(
	t *testing.T, a node, s segment.Segment, member netip.Addr, send func(frame []byte), one, two *host,
) {
	t.Helper()
	count := func(f *firewall.Filter) int { return drops(f, s) }
	filter, stop := a.filter(t)
	filter.Set([]firewall.LAN{strict(s, member)})
	eventually(t, "the filter", func() bool { return count(filter) >= 0 })
	before := count(filter)
	stop()
	send(nonMemberFrame(4))
	filter, stop = a.filter(t)
	filter.Set([]firewall.LAN{{Name: s.LAN.String(), Port: s.VXLAN.Port, VNI: s.VXLAN.VNI}})
	eventually(t, "the packet to be counted", func() bool { return count(filter) == before+1 })
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 4))

	filter.Set(nil)
	eventually(t, "the filter to be removed", func() bool { return a.elements(t, "lans") == -1 })
	send(nonMemberFrame(5))
	expectNext(t, one, nonMemberFrame(5))
	stop()
	filter, stop = a.filter(t)
	filter.Set([]firewall.LAN{strict(s, member)})
	eventually(t, "the filter", func() bool { return count(filter) == 0 })
	stop()
	must(t, firewall.Remove(a.Path, firewall.TableName))
	must(t, firewall.Remove(a.Path, firewall.TableName))
	send(nonMemberFrame(6))
	expectNext(t, one, nonMemberFrame(6))
}

// A LAN with a group can be strict, too: its members send from the addresses of the underlay device.
func TestStrictLANWithAGroupAcceptsOnlyMembers(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	s := lan("group", 313, "one", "two")
	onA, onB := a.withUnderlay(t, s), b.withUnderlay(t, s)
	a.reconcile(t, onA)
	b.reconcile(t, onB)
	one, two := a.attach(t, s, "one", segment.Veth), b.attach(t, s, "two", segment.Veth)
	underlays, err := b.kernel.Underlays(t.Context())
	must(t, err)
	filter, _ := a.filter(t)
	filter.Set([]firewall.LAN{strict(onA, underlays.Devices[netlab.UnderlayDevice].Sources...)})
	eventually(t, "the filter", func() bool { return drops(filter, onA) == 0 })
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 1))
	crosses(t, one, two, frames.Stream(two.MAC, one.MAC, 9, 1))

	other := addNode(t, a.underlay, "nonmember")
	device, err := other.Netlink(t).LinkByName(netlab.UnderlayDevice)
	must(t, err)
	var c *net.UDPConn
	must(t, other.Do(func() (err error) {
		group := &net.UDPAddr{IP: net.ParseIP("ff02::14"), Port: 4789, Zone: device.Attrs().Name}
		c, err = net.DialUDP("udp6", nil, group)
		return err
	}))
	defer c.Close()
	_, err = c.Write(encapsulated(313, nonMemberFrame(1)))
	must(t, err)
	eventually(t, "the non-member's packet to be dropped", func() bool { return drops(filter, onA) == 1 })
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 2))
}

// A thousand other members change, the daemon restarts, and the LAN's hosts lose no frame.
func TestMembersChangeWithoutLoss(t *testing.T) {
	t.Parallel()
	for name, f := range families {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, _, onA, _, one, two := unicastPods(t, f, 314)
			filter, stop := a.filter(t)
			crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 1)) // both MACs are learned
			crosses(t, one, two, frames.Stream(nil, one.MAC, 9, 1))
			there, back := startStream(t, 1, one, two), startStream(t, 2, two, one)
			for round := range 10 {
				members := []netip.Addr{f.vteps[1]}
				for i := range 1000 {
					members = append(members, netip.AddrFrom4([4]byte{10, byte(round), byte(i / 250), byte(i % 250)}))
				}
				filter.Set([]firewall.LAN{strict(onA, members...)})
				eventually(t, "the members", func() bool {
					return a.elements(t, "members4")+a.elements(t, "members6") == len(members)
				})
				switch round {
				case 3: // strictPeers is switched off and on
					filter.Set(nil)
					eventually(t, "no filter", func() bool { return a.elements(t, "lans") == -1 })
				case 6:
					stop()
					filter, stop = a.filter(t)
				}
			}
			there.expectAll(t)
			back.expectAll(t)
			if n := drops(filter, onA); n != 0 {
				t.Errorf("%d packets were dropped", n)
			}
		})
	}
}

// Changes of the table by hand are undone, and a ruleset that is flushed is restored.
func TestChangedFilterIsRepaired(t *testing.T) {
	t.Parallel()
	a, _, s, _ := unicastHosts(t, families["IPv4"], 315)
	filter, _ := a.filter(t)
	members := []netip.Addr{
		netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.3"), netip.MustParseAddr("2001:db8::2"),
	}
	filter.Set([]firewall.LAN{strict(s, members...)})
	eventually(t, "the filter", func() bool { return drops(filter, s) == 0 })
	whole := a.ruleset(t)
	accept := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	chain := &nftables.Chain{Name: "input", Table: table}
	member := func(last byte) []nftables.SetElement {
		return []nftables.SetElement{{Key: []byte{0x12, 0xb5, 0, 0, 0, 1, 0x3b, 0, 192, 0, 2, last}}}
	}
	for _, c := range []struct {
		name   string
		change func(c *nftables.Conn) error
	}{
		{"flush ruleset", func(c *nftables.Conn) error { c.FlushRuleset(); return nil }},
		{"delete a member", func(c *nftables.Conn) error { return c.SetDeleteElements(setOf("members4"), member(2)) }},
		{"add a member", func(c *nftables.Conn) error { return c.SetAddElements(setOf("members4"), member(9)) }},
		{"flush the LANs", func(c *nftables.Conn) error { c.FlushSet(setOf("lans")); return nil }},
		{"flush the chain", func(c *nftables.Conn) error { c.FlushChain(chain); return nil }},
		{"a rule before all", func(c *nftables.Conn) error {
			c.InsertRule(&nftables.Rule{Table: table, Chain: chain, Exprs: accept})
			return nil
		}},
		{"another chain", func(c *nftables.Conn) error {
			c.AddChain(&nftables.Chain{Name: "more", Table: table})
			return nil
		}},
		{"delete the table, and another's", func(c *nftables.Conn) error {
			c.DelTable(table)
			c.AddTable(&nftables.Table{Name: "other", Family: nftables.TableFamilyINet})
			return nil
		}},
	} {
		var began time.Time
		must(t, a.nft(t, func(conn *nftables.Conn) error {
			if err := c.change(conn); err != nil {
				return err
			}
			began = time.Now()
			return conn.Flush()
		}))
		eventually(t, "the filter to be repaired after: "+c.name, func() bool {
			return slices.Equal(a.ruleset(t), whole)
		})
		t.Logf("%s: repaired after %v", c.name, time.Since(began))
	}
}

// ruleset returns the table as sorted text without handles; nil between two steps of its construction.
func (n node) ruleset(t *testing.T) (lines []string) {
	t.Helper()
	err := n.nft(t, func(c *nftables.Conn) error {
		chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
		if err != nil {
			return err
		}
		for _, chain := range chains {
			if chain.Table.Name != table.Name {
				continue
			}
			lines = append(lines, "chain "+chain.Name)
			rules, err := c.GetRules(table, chain)
			if err != nil {
				return err
			}
			for _, r := range rules {
				lines = append(lines, fmt.Sprintf("rule %q", r.UserData))
			}
		}
		sets, err := c.GetSets(table)
		if err != nil {
			return err
		}
		for _, s := range sets {
			elements, err := c.GetSetElements(s)
			if err != nil {
				return err
			}
			for _, e := range elements {
				lines = append(lines, fmt.Sprintf("%s %x %s", s.Name, e.Key, e.Comment))
			}
		}
		return nil
	})
	if err != nil {
		return nil
	}
	slices.Sort(lines)
	return lines
}

// One member beside a thousand is added as one element; the others are not written.
func TestOneMoreMemberIsOneElement(t *testing.T) {
	t.Parallel()
	a, _, s, _ := unicastHosts(t, families["IPv4"], 316)
	var members []netip.Addr
	for i := range 1000 {
		members = append(members, netip.AddrFrom4([4]byte{10, 1, byte(i / 250), byte(1 + i%250)}))
	}
	filter, _ := a.filter(t)
	began := time.Now()
	filter.Set([]firewall.LAN{strict(s, members...)})
	eventually(t, "the members", func() bool { return drops(filter, s) == 0 })
	t.Logf("1,000 members: %v", time.Since(began))

	events := make(chan netlink.Message, 1000)
	var c *netlink.Conn
	must(t, a.Do(func() (err error) {
		c, err = netlink.Dial(unix.NETLINK_NETFILTER, nil)
		return err
	}))
	must(t, c.JoinGroup(unix.NFNLGRP_NFTABLES))
	go func() {
		defer close(events)
		for {
			list, err := c.Receive()
			if err != nil {
				return
			}
			for _, e := range list {
				events <- e
			}
		}
	}()
	began = time.Now()
	filter.Set([]firewall.LAN{strict(s, append(members, netip.MustParseAddr("10.9.9.9"))...)})
	eventually(t, "the member", func() bool { return a.elements(t, "members4") == 1001 })
	t.Logf("one more: %v", time.Since(began))
	filter.Set([]firewall.LAN{strict(s, members...)})
	eventually(t, "the member to be removed", func() bool { return a.elements(t, "members4") == 1000 })
	c.Close()
	var kinds []int
	for e := range events {
		if kind := int(e.Header.Type) & 0xff; kind != unix.NFT_MSG_NEWGEN {
			kinds = append(kinds, kind)
		}
	}
	if want := []int{unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM}; !slices.Equal(kinds, want) {
		t.Errorf("the kernel's events are %v, want %v", kinds, want)
	}
}
