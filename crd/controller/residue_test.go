package controller

import (
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// resources returns a list for a node's status. A spoke's name stands for its resource.
func resources(values map[string]string) corev1.ResourceList {
	list := corev1.ResourceList{}
	for name, value := range values {
		if !slices.Contains([]string{"cpu", "macvtap.network.kubevirt.io/dataplane", "example.com/k8slan-veth-x"},
			name) {
			name = v1beta1.Resource(name)
		}
		list[corev1.ResourceName(name)] = resource.MustParse(value)
	}
	return list
}

func TestResidueIsZeroAndHeldByNoLAN(t *testing.T) {
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "worker1", Labels: map[string]string{"rack": "a"}},
		Status: corev1.NodeStatus{
			Capacity: resources(map[string]string{
				"cpu": "0", "macvtap.network.kubevirt.io/dataplane": "0", "example.com/k8slan-veth-x": "0",
				"gone": "0", "gone-too": "0", "just-ended": "1", "held": "0", "held-elsewhere": "0",
				"deleted-with-pods": "0", "back": "0",
			}),
			Allocatable: resources(map[string]string{"gone": "0", "just-ended": "0", "held": "0", "back": "1"}),
		},
	}
	racks := func(rack v1beta1.LabelValue) func(*v1beta1.LAN) {
		return func(l *v1beta1.LAN) { l.Spec.NodeSelector = map[string]v1beta1.LabelValue{"rack": rack} }
	}
	lans := []v1beta1.LAN{
		with(lan("a", 0, 1, "held", "gone"), holding("held"), racks("a")), // only its spec has "gone"
		with(lan("b", 0, 2, "held-elsewhere"), holding("held-elsewhere"), racks("b")),
		with(lan("c", 0, 3, "deleted-with-pods"), holding("deleted-with-pods"), deleting),
		lan("refused", 0, 1, "gone-too"),
	}
	want := []string{v1beta1.Resource("gone"), v1beta1.Resource("gone-too"), v1beta1.Resource("held-elsewhere")}
	if have := Residue(n, heldOn(n, lans)); !slices.Equal(have, want) {
		t.Errorf("have %v, want %v", have, want)
	}
}

func TestPauseDoublesWhenKubeletWritesResidueBack(t *testing.T) {
	zero := corev1.NodeStatus{
		Capacity:    resources(map[string]string{"cpu": "4", "gone": "0"}),
		Allocatable: resources(map[string]string{"cpu": "4", "gone": "0"}),
	}
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "worker1"}, Status: zero}
	server := fake.NewClientBuilder().WithScheme(NewScheme()).WithObjects(n).WithStatusSubresource(n).Build()
	now := epoch.Time
	m := NewMetrics()
	r := &residueReconciler{
		client: server, now: func() time.Time { return now }, pauses: map[string]pause{},
		metrics: m,
	}
	reconcile := func() (wait time.Duration, left bool) {
		t.Helper()
		result, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKey{Name: "worker1"}})
		if err != nil {
			t.Fatal(err)
		}
		if err := server.Get(t.Context(), client.ObjectKeyFromObject(n), n); err != nil {
			t.Fatal(err)
		}
		if len(n.Status.Capacity)+len(n.Status.Allocatable) < 2 {
			t.Fatalf("a resource that is no spoke's is gone: %+v", n.Status)
		}
		return result.RequeueAfter, hasResidue(n)
	}
	if wait, left := reconcile(); left || wait != 0 {
		t.Fatalf("not removed at once: left %v, next run after %v", left, wait)
	}
	for _, want := range []time.Duration{1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300} {
		n.Status = zero
		if err := server.Status().Update(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		wait, left := reconcile()
		if !left || wait != want*time.Second {
			t.Fatalf("written back: left %v, next run after %v, want %v", left, wait, want*time.Second)
		}
		now = now.Add(wait)
		if _, left := reconcile(); left {
			t.Fatal("not removed after the pause")
		}
	}
	if removed := scrape(t, m)["k8slan_residue_removed_total"]; removed != 12 {
		t.Errorf("%v removals are counted, want 12", removed)
	}
}
