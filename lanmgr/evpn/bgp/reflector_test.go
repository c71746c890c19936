package bgp_test

import (
	"context"
	"net/netip"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

func TestReflectorCountsSessionsAndRoutes(t *testing.T) {
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
			t.Errorf("counts %+v (%v), want %+v", have, err, want)
		}
	}
	want(bgp.Count{})
	a, b := startSpeaker(t, 2, peerAt(port, 2)), startSpeaker(t, 3, peerAt(port, 3))
	a.set(t, flood(2), route(2, nil))
	b.set(t, flood(3))
	b.awaitRoutes(t, flood(2), route(2, nil))
	a.awaitRoutes(t, flood(3))
	want(bgp.Count{Sessions: 2, Routes: 3})
	a.set(t)
	b.awaitRoutes(t)
	want(bgp.Count{Sessions: 2, Routes: 1})
}

// Nodes keep their routes when a reflector is killed, and when it is back and has no routes yet.
func TestRoutesSurviveRestartOfReflector(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	kill := startReflector(t, port, "")
	a, b := startSpeaker(t, 2, peerAt(port, 2)), startSpeaker(t, 3, peerAt(port, 3))
	a.set(t, flood(2), route(2, nil))
	b.set(t, flood(3))
	b.awaitRoutes(t, flood(2), route(2, nil))
	kill()
	b.await(t, "the session to end", func() bool { return !b.sessions[0].Up })
	late := route(2, func(r *macvrf.Route) { r.MAC[5] = 99 }) // advertised while it is away, and another withdrawn
	a.set(t, flood(2), late)
	startReflector(t, port, "")
	b.awaitRoutes(t, flood(2), late, route(2, nil))
	b.awaitRoutes(t, flood(2), late)
	if gone := b.withdrawn(); gone != 1 {
		t.Errorf("%d routes were withdrawn, want the one that was withdrawn meanwhile", gone)
	}
}

func TestLossOfOneOfTwoReflectorsWithdrawsNothing(t *testing.T) {
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
		return startSpeaker(t, n, peerAt(port, n), other)
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

// A reflector on all addresses accepts IPv4 and IPv6, and only nodes with the password.
func TestReflectorOnAllAddresses(t *testing.T) {
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
	four, six, noPassword := peerAt(port, 2), peerAt(port, 3), peerAt(port, 4)
	four.Password, six.Password = "secret", "secret"
	six.Address, six.Source = netip.IPv6Loopback(), netip.Addr{}
	a, b, c := startSpeaker(t, 2, four), startSpeaker(t, 3, six), startSpeaker(t, 4, noPassword)
	a.set(t, flood(2))
	b.awaitRoutes(t, flood(2))
	c.awaitDown(t, "password")
}
