package dataplane

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// mesh is nodes that import each other's routes at once: EVPN without BGP sessions.
type mesh struct {
	t     *testing.T
	mu    sync.Mutex
	nodes []*evpnNode
	done  chan struct{} // closed and made again whenever the nodes have handled an event
}

// evpnNode is a node whose LAN's FDB is written from its MAC-VRF.
type evpnNode struct {
	node
	table      *macvrf.Table
	lan        macvrf.LAN
	want       segment.Segment
	advertised map[macvrf.Key]macvrf.Route
}

// evpnHosts makes two nodes that have the LAN; the mesh handles their kernels' events until the test ends.
func evpnHosts(t *testing.T, f family, vni uint32) (*mesh, *evpnNode, *evpnNode) {
	t.Helper()
	a, b, onA, onB := unicastHosts(t, f, vni)
	fab := &mesh{t: t, done: make(chan struct{})}
	for i, h := range []node{a, b} {
		s := withEVPN([]segment.Segment{onA, onB}[i])
		n := &evpnNode{
			node: h, table: macvrf.New(65000, netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})), want: s,
			lan: macvrf.LAN{VNI: vni, VTEP: s.VXLAN.Local}, advertised: map[macvrf.Key]macvrf.Route{},
		}
		fab.nodes = append(fab.nodes, n)
		n.reconcile(t, s)
	}
	ctx, stop := context.WithCancel(context.Background())
	var watches sync.WaitGroup
	for _, n := range fab.nodes {
		watches.Go(func() {
			if err := watch.New(n.kernel).WatchFDB(ctx, fab.events(n)); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() { stop(); watches.Wait() })
	return fab, fab.nodes[0], fab.nodes[1]
}

// withEVPN returns a unicast LAN without data-plane learning and with empty tables.
func withEVPN(s segment.Segment) segment.Segment {
	s.VXLAN.NoLearning, s.Remotes, s.FDB = true, []netip.Addr{}, []segment.FDBEntry{}
	return s
}

func (f *mesh) events(n *evpnNode) watch.FDBEvents {
	return watch.FDBEvents{
		Learned: func(_ string, mac [6]byte) {
			f.handle(func(now time.Time) { n.table.LearnLocal(now, n.lan.VNI, mac) })
		},
		Removed: func(_ string, mac [6]byte) {
			f.handle(func(now time.Time) { n.table.ForgetLocal(now, n.lan.VNI, mac) })
		},
		Overflow: func() {
			macs, err := n.kernel.LocalMACs(n.want.Netns)
			if err != nil {
				f.t.Error(err)
			}
			f.handle(func(now time.Time) {
				var all []macvrf.MAC
				for _, mac := range macs {
					all = append(all, mac)
				}
				n.table.SetLocal(now, n.lan.VNI, all)
			})
		},
	}
}

// handle applies an event to the tables, exchanges routes until none changes, and reconciles the nodes.
func (f *mesh) handle(event func(now time.Time)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	event(now)
	for quiet := false; !quiet; {
		quiet = true
		for _, n := range f.nodes {
			own := map[macvrf.Key]macvrf.Route{}
			for _, r := range n.table.Advertised() {
				own[r.Key] = r
			}
			if maps.EqualFunc(own, n.advertised, macvrf.Route.Equal) {
				continue
			}
			quiet = false
			for _, o := range f.nodes {
				if o == n {
					continue
				}
				for _, r := range own {
					o.table.Import(now, r)
				}
				for key := range n.advertised {
					if _, ok := own[key]; !ok {
						o.table.Withdraw(now, key)
					}
				}
			}
			n.advertised = own
		}
	}
	for _, n := range f.nodes {
		want := n.want
		if remotes, fdb, ok := n.table.Forwarding(n.lan.VNI); ok {
			want.Remotes, want.FDB = remotes, fdb
		}
		if want.Equal(n.want) {
			continue
		}
		n.want = want
		_, err := n.kernel.Reconcile(f.t.Context(), want.Netns, diffTo(want))
		if err != nil && f.t.Context().Err() == nil {
			f.t.Error(err)
		}
	}
	close(f.done)
	f.done = make(chan struct{})
}

// await waits until so returns true after an event.
func (f *mesh) await(t *testing.T, what string, so func() bool) {
	t.Helper()
	deadline := time.After(daemonTimeout)
	for {
		f.mu.Lock()
		ok, done := so(), f.done
		f.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-done:
		case <-deadline:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

// attach attaches a pod or a VM; a pod's MAC is advertised from then on.
func (f *mesh) attach(t *testing.T, n *evpnNode, spoke string, kind segment.Kind) *host {
	t.Helper()
	st := n.attach(t, n.want, spoke, kind)
	f.handle(func(now time.Time) {
		n.lan.Claimed = true
		if kind == segment.Veth {
			n.lan.Attached = append(slices.Clone(n.lan.Attached), macvrf.MAC(st.Attachment.MAC))
		}
		n.table.Set(now, []macvrf.LAN{n.lan})
	})
	return st
}

// vtepOf returns the VTEP behind which the node's segment has a MAC.
func (n *evpnNode) vtepOf(mac []byte) netip.Addr {
	for _, e := range n.want.FDB {
		if slices.Equal(e.MAC[:], mac) {
			return e.VTEP
		}
	}
	return netip.Addr{}
}

// learned returns the MACs that the VXLAN, or the bridge on the VXLAN's port, learned from frames.
func (n *evpnNode) learned(t *testing.T) (entries []netlink.Neigh) {
	t.Helper()
	link, err := n.lanNetns(n.want).Netlink(t).LinkByName(n.want.VXLAN.Name)
	must(t, err)
	all, err := n.lanNetns(n.want).Netlink(t).NeighList(link.Attrs().Index, unix.AF_BRIDGE)
	must(t, err)
	for _, e := range all {
		if e.Flags&netlink.NTF_EXT_LEARNED == 0 && e.State&netlink.NUD_PERMANENT == 0 {
			entries = append(entries, e)
		}
	}
	return entries
}

func TestEVPNLANCarriesEveryFrame(t *testing.T) {
	t.Parallel()
	for name, f := range families {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fab, a, b := evpnHosts(t, f, 401)
			one, two := fab.attach(t, a, "one", segment.Veth), fab.attach(t, b, "two", segment.Veth)
			if at := a.vtepOf(two.Attachment.MAC); at != b.lan.VTEP {
				t.Errorf("a pod that has sent nothing is behind %v, want %v", at, b.lan.VTEP)
			}
			for _, n := range fab.nodes {
				if ops := n.reconcile(t, n.want); len(ops) > 0 {
					t.Errorf("reconciling again did %v", ops)
				}
			}
			catalogCrosses(t, one, two)
			catalogCrosses(t, two, one)
			vm := fab.attach(t, b, "two", segment.Macvtap)
			doubleTaggedCrosses(t, vm, one)
			for _, n := range fab.nodes {
				if learned := n.learned(t); len(learned) > 0 {
					t.Errorf("%s has learned %v", n.Name, learned)
				}
			}
		})
	}
}

// A VM moves: its second incarnation waits on the other node, and then sends. The nodes send to it there from then on,
// and back.
func TestEVPNFollowsAMovedVM(t *testing.T) {
	t.Parallel()
	fab, a, b := evpnHosts(t, families["IPv4"], 411)
	here, there := fab.attach(t, a, "one", segment.Macvtap), fab.attach(t, b, "two", segment.Macvtap)
	mac := []byte{2, 0xbb, 0, 0, 0, 1}
	duplicate := func() bool {
		return len(a.table.Duplicates(411)) == 1 && len(b.table.Duplicates(411)) == 1
	}
	var took []time.Duration
	for i := range 40 {
		speaks, speaksAt, other := here, a, b
		if i%2 == 1 {
			speaks, speaksAt, other = there, b, a
		}
		began := time.Now()
		must(t, speaks.Send(frames.Stream(nil, mac, 1, uint64(i))))
		followed := false
		fab.await(t, "the other node's entry", func() bool {
			followed = other.vtepOf(mac) == speaksAt.lan.VTEP && !speaksAt.vtepOf(mac).IsValid()
			return followed || duplicate()
		})
		if !followed {
			break
		}
		took = append(took, time.Since(began))
	}
	logTimes(t, fmt.Sprintf("from its first frame to the other node's table, %d times", len(took)), took)
	// Both incarnations go on sending: each node keeps the MAC as its own.
	fab.mu.Lock()
	defer fab.mu.Unlock()
	if !duplicate() || a.vtepOf(mac).IsValid() || b.vtepOf(mac).IsValid() {
		t.Errorf("duplicates %v and %v, behind %v and %v",
			a.table.Duplicates(411), b.table.Duplicates(411), a.vtepOf(mac), b.vtepOf(mac))
	}
}

// A LAN in use changes between learning and EVPN: the links stay, and no frame between pods is lost.
func TestLANChangesToEVPNWithoutLoss(t *testing.T) {
	t.Parallel()
	fab, a, b := evpnHosts(t, families["IPv4"], 412)
	one, two := fab.attach(t, a, "one", segment.Veth), fab.attach(t, b, "two", segment.Veth)
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 1))
	crosses(t, one, two, frames.Stream(nil, one.MAC, 9, 1))
	fab.mu.Lock() // this test changes the nodes itself
	defer fab.mu.Unlock()
	learning := func(n *evpnNode) segment.Segment {
		s := n.want
		s.VXLAN.NoLearning, s.FDB = false, nil
		return s
	}
	there, back := startStream(t, 1, one, two), startStream(t, 2, two, one)
	for range 20 {
		evpn := func(n *evpnNode) segment.Segment { return n.want }
		for _, s := range []func(*evpnNode) segment.Segment{learning, evpn} {
			for _, n := range fab.nodes {
				for _, op := range n.reconcile(t, s(n)) {
					switch op.(type) {
					case segment.WriteRecord, segment.SetVXLAN, segment.SetLearning, segment.SetFDB, segment.DelFDB:
					default:
						t.Errorf("did %s", op)
					}
				}
			}
		}
	}
	there.expectAll(t)
	back.expectAll(t)
}

// While a LAN still learns, the node does not report MACs behind the VXLAN as local.
func TestMACsBehindALearningVXLANAreNotLocal(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 414)
	a.reconcile(t, onA)
	b.reconcile(t, onB)
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	a.reconcile(t, onA) // from now on the kernel knows the VXLAN's port
	seen := make(chan [6]byte, 64)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ready := make(chan struct{})
	var watching sync.WaitGroup
	defer watching.Wait()
	defer stop()
	watching.Go(func() {
		err := watch.New(a.kernel).WatchFDB(ctx, watch.FDBEvents{
			Learned: func(_ string, mac [6]byte) { seen <- mac }, Removed: func(string, [6]byte) {},
			Overflow: func() { close(ready) },
		})
		if err != nil {
			t.Error(err)
		}
	})
	<-ready
	from := func(mac byte) []byte { return frames.Stream(nil, net.HardwareAddr{2, 0, 0, 0, 4, mac}, 9, 1) }
	crosses(t, two, one, from(2))
	crosses(t, one, two, from(1))
	for {
		select {
		case mac := <-seen:
			if mac == [6]byte{2, 0, 0, 0, 4, 2} {
				t.Fatalf("%x, which is behind the VXLAN, is reported as local", mac)
			}
			if mac == [6]byte{2, 0, 0, 0, 4, 1} {
				return
			}
		case <-time.After(frameTimeout):
			t.Fatal("the local MAC is not reported")
		}
	}
}

// Entries of an earlier run that no route has now are removed, but not before all routes are imported.
func TestEntriesOfAnEarlierRunAreRemoved(t *testing.T) {
	t.Parallel()
	a, _, s, _ := unicastHosts(t, families["IPv6"], 413)
	s = withEVPN(s)
	remote := families["IPv6"].vteps[1]
	s.Remotes = []netip.Addr{remote}
	for i := range byte(100) {
		s.FDB = append(s.FDB, segment.FDBEntry{MAC: [6]byte{2, 0, 0, 0, 1, i}, VTEP: remote})
	}
	a.reconcile(t, s)
	a.attach(t, s, "one", segment.Veth)
	a.reconcile(t, s)
	fewer := s
	fewer.Remotes, fewer.FDB, fewer.Partial = []netip.Addr{}, s.FDB[:10], true
	if ops := a.reconcile(t, fewer); len(ops) > 0 {
		t.Errorf("before all routes are imported did %v", ops)
	}
	fewer.Partial = false
	if ops := a.reconcile(t, fewer); len(ops) != 2 {
		t.Errorf("did %v, want it to delete remotes and MACs", ops)
	}
	have, ok := a.observe(t, s).Link(s.VXLAN.Name)
	if !ok || len(have.VXLAN.FDB) != 10 || len(have.VXLAN.Remotes) > 0 {
		t.Errorf("left: %+v", have.VXLAN)
	}
	s.FDB = s.FDB[:0]
	a.reconcile(t, s)
	if have, _ := a.observe(t, s).Link(s.VXLAN.Name); len(have.VXLAN.FDB) > 0 {
		t.Errorf("left: %+v", have.VXLAN.FDB)
	}
}

// Another process reads from the kernel where a LAN has which MAC: on a spoke of the node, or behind a VTEP. It does so
// for a LAN that learns, too.
func TestMACsAreReadFromTheKernel(t *testing.T) {
	t.Parallel()
	f := families["IPv6"]
	have := func(h node, s segment.Segment, want ...segment.MACEntry) {
		t.Helper()
		places, err := h.newKernel(t).MACs(t.Context(), s.Netns)
		must(t, err)
		for i := range places {
			if places[i].LastSeen > time.Minute {
				t.Errorf("%+v was last seen a minute ago", places[i])
			}
			places[i].LastSeen = 0
		}
		for _, p := range want {
			if !slices.Contains(places, p) {
				t.Errorf("%s has %+v, want %+v among them", h.Name, places, p)
			}
		}
		if len(places) != len(want) {
			t.Errorf("%s has %+v, want %d", h.Name, places, len(want))
		}
	}
	t.Run("EVPN", func(t *testing.T) {
		fab, a, b := evpnHosts(t, f, 421)
		pod, vm := fab.attach(t, a, "one", segment.Veth), fab.attach(t, b, "two", segment.Macvtap)
		have(a.node, a.want)
		have(b.node, b.want, segment.MACEntry{MAC: pod.Attachment.MAC.String(), VTEP: f.vteps[0]})
		crosses(t, pod, vm, frames.Stream(nil, pod.Attachment.MAC, 9, 1))
		must(t, vm.Send(frames.Stream(nil, []byte{2, 0xbb, 0, 0, 0, 2}, 9, 2)))
		fab.await(t, "the VM's MAC", func() bool { return a.vtepOf([]byte{2, 0xbb, 0, 0, 0, 2}) == f.vteps[1] })
		have(a.node, a.want,
			segment.MACEntry{MAC: pod.Attachment.MAC.String(), Spoke: "one"},
			segment.MACEntry{MAC: "02:bb:00:00:00:02", VTEP: f.vteps[1]})
		have(b.node, b.want,
			segment.MACEntry{MAC: pod.Attachment.MAC.String(), VTEP: f.vteps[0]},
			segment.MACEntry{MAC: "02:bb:00:00:00:02", Spoke: "two"})
		if _, err := a.newKernel(t).MACs(t.Context(), "never"); err == nil {
			t.Error("a LAN that is not on the node has MACs")
		}
	})
	t.Run("learning", func(t *testing.T) {
		a, b, onA, onB := unicastHosts(t, f, 422)
		a.reconcile(t, onA)
		b.reconcile(t, onB)
		one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
		crosses(t, one, two, frames.Stream(nil, one.Attachment.MAC, 9, 1))
		have(a, onA, segment.MACEntry{MAC: one.Attachment.MAC.String(), Spoke: "one"})
		have(b, onB, segment.MACEntry{MAC: one.Attachment.MAC.String(), VTEP: f.vteps[0]})
	})
}

// A MAC that returns to a node and leaves at once, before the VXLAN's entries change in between, is followed as well.
func TestMACThatReturnsForAMomentIsFollowed(t *testing.T) {
	t.Parallel()
	netlab.NeedDevices(t)
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 414)
	onA, onB = withEVPN(onA), withEVPN(onB)
	onA.Remotes, onB.Remotes = []netip.Addr{onB.VXLAN.Local}, []netip.Addr{onA.VXLAN.Local}
	mac := [6]byte{2, 0xbb, 0, 0, 8, 1}
	onA.FDB = []segment.FDBEntry{{MAC: mac, VTEP: onB.VXLAN.Local}}
	for h, s := range map[node]segment.Segment{a: onA, b: onB} {
		h.reconcile(t, s)
	}
	one, vm := a.attach(t, onA, "one", segment.Veth), a.attach(t, onA, "two", segment.Macvtap)
	two := b.attach(t, onB, "two", segment.Veth)
	a.reconcile(t, onA)
	b.reconcile(t, onB)
	crosses(t, one, two, frames.Stream(mac[:], one.MAC, 1, 1))
	crosses(t, vm, one, frames.Stream(nil, mac[:], 1, 2))
	if _, err := next(two, frameTimeout); err != nil {
		t.Fatal(err)
	}
	if ops := a.reconcile(t, onA); len(ops) > 0 {
		t.Errorf("a desired state from before the MAC was local did %v", ops)
	}
	crosses(t, one, vm, frames.Stream(mac[:], one.MAC, 1, 3))
	onA.FDB[0].Local = true
	a.reconcile(t, onA)
	crosses(t, one, two, frames.Stream(mac[:], one.MAC, 1, 4))
	if ops := a.reconcile(t, onA); len(ops) > 0 {
		t.Errorf("reconciling again did %v", ops)
	}
}
