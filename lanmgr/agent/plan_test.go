package agent_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/agent"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

func device(index, mtu int) kernel.Underlay {
	return kernel.Underlay{
		Index: index, MTU: mtu, Up: true, Carrier: true,
		IPv4: netip.MustParseAddr("192.0.2.1"), IPv6: netip.MustParseAddr("fe80::1"),
		Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")},
	}
}

// worker1 returns a node with the devices eth0, which has the default route, eth1, and jumbo.
func worker1() agent.Node {
	return agent.Node{
		Name:   "worker1",
		Labels: map[string]string{"kubernetes.io/hostname": "host1", "rack": "a"},
		Underlays: kernel.Underlays{
			Default: "eth0",
			Devices: map[string]kernel.Underlay{
				"eth0":  device(2, 1500),
				"eth1":  device(3, 1500),
				"jumbo": device(4, 9000),
			},
		},
	}
}

// lab returns an admitted LAN, changed by change.
func lab(change func(*v1beta1.LAN)) *v1beta1.LAN {
	lan := &v1beta1.LAN{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "lab", UID: "uid-lab", Generation: 3},
		Spec:       v1beta1.LANSpec{VNI: 222, Spokes: []string{"vm", "srl"}},
		Status: v1beta1.LANStatus{Holds: &v1beta1.Holding{
			NS: "default.lab", VNI: 222, Port: 4789, Spokes: []string{"srl", "vm"},
		}},
	}
	if change != nil {
		change(lan)
	}
	return lan
}

func TestMinimalLANGetsDefaults(t *testing.T) {
	plan, ok := agent.NewPlan(lab(nil), worker1(), segment.Segment{})
	want := segment.Segment{
		LAN:        segment.LAN{Namespace: "default", Name: "lab", UID: "uid-lab"},
		Generation: 3,
		Netns:      "default.lab",
		Bridge:     "br222",
		MTU:        1422,
		Spokes:     []string{"srl", "vm"},
		VXLAN: segment.VXLAN{
			Name: "vx222", VNI: 222, Port: 4789, Group: netip.MustParseAddr("ff02::14"),
			Underlay: "eth0", UnderlayIndex: 2,
		},
	}
	if !ok || !plan.Segment.Equal(want) {
		t.Errorf("plan = %+v, want %+v", plan.Segment, want)
	}
	if plan.Problem != (agent.Problem{}) || plan.VTEP != netip.MustParseAddr("fe80::1") {
		t.Errorf("problem = %+v, VTEP = %v", plan.Problem, plan.VTEP)
	}
}

func TestNodeHasNothingOfALANThatIs(t *testing.T) {
	selecting := func(labels map[string]v1beta1.LabelValue) func(*v1beta1.LAN) {
		return func(l *v1beta1.LAN) { l.Spec.NodeSelector = labels }
	}
	for name, change := range map[string]func(*v1beta1.LAN){
		"not admitted":       func(l *v1beta1.LAN) { l.Status.Holds = nil },
		"being deleted":      func(l *v1beta1.LAN) { l.DeletionTimestamp = &metav1.Time{Time: metav1.Now().Time} },
		"for other nodes":    selecting(map[string]v1beta1.LabelValue{"rack": "b"}),
		"for unlabelled key": selecting(map[string]v1beta1.LabelValue{"rack": "a", "gpu": ""}),
	} {
		if plan, ok := agent.NewPlan(lab(change), worker1(), segment.Segment{}); ok {
			t.Errorf("%s: plan = %+v", name, plan)
		}
	}
	selected := lab(selecting(map[string]v1beta1.LabelValue{"rack": "a"}))
	if _, ok := agent.NewPlan(selected, worker1(), segment.Segment{}); !ok {
		t.Error("nothing is planned of a LAN that selects the node")
	}
}

func TestOnlyHeldNamesAndPortsAreBuilt(t *testing.T) {
	plan, _ := agent.NewPlan(lab(func(l *v1beta1.LAN) {
		l.Spec.Spokes = []string{"srl", "refused"}
		l.Spec.VXLANPort = 4790 // requested, not held yet
	}), worker1(), segment.Segment{})
	if got := strings.Join(plan.Segment.Spokes, " "); got != "srl" {
		t.Errorf("spokes = %q, want srl: vm is no longer requested, refused is not held", got)
	}
	if plan.Segment.VXLAN.Port != 4789 {
		t.Errorf("port = %d, want the held one", plan.Segment.VXLAN.Port)
	}
}

func TestUnderlayIsTheNodesThenTheLANsThenTheDefaultRoutes(t *testing.T) {
	devices := func(keyAndDevice ...string) map[string]v1beta1.Device {
		m := map[string]v1beta1.Device{}
		for i := 0; i < len(keyAndDevice); i += 2 {
			m[keyAndDevice[i]] = v1beta1.Device(keyAndDevice[i+1])
		}
		return m
	}
	for _, c := range []struct {
		name   string
		byNode map[string]v1beta1.Device
		common v1beta1.Device
		want   string
	}{
		{"neither", nil, "", "eth0"},
		{"the LAN's default", nil, "eth1", "eth1"},
		{"by node name", devices("worker1", "jumbo", "host1", "eth0"), "eth1", "jumbo"},
		{"by hostname label", devices("host1", "jumbo"), "eth1", "jumbo"},
		{"only other nodes'", devices("worker2", "jumbo"), "eth1", "eth1"},
	} {
		plan, _ := agent.NewPlan(lab(func(l *v1beta1.LAN) {
			l.Spec.VXLANDevMap, l.Spec.DefaultVXLANDev = c.byNode, c.common
		}), worker1(), segment.Segment{})
		if got := plan.Segment.VXLAN.Underlay; got != c.want {
			t.Errorf("%s: underlay = %q, want %q", c.name, got, c.want)
		}
	}
}

func TestMTULeavesRoomForTheVXLAN(t *testing.T) {
	for _, c := range []struct {
		name, group, underlay string
		mtu                   int32
		want                  int
		reason                string
	}{
		{"IPv6, two tags reserved", "ff02::14", "eth0", 0, 1422, ""},
		{"IPv4, two tags reserved", "239.1.1.1", "eth0", 0, 1442, ""},
		{"jumbo", "ff02::14", "jumbo", 0, 8922, ""},
		{"requested", "ff02::14", "jumbo", 1500, 1500, ""},
		{"requested, just fits IPv6", "ff02::14", "eth0", 1430, 1430, ""},
		{"requested, one too many for IPv6", "ff02::14", "eth0", 1431, 1431, v1beta1.ReasonMTUTooLarge},
		{"requested, just fits IPv4", "239.1.1.1", "eth0", 1450, 1450, ""},
		{"requested, one too many for IPv4", "239.1.1.1", "eth0", 1451, 1451, v1beta1.ReasonMTUTooLarge},
	} {
		plan, _ := agent.NewPlan(lab(func(l *v1beta1.LAN) {
			l.Spec.VXLANGroup, l.Spec.DefaultVXLANDev, l.Spec.MTU = c.group, v1beta1.Device(c.underlay), c.mtu
		}), worker1(), segment.Segment{})
		if plan.Segment.MTU != c.want || plan.Problem.Reason != c.reason {
			t.Errorf("%s: MTU %d, problem %+v; want %d, %q", c.name, plan.Segment.MTU, plan.Problem, c.want, c.reason)
		}
	}
}

func TestProblemSaysWhatIsWrongAndTheWayOut(t *testing.T) {
	change := func(name string, f func(*kernel.Underlay)) func(*agent.Node) {
		return func(n *agent.Node) {
			d := n.Underlays.Devices[name]
			f(&d)
			n.Underlays.Devices[name] = d
		}
	}
	for _, c := range []struct {
		name     string
		lan      func(*v1beta1.LAN)
		node     func(*agent.Node)
		reason   string
		blocking bool
		message  string
	}{
		{
			name:   "no such device, by the map",
			lan:    func(l *v1beta1.LAN) { l.Spec.VXLANDevMap = map[string]v1beta1.Device{"worker1": "eth7"} },
			reason: v1beta1.ReasonUnderlayMissing, blocking: true,
			message: `no device "eth7" (spec.vxlanDevMap.worker1). ` +
				`Create it, or change spec.vxlanDevMap.worker1; pods wait until then`,
		},
		{
			name:   "no such device, by the default",
			lan:    func(l *v1beta1.LAN) { l.Spec.DefaultVXLANDev = "eth7" },
			reason: v1beta1.ReasonUnderlayMissing, blocking: true,
			message: `no device "eth7" (spec.defaultVxlanDev). ` +
				`Create it, or change spec.defaultVxlanDev; pods wait until then`,
		},
		{
			name:   "no default route",
			node:   func(n *agent.Node) { n.Underlays.Default = "" },
			reason: v1beta1.ReasonUnderlayMissing, blocking: true,
			message: `no default route, and the LAN names no device for this node. ` +
				`Set spec.defaultVxlanDev or spec.vxlanDevMap.worker1; pods wait until then`,
		},
		{
			name:   "IPv6 switched off",
			node:   change("eth0", func(d *kernel.Underlay) { d.IPv6Off, d.IPv6 = true, netip.Addr{} }),
			reason: v1beta1.ReasonUnderlayNoAddress, blocking: true,
			message: `IPv6 is switched off on device "eth0", and the group ff02::14 needs it. ` +
				`Set net.ipv6.conf.eth0.disable_ipv6=0, or choose an IPv4 group in spec.vxlanGrp; ` +
				`pods wait until then`,
		},
		{
			name:   "no IPv6 address",
			node:   change("eth0", func(d *kernel.Underlay) { d.IPv6 = netip.Addr{} }),
			reason: v1beta1.ReasonUnderlayNoAddress, blocking: true,
			message: `device "eth0" has no IPv6 address, which the group ff02::14 needs; ` +
				`a link-local one is enough. Give it one, or choose an IPv4 group in spec.vxlanGrp; ` +
				`pods wait until then`,
		},
		{
			name:   "no IPv4 address",
			lan:    func(l *v1beta1.LAN) { l.Spec.VXLANGroup = "239.1.1.1" },
			node:   change("eth0", func(d *kernel.Underlay) { d.IPv4 = netip.Addr{} }),
			reason: v1beta1.ReasonUnderlayNoAddress, blocking: true,
			message: `device "eth0" has no IPv4 address, which the group 239.1.1.1 needs. ` +
				`Give it one, or choose an IPv6 group in spec.vxlanGrp; pods wait until then`,
		},
		{
			name:   "MTU too large",
			lan:    func(l *v1beta1.LAN) { l.Spec.MTU = 1500 },
			reason: v1beta1.ReasonMTUTooLarge, blocking: true,
			message: `spec.mtu 1500 and 70 bytes of VXLAN do not fit device "eth0" with MTU 1500. ` +
				`Lower spec.mtu to 1430 (1422 if frames bear two VLAN tags), or raise the device's MTU; ` +
				`pods wait until then`,
		},
		{
			name:   "an underlay too small for anything",
			node:   change("eth0", func(d *kernel.Underlay) { d.MTU = 100 }),
			reason: v1beta1.ReasonMTUTooLarge, blocking: true,
			message: `device "eth0" has MTU 100, too little for a VXLAN. ` +
				`Raise it to 146 at least; pods wait until then`,
		},
		{
			name:    "no carrier, and therefore no IPv6 address yet",
			node:    change("eth0", func(d *kernel.Underlay) { d.Carrier, d.IPv6 = false, netip.Addr{} }),
			reason:  v1beta1.ReasonUnderlayDown,
			message: `device "eth0" has no carrier: frames reach no other node. Check its cable and its peer`,
		},
		{
			name:    "down, and therefore without an IPv6 address",
			node:    change("eth0", func(d *kernel.Underlay) { d.Up, d.Carrier, d.IPv6 = false, false, netip.Addr{} }),
			reason:  v1beta1.ReasonUnderlayDown,
			message: `device "eth0" is down: frames reach no other node. Set it up`,
		},
		{
			name:   "a group that is none",
			lan:    func(l *v1beta1.LAN) { l.Spec.VXLANGroup = "10.0.0.1" },
			reason: v1beta1.ReasonBuildFailed, blocking: true,
			message: `spec.vxlanGrp: "10.0.0.1" is not a multicast address; pods wait until it is`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			here := worker1()
			if c.node != nil {
				c.node(&here)
			}
			plan, ok := agent.NewPlan(lab(c.lan), here, segment.Segment{})
			if !ok {
				t.Fatal("nothing is planned")
			}
			want := agent.Problem{Reason: c.reason, Message: c.message, Blocking: c.blocking}
			if plan.Problem != want {
				t.Errorf("problem\n%+v, want\n%+v", plan.Problem, want)
			}
			if built := plan.Segment.VXLAN.UnderlayIndex != 0; built == c.blocking {
				t.Errorf("VXLAN planned: %v, problem blocks: %v", built, c.blocking)
			}
			if plan.Segment.MTU <= 0 || plan.Segment.Bridge == "" || len(plan.Segment.Spokes) == 0 {
				t.Errorf("the rest is not planned: %+v", plan.Segment)
			}
		})
	}
}

func TestTxChecksumOfASpokeOverridesTheLANs(t *testing.T) {
	for name, test := range map[string]struct {
		lan    v1beta1.OnOff
		spokes map[string]v1beta1.SpokeOptions
		want   []string
	}{
		"not set":         {},
		"off for the LAN": {lan: v1beta1.Off, want: []string{"srl", "vm"}},
		"off, but on for a spoke": {
			lan:    v1beta1.Off,
			spokes: map[string]v1beta1.SpokeOptions{"srl": {TxChecksum: v1beta1.On}, "vm": {}},
			want:   []string{"vm"},
		},
		"off for a spoke": {
			spokes: map[string]v1beta1.SpokeOptions{
				"srl": {TxChecksum: v1beta1.Off}, "refused": {TxChecksum: v1beta1.Off},
			},
			want: []string{"srl"},
		},
	} {
		plan, _ := agent.NewPlan(lab(func(l *v1beta1.LAN) {
			l.Spec.Spokes = append(l.Spec.Spokes, "refused")
			l.Spec.TxChecksum, l.Spec.SpokeOptions = test.lan, test.spokes
		}), worker1(), segment.Segment{})
		if have := plan.Segment.TxChecksumOff; !slices.Equal(have, test.want) {
			t.Errorf("%s: off for %v, want %v", name, have, test.want)
		}
	}
}

// Pods that are attached have the old MTU. A bridge port with a smaller one would drop their frames.
func TestLANKeepsItsMTUWhileItsUnderlayIsMissing(t *testing.T) {
	here := worker1()
	delete(here.Underlays.Devices, "eth0")
	plan, _ := agent.NewPlan(lab(nil), here, segment.Segment{MTU: 8922})
	if plan.Segment.MTU != 8922 || plan.Segment.VXLAN.UnderlayIndex != 0 {
		t.Errorf("MTU %d, underlay %d; want 8922 without an underlay",
			plan.Segment.MTU, plan.Segment.VXLAN.UnderlayIndex)
	}
}

// A mistake in spec.mtu, or an underlay with a smaller MTU, must not interrupt the pods that are attached.
func TestLANWithATooLargeMTUKeepsItsVXLAN(t *testing.T) {
	before, _ := agent.NewPlan(lab(nil), worker1(), segment.Segment{})
	after, _ := agent.NewPlan(lab(func(l *v1beta1.LAN) { l.Spec.MTU = 9000 }), worker1(), before.Segment)
	if after.Segment.MTU != before.Segment.MTU || after.Segment.VXLAN != before.Segment.VXLAN {
		t.Errorf("planned %+v, want the same as before: %+v", after.Segment, before.Segment)
	}
	if after.Problem.Reason != v1beta1.ReasonMTUTooLarge || !after.Problem.Blocking {
		t.Errorf("problem = %+v", after.Problem)
	}
}

// The VXLAN is recreated at once. Kubelet would not allocate unhealthy spokes for longer than that.
func TestChangedVXLANLeavesSpokesHealthy(t *testing.T) {
	plan, _ := agent.NewPlan(lab(nil), worker1(), segment.Segment{})
	for name, c := range map[string]struct {
		built   func(*segment.VXLAN)
		healthy bool
	}{
		"another group":    {func(v *segment.VXLAN) { v.Group = netip.MustParseAddr("ff02::15") }, true},
		"another port":     {func(v *segment.VXLAN) { v.Port = 4790 }, true},
		"another underlay": {func(v *segment.VXLAN) { v.Underlay, v.UnderlayIndex = "eth1", 3 }, true},
		"no underlay":      {func(v *segment.VXLAN) { v.UnderlayIndex = 0 }, false},
	} {
		report := lanmgr.Report{Segment: plan.Segment, Built: true}
		c.built(&report.Segment.VXLAN)
		for _, spoke := range agent.Advertised([]agent.Plan{plan}, []lanmgr.Report{report}) {
			if spoke.Healthy != c.healthy {
				t.Errorf("built with %s, spoke %s is healthy: %t", name, spoke.Name, spoke.Healthy)
			}
		}
	}
}

// pooled returns a LAN with a spoke and two pools. The MACs of one of them are by ordinal.
func pooled(change func(*v1beta1.LAN)) *v1beta1.LAN {
	return lab(func(l *v1beta1.LAN) {
		l.Spec.Spokes = []string{"srl"}
		l.Spec.SpokePools = []v1beta1.SpokePool{
			{Name: "web", Size: 11},
			{Name: "db", Size: 2, MACBy: v1beta1.MACByOrdinal},
		}
		l.Status.Holds.Spokes = []string{"db", "srl", "web"}
		if change != nil {
			change(l)
		}
	})
}

// Without this source, other nodes could not send to the node; see keptSource.
func TestLANThatLeavesUnicastOverIPv6KeepsItsSource(t *testing.T) {
	vtep, other := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	for _, c := range []struct {
		name      string
		addresses []netip.Addr
		up        bool
		device    int
		want      netip.Addr
	}{
		{"an address of the device", []netip.Addr{other, vtep}, true, 2, vtep},
		{"an address that the device has lost", []netip.Addr{other}, true, 2, netip.Addr{}},
		{"an address that the device lost with its link", nil, false, 2, vtep},
		{"another device", []netip.Addr{vtep}, true, 3, netip.Addr{}},
	} {
		n, now := worker1(), segment.Segment{VXLAN: segment.VXLAN{Local: vtep, UnderlayIndex: c.device}}
		d := n.Underlays.Devices["eth0"]
		d.Addresses, d.Up = c.addresses, c.up
		n.Underlays.Devices["eth0"] = d
		if plan, _ := agent.NewPlan(lab(nil), n, now); plan.Segment.VXLAN.Local != c.want {
			t.Errorf("%s: source = %v, want %v", c.name, plan.Segment.VXLAN.Local, c.want)
		}
	}
}

func TestPoolHasOneSpokePerPort(t *testing.T) {
	plan, _ := agent.NewPlan(pooled(nil), worker1(), segment.Segment{})
	want := "db_0 db_1 srl web_0 web_1 web_10 web_2 web_3 web_4 web_5 web_6 web_7 web_8 web_9"
	if got := strings.Join(plan.Segment.Spokes, " "); got != want {
		t.Errorf("spokes are %s, want %s", got, want)
	}
	if plan.Segment.Node != "worker1" || !slices.Equal(plan.Segment.MACByOrdinal, []string{"db"}) {
		t.Errorf("node %q, by ordinal %v", plan.Segment.Node, plan.Segment.MACByOrdinal)
	}
	notHeld := pooled(func(l *v1beta1.LAN) { l.Status.Holds.Spokes = []string{"srl"} })
	plan, _ = agent.NewPlan(notHeld, worker1(), segment.Segment{})
	if got := strings.Join(plan.Segment.Spokes, " "); got != "srl" {
		t.Errorf("without a held pool the spokes are %s", got)
	}
	if plan, _ := agent.NewPlan(lab(nil), worker1(), segment.Segment{}); plan.Segment.Node != "" {
		t.Error("the segment of a LAN without pools has the node's name")
	}
}

func TestTxChecksumOfAPoolAppliesToItsPorts(t *testing.T) {
	plan, _ := agent.NewPlan(pooled(func(l *v1beta1.LAN) {
		l.Spec.SpokeOptions = map[string]v1beta1.SpokeOptions{"db": {TxChecksum: v1beta1.Off}}
	}), worker1(), segment.Segment{})
	if got := plan.Segment.TxChecksumOff; !slices.Equal(got, []string{"db_0", "db_1"}) {
		t.Errorf("off for %v, want the ports of db", got)
	}
}

func TestPoolIsAdvertisedWithItsBuiltPorts(t *testing.T) {
	before, _ := agent.NewPlan(pooled(nil), worker1(), segment.Segment{})
	report := lanmgr.Report{Segment: before.Segment, Built: true}
	for size, want := range map[int32]int{11: 11, 12: 11, 3: 3} {
		resized := pooled(func(l *v1beta1.LAN) { l.Spec.SpokePools[0].Size = size })
		plan, _ := agent.NewPlan(resized, worker1(), segment.Segment{})
		got := agent.Advertised([]agent.Plan{plan}, []lanmgr.Report{report})
		if !slices.Equal(got, []agent.Spoke{
			{Name: "db", Ports: 2, Healthy: true},
			{Name: "srl", Healthy: true},
			{Name: "web", Ports: want, Healthy: true},
		}) {
			t.Errorf("with %d ports wanted and 11 built, %v are advertised", size, got)
		}
	}
	report.Claims = []segment.Claim{
		{ID: "k1", Spoke: "srl", Kind: segment.Veth, Since: time.Now()},
		{ID: "k2", Spoke: "web_10", Kind: segment.Veth, Since: time.Now()},
	}
	seg := agent.Status([]agent.Plan{before}, []lanmgr.Report{report}, kernel.Underlays{}, nil, "").Segments[0]
	if seg.Offered != 14 || seg.Attachments[0].Pool != "" || seg.Attachments[1].Spoke != "web_10" ||
		seg.Attachments[1].Pool != "web" {
		t.Errorf("the status is %+v", seg)
	}
}
