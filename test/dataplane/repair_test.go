package dataplane

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// damagedLAN is a LAN that the daemon's manager repairs while a test damages it.
type damagedLAN struct {
	node
	segment.Segment
	links *netlink.Handle // in the LAN's namespace
	pod   *host           // it is attached to spoke "pod"; spoke "waiting" is free
}

func (b damagedLAN) link(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := b.links.LinkByName(name)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return l
}

// set changes a setting of the bridge.
func (b damagedLAN) set(t *testing.T, setting, value string) {
	t.Helper()
	file := b.lanNetns(b.Segment).Sysfs(t) + "/class/net/" + b.Bridge + "/bridge/" + setting
	must(t, os.WriteFile(file, []byte(value), 0))
}

// must fails the test at once if there is an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type fault struct {
	name   string
	inject func(t *testing.T, b damagedLAN)
	// lossless means that no frame is lost.
	lossless bool
	// noEvent means that the kernel reports no event: the manager repairs it at its next observation.
	noEvent bool
}

func deletes(link func(damagedLAN) string) func(*testing.T, damagedLAN) {
	return func(t *testing.T, b damagedLAN) { must(t, b.links.LinkDel(b.link(t, link(b)))) }
}

func (b damagedLAN) bridge() string  { return b.Bridge }
func (b damagedLAN) vxlan() string   { return b.VXLAN.Name }
func (b damagedLAN) podLink() string { return b.pod.HostInterface }

func portOf(spoke string) func(damagedLAN) string {
	return func(damagedLAN) string { return segment.PortName(spoke) }
}

func plugOf(spoke string) func(damagedLAN) string {
	return func(damagedLAN) string { return segment.PlugName(spoke) }
}

// faults are changes by hand to a LAN that is built.
func faults() []fault {
	hs := []fault{
		{name: "VXLAN deleted", inject: deletes(damagedLAN.vxlan)},
		{name: "bridge deleted", inject: deletes(damagedLAN.bridge)},
		{name: "port of a waiting spoke deleted", inject: deletes(portOf("waiting")), lossless: true},
		{name: "plug of a waiting spoke deleted", inject: deletes(plugOf("waiting")), lossless: true},
		{name: "port of a pod's spoke deleted", inject: deletes(portOf("pod")), lossless: true},
		{name: "spoke's name removed from its port", lossless: true, inject: func(t *testing.T, b damagedLAN) {
			must(t, b.links.LinkDelAltName(b.link(t, segment.PortName("waiting")), "waiting"))
		}},
		{name: "spoke's name removed from a pod's link", lossless: true, inject: func(t *testing.T, b damagedLAN) {
			must(t, b.links.LinkDelAltName(b.link(t, b.podLink()), "pod"))
		}},
		{name: "another VXLAN added", lossless: true, inject: func(t *testing.T, b damagedLAN) {
			a := netlink.NewLinkAttrs()
			a.Name = "vx-other"
			must(t, b.links.LinkAdd(&netlink.Vxlan{LinkAttrs: a, VxlanId: 4711, Port: 4790}))
		}},
		{name: "name of the namespace unmounted and removed", lossless: true, inject: func(t *testing.T, b damagedLAN) {
			must(t, unix.Unmount(b.lanNetns(b.Segment).Path, unix.MNT_DETACH))
			// The repair of the first may have been faster than this.
			err := os.Remove(b.lanNetns(b.Segment).Path)
			if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOENT) {
				must(t, err)
			}
		}},
		{name: "name of the namespace unmounted", lossless: true, inject: func(t *testing.T, b damagedLAN) {
			must(t, unix.Unmount(b.lanNetns(b.Segment).Path, unix.MNT_DETACH))
		}},
		{name: "multicast snooping on", inject: func(t *testing.T, b damagedLAN) {
			b.set(t, "multicast_snooping", "1")
		}},
		{name: "STP on", inject: func(t *testing.T, b damagedLAN) { b.set(t, "stp_state", "1") }},
		{name: "IPv6 on", inject: func(t *testing.T, b damagedLAN) {
			b.lanNetns(b.Segment).Sysctl(t, "net/ipv6/conf/all/disable_ipv6", "0")
		}},
		{name: "bridge netfilter on", lossless: true, noEvent: true, inject: func(t *testing.T, b damagedLAN) {
			if !exists("/proc/sys/net/bridge") {
				return
			}
			b.lanNetns(b.Segment).Sysctl(t, "net/bridge/bridge-nf-call-iptables", "1")
		}},
		{name: "record removed", lossless: true, inject: func(t *testing.T, b damagedLAN) {
			must(t, os.Remove(b.Run+"/lan/"+b.Netns+".json"))
		}},
		{name: "record damaged", lossless: true, inject: func(t *testing.T, b damagedLAN) {
			must(t, os.WriteFile(b.Run+"/lan/"+b.Netns+".json", []byte("{"), 0o600))
		}},
	}
	for _, l := range []struct {
		what string
		name func(damagedLAN) string
		port bool
	}{
		{"bridge", damagedLAN.bridge, false},
		{"VXLAN", damagedLAN.vxlan, true},
		{"pod's link", damagedLAN.podLink, true},
		{"waiting port", portOf("waiting"), true},
		{"waiting plug", plugOf("waiting"), false},
	} {
		hs = append(hs,
			fault{name: "MTU of " + l.what, inject: func(t *testing.T, b damagedLAN) {
				must(t, b.links.LinkSetMTU(b.link(t, l.name(b)), 1300))
			}},
			fault{name: l.what + " down", inject: func(t *testing.T, b damagedLAN) {
				must(t, b.links.LinkSetDown(b.link(t, l.name(b))))
			}},
		)
		if l.port {
			hs = append(hs,
				fault{name: "group_fwd_mask of " + l.what, lossless: true, inject: func(t *testing.T, b damagedLAN) {
					must(t, b.links.LinkSetBRSlaveGroupFwdMask(b.link(t, l.name(b)), 0))
				}},
				fault{name: l.what + " out of the bridge", inject: func(t *testing.T, b damagedLAN) {
					must(t, b.links.LinkSetNoMaster(b.link(t, l.name(b))))
				}},
			)
		}
	}
	return hs
}

// After each change by hand the LAN is soon as before, and frames pass again.
func TestManagerRepairsEveryFault(t *testing.T) {
	a, b := twoNodes(t)
	m := a.manage(t)
	s := lan("broken", 91, "pod", "waiting")
	m.runs(t, a.withUnderlay(t, s))
	b.reconcile(t, b.withUnderlay(t, s))
	broken := damagedLAN{node: a, Segment: a.withUnderlay(t, s), links: a.lanNetns(s).Netlink(t)}
	broken.pod = a.attach(t, s, "pod", segment.Veth)
	far := b.attach(t, s, "waiting", segment.Veth)
	whole := describe(a.observe(t, s))
	var took []time.Duration
	for id, h := range faults() {
		t.Run(h.name, func(t *testing.T) {
			reach(t, broken.pod, far)
			var streams []*stream
			if h.lossless {
				streams = append(streams, startStream(t, uint32(2*id+10), broken.pod, far),
					startStream(t, uint32(2*id+11), far, broken.pod))
			}
			h.inject(t, broken)
			if h.noEvent {
				m.Enqueue(s.Netns)
			}
			repaired := func(have segment.State) bool { return describe(have) == whole }
			took = append(took, a.awaitState(t, s, "repair", repaired))
			for _, s := range streams {
				s.expectAll(t)
			}
			a.lanNetns(s).AwaitCarrier(t, broken.pod.HostInterface)
			broken.pod.AwaitCarrier(t, ifname)
			reach(t, broken.pod, far)
			if _, err := a.kernel.Record(s.Netns); err != nil {
				t.Errorf("record: %v", err)
			}
		})
	}
	median := logTimes(t, fmt.Sprintf("%d repairs", len(took)), took)
	if median > time.Second {
		t.Errorf("half of the repairs took more than a second")
	}
}

// reach is bothWays for a LAN that was damaged: it may have sent frames itself, even with the MAC of the other host,
// whose standing plug is on this node, too. So that host sends first, and its MAC is learned again.
func reach(t *testing.T, one, other *host) {
	t.Helper()
	for _, way := range [][2]*host{{other, one}, {one, other}} {
		frame := frames.Stream(way[1].MAC, way[0].MAC, 1, uint64(time.Now().UnixNano()))
		must(t, way[0].Send(frame))
		sent := func(got []byte) bool { return bytes.Equal(got, frame) }
		if _, err := netlab.Await(way[1], frameTimeout, sent); err != nil {
			t.Fatal(err)
		}
	}
}

// A VM's macvtap is removed with its plug, and the daemon cannot give QEMU a new one; the spoke is repaired all the
// same.
func TestSpokeIsRepairedWhenAVMsPlugIsDeleted(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	m := a.manage(t)
	s := lan("unplugged", 92, "vm", "far")
	m.runs(t, a.withUnderlay(t, s))
	b.reconcile(t, b.withUnderlay(t, s))
	fresh := describe(a.observe(t, s))
	far := b.attach(t, s, "far", segment.Veth)
	vm := a.attach(t, s, "vm", segment.Macvtap)
	bothWays(t, vm, far)
	links := a.lanNetns(s).Netlink(t)
	l, err := links.LinkByName(segment.PlugName("vm"))
	must(t, err)
	must(t, links.LinkDel(l))
	a.awaitState(t, s, "the spoke to be whole", func(have segment.State) bool { return describe(have) == fresh })
	bothWays(t, a.attach(t, s, "vm", segment.Macvtap), far)
}

// Reconciling a segment that is built changes nothing and causes no event.
func TestReconcilingABuiltSegmentChangesNothing(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	s := a.withUnderlay(t, lan("stands", 93, "pod", "vm", "waiting"))
	a.reconcile(t, s)
	a.claim(t, s, "pod", segment.Veth)
	a.claim(t, s, "vm", segment.Macvtap)
	a.reconcile(t, s)
	expectNoLinkEvents(t, a, s, func() {
		if ops := a.reconcile(t, s); len(ops) != 0 {
			t.Errorf("reconciling again did %v", ops)
		}
		restarted := a.newKernel(t)
		if ops := reconcileWith(t, restarted, s.Netns, diffTo(s)); len(ops) != 0 {
			t.Errorf("a daemon that starts did %v", ops)
		}
	})
}

// expectNoLinkEvents expects no link to change, neither in the LAN's namespace nor in the node's own, while f runs.
func expectNoLinkEvents(t *testing.T, n node, s segment.Segment, f func()) {
	t.Helper()
	places := []struct {
		netlab.Namespace
		link string // one that is up
	}{{n.lanNetns(s), s.Bridge}, {n.Namespace, netlab.UnderlayDevice}}
	done := make(chan struct{})
	defer close(done)
	var watches []<-chan netlink.LinkUpdate
	for _, place := range places {
		watches = append(watches, watchLinks(t, place.Namespace, done))
	}
	f()
	for i, place := range places {
		// A change by this test marks the end: it comes after all others.
		const end = "the end"
		links := place.Netlink(t)
		l, err := links.LinkByName(place.link)
		must(t, err)
		must(t, links.LinkSetAlias(l, end))
		for ended := false; !ended; {
			select {
			case e := <-watches[i]:
				if ended = e.Attrs().Alias == end; !ended {
					t.Errorf("%s: an event reports a change of %s: %+v", place.Path, e.Attrs().Name, e.Attrs())
				}
			case <-time.After(frameTimeout):
				t.Fatalf("%s: the event at the end does not come", place.Path)
			}
		}
	}
}

// watchLinks returns every change of a link in a namespace until done is closed.
func watchLinks(t *testing.T, place netlab.Namespace, done <-chan struct{}) <-chan netlink.LinkUpdate {
	t.Helper()
	ns, err := vnetns.GetFromPath(place.Path)
	must(t, err)
	defer ns.Close()
	events := make(chan netlink.LinkUpdate, 1024)
	must(t, netlink.LinkSubscribeAt(ns, events, done))
	return events
}
