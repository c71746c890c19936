package overview

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

var update = flag.Bool("update", false, "write testdata again")

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func ago(d time.Duration) metav1.Time { return metav1.NewTime(now.Add(-d)) }

// lan returns a LAN that is Ready and has two spokes.
func lan(name string, vni int32, change ...func(*v1beta1.LAN)) v1beta1.LAN {
	l := v1beta1.LAN{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: name, UID: types.UID("uid-" + name), Generation: 1,
			CreationTimestamp: ago(3 * time.Hour),
		},
		Spec: v1beta1.LANSpec{VNI: vni, Spokes: []string{name + "-1", name + "-2"}},
		Status: v1beta1.LANStatus{
			ObservedGeneration: 1, State: v1beta1.StateReady, Discovery: "multicast", Nodes: "2/2", SpokeCount: 2,
			Holds: &v1beta1.Holding{
				NS: "default." + name, VNI: vni, Port: 4789,
				Spokes: []string{name + "-1", name + "-2"},
			},
			Conditions: []metav1.Condition{
				{Type: v1beta1.ConditionAccepted, Status: metav1.ConditionTrue, Reason: v1beta1.ReasonHeld},
				{Type: v1beta1.ConditionReady, Status: metav1.ConditionTrue, Reason: v1beta1.ReasonOffered},
			},
		},
	}
	for _, c := range change {
		c(&l)
	}
	return l
}

func unready(state v1beta1.LANState, reason, conditionReason, message string) func(*v1beta1.LAN) {
	return func(l *v1beta1.LAN) {
		l.Status.State, l.Status.Reason = state, reason
		l.Status.Conditions[1] = metav1.Condition{
			Type: v1beta1.ConditionReady, Status: metav1.ConditionFalse,
			Reason: conditionReason, Message: message,
		}
	}
}

func attached(n int32) func(*v1beta1.LAN) { return func(l *v1beta1.LAN) { l.Status.Attached = n } }

func segment(lan, vtep string, attachments ...v1beta1.Attachment) v1beta1.SegmentStatus {
	return v1beta1.SegmentStatus{
		LAN: "default/" + lan, UID: types.UID("uid-" + lan), Generation: 1, NS: "default." + lan,
		State:    v1beta1.SegmentReady,
		Underlay: "eth1", VTEP: vtep, MTU: 1422, Offered: 2, Attachments: attachments,
	}
}

func pod(spoke, name string, kind v1beta1.AttachmentKind) v1beta1.Attachment {
	return v1beta1.Attachment{
		Spoke: spoke, Pod: "default/" + name, Interface: "net1", MAC: "02:6b:5c:10:00:01",
		Kind: kind, Since: ago(5 * time.Minute),
	}
}

func lanNode(name string, segments ...v1beta1.SegmentStatus) v1beta1.LANNode {
	return v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: v1beta1.LANNodeStatus{Segments: segments}}
}

func node(name string, ready corev1.ConditionStatus) corev1.Node {
	return corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Status:     corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}},
	}
}

// golden compares a text with a file in testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("have\n%s\nwant\n%s", got, want)
	}
}

func TestStatusShowsAttachmentsAndProblems(t *testing.T) {
	both := []corev1.Node{node("worker1", corev1.ConditionTrue), node("worker2", corev1.ConditionTrue)}
	missing := segment("core", "")
	missing.State, missing.Reason, missing.Underlay, missing.MTU, missing.Offered = v1beta1.SegmentNotReady,
		v1beta1.ReasonUnderlayMissing, "eth7", 0, 0
	missing.Message = `no device "eth7" (spec.vxlanDevMap.worker2). ` +
		`Create it, or change spec.vxlanDevMap; pods wait until then`
	core := lan("core", 300, unready(v1beta1.StateDegraded, v1beta1.ReasonUnderlayMissing,
		v1beta1.ReasonUnderlayMissing,
		"node worker2: "+missing.Message+"; spokes are offered on 1 of 2 nodes"))
	small := segment("lab", "fe80::2")
	small.MTU = 1322
	clash := func(l *v1beta1.LAN) {
		l.Status.Holds, l.Status.SpokeCount, l.Status.Nodes = nil, 0, "0/2"
		l.Status.Conditions[0] = metav1.Condition{
			Type: v1beta1.ConditionAccepted, Status: metav1.ConditionFalse,
			Reason:  v1beta1.ReasonConflict,
			Message: "vni 222 is held by default/lab; choose another vni, or delete default/lab",
		}
	}
	refused := func(l *v1beta1.LAN) {
		l.Status.Holds.Spokes = l.Status.Holds.Spokes[:1]
		l.Status.Spokes = []v1beta1.SpokeStatus{{Name: "edge-2", Refused: "spoke edge-2 is held by default/lab"}}
		l.Status.Conditions[0] = metav1.Condition{
			Type: v1beta1.ConditionAccepted, Status: metav1.ConditionFalse,
			Reason:  v1beta1.ReasonSpokeConflict,
			Message: "spoke edge-2 is held by default/lab; the other spokes are held",
		}
	}
	pooled := func(l *v1beta1.LAN) {
		l.Spec.SpokePools = []v1beta1.SpokePool{{Name: "web", Size: 1}}
		l.Status.Holds.Spokes, l.Status.SpokeCount = append(l.Status.Holds.Spokes, "web"), 3
		l.Status.Pools = []v1beta1.PoolStatus{{Name: "web", Attached: 3, Ports: 2}}
		l.Status.Conditions = append(l.Status.Conditions, metav1.Condition{
			Type: v1beta1.ConditionPoolExceeded, Status: metav1.ConditionTrue,
			Message: "pool web has size 1, and more pods are attached: 2 on worker1",
		})
	}
	onTwo := func(l *v1beta1.LAN) {
		l.Status.Conditions = append(l.Status.Conditions, metav1.Condition{
			Type: v1beta1.ConditionAttachedTwice, Status: metav1.ConditionTrue,
			Message: "spoke lab-1 is attached twice: default/vm-1 on worker1, default/vm-2 on worker2",
		})
	}
	well := Objects{
		LANs: []v1beta1.LAN{lan("lab", 222, attached(2))},
		LANNodes: []v1beta1.LANNode{
			lanNode("worker1", segment("lab", "fe80::1", pod("lab-1", "srl-1", v1beta1.KindVeth))),
			lanNode("worker2", segment("lab", "fe80::2", pod("lab-2", "vm-1", v1beta1.KindMacvtap))),
		},
		Nodes: both,
	}
	withSessions := func(n v1beta1.LANNode, sessions ...v1beta1.BGPSession) v1beta1.LANNode {
		n.Status.Sessions = sessions
		return n
	}
	up := v1beta1.BGPSession{Peer: "192.0.2.8:179", AS: 65000, State: v1beta1.SessionUp, Since: ago(time.Hour)}
	down := v1beta1.BGPSession{
		Peer: "192.0.2.9:179", AS: 65000, State: v1beta1.SessionDown, Since: ago(2 * time.Minute),
		Message: "it connects and sends nothing; it may not expect this node",
	}
	other := up
	other.Peer = down.Peer
	evpn := func(l *v1beta1.LAN) { l.Status.Discovery = string(v1beta1.EVPN) }
	twice := segment("lab", "192.0.2.2")
	twice.State, twice.Reason = v1beta1.SegmentDegraded, v1beta1.ReasonMACTwice
	twice.Message = "02:6b:5c:10:00:01 speaks on this node and on another: each node keeps its own. Change one of them"
	many := Objects{
		LANs:     []v1beta1.LAN{core},
		LANNodes: []v1beta1.LANNode{lanNode("worker1", segment("core", "fe80::1")), lanNode("worker2", missing)},
		Nodes:    both,
	}
	for i := range 3 {
		many.LANs = append(many.LANs, lan(fmt.Sprintf("lab%d", i), int32(i+1)))
	}
	crowd := lan("crowd", 7, func(l *v1beta1.LAN) {
		l.Status.Holds.Spokes = nil
		for i := range 500 {
			l.Status.Holds.Spokes = append(l.Status.Holds.Spokes, fmt.Sprintf("s%d", i))
		}
		l.Status.SpokeCount = 500
	})

	demanded := demanded()
	demanded.LANs = demanded.OnDemand("default")

	for _, test := range []struct {
		name    string
		screen  Screen
		objects Objects
	}{
		{name: "well", objects: well},
		{name: "well-narrow-colour", screen: Screen{Width: 60, Colour: true}, objects: well},
		{name: "underlay-missing", screen: Screen{Width: 80}, objects: Objects{
			LANs:     []v1beta1.LAN{core},
			LANNodes: []v1beta1.LANNode{lanNode("worker1", segment("core", "fe80::1")), lanNode("worker2", missing)},
			Nodes:    both,
		}},
		{name: "conflict", objects: Objects{
			LANs: []v1beta1.LAN{lan("copy", 222, unready(v1beta1.StateConflict, "vni 222 is held by default/lab",
				v1beta1.ReasonConflict, "vni 222 is held by default/lab"), clash)},
			LANNodes: well.LANNodes, Nodes: both,
		}},
		{name: "spoke-refused", objects: Objects{
			LANs: []v1beta1.LAN{lan("edge", 223, unready(v1beta1.StateDegraded, v1beta1.ReasonSpokeConflict,
				v1beta1.ReasonSpokeConflict,
				"spoke edge-2 is held by default/lab; spokes are offered on 1 of 1 nodes"), refused)},
			LANNodes: []v1beta1.LANNode{lanNode("worker1", segment("edge", "fe80::1"))}, Nodes: both[:1],
		}},
		{name: "pool-exceeded", objects: Objects{
			LANs: []v1beta1.LAN{lan("lab", 222, attached(3), pooled)},
			LANNodes: []v1beta1.LANNode{
				lanNode("worker1", segment("lab", "fe80::1", pod("web_0", "web-a", v1beta1.KindVeth),
					pod("web_1", "web-b", v1beta1.KindVeth))),
				lanNode("worker2", segment("lab", "fe80::2", pod("web_0", "web-c", v1beta1.KindVeth))),
			},
			Nodes: both,
		}},
		{name: "node-silent-and-twice", objects: Objects{
			LANs: []v1beta1.LAN{lan("lab", 222, attached(2),
				unready(v1beta1.StateDegraded, v1beta1.ReasonUnreachable, v1beta1.ReasonUnreachable,
					"node worker2 does not answer; it may still forward; spokes are offered on 1 of 2 nodes"), onTwo)},
			LANNodes: []v1beta1.LANNode{
				lanNode("worker1", segment("lab", "fe80::1", pod("lab-1", "vm-1", v1beta1.KindMacvtap))),
				lanNode("worker2", segment("lab", "fe80::2", pod("lab-1", "vm-2", v1beta1.KindMacvtap))),
			},
			Nodes: []corev1.Node{node("worker1", corev1.ConditionTrue), node("worker2", corev1.ConditionUnknown)},
		}},
		{name: "not-reported-yet", objects: Objects{
			LANs: []v1beta1.LAN{lan("new", 224, unready(v1beta1.StatePending, v1beta1.ReasonPending,
				v1beta1.ReasonPending,
				"node worker2 does not report the LAN yet; spokes are offered on 1 of 2 nodes"))},
			LANNodes: []v1beta1.LANNode{lanNode("worker1", segment("new", "fe80::1")), lanNode("worker2")}, Nodes: both,
		}},
		{name: "no-controller", objects: Objects{LANs: []v1beta1.LAN{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "lab"}, Spec: v1beta1.LANSpec{VNI: 1},
		}}}},
		{name: "mtu-differs", objects: Objects{
			LANs:     []v1beta1.LAN{lan("lab", 222)},
			LANNodes: []v1beta1.LANNode{lanNode("worker1", segment("lab", "fe80::1")), lanNode("worker2", small)},
			Nodes:    both,
		}},
		{name: "nodes-unread", objects: Objects{
			LANs: []v1beta1.LAN{lan("lab", 222, attached(1), func(l *v1beta1.LAN) {
				l.Status.Spokes = []v1beta1.SpokeStatus{{
					Name: "lab-1",
					Attachments: []v1beta1.SpokeAttachment{{
						Node:       "worker1",
						Attachment: pod("lab-1", "srl-1", v1beta1.KindVeth),
					}},
				}}
			})},
			Unreadable: []string{
				"You may not list lannodes in this cluster, so some of what they say is missing here.",
			},
		}},
		{name: "pool", objects: Objects{
			LANs: []v1beta1.LAN{lan("lab", 222, attached(1), func(l *v1beta1.LAN) {
				l.Status.Holds.Spokes = append(l.Status.Holds.Spokes, "web")
				l.Spec.SpokePools = []v1beta1.SpokePool{{Name: "web", Size: 5}}
				l.Status.SpokeCount = 7
				l.Status.Pools = []v1beta1.PoolStatus{{Name: "web", Attached: 1, Ports: 5}}
				l.Status.Conditions = append(l.Status.Conditions, metav1.Condition{
					Type: v1beta1.ConditionPoolExceeded, Status: metav1.ConditionTrue,
					Message: "pool web has 6 pods attached on worker1, one more than ports",
				})
			})},
			LANNodes: []v1beta1.LANNode{lanNode("worker1",
				segment("lab", "fe80::1", pod("web_0", "web-abc", v1beta1.KindVeth)))}, Nodes: both,
		}},
		{name: "evpn", objects: Objects{
			LANs: []v1beta1.LAN{lan("lab", 222, evpn)},
			LANNodes: []v1beta1.LANNode{
				withSessions(lanNode("worker1", segment("lab", "192.0.2.1")), up),
				withSessions(lanNode("worker2", segment("lab", "192.0.2.2")), up),
			},
			Nodes: both,
		}},
		{name: "evpn-session-down-and-mac-twice", screen: Screen{Width: 80}, objects: Objects{
			LANs: []v1beta1.LAN{lan("lab", 222, evpn,
				unready(v1beta1.StateDegraded, v1beta1.ReasonMACTwice, v1beta1.ReasonMACTwice,
					"node worker2: "+twice.Message+"; spokes are offered on 2 of 2 nodes"))},
			LANNodes: []v1beta1.LANNode{
				withSessions(lanNode("worker1", segment("lab", "192.0.2.1")), up, other),
				withSessions(lanNode("worker2", twice), up, down),
				withSessions(lanNode("worker3"), up, down), // a silent node: its sessions are left out
			},
			Nodes: append(both[:2:2], node("worker3", corev1.ConditionUnknown)),
		}},
		{name: "many-brief", screen: Screen{Brief: true}, objects: many},
		{name: "many-free-spokes", screen: Screen{Width: 80}, objects: Objects{LANs: []v1beta1.LAN{crowd}}},
		{name: "on-demand", screen: Screen{Width: 90}, objects: demanded},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.screen.Now = now
			got := test.screen.Status(test.objects)
			golden(t, test.name, got)
			if test.screen.Width > 0 && !test.screen.Colour {
				for line := range strings.Lines(got) {
					if n := len([]rune(strings.TrimRight(line, "\n"))); n > test.screen.Width {
						t.Errorf("a line has %d characters, the screen %d: %s", n, test.screen.Width, line)
					}
				}
			}
		})
	}
}

// onDemand returns a segment without a LAN object.
func onDemand(vni int32, vtep string, attachments ...v1beta1.Attachment) v1beta1.SegmentStatus {
	name := fmt.Sprint(vni)
	s := segment(name, vtep, attachments...)
	s.LAN, s.UID, s.NS, s.VNI, s.Offered, s.Generation = "megalos:"+name, "", "megalos-"+name, vni, 0, 0
	return s
}

// demanded returns two nodes with two such LANs. One of them has only pods of another namespace.
func demanded() Objects {
	blue := onDemand(5002, "192.0.2.2", v1beta1.Attachment{
		Spoke: "0a0a0a0a0a0a0a", Pod: "blue/r1", Interface: "net0",
		MAC: "02:aa:00:00:00:03", Kind: v1beta1.KindVeth, Since: ago(0),
	})
	r2 := pod("2b2b2b2b2b2b2b", "r2", v1beta1.KindVeth)
	r2.MAC = "02:6b:5c:10:00:02"
	down := onDemand(5001, "192.0.2.2", r2)
	down.State, down.Reason, down.Message = v1beta1.SegmentDegraded, v1beta1.ReasonVNITaken,
		"VNI 5001 is that of LAN default/core: frames reach no other node. Choose another vxlanId"
	return Objects{
		LANNodes: []v1beta1.LANNode{
			lanNode("worker1", segment("lab", "192.0.2.1"),
				onDemand(5001, "192.0.2.1", pod("1a1a1a1a1a1a1a", "r1", v1beta1.KindVeth))),
			lanNode("worker2", down, blue),
		},
		Nodes: []corev1.Node{node("worker1", corev1.ConditionTrue), node("worker2", corev1.ConditionTrue)},
	}
}

func TestOnDemandLANsAreFilteredByNamespace(t *testing.T) {
	for namespace, want := range map[string]string{
		"default": "megalos:5001 1/2 Degraded", "blue": "megalos:5002 1/1 Ready",
		"": "megalos:5001 1/2 Degraded, megalos:5002 1/1 Ready", "red": "",
	} {
		var have []string
		for _, l := range demanded().OnDemand(namespace) {
			have = append(have, fmt.Sprintf("%s %s %s", l.Name, l.Status.Nodes, l.Status.State))
		}
		if got := strings.Join(have, ", "); got != want {
			t.Errorf("namespace %q has %q, want %q", namespace, got, want)
		}
	}
}

func TestLANIsReadyOnlyForCurrentSpec(t *testing.T) {
	edited := lan("lab", 1, func(l *v1beta1.LAN) { l.Generation = 2 })
	deleted := lan("lab", 1, func(l *v1beta1.LAN) { at := ago(0); l.DeletionTimestamp = &at })
	for name, test := range map[string]struct {
		lans []v1beta1.LAN
		want bool
	}{
		"none":    {nil, true},
		"ready":   {[]v1beta1.LAN{lan("lab", 1)}, true},
		"edited":  {[]v1beta1.LAN{lan("lab", 1), edited}, false},
		"deleted": {[]v1beta1.LAN{deleted}, false},
		"new":     {[]v1beta1.LAN{{}}, false},
	} {
		if got := AllReady(test.lans); got != test.want {
			t.Errorf("%s: AllReady is %t, want %t", name, got, test.want)
		}
	}
}
