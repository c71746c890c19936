package e2e

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// wantsProbe wants a probe to exit with that code and to print these words.
func (l lab) wantsProbe(code int, words []string, args ...string) {
	l.Helper()
	begin := time.Now()
	out := l.k8slan(code, append([]string{"probe"}, args...)...)
	l.Logf("after %s:\n%s", time.Since(begin).Round(time.Millisecond), out)
	for _, w := range words {
		if !strings.Contains(out, w) {
			l.Errorf("kubectl k8slan probe does not print %q", w)
		}
	}
}

// pauseDaemon pauses k8slan's daemon on the node until the test ends.
func (m machine) pauseDaemon() {
	m.Helper()
	daemon := m.daemon()
	m.run("kill", "-STOP", daemon)
	m.afterwards("kill", "-CONT", daemon)
}

// runInLAN runs a command in a LAN's network namespace.
func (m machine) runInLAN(lan string, command ...string) {
	m.Helper()
	m.run(append([]string{"nsenter", "--net=/run/k8slan/netns/" + m.namespace + "." + lan}, command...)...)
}

// cable is the other end of a node's device, in the network between the nodes.
type cable struct {
	lab
	netns, port string
}

func (m machine) cable(device string) cable {
	m.Helper()
	path, port, err := m.UnderlayPort(device)
	if err != nil {
		m.Fatal(err)
	}
	return cable{m.lab, path, port}
}

// run runs a command in the network between the nodes.
func (c cable) run(command ...string) {
	c.Helper()
	out, err := exec.Command("nsenter", append([]string{"--net=" + c.netns}, command...)...).CombinedOutput()
	if err != nil {
		c.Fatalf("%s: %v: %s", strings.Join(command, " "), err, out)
	}
}

// rule adds a rule of nftables for packets from the cable, until the test ends.
func (c cable) rule(rule string) {
	c.Helper()
	c.run("nft", fmt.Sprintf("add table netdev probed; add chain netdev probed in { type filter hook ingress device "+
		"%q priority 0; }; add rule netdev probed in %s", c.port, rule))
	c.Cleanup(func() { c.run("nft", "delete table netdev probed") })
}

// probed is a LAN with a pod on each node, and what probe reports of it.
type probed struct {
	lab
	both              []host
	there, back       string // the beginning of the line of each direction
	allThere, allBack string // the lines if all frames pass
}

func newProbed(t *testing.T) probed {
	t.Helper()
	l := newLab(t).over(multicast)
	l.lan("probed", 1088, []string{"probed-1", "probed-2", "probed-3"}, "vxlanPort: 4801")
	p := probed{
		lab:   l,
		both:  l.start(pod("probed-1", worker1, "probed-1"), pod("probed-2", worker2, "probed-2")),
		there: fmt.Sprintf("%s/probed-1 → %[1]s/probed-2: ", l.namespace),
		back:  fmt.Sprintf("%s/probed-2 → %[1]s/probed-1: ", l.namespace),
	}
	const all = "every kind of frame passes, packets of up to 1422 bytes, up to 4 VLAN tags"
	p.allThere, p.allBack = p.there+all, p.back+all
	l.awaitLAN("probed", "with its pods", func(lan *v1beta1.LAN) bool { return lan.Status.Attached == 2 })
	return p
}

func TestProbeShowsWhatPasses(t *testing.T) {
	p := newProbed(t)
	well := []string{
		p.allThere, p.allBack, "checksums come to " + p.namespace + "/probed-2 and " + p.namespace +
			"/probed-1 unfinished",
		"spokeOptions: {probed-2: {txChecksum: off}, probed-1: {txChecksum: off}}",
	}
	t.Run("everything", func(t *testing.T) { p.in(t).wantsProbe(0, well, "probed") })
	t.Run("everything between two pods", func(t *testing.T) { p.in(t).wantsProbe(0, well, "probed-1", "probed-2") })
	t.Run("nothing through a firewall between the nodes", func(t *testing.T) {
		l := p.in(t)
		l.machine(worker2).cable("eth1").rule("udp dport 4801 drop")
		l.wantsProbe(1, []string{p.allThere, p.back +
			"nothing passes. It left node worker2 by eth1 but never came to eth1 of node worker1: " +
			"the network between them drops UDP port 4801, or carries no multicast to ff02::14"}, "probed")
	})
	t.Run("transmit checksums, finished for one spoke", func(t *testing.T) {
		l := p.in(t)
		l.change("probed", func(s *v1beta1.LANSpec) {
			s.SpokeOptions = map[string]v1beta1.SpokeOptions{"probed-2": {TxChecksum: v1beta1.Off}}
		})
		l.wantsProbe(0, []string{
			p.allThere, p.allBack, "checksums come to " + l.namespace + "/probed-1 unfinished",
			"spokeOptions: {probed-1: {txChecksum: off}}.",
		}, "probed")
	})
	t.Run("a plugin that is killed leaves nothing on the nodes", func(t *testing.T) {
		l := p.in(t)
		l.machine(worker2).cable("eth1").rule("udp dport 4801 drop") // so that the probe takes seconds
		probe := l.plugin(t.Context(), "probe", "probed")
		if err := probe.Start(); err != nil {
			t.Fatal(err)
		}
		for _, running := range []bool{true, false} {
			for _, m := range l.machines() {
				m.until(fmt.Sprintf("endpoints that run: %t", running), func() bool {
					return strings.Contains(m.run("sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"),
						"probe endpoint --ns="+l.namespace) == running
				})
			}
			_ = probe.Process.Kill() // once they run
		}
		_ = probe.Wait() // killed
	})
	t.Run("a missing LAN and a missing pod", func(t *testing.T) {
		l := p.in(t)
		l.wantsProbe(2, []string{"there is no LAN nowhere in namespace " + l.namespace}, "nowhere")
		l.wantsProbe(2, []string{"absent is neither an attached pod in namespace " + l.namespace}, "probed-1", "absent")
	})
}

func TestProbeNamesWhereFramesAreLost(t *testing.T) {
	p := newProbed(t)
	for _, fault := range []struct {
		name  string
		make  func(l lab, node machine) // node is worker2
		words []string
	}{
		{
			"a firewall on a node", func(_ lab, node machine) {
				node.run("nft", "add table inet probed; add chain inet probed in { type filter hook input priority "+
					"0; }; add rule inet probed in udp dport 4801 drop")
				node.afterwards("nft", "delete table inet probed")
			},
			[]string{p.there + "nothing passes. It came to eth1 of node worker2, but not to VXLAN vx1088 there: a " +
				"firewall on worker2 drops incoming UDP port 4801", p.allBack},
		},
		{
			"a firewall on a node, outwards", func(_ lab, node machine) {
				node.run("nft", "add table inet probed; add chain inet probed out { type filter hook output "+
					"priority 0; }; add rule inet probed out udp dport 4801 drop")
				node.afterwards("nft", "delete table inet probed")
			},
			[]string{p.allThere, p.back +
				"nothing passes. VXLAN vx1088 of node worker2 sent it, but it did not leave by eth1: a firewall on " +
				"worker2 drops outgoing UDP port 4801"},
		},
		{
			"a network between the nodes of a smaller MTU", func(_ lab, node machine) {
				c := node.cable("eth1")
				c.run("ip", "link", "set", c.port, "mtu", "1400") // a bridge allows 4 bytes more, for a VLAN tag
				c.Cleanup(func() { c.run("ip", "link", "set", c.port, "mtu", "1500") })
			},
			[]string{
				p.there + "packets of up to 1334 bytes pass, longer ones do not; the LAN's MTU is 1422. They leave " +
					"node worker1 by eth1, in packets of 1492 bytes, but never come to eth1 of node worker2: " +
					"the MTU of the network between them is smaller than the nodes' 1500; raise it, or set spec.mtu " +
					"to 1326",
				p.back + "packets of up to 1334 bytes pass",
			},
		},
		{
			"a node's underlay of a smaller MTU", func(l lab, node machine) {
				node.run("ip", "link", "set", "eth1", "mtu", "1400")
				node.afterwards("ip", "link", "set", "eth1", "mtu", "1500")
				l.awaitSegment(worker2, "probed", "of a smaller MTU", func(s v1beta1.SegmentStatus) bool {
					return s.MTU == 1322 && s.State == v1beta1.SegmentReady
				})
			},
			[]string{"longer ones do not", "The LAN's MTU is 1422 on node worker1 and 1322 on node worker2"},
		},
		{
			"a pod's interface that is down", func(l lab, _ machine) {
				two := p.both[1].in(l.T)
				two.run("ip", "link", "set", two.link, "down")
				l.Cleanup(func() {
					ctx, cancel := context.WithTimeout(context.Background(), patience)
					defer cancel()
					if err := two.exec(ctx, io.Discard, io.Discard, "ip", "link", "set", two.link, "up"); err != nil {
						l.Error(err)
					}
				})
			},
			[]string{p.there + "nothing passes. Interface net1 in pod " + p.namespace + "/probed-2 is down", p.back +
				"nothing passes. Interface net1"},
		},
		{
			"a port that is down", func(_ lab, node machine) {
				node.pauseDaemon() // it would set the port up at once
				node.runInLAN("probed", "ip", "link", "set", "probed-2", "down")
			},
			[]string{
				p.there + "nothing passes. Port k",
				"of spoke probed-2 on node worker2 is down, and the daemon should have set it up: see its log",
			},
		},
		{
			"a VXLAN that is down", func(_ lab, node machine) {
				node.pauseDaemon()
				node.runInLAN("probed", "ip", "link", "set", "vx1088", "down")
			},
			[]string{p.there + "nothing passes. It came to eth1 of node worker2, but not to VXLAN vx1088 there, " +
				"which is down", p.back +
				"nothing passes. Lost on node worker2 between bridge br1088 and VXLAN vx1088, which is down"},
		},
		{
			"another VNI", func(l lab, node machine) {
				node.pauseDaemon()
				node.runInLAN("probed", "ip", "link", "del", "vx1088")
				node.run("ip", "link", "add", "vx1088", "type", "vxlan", "id", "1089", "dev", "eth1", "group",
					"ff02::14", "dstport", "4801")
				node.run("ip", "link", "set", "vx1088", "netns", "/run/k8slan/netns/"+l.namespace+".probed")
				node.runInLAN("probed", "ip", "link", "set", "vx1088", "master", "br1088", "up")
			},
			[]string{
				p.there + "nothing passes. It came to node worker2 with VNI 1088, but VXLAN vx1088 there has VNI " +
					"1089, and drops it: the two nodes do not have the same LAN",
				p.back + "nothing passes. It came to node worker1 with VNI 1089, but VXLAN vx1088 there has VNI 1088",
			},
		},
		{
			"a broken transmit checksum offload", func(_ lab, node machine) {
				node.run("ethtool", "-K", "eth1", "tx", "off")
				node.afterwards("ethtool", "-K", "eth1", "tx", "on")
				node.cable("eth1").rule("udp dport 4801 udp checksum set 0x1234")
			},
			[]string{p.allThere, p.back +
				"nothing passes. It came to eth1 of node worker1 with a wrong UDP checksum, and the kernel there " +
				"drops it: the transmit checksum offload of eth1 on node worker2"},
		},
	} {
		t.Run(fault.name, func(t *testing.T) {
			l := p.in(t)
			fault.make(l, l.machine(worker2))
			l.wantsProbe(1, fault.words, "probed")
		})
		p.awaitSegment(worker2, "probed", "as before", func(s v1beta1.SegmentStatus) bool {
			return s.MTU == 1422 && s.State == v1beta1.SegmentReady
		})
		p.machine(worker2).awaitLinks(p.namespace+".probed", "as before", func(all linkList) bool {
			vxlan, ok := all.link("vx1088").(*netlink.Vxlan)
			return ok && vxlan.VxlanId == 1088 && all.up("vx1088") &&
				!slices.ContainsFunc(all, func(l netlink.Link) bool {
					return strings.HasPrefix(l.Attrs().Name, "k") && !all.up(l.Attrs().Name)
				})
		})
	}
}

// The daemon of one node is paused, and so does not know a new pod on the other node, nor another address of that node.
func TestProbeNamesTheRemoteThatANodeDoesNotKnow(t *testing.T) {
	l := newLab(t)
	for _, c := range []struct {
		underlay
		lan string
		vni int
	}{{subnet4, "lonefour", 1144}, {subnet6, "lonesix", 1145}} {
		t.Run(c.name, func(t *testing.T) {
			l := l.fresh(t).over(c.underlay)
			one, two := c.lan+"-1", c.lan+"-2"
			l.lan(c.lan, c.vni, []string{one, two})
			l.start(pod(one, worker1, one))
			l.awaitSegment(worker1, c.lan, "with its pod", func(s v1beta1.SegmentStatus) bool {
				return len(s.Attachments) == 1
			})
			there, back := fmt.Sprintf("%s/%s → %[1]s/%[3]s: ", l.namespace, one, two),
				fmt.Sprintf("%s/%s → %[1]s/%[3]s: ", l.namespace, two, one)
			t.Run("no remote", func(t *testing.T) {
				l := l.in(t)
				l.machine(worker1).pauseDaemon()
				l.start(pod(two, worker2, two))
				l.awaitSegment(worker2, c.lan, "with its pod", func(s v1beta1.SegmentStatus) bool {
					return len(s.Attachments) == 1
				})
				l.machine(worker2).awaitRemotes(c.lan, c.vteps[0])
				l.wantsProbe(1, []string{
					fmt.Sprintf("Node worker1 does not know node worker2 as a remote: its VXLAN vx%d has no "+
						"remotes, and the other's address is %s", c.vni, c.vteps[1]),
					back + "every kind of frame passes",
				}, c.lan)
			})
			l.machine(worker1).awaitRemotes(c.lan, c.vteps[1])
			t.Run("another address", func(t *testing.T) {
				l := l.in(t)
				l.machine(worker1).pauseDaemon()
				l.machine(worker2).readdress(c.spare())
				is := c.spare().vteps[1]
				l.awaitSegment(worker2, c.lan, "at its new address", func(s v1beta1.SegmentStatus) bool {
					return s.VTEP == is
				})
				l.wantsProbe(1, []string{
					fmt.Sprintf("Node worker1 does not know node worker2 as a remote: its VXLAN vx%d has the "+
						"remotes %s, and the other's address is %s", c.vni, c.vteps[1], is),
					back + "nothing passes. It came to " + c.device + " of node worker1 from " + is +
						", and is dropped there because that is not a member: the LAN has strictPeers",
				}, c.lan)
			})
			l.machine(worker1).awaitRemotes(c.lan, c.vteps[1])
			l.wantsProbe(0, []string{there + "every kind of frame passes", back + "every kind of frame passes"}, c.lan)
		})
	}
}
