package agent_test

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/agent"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

func unicast(l *v1beta1.LAN) { l.Spec.Discovery = v1beta1.Unicast }

// peer returns the LANNode of a node that has that many pods on a LAN.
func peer(name string, lan types.UID, vtep string, pods int) *v1beta1.LANNode {
	return &v1beta1.LANNode{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Status: v1beta1.LANNodeStatus{Segments: []v1beta1.SegmentStatus{{
			LAN: "default/lab", UID: lan, NS: "default.lab", State: v1beta1.SegmentReady, VTEP: vtep,
			Attachments: make([]v1beta1.Attachment, pods),
		}}},
	}
}

// awaitRemotes waits until these are the LAN's remotes, "unknown" for nil.
func (w *world) awaitRemotes(want string) {
	w.t.Helper()
	w.await(w.t, "remotes "+want, func() bool {
		_, segments := w.manager.wanted()
		if len(segments) != 1 {
			return false
		}
		have := []string{}
		for _, r := range segments[0].Remotes {
			have = append(have, r.String())
		}
		if segments[0].Remotes == nil {
			have = append(have, "unknown")
		}
		return strings.Join(have, " ") == want
	})
}

// peer creates or changes another node's LANNode.
func (w *world) peer(n *v1beta1.LANNode) {
	w.t.Helper()
	status := n.Status
	old := &v1beta1.LANNode{}
	if err := w.api.Get(w.t.Context(), types.NamespacedName{Name: n.Name}, old); err != nil {
		if err := w.api.Create(w.t.Context(), n); err != nil {
			w.t.Fatal(err)
		}
		old = n
	}
	old.Status = status
	if err := w.api.Status().Update(w.t.Context(), old); err != nil {
		w.t.Fatal(err)
	}
}

func TestRemotesAreTheOtherNodesWithAPodOnTheLAN(t *testing.T) {
	w := newWorld(t, lab(unicast))
	stop := w.start()
	w.awaitRemotes("")
	w.peer(peer("worker3", "uid-lab", "192.0.2.3", 1))
	w.awaitRemotes("192.0.2.3")
	w.peer(peer("worker4", "uid-other", "192.0.2.4", 1)) // another LAN
	w.peer(peer("worker5", "uid-lab", "192.0.2.5", 0))   // no pod is attached there
	w.peer(peer("worker6", "uid-lab", "2001:db8::6", 1)) // another family
	w.peer(peer("worker7", "uid-lab", "", 1))            // its underlay is missing
	w.peer(peer("worker8", "uid-lab", "192.0.2.1", 1))   // has this node's address
	w.peer(peer("worker2", "uid-lab", "192.0.2.2", 64))
	w.awaitRemotes("192.0.2.2 192.0.2.3")
	w.peer(peer("worker3", "uid-lab", "192.0.2.33", 1)) // is back with another address
	w.awaitRemotes("192.0.2.2 192.0.2.33")
	w.peer(peer("worker2", "uid-lab", "192.0.2.2", 0))
	w.awaitRemotes("192.0.2.33")
	if err := w.api.Delete(t.Context(), peer("worker3", "uid-lab", "", 1)); err != nil {
		t.Fatal(err)
	}
	w.awaitRemotes("")

	w.update(func(l *v1beta1.LAN) { l.Spec.Discovery = "" })
	w.awaitRemotes("unknown")
	stop()
}

func TestStripPeerKeepsWhatOtherNodesNeed(t *testing.T) {
	full := withUnderlay(peer("worker2", "uid-lab", "192.0.2.2", 64), "192.0.2.2")
	full.Status.Segments = append(full.Status.Segments, peer("", "uid-idle", "192.0.2.2", 0).Status.Segments...)
	full.ManagedFields, full.ResourceVersion = []metav1.ManagedFieldsEntry{{Manager: "k8slan"}}, "7"
	stripped, err := agent.StripPeer(full)
	if err != nil {
		t.Fatal(err)
	}
	have := stripped.(*v1beta1.LANNode)
	if len(have.ManagedFields) > 0 || have.Name != "worker2" || have.ResourceVersion != "7" ||
		len(have.Status.Underlays) != 2 {
		t.Errorf("the stripped LANNode is %+v", have)
	}
	want := []v1beta1.SegmentStatus{
		{UID: "uid-lab", Underlay: "eth0", VTEP: "192.0.2.2", Attachments: make([]v1beta1.Attachment, 1)},
		{UID: "uid-idle", VTEP: "192.0.2.2"},
	}
	if !reflect.DeepEqual(have.Status.Segments, want) {
		t.Errorf("the segments are %+v, want %+v", have.Status.Segments, want)
	}
}

func TestUnicastLANUsesTheUnderlaysAddress(t *testing.T) {
	with := func(change func(*kernel.Underlay)) agent.Node {
		n := worker1()
		d := n.Underlays.Devices["eth0"]
		change(&d)
		n.Underlays.Devices["eth0"] = d
		return n
	}
	global, first := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("192.0.2.1")
	bearing := func(addresses ...netip.Addr) agent.Node {
		return with(func(d *kernel.Underlay) { d.Addresses = addresses })
	}
	both, onlySix, linkLocal := bearing(global, first), bearing(global), bearing()
	known := bearing(first, netip.MustParseAddr("192.0.2.7"), global)
	known.Addresses = []netip.Addr{netip.MustParseAddr("192.0.2.7")}
	sixFirst := bearing(first, global)
	sixFirst.Addresses = []netip.Addr{global, first}
	elsewhere := bearing(first, global)
	elsewhere.Underlays.Devices["eth1"] = kernel.Underlay{
		Index:     3,
		MTU:       9000,
		Up:        true,
		Carrier:   true,
		Addresses: []netip.Addr{netip.MustParseAddr("198.51.100.1")},
	}
	byNode := elsewhere
	byNode.Addresses = []netip.Addr{netip.MustParseAddr("198.51.100.1")}
	byRange := func(ranges ...string) agent.Node {
		n := elsewhere
		for _, r := range ranges {
			n.VTEPs = append(n.VTEPs, netip.MustParsePrefix(r))
		}
		return n
	}
	const range1, range2, noRange = "2001:db8::/64", "198.51.100.0/24", "203.0.113.0/24"
	group := func(g string) func(*v1beta1.LAN) {
		return func(l *v1beta1.LAN) { unicast(l); l.Spec.VXLANGroup = g }
	}
	named := func(l *v1beta1.LAN) { unicast(l); l.Spec.DefaultVXLANDev = "eth0" }
	for name, c := range map[string]struct {
		change func(*v1beta1.LAN)
		node   agent.Node
		vtep   string
		mtu    int
		reason string
	}{
		"IPv4 first":                        {unicast, both, "192.0.2.1", 1442, ""},
		"IPv6 without IPv4":                 {unicast, onlySix, "2001:db8::1", 1422, ""},
		"IPv6 by its group":                 {group("ff02::14"), both, "2001:db8::1", 1422, ""},
		"IPv4 by its group":                 {group("239.1.1.1"), both, "192.0.2.1", 1442, ""},
		"no IPv4 for its group":             {group("239.1.1.1"), onlySix, "", 1422, v1beta1.ReasonUnderlayNoAddress},
		"link-local only":                   {unicast, linkLocal, "", 1422, v1beta1.ReasonUnderlayNoAddress},
		"the node's InternalIP":             {unicast, known, "192.0.2.7", 1442, ""},
		"the main InternalIP":               {unicast, sixFirst, "2001:db8::1", 1422, ""},
		"its InternalIP of the group's":     {group("239.1.1.1"), sixFirst, "192.0.2.1", 1442, ""},
		"the device of the InternalIP":      {unicast, byNode, "198.51.100.1", 8942, ""},
		"a device that is named":            {named, byNode, "192.0.2.1", 1442, ""},
		"an address in the range":           {unicast, byRange(range1), "2001:db8::1", 1422, ""},
		"the device in the range":           {unicast, byRange(noRange, range2), "198.51.100.1", 8942, ""},
		"the earlier range":                 {unicast, byRange(range1, range2), "2001:db8::1", 1422, ""},
		"the range before the group":        {group("ff02::14"), byRange(range2), "198.51.100.1", 8942, ""},
		"no address in the range":           {unicast, byRange(noRange), "", 1422, v1beta1.ReasonUnderlayMissing},
		"a device without one in the range": {named, byRange(range2), "", 1422, v1beta1.ReasonUnderlayNoAddress},
	} {
		t.Run(name, func(t *testing.T) {
			p, _ := agent.NewPlan(lab(c.change), c.node, segment.Segment{})
			var vtep string
			if p.VTEP.IsValid() {
				vtep = p.VTEP.String()
			}
			if vtep != c.vtep || p.Segment.VXLAN.Local != p.VTEP || p.Segment.VXLAN.Group.IsValid() || !p.Unicast {
				t.Errorf("VTEP %q, want %q: %+v", vtep, c.vtep, p.Segment.VXLAN)
			}
			if p.Segment.MTU != c.mtu || p.Problem.Reason != c.reason || p.Problem.Blocking != (c.reason != "") {
				t.Errorf("MTU %d, want %d; problem %+v, want %s", p.Segment.MTU, c.mtu, p.Problem, c.reason)
			}
		})
	}

	// A link that is down has no IPv6 address. The VXLAN stays nevertheless.
	before, _ := agent.NewPlan(lab(unicast), onlySix, segment.Segment{})
	down := with(func(d *kernel.Underlay) {
		d.IPv4, d.IPv6, d.Up, d.Carrier = netip.Addr{}, netip.Addr{}, false, false
	})
	down.VTEPs = []netip.Prefix{netip.MustParsePrefix("2001:db8::/64")} // nor does another device's address replace it
	after, _ := agent.NewPlan(lab(unicast), down, before.Segment)
	if after.Segment.VXLAN != before.Segment.VXLAN || after.Problem.Reason != v1beta1.ReasonUnderlayDown {
		t.Errorf("while the link is down: %+v, %+v; before: %+v",
			after.Segment.VXLAN, after.Problem, before.Segment.VXLAN)
	}
}

// A device loses its IPv6 addresses with its link. When they are back, they are tentative first. The VXLAN stays
// unchanged.
func TestVTEPStaysWhileItsLinkIsDown(t *testing.T) {
	four := netip.MustParseAddr("192.0.2.1")
	six, newer := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	eth0 := func(up bool, usable []netip.Addr, tentative ...netip.Addr) kernel.Underlay {
		return kernel.Underlay{
			Index:     2,
			MTU:       1500,
			Up:        true,
			Carrier:   up,
			IPv4:      four,
			Addresses: usable,
			Sources:   append(tentative, usable...),
		}
	}
	for name, known := range map[string]netip.Addr{"IPv6 is the main InternalIP": six, "it has no other": {}} {
		n := worker1()
		if known.IsValid() {
			n.Addresses = []netip.Addr{known}
		}
		others := []netip.Addr{four}
		if !known.IsValid() {
			others = nil
		}
		with6 := func(addresses ...netip.Addr) []netip.Addr { return append(addresses, others...) }
		var now segment.Segment
		for _, step := range []struct {
			name   string
			device kernel.Underlay
			vtep   netip.Addr
			reason string
		}{
			{"at first", eth0(true, with6(six)), six, ""},
			{"the carrier is lost", eth0(false, others), six, v1beta1.ReasonUnderlayDown},
			{"the carrier is back", eth0(true, others), six, v1beta1.ReasonUnderlayNoAddress},
			{"the address is tentative", eth0(true, others, six), six, ""},
			{"the address is back", eth0(true, with6(six)), six, ""},
			{"the device has a newer one, too", eth0(true, with6(newer, six)), six, ""},
			{"the device has the newer one only", eth0(true, with6(newer)), newer, ""},
		} {
			n.Underlays.Devices = map[string]kernel.Underlay{"eth0": step.device}
			if known.IsValid() && step.vtep == newer {
				n.Addresses = []netip.Addr{newer}
			}
			p, _ := agent.NewPlan(lab(unicast), n, now)
			if p.VTEP != step.vtep || p.Segment.VXLAN.UnderlayIndex != 2 || p.Problem.Reason != step.reason ||
				p.Problem.Blocking {
				t.Errorf("%s, %s: VTEP %s, want %s; %+v", name, step.name, p.VTEP, step.vtep, p.Problem)
			}
			now = p.Segment
		}
	}
}

// A change of a LAN that its underlay cannot carry does not interrupt the pods that are attached.
func TestLANThatTheUnderlayCannotCarryKeepsItsVXLAN(t *testing.T) {
	n := worker1()
	n.Underlays.Devices["eth0"] = kernel.Underlay{
		Index:   2,
		MTU:     1500,
		Up:      true,
		Carrier: true,
		IPv6:    netip.MustParseAddr("fe80::1"),
	}
	before, _ := agent.NewPlan(lab(nil), n, segment.Segment{})
	for name, change := range map[string]func(*v1beta1.LAN){
		"unicast without an address":  unicast,
		"a group of the other family": func(l *v1beta1.LAN) { l.Spec.VXLANGroup = "239.1.1.1" },
		"an MTU that does not fit":    func(l *v1beta1.LAN) { l.Spec.MTU = 9000 },
		"both unicast and too large":  func(l *v1beta1.LAN) { unicast(l); l.Spec.MTU = 9000 },
		"unicast, changed again":      func(l *v1beta1.LAN) { unicast(l); l.Generation++ },
	} {
		if p, _ := agent.NewPlan(lab(change), n, before.Segment); p.Segment.VXLAN != before.Segment.VXLAN ||
			p.Segment.MTU != 1422 ||
			!p.Problem.Blocking {
			t.Errorf("%s: %+v, MTU %d, %+v", name, p.Segment.VXLAN, p.Segment.MTU, p.Problem)
		}
		if p, _ := agent.NewPlan(lab(change), n, segment.Segment{}); p.Segment.VXLAN.UnderlayIndex != 0 {
			t.Errorf("%s, on a node without the LAN: %+v", name, p.Segment.VXLAN)
		}
	}
}

func TestInvalidVTEPsAreNoRemotes(t *testing.T) {
	w := newWorld(t, lab(unicast))
	stop := w.start()
	defer stop()
	w.awaitRemotes("") // the agent watches the other nodes
	for i, vtep := range []string{
		"239.1.1.1", "0.0.0.0", "127.0.0.1", "::", "ff02::1", "fd00::1%eth0", "169.254.0.1", "nonsense", "192.0.2.2",
	} {
		n := peer(fmt.Sprintf("worker%d", i+2), "uid-lab", vtep, 1)
		status := n.Status
		if err := w.api.Create(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		n.Status = status
		if err := w.api.Status().Update(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	w.awaitRemotes("192.0.2.2")
}

func TestDefaultDiscoveryComesFromTheStatus(t *testing.T) {
	held := func(l *v1beta1.LAN) { l.Status.Holds.Discovery = v1beta1.Unicast }
	if p, _ := agent.NewPlan(lab(held), worker1(), segment.Segment{}); !p.Unicast {
		t.Error("a LAN without spec.discovery does not have that of its status, unicast")
	}
	multicast := func(l *v1beta1.LAN) { held(l); l.Spec.Discovery = v1beta1.Multicast }
	if p, _ := agent.NewPlan(lab(multicast), worker1(), segment.Segment{}); p.Unicast {
		t.Error("a LAN with spec.discovery multicast is unicast")
	}
}

// With evpn a node is reached as with unicast, but its VXLAN does not learn. If the daemon runs no BGP, pods wait.
func TestEVPNLANIsPlannedAsUnicastWithoutLearning(t *testing.T) {
	evpn := func(l *v1beta1.LAN) { l.Spec.Discovery = v1beta1.EVPN }
	n := worker1()
	d := n.Underlays.Devices["eth0"]
	d.Addresses = []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	n.Underlays.Devices["eth0"] = d
	if p, _ := agent.NewPlan(lab(evpn), n, segment.Segment{}); !p.Problem.Blocking ||
		!strings.Contains(p.Problem.Message, "BGP") {
		t.Errorf("without BGP: %+v", p.Problem)
	}
	n.EVPN = true
	got, _ := agent.NewPlan(lab(evpn), n, segment.Segment{})
	want, _ := agent.NewPlan(lab(unicast), n, segment.Segment{})
	if want.Segment.VXLAN.NoLearning = true; !got.Segment.Equal(want.Segment) || got.VTEP != want.VTEP ||
		got.Problem != want.Problem ||
		!got.EVPN ||
		got.Unicast {
		t.Errorf("the plan is %+v, want %+v", got, want)
	}
	for _, discovery := range []func(*v1beta1.LAN){evpn, unicast} {
		l := lab(discovery)
		l.Spec.EVPN = &v1beta1.EVPNOptions{SuppressNeighbors: true}
		if p, _ := agent.NewPlan(l, n, segment.Segment{}); p.Segment.VXLAN.SuppressNeighbors != p.EVPN {
			t.Errorf("suppression %t in a LAN with evpn %t", p.Segment.VXLAN.SuppressNeighbors, p.EVPN)
		}
	}
}
