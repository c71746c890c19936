package dataplane

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// reachesInTime sends a frame again and again until it arrives at the other end: a router's routes take some time.
func reachesInTime(t *testing.T, from, to netlab.Wire, frame []byte) {
	t.Helper()
	for deadline := time.Now().Add(daemonTimeout); ; {
		must(t, from.Send(frame))
		_, err := netlab.Await(to, frameTimeout/10, func(got []byte) bool { return bytes.Equal(got, frame) })
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("frame of %d bytes: %v", len(frame), err)
		}
	}
}

// awaitMove waits for the bridge's entry that has a MAC behind the VXLAN. The VXLAN's own entry says less: it may stay
// while the MAC is on a port of the bridge.
func awaitMove(
	t *testing.T, ns netlab.Namespace, vxlan string, updates <-chan netlink.NeighUpdate, mac net.HardwareAddr,
) time.Time {
	t.Helper()
	link, err := ns.Netlink(t).LinkByName(vxlan)
	must(t, err)
	return awaitUpdate(t, updates, fmt.Sprintf("%s to be behind %s", mac, vxlan), func(u netlink.NeighUpdate) bool {
		return u.Type == unix.RTM_NEWNEIGH && u.LinkIndex == link.Attrs().Index && u.Flags&netlink.NTF_SELF == 0 &&
			bytes.Equal(u.HardwareAddr, mac)
	})
}

// awaitRemote waits until the node has that VTEP as its only remote, and these MACs behind it.
func (sp *speaker) awaitRemote(t *testing.T, vtep netip.Addr, macs ...net.HardwareAddr) {
	t.Helper()
	sp.awaitState(t, sp.s, fmt.Sprintf("%s with %s", vtep, macs), func(have segment.State) bool {
		l, _ := have.Link(sp.s.VXLAN.Name)
		for _, mac := range macs {
			entry := segment.FDBEntry{MAC: [6]byte(mac), VTEP: vtep}
			if !slices.ContainsFunc(l.VXLAN.FDB, func(e segment.FDBState) bool { return e.FDBEntry == entry }) {
				return false
			}
		}
		return slices.Equal(l.VXLAN.Remotes, []netip.Addr{vtep})
	})
}

// FRR is a VTEP of the LAN: frames pass both ways, a MAC moves there and back, and each side can restart.
func TestFRRIsAVTEP(t *testing.T) {
	t.Parallel()
	a, _, s, _ := unicastHosts(t, families["IPv4"], 431)
	a.reconcile(t, withEVPN(s))
	router := startFRR(t, a, asVTEP)
	defer router.logState(t)
	there := router.attach(t, s)
	node := a.startSpeakerTo(t, s, 1, router.peer(1))
	here, vm := a.attach(t, s, "one", segment.Veth), a.attach(t, s, "two", segment.Macvtap)
	must(t, there.Send(frames.Stream(nil, there.MAC, 1, 1)))
	node.awaitRemote(t, router.vtep, there.MAC)
	self := s.VXLAN.Local.String()
	router.awaitOutput(t, "show bgp l2vpn evpn route",
		"[3]:[0]:[32]:["+self+"]", "[2]:[0]:[48]:["+here.MAC.String()+"]", "RT:65000:431 ET:8")
	router.awaitOutput(t, fmt.Sprintf("show evpn mac vni 431 mac %s", here.MAC), "Remote VTEP: "+self)
	reachesInTime(t, here, there, frames.Stream(there.MAC, here.MAC, 2, 1))
	reachesInTime(t, there, here, frames.Stream(here.MAC, there.MAC, 2, 2))
	reachesInTime(t, there, here, frames.Stream(nil, there.MAC, 2, 3))

	mac := net.HardwareAddr{2, 0xbb, 0, 0, 4, 1}
	atNode, atFRR := a.tables(t, s), tables(t, router.Namespace)
	for i := range uint64(2) { // after five moves FRR treats a MAC as a duplicate
		began := time.Now()
		must(t, vm.Send(frames.Stream(nil, mac, 3, 2*i)))
		toFRR := awaitMove(t, router.Namespace, "vx", atFRR, mac).Sub(began)
		reachesInTime(t, there, vm, frames.Stream(mac, there.MAC, 4, 2*i))
		began = time.Now()
		must(t, there.Send(frames.Stream(nil, mac, 3, 2*i+1)))
		toNode := awaitMove(t, a.lanNetns(s), s.VXLAN.Name, atNode, mac).Sub(began)
		reachesInTime(t, here, there, frames.Stream(mac, here.MAC, 4, 2*i+1))
		t.Logf("from a MAC's first frame on the node to FRR's table %v, and back %v", toFRR, toNode)
	}
	router.awaitOutput(t, "show bgp l2vpn evpn route type macip", "MM:3")

	for what, restart := range map[string]func(){
		"FRR": func() { router.bgpd.kill(); router.bgpd.start(t); router.awaitVTY(t, "bgpd") },
		"k8slan": func() {
			node.end()
			node = a.startSpeakerTo(t, s, 1, router.peer(1))
		},
	} {
		out, in := startStream(t, 5, here, there), startStream(t, 6, there, here)
		restart()
		node.awaitUp(t, router.peer(1))
		node.awaitRemote(t, router.vtep, there.MAC)
		router.awaitOutput(t, fmt.Sprintf("show evpn mac vni 431 mac %s", here.MAC), "Remote VTEP: "+self)
		reachesInTime(t, here, there, frames.Stream(there.MAC, here.MAC, 7, 1))
		reachesInTime(t, there, here, frames.Stream(here.MAC, there.MAC, 7, 2))
		t.Logf("while %s restarts, frames at %d a second are lost: to FRR %d, from FRR %d",
			what, rate, out.finish().Lost, in.finish().Lost)
	}

	must(t, a.setPodAddresses(t, here, "10.77.0.1/24", "fd77::1/64"))
	must(t, a.setPodAddresses(t, there, "10.77.0.3/24", "fd77::3/64"))
	for _, address := range []string{"10.77.0.3", "fd77::3"} {
		expectTCP(t, here, there, address)
	}
}

// A LAN has a route target and an RD of its own, as FRR has. Both change while the LAN is in use, and no frame is lost.
func TestRouteTargetsAndRDChangeWithoutLoss(t *testing.T) {
	t.Parallel()
	a, _, s, _ := unicastHosts(t, families["IPv4"], 436)
	s.Routes = segment.Routes{Import: []string{"64512:7"}, Export: []string{"4200000000:7"}, RD: 7}
	a.reconcile(t, withEVPN(s))
	router := startFRR(t, a, asVTEP+`  vni 436
   route-target import 4200000000:7
   route-target import 64512:8
   route-target export 64512:7
  exit-vni
`)
	defer router.logState(t)
	there := router.attach(t, s)
	node := a.startSpeakerTo(t, s, 1, router.peer(1))
	here := a.attach(t, s, "one", segment.Veth)
	must(t, there.Send(frames.Stream(nil, there.MAC, 1, 1)))
	node.awaitRemote(t, router.vtep, there.MAC)
	router.awaitOutput(t, "show bgp l2vpn evpn route",
		"Route Distinguisher: 127.0.0.2:7", "RT:4200000000:7 ET:8", "ET:8 RT:64512:7")
	router.awaitOutput(t, fmt.Sprintf("show evpn mac vni 436 mac %s", here.MAC), "Remote VTEP: "+s.VXLAN.Local.String())
	reachesInTime(t, here, there, frames.Stream(there.MAC, here.MAC, 2, 1))
	reachesInTime(t, there, here, frames.Stream(here.MAC, there.MAC, 2, 2))

	node.awaitSettled(t)
	out, in := startStream(t, 3, here, there), startStream(t, 4, there, here)
	for _, step := range []segment.Routes{
		{Import: []string{"64512:7"}, Export: []string{"4200000000:7", "64512:8"}, RD: 7},
		{Import: []string{"64512:7"}, Export: []string{"64512:8"}, RD: 7},
		{Import: []string{"64512:7", "65000:1"}, Export: []string{"64512:8"}, RD: 431},
	} {
		node.routes <- step
		router.awaitOutput(t, "show bgp l2vpn evpn route",
			fmt.Sprintf("Route Distinguisher: 127.0.0.2:%d", step.RD), "RT:"+step.Export[len(step.Export)-1])
	}
	eventually(t, "FRR to remove the old routes", func() bool {
		shown := router.show(t, "show bgp l2vpn evpn route")
		return !hasAll(shown, "127.0.0.2:7") && !hasAll(shown, "4200000000:7")
	})
	out.expectAll(t)
	in.expectAll(t)
}

// FRR reflects the routes of two nodes. They keep the routes while FRR restarts; FRR withdraws the routes of a node
// whose daemon restarts at once.
func TestFRRReflectsRoutes(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 432)
	a.reconcile(t, withEVPN(onA))
	b.reconcile(t, withEVPN(onB))
	router := startFRR(t, a, asReflector)
	defer router.logState(t)
	first, second := a.startSpeakerTo(t, onA, 1, router.peer(1)), b.startSpeakerTo(t, onB, 2, router.peer(2))
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	known := func() {
		t.Helper()
		first.awaitRemote(t, onB.VXLAN.Local, two.MAC)
		second.awaitRemote(t, onA.VXLAN.Local, one.MAC)
	}
	known()
	router.awaitOutput(t, "show bgp l2vpn evpn",
		"[2]:[0]:[48]:["+one.MAC.String()+"]", "[2]:[0]:[48]:["+two.MAC.String()+"]",
		"[3]:[0]:[32]:["+onA.VXLAN.Local.String()+"]", "[3]:[0]:[32]:["+onB.VXLAN.Local.String()+"]")
	vmA := a.claim(t, onA, "two", segment.Macvtap)
	vmA.openWire(t, a.lanNetns(onA))
	updates := b.tables(t, onB)
	var took []time.Duration
	for i := range byte(10) {
		mac := net.HardwareAddr{2, 0xbb, 0, 0, 5, i}
		began := time.Now()
		must(t, vmA.Send(frames.Stream(nil, mac, 9, 1)))
		took = append(took, awaitEntry(t, updates, mac, onA.VXLAN.Local).Sub(began))
	}
	logTimes(t, "from a MAC's first frame to the other node's table", took)

	there, back := startStream(t, 1, one, two), startStream(t, 2, two, one)
	restarted := time.Now()
	router.bgpd.kill()
	router.bgpd.start(t)
	first.awaitStaleRoutesRemoved(t, restarted)
	second.awaitStaleRoutesRemoved(t, restarted)
	there.expectAll(t)
	back.expectAll(t)
	second.awaitRemote(t, onA.VXLAN.Local, one.MAC)

	second.awaitSettled(t)
	there, back = startStream(t, 3, one, two), startStream(t, 4, two, one)
	began := time.Now()
	first.end()
	eventually(t, "FRR to remove the node's routes", func() bool {
		return !hasAll(router.show(t, "show bgp l2vpn evpn"), one.MAC.String())
	})
	kept := time.Since(began)
	first = a.startSpeakerTo(t, onA, 1, router.peer(1))
	first.awaitUp(t, router.peer(1))
	first.awaitRemote(t, onB.VXLAN.Local, two.MAC)
	second.awaitRemote(t, onA.VXLAN.Local, one.MAC)
	t.Logf("FRR keeps a node's routes for %v after its daemon has ended; while the daemon restarts, "+
		"frames at %d a second are lost: from its node %d, to its node %d",
		kept, rate, there.finish().Lost, back.finish().Lost)
	crosses(t, one, two, frames.Stream(two.MAC, one.MAC, 5, 1))
}

func TestGoBGPReflectsRoutesWithIPv4VTEPs(t *testing.T) {
	t.Parallel()
	expectGoBGPReflects(t, families["IPv4"])
}

func TestGoBGPReflectsRoutesWithIPv6VTEPs(t *testing.T) {
	t.Parallel()
	expectGoBGPReflects(t, families["IPv6"])
}

// expectGoBGPReflects expects gobgpd to reflect the routes of two nodes. It restarts, a daemon restarts, and no frame
// is lost.
func expectGoBGPReflects(t *testing.T, f family) {
	t.Helper()
	a, b, onA, onB := unicastHosts(t, f, 433)
	a.reconcile(t, withEVPN(onA))
	b.reconcile(t, withEVPN(onB))
	reflector, at := startGoBGP(t)
	first, second := a.startSpeaker(t, onA, 1, at), b.startSpeaker(t, onB, 2, at)
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	first.awaitRemote(t, onB.VXLAN.Local, two.MAC)
	second.awaitRemote(t, onA.VXLAN.Local, one.MAC)
	catalogCrosses(t, one, two)
	second.awaitSettled(t)
	there, back := startStream(t, 1, one, two), startStream(t, 2, two, one)
	restarted := time.Now()
	reflector.kill()
	reflector.start(t)
	first.end()
	first = a.startSpeaker(t, onA, 1, at)
	first.awaitStaleRoutesRemoved(t, restarted)
	second.awaitStaleRoutesRemoved(t, restarted)
	there.expectAll(t)
	back.expectAll(t)
	first.awaitRemote(t, onB.VXLAN.Local, two.MAC)
	second.awaitRemote(t, onA.VXLAN.Local, one.MAC)
	updates, mac := b.tables(t, onB), net.HardwareAddr{2, 0xbb, 0, 0, 6, 1} // a new MAC is advertised as well
	began := time.Now()
	must(t, one.Send(frames.Stream(nil, mac, 3, 1)))
	took := awaitEntry(t, updates, mac, onA.VXLAN.Local).Sub(began)
	t.Logf("from a MAC's first frame to the other node's table: %v", took)
}

// FRR 8.4 closes the session over a route with an IPv6 VTEP. No such route is advertised to it, the session stays up,
// and the LAN reports that; peers that accept such routes get them.
func TestRoutesWithIPv6VTEPsAreNotAdvertisedToFRR(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv6"], 435)
	a.reconcile(t, withEVPN(onA))
	b.reconcile(t, withEVPN(onB))
	router, reflector := startFRR(t, a, asReflector), startReflector(t, netip.AddrPort{})
	defer router.logState(t)
	first := a.startSpeakerTo(t, onA, 1, router.peer(1), reflectorPeer(1, reflector.at))
	second := b.startSpeaker(t, onB, 2, reflector.at)
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	first.awaitRemote(t, onB.VXLAN.Local, two.MAC)
	second.awaitRemote(t, onA.VXLAN.Local, one.MAC)
	crosses(t, one, two, frames.Stream(two.MAC, one.MAC, 1, 1))
	router.awaitOutput(t, "show bgp l2vpn evpn summary json", `"state":"Established"`)
	if shown := router.show(t, "show bgp l2vpn evpn"); !hasAll(shown, "No prefixes displayed") {
		t.Errorf("FRR has\n%s", shown)
	}
	eventually(t, "the LAN to report that", func() bool {
		withheld := first.instance.Problems(onA.Netns).Withheld
		return len(withheld) == 1 && withheld[0] == router.peer(1)
	})
	if withheld := second.instance.Problems(onB.Netns).Withheld; len(withheld) > 0 {
		t.Errorf("a node with the other reflector only withholds routes from %v", withheld)
	}
}
