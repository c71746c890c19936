package dataplane

import (
	"context"
	"encoding/binary"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// silenceWindow is how long the test listens for frames: longer than IPv6, bridges and VXLANs take to send frames by
// themselves when they are new (router solicitations at 0, 4 and 8 s, MLD reports within 1 s, DAD within 2 s).
const silenceWindow = 4500 * time.Millisecond

func TestLANSendsNothingByItself(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	idle, waiting := lan("idle", 51, "unused", "listener"), lan("waiting", 52, "vm", "listener")
	listeners := map[string]netlab.Wire{}
	for _, s := range []segment.Segment{idle, waiting} {
		b.reconcile(t, b.withUnderlay(t, s))
		listeners["pod of LAN "+s.LAN.Name] = b.attach(t, s, "listener", segment.Veth)
	}
	cables := map[string]netlab.Wire{a.Name: a.underlay.Open(t, a.Port()), b.Name: b.underlay.Open(t, b.Port())}

	// Wires are open on all sides when the first node builds the segments and a VM is attached whose QEMU does not run
	// yet.
	a.reconcile(t, a.withUnderlay(t, idle))
	listeners["plug of LAN idle"] = a.lanNetns(idle).Open(t, segment.PlugName("unused"))
	a.reconcile(t, a.withUnderlay(t, waiting))
	vm := a.claim(t, waiting, "vm", segment.Macvtap)

	ctx, cancel := context.WithTimeout(t.Context(), silenceWindow)
	defer cancel()
	var listening sync.WaitGroup
	for name, w := range listeners {
		listening.Go(func() {
			if err := expectSilence(ctx, w, anything); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	for name, w := range cables {
		listening.Go(func() {
			if err := expectSilence(ctx, w, isVXLAN); err != nil {
				t.Errorf("underlay of %s: %v", name, err)
			}
		})
	}
	listening.Wait()

	// The same wires receive the guest's first frame.
	vm.openWire(t, a.lanNetns(waiting))
	first := frames.Stream(nil, vm.MAC, 1, 0)
	crosses(t, vm, listeners["pod of LAN waiting"], first)
	if _, err := netlab.Await(cables[a.Name], frameTimeout, isVXLAN); err != nil {
		t.Errorf("underlay of %s after the guest's first frame: %v", a.Name, err)
	}
}

// isVXLAN reports whether a frame on the underlay is a VXLAN packet over IPv6.
func isVXLAN(frame []byte) bool {
	const ipv6, udp = 14, 14 + 40
	return len(frame) > udp+8 && binary.BigEndian.Uint16(frame[12:]) == 0x86dd && frame[ipv6+6] == 17 &&
		binary.BigEndian.Uint16(frame[udp+2:]) == 4789
}

func TestHostNamespaceHasNoLinkOfALAN(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	m := a.manage(t)
	s := a.withUnderlay(t, lan("hidden", 53, "pod", "vm"))
	m.runs(t, s)
	want := []string{netlab.UnderlayDevice}
	if got := a.Links(t); !slices.Equal(got, want) {
		t.Errorf("with a LAN the node has %v, want %v", got, want)
	}
	pod := a.attach(t, s, "pod", segment.Veth)
	if got := a.Links(t); !slices.Equal(got, want) {
		t.Errorf("with a pod attached the node has %v, want %v", got, want)
	}
	a.release(t, pod)
	m.Set(nil)
	a.awaitState(t, s, "nothing", func(have segment.State) bool { return !have.Exists && have.Record == nil })
	if got := a.Links(t); !slices.Equal(got, want) {
		t.Errorf("after the LAN the node has %v, want %v", got, want)
	}
}

// IPv6 is switched on for one plug. The plug sends with the MAC of the VM that it waits for, which may run on another
// node: the bridge must forget the MAC at once.
func TestPlugThatSentIsSilencedAndForgotten(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	m := a.manage(t)
	s := a.withUnderlay(t, lan("spoke", 56, "vm"))
	m.runs(t, s)
	inside, plug := a.lanNetns(s), segment.PlugName("vm")
	wire := inside.Open(t, plug)
	must(t, wire.Send(frames.Stream(nil, segment.MAC(s.LAN, "vm"), 1, 1)))
	if !a.hasLearned(t, s, segment.MAC(s.LAN, "vm")) {
		t.Fatal("the bridge learns no MAC")
	}
	inside.Sysctl(t, "net/ipv6/conf/"+plug+"/disable_ipv6", "0")
	a.awaitState(t, s, "the plug to be silenced", func(have segment.State) bool {
		l, _ := have.Link(plug)
		return !l.IPv6 && !a.hasLearned(t, s, segment.MAC(s.LAN, "vm"))
	})
}

// hasLearned reports whether a LAN's bridge has learned a MAC on the VM's port.
func (n node) hasLearned(t *testing.T, s segment.Segment, mac net.HardwareAddr) bool {
	t.Helper()
	links := n.lanNetns(s).Netlink(t)
	port, err := links.LinkByName(segment.PortName("vm"))
	must(t, err)
	entries, err := links.NeighList(port.Attrs().Index, unix.AF_BRIDGE)
	must(t, err)
	return slices.ContainsFunc(entries, func(e netlink.Neigh) bool { return e.HardwareAddr.String() == mac.String() })
}

// A VXLAN that is up joins its group, so that its node gets every LAN's broadcast frames.
func TestVXLANIsUpOnlyWhileASpokeIsClaimed(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	m := a.manage(t)
	s := a.withUnderlay(t, lan("quiet", 54, "one", "two", "vm"))
	m.runs(t, s)
	expect := func(when string, up bool) {
		t.Helper()
		a.awaitState(t, s, "the VXLAN to be right "+when, func(have segment.State) bool {
			l, ok := have.Link(s.VXLAN.Name)
			return ok && l.Up == up
		})
		if joined := a.hasJoined(t); joined != up {
			t.Errorf("%s the node is in the group: %t, want %t", when, joined, up)
		}
	}
	expect("while nothing is claimed", false)
	one := a.claim(t, s, "one", segment.Veth)
	if l, _ := a.observe(t, s).Link(s.VXLAN.Name); !l.Up {
		t.Error("the VXLAN is still down when the first claim returns")
	}
	two := a.claim(t, s, "two", segment.Veth)
	a.release(t, one)
	m.runs(t, s)
	expect("after the first of two releases", true)
	a.release(t, two)
	expect("after the last release", false)
	vm := a.claim(t, s, "vm", segment.Macvtap)
	expect("while a VM is attached", true)
	a.release(t, vm)
	expect("after the VM's release", false)
}

// hasJoined reports whether the node's underlay device has joined the LANs' group.
func (n node) hasJoined(t *testing.T) bool {
	t.Helper()
	for line := range strings.Lines(n.read(t, "/proc/thread-self/net/igmp6")) {
		f := strings.Fields(line)
		if f[1] == netlab.UnderlayDevice && f[2] == "ff020000000000000000000000000014" {
			return true
		}
	}
	return false
}

func TestSettingsMakeALANTransparent(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	s := a.withUnderlay(t, lan("clear", 55, "pod", "vm"))
	a.reconcile(t, s)
	pod := a.claim(t, s, "pod", segment.Veth)
	inside := a.lanNetns(s)
	for name, want := range map[string]string{
		"net/ipv6/conf/all/disable_ipv6":              "1",
		"net/ipv6/conf/default/disable_ipv6":          "1",
		"net/ipv6/conf/" + s.Bridge + "/disable_ipv6": "1",
		"net/bridge/bridge-nf-call-iptables":          "0",
		"net/bridge/bridge-nf-call-ip6tables":         "0",
		"net/bridge/bridge-nf-call-arptables":         "0",
	} {
		if strings.HasPrefix(name, "net/bridge/") && !exists("/proc/sys/"+name) {
			continue // without br_netfilter there is no such setting
		}
		if got := inside.ReadSysctl(t, name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	bridge := inside.Sysfs(t) + "/class/net/" + s.Bridge
	if got := read(t, bridge+"/bridge/multicast_snooping"); got != "0" {
		t.Errorf("multicast snooping is %s, want 0", got)
	}
	if got := read(t, bridge+"/bridge/stp_state"); got != "0" {
		t.Errorf("STP is %s, want 0", got)
	}
	for _, port := range []string{segment.PortName("pod"), segment.PortName("vm"), s.VXLAN.Name, pod.HostInterface} {
		if got := read(t, bridge+"/brif/"+port+"/group_fwd_mask"); got != "0xfffd" {
			t.Errorf("group_fwd_mask of %s is %s, want 0xfffd", port, got)
		}
	}
}
