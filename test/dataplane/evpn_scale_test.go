package dataplane

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
)

// One MAC of ten thousand changes, and only its entry is written.
func TestOneMoreMACIsOneWrite(t *testing.T) {
	t.Parallel()
	a, _, s, _ := unicastHosts(t, families["IPv4"], 431)
	s = withEVPN(s)
	a.reconcile(t, s)
	a.attach(t, s, "one", segment.Veth)
	bare := s
	vtep := families["IPv4"].vteps[1]
	for i := range 10_000 {
		s.FDB = append(s.FDB, segment.FDBEntry{MAC: [6]byte{2, 0, 0, byte(i >> 8), byte(i), 1}, VTEP: vtep})
	}
	a.reconcile(t, bare)
	began := time.Now()
	a.reconcile(t, s)
	took := time.Since(began)
	link, err := a.lanNetns(s).Netlink(t).LinkByName(s.VXLAN.Name)
	must(t, err)
	a.reconcile(t, bare)
	handle := a.lanNetns(s).Netlink(t)
	began = time.Now()
	for _, e := range s.FDB {
		must(t, handle.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_REACHABLE,
			Flags:        netlink.NTF_SELF | netlink.NTF_MASTER | netlink.NTF_EXT_LEARNED,
			HardwareAddr: e.MAC[:], IP: e.VTEP.AsSlice(),
		}))
	}
	t.Logf("10,000 MACs: %v, with bare netlink %v", took, time.Since(began))
	began = time.Now()
	if ops := a.reconcile(t, s); len(ops) > 0 {
		t.Errorf("did %v", ops)
	}
	t.Logf("observing them: %v", time.Since(began))
	s.FDB = s.FDB[:len(s.FDB)-1]
	began = time.Now()
	ops := a.reconcile(t, s)
	t.Logf("one less, with the observation: %v", time.Since(began))
	const want = "bridge fdb del 02:00:00:27:0f:01 dev vx431 dst 192.0.2.2 self; " +
		"bridge fdb del 02:00:00:27:0f:01 dev vx431 master"
	if len(ops) != 1 || ops[0].String() != want {
		t.Errorf("did %v", ops)
	}
}

// All routes of a thousand nodes with ten MACs each are imported, and a VM that moves among them is followed.
func TestThousandNodesWithTenMACsEach(t *testing.T) {
	t.Parallel()
	a, b, onA, onB := unicastHosts(t, families["IPv4"], 432)
	a.reconcile(t, withEVPN(onA))
	b.reconcile(t, withEVPN(onB))
	reflector := startReflector(t, netip.AddrPort{})
	a.startSpeaker(t, onA, 1, reflector.at)
	b.startSpeaker(t, onB, 2, reflector.at)
	here, there := a.attach(t, onA, "one", segment.Macvtap), b.attach(t, onB, "two", segment.Macvtap)

	others := bgp.NewSpeaker(bgp.Config{
		AS: 65000, RouterID: netip.MustParseAddr("127.0.0.9"), OnUpdate: func(bgp.Update) {},
		Log: slog.New(slog.DiscardHandler),
	})
	must(t, others.SetPeers(t.Context(), []bgp.Peer{{
		Address: reflector.at.Addr(), Port: reflector.at.Port(), AS: 65000, Source: netip.MustParseAddr("127.0.0.9"),
	}}))
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- others.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		must(t, <-done)
	})
	var routes []macvrf.Route
	for i := range 1000 {
		r := macvrf.Route{
			VNI: 432, VTEP: netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}),
			Targets: []macvrf.Target{macvrf.NewTarget(65000, 432)},
		}
		r.Key = macvrf.Key{Type: macvrf.Multicast, RD: macvrf.RD{1: 1, 4: byte(i >> 8), 5: byte(i), 7: 1}, IP: r.VTEP}
		routes = append(routes, r)
		for m := range byte(10) {
			r.Key = macvrf.Key{Type: macvrf.MACIP, RD: r.RD, MAC: macvrf.MAC{2, 1, m, byte(i >> 8), byte(i), 1}}
			routes = append(routes, r)
		}
	}
	began := time.Now()
	must(t, others.Set(routes))
	for _, n := range []struct {
		node
		s segment.Segment
	}{{a, onA}, {b, onB}} {
		n.awaitState(t, n.s, "all of it", func(have segment.State) bool {
			l, _ := have.Link(n.s.VXLAN.Name)
			return len(l.VXLAN.FDB) == 10_000 && len(l.VXLAN.Remotes) == 1001
		})
	}
	t.Logf("1,000 remotes and 10,000 MACs in two nodes' tables: %v", time.Since(began))

	atA, atB := a.tables(t, onA), b.tables(t, onB)
	var took []time.Duration
	for i := range byte(32) {
		mac := net.HardwareAddr{2, 0xbb, 0, 0, 1, i}
		for _, first := range []bool{true, false} {
			from, updates, vtep := here, atB, onA.VXLAN.Local
			if !first {
				from, updates, vtep = there, atA, onB.VXLAN.Local
			}
			began := time.Now()
			must(t, from.Send(frames.Stream(mac, mac, 1, 1))) // to itself: it is not flooded to a thousand remotes
			if at := awaitEntry(t, updates, mac, vtep); !first {
				took = append(took, at.Sub(began))
			}
		}
	}
	logTimes(t, "from a VM's first frame on another node to the table of the node that it left", took)
}
