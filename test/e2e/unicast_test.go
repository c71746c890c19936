package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// remotes returns the remotes of a LAN on the node.
func (m machine) remotes(lan string) (remotes []netip.Addr) {
	m.Helper()
	return m.remotesIn(m.lanNetns(m.namespace + "." + lan))
}

// remotesIn returns the remotes of the VXLANs in a network namespace.
func (l lab) remotesIn(ns netlab.Namespace) (remotes []netip.Addr) {
	l.Helper()
	handle := ns.Netlink(l.T)
	links, err := handle.LinkList()
	if err != nil {
		l.Fatal(err)
	}
	for _, link := range links {
		if link.Type() != "vxlan" {
			continue
		}
		entries, err := handle.NeighList(link.Attrs().Index, unix.AF_BRIDGE)
		if err != nil {
			l.Fatal(err)
		}
		for _, e := range entries {
			r, ok := netip.AddrFromSlice(e.IP)
			if ok && e.Flags&netlink.NTF_SELF != 0 && e.HardwareAddr.String() == "00:00:00:00:00:00" &&
				!r.IsMulticast() {
				remotes = append(remotes, r.Unmap())
			}
		}
	}
	return remotes
}

// awaitRemotes returns when the LAN has exactly these remotes on the node.
func (m machine) awaitRemotes(lan string, remotes ...string) {
	m.Helper()
	m.until(fmt.Sprintf("the remotes %v", remotes), func() bool {
		var have []string
		for _, r := range m.remotes(lan) {
			have = append(have, r.String())
		}
		return slices.Equal(have, remotes)
	})
}

// Frames of every kind cross each of the networks without multicast. The nodes find each other only by unicast
// discovery.
func TestFramesOfEveryKindCrossWithoutMulticast(t *testing.T) { newLab(t).framesCross(unicasts, 1140) }

// framesCross creates a LAN over each of the networks, with VNIs from first on. The first and the last network, IPv4 in
// one subnet and IPv6 over a router, also have a VM.
func (l lab) framesCross(underlays []underlay, first int) {
	tests := map[string]func(lab){}
	for i, u := range underlays {
		tests[u.name] = func(l lab) {
			l = l.over(u)
			l.lan(u.name, first+i, []string{u.name + "-1", u.name + "-2", u.name + "-vm"})
			both := l.start(pod(u.name+"-1", worker1, u.name+"-1"), pod(u.name+"-2", worker2, u.name+"-2"))
			one, two := both[0], both[1]
			one.address(address(1) + "/24")
			two.address(address(2) + "/24")
			others := []host{two}
			if i == 0 || i == len(underlays)-1 {
				others = append(others, l.start(vm(u.name+"-vm", worker2, u.name+"-vm", address(3)+"/24"))...)
			}
			for i, node := range []string{worker1, worker2} {
				s := l.awaitSegment(node, u.name, "with its VTEP", func(s v1beta1.SegmentStatus) bool {
					return s.VTEP != ""
				})
				if s.VTEP != u.vteps[i] || int(s.MTU) != u.mtu {
					l.Errorf("%s has VTEP %s and MTU %d, want %s and %d", node, s.VTEP, s.MTU, u.vteps[i], u.mtu)
				}
			}
			if lan := l.ready(u.name); lan.Status.Discovery != string(u.discovery) {
				l.Errorf("status.discovery is %q", lan.Status.Discovery)
			}
			for i, far := range others {
				crosses(one, far)
				crosses(far, one)
				one.pings(address(i + 2))
			}
			one.fetches(two, address(2))

			// The network does not carry multicast: a new address cannot be found.
			l.change(u.name, func(s *v1beta1.LANSpec) { s.Discovery, s.VXLANGroup = v1beta1.Multicast, u.otherGroup() })
			two.address(address(9) + "/24")
			if out, err := one.try("ping", "-c", "1", "-W", "1", address(9)); err == nil {
				l.Errorf("the other pod is found without remotes: %s", out)
			}
			l.change(u.name, func(s *v1beta1.LANSpec) { s.Discovery, s.VXLANGroup = u.discovery, u.group })
			// Both nodes change, one after the other.
			l.machines()[0].until("the other pod to be found again", func() bool {
				_, err := one.try("ping", "-c", "1", "-W", "1", address(9))
				return err == nil
			})
		}
	}
	l.sideBySide(tests)
}

// On a network that carries multicast and has addresses of both families, no frame from pod to pod is lost when a LAN
// changes from any discovery to any other. The test logs how many flooded frames are lost.
func TestLANChangesItsDiscoveryWhilePodsTalk(t *testing.T) {
	l := newLab(t)
	for i, u := range []underlay{
		{name: "IPv4", vteps: [2]string{"203.0.113.11", "203.0.113.12"}, bits: 24, discovery: v1beta1.Unicast},
		{
			name: "IPv6", vteps: [2]string{"2001:db8:203::11", "2001:db8:203::12"}, bits: 64, group: "ff02::14",
			discovery: v1beta1.Unicast,
		},
	} {
		t.Run(u.name, func(t *testing.T) {
			l := l.fresh(t).over(multicast)
			u.device = "both"
			for i, m := range l.machines() {
				m.addDevice(u.device, u.address(i))
			}
			l = l.over(u)
			one, two := l.pair("change", 1150+i)
			groups := map[v1beta1.Discovery]string{
				v1beta1.Multicast: u.otherGroup(), v1beta1.Unicast: u.group,
				v1beta1.EVPN: u.group,
			}
			from := u.discovery
			for _, to := range []v1beta1.Discovery{
				v1beta1.Multicast, v1beta1.EVPN, v1beta1.Unicast, v1beta1.EVPN,
				v1beta1.Multicast, v1beta1.Unicast,
			} {
				t.Run(fmt.Sprintf("%s to %s", from, to), func(t *testing.T) {
					one, two := one.in(t), two.in(t)
					flood := startFlood(two, one)
					loses := losesNothing
					if !kernel.RejoinsGroups() {
						loses = losesLittle
					}
					loses(one, two, func() {
						l.in(t).change("change", func(s *v1beta1.LANSpec) {
							s.Discovery, s.VXLANGroup = to, groups[to]
						})
					})
					tally := flood.end()
					t.Logf("%d flooded frames were lost, %d arrived twice", tally.Lost, tally.Duplicates)
				})
				from = to
			}
		})
	}
}

// The faults of other files over a router, with IPv6. With the flag -underlay all tests run over another network.

func TestDaemonIsKilledOverARouter(t *testing.T) {
	newLab(t).over(routed6).daemonIsKilledWhilePodsTalk()
}

func TestTrafficIsBackWithinASecondOfItsUnderlayOverARouter(t *testing.T) {
	newLab(t).over(routed6).trafficIsBackWithinASecondOfItsUnderlay()
}

func TestNodeIsBackWithAnotherAddress(t *testing.T) {
	newLab(t).over(routed6).nodeIsBackWithAnotherAddress()
}

func TestNodeHasAnotherAddress(t *testing.T) { newLab(t).over(routed6).nodeHasAnotherAddress() }

// A lost node stays a remote, because it may still forward, until its Node is deleted, and its LANNode with it. Pods of
// other nodes lose no frame, neither then nor when the node is back with another address.
func (l lab) nodeIsBackWithAnotherAddress() {
	l.Helper()
	l.lan("udead", 1146, []string{"udead-1", "udead-2", "udead-3"})
	both := l.start(pod("udead-1", worker1, "udead-1"), pod("udead-2", worker1, "udead-2"))
	lost := l.startSet("lost", worker2, "udead-3")
	ctx, cancel := context.WithTimeout(l.Context(), 3*patience)
	defer cancel()
	alive, dead := l.machine(worker1), l.machine(worker2)
	alive.awaitRemotes("udead", l.underlay.vteps[1])
	losesNothing(both[0], both[1], func() {
		dead.powerOff(ctx)
		alive.awaitRemotes("udead", l.underlay.vteps[1])
		begin := time.Now()
		if err := l.bed.client.Delete(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: worker2}}); err != nil {
			l.Fatal(err)
		}
		alive.awaitRemotes("udead")
		l.logTime("from the deletion of the Node until its remote was removed", begin)

		dead.powerOn(ctx)
		dead.readdress(l.underlay.spare())
		begin = time.Now()
		l.awaitPod(lost.pod, "another one that runs", func(p *corev1.Pod) bool {
			return string(p.UID) != lost.uid && isRunning(p)
		})
		alive.awaitRemotes("udead", l.underlay.spare().vteps[1])
		l.logTime("until its pod ran again and the new address was a remote", begin)
	})
	again := l.host(pod(lost.pod, worker2, "udead-3"))
	both[0].address(address(1) + "/24")
	again.address(address(3) + "/24")
	both[0].reaches(address(3))
	if err := l.bed.awaitInstalled(ctx); err != nil {
		l.Fatal(err)
	}
}

// readdress replaces the node's address by that of worker2 in another underlay, for the time of the test.
func (m machine) readdress(to underlay) {
	m.Helper()
	from := m.underlay.address(1)
	m.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_, err := m.Exec(ctx, "ip", "addr", "del", to.address(1), "dev", m.underlay.device)
		if err := errors.Join(err, m.RestoreUnderlay(m.underlay.device)); err != nil {
			m.Error(err)
		}
	})
	// as with systemd: the new address is not removed with the old one
	m.ownNetns().Sysctl(m.T, "net/ipv4/conf/all/promote_secondaries", "1")
	m.addAddress(m.underlay.device, to.address(1))
	m.run("ip", "addr", "del", from, "dev", m.underlay.device)
}

// nodeHasAnotherAddress wants a pod that sends nothing by itself to be reached at the node's new address.
func (l lab) nodeHasAnotherAddress() {
	l.Helper()
	one, two := l.pair("moved", 1147)
	alive, moved := l.machine(worker1), l.machine(worker2)
	alive.awaitRemotes("moved", l.underlay.vteps[1])
	s := startStream(one, two)
	moved.readdress(l.underlay.spare())
	begin := time.Now()
	alive.awaitRemotes("moved", l.underlay.spare().vteps[1])
	l.logTime("until the other node had only the new address", begin)
	<-time.After(2 * aMoment)
	if tally := s.end(); tally.LongestLoss > 1000 {
		l.Errorf("the stream was interrupted for %d ms, want 1,000 at most", tally.LongestLoss)
	}
	two.pings(address(1))
}

// The test measures the time from the attachment of the first pod of a node until the pod receives frames that are
// flooded on another node.
func TestPodIsReachedAtOnce(t *testing.T) {
	newLab(t).over(subnet4).podIsReached(1148, 100*time.Millisecond)
}

// podIsReached wants half of some pods to be reached within that time. A node advertises each of them at once: it does
// so for the first change after a quiet time, which is 200 ms long (gather in lanmgr/agent).
func (l lab) podIsReached(vni int, most time.Duration) {
	l.Helper()
	const rounds, quiet = 10, 400 * time.Millisecond
	l.lan("ureach", vni, []string{"ureach-1", "ureach-2"})
	from, to := l.machine(worker1).sandbox("ureach", "ureach-1"), l.machine(worker2).sandbox("ureach", "ureach-2")
	from.must("ADD")
	ctx, cancel := context.WithCancel(l.Context())
	defer cancel()
	go from.floods(ctx, from.wire(l.T), 1)
	var reached []time.Duration
	for range rounds {
		from.awaitRemotes("ureach")
		<-time.After(quiet)
		to.must("ADD")
		begin := time.Now()
		wire := to.wire(l.T)
		if _, err := netlab.Await(wire, patience, func(frame []byte) bool {
			return bytes.Contains(frame, []byte(frames.Marker))
		}); err != nil {
			l.Fatal(err)
		}
		reached = append(reached, time.Since(begin))
		to.must("DEL")
	}
	slices.Sort(reached)
	l.Logf("from ADD until the pod was reached from the other node: least %s, median %s, 90%% %s, most %s",
		reached[0], reached[rounds/2], reached[rounds*9/10], reached[rounds-1])
	if reached[rounds/2] > most {
		l.Errorf("half of the pods were not reached within %s", most)
	}
}

// wire opens the sandbox's interface for raw frames.
func (s sandbox) wire(t *testing.T) netlab.Wire {
	t.Helper()
	return netlab.At(s.path("/run/netns/"+s.name())).Open(t, "net1")
}

// floods sends each millisecond a frame that every node should receive.
func (s sandbox) floods(ctx context.Context, w netlab.Wire, id uint32) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for seq := uint64(0); ; seq++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := w.Send(frames.Stream(nil, segment.MAC(segment.LAN{}, "flood"), id, seq)); err != nil {
			s.Error(err)
			return
		}
	}
}
