package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netns"
)

// unicastUnderlay gives the nodes a device of that name, with those addresses, that carries no VXLAN to a group.
func (l lab) unicastUnderlay(device string, addresses ...string) {
	l.Helper()
	for i, m := range l.machines() {
		m.addDevice(device)
		m.run("ip", "link", "set", device, "up")
		if strings.Contains(addresses[i], ":") {
			m.run("ip", "addr", "add", addresses[i], "dev", device, "nodad")
		} else {
			m.run("ip", "addr", "add", addresses[i], "dev", device)
		}
		m.run("nft", fmt.Sprintf(`table inet e2e_%s {
			chain out {
				type filter hook output priority 0
				oifname %[1]s udp dport 4789 ip daddr 224.0.0.0/4 counter drop
				oifname %[1]s udp dport 4789 ip6 daddr ff00::/8 counter drop
			}
		}`, device))
		m.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if _, err := m.Exec(ctx, "nft", "delete", "table", "inet", "e2e_"+device); err != nil {
				m.Error(err)
			}
		})
	}
}

// remotes are those that a LAN has on the node.
func (m machine) remotes(lan string) (remotes []netip.Addr) {
	m.Helper()
	handle := m.inside(m.namespace + "." + lan).Netlink(m.T)
	links, err := handle.LinkList()
	if err != nil {
		m.Fatal(err)
	}
	for _, link := range links {
		if link.Type() != "vxlan" {
			continue
		}
		entries, err := handle.NeighList(link.Attrs().Index, unix.AF_BRIDGE)
		if err != nil {
			m.Fatal(err)
		}
		for _, e := range entries {
			r, ok := netip.AddrFromSlice(e.IP)
			if ok && e.Flags&netlink.NTF_SELF != 0 && e.HardwareAddr.String() == "00:00:00:00:00:00" && !r.IsMulticast() {
				remotes = append(remotes, r.Unmap())
			}
		}
	}
	return remotes
}

// awaitRemotes returns when the LAN's remotes on the node are as many.
func (m machine) awaitRemotes(lan string, count int) {
	m.Helper()
	m.until(fmt.Sprintf("%d remotes", count), func() bool { return len(m.remotes(lan)) == count })
}

func TestPodsTalkWithoutMulticast(t *testing.T) {
	for _, c := range []struct {
		family, lan, device, group string
		vni                        int
		addresses                  []string
		mtu                        int
	}{
		{"IPv4", "ufour", "uni4", "", 1140, []string{"192.0.2.11/24", "192.0.2.12/24"}, 1442},
		{"IPv6", "usix", "uni6", "ff02::14", 1141, []string{"2001:db8:77::11/64", "2001:db8:77::12/64"}, 1422},
	} {
		t.Run(c.family, func(t *testing.T) {
			l := newLab(t)
			l.unicastUnderlay(c.device, c.addresses...)
			more := []string{"discovery: unicast", fmt.Sprintf("vxlanDevMap: {%s: %s, %s: %[2]s}", worker1, c.device, worker2)}
			if c.group != "" {
				more = append(more, "vxlanGrp: "+c.group)
			}
			one, two := l.pair(c.lan, c.vni, more...)
			if lan := l.ready(c.lan); lan.Status.Discovery != "unicast" {
				t.Errorf("status.discovery is %q", lan.Status.Discovery)
			}
			for i, node := range []string{worker1, worker2} {
				s := l.awaitSegment(node, c.lan, "with its VTEP", func(s v1beta1.SegmentStatus) bool { return s.VTEP != "" })
				if own, _, _ := strings.Cut(c.addresses[i], "/"); s.VTEP != own || int(s.MTU) != c.mtu {
					t.Errorf("%s has VTEP %s and MTU %d, want %s and %d", node, s.VTEP, s.MTU, own, c.mtu)
				}
			}
			crosses(one, two)
			crosses(two, one)
			losesNothing(one, two, func() { // there and back, within the family of addresses
				l.change(c.lan, func(s *v1beta1.LANSpec) { s.Discovery, s.VXLANGroup = v1beta1.Multicast, groupOf(c.family) })
				l.change(c.lan, func(s *v1beta1.LANSpec) { s.Discovery, s.VXLANGroup = v1beta1.Unicast, c.group })
			})

			// The network carries no multicast indeed: nobody finds an address that is new.
			l.change(c.lan, func(s *v1beta1.LANSpec) { s.Discovery, s.VXLANGroup = v1beta1.Multicast, groupOf(c.family) })
			two.address(address(9) + "/24")
			if out, err := one.try("ping", "-c", "1", "-W", "1", address(9)); err == nil {
				t.Errorf("without remotes the other pod is found: %s", out)
			}
			l.change(c.lan, func(s *v1beta1.LANSpec) { s.Discovery, s.VXLANGroup = v1beta1.Unicast, c.group })
			one.pings(address(9))

			// A node that is back with another address.
			m := l.machine(worker2)
			was, _, _ := strings.Cut(c.addresses[1], "/")
			is := strings.TrimSuffix(was, "12") + "13"
			m.run("ip", "addr", "add", is+strings.TrimPrefix(c.addresses[1], was), "dev", c.device)
			begin := time.Now()
			m.run("ip", "addr", "del", c.addresses[1], "dev", c.device)
			l.machine(worker1).until("the new address alone among the remotes", func() bool {
				return slices.Equal(l.machine(worker1).remotes(c.lan), []netip.Addr{netip.MustParseAddr(is)})
			})
			l.logTime("until the other node had the new address", begin)
			one.pings(address(2))
		})
	}
}

func groupOf(family string) string {
	if family == "IPv4" {
		return "239.77.0.14"
	}
	return "ff02::14"
}

// A node that is lost stays a remote, for it may still forward, until its Node is deleted, and its LANNode with that.
func TestARemoteGoesWithItsNode(t *testing.T) {
	l := newLab(t)
	_, _ = l.pair("udead", 1143, "discovery: unicast", fmt.Sprintf("vxlanDevMap: {%s: eth0, %s: eth0}", worker1, worker2))
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	alive, dead := l.machine(worker1), l.machine(worker2)
	dead.powerOff(ctx)
	if remotes := alive.remotes("udead"); len(remotes) != 1 {
		t.Errorf("while the node is down the other has the remotes %v", remotes)
	}
	begin := time.Now()
	if err := bed.client.Delete(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: worker2}}); err != nil {
		t.Fatal(err)
	}
	alive.awaitRemotes("udead", 0)
	l.logTime("from the end of the Node until its remote was gone", begin)
	dead.powerOn(ctx)
	if err := bed.awaitInstalled(ctx); err != nil {
		t.Fatal(err)
	}
}

// TestAPodIsReachedAtOnce measures from when the plugin has attached a pod, the first of its node, until it hears what is flooded on
// another node.
func TestAPodIsReachedAtOnce(t *testing.T) {
	const rounds = 20
	l := newLab(t)
	l.unicastUnderlay("unir", "192.0.2.21/24", "192.0.2.22/24")
	l.lan("ureach", 1142, []string{"ureach-1", "ureach-2"}, "discovery: unicast", fmt.Sprintf("vxlanDevMap: {%s: unir, %s: unir}", worker1, worker2))
	from, to := l.machine(worker1).sandbox("ureach", "ureach-1"), l.machine(worker2).sandbox("ureach", "ureach-2")
	from.must("ADD")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go from.floods(ctx, from.wire(t), 1)
	var reached []time.Duration
	for range rounds {
		from.awaitRemotes("ureach", 0)
		<-time.After(2 * aMoment) // the daemons have nothing to do
		to.must("ADD")
		begin := time.Now()
		wire := to.wire(t)
		if _, err := netns.Await(wire, patience, func(frame []byte) bool { return bytes.Contains(frame, []byte(frames.Marker)) }); err != nil {
			t.Fatal(err)
		}
		reached = append(reached, time.Since(begin))
		to.must("DEL")
	}
	slices.Sort(reached)
	t.Logf("from ADD until the pod was reached from the other node: least %s, median %s, 90%% %s, most %s",
		reached[0], reached[rounds/2], reached[rounds*9/10], reached[rounds-1])
	if reached[rounds/2] > 100*time.Millisecond {
		t.Errorf("half of the pods were not reached within 100 ms")
	}
}

// wire is what the sandbox hears and says.
func (s sandbox) wire(t *testing.T) netns.Wire {
	t.Helper()
	return netns.At(s.path("/run/netns/"+s.name())).Open(t, "net1")
}

// floods sends a frame that every node should hear, each millisecond.
func (s sandbox) floods(ctx context.Context, w netns.Wire, id uint32) {
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
