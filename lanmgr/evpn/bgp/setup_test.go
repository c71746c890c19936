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

// reflectorAt is the environment variable that makes the test binary a reflector, which can be killed. It has
// port/password.
const reflectorAt = "K8SLAN_TEST_REFLECTOR"

func TestMain(m *testing.M) {
	if at := os.Getenv(reflectorAt); at != "" {
		var port uint16
		var password string
		_, err := fmt.Sscanf(at, "%d/%s", &port, &password)
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) { // the password may be empty
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

var loopback = netip.MustParseAddr("127.0.0.1")

func reflector(port uint16, password string) bgp.Reflector {
	return bgp.Reflector{
		AS: as, RouterID: loopback, Listen: netip.AddrPortFrom(loopback, port), Password: password,
		Log: slog.New(slog.DiscardHandler),
	}
}

// patience is how long a test waits for a session or a route.
const patience = time.Minute

// freePort returns a port that no program listens on.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// startReflector runs a reflector as another process. kill kills it.
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

// speaker is a speaker that keeps what it has received.
type speaker struct {
	*bgp.Speaker
	name string
	stop func() // ends Run

	mu       sync.Mutex
	changed  chan struct{} // closed at the next change
	routes   map[macvrf.Key]macvrf.Route
	gone     int // how many routes were withdrawn
	sessions []bgp.Session
	lost     map[netip.Addr]string // why sessions that were up are down
	partial  bool
}

// peerAt returns the peer at a port of 127.0.0.1, for a speaker that connects from 127.0.0.n.
func peerAt(port uint16, n byte) bgp.Peer {
	return bgp.Peer{Address: loopback, Port: port, AS: as, Source: netip.AddrFrom4([4]byte{127, 0, 0, n})}
}

// startSpeaker starts a speaker whose router ID is 127.0.0.n.
func startSpeaker(t *testing.T, n byte, peers ...bgp.Peer) *speaker {
	t.Helper()
	s := &speaker{
		name: fmt.Sprintf("speaker %d", n), routes: map[macvrf.Key]macvrf.Route{}, changed: make(chan struct{}),
		lost: map[netip.Addr]string{}, partial: true,
	}
	s.Speaker = bgp.NewSpeaker(bgp.Config{
		AS: as, RouterID: netip.AddrFrom4([4]byte{127, 0, 0, n}), OnUpdate: s.update,
		Log: slog.New(slog.DiscardHandler),
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

func (s *speaker) update(u bgp.Update) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range u.Routes {
		s.routes[r.Key] = r
	}
	for _, k := range u.Withdrawn {
		delete(s.routes, k)
		s.gone++
	}
	for _, now := range u.Sessions {
		for _, before := range s.sessions {
			if before.Peer == now.Peer && before.Up && !now.Up {
				s.lost[now.Peer.Address] = now.Why
			}
		}
	}
	if u.Sessions != nil {
		s.sessions = u.Sessions
	}
	s.partial = u.Partial
	close(s.changed)
	s.changed = make(chan struct{})
}

// await waits until the condition is true. The condition is called with s.mu held.
func (s *speaker) await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		s.mu.Lock()
		ok, changed := condition(), s.changed
		s.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			s.mu.Lock()
			defer s.mu.Unlock()
			t.Fatalf("%s: waited in vain for %s; has %v, sessions %+v, partial %v",
				s.name, what, s.routes, s.sessions, s.partial)
		}
	}
}

func (s *speaker) awaitUp(t *testing.T) {
	t.Helper()
	s.await(t, "all sessions to be up", func() bool {
		return len(s.sessions) > 0 && !slices.ContainsFunc(s.sessions, func(x bgp.Session) bool { return !x.Up })
	})
}

// awaitDown waits until the only session is down with a reason that contains why.
func (s *speaker) awaitDown(t *testing.T, why string) {
	t.Helper()
	s.await(t, "the session to be down because of: "+why, func() bool {
		return len(s.sessions) == 1 && strings.Contains(s.sessions[0].Why, why)
	})
}

// awaitRoutes waits until the speaker has received these routes and no others.
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

func (s *speaker) set(t *testing.T, routes ...macvrf.Route) {
	t.Helper()
	if err := s.Set(routes); err != nil {
		t.Fatal(err)
	}
}

// withdrawn returns how many routes were withdrawn so far.
func (s *speaker) withdrawn() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gone
}

// route returns a MACIP route of node n.
func route(n byte, change func(*macvrf.Route)) macvrf.Route {
	r := macvrf.Route{
		Key: macvrf.Key{
			Type: macvrf.MACIP, RD: macvrf.RD{1: 1, 2: 127, 5: n, 7: 222}, MAC: macvrf.MAC{2, 0, 0, 0, 0, n},
		},
		VTEP: netip.AddrFrom4([4]byte{192, 0, 2, n}), VNI: 222, Targets: []macvrf.Target{macvrf.NewTarget(as, 222)},
	}
	if change != nil {
		change(&r)
	}
	return r
}

// flood returns the Multicast route of node n.
func flood(n byte) macvrf.Route {
	return route(n, func(r *macvrf.Route) { r.Type, r.MAC, r.IP = macvrf.Multicast, macvrf.MAC{}, r.VTEP })
}
