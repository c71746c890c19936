package e2e

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

func TestLANIsEditedWhilePodsTalk(t *testing.T) {
	l := newLab(t)
	one, two := l.pair("edits", 1136)
	m, ns := l.machine(worker2), l.namespace+".edits"
	edit := func(change func(*v1beta1.LANSpec)) func() {
		return func() {
			l.edit("edits", change)
			l.ready("edits")
		}
	}
	t.Run("another MTU loses no frame and applies to new pods", func(t *testing.T) {
		l, one, two := l.in(t), one.in(t), two.in(t)
		losesNothing(one, two, edit(func(s *v1beta1.LANSpec) { s.MTU = 1300 }))
		third := l.start(pod("edits-3", worker2, "edits-3"))[0]
		if two.readLink(); third.mtu != 1300 || two.mtu != l.underlay.mtu {
			t.Errorf("MTU of a new pod is %d, want 1300; of an old one %d, want %d as before", third.mtu, two.mtu,
				l.underlay.mtu)
		}
	})
	t.Run("another UDP port interrupts for a second at most", func(t *testing.T) {
		losesLittle(one.in(t), two.in(t), edit(func(s *v1beta1.LANSpec) { s.VXLANPort = 14790 }))
	})
	t.Run("another group interrupts for a second at most", func(t *testing.T) {
		losesLittle(one.in(t), two.in(t), edit(func(s *v1beta1.LANSpec) { s.VXLANGroup = l.underlay.otherGroup() }))
	})
	t.Run("a node that is no longer selected keeps its attachments", func(t *testing.T) {
		l := l.in(t)
		losesNothing(one.in(t), two.in(t), func() {
			l.edit("edits", func(s *v1beta1.LANSpec) {
				s.NodeSelector = map[string]v1beta1.LabelValue{"kubernetes.io/hostname": worker1}
			})
			l.awaitSegment(worker2, "edits", "Leaving", func(s v1beta1.SegmentStatus) bool {
				return s.State == v1beta1.SegmentLeaving && len(s.Attachments) > 0
			})
			l.awaitAllocatable(worker2, "edits-2", 0)
			edit(func(s *v1beta1.LANSpec) { s.NodeSelector = nil })()
			l.awaitAllocatable(worker2, "edits-2", 1)
		})
	})
	m.awaitLinks(ns, "as the LAN is now", func(links linkList) bool { return links.up("br1136") && links.up("vx1136") })
	two.pings(address(1))
}

func TestSpokeOnTwoNodesIsReportedAndWorks(t *testing.T) {
	l := newLab(t)
	l.lan("twice", 1137, []string{"twice-1", "twice-2"})
	l.start(pod("source", worker1, "twice-1"), pod("target", worker2, "twice-1"))
	l.awaitLAN("twice", "AttachedTwice", func(lan *v1beta1.LAN) bool {
		c := condition(lan, v1beta1.ConditionAttachedTwice)
		return c.Status == metav1.ConditionTrue && c.Reason == v1beta1.ReasonTwoNodes &&
			lan.Status.State == v1beta1.StateReady && len(attachments(lan, "twice-1")) == 2 &&
			containsAll(c.Message,
				[]string{"spoke twice-1", l.namespace + "/source on worker1", l.namespace + "/target on worker2"})
	})
	l.awaitEvent("twice", v1beta1.ReasonTwoNodes, "source on worker1", "target on worker2")
	l.delete(&corev1.Pod{}, "source")
	l.awaitLAN("twice", "attached once", func(lan *v1beta1.LAN) bool {
		return meta.FindStatusCondition(lan.Status.Conditions, v1beta1.ConditionAttachedTwice) == nil &&
			len(attachments(lan, "twice-1")) == 1
	})
	target, far := l.host(pod("target", worker2, "twice-1")), l.start(pod("far", worker1, "twice-2"))[0]
	// it has no IPv6 address, because the two pods had the same MAC
	target.run("ip", "addr", "add", address(1)+"/24", "dev", target.link)
	far.address(address(2) + "/24")
	far.pings(address(1))
}
