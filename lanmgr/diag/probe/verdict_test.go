package probe

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
)

func side(n string) Facts {
	return Facts{
		Node: "worker" + n, Spoke: "s" + n, SpokeOrPool: "s" + n, Pod: "default/pod-" + n,
		Interface: "net1", MTU: 1422, VNI: 222, UDPPort: 4789, Group: netip.MustParseAddr("ff02::14"),
		Port: Link{"k" + n, true, true, 1422}, Bridge: Link{"br222", true, true, 1422},
		VXLAN: Link{"vx222", true, true, 1422}, Underlay: Link{"eth1", true, true, 1500},
	}
}

// reached returns a path whose frames all got that far.
func reached(h Hop, change ...func(*Path)) Path {
	p := Path{From: side("1"), To: side("2")}
	for _, r := range catalog(0, p.From.MTU, unusedMAC) {
		r.Reached, r.VNI = h, 222
		p.Frames = append(p.Frames, r.FrameResult)
	}
	p.setLargest()
	for _, f := range change {
		f(&p)
	}
	return p
}

// unicast makes both nodes have each other as a remote.
func unicast(p *Path) {
	one, two := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	p.From.Group, p.From.VTEP, p.From.Remotes = netip.Addr{}, one, []netip.Addr{two}
	p.To.Group, p.To.VTEP, p.To.Remotes = netip.Addr{}, two, []netip.Addr{one}
}

// betweenPods removes the places on the nodes where frames are captured.
func betweenPods(p *Path) {
	for _, f := range []*Facts{&p.From, &p.To} {
		f.Bridge, f.VXLAN, f.Underlay = Link{}, Link{}, Link{}
	}
}

// long makes every frame with a longer payload get lost after a hop.
func long(limit int, h Hop) func(*Path) {
	return func(p *Path) {
		for i := range p.Frames {
			if p.Frames[i].Payload > limit {
				p.Frames[i].Reached, p.Frames[i].Length = h, 1492
			}
		}
		p.Largest = limit
	}
}

func TestVerdictSaysWhatPassesAndWhereFramesAreLost(t *testing.T) {
	for _, c := range []struct {
		name string
		path Path
		ok   bool
		want string
	}{
		{
			"no fault", reached(Arrived), true,
			"every kind of frame passes, packets of up to 1422 bytes, up to 4 VLAN tags and maybe more.",
		},
		{
			"not sent", reached(NotSent, func(p *Path) { p.Frames[0].Error = "no buffer space" }), false,
			"Node worker1 could not send it: no buffer space",
		},
		{
			"no way out", reached(LeftVXLAN), false,
			"did not leave by eth1: a firewall on worker1 drops outgoing UDP port 4789, or the node has no route " +
				"to worker2",
		},
		{
			"between the nodes", reached(LeftNode), false,
			"never came to eth1 of node worker2: the network between them drops UDP port 4789, or carries no " +
				"multicast to ff02::14, as in clouds",
		},
		{
			"no multicast", reached(LeftNode, func(p *Path) { p.Frames[3].Reached = Arrived }), false,
			"only these pass: unicast to the other's address. It left node worker1 by eth1 but never came to eth1 of " +
				"node worker2: the network between them carries the LAN's unicast, but not its multicast to " +
				"ff02::14. Set spec.discovery to unicast",
		},
		{
			"between the nodes, unicast", reached(LeftNode, unicast), false,
			"the network between them drops UDP port 4789, or has no route to 192.0.2.2 (firewall, security " +
				"group, routes)",
		},
		{
			"no remote", reached(LeftVXLAN, unicast, func(p *Path) { p.From.Remotes = nil }), false,
			"Node worker1 does not know node worker2 as a remote: its VXLAN vx222 has no remotes, and the other's " +
				"address is 192.0.2.2.",
		},
		{
			"another remote",
			reached(LeftNode, unicast, func(p *Path) { p.From.Remotes[0] = netip.MustParseAddr("192.0.2.3") }),
			false, "its VXLAN vx222 has the remotes 192.0.2.3, and the other's address is 192.0.2.2.",
		},
		{
			"one node in unicast", reached(ReachedNode, func(p *Path) { p.To.Group = netip.Addr{} }), false,
			"sends it to group ff02::14, but that of node worker2 has no remotes: the two do not have the same " +
				"discovery",
		},
		{
			"a non-member",
			reached(ReachedNode, func(p *Path) { p.Frames[0].NonMember = netip.MustParseAddr("192.0.2.9") }), false,
			"It came to eth1 of node worker2 from 192.0.2.9, and is dropped there because that is not a member: the " +
				"LAN has strictPeers, and no LANNode of its other nodes has that address. Compare kubectl get " +
				"lannode worker1 -o yaml with nft list table inet k8slan on node worker2",
		},
		{
			"wrong checksum", reached(ReachedNode, func(p *Path) { p.Frames[0].WrongChecksum = true }), false,
			"It came to eth1 of node worker2 with a wrong UDP checksum, and the kernel there drops it: the transmit " +
				"checksum offload of eth1 on node worker1, or of a device on the way, is broken. Try ethtool -K eth1 " +
				"tx off on node worker1",
		},
		{
			"firewall", reached(ReachedNode), false,
			"came to eth1 of node worker2, but not to VXLAN vx222 there: a firewall on worker2 drops incoming UDP " +
				"port 4789",
		},
		{
			"other VNI", reached(ReachedNode, func(p *Path) { p.To.VNI = 223 }), false,
			"with VNI 222, but VXLAN vx222 there has VNI 223",
		},
		{
			"other UDP port", reached(ReachedNode, func(p *Path) { p.To.UDPPort = 8472 }), false,
			"on UDP port 4789, but VXLAN vx222 there listens on 8472",
		},
		{"at the port", reached(ReachedVXLAN), false, "but not to port k2 of spoke s2"},
		{
			"port down", reached(Arrived, func(p *Path) { p.From.Port.Up = false }), false,
			"Port k1 of spoke s1 on node worker1 is down",
		},
		{
			"pod's interface down", reached(ReachedVXLAN, func(p *Path) { p.To.Port.Carrier = false }), false,
			"Interface net1 in pod default/pod-2 is down",
		},
		{
			"path MTU", reached(Arrived, long(1330, LeftNode)), false,
			"packets of up to 1330 bytes pass, longer ones do not; the LAN's MTU is 1422. They leave node worker1 by " +
				"eth1, in packets of 1492 bytes",
		},
		{
			"a node's MTU", reached(Arrived, long(1330, LeftNode), func(p *Path) { p.To.Underlay.MTU = 1400 }), false,
			"eth1 of node worker2 has MTU 1400; raise it, or set spec.mtu to 1322",
		},
		{
			"LAN's MTU differs", reached(Arrived, long(1330, ReachedVXLAN), func(p *Path) { p.To.MTU = 1322 }), false,
			"The LAN's MTU is 1422 on node worker1 and 1322 on node worker2",
		},
		{
			"one kind", reached(Arrived, func(p *Path) { p.Frames[7].Reached = ReachedVXLAN }), false,
			"some kinds of frames do not pass: the address of LLDP. It came to VXLAN",
		},
		{
			"lost between pods", reached(SentFromBridge, betweenPods), false,
			"nothing passes. For where it is lost, run kubectl k8slan probe between two pods",
		},
		{
			"path MTU between pods", reached(Arrived, long(1330, SentFromBridge), betweenPods), false,
			"packets of up to 1330 bytes pass, longer ones do not; the LAN's MTU is 1422. The MTU of an underlay, or " +
				"of the network between the nodes, is too small for it: raise it, or set spec.mtu to 1322",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			ok, sentences := c.path.Verdict()
			if text := strings.Join(sentences, "\n"); ok != c.ok || !strings.Contains(text, c.want) {
				t.Errorf("%t, %s\nwant %t, %s", ok, text, c.ok, c.want)
			}
		})
	}
}

func TestPodsThatReceiveUnfinishedChecksumsAreNamed(t *testing.T) {
	finished := reached(Arrived)
	there := reached(Arrived, func(p *Path) { p.Frames[len(p.Frames)-1].Unfinished = true })
	back := reached(Arrived, func(p *Path) { p.From, p.To, p.Frames = p.To, p.From, there.Frames })
	ofAPool := reached(Arrived, func(p *Path) { p.To.Spoke, p.To.SpokeOrPool, p.Frames = "web_3", "web", there.Frames })
	for _, c := range []struct {
		paths []Path
		want  string
	}{
		{
			[]Path{there, finished},
			"come to default/pod-2 unfinished, left to hardware. Linux accepts them, but a network function that " +
				"reads raw frames drops them: for such a pod set spokeOptions: {s2: {txChecksum: off}}.",
		},
		{[]Path{there, back}, "come to default/pod-2 and default/pod-1 unfinished"},
		{[]Path{there, back}, "set spokeOptions: {s2: {txChecksum: off}, s1: {txChecksum: off}}."},
		{[]Path{ofAPool, ofAPool}, "set spokeOptions: {web: {txChecksum: off}}."},
	} {
		if text := Checksums(c.paths...); !strings.Contains(text, c.want) {
			t.Errorf("%s\nwant %s", text, c.want)
		}
	}
	if text := Checksums(finished, finished); text != "" {
		t.Errorf("for finished checksums: %s", text)
	}
}

func TestEveryFrameOfTheCatalogIsRecognized(t *testing.T) {
	for i, r := range catalog(1, 1422, unusedMAC) {
		f := r.order(uint32(i) + 7).Bytes
		if id, ok := Recognize(f); !ok || id != uint32(i)+7 || len(f) < minFrame || string(f[6:10]) != string(Source) {
			t.Errorf("%s: %d %t %x", r.Kind, id, ok, f)
		}
	}
}

func TestVNIAndChecksumOfAPacketAreRead(t *testing.T) {
	frame := catalog(0, 1422, unusedMAC)[0].order(1).Bytes
	for name, around := range map[string]func(datagram []byte) (pseudo, packet []byte){
		"IPv4": func(datagram []byte) (pseudo, packet []byte) {
			ip := []byte{0x45, 0, 0, byte(20 + len(datagram)), 0, 0, 0, 0, 64, udp, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2}
			return ip[12:], append(header(0, unusedMAC, ipv4), ip...)
		},
		"IPv6": func(datagram []byte) (pseudo, packet []byte) {
			ip := []byte{
				0x60, 0, 0, 0, 0,
				byte(len(datagram)), udp, 64, 0x20, 1, 0xd, 0xb8, 23: 1, 24: 0x20, 1, 0xd, 0xb8, 39: 2,
			}
			return ip[8:], append(header(0, unusedMAC, ipv6), ip...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, padding := range []int{0, 1} { // of even and of odd length
				datagram := append([]byte{
					0x12,
					0x34, 0x12, 0xb5, 0, byte(16 + len(frame) + padding), 0, 0, 8, 0, 0, 0, 0, 0, 222, 0,
				}, frame...)
				datagram = append(datagram, make([]byte, padding)...)
				pseudo, before := around(datagram)
				packet := func() []byte { return append(append([]byte{}, before...), datagram...) }
				if vni, wrong := Outer(packet()); vni != 222 || wrong {
					t.Errorf("without a checksum: VNI %d, wrong %t", vni, wrong)
				}
				binary.BigEndian.PutUint16(datagram[6:], ^sum(pseudo, []byte{0, udp, 0, byte(len(datagram))}, datagram))
				if vni, wrong := Outer(packet()); vni != 222 || wrong {
					t.Errorf("with a checksum: VNI %d, wrong %t", vni, wrong)
				}
				datagram[6]++
				if vni, wrong := Outer(packet()); vni != 222 || !wrong {
					t.Errorf("with a wrong checksum: VNI %d, wrong %t", vni, wrong)
				}
				whole := packet()
				for n := range len(whole) {
					if vni, wrong := Outer(whole[:n]); vni != 0 || wrong {
						t.Errorf("of the first %d bytes: VNI %d, wrong %t", n, vni, wrong)
					}
				}
			}
		})
	}
}
