package dataplane

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
)

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// arp is an ARP packet with that operation: 1 is a request, 2 a reply.
func arp(operation byte, dst, src net.HardwareAddr, sender, target string) []byte {
	return slices.Concat(dst, src, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, operation},
		src, netip.MustParseAddr(sender).AsSlice(), dst, netip.MustParseAddr(target).AsSlice())
}

// neighborDiscovery is an ICMPv6 message of that type: 135 is a solicitation, 136 an advertisement; the option has the
// sender's MAC.
func neighborDiscovery(kind byte, dst, src net.HardwareAddr, source, to, target string) []byte {
	from, at := netip.MustParseAddr(source).AsSlice(), netip.MustParseAddr(to).AsSlice()
	message := slices.Concat([]byte{kind, 0, 0, 0, 0x60, 0, 0, 0}, netip.MustParseAddr(target).AsSlice(),
		[]byte{kind - 134, 1}, src)
	sum := uint32(len(message) + 58)
	for _, part := range [][]byte{from, at, message} {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(part[i])<<8 | uint32(part[i+1])
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	message[2], message[3] = byte(^sum>>8), byte(^sum)
	return slices.Concat(dst, src, []byte{0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(message)), 58, 255}, from, at, message)
}

// binding is an IP address and the MAC that has it.
type binding struct{ mac, ip string }

// snooper is a node's snooping of one LAN.
type snooper struct {
	bound chan binding
	stop  func() error
}

func (n node) snoop(t *testing.T, s segment.Segment) *snooper {
	t.Helper()
	sn := &snooper{bound: make(chan binding, 100)}
	events := watch.BindingEvents{
		Bound: func(mac [6]byte, ip netip.Addr) {
			sn.bound <- binding{net.HardwareAddr(mac[:]).String(), ip.String()}
		},
		Recreated: func() {},
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- watch.New(n.kernel).WatchBindings(ctx, s.Netns, events) }()
	sn.stop = func() error {
		cancel()
		return <-ended
	}
	return sn
}

// until returns the bindings that are snooped before that of an address, which a pod sends again and again.
func (sn *snooper) until(t *testing.T, pod *host, last string) (all []binding) {
	t.Helper()
	again := time.NewTicker(50 * time.Millisecond) // snooping begins some time after the start
	defer again.Stop()
	for deadline := time.After(daemonTimeout); ; {
		must(t, pod.Send(arp(1, broadcast, pod.MAC, last, last)))
		select {
		case b := <-sn.bound:
			if b.ip == last {
				return all
			}
			all = append(all, b)
		case <-again.C:
		case <-deadline:
			t.Fatalf("timed out waiting for %s", last)
		}
	}
}

// The node snoops the bindings of its own hosts from ARP and neighbor discovery, also from frames to one other host. It
// snoops no bindings of hosts on other nodes, and nothing behind a VLAN tag.
func TestBindingsOfLocalHostsAreSnooped(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 441)
	onB.Spokes = []string{"three"} // it has a MAC of its own
	a.reconcile(t, onA)
	b.reconcile(t, onB)
	pod, vm := a.attach(t, onA, "one", segment.Veth), a.attach(t, onA, "two", segment.Macvtap)
	far := b.attach(t, onB, "three", segment.Veth)
	a.observe(t, onA)
	const first, last = "10.0.0.98", "10.0.0.99"
	snooper := a.snoop(t, onA)
	snooper.until(t, pod, first)

	reachesInTime(t, far, pod, arp(1, broadcast, far.MAC, "10.0.0.51", "10.0.0.1"))
	reachesInTime(t, far, pod, arp(2, pod.MAC, far.MAC, "10.0.0.52", "10.0.0.1"))
	reachesInTime(t, far, vm, neighborDiscovery(136, vm.MAC, far.MAC, "fd00::53", "fd00::1", "fd00::53"))
	for _, frame := range [][]byte{
		arp(1, broadcast, pod.MAC, "10.0.0.1", "10.0.0.2"),
		arp(2, vm.MAC, pod.MAC, "10.0.0.2", "10.0.0.3"),
		arp(2, far.MAC, pod.MAC, "10.0.0.3", "10.0.0.51"),
		arp(1, broadcast, pod.MAC, "0.0.0.0", "10.0.0.4"),
		frames.Tag(arp(1, broadcast, pod.MAC, "10.0.0.5", "10.0.0.2"), 0x8100, 7),
		frames.Tag(arp(1, broadcast, pod.MAC, "10.0.0.5", "10.0.0.2"), 0x88a8, 7),
		neighborDiscovery(135, solicited(2), pod.MAC, "fd00::1", "ff02::1:ff00:2", "fd00::2"),
		neighborDiscovery(135, solicited(2), pod.MAC, "::", "ff02::1:ff00:2", "fd00::9"),
		neighborDiscovery(136, far.MAC, pod.MAC, "fd00::2", "fd00::51", "fd00::2"),
	} {
		must(t, pod.Send(frame))
	}
	reachesInTime(t, vm, pod, arp(2, pod.MAC, vm.MAC, "10.0.0.7", "10.0.0.1"))

	have := map[binding]bool{}
	for _, b := range snooper.until(t, pod, last) {
		have[b] = true
	}
	delete(have, binding{pod.MAC.String(), first})
	p, v := pod.MAC.String(), vm.MAC.String()
	want := map[binding]bool{
		{p, "10.0.0.1"}: true, {p, "10.0.0.2"}: true, {p, "10.0.0.3"}: true,
		{p, "fd00::1"}: true, {p, "fd00::2"}: true, {v, "10.0.0.7"}: true,
	}
	if !maps.Equal(have, want) {
		t.Errorf("bindings are %v,\n want %v", have, want)
	}
	must(t, snooper.stop())
}

// A pod's bindings are advertised with its MAC until the pod is detached; FRR advertises its own in the same way.
func TestBindingsAreAdvertisedWithMACs(t *testing.T) {
	t.Parallel()
	a, _, s, _ := unicastHosts(t, families["IPv4"], 442)
	a.reconcile(t, withEVPN(s))
	router := startFRR(t, a, asVTEP)
	defer router.logState(t)
	there := router.attach(t, s)
	a.startSpeakerTo(t, s, 1, router.peer(1))
	here := a.attach(t, s, "one", segment.Veth)
	address := func(mac net.HardwareAddr, ip string) string {
		return fmt.Sprintf("[2]:[0]:[48]:[%s]:[%d]:[%s]", mac, netip.MustParseAddr(ip).BitLen(), ip)
	}
	router.awaitOutput(t, "show bgp l2vpn evpn route", "[2]:[0]:[48]:["+here.MAC.String()+"]")
	must(t, there.Send(arp(1, broadcast, there.MAC, "10.77.0.3", "10.77.0.1")))
	reachesInTime(t, here, there, arp(2, there.MAC, here.MAC, "10.77.0.1", "10.77.0.3"))
	reachesInTime(t, here, there, neighborDiscovery(136, there.MAC, here.MAC, "fd77::1", "fd77::3", "fd77::1"))
	router.awaitOutput(t, "show bgp l2vpn evpn route", "[2]:[0]:[48]:["+here.MAC.String()+"]\n",
		address(here.MAC, "10.77.0.1"), address(here.MAC, "fd77::1"))
	router.awaitOutput(t, "show evpn arp-cache vni 442", "10.77.0.1", "fd77::1", here.MAC.String())
	reachesInTime(t, here, there, arp(1, broadcast, here.MAC, "10.77.0.2", "10.77.0.3")) // one more address
	router.awaitOutput(t, "show bgp l2vpn evpn route", address(here.MAC, "10.77.0.1"), address(here.MAC, "10.77.0.2"))
	a.release(t, here)
	eventually(t, "FRR to remove the pod's routes", func() bool {
		return !hasAll(router.show(t, "show bgp l2vpn evpn route"), here.MAC.String())
	})
}
