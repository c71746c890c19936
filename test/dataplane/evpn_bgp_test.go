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
	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// reflectorAt is an environment variable that makes this program a reflector on that address and port.
const reflectorAt = "K8SLAN_TEST_REFLECTOR"

func runReflector(at string) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	listen, err := netip.ParseAddrPort(at)
	if err == nil {
		log := slog.New(slog.DiscardHandler)
		err = bgp.Reflector{AS: 65000, RouterID: listen.Addr(), Listen: listen, Log: log}.Run(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// reflector is a reflector that can be stopped and started, on the loopback device of the tests.
type reflector struct {
	at   netip.AddrPort
	stop func() // by SIGTERM
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

// speaker is a node that runs the daemon's manager and EVPN instance for one LAN.
type speaker struct {
	managed
	instance *evpn.Instance
	s        segment.Segment
	routes   chan<- segment.Routes // new route targets and RD
	end      func()
}

// startSpeaker starts a speaker with a number and one session, to a reflector.
func (n node) startSpeaker(t *testing.T, s segment.Segment, number byte, reflector netip.AddrPort) *speaker {
	t.Helper()
	return n.startSpeakerTo(t, s, number, reflectorPeer(number, reflector))
}

// reflectorPeer is a reflector on the loopback device, as the speaker with that number connects to it.
func reflectorPeer(n byte, at netip.AddrPort) bgp.Peer {
	source := netip.AddrFrom4([4]byte{127, 0, 0, 1 + n})
	return bgp.Peer{Address: at.Addr(), Port: at.Port(), AS: 65000, Source: source, IPv6VTEPs: true}
}

// startSpeakerTo starts a speaker with these peers.
func (n node) startSpeakerTo(t *testing.T, s segment.Segment, number byte, peers ...bgp.Peer) *speaker {
	t.Helper()
	routes := make(chan segment.Routes)
	sp := &speaker{managed: n.manage(t), s: withEVPN(s), routes: routes}
	sp.s.Remotes, sp.s.FDB, sp.s.Neighbors = nil, nil, nil
	n.observe(t, s) // its kernel reports events of a namespace from the first observation on
	sp.instance = evpn.New(evpn.Config{
		AS: 65000, RouterID: netip.AddrFrom4([4]byte{127, 0, 0, 1 + number}), Kernel: watch.New(n.kernel), Peers: peers,
		Log: slog.New(slog.DiscardHandler),
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

// awaitSettled waits until the daemon has imported all routes: from then on it deletes entries that are withdrawn.
func (sp *speaker) awaitSettled(t *testing.T) {
	t.Helper()
	eventually(t, "all routes to be imported", func() bool {
		s := sp.s
		sp.instance.Fill(&s)
		return s.Remotes != nil && !s.Partial
	})
}

// awaitStaleRoutesRemoved waits until each session has come up after that time, and the speaker has had the time after
// which it removes what the peer no longer advertises.
func (sp *speaker) awaitStaleRoutesRemoved(t *testing.T, after time.Time) {
	t.Helper()
	var last time.Time
	eventually(t, "the sessions to be up again", func() bool {
		for _, s := range sp.instance.Sessions() {
			if !s.Up || s.Since.Before(after) {
				return false
			}
			last = s.Since
		}
		return true
	})
	<-time.After(time.Until(last.Add(bgp.SyncTime + 100*time.Millisecond)))
}

// tables returns the changes of a LAN's tables on a node until the test ends.
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

// awaitEntry waits for a VXLAN's FDB entry that has a MAC behind a VTEP.
func awaitEntry(t *testing.T, updates <-chan netlink.NeighUpdate, mac net.HardwareAddr, vtep netip.Addr) time.Time {
	t.Helper()
	what := fmt.Sprintf("an entry for %s behind %s", mac, vtep)
	return awaitUpdate(t, updates, what, func(u netlink.NeighUpdate) bool {
		return u.Type == unix.RTM_NEWNEIGH && u.Flags&netlink.NTF_SELF != 0 &&
			slices.Equal(u.HardwareAddr, mac) && u.IP.Equal(vtep.AsSlice())
	})
}

func awaitUpdate(
	t *testing.T, updates <-chan netlink.NeighUpdate, what string, fits func(netlink.NeighUpdate) bool,
) time.Time {
	t.Helper()
	deadline := time.After(daemonTimeout)
	for {
		select {
		case u := <-updates:
			if fits(u) {
				return time.Now()
			}
		case <-deadline:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

// logTimes logs how long something took, and returns the median.
func logTimes(t *testing.T, what string, took []time.Duration) (median time.Duration) {
	t.Helper()
	slices.Sort(took)
	median = took[len(took)/2]
	t.Logf("%s: median %v, worst %v", what, median, took[len(took)-1])
	return median
}

// Two daemons exchange routes by a reflector: the other node has a pod's MAC as soon as the pod is attached, and
// follows a VM that moves.
func TestTwoDaemonsExchangeRoutes(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 421)
	a.reconcile(t, withEVPN(onA))
	b.reconcile(t, withEVPN(onB))
	reflector := startReflector(t, netip.AddrPort{})
	onNode := map[bool]*speaker{
		true: a.startSpeaker(t, onA, 1, reflector.at), false: b.startSpeaker(t, onB, 2, reflector.at),
	}
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
		b.awaitState(t, onB, "the pod's MAC to be removed", func(have segment.State) bool {
			l, _ := have.Link(onB.VXLAN.Name)
			return len(l.VXLAN.FDB) == 0
		})
	}
	logTimes(t, "from attach, right after a detach, to the other node's table", took)

	here, there := a.attach(t, onA, "one", segment.Macvtap), b.attach(t, onB, "two", segment.Macvtap)
	took = nil
	for i := range byte(32) { // the VM with each MAC starts here and then moves
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
	logTimes(t, "from a VM's first frame on another node to the table of the node that it left", took)
	for _, sp := range onNode {
		for _, s := range sp.instance.Sessions() {
			if !s.Up {
				t.Errorf("session %+v", s)
			}
		}
	}
}

// A VM moves while its first incarnation is still there and silent: every node follows its first frame within 5 ms, and
// other hosts lose no frame.
func TestEveryNodeFollowsAMovedVMWithin5ms(t *testing.T) {
	netlab.NeedDevices(t)
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 423)
	c := addNode(t, a.underlay, "worker3")
	vtep := netip.MustParseAddr("192.0.2.3")
	c.addUnderlayAddress(t, netip.PrefixFrom(vtep, families["IPv4"].bits))
	onC := c.withUnderlay(t, unicast(onA, vtep))
	onC.Spokes = []string{"three"} // it has a MAC of its own
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
	median := logTimes(t, "from a VM's first frame on another node to the tables of all nodes", took)
	if median > 5*time.Millisecond {
		t.Errorf("median %v, want 5 ms at most", median)
	}
	there.expectAll(t)
	back.expectAll(t)
}

// The daemon connects and listens on no port, so the node can run another BGP router.
func TestDaemonDoesNotListenForBGP(t *testing.T) {
	other, err := net.Listen("tcp", ":179")
	must(t, err)
	defer other.Close()
	a, _, s, _ := unicastHosts(t, families["IPv4"], 424)
	a.reconcile(t, withEVPN(s))
	speaker := a.startSpeaker(t, s, 1, startReflector(t, netip.AddrPort{}).at)
	eventually(t, "the session", func() bool {
		sessions := speaker.instance.Sessions()
		return len(sessions) == 1 && sessions[0].Up
	})
	if at, want := listening(t), []string{other.Addr().String()}; !slices.Equal(at, want) {
		t.Errorf("with a speaker this process listens on %v, without it on %v", at, want)
	}
}

// listening returns where this process has listening TCP sockets in the network namespace of the test.
func listening(t *testing.T) (at []string) {
	t.Helper()
	own := map[string]bool{}
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil { // the directory itself was open
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

// A reflector and a daemon restart, and no frame is lost.
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
	restarted := time.Now()
	reflector.stop()
	again := startReflector(t, reflector.at)
	first.end()
	first = a.startSpeaker(t, onA, 1, again.at)
	first.awaitStaleRoutesRemoved(t, restarted)
	second.awaitStaleRoutesRemoved(t, restarted)
	there.expectAll(t)
	back.expectAll(t)
	known(a, onA)
	known(b, onB)
	updates, mac := b.tables(t, onB), net.HardwareAddr{2, 0xbb, 0, 0, 2, 1} // a new MAC is advertised as well
	must(t, one.Send(frames.Stream(nil, mac, 1, 1)))
	awaitEntry(t, updates, mac, onA.VXLAN.Local)
}
