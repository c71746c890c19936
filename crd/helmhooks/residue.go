package helmhooks

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/controller"
	"github.com/k8slan/k8slan/crd/v1beta1"
)

// Residue is the name of all objects of the last step of an uninstallation, which removes resources from nodes.
const Residue = "k8slan-residue"

// RemoveResidue removes k8slan's resources from the status of each node as soon as they are 0, and returns when no node
// has one left or k8slan is installed again. The end of ctx is no error. kubelet forgets a resource five minutes after
// its plugin has ended, and leaves it in the status with the value 0 for ever (setters.go in pkg/kubelet/nodestatus).
func (r Release) RemoveResidue(ctx context.Context) error {
	var left map[string][]string
	err := waitUntil(ctx, r.Client, &corev1.NodeList{}, nil, func(nodes []corev1.Node) (bool, error) {
		left = map[string][]string{}
		for i := range nodes {
			n := &nodes[i]
			zero, others := spokeResources(n)
			if len(others) > 0 {
				left[n.Name] = others
			}
			if len(zero) == 0 {
				continue
			}
			if err := controller.RemoveResidue(ctx, r.Client, n, zero); err != nil {
				left[n.Name] = append(left[n.Name], zero...)
				r.Log.Warn("cannot remove resources from the node; will retry when it changes", "node", n.Name, "err",
					err)
				continue
			}
			r.Log.Info("removed resources from the node", "node", n.Name, "number", len(zero))
		}
		if len(left) == 0 {
			return true, nil
		}
		return r.isInstalled(ctx) // then the new controller removes them
	})
	for _, node := range slices.Sorted(maps.Keys(left)) {
		r.Log.Warn("the node still has resources", "node", node, "resources", left[node])
	}
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("wait until no node has a resource of k8slan: %w", err)
	}
	if err == nil && len(left) == 0 {
		r.Log.Info("no node has a resource of k8slan any more")
	}
	return nil
}

// isInstalled says whether k8slan is installed again.
func (r Release) isInstalled(ctx context.Context) (bool, error) {
	daemon := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: r.Namespace, Name: Daemon}}
	err := r.Client.Get(ctx, client.ObjectKeyFromObject(daemon), daemon)
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// spokeResources returns the resources of spokes in a node's status: those with the value 0, and those that kubelet has
// not forgotten yet.
func spokeResources(n *corev1.Node) (zero, others []string) {
	zero = controller.Residue(n, func(string) bool { return false })
	for name := range n.Status.Capacity {
		if strings.HasPrefix(string(name), v1beta1.Resource("")) && !slices.Contains(zero, string(name)) {
			others = append(others, string(name))
		}
	}
	slices.Sort(others)
	return zero, others
}

// OwnResidueObjects makes the ClusterRole of the last step the owner of the step's other objects, so that the garbage
// collector deletes them with it.
func (r Release) OwnResidueObjects(ctx context.Context) error {
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: Residue}}
	if err := r.Client.Get(ctx, client.ObjectKeyFromObject(role), role); err != nil {
		return fmt.Errorf("get ClusterRole %s: %w", Residue, err)
	}
	owner := map[string]any{"metadata": map[string]any{"ownerReferences": []metav1.OwnerReference{
		{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "ClusterRole", Name: role.Name, UID: role.UID},
	}}}
	patch, err := json.Marshal(owner)
	if err != nil {
		return err
	}
	namespaced, global := metav1.ObjectMeta{Namespace: r.Namespace, Name: Residue}, metav1.ObjectMeta{Name: Residue}
	for _, o := range []client.Object{
		&corev1.ServiceAccount{ObjectMeta: namespaced},
		&appsv1.Deployment{ObjectMeta: namespaced},
		&rbacv1.ClusterRoleBinding{ObjectMeta: global},
		&admissionv1.ValidatingAdmissionPolicy{ObjectMeta: global},
		&admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: global},
	} {
		if err := r.Client.Patch(ctx, o, client.RawPatch(types.MergePatchType, patch)); err != nil {
			return fmt.Errorf("make ClusterRole %s the owner of %T: %w", Residue, o, err)
		}
	}
	return nil
}

// DeleteResidueObjects deletes the ClusterRole of the last step. The garbage collector then deletes all that it owns,
// the pod of this program included.
func (r Release) DeleteResidueObjects(ctx context.Context) error {
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: Residue}}
	err := r.Client.Delete(ctx, role, client.PropagationPolicy(metav1.DeletePropagationBackground))
	return ignoreAbsent(err)
}
