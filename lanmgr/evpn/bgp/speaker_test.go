package bgp_test

import (
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

func TestLogHasNoPassword(t *testing.T) {
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

// Routes arrive at the other nodes as advertised, and are withdrawn there. No node receives its own.
func TestRoutesArriveAsAdvertised(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	startReflector(t, port, "")
	a, b := startSpeaker(t, 2, peerAt(port, 2)), startSpeaker(t, 3, peerAt(port, 3))
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
	a.set(t, flood(2), route(2, nil)) // a lower sequence is advertised, too
	b.awaitRoutes(t, flood(2), route(2, nil))
	a.set(t)
	b.awaitRoutes(t)
	a.awaitRoutes(t, flood(3))
}

func TestTimeThatARouteTakes(t *testing.T) {
	port := freePort(t)
	startReflector(t, port, "")
	a, b := startSpeaker(t, 2, peerAt(port, 2)), startSpeaker(t, 3, peerAt(port, 3))
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
	t.Logf("from Set to OnUpdate through a reflector: median %v, worst %v", took[len(took)/2], took[len(took)-1])
}

// Other nodes keep the routes of a daemon that restarts; those that it does not advertise again are withdrawn.
func TestRoutesSurviveRestartOfDaemon(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	startReflector(t, port, "")
	b := startSpeaker(t, 3, peerAt(port, 3))
	a := startSpeaker(t, 2, peerAt(port, 2))
	old := route(2, func(r *macvrf.Route) { r.MAC[5] = 99 })
	a.set(t, flood(2), route(2, nil), old)
	b.awaitRoutes(t, flood(2), route(2, nil), old)
	a.stop()
	if a.withdrawn() > 0 {
		t.Error("OnUpdate withdraws all routes at the end of Run")
	}
	a = startSpeaker(t, 2, peerAt(port, 2))
	a.set(t, flood(2), route(2, nil))
	b.awaitRoutes(t, flood(2), route(2, nil))
	if gone := b.withdrawn(); gone != 1 {
		t.Errorf("%d routes were withdrawn, want the one that is not advertised any more", gone)
	}
	began := time.Now()
	a.stop()
	b.awaitRoutes(t)
	if took := time.Since(began); took < bgp.RestartTime-time.Second {
		t.Errorf("the routes of a stopped daemon were withdrawn after only %v", took)
	}
}

// FRR 8.4 closes the session over a route with an IPv6 VTEP.
func TestIPv6VTEPsAreAdvertisedOnlyToPeersThatAcceptThem(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	startReflector(t, port, "")
	accepts := peerAt(port, 2)
	accepts.IPv6VTEPs = true
	a, b := startSpeaker(t, 2, peerAt(port, 2)), startSpeaker(t, 3, peerAt(port, 3))
	six := route(2, func(r *macvrf.Route) {
		r.VTEP = netip.MustParseAddr("2001:db8::2")
		r.Type, r.MAC, r.IP = macvrf.Multicast, macvrf.MAC{}, r.VTEP
	})
	a.set(t, six, flood(2))
	b.awaitRoutes(t, flood(2))
	a.set(t, six, flood(2), route(2, nil)) // the first would arrive before the last
	b.awaitRoutes(t, flood(2), route(2, nil))
	if err := a.SetPeers(t.Context(), []bgp.Peer{accepts}); err != nil {
		t.Fatal(err)
	}
	b.awaitRoutes(t, six, flood(2), route(2, nil))
}
