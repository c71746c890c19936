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
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// bridges is what the bridges of a node's LANs tell.
type bridges struct {
	mu    sync.Mutex
	there map[string][][6]byte
	tell  kernel.FDBEvents
	ready chan struct{}
	shows chan *kernel.Bindings // of each LAN, when it is heard from then on; nil when it is no more
}

func (b *bridges) WatchFDB(ctx context.Context, tell kernel.FDBEvents) error {
	tell.Overflow()
	b.tell = tell
	close(b.ready)
	<-ctx.Done()
	return nil
}

func (b *bridges) LocalMACs(netns string) ([][6]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.there[netns], nil
}

func (b *bridges) WatchBindings(ctx context.Context, netns string, tell kernel.Bindings) error {
	b.shows <- &tell
	<-ctx.Done()
	b.shows <- nil
	return nil
}

// member is a node of a fabric with LANs.
type member struct {
	*evpn.Instance
	*bridges
	vtep netip.Addr
}

// reflector runs one at a port of the address.
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

// fabricOf runs a reflector and nodes that speak with it.
func fabricOf(t *testing.T, nodes int) []member {
	t.Helper()
	at := reflector(t, "127.0.0.1")
	var members []member
	for i := range byte(nodes) {
		members = append(members, newMember(t, i, bgp.Peer{Address: at.Addr(), Port: at.Port(), AS: 65000}))
	}
	return members
}

// newMember runs a node that speaks with the peers; its number is in its addresses.
func newMember(t *testing.T, number byte, peers ...bgp.Peer) member {
	t.Helper()
	m := member{bridges: &bridges{there: map[string][][6]byte{}, ready: make(chan struct{}), shows: make(chan *kernel.Bindings, 10)}, vtep: netip.AddrFrom4([4]byte{192, 0, 2, 2 + number})}
	source := netip.AddrFrom4([4]byte{127, 0, 0, 2 + number})
	for i := range peers {
		peers[i].Source = source
	}
	m.Instance = evpn.New(evpn.Config{AS: 65000, RouterID: source, Kernel: m.bridges, Log: slog.New(slog.DiscardHandler), Peers: peers})
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

// has says that the node has the LAN, that somebody is attached or not, and which MACs pods have.
func (m member) has(claimed bool, pods ...macvrf.MAC) {
	m.Set(map[string]macvrf.LAN{"lab": {VNI: 222, VTEP: m.vtep, Claimed: claimed, Attached: pods}})
}

// await waits until the LAN's segment is to be so.
func (m member) await(t *testing.T, what string, so func(segment.Segment) bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		s := segment.Segment{Netns: "lab", VXLAN: segment.VXLAN{VNI: 222}}
		m.Fill(&s)
		if so(s) {
			return
		}
		select {
		case <-m.Changed():
		case <-deadline:
			t.Fatalf("waited for %s in vain; is to be %+v, sessions %+v", what, s, m.Sessions())
		}
	}
}

func behind(mac [6]byte, vtep netip.Addr) func(segment.Segment) bool {
	return func(s segment.Segment) bool {
		return slices.ContainsFunc(s.FDB, func(e segment.FDBEntry) bool { return e.MAC == mac && e.VTEP == vtep })
	}
}

// What is attached to one node is known to the other, a pod at once, a VM when it speaks; and each is known where it moves to.
func TestNodesTellEachOtherWhoIsWhere(t *testing.T) {
	pod, vm, late := [6]byte{2, 1}, [6]byte{2, 2}, [6]byte{2, 3}
	nodes := fabricOf(t, 2)
	a, b := nodes[0], nodes[1]
	a.there["lab"] = [][6]byte{late} // spoke before the daemon started
	b.has(false)
	a.has(true, pod)
	b.await(t, "the pod and who had spoken", func(s segment.Segment) bool {
		return slices.Equal(s.Remotes, []netip.Addr{a.vtep}) && behind(pod, a.vtep)(s) && behind(late, a.vtep)(s) && len(s.FDB) == 2
	})
	if c, ok := b.Count("lab"); !ok || c != (macvrf.Count{Used: 3, Remote: 2}) {
		t.Errorf("of the LAN there is %+v, %t", c, ok)
	}
	if _, ok := b.Count("other"); ok {
		t.Error("there is a count of a LAN that is not here")
	}
	a.await(t, "nobody: the other node has no pod", func(s segment.Segment) bool { return len(s.Remotes) == 0 && s.Remotes != nil })
	began := time.Now()
	a.tell.Learned("lab", vm)
	b.await(t, "the VM", behind(vm, a.vtep))
	t.Logf("from its first frame's event to the other node's wish: %v", time.Since(began))
	b.has(true)
	b.tell.Learned("lab", vm)
	a.await(t, "the VM elsewhere", behind(vm, b.vtep))
	a.tell.Removed("lab", vm)
	b.await(t, "the VM here", func(s segment.Segment) bool { return len(s.FDB) == 2 })
	a.tell.Removed("lab", late)
	b.await(t, "one gone", func(s segment.Segment) bool { return len(s.FDB) == 1 })
	a.has(false)
	b.await(t, "all gone", func(s segment.Segment) bool { return len(s.FDB) == 0 && len(s.Remotes) == 0 })
}

// Addresses are heard in a LAN while somebody is attached there, and told.
func TestAddressesAreHeardWhereSomebodyIsAttached(t *testing.T) {
	nodes := fabricOf(t, 1)
	a := nodes[0]
	pod := macvrf.MAC{2, 1}
	a.has(false)
	a.has(true, pod)
	tell := <-a.shows
	for range 2 {
		tell.Bound(pod, netip.MustParseAddr("10.0.0.1"))
	}
	if c, _ := a.Count("lab"); c.Advertised != 3 {
		t.Errorf("%+v, want a route with the address beside two others", c)
	}
	a.has(false)
	if <-a.shows != nil {
		t.Error("the LAN is heard a second time")
	}
}

// A LAN that was made anew between two looks has other stations, though neither its VNI nor who is attached has changed.
func TestALANMadeAnewIsAskedWhoIsThere(t *testing.T) {
	gone, vm := [6]byte{2, 2}, [6]byte{2, 3}
	nodes := fabricOf(t, 2)
	a, b := nodes[0], nodes[1]
	a.there["lab"] = [][6]byte{gone}
	b.has(false)
	a.has(true)
	b.await(t, "who is there at first", behind(gone, a.vtep))
	tell := <-a.shows
	a.mu.Lock()
	a.there["lab"] = [][6]byte{vm}
	a.mu.Unlock()
	tell.Recreated()
	b.await(t, "who is there now, alone", func(s segment.Segment) bool { return behind(vm, a.vtep)(s) && len(s.FDB) == 1 })
}

// A LAN that leaves EVPN with its pods, for another discovery, is told of for a while; one whose pods have gone first is not.
func TestALANThatLeavesEVPNIsToldOfForAWhile(t *testing.T) {
	pod := [6]byte{2, 1}
	nodes := fabricOf(t, 2)
	a, b := nodes[0], nodes[1]
	b.has(false)
	a.has(true, pod)
	b.await(t, "the pod", behind(pod, a.vtep))
	a.Set(nil)
	left := time.Now()
	b.await(t, "nobody", func(s segment.Segment) bool { return len(s.FDB) == 0 && len(s.Remotes) == 0 })
	if took := time.Since(left); took < 4*time.Second {
		t.Errorf("the LAN is told of for %s after it has left", took)
	}
	a.has(true, pod)
	b.await(t, "the pod again", behind(pod, a.vtep))
	a.has(false)
	left = time.Now()
	a.Set(nil)
	b.await(t, "nobody again", func(s segment.Segment) bool { return len(s.FDB) == 0 && len(s.Remotes) == 0 })
	if took := time.Since(left); took > 4*time.Second {
		t.Errorf("a LAN without pods is told of for %s after it has left", took)
	}
}

// A reflector that moves is followed, and what it had told stays: it is told again.
func TestAReflectorThatMovesIsFollowed(t *testing.T) {
	a := newMember(t, 0)
	if !a.Problems("lab").NoPeers {
		t.Error("without peers the node is not alone")
	}
	first, second := reflector(t, "127.0.0.1"), reflector(t, "127.0.0.9")
	b := newMember(t, 1, bgp.Peer{Address: first.Addr(), Port: first.Port(), AS: 65000}, bgp.Peer{Address: second.Addr(), Port: second.Port(), AS: 65000})
	mac, later := macvrf.MAC{2, 1}, macvrf.MAC{2, 2}
	b.has(true, mac)
	a.has(true)
	follow := func(at ...netip.AddrPort) {
		t.Helper()
		if err := a.SetReflectors(t.Context(), at); err != nil {
			t.Fatal(err)
		}
	}
	follow(first)
	a.await(t, "what the first has told", behind(mac, b.vtep))
	follow(second)
	lost := false
	b.has(true, mac, later)
	a.await(t, "what the second has told", func(s segment.Segment) bool {
		lost = lost || !behind(mac, b.vtep)(s)
		return behind(later, b.vtep)(s)
	})
	if lost {
		t.Error("what the first had told was lost on the way")
	}
	if sessions := a.Sessions(); len(sessions) != 1 || sessions[0].Peer.Address != second.Addr() || a.Problems("lab").NoPeers {
		t.Errorf("sessions %+v", sessions)
	}
}

// While nobody has told everything yet, nothing that stands is to go.
func TestWhatIsHeardIsPartialAtFirst(t *testing.T) {
	a := fabricOf(t, 1)[0]
	s := segment.Segment{Netns: "lab", VXLAN: segment.VXLAN{VNI: 222}}
	if a.Fill(&s); s.Remotes != nil || s.FDB != nil {
		t.Errorf("of a LAN that is not here %+v is known", s)
	}
	a.has(true)
	a.await(t, "a partial list", func(s segment.Segment) bool { return s.Partial && s.FDB != nil })
	a.await(t, "a whole one", func(s segment.Segment) bool { return !s.Partial && s.FDB != nil })
}

// A MAC on two nodes, a route that cannot be used and sessions that are all down are told.
func TestWhatIsWrongIsTold(t *testing.T) {
	nodes := fabricOf(t, 2)
	a, b := nodes[0], nodes[1]
	a.has(true)
	b.has(true)
	mac := [6]byte{2, 9}
	a.await(t, "the other node", func(s segment.Segment) bool { return len(s.Remotes) == 1 })
	b.await(t, "the other node", func(s segment.Segment) bool { return len(s.Remotes) == 1 })
	for range 20 {
		a.tell.Learned("lab", mac)
		b.tell.Learned("lab", mac)
	}
	deadline := time.After(time.Minute)
	for len(a.Problems("lab").Duplicates) == 0 && len(b.Problems("lab").Duplicates) == 0 {
		select {
		case <-a.Changed():
			a.tell.Learned("lab", mac)
		case <-b.Changed():
			b.tell.Learned("lab", mac)
		case <-deadline:
			t.Fatal("a MAC that speaks on both is not told")
		}
	}
	b.Set(map[string]macvrf.LAN{"lab": {VNI: 222, VTEP: a.vtep, Claimed: true}}) // it has our address
	a.await(t, "nobody", func(segment.Segment) bool {
		trouble := a.Problems("lab")
		return trouble.Refusals > 0 && trouble.Refused.Reason == macvrf.OwnVTEP
	})
	if trouble := a.Problems("lab"); len(trouble.Down) > 0 {
		t.Errorf("sessions %v", trouble.Down)
	}
}

func TestAWishThatIsTheSameWakesNobody(t *testing.T) {
	m := member{Instance: evpn.New(evpn.Config{
		AS: 65000, RouterID: netip.MustParseAddr("192.0.2.1"), Kernel: &bridges{}, Log: slog.New(slog.DiscardHandler),
	}), vtep: netip.MustParseAddr("192.0.2.1")}
	woken := func() bool {
		select {
		case <-m.Changed():
			return true
		default:
			return false
		}
	}
	m.has(true, macvrf.MAC{2})
	if !woken() {
		t.Error("a new LAN wakes nobody")
	}
	m.has(true, macvrf.MAC{2})
	if woken() {
		t.Error("the same LAN wakes somebody")
	}
}
