package bgp_test

import (
	"context"
	"net/netip"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
)

func TestWrongPasswordOrASAffectsNoOtherSession(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	startReflector(t, port, "secret")
	with := func(n byte, change func(*bgp.Peer)) *speaker {
		p := peerAt(port, n)
		p.Password = "secret"
		change(&p)
		return startSpeaker(t, n, p)
	}
	wrong := with(2, func(p *bgp.Peer) { p.Password = "wrong" })
	none := with(3, func(p *bgp.Peer) { p.Password = "" })
	otherAS := with(4, func(p *bgp.Peer) { p.AS = 65001 })
	closed := startSpeaker(t, 5, peerAt(freePort(t), 5))
	right, other := with(6, func(*bgp.Peer) {}), with(7, func(*bgp.Peer) {})
	right.set(t, flood(6))
	other.awaitRoutes(t, flood(6))
	for s, why := range map[*speaker]string{
		otherAS: "AS 65001", wrong: "password", none: "password", closed: "no TCP connection",
	} {
		s.awaitDown(t, why)
		s.mu.Lock()
		if s.sessions[0].Up || len(s.routes) > 0 || !s.partial {
			t.Errorf("%s: sessions %+v, routes %v, partial %v", s.name, s.sessions, s.routes, s.partial)
		}
		s.mu.Unlock()
	}
	// The password is corrected.
	if err := wrong.SetPeers(t.Context(), []bgp.Peer{{
		Address: loopback, Port: port, AS: as, Source: netip.MustParseAddr("127.0.0.2"), Password: "secret",
	}}); err != nil {
		t.Fatal(err)
	}
	wrong.awaitRoutes(t, flood(6))
}

// A password changes on both sides, one after the other: sessions that are up go on, and new ones need the new
// password.
func TestPasswordChangesWhileSessionsAreUp(t *testing.T) {
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
	a, b := startSpeaker(t, 2, with(2, "first")), startSpeaker(t, 3, with(3, "first"))
	early := startSpeaker(t, 4, with(4, "second"))
	a.set(t, flood(2))
	b.awaitRoutes(t, flood(2))
	early.awaitDown(t, "password")
	passwords <- "second"
	early.awaitRoutes(t, flood(2))
	late := startSpeaker(t, 5, with(5, "first"))
	late.awaitDown(t, "password")
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
			t.Errorf("%s: session %+v, %d routes withdrawn", s.name, s.sessions[0], s.gone)
		}
		s.mu.Unlock()
	}
}

// A session that ends after its password has changed comes up again with the new one.
func TestNextSessionHasNewPassword(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	kill := startReflector(t, port, "first")
	with := func(password string) bgp.Peer {
		p := peerAt(port, 2)
		p.Password, p.IPv6VTEPs = password, true
		return p
	}
	a := startSpeaker(t, 2, with("first"))
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
