package controller

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// worker returns a node that answers and reports the segments.
func worker(name string, segments ...v1beta1.SegmentStatus) node {
	return node{Name: name, Exists: true, Answers: true, Segments: segments}
}

// segment returns a Ready segment of LAN default/lab that offers that many spokes.
func segment(offered int32, attachments ...v1beta1.Attachment) v1beta1.SegmentStatus {
	return v1beta1.SegmentStatus{
		LAN: "default/lab", UID: "uid-lab", Generation: 1, NS: "default.lab",
		State: v1beta1.SegmentReady, Offered: offered, Attachments: attachments,
	}
}

func unwell(state v1beta1.SegmentState, reason, message string) v1beta1.SegmentStatus {
	seg := segment(0)
	if state == v1beta1.SegmentDegraded {
		seg = segment(2)
	}
	seg.State, seg.Reason, seg.Message = state, reason, message
	return seg
}

// outdated returns the segment as it was before the last change of the spec.
func outdated(seg v1beta1.SegmentStatus) v1beta1.SegmentStatus {
	seg.Generation--
	return seg
}

func pod(spoke, name string) v1beta1.Attachment {
	return v1beta1.Attachment{
		Spoke: spoke, Pod: "default/" + name, Interface: "net1", MAC: "02:00:00:00:00:01",
		Kind: v1beta1.KindVeth, Since: epoch,
	}
}

func TestStatusReportsAttachmentsAndProblems(t *testing.T) {
	two := &v1beta1.Holding{NS: "default.lab", VNI: 222, Port: 4789, Spokes: []string{"srl", "vm"}}
	held := decision{Holds: two}
	for _, test := range []struct {
		name     string
		decision decision
		nodes    []node
		foreign  []string

		state          v1beta1.LANState
		reason, onNode string
		attached       int32
		accepted       string // message
		ready          string // reason: message
	}{
		{
			name: "all well", decision: held, nodes: []node{
				worker("worker1", segment(2, pod("srl", "srl-1"))),
				worker("worker2", segment(2)),
			},
			state: "Ready", onNode: "2/2", attached: 1,
			accepted: "holds ns default.lab, vni 222 and its spokes",
			ready:    "Offered: spokes are offered on 2 of 2 nodes",
		},
		{
			name: "one node without the underlay", decision: held,
			nodes: []node{
				worker("worker1", segment(2)),
				worker("worker2", unwell("NotReady", "UnderlayMissing",
					`no device "eth7" (spec.vxlanDevMap.worker2)`)),
			},
			state: "Degraded", reason: "UnderlayMissing", onNode: "1/2",
			accepted: "holds ns default.lab, vni 222 and its spokes",
			ready: `UnderlayMissing: node worker2: no device "eth7" (spec.vxlanDevMap.worker2); ` +
				`spokes are offered on 1 of 2 nodes`,
		},
		{
			name: "an underlay without carrier is degraded but offered", decision: held,
			nodes: []node{
				worker("worker1", segment(2)),
				worker("worker2", unwell("Degraded", "UnderlayDown", "eth1 has no carrier")),
			},
			state: "Degraded", reason: "UnderlayDown", onNode: "1/2",
			accepted: "holds ns default.lab, vni 222 and its spokes",
			ready:    "UnderlayDown: node worker2: eth1 has no carrier; spokes are offered on 2 of 2 nodes",
		},
		{
			name: "a node with an older generation", decision: held,
			nodes: []node{worker("worker1", segment(2)), worker("worker2", outdated(segment(2)))},
			state: "Pending", reason: "Pending", onNode: "1/2",
			accepted: "holds ns default.lab, vni 222 and its spokes",
			ready:    "Pending: node worker2 is still applying the last change; spokes are offered on 2 of 2 nodes",
		},
		{
			name: "no report yet", decision: held,
			nodes: []node{
				worker("worker1"), worker("worker2", segment(1)),
				worker("worker3", unwell("NotReady", "", "is being built")),
			},
			state: "Pending", reason: "Pending", onNode: "0/3",
			accepted: "holds ns default.lab, vni 222 and its spokes",
			ready: "Pending: node worker1 does not report the LAN yet; node worker2 offers 1 of 2 spokes so far; " +
				"node worker3 is still building the LAN; spokes are offered on 0 of 3 nodes",
		},
		{
			name: "no node at all", decision: held, state: "Pending", reason: "NoNodes", onNode: "0/0",
			accepted: "holds ns default.lab, vni 222 and its spokes",
			ready:    "NoNodes: no node runs k8slan; spokes are offered on 0 of 0 nodes",
		},
		{
			name: "a node that is lost", decision: held,
			nodes: []node{
				worker("worker1", segment(2)),
				{Name: "worker2", Exists: true, Segments: []v1beta1.SegmentStatus{segment(2)}},
			},
			state: "Degraded", reason: "Unreachable", onNode: "1/2",
			accepted: "holds ns default.lab, vni 222 and its spokes",
			ready: "Unreachable: node worker2 does not answer; it may still forward; spokes are offered on 1 of 2 " +
				"nodes",
		},
		{
			name: "refused", decision: decision{Conflict: "vni 222 is held by default/other", Remedy: "choose"},
			nodes: []node{worker("worker1")},
			state: "Conflict", reason: "vni 222 is held by default/other", onNode: "0/1",
			accepted: "vni 222 is held by default/other; choose", ready: "Conflict: vni 222 is held by default/other",
		},
		{
			name:     "a refused spoke",
			decision: decision{Holds: two, Refused: map[string]string{"x": "spoke x is held by default/other"}},
			nodes:    []node{worker("worker1", segment(2))},
			state:    "Degraded", reason: "SpokeConflict", onNode: "1/1",
			accepted: "spoke x is held by default/other; the other spokes are held",
			ready:    "SpokeConflict: spoke x is held by default/other; spokes are offered on 1 of 1 nodes",
		},
		{
			name: "a foreign NAD", decision: held, nodes: []node{worker("worker1", segment(2))},
			foreign: []string{"default/k8slan-veth-srl"},
			state:   "Degraded", reason: "NADConflict", onNode: "1/1",
			accepted: "holds ns default.lab, vni 222 and its spokes",
			ready: "NADConflict: NetworkAttachmentDefinition default/k8slan-veth-srl does not belong to this LAN; " +
				"delete " +
				"it, and k8slan creates its own; spokes are offered on 1 of 1 nodes",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := lan("lab", 0, 222, "srl", "vm")
			s := status(&l, test.decision, test.nodes, test.foreign, epoch)
			accepted := meta.FindStatusCondition(s.Conditions, "Accepted")
			ready := meta.FindStatusCondition(s.Conditions, "Ready")
			for what, pair := range map[string][2]string{
				"state":    {string(s.State), string(test.state)},
				"reason":   {s.Reason, test.reason},
				"nodes":    {s.Nodes, test.onNode},
				"accepted": {accepted.Message, test.accepted},
				"ready":    {ready.Reason + ": " + ready.Message, test.ready},
			} {
				if pair[0] != pair[1] {
					t.Errorf("%s:\nhave %s\nwant %s", what, pair[0], pair[1])
				}
			}
			if s.Attached != test.attached {
				t.Errorf("attached: have %d, want %d", s.Attached, test.attached)
			}
			if (ready.Status == "True") != (test.state == "Ready") {
				t.Errorf("condition Ready is %s in state %s", ready.Status, test.state)
			}

			l.Status = s
			later := metav1.NewTime(epoch.Add(time.Hour))
			again := status(&l, test.decision, test.nodes, test.foreign, later)
			if !equality.Semantic.DeepEqual(s, again) {
				t.Errorf("the status differs an hour later:\n%+v\n%+v", s, again)
			}
		})
	}
}

func TestMixedIPFamiliesAreAProblem(t *testing.T) {
	l := lan("lab", 0, 222, "srl")
	d := decision{Holds: &v1beta1.Holding{Spokes: []string{"srl"}}, Discovery: v1beta1.Unicast}
	on := func(name, vtep string) node {
		s := segment(1)
		s.VTEP = vtep
		return worker(name, s)
	}
	nodes := []node{on("worker1", "192.0.2.1"), on("worker2", "2001:db8::2"), on("worker3", "192.0.2.3")}
	s := status(&l, d, nodes, nil, epoch)
	ready := meta.FindStatusCondition(s.Conditions, "Ready")
	want := "the underlay has IPv4 addresses on worker1, worker3 and only IPv6 addresses on worker2, and they do not " +
		"reach each other. Give all nodes addresses of one family, or set spec.vxlanGrp to a group of the family to " +
		"use; spokes are offered on 3 of 3 nodes"
	if s.State != v1beta1.StateDegraded || s.Reason != v1beta1.ReasonMixedFamilies || ready.Message != want ||
		s.Discovery != "unicast" {
		t.Errorf("state %s, reason %s, discovery %s, message\n%s\nwant\n%s", s.State, s.Reason, s.Discovery,
			ready.Message, want)
	}
	if s := status(&l, d, nodes[:1], nil, epoch); s.State != v1beta1.StateReady {
		t.Errorf("with one node: %s %s", s.State, s.Reason)
	}
	s = status(&l, d, []node{on("worker1", "192.0.2.1"), on("worker2", "fe80::2")}, nil, epoch)
	if s.State != v1beta1.StateReady {
		t.Errorf("with a node that is still in multicast: %s %s", s.State, s.Reason)
	}
	d.Discovery = v1beta1.Multicast
	if s := status(&l, d, nodes, nil, epoch); s.State != v1beta1.StateReady {
		t.Errorf("in multicast: %s %s", s.State, s.Reason)
	}
}

func TestLANSpansExistingNodesThatMatch(t *testing.T) {
	l := with(lan("lab", 0, 222, "srl"),
		func(l *v1beta1.LAN) { l.Spec.NodeSelector = map[string]v1beta1.LabelValue{"lab": "yes"} })
	object := func(name, label string) corev1.Node {
		return corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"lab": label}}}
	}
	report := func(name string) v1beta1.LANNode {
		return v1beta1.LANNode{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Status:     v1beta1.LANNodeStatus{Segments: []v1beta1.SegmentStatus{segment(1)}},
		}
	}
	nodes := nodesOf(
		[]corev1.Node{object("in", "yes"), object("out", "no"), object("without-k8slan", "yes")},
		[]v1beta1.LANNode{report("in"), report("out"), report("gone")},
		epoch.Time,
	)
	s := status(&l, decision{Holds: &v1beta1.Holding{Spokes: []string{"srl"}}}, nodes, nil, epoch)
	if s.Nodes != "1/1" || s.State != v1beta1.StateReady {
		t.Errorf("have %s %s, want 1/1 Ready", s.Nodes, s.State)
	}
}

func TestNodeIsLostWhenRemovedOutOfServiceOrLongSilent(t *testing.T) {
	outOfService := corev1.Taint{Key: "node.kubernetes.io/out-of-service", Effect: corev1.TaintEffectNoExecute}
	for _, test := range []struct {
		name   string
		ready  corev1.ConditionStatus
		silent time.Duration
		taints []corev1.Taint
		gone   bool

		answers bool
		lost    string
		left    time.Duration // until it is lost
	}{
		{name: "well", ready: "True", silent: time.Hour, answers: true},
		{name: "not ready", ready: "False", silent: time.Hour, answers: true},
		{name: "no condition yet", answers: true},
		{name: "silent", ready: "Unknown", silent: time.Minute, left: 4 * time.Minute},
		{name: "silent for long", ready: "Unknown", silent: 5 * time.Minute, lost: "it has not answered for 5 minutes"},
		{name: "out of service", ready: "Unknown", taints: []corev1.Taint{outOfService}, lost: "it is out of service"},
		{
			name: "marked as out of service but ready", ready: "True", taints: []corev1.Taint{outOfService},
			answers: true,
		},
		{name: "its Node is gone", gone: true, lost: "its Node is gone"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var objects []corev1.Node
			if !test.gone {
				n := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Spec: corev1.NodeSpec{Taints: test.taints}}
				if test.ready != "" {
					since := metav1.NewTime(epoch.Add(-test.silent))
					n.Status.Conditions = []corev1.NodeCondition{{
						Type: corev1.NodeReady, Status: test.ready,
						LastTransitionTime: since,
					}}
				}
				objects = append(objects, n)
			}
			report := v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: "n"}}
			report.Status.Segments = []v1beta1.SegmentStatus{segment(1, pod("srl", "srl-1"))}
			have := nodesOf(objects, []v1beta1.LANNode{report}, epoch.Time)
			if n := have[0]; n.Answers != test.answers || n.Lost != test.lost {
				t.Errorf("the node answers: %v, is lost: %q; want %v, %q", n.Answers, n.Lost, test.answers, test.lost)
			}
			if left := untilNextLost(have, epoch.Time); left != test.left {
				t.Errorf("the next run is after %v, want %v", left, test.left)
			}
			if segments := nodeSegments(have); (len(segments) == 0) != (test.lost != "") {
				t.Errorf("%d of its segments count, want none only of a lost node", len(segments))
			}
		})
	}
}

func TestDeletedLANSaysWhatItWaitsFor(t *testing.T) {
	gone := func(n node, uids ...types.UID) node {
		for _, uid := range uids {
			n.Gone = append(n.Gone, v1beta1.GoneLAN{UID: uid})
		}
		return n
	}
	leaving := func(attachments ...v1beta1.Attachment) v1beta1.SegmentStatus {
		s := segment(0, attachments...)
		s.State = v1beta1.SegmentLeaving
		return s
	}
	stuck := leaving()
	stuck.Reason, stuck.Message = v1beta1.ReasonBuildFailed,
		"delete link vx222: no buffer space available. It is tried again"
	silent := func(n node) node { n.Answers = false; return n }
	lost := func(n node) node { n.Answers, n.Lost = false, "its Node is gone"; return n }
	for _, test := range []struct {
		name   string
		nodes  []node
		had    []string // nodes where it was attached when its status was last written
		reason string   // of the condition
		want   string   // empty if its deletion is done
	}{
		{name: "no node at all"},
		{name: "every node has removed it", nodes: []node{
			gone(worker("worker1"), "uid-lab"),
			gone(worker("worker2"), "uid-x", "uid-lab"),
		}},
		{
			name:   "a node that reports nothing may not have read it",
			nodes:  []node{gone(worker("worker1"), "uid-lab"), worker("worker2")},
			reason: "Deleting", want: "lab stays until these nodes have removed it: worker2",
		},
		{
			name: "a node has removed another LAN", nodes: []node{gone(worker("worker1"), "uid-other")},
			reason: "Deleting", want: "lab stays until these nodes have removed it: worker1",
		},
		{
			name: "pods are attached",
			nodes: []node{
				worker("worker1", leaving(pod("srl", "srl-1"))), gone(worker("worker2"), "uid-lab"),
				worker("worker3", segment(1, pod("vm", "vm-1"))),
			},
			reason: "InUse", want: "lab stays until its pods are gone: default/srl-1 on worker1 (spoke srl), " +
				"default/vm-1 on worker3 (spoke vm)",
		},
		{
			name: "a node cannot remove it", nodes: []node{worker("worker1", stuck)},
			reason: "Deleting", want: "lab stays until these nodes have removed it: worker1 (delete link vx222: no " +
				"buffer space available. It is tried again)",
		},
		{
			name: "a node does not answer", nodes: []node{
				silent(worker("worker1", segment(1, pod("srl", "srl-1")))),
				silent(worker("worker2")),
			},
			reason: "InUse", want: "lab stays until its pods are gone: default/srl-1 on worker1 (spoke srl); " +
				"lab waits for nodes that do not answer: worker1, worker2; it does not wait " +
				"for a node that has not answered for 5 minutes",
		},
		{
			name: "nothing but a node that does not answer", nodes: []node{silent(worker("worker1"))},
			reason: "Unreachable", want: "lab waits for nodes that do not answer: worker1; it does not wait " +
				"for a node that has not answered for 5 minutes",
		},
		{name: "a node that is lost", nodes: []node{
			lost(worker("worker1", segment(1, pod("srl", "srl-1")))),
			lost(worker("worker2")),
		}},
		{
			name:   "a node that is lost and one that is not",
			nodes:  []node{lost(worker("worker1", segment(1, pod("srl", "srl-1")))), worker("worker2")},
			reason: "Deleting", want: "lab stays until these nodes have removed it: worker2; it does not wait " +
				"for lost nodes, which may still forward: node worker1 (its Node is gone)",
		},
		{
			name: "a node whose LANNode is gone, and one that is not", nodes: []node{worker("worker2")},
			had:    []string{"worker1", "worker2"},
			reason: "Deleting", want: "lab stays until these nodes have removed it: worker2; it does not wait " +
				"for lost nodes, which may still forward: node worker1 (its LANNode is gone)",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := with(lan("lab", 0, 222, "srl", "vm"), holding("srl", "vm"), deleting)
			for _, on := range test.had {
				l.Status.Spokes = append(l.Status.Spokes,
					v1beta1.SpokeStatus{Name: "srl", Attachments: []v1beta1.SpokeAttachment{{
						Node:       on,
						Attachment: pod("srl", "srl-1"),
					}}})
			}
			if deletionDone(&l, test.nodes) != (test.want == "") {
				t.Errorf("its deletion is done: %v", deletionDone(&l, test.nodes))
			}
			if test.want == "" {
				return
			}
			s := status(&l, decision{Holds: l.Status.Holds}, test.nodes, nil, epoch)
			ready := meta.FindStatusCondition(s.Conditions, "Ready")
			if s.State != v1beta1.StateDeleting || ready.Status != "False" || ready.Reason != test.reason ||
				ready.Message != test.want {
				t.Errorf("%s, Ready %s %s:\nhave %s\nwant %s", s.State, ready.Status, ready.Reason, ready.Message,
					test.want)
			}
			if !equality.Semantic.DeepEqual(s.Holds, l.Status.Holds) {
				t.Errorf("it holds %+v, want %+v", s.Holds, l.Status.Holds)
			}
			if len(test.had) > 0 && (s.Attached != 1 || s.Spokes[0].Attachments[0].Node != test.had[0]) {
				t.Errorf("attached are %d, %+v; want the attachment on the node that is gone", s.Attached, s.Spokes)
			}
		})
	}
}

func TestSpokeOnTwoNodesHasCondition(t *testing.T) {
	l := lan("lab", 0, 222, "vm")
	held := decision{Holds: &v1beta1.Holding{Spokes: []string{"vm"}}}
	s := status(&l, held, []node{
		worker("worker1", segment(1, pod("vm", "a"))),
		worker("worker2", segment(1, pod("vm", "b"))),
	}, nil, epoch)
	twice := meta.FindStatusCondition(s.Conditions, v1beta1.ConditionAttachedTwice)
	if twice == nil || !strings.Contains(twice.Message,
		"spoke vm is attached twice: default/a on worker1, default/b on worker2") {
		t.Fatalf("have %v", twice)
	}
	if s.State != v1beta1.StateReady || s.Attached != 2 {
		t.Errorf("have %s with %d attached, want Ready with 2: a live migration is no fault", s.State, s.Attached)
	}
	l.Status = s
	s = status(&l, held, []node{worker("worker1", segment(1)), worker("worker2", segment(1, pod("vm", "b")))}, nil,
		epoch)
	if meta.FindStatusCondition(s.Conditions, v1beta1.ConditionAttachedTwice) != nil {
		t.Error("the condition stays after one of the two is gone")
	}
	silent := worker("worker1", segment(1, pod("vm", "a")))
	silent.Answers = false
	s = status(&l, held, []node{silent, worker("worker2", segment(1, pod("vm", "b")))}, nil, epoch)
	twice = meta.FindStatusCondition(s.Conditions, v1beta1.ConditionAttachedTwice)
	if twice == nil || !strings.Contains(twice.Message,
		"default/a on worker1 (which does not answer and may still forward), default/b on worker2") {
		t.Errorf("with a silent node: have %v", twice)
	}
}

// inPool returns the attachment of a pod to a port of a pool.
func inPool(pool, port string) v1beta1.Attachment {
	a := pod(pool+"_"+port, pool+"-"+port)
	a.Pool = pool
	return a
}

func TestPoolsAreSummedUp(t *testing.T) {
	l := with(lan("lab", 0, 222, "srl"), withPools("web", "refused", "db"))
	held := decision{
		Holds:   &v1beta1.Holding{NS: "default.lab", VNI: 222, Port: 4789, Spokes: []string{"db", "srl", "web"}},
		Refused: map[string]string{"refused": "spoke refused is held by default/other"},
	}
	nodes := []node{
		worker("worker1", segment(7, inPool("web", "0"), inPool("web", "1"), pod("srl", "srl-1"), inPool("old", "0"))),
		worker("worker2", segment(7, inPool("web", "0"))),
	}
	s := status(&l, held, nodes, nil, epoch)
	var have []string
	for _, p := range s.Pools {
		have = append(have, fmt.Sprint(p.Name, " ", p.Attached, "/", p.Ports, " ", p.Nodes, " ", p.Refused))
	}
	want := []string{
		"db 0/6 [] ", "old 1/0 [{worker1 1}] ", "refused 0/0 [] spoke refused is held by default/other",
		"web 3/6 [{worker1 2} {worker2 1}] ",
	}
	if !slices.Equal(have, want) {
		t.Errorf("\nhave %q\nwant %q", have, want)
	}
	if s.SpokeCount != 7 || s.Attached != 5 || len(s.Spokes) != 1 || s.Nodes != "2/2" {
		t.Errorf("%d spokes, %d attached, %+v, ready on %s", s.SpokeCount, s.Attached, s.Spokes, s.Nodes)
	}
	if meta.FindStatusCondition(s.Conditions, v1beta1.ConditionAttachedTwice) != nil {
		t.Error("ports with the same number on two nodes count as one spoke")
	}
	nodes[1].Segments[0].Offered = 6
	if s := status(&l, held, nodes, nil, epoch); s.Nodes != "1/2" {
		t.Errorf("with a port that is not offered, it is ready on %s", s.Nodes)
	}

	many := slices.Clone(nodes[:1])
	for i := range 2 * v1beta1.MaxPoolNodes {
		many = append(many, worker(fmt.Sprintf("worker9%03d", i), segment(7, inPool("web", "0"))))
	}
	if p := status(&l, held, many, nil, epoch).Pools[3]; len(p.Nodes) != v1beta1.MaxPoolNodes ||
		int(p.Attached) != 2+2*v1beta1.MaxPoolNodes {
		t.Errorf("%d of many nodes are listed, and %d pods are counted", len(p.Nodes), p.Attached)
	}

	// The status keeps what a node reported whose LANNode is deleted during the deletion of the LAN.
	l.Status = s
	deleting(&l)
	gone := status(&l, decision{Holds: held.Holds}, nodes[1:], nil, epoch)
	if p := gone.Pools[len(gone.Pools)-1]; p.Attached != 3 || p.Ports != 0 || len(p.Nodes) != 2 {
		t.Errorf("of a node whose LANNode is gone the status has %+v", p)
	}
	if b := blockersOf(&l, nodes[1:]); !slices.Equal(b.Lost, []string{"node worker1 (its LANNode is gone)"}) {
		t.Errorf("the lost nodes are %v", b.Lost)
	}
}

func TestExceededPoolHasCondition(t *testing.T) {
	l := with(lan("lab", 0, 222), withPools("web"))
	held := decision{Holds: &v1beta1.Holding{Spokes: []string{"web"}}}
	four := segment(3, inPool("web", "0"), inPool("web", "1"), inPool("web", "3"), inPool("web", "4"))
	s := status(&l, held, []node{worker("worker1", four), worker("worker2", segment(3, inPool("web", "7")))}, nil,
		epoch)
	exceeded := meta.FindStatusCondition(s.Conditions, v1beta1.ConditionPoolExceeded)
	if exceeded == nil || !strings.HasPrefix(exceeded.Message,
		"pool web has size 3, and more pods are attached: 4 on worker1; they stay") {
		t.Fatalf("have %v", exceeded)
	}
	if s.State != v1beta1.StateReady {
		t.Errorf("the LAN is %s, want Ready, because all of its spokes are offered", s.State)
	}
	l.Status = s
	s = status(&l, held, []node{worker("worker1", segment(3, four.Attachments[:3]...)), worker("worker2", segment(3))},
		nil, epoch)
	if meta.FindStatusCondition(s.Conditions, v1beta1.ConditionPoolExceeded) != nil {
		t.Error("the condition stays after the pods fit again")
	}
}

func TestEventsReportOnlyChanges(t *testing.T) {
	condition := func(kind string, status metav1.ConditionStatus, reason, message string) metav1.Condition {
		return metav1.Condition{Type: kind, Status: status, Reason: reason, Message: message}
	}
	ready := condition("Ready", "True", "Offered", "on 2 of 2")
	missing := condition("Ready", "False", "UnderlayMissing", "no eth7")
	pending := condition("Ready", "False", "Pending", "not yet")
	accepted := condition("Accepted", "True", "Held", "holds")
	refused := condition("Accepted", "False", "Conflict", "vni 222 is held by default/lab")
	for _, test := range []struct {
		name          string
		before, after []metav1.Condition
		want          string
	}{
		{"nothing changed", []metav1.Condition{missing, refused}, []metav1.Condition{missing, refused}, ""},
		{"accepted at once", nil, []metav1.Condition{accepted, pending}, ""},
		{"ready", []metav1.Condition{pending}, []metav1.Condition{ready}, "Normal Offered"},
		{
			"ready on more nodes",
			[]metav1.Condition{ready},
			[]metav1.Condition{condition("Ready", "True", "Offered", "on 3 of 3")},
			"",
		},
		{"no longer ready", []metav1.Condition{ready}, []metav1.Condition{missing}, "Warning UnderlayMissing"},
		{"refused", nil, []metav1.Condition{refused, condition("Ready", "False", "Conflict", "…")}, "Warning Conflict"},
		{"granted later", []metav1.Condition{refused}, []metav1.Condition{accepted}, "Normal Held"},
		{
			"attached twice", nil,
			[]metav1.Condition{condition("AttachedTwice", "True", "TwoNodes", "…")},
			"Warning TwoNodes",
		},
		{
			"attached once again",
			[]metav1.Condition{condition("AttachedTwice", "True", "TwoNodes", "…")},
			nil,
			"Normal OneNode",
		},
		{
			"a pool exceeded", nil,
			[]metav1.Condition{condition("PoolExceeded", "True", "Shrunk", "…")},
			"Warning Shrunk",
		},
		{
			"exceeded by fewer pods",
			[]metav1.Condition{condition("PoolExceeded", "True", "Shrunk", "5")},
			[]metav1.Condition{condition("PoolExceeded", "True", "Shrunk", "4")},
			"",
		},
		{
			"a pool no longer exceeded",
			[]metav1.Condition{condition("PoolExceeded", "True", "Shrunk", "…")},
			nil,
			"Normal Fits",
		},
		{
			"deleted",
			[]metav1.Condition{ready},
			[]metav1.Condition{condition("Ready", "False", "Deleting", "stays until")},
			"",
		},
		{
			"deleted in use",
			[]metav1.Condition{ready},
			[]metav1.Condition{condition("Ready", "False", "InUse", "a, b")},
			"Warning InUse",
		},
		{
			"one pod less",
			[]metav1.Condition{condition("Ready", "False", "InUse", "a, b")},
			[]metav1.Condition{condition("Ready", "False", "InUse", "a")},
			"",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			var have []string
			for _, e := range conditionEvents(test.before, test.after) {
				have = append(have, e.Type+" "+e.Reason)
			}
			if strings.Join(have, ", ") != test.want {
				t.Errorf("have %v, want %q", have, test.want)
			}
		})
	}
	if note := truncate(strings.Repeat("ä", 2000)); len(note) > 1024 || !strings.HasSuffix(note, "ä …") {
		t.Errorf("a long note is cut to %d bytes, ending in %q", len(note), note[len(note)-8:])
	}
}
