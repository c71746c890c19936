package helmhooks

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func TestNodeOfUnboundPodIsFromItsAffinity(t *testing.T) {
	term := corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{
		{Key: "metadata.name", Operator: corev1.NodeSelectorOpIn, Values: []string{"worker2"}},
	}}
	p := corev1.Pod{Spec: corev1.PodSpec{Affinity: &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
		RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
			NodeSelectorTerms: []corev1.NodeSelectorTerm{term},
		},
	}}}}
	if got := nodeOf(p); got != "worker2" {
		t.Errorf("the unbound pod is for node %q, want worker2", got)
	}
	p.Spec.NodeName = "worker3"
	if got := nodeOf(p); got != "worker3" {
		t.Errorf("the bound pod is on node %q, want worker3", got)
	}
	if got := nodeOf(corev1.Pod{}); got != "" {
		t.Errorf("a pod for any node is for %q", got)
	}
}

func TestOnlyZeroResourcesAreRemoved(t *testing.T) {
	quantity := resource.MustParse
	n := corev1.Node{Status: corev1.NodeStatus{
		Capacity: corev1.ResourceList{
			"cpu": quantity("0"), "macvtap.k8slan.io/k8slan-veth-b": quantity("0"),
			"macvtap.k8slan.io/k8slan-veth-a": quantity("0"),
			"macvtap.k8slan.io/k8slan-veth-c": quantity("1"), "macvtap.example.com/k8slan-veth-d": quantity("0"),
		},
		Allocatable: corev1.ResourceList{"macvtap.k8slan.io/k8slan-veth-c": quantity("0")},
	}}
	zero, others := spokeResources(&n)
	if want := []string{"macvtap.k8slan.io/k8slan-veth-a", "macvtap.k8slan.io/k8slan-veth-b"}; !slices.Equal(zero,
		want) {
		t.Errorf("resources to remove are %q, want %q", zero, want)
	}
	if want := []string{"macvtap.k8slan.io/k8slan-veth-c"}; !slices.Equal(others, want) {
		t.Errorf("resources to wait for are %q, want %q", others, want)
	}
}
