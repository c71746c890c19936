package bgp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

func TestALogTellsNoPassword(t *testing.T) {
	peer := bgp.Peer{Address: netip.MustParseAddr("192.0.2.1"), AS: 65000, Password: "secret"}
	for what, handler := range map[string]func(io.Writer) slog.Handler{
		"json": func(w io.Writer) slog.Handler { return slog.NewJSONHandler(w, nil) },
		"text": func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, nil) },
	} {
		var out strings.Builder
		slog.New(handler(&out)).Info("up", "peer", peer, "session", bgp.Session{Peer: peer}, "peers", []bgp.Peer{peer})
		if strings.Contains(out.String(), "secret") || !strings.Contains(out.String(), "192.0.2.1:179 of AS 65000") {
			t.Errorf("%s: %s", what, out.String())
		}
	}
}

// reflectorAt has this program be a reflector that can be killed: port and password.
const reflectorAt = "K8SLAN_TEST_REFLECTOR"

func TestMain(m *testing.M) {
	if at := os.Getenv(reflectorAt); at != "" {
		var port uint16
		var password string
		if _, err := fmt.Sscanf(at, "%d/%s", &port, &password); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if err := reflector(port, password).Run(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

const as = 65000

func reflector(port uint16, password string) bgp.Reflector {
	return bgp.Reflector{
		AS: as, RouterID: netip.MustParseAddr("127.0.0.1"), Listen: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port),
		Password: password, Log: slog.New(slog.DiscardHandler),
	}
}

// patience is how long a test waits for a session or what comes over one.
const patience = time.Minute

// freePort is one that nobody listens on.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// startReflector runs a reflector as a process of its own; the function kills it.
func startReflector(t *testing.T, port uint16, password string) (kill func()) {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d/%s", reflectorAt, port, password))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait()
	})
	t.Cleanup(kill)
	return kill
}

// speaker is one that remembers what it has heard.
type speaker struct {
	*bgp.Speaker
	name string
	stop func() // ends Run

	mu       sync.Mutex
	changed  chan struct{} // closed at the next change
	routes   map[macvrf.Key]macvrf.Route
	gone     int
	sessions []bgp.Session
	lost     map[netip.Addr]string // sessions that were up, and why they were not any more
	partial  bool
}

// peerAt is the peer at a port of the loopback device, for a speaker that calls from its own address there.
func peerAt(port uint16, n byte) bgp.Peer {
	return bgp.Peer{Address: netip.MustParseAddr("127.0.0.1"), Port: port, AS: as, Source: netip.AddrFrom4([4]byte{127, 0, 0, n})}
}

// speak starts a speaker that calls from 127.0.0.n.
func speak(t *testing.T, n byte, peers ...bgp.Peer) *speaker {
	t.Helper()
	s := &speaker{name: fmt.Sprintf("speaker %d", n), routes: map[macvrf.Key]macvrf.Route{}, changed: make(chan struct{}), lost: map[netip.Addr]string{}, partial: true}
	s.Speaker = bgp.NewSpeaker(bgp.Config{
		AS: as, RouterID: netip.AddrFrom4([4]byte{127, 0, 0, n}), OnUpdate: s.hear, Log: slog.New(slog.DiscardHandler),
	})
	if err := s.SetPeers(t.Context(), peers); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", s.name, err)
		}
	})
	t.Cleanup(s.stop)
	return s
}

func (s *speaker) hear(h bgp.Update) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range h.Routes {
		s.routes[r.Key] = r
	}
	for _, k := range h.Withdrawn {
		delete(s.routes, k)
		s.gone++
	}
	for _, now := range h.Sessions {
		for _, before := range s.sessions {
			if before.Peer == now.Peer && before.Up && !now.Up {
				s.lost[now.Peer.Address] = now.Why
			}
		}
	}
	if h.Sessions != nil {
		s.sessions = h.Sessions
	}
	s.partial = h.Partial
	close(s.changed)
	s.changed = make(chan struct{})
}

// await waits until it is so.
func (s *speaker) await(t *testing.T, what string, so func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		s.mu.Lock()
		ok, changed := so(), s.changed
		s.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			s.mu.Lock()
			defer s.mu.Unlock()
			t.Fatalf("%s: waited for %s in vain; has %v, sessions %+v, partial %v", s.name, what, s.routes, s.sessions, s.partial)
		}
	}
}

func (s *speaker) awaitUp(t *testing.T) {
	t.Helper()
	s.await(t, "its sessions", func() bool {
		return len(s.sessions) > 0 && !slices.ContainsFunc(s.sessions, func(x bgp.Session) bool { return !x.Up })
	})
}

// awaitRoutes waits until these and no others are there.
func (s *speaker) awaitRoutes(t *testing.T, want ...macvrf.Route) {
	t.Helper()
	s.await(t, fmt.Sprint(want), func() bool {
		for _, r := range want {
			if got, ok := s.routes[r.Key]; !ok || !got.Equal(r) {
				return false
			}
		}
		return len(s.routes) == len(want)
	})
}

func (s *speaker) set(t *testing.T, own ...macvrf.Route) {
	t.Helper()
	if err := s.Set(own); err != nil {
		t.Fatal(err)
	}
}

// withdrawn is how many routes were withdrawn so far.
func (s *speaker) withdrawn() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gone
}

// route is one of the node of that number.
func route(n byte, change func(*macvrf.Route)) macvrf.Route {
	r := macvrf.Route{
		Key:  macvrf.Key{Type: macvrf.MACIP, RD: macvrf.RD{1: 1, 2: 127, 5: n, 7: 222}, MAC: macvrf.MAC{2, 0, 0, 0, 0, n}},
		VTEP: netip.AddrFrom4([4]byte{192, 0, 2, n}), VNI: 222, Targets: []macvrf.Target{macvrf.NewTarget(as, 222)},
	}
	if change != nil {
		change(&r)
	}
	return r
}

func flood(n byte) macvrf.Route {
	return route(n, func(r *macvrf.Route) { r.Type, r.MAC, r.IP = macvrf.Multicast, macvrf.MAC{}, r.VTEP })
}

// What one node tells arrives at the others as it was told, and goes when it is taken back; nobody hears its own.
func TestRoutesArriveAsTheyWereTold(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	startReflector(t, port, "")
	a, b := speak(t, 2, peerAt(port, 2)), speak(t, 3, peerAt(port, 3))
	all := []macvrf.Route{
		flood(2), route(2, nil),
		route(2, func(r *macvrf.Route) { r.MAC[5], r.Sequence = 77, 1<<32-1 }),
		route(2, func(r *macvrf.Route) { r.MAC[5], r.Sticky = 78, true }),
		route(2, func(r *macvrf.Route) { r.IP = netip.MustParseAddr("10.0.0.1") }),
		route(2, func(r *macvrf.Route) { r.IP = netip.MustParseAddr("fd00::1") }),
		route(2, func(r *macvrf.Route) { r.VNI, r.MAC[5] = 16777215, 79 }),
		route(2, func(r *macvrf.Route) { r.Tag = 5 }),
		route(2, func(r *macvrf.Route) {
			other, err := macvrf.ParseTarget("4200000000:7")
			if err != nil {
				t.Fatal(err)
			}
			r.MAC[5], r.Targets = 80, append(r.Targets, other)
		}),
	}
	a.set(t, all...)
	b.set(t, flood(3))
	b.awaitRoutes(t, all...)
	a.awaitRoutes(t, flood(3))
	moved := route(2, func(r *macvrf.Route) { r.Sequence = 3 })
	a.set(t, flood(2), moved)
	b.awaitRoutes(t, flood(2), moved)
	a.set(t, flood(2), route(2, nil)) // a lower sequence is told as well
	b.awaitRoutes(t, flood(2), route(2, nil))
	a.set(t)
	b.awaitRoutes(t)
	a.awaitRoutes(t, flood(3))
}

func TestHowLongARouteTakes(t *testing.T) {
	port := freePort(t)
	startReflector(t, port, "")
	a, b := speak(t, 2, peerAt(port, 2)), speak(t, 3, peerAt(port, 3))
	a.awaitUp(t)
	b.awaitUp(t)
	var took []time.Duration
	for i := range 101 {
		r := route(2, func(r *macvrf.Route) { r.Sequence = uint32(i) })
		began := time.Now()
		a.set(t, r)
		b.awaitRoutes(t, r)
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	t.Logf("from Set to Hear through a reflector: median %v, worst %v", took[len(took)/2], took[len(took)-1])
}

func TestAReflectorCountsWhatItReflects(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	counts := make(chan func(context.Context) (bgp.Count, error), 1)
	r := reflector(port, "")
	r.OnListen = func(count func(context.Context) (bgp.Count, error)) error {
		counts <- count
		return nil
	}
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { done <- r.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	count := <-counts
	want := func(want bgp.Count) {
		t.Helper()
		if have, err := count(t.Context()); err != nil || have != want {
			t.Errorf("there are %+v (%v), want %+v", have, err, want)
		}
	}
	want(bgp.Count{})
	a, b := speak(t, 2, peerAt(port, 2)), speak(t, 3, peerAt(port, 3))
	a.set(t, flood(2), route(2, nil))
	b.set(t, flood(3))
	b.awaitRoutes(t, flood(2), route(2, nil))
	a.awaitRoutes(t, flood(3))
	want(bgp.Count{Sessions: 2, Routes: 3})
	a.set(t)
	b.awaitRoutes(t)
	want(bgp.Count{Sessions: 2, Routes: 1})
}

// A reflector that is killed takes nothing with it, nor does it when it is back and knows nothing yet.
func TestAKilledReflectorTakesNothingWithIt(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	kill := startReflector(t, port, "")
	a, b := speak(t, 2, peerAt(port, 2)), speak(t, 3, peerAt(port, 3))
	a.set(t, flood(2), route(2, nil))
	b.set(t, flood(3))
	b.awaitRoutes(t, flood(2), route(2, nil))
	kill()
	b.await(t, "the session to end", func() bool { return !b.sessions[0].Up })
	late := route(2, func(r *macvrf.Route) { r.MAC[5] = 99 }) // told while it is away, and another taken back
	a.set(t, flood(2), late)
	startReflector(t, port, "")
	b.awaitRoutes(t, flood(2), late, route(2, nil))
	b.awaitRoutes(t, flood(2), late)
	if gone := b.withdrawn(); gone != 1 {
		t.Errorf("%d routes were withdrawn, want the one that was taken back meanwhile", gone)
	}
}

// With two reflectors the loss of one is not noticed.
func TestTheLossOfOneOfTwoReflectorsIsNotNoticed(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	kill := startReflector(t, port, "")
	second := netip.MustParseAddr("127.0.0.100")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	r := reflector(port, "")
	r.RouterID, r.Listen = second, netip.AddrPortFrom(second, port)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	both := func(n byte) *speaker {
		other := peerAt(port, n)
		other.Address = second
		return speak(t, n, peerAt(port, n), other)
	}
	a, b := both(2), both(3)
	a.set(t, flood(2), route(2, nil))
	a.awaitUp(t)
	b.awaitUp(t)
	b.awaitRoutes(t, flood(2), route(2, nil))
	kill()
	b.await(t, "the session to end", func() bool { return !b.sessions[0].Up })
	a.set(t, flood(2), route(2, func(r *macvrf.Route) { r.Sequence = 1 }))
	b.awaitRoutes(t, flood(2), route(2, func(r *macvrf.Route) { r.Sequence = 1 }))
	if gone := b.withdrawn(); gone > 0 {
		t.Errorf("%d routes were withdrawn", gone)
	}
}

// A daemon that restarts, in order or not, keeps its routes with the others; those that it does not tell again go.
func TestADaemonThatRestartsKeepsItsRoutes(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	startReflector(t, port, "")
	b := speak(t, 3, peerAt(port, 3))
	a := speak(t, 2, peerAt(port, 2))
	old := route(2, func(r *macvrf.Route) { r.MAC[5] = 99 })
	a.set(t, flood(2), route(2, nil), old)
	b.awaitRoutes(t, flood(2), route(2, nil), old)
	a.stop()
	if a.withdrawn() > 0 {
		t.Error("it heard that all routes are gone when it ended")
	}
	a = speak(t, 2, peerAt(port, 2))
	a.set(t, flood(2), route(2, nil))
	b.awaitRoutes(t, flood(2), route(2, nil))
	if gone := b.withdrawn(); gone != 1 {
		t.Errorf("%d routes were withdrawn, want the one that is not told any more", gone)
	}
	began := time.Now()
	a.stop()
	b.awaitRoutes(t)
	if took := time.Since(began); took < bgp.RestartTime-time.Second {
		t.Errorf("the routes of a node that has gone went after %v already", took)
	}
}

func TestAWrongPasswordOrASKeepsNobodyElseOut(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	startReflector(t, port, "secret")
	with := func(n byte, change func(*bgp.Peer)) *speaker {
		p := peerAt(port, n)
		p.Password = "secret"
		change(&p)
		return speak(t, n, p)
	}
	wrong := with(2, func(p *bgp.Peer) { p.Password = "wrong" })
	none := with(3, func(p *bgp.Peer) { p.Password = "" })
	otherAS := with(4, func(p *bgp.Peer) { p.AS = 65001 })
	nobody := speak(t, 5, peerAt(freePort(t), 5))
	right, other := with(6, func(*bgp.Peer) {}), with(7, func(*bgp.Peer) {})
	right.set(t, flood(6))
	other.awaitRoutes(t, flood(6))
	for s, word := range map[*speaker]string{otherAS: "AS 65001", wrong: "password", none: "password", nobody: "no TCP connection"} {
		s.await(t, word, func() bool { return len(s.sessions) == 1 && strings.Contains(s.sessions[0].Why, word) })
		s.mu.Lock()
		if s.sessions[0].Up || len(s.routes) > 0 || !s.partial {
			t.Errorf("%s: sessions %+v, routes %v, partial %v", s.name, s.sessions, s.routes, s.partial)
		}
		s.mu.Unlock()
	}
	// The password is put right.
	if err := wrong.SetPeers(t.Context(), []bgp.Peer{{
		Address: netip.MustParseAddr("127.0.0.1"), Port: port, AS: as, Source: netip.MustParseAddr("127.0.0.2"), Password: "secret",
	}}); err != nil {
		t.Fatal(err)
	}
	wrong.awaitRoutes(t, flood(6))
}

// A password is changed on both sides, one after the other: sessions that stand go on, and who connects has to know the new one.
func TestAPasswordChangesUnderSessions(t *testing.T) {
	t.Parallel()
	port, passwords := freePort(t), make(chan string)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	r := reflector(port, "first")
	r.Passwords = passwords
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	with := func(n byte, password string) bgp.Peer {
		p := peerAt(port, n)
		p.Password = password
		return p
	}
	a, b, early := speak(t, 2, with(2, "first")), speak(t, 3, with(3, "first")), speak(t, 4, with(4, "second"))
	a.set(t, flood(2))
	b.awaitRoutes(t, flood(2))
	early.await(t, "a word about the password", func() bool { return len(early.sessions) == 1 && strings.Contains(early.sessions[0].Why, "password") })
	passwords <- "second"
	early.awaitRoutes(t, flood(2))
	late := speak(t, 5, with(5, "first"))
	late.await(t, "a word about the password", func() bool { return len(late.sessions) == 1 && strings.Contains(late.sessions[0].Why, "password") })
	if err := late.SetPeers(t.Context(), []bgp.Peer{with(5, "second")}); err != nil {
		t.Fatal(err)
	}
	late.awaitRoutes(t, flood(2))
	if err := a.SetPeers(t.Context(), []bgp.Peer{with(2, "second")}); err != nil {
		t.Fatal(err)
	}
	a.set(t, flood(2), route(2, nil))
	b.awaitRoutes(t, flood(2), route(2, nil))
	for _, s := range []*speaker{a, b, early} {
		s.mu.Lock()
		if !s.sessions[0].Up || s.gone > 0 {
			t.Errorf("%s: session %+v, %d routes were withdrawn", s.name, s.sessions[0], s.gone)
		}
		s.mu.Unlock()
	}
}

// A session that ends after the password has changed comes back with the new one.
func TestTheNextSessionHasTheNewPassword(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	kill := startReflector(t, port, "first")
	with := func(password string) bgp.Peer {
		p := peerAt(port, 2)
		p.Password, p.IPv6VTEPs = password, true
		return p
	}
	a := speak(t, 2, with("first"))
	a.awaitUp(t)
	if err := a.SetPeers(t.Context(), []bgp.Peer{with("second")}); err != nil {
		t.Fatal(err)
	}
	kill()
	a.await(t, "the session to end", func() bool { return !a.sessions[0].Up })
	startReflector(t, port, "second")
	a.awaitUp(t)
	last := with("second")
	if at := a.Sessions()[0].Peer; at != last {
		t.Errorf("the session is with %+v", at)
	}
}

// A reflector on all addresses is reached over IPv4 and IPv6, by those who know the password alone.
func TestAReflectorOnAllAddresses(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	r := reflector(port, "secret")
	r.Listen = netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	four, six, stranger := peerAt(port, 2), peerAt(port, 3), peerAt(port, 4)
	four.Password, six.Password = "secret", "secret"
	six.Address, six.Source = netip.IPv6Loopback(), netip.Addr{}
	a, b, c := speak(t, 2, four), speak(t, 3, six), speak(t, 4, stranger)
	a.set(t, flood(2))
	b.awaitRoutes(t, flood(2))
	c.await(t, "a word about the password", func() bool { return len(c.sessions) == 1 && strings.Contains(c.sessions[0].Why, "password") })
}

// A route with an IPv6 VTEP is told only to peers that can take it; FRR 8.4 closes the session over one.
func TestRoutesWithIPv6VTEPsAreKeptFromPeersThatCannotTakeThem(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	startReflector(t, port, "")
	able := peerAt(port, 2)
	able.IPv6VTEPs = true
	a, b := speak(t, 2, peerAt(port, 2)), speak(t, 3, peerAt(port, 3))
	six := route(2, func(r *macvrf.Route) {
		r.VTEP = netip.MustParseAddr("2001:db8::2")
		r.Type, r.MAC, r.IP = macvrf.Multicast, macvrf.MAC{}, r.VTEP
	})
	a.set(t, six, flood(2))
	b.awaitRoutes(t, flood(2))
	a.set(t, six, flood(2), route(2, nil)) // the last of them has arrived, and the first would have been before
	b.awaitRoutes(t, flood(2), route(2, nil))
	if err := a.SetPeers(t.Context(), []bgp.Peer{able}); err != nil {
		t.Fatal(err)
	}
	b.awaitRoutes(t, six, flood(2), route(2, nil))
}
