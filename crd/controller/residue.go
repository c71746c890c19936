package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// Residue returns the resources of spokes that a node's status lists with the value 0, sorted, without those to keep.
// kubelet forgets a resource five minutes after its plugin has ended, and leaves it in the status with the value 0 for
// ever (MachineInfo in pkg/kubelet/nodestatus/setters.go). Before that, its capacity is not 0 and kubelet would write a
// removed entry back.
func Residue(n *corev1.Node, keep func(resource string) bool) []string {
	var names []string
	for name, capacity := range n.Status.Capacity {
		allocatable := n.Status.Allocatable[name] // 0 if it is missing
		isSpoke := strings.HasPrefix(string(name), v1beta1.Resource(""))
		if isSpoke && capacity.IsZero() && allocatable.IsZero() && !keep(string(name)) {
			names = append(names, string(name))
		}
	}
	slices.Sort(names)
	return names
}

// RemoveResidue removes resources from a node's status, all or none: the API server refuses the patch if one of them is
// not 0 any more.
func RemoveResidue(ctx context.Context, c client.Client, n *corev1.Node, resources []string) error {
	type operation struct {
		Op    string `json:"op"`
		Path  string `json:"path"`
		Value string `json:"value,omitempty"`
	}
	var patch []operation
	parts := map[string]corev1.ResourceList{"capacity": n.Status.Capacity, "allocatable": n.Status.Allocatable}
	for part, list := range parts {
		for _, r := range resources {
			if _, there := list[corev1.ResourceName(r)]; there {
				path := "/status/" + part + "/" + strings.ReplaceAll(r, "/", "~1")
				patch = append(patch,
					operation{Op: "test", Path: path, Value: "0"}, operation{Op: "remove", Path: path})
			}
		}
	}
	body, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	bare := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name}}
	if err := c.Status().Patch(ctx, bare, client.RawPatch(types.JSONPatchType, body)); err != nil {
		return fmt.Errorf("remove %s from the status of node %s: %w", enumerate(resources, ", "), n.Name, err)
	}
	return nil
}

// The pause of a node after a removal. It doubles while kubelet writes back what was removed.
const (
	minPause = time.Second
	maxPause = 5 * time.Minute
)

// residueReconciler removes resources of spokes that no LAN has on a node from that node's status. Only one may run at
// a time.
type residueReconciler struct {
	client  client.Client
	now     func() time.Time
	pauses  map[string]pause // by node
	metrics *Metrics
}

// pause is the time after a removal in which a node's status is not written.
type pause struct {
	until   time.Time
	length  time.Duration
	removed []string
}

// Reconcile removes the residue in one node's status.
func (r *residueReconciler) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	var n corev1.Node
	if err := r.client.Get(ctx, request.NamespacedName, &n); err != nil {
		delete(r.pauses, request.Name)
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	var lans v1beta1.LANList
	if err := r.client.List(ctx, &lans, client.UnsafeDisableDeepCopy); err != nil {
		return ctrl.Result{}, fmt.Errorf("list LANs: %w", err)
	}
	left := Residue(&n, heldOn(&n, lans.Items))
	if len(left) == 0 {
		return ctrl.Result{}, nil
	}
	now, last := r.now(), r.pauses[n.Name]
	if wait := last.until.Sub(now); wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, nil
	}
	next := pause{length: minPause, removed: left}
	if slices.ContainsFunc(left, func(name string) bool { return slices.Contains(last.removed, name) }) {
		next.length = min(2*last.length, maxPause)
	}
	next.until = now.Add(next.length)
	if err := RemoveResidue(ctx, r.client, &n, left); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	r.pauses[n.Name] = next
	r.metrics.residue.Add(float64(len(left)))
	log.FromContext(ctx).Info("removed resources that no LAN holds from the node's status",
		"node", n.Name, "resources", left)
	return ctrl.Result{}, nil
}

// heldOn returns a function that says whether a resource belongs to a spoke of a LAN that spans the node. Such a
// resource stays even with the value 0, because the node's daemon may not be running.
func heldOn(n *corev1.Node, lans []v1beta1.LAN) func(resource string) bool {
	held := map[string]bool{}
	here := []node{{Name: n.Name, Labels: n.Labels, Exists: true}}
	for i := range lans {
		if holds := lans[i].Status.Holds; holds != nil && len(spannedBy(&lans[i], here)) > 0 {
			for _, spoke := range holds.Spokes {
				held[v1beta1.Resource(spoke)] = true
			}
		}
	}
	return func(resource string) bool { return held[resource] }
}

// nodesWithResidue returns the nodes that list spokes with the value 0, because a LAN has changed.
func (r *residueReconciler) nodesWithResidue(ctx context.Context, _ client.Object) []reconcile.Request {
	var nodes corev1.NodeList
	if err := r.client.List(ctx, &nodes, client.UnsafeDisableDeepCopy); err != nil {
		log.FromContext(ctx).Error(err, "list the nodes that may have residue")
		return nil
	}
	var requests []reconcile.Request
	for i := range nodes.Items {
		if hasResidue(&nodes.Items[i]) {
			requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&nodes.Items[i])})
		}
	}
	return requests
}

// hasResidue says whether a node lists a spoke with the value 0.
func hasResidue(n client.Object) bool {
	return len(Residue(n.(*corev1.Node), func(string) bool { return false })) > 0
}
