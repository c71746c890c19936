package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// reflectorAt has this program be a reflector on that address and port.
const reflectorAt = "K8SLAN_TEST_REFLECTOR"

func runReflector(at string) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	listen, err := netip.ParseAddrPort(at)
	if err == nil {
		err = bgp.Reflector{AS: 65000, RouterID: listen.Addr(), Listen: listen, Log: slog.New(slog.DiscardHandler)}.Run(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// reflector is a reflector that can be stopped and started, on the loopback device of the test.
type reflector struct {
	at   netip.AddrPort
	stop func() // in order
}

func startReflector(t *testing.T, at netip.AddrPort) *reflector {
	t.Helper()
	if !at.IsValid() {
		at = freePort()
	}
	self, err := os.Executable()
	must(t, err)
	return &reflector{at, start(t, "env", reflectorAt+"="+at.String(), self).term}
}

// speaker is a node whose LAN is joined to EVPN as the daemon does it: the manager makes what the fabric tells.
type speaker struct {
	managed
	instance *evpn.Instance
	s        segment.Segment
	routes   chan<- segment.Routes // are as told here from then on
	end      func()
}

// startSpeaker starts a daemon on the node, which is number n of its fabric.
func (h node) startSpeaker(t *testing.T, s segment.Segment, n byte, reflector netip.AddrPort) *speaker {
	t.Helper()
	return h.startSpeakerTo(t, s, n, reflectorPeer(n, reflector))
}

// reflectorPeer is a reflector on the loopback device, as a speaker of that number sees it.
func reflectorPeer(n byte, at netip.AddrPort) bgp.Peer {
	return bgp.Peer{Address: at.Addr(), Port: at.Port(), AS: 65000, Source: netip.AddrFrom4([4]byte{127, 0, 0, 1 + n}), IPv6VTEPs: true}
}

// startSpeakerTo starts one that speaks with these.
func (h node) startSpeakerTo(t *testing.T, s segment.Segment, n byte, peers ...bgp.Peer) *speaker {
	t.Helper()
	routes := make(chan segment.Routes)
	sp := &speaker{managed: h.manage(t), s: withEVPN(s), routes: routes}
	sp.s.Remotes, sp.s.FDB, sp.s.Neighbors = nil, nil, nil
	h.observe(t, s) // its kernel hears a namespace from when it first saw it
	sp.instance = evpn.New(evpn.Config{
		AS: 65000, RouterID: netip.AddrFrom4([4]byte{127, 0, 0, 1 + n}), Kernel: h.kernel, Peers: peers, Log: slog.New(slog.DiscardHandler),
	})
	sp.Set([]segment.Segment{sp.s})
	ctx, cancel := context.WithCancel(context.Background())
	var tasks sync.WaitGroup
	tasks.Go(func() {
		if err := sp.instance.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	lan := macvrf.LAN{VNI: s.VXLAN.VNI, VTEP: s.VXLAN.Local, Suppress: s.VXLAN.SuppressNeighbors}
	lan.Import, lan.Export, lan.RD = targets(t, s.Routes.Import), targets(t, s.Routes.Export), s.Routes.RD
	tasks.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case r := <-routes:
				lan.Import, lan.Export, lan.RD = targets(t, r.Import), targets(t, r.Export), r.RD
				sp.instance.Set(map[string]macvrf.LAN{s.Netns: lan})
			case <-sp.instance.Changed():
				want := sp.s
				sp.instance.Fill(&want)
				sp.Set([]segment.Segment{want})
			case <-sp.Changed():
				lan.Claimed, lan.Attached = false, nil
				for _, r := range sp.Reports() {
					for _, c := range r.Claims {
						if lan.Claimed = true; c.Kind == segment.Veth {
							lan.Attached = append(lan.Attached, macvrf.MAC(c.MAC))
						}
					}
				}
				sp.instance.Set(map[string]macvrf.LAN{s.Netns: lan})
			}
		}
	})
	sp.end = sync.OnceFunc(func() {
		cancel()
		tasks.Wait()
		sp.stop()
	})
	t.Cleanup(sp.end)
	return sp
}

func targets(t *testing.T, texts []string) (targets []macvrf.Target) {
	for _, text := range texts {
		target, err := macvrf.ParseTarget(text)
		if err != nil {
			t.Error(err)
		}
		targets = append(targets, target)
	}
	return targets
}

// awaitSettled waits until the daemon has heard all that there is: from then on what is told no more is deleted.
func (sp *speaker) awaitSettled(t *testing.T) {
	t.Helper()
	eventuallySlow(t, "all to be heard", func() bool {
		s := sp.s
		sp.instance.Fill(&s)
		return s.Remotes != nil && !s.Partial
	})
}

// awaitStaleRoutesRemoved waits until each session is up and the time is over after which a speaker removes what the peer
// no longer advertises.
func (sp *speaker) awaitStaleRoutesRemoved(t *testing.T) {
	t.Helper()
	for _, s := range sp.instance.Sessions() {
		sp.awaitUp(t, s.Peer)
	}
	for _, s := range sp.instance.Sessions() {
		<-time.After(time.Until(s.Since.Add(bgp.SyncTime + 100*time.Millisecond)))
	}
}

// tables hears what becomes of a LAN's tables on a node until the test ends.
func (n node) tables(t *testing.T, s segment.Segment) <-chan netlink.NeighUpdate {
	t.Helper()
	return tables(t, n.lanNetns(s))
}

func tables(t *testing.T, ns netlab.Namespace) <-chan netlink.NeighUpdate {
	t.Helper()
	updates, done := make(chan netlink.NeighUpdate, 4096), make(chan struct{})
	must(t, ns.Do(func() error { return netlink.NeighSubscribe(updates, done) }))
	t.Cleanup(func() { close(done) })
	return updates
}

// awaitEntry waits until a VXLAN is told that a MAC is behind a remote.
func awaitEntry(t *testing.T, updates <-chan netlink.NeighUpdate, mac net.HardwareAddr, vtep netip.Addr) time.Time {
	t.Helper()
	return awaitUpdate(t, updates, fmt.Sprintf("%s to be told to be behind %s", mac, vtep), func(u netlink.NeighUpdate) bool {
		return u.Type == unix.RTM_NEWNEIGH && u.Flags&netlink.NTF_SELF != 0 && slices.Equal(u.HardwareAddr, mac) && u.IP.Equal(vtep.AsSlice())
	})
}

func awaitUpdate(t *testing.T, updates <-chan netlink.NeighUpdate, what string, fits func(netlink.NeighUpdate) bool) time.Time {
	t.Helper()
	deadline := time.After(daemonTimeout)
	for {
		select {
		case u := <-updates:
			if fits(u) {
				return time.Now()
			}
		case <-deadline:
			t.Fatalf("waited for %s in vain", what)
		}
	}
}

// Two daemons and a reflector: a pod is known to the other node as soon as it is attached, and a VM is followed when it moves.
func TestTwoDaemonsExchangeRoutes(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 421)
	a.reconcile(t, withEVPN(onA))
	b.reconcile(t, withEVPN(onB))
	reflector := startReflector(t, netip.AddrPort{})
	onNode := map[bool]*speaker{true: a.startSpeaker(t, onA, 1, reflector.at), false: b.startSpeaker(t, onB, 2, reflector.at)}
	two := b.attach(t, onB, "two", segment.Veth)
	a.awaitState(t, onA, "the other node", func(have segment.State) bool {
		l, _ := have.Link(onA.VXLAN.Name)
		return len(l.VXLAN.Remotes) == 1
	})
	atA, atB := a.tables(t, onA), b.tables(t, onB)
	var took []time.Duration
	for range 30 {
		one := a.claim(t, onA, "one", segment.Veth)
		began := time.Now()
		took = append(took, awaitEntry(t, atB, one.Attachment.MAC, onA.VXLAN.Local).Sub(began))
		one.openWire(t, a.lanNetns(onA))
		crosses(t, one, two, frames.Stream(nil, one.Attachment.MAC, 1, 1))
		a.release(t, one)
		b.awaitState(t, onB, "the pod to be gone", func(have segment.State) bool {
			l, _ := have.Link(onB.VXLAN.Name)
			return len(l.VXLAN.FDB) == 0
		})
	}
	slices.Sort(took)
	t.Logf("from attach, right after a detach, to the other node's table: median %v, worst %v", took[len(took)/2], took[len(took)-1])

	here, there := a.attach(t, onA, "one", segment.Macvtap), b.attach(t, onB, "two", segment.Macvtap)
	took = nil
	for i := range byte(32) { // the VM of each MAC starts here, and then moves
		mac := net.HardwareAddr{2, 0xbb, 0, 0, 1, i}
		for _, first := range []bool{true, false} {
			from, updates, vtep := here, atB, onA.VXLAN.Local
			if !first {
				from, updates, vtep = there, atA, onB.VXLAN.Local
			}
			began := time.Now()
			must(t, from.Send(frames.Stream(nil, mac, 1, 1)))
			if at := awaitEntry(t, updates, mac, vtep); !first {
				took = append(took, at.Sub(began))
			}
		}
	}
	slices.Sort(took)
	t.Logf("from a VM's first frame on another node to the table of that which it left: median %v, worst %v", took[len(took)/2], took[len(took)-1])
	for _, sp := range onNode {
		for _, s := range sp.instance.Sessions() {
			if !s.Up {
				t.Errorf("session %+v", s)
			}
		}
	}
}

// A VM moves while its first incarnation still runs silently: every node follows its first frame within 5 ms, and nobody else loses one.
func TestEveryNodeFollowsAMovedVMWithin5ms(t *testing.T) {
	netlab.NeedDevices(t)
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 423)
	c := addNode(t, a.underlay, "worker3")
	vtep := netip.MustParseAddr("192.0.2.3")
	c.addUnderlayAddress(t, netip.PrefixFrom(vtep, families["IPv4"].bits))
	onC := c.withUnderlay(t, unicast(onA, vtep))
	onC.Spokes = []string{"three"} // with a MAC of its own
	reflector := startReflector(t, netip.AddrPort{})
	for i, n := range []struct {
		node
		s segment.Segment
	}{{a, onA}, {b, onB}, {c, onC}} {
		n.reconcile(t, withEVPN(n.s))
		n.startSpeaker(t, n.s, byte(1+i), reflector.at)
	}
	first, second := a.attach(t, onA, "one", segment.Macvtap), b.attach(t, onB, "one", segment.Macvtap)
	near, far := b.attach(t, onB, "two", segment.Veth), c.attach(t, onC, "three", segment.Veth)
	c.awaitState(t, onC, "the other pod", func(have segment.State) bool {
		l, _ := have.Link(onC.VXLAN.Name)
		return len(l.VXLAN.FDB) == 1 && len(l.VXLAN.Remotes) == 2
	})
	there, back := startStream(t, 1, near, far), startStream(t, 2, far, near)
	atA, atB, atC := a.tables(t, onA), b.tables(t, onB), c.tables(t, onC)
	var took []time.Duration
	for i := range byte(32) {
		mac := net.HardwareAddr{2, 0xbb, 0, 0, 7, i}
		must(t, first.Send(frames.Stream(nil, mac, 3, 1)))
		awaitEntry(t, atB, mac, onA.VXLAN.Local)
		awaitEntry(t, atC, mac, onA.VXLAN.Local)
		began := time.Now()
		must(t, second.Send(frames.Stream(nil, mac, 3, 2)))
		awaitEntry(t, atA, mac, onB.VXLAN.Local)
		awaitEntry(t, atC, mac, onB.VXLAN.Local)
		took = append(took, time.Since(began))
		reachesInTime(t, far, second, frames.Stream(mac, far.MAC, 4, uint64(i)))
	}
	slices.Sort(took)
	t.Logf("from a VM's first frame on another node to the tables of all: median %v, worst %v", took[len(took)/2], took[len(took)-1])
	if median := took[len(took)/2]; median > 5*time.Millisecond {
		t.Errorf("median %v, want 5 ms at most", median)
	}
	there.expectAll(t)
	back.expectAll(t)
}

// A node speaks BGP beside another router of its own, for it listens nowhere.
func TestDaemonDoesNotListenForBGP(t *testing.T) {
	other, err := net.Listen("tcp", ":179")
	must(t, err)
	defer other.Close()
	a, _, s, _ := unicastHosts(t, families["IPv4"], 424)
	a.reconcile(t, withEVPN(s))
	speaker := a.startSpeaker(t, s, 1, startReflector(t, netip.AddrPort{}).at)
	eventuallySlow(t, "the session", func() bool {
		sessions := speaker.instance.Sessions()
		return len(sessions) == 1 && sessions[0].Up
	})
	if at, want := listening(t), []string{other.Addr().String()}; !slices.Equal(at, want) {
		t.Errorf("with a speaker this process listens at %v, without it at %v", at, want)
	}
}

// listening is where this process has listening TCP sockets in the network namespace of the test.
func listening(t *testing.T) (at []string) {
	t.Helper()
	own := map[string]bool{}
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil { // the folder itself was one
			own[to] = true
		}
	}
	for _, table := range []string{"tcp", "tcp6"} {
		for line := range strings.Lines(read(t, "/proc/self/net/"+table)) {
			const local, state, inode, listen = 1, 3, 9, "0A"
			field := strings.Fields(line)
			if field[state] != listen || !own["socket:["+field[inode]+"]"] {
				continue
			}
			hexAddress, hexPort, _ := strings.Cut(field[local], ":")
			port, err := strconv.ParseUint(hexPort, 16, 16)
			must(t, err)
			if strings.Trim(hexAddress, "0") == "" {
				hexAddress = "[::]"
			}
			at = append(at, fmt.Sprintf("%s:%d", hexAddress, port))
		}
	}
	return at
}

// A reflector that goes and comes back, and a daemon that restarts, cost no frame.
func TestReflectorAndDaemonRestartWithoutLoss(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv6"], 422)
	a.reconcile(t, withEVPN(onA))
	b.reconcile(t, withEVPN(onB))
	reflector := startReflector(t, netip.AddrPort{})
	first := a.startSpeaker(t, onA, 1, reflector.at)
	second := b.startSpeaker(t, onB, 2, reflector.at)
	one, two := a.attach(t, onA, "one", segment.Veth), b.attach(t, onB, "two", segment.Veth)
	known := func(h node, s segment.Segment) {
		t.Helper()
		h.awaitState(t, s, "the other node's pod", func(have segment.State) bool {
			l, _ := have.Link(s.VXLAN.Name)
			return len(l.VXLAN.FDB) == 1 && len(l.VXLAN.Remotes) == 1
		})
	}
	known(a, onA)
	known(b, onB)
	second.awaitSettled(t)
	there, back := startStream(t, 1, one, two), startStream(t, 2, two, one)
	reflector.stop()
	again := startReflector(t, reflector.at)
	first.end()
	first = a.startSpeaker(t, onA, 1, again.at)
	first.awaitStaleRoutesRemoved(t)
	second.awaitStaleRoutesRemoved(t)
	there.expectAll(t)
	back.expectAll(t)
	known(a, onA)
	known(b, onB)
	updates, mac := b.tables(t, onB), net.HardwareAddr{2, 0xbb, 0, 0, 2, 1} // what is new is told as well
	must(t, one.Send(frames.Stream(nil, mac, 1, 1)))
	awaitEntry(t, updates, mac, onA.VXLAN.Local)
}
