package e2e

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// awaitState returns the LAN when it is in that state and its condition Ready says so.
func (l lab) awaitState(name string, state v1beta1.LANState, sentence string) *v1beta1.LAN {
	l.Helper()
	return l.awaitLAN(name, string(state)+": "+sentence, func(lan *v1beta1.LAN) bool {
		return lan.Status.State == state && strings.Contains(condition(lan, v1beta1.ConditionReady).Message, sentence)
	})
}

// awaitNothingOfLAN returns when nothing of a LAN is left on the node. The names of its spokes begin with its own name.
func (m machine) awaitNothingOfLAN(lan string) {
	m.Helper()
	ours := func(file string) bool {
		return strings.HasPrefix(file, m.namespace+"."+lan) || strings.Contains(file, lan+"-")
	}
	for _, dir := range []string{
		"/run/k8slan/netns", "/run/k8slan/lan", "/run/k8slan/lock", "/var/run/cdi",
		"/var/lib/kubelet/device-plugins",
	} {
		m.until("the files of LAN "+lan+" to leave "+dir, func() bool {
			return !slices.ContainsFunc(m.files(dir), ours)
		})
	}
}

func TestDeletedLANStaysForItsPodsAndThenLeavesNothing(t *testing.T) {
	l := newLab(t)
	one, two := l.pair("left", 1074)
	begin := time.Now()
	l.delete(&v1beta1.LAN{}, "left")
	both := "left stays until its pods are gone: " + l.namespace + "/left-1 on worker1 (spoke left-1), " + l.namespace +
		"/left-2 on worker2 (spoke left-2)"
	l.awaitState("left", v1beta1.StateDeleting, both)
	l.logTime("until the deleted LAN named the pods that hold it", begin)
	l.awaitEvent("left", v1beta1.ReasonInUse, both)
	l.awaitSegment(worker2, "left", "leaving", func(s v1beta1.SegmentStatus) bool {
		return s.State == v1beta1.SegmentLeaving
	})
	for _, node := range []string{worker1, worker2} {
		l.awaitAllocatable(node, "left-3", 0)
	}
	l.create(pod("left-3", worker1, "left-3"))
	l.awaitPending("left-3", "left-3")
	one.pings(address(2))

	l.delete(&corev1.Pod{}, two.pod)
	l.awaitState("left", v1beta1.StateDeleting,
		"left stays until its pods are gone: "+l.namespace+"/left-1 on worker1 (spoke left-1)")
	l.delete(&corev1.Pod{}, one.pod)
	l.awaitPodGone(one.pod)
	begin = time.Now()
	l.awaitGone("left")
	l.logTime("from the end of the last pod to the end of the LAN", begin)
	for _, m := range l.machines() {
		m.awaitNothingOfLAN("left")
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := await(ctx, l.bed.client, &nadv1.NetworkAttachmentDefinitionList{},
		[]client.ListOption{client.InNamespace(l.namespace)},
		func(all []*nadv1.NetworkAttachmentDefinition) bool { return len(all) == 0 })
	if err != nil {
		t.Fatalf("waited for the end of the LAN's NADs: %v", err)
	}
}

func TestLANIsDeletedAndRecreatedAtOnce(t *testing.T) {
	l := newLab(t)
	one, two := l.pair("before", 1090)

	// Under another name, while pods are attached to the first.
	l.delete(&v1beta1.LAN{}, "before")
	l.apply(l.lanYAML("after", 1090, []string{"before-1", "before-2", "after-3"}))
	inUse := "vni 1090 is still in use by " + l.namespace + "/before (being deleted)"
	l.awaitState("after", v1beta1.StateConflict, inUse)
	l.awaitEvent("after", v1beta1.ReasonConflict, inUse)
	one.pings(address(2))
	l.delete(&corev1.Pod{}, one.pod)
	l.delete(&corev1.Pod{}, two.pod)
	l.awaitPodGone(one.pod)
	l.awaitPodGone(two.pod)
	begin := time.Now()
	l.ready("after")
	l.logTime("from the end of the last pod until the next LAN had the VNI and was Ready", begin)
	again := l.start(pod("again-1", worker1, "before-1"), pod("again-2", worker2, "before-2"))
	for i, s := range again {
		s.address(address(i+1) + "/24")
	}
	again[0].pings(address(2))
	for _, s := range again {
		l.delete(&corev1.Pod{}, s.pod)
		l.awaitPodGone(s.pod)
	}

	// Under the same name, with the same spec.
	begin = time.Now()
	l.delete(&v1beta1.LAN{}, "after")
	l.awaitGone("after")
	l.logTime("deletion of a LAN without pods", begin)
	l.lan("after", 1090, []string{"before-1", "before-2", "after-3"})
	l.logTime("until it was created again and Ready", begin)
	third := l.start(pod("third-1", worker1, "before-1"), pod("third-2", worker2, "before-2"))
	for i, s := range third {
		s.address(address(i+1) + "/24")
	}
	third[0].pings(address(2))
}

func TestDeadNodeDoesNotHoldADeletedLAN(t *testing.T) {
	l := newLab(t)
	for _, c := range []struct {
		name, why string
		vni       int
		lose      func(l lab, ctx context.Context) error
	}{
		// The reason names the Node, or the LANNode, which is deleted with it.
		{"gone", "Node is gone)", 1091, func(l lab, ctx context.Context) error {
			return l.bed.client.Delete(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: worker2}})
		}},
		{"out", "it is out of service)", 1092, func(l lab, ctx context.Context) error {
			one(l, &corev1.NodeList{}, "", worker2, "not ready", func(n *corev1.Node) bool {
				return n != nil && !isNodeReady(n)
			})
			return l.bed.taint(ctx, worker2, corev1.Taint{
				Key: corev1.TaintNodeOutOfService, Value: "nodeshutdown", Effect: corev1.TaintEffectNoExecute,
			})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := l.fresh(t)
			one, _ := l.pair(c.name, c.vni)
			ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
			defer cancel()
			m := l.machine(worker2)
			m.powerOff(ctx)
			l.delete(&v1beta1.LAN{}, c.name)
			l.delete(&corev1.Pod{}, one.pod)
			l.awaitPodGone(one.pod)
			l.awaitState(c.name, v1beta1.StateDeleting, l.namespace+"/"+c.name+"-2 on worker2")
			begin := time.Now()
			if err := c.lose(l, ctx); err != nil {
				t.Fatal(err)
			}
			l.awaitGone(c.name)
			l.logTime("from the loss of the node to the end of the LAN", begin)
			l.awaitEvent(c.name, v1beta1.ReasonNodeLost, "may still forward", "node worker2 (it", c.why)

			m.powerOn(ctx)
			if err := l.bed.taint(ctx, worker2); err != nil {
				t.Fatal(err)
			}
			if err := l.bed.awaitInstalled(ctx); err != nil {
				t.Fatal(err)
			}
			m.awaitNothingOfLAN(c.name)
			l.awaitNothingOn(worker2, c.name)
			l.lan(c.name, c.vni, []string{c.name + "-1", c.name + "-2"}) // uses the VNI and both nodes again
		})
	}
}

func isNodeReady(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// taint replaces the out-of-service taint of a node by these taints.
func (b *testbed) taint(ctx context.Context, node string, taints ...corev1.Taint) error {
	n := &corev1.Node{}
	if err := b.client.Get(ctx, client.ObjectKey{Name: node}, n); err != nil {
		return err
	}
	before := n.DeepCopy()
	n.Spec.Taints = slices.DeleteFunc(n.Spec.Taints, func(t corev1.Taint) bool {
		return t.Key == corev1.TaintNodeOutOfService
	})
	n.Spec.Taints = append(n.Spec.Taints, taints...)
	return b.client.Patch(ctx, n, client.MergeFrom(before))
}

// awaitNothingOn returns when a node reports nothing of a LAN.
func (l lab) awaitNothingOn(node, lan string) {
	l.Helper()
	one(l, &v1beta1.LANNodeList{}, "", node, "without LAN "+lan, func(n *v1beta1.LANNode) bool {
		return n != nil && !slices.ContainsFunc(n.Status.Segments, func(s v1beta1.SegmentStatus) bool {
			return s.LAN == l.namespace+"/"+lan
		})
	})
}
