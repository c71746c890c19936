package evpn_test

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// bridges fakes the bridges of a node's LANs.
type bridges struct {
	mu      sync.Mutex
	macs    map[string][][6]byte // by netns
	events  watch.FDBEvents
	ready   chan struct{}
	watches chan *watch.BindingEvents // receives the events of each watch that begins, and nil when it ends
}

func (b *bridges) WatchFDB(ctx context.Context, events watch.FDBEvents) error {
	events.Overflow()
	b.events = events
	close(b.ready)
	<-ctx.Done()
	return nil
}

func (b *bridges) LocalMACs(netns string) ([][6]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.macs[netns], nil
}

func (b *bridges) WatchBindings(ctx context.Context, netns string, events watch.BindingEvents) error {
	b.watches <- &events
	<-ctx.Done()
	b.watches <- nil
	return nil
}

// member is a node that takes part in EVPN.
type member struct {
	*evpn.Instance
	*bridges
	vtep netip.Addr
}

// reflector runs a reflector at a free port of the address.
func reflector(t *testing.T, address string) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", address+":0")
	if err != nil {
		t.Fatal(err)
	}
	at := l.Addr().(*net.TCPAddr).AddrPort()
	l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() {
		ended <- bgp.Reflector{AS: 65000, RouterID: at.Addr(), Listen: at, Log: slog.New(slog.DiscardHandler)}.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return at
}

// newMembers runs a reflector and nodes with sessions to it.
func newMembers(t *testing.T, nodes int) []member {
	t.Helper()
	at := reflector(t, "127.0.0.1")
	var members []member
	for i := range byte(nodes) {
		members = append(members, newMember(t, i, bgp.Peer{Address: at.Addr(), Port: at.Port(), AS: 65000}))
	}
	return members
}

// newMember runs a node with sessions to the peers. Its addresses contain its number.
func newMember(t *testing.T, number byte, peers ...bgp.Peer) member {
	t.Helper()
	b := &bridges{
		macs: map[string][][6]byte{}, ready: make(chan struct{}), watches: make(chan *watch.BindingEvents, 10),
	}
	m := member{bridges: b, vtep: netip.AddrFrom4([4]byte{192, 0, 2, 2 + number})}
	source := netip.AddrFrom4([4]byte{127, 0, 0, 2 + number})
	for i := range peers {
		peers[i].Source = source
	}
	m.Instance = evpn.New(evpn.Config{
		AS: 65000, RouterID: source, Kernel: b, Log: slog.New(slog.DiscardHandler), Peers: peers,
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	<-m.ready
	return m
}

// setLAN gives the node the LAN, with a claim or without, and with pods that have these MACs.
func (m member) setLAN(claimed bool, pods ...macvrf.MAC) {
	m.Set(map[string]macvrf.LAN{"lab": {VNI: 222, VTEP: m.vtep, Claimed: claimed, Attached: pods}})
}

// await waits until the condition is true of the LAN's desired segment.
func (m member) await(t *testing.T, what string, condition func(segment.Segment) bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		s := segment.Segment{Netns: "lab", VXLAN: segment.VXLAN{VNI: 222}}
		m.Fill(&s)
		if condition(s) {
			return
		}
		select {
		case <-m.Changed():
		case <-deadline:
			t.Fatalf("waited in vain for %s; have %+v, sessions %+v", what, s, m.Sessions())
		}
	}
}

func behind(mac [6]byte, vtep netip.Addr) func(segment.Segment) bool {
	return func(s segment.Segment) bool {
		return slices.ContainsFunc(s.FDB, func(e segment.FDBEntry) bool { return e.MAC == mac && e.VTEP == vtep })
	}
}

// A pod is advertised when it is attached, a VM when the bridge learns its MAC; both are advertised where they move to.
func TestMACsAreAdvertisedToOtherNodes(t *testing.T) {
	pod, vm, late := [6]byte{2, 1}, [6]byte{2, 2}, [6]byte{2, 3}
	nodes := newMembers(t, 2)
	a, b := nodes[0], nodes[1]
	a.macs["lab"] = [][6]byte{late} // learned before the daemon started
	b.setLAN(false)
	a.setLAN(true, pod)
	b.await(t, "the pod and the MAC that was learned before", func(s segment.Segment) bool {
		return slices.Equal(s.Remotes, []netip.Addr{a.vtep}) &&
			behind(pod, a.vtep)(s) && behind(late, a.vtep)(s) && len(s.FDB) == 2
	})
	if c, ok := b.Count("lab"); !ok || c != (macvrf.Count{Used: 3, Remote: 2}) {
		t.Errorf("the count is %+v, %t", c, ok)
	}
	if _, ok := b.Count("other"); ok {
		t.Error("there is a count of a LAN that the node takes no part in")
	}
	a.await(t, "no remotes, because the other node has no claim", func(s segment.Segment) bool {
		return len(s.Remotes) == 0 && s.Remotes != nil
	})
	began := time.Now()
	a.events.Learned("lab", vm)
	b.await(t, "the VM", behind(vm, a.vtep))
	t.Logf("from the event of its first frame to the other node's Fill: %v", time.Since(began))
	b.setLAN(true)
	b.events.Learned("lab", vm)
	a.await(t, "the VM on the other node", behind(vm, b.vtep))
	a.events.Removed("lab", vm)
	b.await(t, "the VM on this node only", func(s segment.Segment) bool { return len(s.FDB) == 2 })
	a.events.Removed("lab", late)
	b.await(t, "one MAC removed", func(s segment.Segment) bool { return len(s.FDB) == 1 })
	a.setLAN(false)
	b.await(t, "all removed", func(s segment.Segment) bool { return len(s.FDB) == 0 && len(s.Remotes) == 0 })
}

// Addresses are advertised, too.
func TestBindingsAreWatchedWhileALANHasClaims(t *testing.T) {
	nodes := newMembers(t, 1)
	a := nodes[0]
	pod := macvrf.MAC{2, 1}
	a.setLAN(false)
	a.setLAN(true, pod)
	events := <-a.watches
	for range 2 {
		events.Bound(pod, netip.MustParseAddr("10.0.0.1"))
	}
	if c, _ := a.Count("lab"); c.Advertised != 3 {
		t.Errorf("%+v, want a route with the address beside two others", c)
	}
	a.setLAN(false)
	if <-a.watches != nil {
		t.Error("the LAN is watched a second time")
	}
}

// A LAN that was recreated between two observations has other MACs, although its VNI and claims are the same.
func TestRecreatedLANIsListedAgain(t *testing.T) {
	old, vm := [6]byte{2, 2}, [6]byte{2, 3}
	nodes := newMembers(t, 2)
	a, b := nodes[0], nodes[1]
	a.macs["lab"] = [][6]byte{old}
	b.setLAN(false)
	a.setLAN(true)
	b.await(t, "the old MAC", behind(old, a.vtep))
	events := <-a.watches
	a.mu.Lock()
	a.macs["lab"] = [][6]byte{vm}
	a.mu.Unlock()
	events.Recreated()
	b.await(t, "only the new MAC", func(s segment.Segment) bool { return behind(vm, a.vtep)(s) && len(s.FDB) == 1 })
}

// The routes of a LAN that leaves EVPN with claims linger; those of a LAN without claims do not.
func TestRoutesOfALANLingerWhenItLeavesEVPN(t *testing.T) {
	pod := [6]byte{2, 1}
	nodes := newMembers(t, 2)
	a, b := nodes[0], nodes[1]
	b.setLAN(false)
	a.setLAN(true, pod)
	b.await(t, "the pod", behind(pod, a.vtep))
	a.Set(nil)
	left := time.Now()
	b.await(t, "no routes", func(s segment.Segment) bool { return len(s.FDB) == 0 && len(s.Remotes) == 0 })
	if took := time.Since(left); took < 4*time.Second {
		t.Errorf("the routes lingered for %s", took)
	}
	a.setLAN(true, pod)
	b.await(t, "the pod again", behind(pod, a.vtep))
	a.setLAN(false)
	left = time.Now()
	a.Set(nil)
	b.await(t, "no routes again", func(s segment.Segment) bool { return len(s.FDB) == 0 && len(s.Remotes) == 0 })
	if took := time.Since(left); took > 4*time.Second {
		t.Errorf("the routes of a LAN without claims lingered for %s", took)
	}
}

// The routes from a reflector that moves stay, because it sends them again.
func TestRoutesSurviveAMovedReflector(t *testing.T) {
	a := newMember(t, 0)
	if !a.Problems("lab").NoPeers {
		t.Error("without peers NoPeers is false")
	}
	first, second := reflector(t, "127.0.0.1"), reflector(t, "127.0.0.9")
	b := newMember(t, 1, bgp.Peer{Address: first.Addr(), Port: first.Port(), AS: 65000},
		bgp.Peer{Address: second.Addr(), Port: second.Port(), AS: 65000})
	mac, later := macvrf.MAC{2, 1}, macvrf.MAC{2, 2}
	b.setLAN(true, mac)
	a.setLAN(true)
	setReflectors := func(at ...netip.AddrPort) {
		t.Helper()
		if err := a.SetReflectors(t.Context(), at); err != nil {
			t.Fatal(err)
		}
	}
	setReflectors(first)
	a.await(t, "routes from the first", behind(mac, b.vtep))
	setReflectors(second)
	lost := false
	b.setLAN(true, mac, later)
	a.await(t, "routes from the second", func(s segment.Segment) bool {
		lost = lost || !behind(mac, b.vtep)(s)
		return behind(later, b.vtep)(s)
	})
	if lost {
		t.Error("a route from the first was lost meanwhile")
	}
	sessions := a.Sessions()
	if len(sessions) != 1 || sessions[0].Peer.Address != second.Addr() || a.Problems("lab").NoPeers {
		t.Errorf("sessions %+v", sessions)
	}
}

// While peers have not sent all routes, the kernel's other entries must stay.
func TestSegmentIsPartialUntilPeersHaveSentAll(t *testing.T) {
	a := newMembers(t, 1)[0]
	s := segment.Segment{Netns: "lab", VXLAN: segment.VXLAN{VNI: 222}}
	if a.Fill(&s); s.Remotes != nil || s.FDB != nil {
		t.Errorf("Fill changes a LAN that the node takes no part in: %+v", s)
	}
	a.setLAN(true)
	a.await(t, "a partial list", func(s segment.Segment) bool { return s.Partial && s.FDB != nil })
	a.await(t, "a complete one", func(s segment.Segment) bool { return !s.Partial && s.FDB != nil })
}

func TestProblemsNameDuplicatesAndRefusedRoutes(t *testing.T) {
	nodes := newMembers(t, 2)
	a, b := nodes[0], nodes[1]
	a.setLAN(true)
	b.setLAN(true)
	mac := [6]byte{2, 9}
	a.await(t, "the other node", func(s segment.Segment) bool { return len(s.Remotes) == 1 })
	b.await(t, "the other node", func(s segment.Segment) bool { return len(s.Remotes) == 1 })
	for range 20 {
		a.events.Learned("lab", mac)
		b.events.Learned("lab", mac)
	}
	deadline := time.After(time.Minute)
	for len(a.Problems("lab").Duplicates) == 0 && len(b.Problems("lab").Duplicates) == 0 {
		select {
		case <-a.Changed():
			a.events.Learned("lab", mac)
		case <-b.Changed():
			b.events.Learned("lab", mac)
		case <-deadline:
			t.Fatal("a MAC that both nodes learn is no duplicate")
		}
	}
	b.Set(map[string]macvrf.LAN{"lab": {VNI: 222, VTEP: a.vtep, Claimed: true}}) // the VTEP of a
	a.await(t, "a refused route", func(segment.Segment) bool {
		problems := a.Problems("lab")
		return problems.Refusals > 0 && problems.Refused.Reason == macvrf.OwnVTEP
	})
	if problems := a.Problems("lab"); len(problems.Down) > 0 {
		t.Errorf("sessions %v", problems.Down)
	}
}

func TestSettingTheSameLANsChangesNothing(t *testing.T) {
	m := member{Instance: evpn.New(evpn.Config{
		AS: 65000, RouterID: netip.MustParseAddr("192.0.2.1"), Kernel: &bridges{}, Log: slog.New(slog.DiscardHandler),
	}), vtep: netip.MustParseAddr("192.0.2.1")}
	changed := func() bool {
		select {
		case <-m.Changed():
			return true
		default:
			return false
		}
	}
	m.setLAN(true, macvrf.MAC{2})
	if !changed() {
		t.Error("a new LAN changes nothing")
	}
	m.setLAN(true, macvrf.MAC{2})
	if changed() {
		t.Error("the same LAN is a change")
	}
}
