package dataplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/cni"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// megalos is a network as Kathará configures it.
func megalos(name string, vni uint32) keys {
	return keys{
		"cniVersion": "0.3.0", "name": name, "type": "megalos",
		"suffix": name, "vxlanId": vni, "master": netlab.UnderlayDevice,
	}
}

// onDemandSegment is the segment that a node has for a VNI, as far as tests name its parts.
func onDemandSegment(vni uint32) segment.Segment {
	return segment.Segment{
		Netns: fmt.Sprintf("megalos-%d", vni), Bridge: fmt.Sprintf("br%d", vni),
		VXLAN: segment.VXLAN{Name: fmt.Sprintf("vx%d", vni), VNI: vni},
	}
}

// startOnDemandDaemon starts the daemon's part for segments without a LAN object: those with a pod are kept and join
// EVPN. The number is that of the node.
func (n node) startOnDemandDaemon(t *testing.T, number byte, reflector netip.AddrPort) *speaker {
	t.Helper()
	source := netip.AddrFrom4([4]byte{127, 0, 0, 1 + number})
	m := n.manage(t)
	fab := evpn.New(evpn.Config{
		AS: 65000, RouterID: source, Kernel: watch.New(m.daemon), Log: slog.New(slog.DiscardHandler),
		Peers: []bgp.Peer{{
			Address: reflector.Addr(), Port: reflector.Port(), AS: 65000, Source: source, IPv6VTEPs: true,
		}},
	})
	m.Set(nil)
	ctx, cancel := context.WithCancel(context.Background())
	var tasks sync.WaitGroup
	tasks.Go(func() {
		if err := fab.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	tasks.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-fab.Changed():
			case <-m.Changed():
				lans := map[string]macvrf.LAN{}
				for _, r := range m.Reports() {
					lan := macvrf.LAN{VNI: r.Segment.VXLAN.VNI, VTEP: r.Segment.VXLAN.Local, Claimed: len(r.Claims) > 0}
					for _, c := range r.Claims {
						lan.Attached = append(lan.Attached, macvrf.MAC(c.MAC))
					}
					if !r.Leaving {
						lans[r.Segment.Netns] = lan
					}
				}
				fab.Set(lans)
			}
			var want []segment.Segment
			for _, r := range m.Reports() {
				if s := r.Segment.Recorded(); s.OnDemand && len(r.Claims) > 0 {
					fab.Fill(&s)
					want = append(want, s)
				}
			}
			m.Set(want)
		}
	})
	sp := &speaker{managed: m, instance: fab, end: sync.OnceFunc(func() {
		cancel()
		tasks.Wait()
		m.stop()
	})}
	t.Cleanup(sp.end)
	return sp
}

// attachToVNI attaches an interface of a pod, with a MAC, and opens it.
func (s sandbox) attachToVNI(t *testing.T, lan segment.Segment, config keys) netlab.Wire {
	t.Helper()
	out := s.mustCall(t, "ADD", config)
	var result struct {
		CNIVersion string
		Interfaces []struct{ Name, MAC, Sandbox string }
	}
	if err := json.Unmarshal(out, &result); err != nil || len(result.Interfaces) != 2 || result.CNIVersion != "0.3.0" {
		t.Fatalf("ADD returned %s", out)
	}
	if got := result.Interfaces[1]; got.Name != s.ifname || got.MAC != s.mac || got.Sandbox != s.Path {
		t.Fatalf("attached as %+v, requested were %s and %s", got, s.mac, s.ifname)
	}
	s.AwaitCarrier(t, s.ifname)
	s.node.lanNetns(lan).AwaitCarrier(t, result.Interfaces[0].Name)
	return s.Open(t, s.ifname)
}

// awaitNothing waits until the daemon has removed all segments, and expects that nothing is left on the node.
func (sp *speaker) awaitNothing(t *testing.T) {
	t.Helper()
	sp.awaitReports(t, "nothing", func(r []lanmgr.Report) bool { return len(r) == 0 })
	expectNothing(t, sp.node)
}

// Two networks and three pods on two nodes, as Kathará makes them: the LANs are separate, MACs are as requested, and
// with the last pod everything is removed. A pod can attach while the daemon does not run.
func TestKatharaPodsConnectByVNI(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	f := families["IPv4"]
	a.addUnderlayAddress(t, netip.PrefixFrom(f.vteps[0], f.bits))
	b.addUnderlayAddress(t, netip.PrefixFrom(f.vteps[1], f.bits))
	reflector := startReflector(t, netip.AddrPort{})
	onA := a.startOnDemandDaemon(t, 1, reflector.at)
	onB := b.startOnDemandDaemon(t, 2, reflector.at)
	red, blue := megalos("katlab-a", 5001), megalos("katlab-b", 70002)

	r1red, r2, r3 := a.sandbox(t), b.sandbox(t), b.sandbox(t)
	r1blue := r1red
	r1blue.ifname = "net2"
	r1red.mac, r1blue.mac = "02:aa:00:00:00:01", "02:aa:00:00:00:02"
	r2.mac, r3.mac = "02:aa:00:00:00:03", "02:aa:00:00:00:04"
	onRed := r1red.attachToVNI(t, onDemandSegment(5001), red)
	onBlue := r1blue.attachToVNI(t, onDemandSegment(70002), blue)
	farRed, farBlue := r2.attachToVNI(t, onDemandSegment(5001), red), r3.attachToVNI(t, onDemandSegment(70002), blue)
	knows := func(h node, vni uint32, macs int) {
		t.Helper()
		h.awaitState(t, onDemandSegment(vni), "the other node's pods", func(have segment.State) bool {
			l, _ := have.Link(onDemandSegment(vni).VXLAN.Name)
			return len(l.VXLAN.Remotes) == min(macs, 1) && len(l.VXLAN.FDB) == macs
		})
	}
	for _, h := range []node{a, b} {
		knows(h, 5001, 1)
		knows(h, 70002, 1)
	}
	mac := func(text string) net.HardwareAddr {
		m, err := net.ParseMAC(text)
		must(t, err)
		return m
	}
	talk := func() {
		t.Helper()
		crosses(t, onRed, farRed, frames.Stream(nil, mac(r1red.mac), 1, 1))
		crosses(t, farRed, onRed, frames.Stream(nil, mac(r2.mac), 1, 2))
		crosses(t, farBlue, onBlue, frames.Stream(nil, mac(r3.mac), 1, 3))
		// Each pod receives frames of its own LAN only: the next frame is the one that was sent to it.
		crosses(t, onBlue, farBlue, frames.Stream(nil, mac(r1blue.mac), 1, 4))
	}
	talk()

	onA.end()
	r4 := a.sandbox(t)
	r4.mac = "02:aa:00:00:00:05"
	late := r4.attachToVNI(t, onDemandSegment(5001), red)
	crosses(t, late, onRed, frames.Stream(mac(r1red.mac), mac(r4.mac), 1, 5))
	talk()
	onA = a.startOnDemandDaemon(t, 1, reflector.at)
	knows(b, 5001, 2)
	talk()
	r4.mustCall(t, "DEL", red)
	knows(b, 5001, 1)
	talk()

	for s, config := range map[*sandbox]keys{&r1red: red, &r1blue: blue, &r2: red, &r3: blue} {
		s.mustCall(t, "DEL", config)
		s.mustCall(t, "DEL", config)
	}
	onA.awaitNothing(t)
	onB.awaitNothing(t)

	for range 10 { // another pod attaches right after the last one was detached
		r1red.attachToVNI(t, onDemandSegment(5001), red).Close()
		r1red.mustCall(t, "DEL", red)
	}
	lost := a.sandbox(t)
	lost.mac = "02:aa:00:00:00:06"
	lost.attachToVNI(t, onDemandSegment(5001), red)
	r2.attachToVNI(t, onDemandSegment(5001), red)
	knows(a, 5001, 1)
	knows(b, 5001, 1)
	link, err := lost.Netlink(t).LinkByName(lost.ifname)
	must(t, err)
	must(t, lost.Netlink(t).LinkDel(link)) // as when the pod's namespace is removed without DEL
	onA.awaitNothing(t)
	knows(b, 5001, 0)
	r2.mustCall(t, "DEL", red)
	onB.awaitNothing(t)
}

// A segment that is removed and made again between two observations is watched and its MACs are read; the old namespace
// is closed.
func TestRecreatedVNIIsWatched(t *testing.T) {
	h := addNode(t, netlab.NewUnderlay(t, underlayMTU), "worker1")
	h.addUnderlayAddress(t, netip.PrefixFrom(families["IPv4"].vteps[0], 24))
	red, s, pod, daemon := megalos("red", 5006), onDemandSegment(5006), h.sandbox(t), h.newKernel(t)
	pod.mac = "02:aa:00:00:00:01"
	join := func() (wire netlab.Wire, namespace string) {
		t.Helper()
		wire = pod.attachToVNI(t, s, red)
		var st unix.Stat_t
		must(t, unix.Stat(h.lanNetns(s).Path, &st))
		return wire, fmt.Sprintf("net:[%d]", st.Ino)
	}
	shown, recreated := make(chan netip.Addr, 100), make(chan struct{}, 1)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- watch.New(daemon).WatchBindings(ctx, s.Netns, watch.BindingEvents{
			Bound: func(_ [6]byte, ip netip.Addr) {
				select {
				case shown <- ip:
				default: // the test needs no more
				}
			},
			Recreated: func() { recreated <- struct{}{} },
		})
	}()
	shows := func(wire netlab.Wire, address string) {
		t.Helper()
		again := time.NewTicker(50 * time.Millisecond) // snooping begins some time after the observation
		defer again.Stop()
		for deadline := time.After(daemonTimeout); ; {
			must(t, wire.Send(arp(1, broadcast, net.HardwareAddr{2, 0xaa, 0, 0, 0, 1}, address, address)))
			select {
			case ip := <-shown:
				if ip.String() == address {
					return
				}
			case <-again.C:
			case <-deadline:
				t.Fatalf("%s was not snooped", address)
			}
		}
	}
	observe := func() {
		t.Helper()
		_, err := daemon.Observe(t.Context(), s.Netns)
		must(t, err)
	}
	wire, old := join()
	observe()
	shows(wire, "10.0.0.1")
	pod.mustCall(t, "DEL", red)
	wire, now := join()
	if old == now {
		t.Fatalf("both namespaces are %s", now)
	}
	observe()
	select {
	case <-recreated:
	case <-time.After(daemonTimeout):
		t.Fatal("the recreated segment is not reported")
	}
	shows(wire, "10.0.0.2")
	macs, err := daemon.LocalMACs(s.Netns)
	must(t, err)
	if len(macs) != 1 || macs[0] != [6]byte{2, 0xaa, 0, 0, 0, 1} {
		t.Errorf("the LAN has the MACs %x", macs)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && to == old {
			t.Errorf("the old namespace %s is still open", old)
		}
	}
	stop()
	must(t, <-ended)
	pod.mustCall(t, "DEL", red)
}

// Without a daemon the plugin builds the segment, attaches pods to it, and removes it.
func TestOnDemandSegmentNeedsNoDaemon(t *testing.T) {
	t.Parallel()
	h := addNode(t, netlab.NewUnderlay(t, underlayMTU), "worker1")
	h.addUnderlayAddress(t, netip.PrefixFrom(families["IPv4"].vteps[0], 24))
	red := megalos("red", 5003)
	one, two := h.sandbox(t), h.sandbox(t)
	one.mac, two.mac = "02:aa:00:00:00:01", "02:aa:00:00:00:02"
	status := maps.Clone(red)
	status["cniVersion"] = "1.1.0"
	one.mustCall(t, "STATUS", status)
	here, there := one.attachToVNI(t, onDemandSegment(5003), red), two.attachToVNI(t, onDemandSegment(5003), red)
	src := net.HardwareAddr{2, 0xaa, 0, 0, 0, 1}
	crosses(t, here, there, frames.Stream(nil, src, 1, 1))
	one.mustCall(t, "DEL", red)
	if have := h.observe(t, onDemandSegment(5003)); len(have.Claims()) != 1 {
		t.Errorf("after the first DEL the claims are %v", have.Claims())
	}
	two.mustCall(t, "DEL", red)
	expectNothing(t, h)
}

// The VNI of a LAN object is that LAN: open to the LAN's own namespace and to those that the LAN allows.
func TestVNIOfALANIsThatLAN(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	a.addUnderlayAddress(t, netip.PrefixFrom(families["IPv4"].vteps[0], 24))
	for _, owner := range []string{"default", "other"} {
		s := a.withUnderlay(t, lan("owned-"+owner, 5004, "srl"))
		s.LAN.Namespace = owner
		m := a.manage(t)
		m.runs(t, s)
		pod := a.sandbox(t)
		pod.mac = "02:aa:00:00:00:01"
		config := megalos("red", 5004)
		if owner == "other" {
			pod.mustFail(t, "ADD", config, cni.CodeForbidden,
				"VNI 5004 belongs to LAN other/owned-other, which is not open to namespace")
			s.AllowedNamespaces = []string{"default"}
			m.runs(t, s)
		}
		spoke := a.attach(t, s, "srl", segment.Veth)
		wire := pod.attachToVNI(t, s, config)
		crosses(t, wire, spoke, frames.Stream(nil, net.HardwareAddr{2, 0xaa, 0, 0, 0, 1}, 1, 1))
		m.Enqueue(s.Netns)
		m.awaitReports(t, "two claims", func(r []lanmgr.Report) bool {
			return len(r) == 1 && len(r[0].Claims) == 2 && r[0].Built
		})
		m.Set(nil)
		m.awaitReports(t, "leaving", func(r []lanmgr.Report) bool {
			return len(r) == 1 && r[0].Leaving && r[0].Built
		})
		late := a.sandbox(t)
		late.mac = "02:aa:00:00:00:02"
		late.mustFail(t, "ADD", config, types.ErrTryAgainLater, "which is leaving this node")
		crosses(t, wire, spoke, frames.Stream(nil, net.HardwareAddr{2, 0xaa, 0, 0, 0, 1}, 1, 2))
		m.runs(t, s)
		late.attachToVNI(t, s, config)
		late.mustCall(t, "DEL", config)
		pod.mustCall(t, "DEL", config)
		a.release(t, spoke)
		a.awaitState(t, s, "the LAN to be as it was", func(have segment.State) bool {
			return len(have.Claims()) == 0 && len(segment.Diff(s, have)) == 0
		})
		m.Set(nil)
		m.awaitReports(t, "no segment", func(r []lanmgr.Report) bool { return len(r) == 0 })
		m.stop()
	}
}

// Wherever ADD or DEL is killed, the next pod attaches, and after the last DEL nothing is left; with a daemon or
// without.
func TestOnDemandPluginKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	for _, verb := range []string{"ADD", "DEL"} {
		t.Run(verb, func(t *testing.T) {
			t.Parallel()
			h := addNode(t, netlab.NewUnderlay(t, underlayMTU), "worker1")
			h.addUnderlayAddress(t, netip.PrefixFrom(families["IPv4"].vteps[0], 24))
			config := megalos("red", 5005)
			for at := 0; ; at++ {
				h.kernel.Close()
				h.kernel = h.newKernel(t)
				first, next := h.sandbox(t), h.sandbox(t)
				first.mac, next.mac = "02:aa:00:00:00:01", "02:aa:00:00:00:02"
				if verb == "DEL" {
					first.mustCall(t, "ADD", config)
				}
				cmd, err := first.command(verb)
				must(t, err)
				steps, killed := killCase{node: h, cmd: cmd, stdin: config}.run(t, at)
				if at%2 == 1 { // a daemon starts where the plugin was killed
					m := h.manage(t)
					m.Set(nil)
					m.awaitReports(t, "the first observations", func([]lanmgr.Report) bool { return m.Observed() })
					m.stop()
				}
				wire := next.attachToVNI(t, onDemandSegment(5005), config)
				wire.Close()
				if have := h.observe(t, onDemandSegment(5005)); at%2 == 0 {
					if ops := segment.Diff(*have.Record, have); len(ops) != 0 {
						t.Errorf("not built: %v", ops)
					}
				}
				first.mustCall(t, "DEL", config)
				next.mustCall(t, "DEL", config)
				expectNothing(t, h)
				if t.Failed() || !killed {
					t.Logf("step %d of %v", at, steps)
					return
				}
			}
		})
	}
}
