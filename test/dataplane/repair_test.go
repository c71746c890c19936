package dataplane

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// broken is a LAN that a test does harm to, in the hands of the daemon's manager.
type broken struct {
	host
	segment.Segment
	links *netlink.Handle // in the LAN's namespace
	pod   *station        // attached to spoke "pod"; spoke "waiting" has nobody
}

func (b broken) link(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := b.links.LinkByName(name)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return l
}

// set changes a setting of the bridge.
func (b broken) set(t *testing.T, setting, value string) {
	t.Helper()
	file := b.inside(b.Segment).Sysfs(t) + "/class/net/" + b.Bridge + "/bridge/" + setting
	try(t, os.WriteFile(file, []byte(value), 0))
}

// try fails the test if harm could not be done.
func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type harm struct {
	name string
	do   func(t *testing.T, b broken)
	// frames is whether frames go on unharmed.
	frames bool
	// unseen is what the kernel tells nobody of: it is repaired when the manager next looks.
	unseen bool
}

func deleted(link func(broken) string) func(*testing.T, broken) {
	return func(t *testing.T, b broken) { try(t, b.links.LinkDel(b.link(t, link(b)))) }
}

func (b broken) bridge() string  { return b.Bridge }
func (b broken) vxlan() string   { return b.VXLAN.Name }
func (b broken) carrier() string { return b.pod.HostInterface }

func standing(spoke string) func(broken) string {
	return func(broken) string { return segment.PortName(spoke) }
}

func plug(spoke string) func(broken) string {
	return func(broken) string { return segment.PlugName(spoke) }
}

// harms is what somebody may do by hand to a LAN that stands.
func harms() []harm {
	hs := []harm{
		{name: "VXLAN deleted", do: deleted(broken.vxlan)},
		{name: "bridge deleted", do: deleted(broken.bridge)},
		{name: "port of a waiting spoke deleted", do: deleted(standing("waiting")), frames: true},
		{name: "plug of a waiting spoke deleted", do: deleted(plug("waiting")), frames: true},
		{name: "port of a pod's spoke deleted", do: deleted(standing("pod")), frames: true},
		{name: "spoke's name taken off its port", frames: true, do: func(t *testing.T, b broken) {
			try(t, b.links.LinkDelAltName(b.link(t, segment.PortName("waiting")), "waiting"))
		}},
		{name: "spoke's name taken off a pod's link", frames: true, do: func(t *testing.T, b broken) {
			try(t, b.links.LinkDelAltName(b.link(t, b.carrier()), "pod"))
		}},
		{name: "another VXLAN added", frames: true, do: func(t *testing.T, b broken) {
			a := netlink.NewLinkAttrs()
			a.Name = "vx-other"
			try(t, b.links.LinkAdd(&netlink.Vxlan{LinkAttrs: a, VxlanId: 4711, Port: 4790}))
		}},
		{name: "name of the namespace unmounted and removed", frames: true, do: func(t *testing.T, b broken) {
			try(t, unix.Unmount(b.inside(b.Segment).Path, unix.MNT_DETACH))
			// The repair of the first may have been quicker than this.
			if err := os.Remove(b.inside(b.Segment).Path); !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOENT) {
				try(t, err)
			}
		}},
		{name: "name of the namespace unmounted", frames: true, do: func(t *testing.T, b broken) {
			try(t, unix.Unmount(b.inside(b.Segment).Path, unix.MNT_DETACH))
		}},
		{name: "multicast snooping on", do: func(t *testing.T, b broken) { b.set(t, "multicast_snooping", "1") }},
		{name: "STP on", do: func(t *testing.T, b broken) { b.set(t, "stp_state", "1") }},
		{name: "IPv6 on", do: func(t *testing.T, b broken) {
			b.inside(b.Segment).Sysctl(t, "net/ipv6/conf/all/disable_ipv6", "0")
		}},
		{name: "bridge netfilter on", frames: true, unseen: true, do: func(t *testing.T, b broken) {
			if !exists("/proc/sys/net/bridge") {
				return
			}
			b.inside(b.Segment).Sysctl(t, "net/bridge/bridge-nf-call-iptables", "1")
		}},
		{name: "record removed", frames: true, do: func(t *testing.T, b broken) {
			try(t, os.Remove(b.Run+"/lan/"+b.Netns+".json"))
		}},
		{name: "record damaged", frames: true, do: func(t *testing.T, b broken) {
			try(t, os.WriteFile(b.Run+"/lan/"+b.Netns+".json", []byte("{"), 0o600))
		}},
	}
	for _, l := range []struct {
		what string
		name func(broken) string
		port bool
	}{
		{"bridge", broken.bridge, false},
		{"VXLAN", broken.vxlan, true},
		{"pod's link", broken.carrier, true},
		{"waiting port", standing("waiting"), true},
		{"waiting plug", plug("waiting"), false},
	} {
		hs = append(hs,
			harm{name: "MTU of " + l.what, do: func(t *testing.T, b broken) { try(t, b.links.LinkSetMTU(b.link(t, l.name(b)), 1300)) }},
			harm{name: l.what + " down", do: func(t *testing.T, b broken) { try(t, b.links.LinkSetDown(b.link(t, l.name(b)))) }},
		)
		if l.port {
			hs = append(hs,
				harm{name: "group_fwd_mask of " + l.what, frames: true, do: func(t *testing.T, b broken) {
					try(t, b.links.LinkSetBRSlaveGroupFwdMask(b.link(t, l.name(b)), 0))
				}},
				harm{name: l.what + " out of the bridge", do: func(t *testing.T, b broken) { try(t, b.links.LinkSetNoMaster(b.link(t, l.name(b)))) }},
			)
		}
	}
	return hs
}

// Whatever somebody does by hand, the LAN is soon as it would be if nobody had, and frames pass again.
func TestManagerRepairsWhateverSomebodyBreaks(t *testing.T) {
	a, b := hosts(t)
	m := a.manage(t)
	s := lan("broken", 91, "pod", "waiting")
	m.runs(t, a.here(t, s))
	b.build(t, b.here(t, s))
	broken := broken{host: a, Segment: a.here(t, s), links: a.inside(s).Netlink(t)}
	broken.pod = a.attach(t, s, "pod", segment.Veth)
	far := b.attach(t, s, "waiting", segment.Veth)
	whole := describe(a.observe(t, s))
	var took []time.Duration
	for id, h := range harms() {
		t.Run(h.name, func(t *testing.T) {
			reach(t, broken.pod, far)
			var streams []*stream
			if h.frames {
				const length = rate / 4
				streams = append(streams, startStream(t, uint32(2*id+10), length, broken.pod, far), startStream(t, uint32(2*id+11), length, far, broken.pod))
			}
			h.do(t, broken)
			if h.unseen {
				m.Enqueue(s.Netns)
			}
			took = append(took, a.awaitState(t, s, "repair", func(have segment.State) bool { return describe(have) == whole }))
			for _, s := range streams {
				s.expectAll(t)
			}
			a.inside(s).AwaitCarrier(t, broken.pod.HostInterface)
			broken.pod.AwaitCarrier(t, ifname)
			reach(t, broken.pod, far)
			if _, err := a.kernel.Record(s.Netns); err != nil {
				t.Errorf("record: %v", err)
			}
		})
	}
	slices.Sort(took)
	t.Logf("%d repairs, the middle one within %v, the longest within %v", len(took), took[len(took)/2], took[len(took)-1])
	if took[len(took)/2] > time.Second {
		t.Errorf("half of the repairs took more than a second")
	}
}

// reach is bothWays for a LAN that was harmed: it may have spoken for itself, even with the address of the other
// station, whose standing plug is here, too. So that speaks first, and is known to be there again.
func reach(t *testing.T, one, other *station) {
	t.Helper()
	for _, way := range [][2]*station{{other, one}, {one, other}} {
		frame := frames.Stream(way[1].MAC, way[0].MAC, 1, uint64(time.Now().UnixNano()))
		try(t, way[0].Send(frame))
		if _, err := netlab.Await(way[1], patience, func(got []byte) bool { return bytes.Equal(got, frame) }); err != nil {
			t.Fatal(err)
		}
	}
}

// A VM's macvtap goes with its plug, and no daemon can give QEMU a new one; the spoke is whole again all the same.
func TestSpokeIsRepairedWhenAVMsPlugIsDeleted(t *testing.T) {
	a, b := hosts(t)
	m := a.manage(t)
	s := lan("unplugged", 92, "vm", "far")
	m.runs(t, a.here(t, s))
	b.build(t, b.here(t, s))
	fresh := describe(a.observe(t, s))
	far := b.attach(t, s, "far", segment.Veth)
	vm := a.attach(t, s, "vm", segment.Macvtap)
	bothWays(t, vm, far)
	links := a.inside(s).Netlink(t)
	l, err := links.LinkByName(segment.PlugName("vm"))
	try(t, err)
	try(t, links.LinkDel(l))
	a.awaitState(t, s, "the spoke to be whole", func(have segment.State) bool { return describe(have) == fresh })
	bothWays(t, a.attach(t, s, "vm", segment.Macvtap), far)
}

// What stands is left alone: looking again changes nothing, and sends no event to anybody who watches.
func TestSegmentThatStandsIsLeftAlone(t *testing.T) {
	a, _ := hosts(t)
	s := a.here(t, lan("stands", 93, "pod", "vm", "waiting"))
	a.build(t, s)
	a.claim(t, s, "pod", segment.Veth)
	a.claim(t, s, "vm", segment.Macvtap)
	a.build(t, s)
	expectStill(t, a, s, func() {
		if ops := a.build(t, s); len(ops) != 0 {
			t.Errorf("looking again did %v", ops)
		}
		restarted := a.start(t)
		if ops := reconcile(t, restarted, s.Netns, func(have segment.State) []segment.Op { return segment.Diff(s, have) }); len(ops) != 0 {
			t.Errorf("a daemon that starts again did %v", ops)
		}
	})
}

// expectStill wants no link to change, neither in the LAN's namespace nor in the node's own, while f runs.
func expectStill(t *testing.T, h host, s segment.Segment, f func()) {
	t.Helper()
	places := []struct {
		netlab.Namespace
		link string // of those that are up
	}{{h.inside(s), s.Bridge}, {h.Namespace, netlab.UnderlayDevice}}
	done := make(chan struct{})
	defer close(done)
	var watches []<-chan netlink.LinkUpdate
	for _, place := range places {
		watches = append(watches, watchLinks(t, place.Namespace, done))
	}
	f()
	for i, place := range places {
		// The end is marked by a change of our own, which comes after all others.
		const end = "the end"
		links := place.Netlink(t)
		l, err := links.LinkByName(place.link)
		try(t, err)
		try(t, links.LinkSetAlias(l, end))
		for ended := false; !ended; {
			select {
			case e := <-watches[i]:
				if ended = e.Attrs().Alias == end; !ended {
					t.Errorf("%s: a change of %s was announced: %+v", place.Path, e.Attrs().Name, e.Attrs())
				}
			case <-time.After(patience):
				t.Fatalf("%s: the watch doesn't see its end", place.Path)
			}
		}
	}
}

// watchLinks hears of every change of a link in a namespace until done is closed.
func watchLinks(t *testing.T, place netlab.Namespace, done <-chan struct{}) <-chan netlink.LinkUpdate {
	t.Helper()
	ns, err := vnetns.GetFromPath(place.Path)
	try(t, err)
	defer ns.Close()
	events := make(chan netlink.LinkUpdate, 1024)
	try(t, netlink.LinkSubscribeAt(ns, events, done))
	return events
}
