package controller

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// LostAfter is how long a node may be silent before it counts as lost, so that nothing waits for it any more. It is as
// long as Kubernetes leaves pods on such a node (defaultTolerationSeconds of the admission plugin
// DefaultTolerationSeconds).
const LostAfter = 5 * time.Minute

// node is a node that runs k8slan, with what it reports.
type node struct {
	Name     string
	Labels   map[string]string
	Exists   bool      // false if there is a LANNode without a Node
	Answers  bool      // false if the node is silent or lost
	Lost     string    // why the node is lost, such as "its Node is gone"; empty if it is not
	LostAt   time.Time // when a silent node will be lost
	Segments []v1beta1.SegmentStatus
	Gone     []v1beta1.GoneLAN
}

// nodesOf returns a node for each LANNode, with what its Node says, sorted by name. A Node without a LANNode runs no
// k8slan.
func nodesOf(nodes []corev1.Node, lanNodes []v1beta1.LANNode, now time.Time) []node {
	byName := map[string]*corev1.Node{}
	for i := range nodes {
		byName[nodes[i].Name] = &nodes[i]
	}
	var paired []node
	for _, ln := range lanNodes {
		p := node{Name: ln.Name, Segments: ln.Status.Segments, Gone: ln.Status.Gone, Lost: "its Node is gone"}
		if n := byName[ln.Name]; n != nil {
			p.Labels, p.Exists = n.Labels, true
			p.Lost, p.LostAt = lostReason(healthOf(n), now)
			p.Answers = p.Lost == "" && p.LostAt.IsZero()
		}
		paired = append(paired, p)
	}
	slices.SortFunc(paired, func(x, y node) int { return cmp.Compare(x.Name, y.Name) })
	return paired
}

// health is the part of a Node that says whether it is alive.
type health struct {
	Ready        corev1.ConditionStatus
	Since        metav1.Time // when Ready changed last
	OutOfService bool        // an administrator has set the taint node.kubernetes.io/out-of-service
}

func healthOf(n *corev1.Node) health {
	var h health
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			h.Ready, h.Since = c.Status, c.LastTransitionTime
		}
	}
	for _, t := range n.Spec.Taints {
		h.OutOfService = h.OutOfService || t.Key == corev1.TaintNodeOutOfService
	}
	return h
}

// lostReason returns why a node is lost, or when it will be lost if it is silent. A node is silent when the node
// controller has set Ready to Unknown, after its grace period. The taint counts only on a Node that is not ready, as it
// does for Kubernetes' pod garbage collector.
func lostReason(h health, now time.Time) (why string, at time.Time) {
	switch at := h.Since.Add(LostAfter); {
	case h.OutOfService && h.Ready != corev1.ConditionTrue:
		return "it is out of service", time.Time{}
	case h.Ready != corev1.ConditionUnknown:
		return "", time.Time{}
	case now.Before(at):
		return "", at
	}
	return fmt.Sprintf("it has not answered for %s", minutes(LostAfter)), time.Time{}
}

// minutes formats a duration of whole minutes.
func minutes(d time.Duration) string { return fmt.Sprintf("%d minutes", int(d.Minutes())) }

// nodeSegments returns the segments of all nodes that are not lost.
func nodeSegments(nodes []node) []nodeSegment {
	var segments []nodeSegment
	for _, n := range nodes {
		if n.Lost != "" {
			continue
		}
		for _, s := range n.Segments {
			segments = append(segments, nodeSegment{Node: n.Name, SegmentStatus: s})
		}
	}
	return segments
}

// spannedBy returns the nodes on which the LAN should be.
func spannedBy(lan *v1beta1.LAN, nodes []node) []node {
	selector := labels.Set{}
	for k, v := range lan.Spec.NodeSelector {
		selector[k] = string(v)
	}
	var spanned []node
	for _, n := range nodes {
		if n.Exists && selector.AsSelector().Matches(labels.Set(n.Labels)) {
			spanned = append(spanned, n)
		}
	}
	return spanned
}
