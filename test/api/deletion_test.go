package api

import (
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// deleteLAN deletes a LAN and does not wait until it is gone.
func deleteLAN(t *testing.T, lan *v1beta1.LAN) {
	t.Helper()
	if err := api.Delete(t.Context(), lan.DeepCopy()); err != nil {
		t.Fatal(err)
	}
}

// setSilent writes what the node controller writes to a Node that has been silent since then.
func setSilent(t *testing.T, name string, since time.Time) {
	t.Helper()
	n := read(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}})
	n.Status.Conditions = []corev1.NodeCondition{{
		Type: corev1.NodeReady, Status: corev1.ConditionUnknown, Reason: "NodeStatusUnknown",
		LastTransitionTime: metav1.NewTime(since),
	}}
	if err := api.Status().Update(t.Context(), n); err != nil {
		t.Fatal(err)
	}
}

func TestDeletedLANStaysUntilItsPodsAreGone(t *testing.T) {
	startController(t)
	worker1, worker2 := node(t, "del-1", nil), node(t, "del-2", nil)
	lan := createLAN(t, "del", "{vni: 930, spokes: [d1, d2]}")
	awaitSummary(t, lan, "Pending|Pending|d1,d2|0/2")
	if !slices.Equal(lan.Finalizers, []string{"lan.k8slan.io/deletion"}) {
		t.Errorf("the LAN holds something and has the finalizers %v", lan.Finalizers)
	}
	srl, vm := pod("d1", "srl-1"), pod("d2", "vm-1")
	report(t, worker1, offered(lan, srl))
	report(t, worker2, offered(lan, vm))
	awaitSummary(t, lan, "Ready||d1,d2|2/2")

	deleteLAN(t, lan)
	sentence := "del stays until its pods are gone: default/srl-1 on del-1 (spoke d1), default/vm-1 on del-2 (spoke d2)"
	awaitSummary(t, lan, "Deleting|InUse|d1,d2|0/2")
	awaitCondition(t, lan, "Ready", "False InUse: "+sentence)
	awaitEvent(t, lan, "Warning InUse: "+sentence)
	// because these pods may get new sandboxes
	awaitNADs(t, lan, "k8slan-veth-d1", "k8slan-mac-d1", "k8slan-veth-d2", "k8slan-mac-d2")

	next := createLAN(t, "del-next", "{vni: 930, spokes: [d1, d3]}")
	inUse := "vni 930 is still in use by default/del (being deleted)"
	awaitSummary(t, next, "Conflict|"+inUse+"|none|0/2")
	awaitCondition(t, next, "Accepted",
		"False Conflict: "+inUse+"; this LAN gets it when that LAN is gone; kubectl describe lan -n default del says "+
			"what that LAN waits for")
	spoke := createLAN(t, "del-spoke", "{vni: 931, spokes: [d2]}")
	awaitCondition(t, spoke, "Accepted",
		"False SpokeConflict: spoke d2 is still in use by default/del (being deleted); the other spokes are held")

	report(t, worker1, leaving(lan, srl))
	report(t, worker2, leaving(lan))
	awaitCondition(t, lan, "Ready",
		"False InUse: del stays until its pods are gone: default/srl-1 on del-1 (spoke d1); "+
			"del stays until these nodes have removed it: del-2")
	reportGone(t, worker2, lan)
	awaitCondition(t, lan, "Ready", "False InUse: del stays until its pods are gone: default/srl-1 on del-1 (spoke d1)")
	report(t, worker1) // no segment any more, but not listed as gone yet
	awaitCondition(t, lan, "Ready", "False Deleting: del stays until these nodes have removed it: del-1")
	awaitSummary(t, lan, "Deleting||d1,d2|0/2")
	reportGone(t, worker1, lan)
	awaitGone(t, lan.DeepCopy())
	awaitSummary(t, next, "Pending|Pending|d1,d3|0/2")
	awaitSummary(t, spoke, "Pending|Pending|d2|0/2")
	awaitNADs(t, lan)
}

func TestDeletionContinuesAfterControllerWasAway(t *testing.T) {
	worker := node(t, "back-1", nil)
	early := createLAN(t, "back-early", "{vni: 932, spokes: [e1]}")
	remove(t, early) // no controller has observed it

	stop := startController(t)
	lan := createLAN(t, "back", "{vni: 932, spokes: [e1]}")
	awaitSummary(t, lan, "Pending|Pending|e1|0/1")
	refused := createLAN(t, "back-refused", "{vni: 932, spokes: [e2]}")
	awaitSummary(t, refused, "Conflict|vni 932 is held by default/back|none|0/1")
	remove(t, refused) // it never held anything
	stop()
	deleteLAN(t, lan)
	reportGone(t, worker, lan)
	startController(t)
	awaitGone(t, lan.DeepCopy())
}

func TestDeletedLANDoesNotWaitForLostNode(t *testing.T) {
	startController(t)
	waits := func(name string) string {
		return name + " waits for nodes that do not answer: " + name +
			"-1; it does not wait for a node that has not answered for 5 minutes"
	}
	for i, test := range []struct {
		name  string
		lose  func(t *testing.T, node string)
		waits bool   // waits before the node counts as lost
		why   string // part of the event
	}{
		{"lost-gone", func(t *testing.T, node string) {
			remove(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}})
		}, false, "its Node is gone"},
		// as the garbage collector does if it is faster than the controller
		{"lost-early", func(t *testing.T, node string) {
			remove(t, &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: node}})
			remove(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}})
		}, false, "its LANNode is gone"},
		{"lost-out", func(t *testing.T, node string) {
			setSilent(t, node, time.Now())
			edit(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, func(n *corev1.Node) {
				n.Spec.Taints = []corev1.Taint{{
					Key: "node.kubernetes.io/out-of-service", Value: "nodeshutdown",
					Effect: corev1.TaintEffectNoExecute,
				}}
			})
		}, false, "it is out of service"},
		{"lost-silent", func(t *testing.T, node string) {
			setSilent(t, node, time.Now().Add(4*time.Second-5*time.Minute)) // lost in four seconds
		}, true, "it has not answered for 5 minutes"},
	} {
		t.Run(test.name, func(t *testing.T) {
			worker := node(t, test.name+"-1", nil)
			lan := createLAN(t, test.name, fmt.Sprintf("{vni: %d, spokes: [%s]}", 940+i, test.name))
			awaitSummary(t, lan, "Pending|Pending|"+test.name+"|0/1")
			report(t, worker, offered(lan, pod(test.name, "srl-1")))
			awaitSummary(t, lan, "Ready||"+test.name+"|1/1")
			deleteLAN(t, lan)
			held := test.name + " stays until its pods are gone: default/srl-1 on " + test.name + "-1 (spoke " +
				test.name + ")"
			awaitCondition(t, lan, "Ready", "False InUse: "+held)
			test.lose(t, test.name+"-1")
			if test.waits {
				awaitCondition(t, lan, "Ready", "False InUse: "+held+"; "+waits(test.name))
			}
			awaitGone(t, lan.DeepCopy())
			awaitEvent(t, lan, "Warning NodeLost: "+test.name+" is removed; it does not wait for lost nodes, which "+
				"may still forward: node "+
				test.name+"-1 ("+test.why+")")
		})
	}
}

// The controller writes nothing to a LAN but its finalizer and the status.
func TestControllerDoesNotChangeSpec(t *testing.T) {
	startController(t)
	object := parse(t, manifest("as-written", "{vni: 950, spokes: [a-w], txChecksum: off}"))
	if err := api.Create(t.Context(), object); err != nil {
		t.Fatal(err)
	}
	lan := &v1beta1.LAN{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "as-written"}}
	t.Cleanup(func() { removeByForce(t, lan) })
	awaitSummary(t, lan, "Pending|NoNodes|a-w|0/0")
	if err := api.Get(t.Context(), client.ObjectKeyFromObject(object), object); err != nil {
		t.Fatal(err)
	}
	spec := object.Object["spec"].(map[string]any)
	if off, ok := spec["txChecksum"].(bool); !ok || off || len(spec) != 3 || object.GetGeneration() != 1 ||
		len(object.GetFinalizers()) != 1 {
		t.Errorf("have spec %v in generation %d with finalizers %v", spec, object.GetGeneration(),
			object.GetFinalizers())
	}
}
