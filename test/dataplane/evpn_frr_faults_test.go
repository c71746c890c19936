package dataplane

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
)

// awaitDown waits until the daemon reports the session with the peer as down, for a reason with these words.
func (sp *speaker) awaitDown(t *testing.T, peer bgp.Peer, words ...string) {
	t.Helper()
	last := ""
	defer func() {
		if t.Failed() {
			t.Logf("the reason is: %s", last)
		}
	}()
	eventually(t, fmt.Sprintf("%q of the session with %s", words, peer), func() bool {
		for _, s := range sp.instance.Sessions() {
			if s.Peer.Address == peer.Address && !s.Up {
				last = s.Why
				return hasAll(s.Why, words...)
			}
		}
		return false
	})
	t.Logf("the session with %s is down: %s", peer, last)
}

func (sp *speaker) awaitUp(t *testing.T, peer bgp.Peer) {
	t.Helper()
	eventually(t, "the session with "+peer.String(), func() bool {
		for _, s := range sp.instance.Sessions() {
			if s.Peer.Address == peer.Address && s.Up {
				return true
			}
		}
		return false
	})
}

// FRR is in another AS, behind a router, and requires a password. It is a VTEP of the LAN, and the nodes, which are in
// one AS, get each other's routes from it.
func TestFRRInAnotherAS(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 436)
	a.reconcile(t, withEVPN(onA))
	b.reconcile(t, withEVPN(onB))
	router := startFRRWith(t, a, frrConfig{
		as: 65001, peerAS: 65000, role: asVTEP, behindRouter: true, nodes: ` neighbor nodes password secret
 neighbor nodes ebgp-multihop 2
 no bgp ebgp-requires-policy
`,
	})
	defer router.logState(t)
	there := router.attach(t, onA)
	peer := func(n byte) bgp.Peer {
		p := router.peer(n)
		p.Password, p.Multihop, p.HoldTime = "secret", 2, 30*time.Second
		return p
	}
	near := peer(1)
	near.Multihop = 0
	first, second := a.startSpeakerTo(t, onA, 1, near), b.startSpeakerTo(t, onB, 2, peer(2))
	first.awaitDown(t, near, "no TCP connection")
	must(t, first.instance.SetPeers(t.Context(), []bgp.Peer{peer(1)}, ""))
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	first.awaitUp(t, peer(1))
	second.awaitUp(t, peer(2))
	router.awaitOutput(t, fmt.Sprintf("show bgp neighbors %s json", peer(1).Source),
		`"bgpTimerConfiguredHoldTimeMsecs":9000`)
	must(t, there.Send(frames.Stream(nil, there.MAC, 1, 1)))
	has := func(sp *speaker, vtep netip.Addr, mac net.HardwareAddr) {
		t.Helper()
		sp.awaitState(t, sp.s, fmt.Sprintf("%s behind %s", mac, vtep), func(have segment.State) bool {
			l, _ := have.Link(sp.s.VXLAN.Name)
			for _, e := range l.VXLAN.FDB {
				if e.MAC == [6]byte(mac) && e.VTEP == vtep {
					return true
				}
			}
			return false
		})
	}
	has(first, router.vtep, there.MAC)
	has(second, router.vtep, there.MAC)
	router.awaitOutput(t, "show bgp l2vpn evpn route",
		"[3]:[0]:[32]:["+onA.VXLAN.Local.String()+"]", "[2]:[0]:[48]:["+one.MAC.String()+"]",
		"RT:65000:436 ET:8", "RT:65001:436")
	has(first, onB.VXLAN.Local, two.MAC)
	has(second, onA.VXLAN.Local, one.MAC)
	for i, s := range []*host{one, two} {
		reachesInTime(t, s, there, frames.Stream(there.MAC, s.MAC, 2, uint64(i)))
		reachesInTime(t, there, s, frames.Stream(s.MAC, there.MAC, 3, uint64(i)))
	}
	reachesInTime(t, one, two, frames.Stream(two.MAC, one.MAC, 4, 1))
	for _, sp := range []*speaker{first, second} {
		if trouble := sp.instance.Problems(sp.s.Netns); trouble.Refusals > 0 {
			t.Errorf("%d routes are refused: %v", trouble.Refusals, trouble.Refused)
		}
	}
}

// FRR and the node have different ASes or passwords: the session's state reports that, and traffic by the routes of
// another peer loses no frame. With the same ones there is a session.
func TestSessionNeedsTheSameASAndPassword(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 437)
	a.reconcile(t, withEVPN(onA))
	b.reconcile(t, withEVPN(onB))
	router := startFRRWith(t, a, frrConfig{
		as: 65000, peerAS: 65000, role: asVTEP, nodes: " neighbor nodes password secret\n",
	})
	reflector := startReflector(t, netip.AddrPort{})
	defer router.logState(t)
	peer, own := router.peer(1), reflectorPeer(1, reflector.at)
	first, second := a.startSpeakerTo(t, onA, 1, peer, own), b.startSpeaker(t, onB, 2, reflector.at)
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	first.awaitRemote(t, onB.VXLAN.Local, two.MAC)
	second.awaitRemote(t, onA.VXLAN.Local, one.MAC)
	there, back := startStream(t, 1, one, two), startStream(t, 2, two, one)
	first.awaitDown(t, peer, "a password that is missing")
	for _, wrong := range []struct {
		password string
		as       uint32
		words    []string
	}{
		{"wrong", 65000, []string{"a wrong password"}},
		{"secret", 65001, []string{"AS 65001", "AS 65000"}},
	} {
		peer.Password, peer.AS = wrong.password, wrong.as
		must(t, first.instance.SetPeers(t.Context(), []bgp.Peer{peer, own}, ""))
		first.awaitDown(t, peer, wrong.words...)
	}
	peer.AS = 65000
	must(t, first.instance.SetPeers(t.Context(), []bgp.Peer{peer, own}, ""))
	first.awaitUp(t, peer)
	router.vtysh(t, "configure", "router bgp 65000", "neighbor nodes remote-as 65009") // this closes the session
	first.awaitDown(t, peer)
	router.vtysh(t, "configure", "router bgp 65000", "neighbor nodes remote-as 65000")
	first.awaitUp(t, peer)
	// Each side gets another password, the node first: it counts once FRR has it, too.
	peer.Password = "second"
	must(t, first.instance.SetPeers(t.Context(), []bgp.Peer{peer, own}, ""))
	router.vtysh(t, "configure", "router bgp 65000", "neighbor nodes password second")
	first.awaitDown(t, peer)
	first.awaitUp(t, peer)
	there.expectAll(t)
	back.expectAll(t)
	if trouble := first.instance.Problems(onA.Netns); len(trouble.Down) > 0 || trouble.Refusals > 0 {
		t.Errorf("the LAN has %+v", trouble)
	}
}

// FRR advertises a LAN's routes with another VNI: they are not imported, the LAN reports that, and neither its other
// members nor another LAN lose a frame.
func TestRoutesWithAnotherVNIAreRefused(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 438)
	a.reconcile(t, withEVPN(onA))
	b.reconcile(t, withEVPN(onB))
	router := startFRRWith(t, a, frrConfig{
		as: 65000, peerAS: 65000, role: asVTEP + "  vni 439\n   route-target export 65000:438\n  exit-vni\n",
	})
	reflector := startReflector(t, netip.AddrPort{})
	defer router.logState(t)
	first := a.startSpeakerTo(t, onA, 1, router.peer(1), reflectorPeer(1, reflector.at))
	second := b.startSpeaker(t, onB, 2, reflector.at)
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	first.awaitRemote(t, onB.VXLAN.Local, two.MAC)
	second.awaitRemote(t, onA.VXLAN.Local, one.MAC)
	there, back := startStream(t, 1, one, two), startStream(t, 2, two, one)
	other := onA
	other.VXLAN.VNI = 439
	foreign := router.attach(t, other)
	eventually(t, "the LAN to report that", func() bool {
		trouble := first.instance.Problems(onA.Netns)
		return trouble.Refusals > 0 && trouble.Refused.Reason == macvrf.OtherVNI &&
			trouble.Refused.Route.VTEP == router.vtep
	})
	must(t, foreign.Send(frames.Stream(nil, foreign.MAC, 3, 1)))
	eventually(t, "the LAN to refuse the MAC, too", func() bool {
		return first.instance.Problems(onA.Netns).Refusals == 2
	})
	t.Logf("the LAN reports: %s", first.instance.Problems(onA.Netns).Refused)
	there.expectAll(t)
	back.expectAll(t)
	first.awaitRemote(t, onB.VXLAN.Local, two.MAC) // and no other remote
}

// Hosts behind FRR and on a node send with one MAC: both report it as a duplicate, and other hosts lose no frame.
func TestDuplicateMACIsReported(t *testing.T) {
	t.Parallel()
	a, _, s, _ := unicastHosts(t, families["IPv4"], 440)
	a.reconcile(t, withEVPN(s))
	router := startFRR(t, a, asVTEP)
	defer router.logState(t)
	there := router.attach(t, s)
	node := a.startSpeakerTo(t, s, 1, router.peer(1))
	here, vm := a.attach(t, s, "one", segment.Veth), a.attach(t, s, "two", segment.Macvtap)
	must(t, there.Send(frames.Stream(nil, there.MAC, 1, 1)))
	node.awaitRemote(t, router.vtep, there.MAC)
	router.awaitOutput(t, fmt.Sprintf("show evpn mac vni 440 mac %s", here.MAC),
		"Remote VTEP: "+s.VXLAN.Local.String())
	out, in := startStream(t, 2, here, there), startStream(t, 3, there, here)
	mac := net.HardwareAddr{2, 0xbb, 0, 0, 7, 1}
	said := func() bool { return len(node.instance.Problems(s.Netns).Duplicates) == 1 }
	atFRR := func() string { return router.show(t, "show evpn mac vni 440 mac "+mac.String()) }
	eventually(t, "the node to report a duplicate", func() bool {
		must(t, vm.Send(frames.Stream(mac, mac, 4, 1)))
		must(t, there.Send(frames.Stream(mac, mac, 4, 2)))
		return said() && strings.Contains(atFRR(), "Duplicate")
	})
	t.Logf("%s is on two nodes; FRR shows\n%s", node.instance.Problems(s.Netns).Duplicates, atFRR())
	out.expectAll(t)
	in.expectAll(t)
}
