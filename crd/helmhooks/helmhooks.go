// Package helmhooks does the steps of an upgrade and an uninstallation that Helm cannot do by itself.
package helmhooks

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// Names of objects in the chart.
const (
	Daemon     = "k8slan-ds"                 // DaemonSet
	Controller = "k8slan-controller-manager" // Deployment
	Puller     = "k8slan-pull"               // DaemonSet of an upgrade, which pulls the image
	Cleaner    = "k8slan-clean"              // DaemonSet of an uninstallation, which cleans nodes
	Lease      = "k8slan-controller"         // Lease of the leading controller
)

// Release is one installation of the chart.
type Release struct {
	Client    client.WithWatch
	Namespace string // of the installation
	Log       *slog.Logger
}

// Stop deletes the daemon and the controller, and waits until their pods are gone from every node that answers. It
// fails if ctx ends before. Attached pods keep their interfaces.
func (r Release) Stop(ctx context.Context) error {
	r.logAttachedPods(ctx)
	here := metav1.ObjectMeta{Namespace: r.Namespace}
	daemon, controller := &appsv1.DaemonSet{ObjectMeta: here}, &appsv1.Deployment{ObjectMeta: here}
	daemon.Name, controller.Name = Daemon, Controller
	for _, o := range []client.Object{daemon, controller} {
		err := r.Client.Delete(ctx, o, client.PropagationPolicy(metav1.DeletePropagationBackground))
		if client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("delete %s: %w", o.GetName(), err)
		}
	}
	pods := []client.ListOption{
		client.InNamespace(r.Namespace), client.MatchingLabels{"app.kubernetes.io/name": "k8slan"},
	}
	var left []string
	err := waitUntil(ctx, r.Client, &corev1.PodList{}, pods, func(all []corev1.Pod) (bool, error) {
		unreachable, err := r.unreachableNodes(ctx)
		left = nil
		for _, p := range all {
			component, node := p.Labels["app.kubernetes.io/component"], p.Spec.NodeName
			if (component == "node" || component == "controller") && node != "" && !unreachable[node] {
				left = append(left, p.Name)
			}
		}
		return len(left) == 0, err
	})
	if err != nil {
		return fmt.Errorf("wait until the pods %s have ended: %w", strings.Join(left, ", "), err)
	}
	r.Log.Info("daemon and controller have ended")
	return nil
}

// logAttachedPods logs the pods that are about to lose an interface.
func (r Release) logAttachedPods(ctx context.Context) {
	var lans v1beta1.LANList
	if err := r.Client.List(ctx, &lans); err != nil {
		r.Log.Warn("cannot list LANs, so the log has no list of attached pods", "err", err)
		return
	}
	for _, lan := range lans.Items {
		name := lan.Namespace + "/" + lan.Name
		for _, spoke := range lan.Status.Spokes {
			for _, a := range spoke.Attachments {
				r.Log.Warn("a pod loses its interface",
					"pod", a.Pod, "interface", a.Interface, "node", a.Node, "lan", name, "spoke", spoke.Name)
			}
		}
		for _, pool := range lan.Status.Pools {
			for _, n := range pool.Nodes {
				r.Log.Warn("pods lose their interfaces", "pods", n.Attached, "node", n.Node, "lan", name,
					"pool", pool.Name)
			}
		}
	}
}

// WaitForCleanNodes waits until every node that answers is clean. If ctx ends before, it logs the nodes that are not,
// and returns no error, because one node must not block the uninstallation of the others.
func (r Release) WaitForCleanNodes(ctx context.Context) error {
	left, err := r.waitForDaemonSet(ctx, Cleaner)
	for _, node := range left {
		r.Log.Warn("node is not clean, because it does not answer or its pod failed; when it is back, run "+
			"kubectl debug node/"+node+" --profile=sysadmin --image=<k8slan's image> -- /k8slan clean --host",
			"node", node)
	}
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("wait until the nodes are clean: %w", err)
	}
	if err == nil {
		r.Log.Info("every node that answers is clean", "left", len(left))
	}
	return nil
}

// WaitForImage waits until every node that answers has the new image. It fails if ctx ends before.
func (r Release) WaitForImage(ctx context.Context) error {
	left, err := r.waitForDaemonSet(ctx, Puller)
	if err != nil {
		return fmt.Errorf("wait until the nodes have the new image: %w; nodes without it: %s; see "+
			"kubectl -n %s describe pods -l app.kubernetes.io/component=pull; nothing has been changed",
			err, strings.Join(left, ", "), r.Namespace)
	}
	r.Log.Info("every node that answers has the new image", "without", len(left))
	return nil
}

// waitForDaemonSet waits until a DaemonSet's pods are ready on every node that answers, and returns the nodes on which
// they are not. It fails if ctx ends before.
func (r Release) waitForDaemonSet(ctx context.Context, name string) (left []string, err error) {
	set := []client.ListOption{client.InNamespace(r.Namespace), client.MatchingFields{"metadata.name": name}}
	err = waitUntil(ctx, r.Client, &appsv1.DaemonSetList{}, set, func(all []appsv1.DaemonSet) (done bool, err error) {
		if len(all) != 1 || all[0].Status.ObservedGeneration != all[0].Generation {
			return false, nil
		}
		done, left, err = r.podsReady(ctx, all[0])
		return done, err
	})
	return left, err
}

// podsReady says whether a DaemonSet's pods are ready on every node that answers, and returns the nodes on which they
// are not.
func (r Release) podsReady(ctx context.Context, set appsv1.DaemonSet) (done bool, left []string, err error) {
	unreachable, err := r.unreachableNodes(ctx)
	if err != nil {
		return false, nil, err
	}
	var pods corev1.PodList
	labels := client.MatchingLabels(set.Spec.Selector.MatchLabels)
	if err := r.Client.List(ctx, &pods, client.InNamespace(r.Namespace), labels); err != nil {
		return false, nil, fmt.Errorf("list the pods of %s: %w", set.Name, err)
	}
	done = len(pods.Items) >= int(set.Status.DesiredNumberScheduled)
	for _, p := range pods.Items {
		ready := slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
		node := nodeOf(p)
		if !ready {
			left = append(left, node)
		}
		done = done && (ready || unreachable[node])
	}
	return done, left, nil
}

// nodeOf returns the node of a DaemonSet's pod, which need not be bound to it yet.
func nodeOf(p corev1.Pod) string {
	if p.Spec.NodeName != "" || p.Spec.Affinity == nil || p.Spec.Affinity.NodeAffinity == nil ||
		p.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return p.Spec.NodeName
	}
	for _, term := range p.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms {
		for _, field := range term.MatchFields {
			if field.Key == metav1.ObjectNameField && len(field.Values) == 1 {
				return field.Values[0]
			}
		}
	}
	return ""
}

// unreachableNodes returns, by name, whether a node does not answer.
func (r Release) unreachableNodes(ctx context.Context) (map[string]bool, error) {
	var nodes corev1.NodeList
	if err := r.Client.List(ctx, &nodes); err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	unreachable := map[string]bool{}
	for _, n := range nodes.Items {
		unreachable[n.Name] = !slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
		})
	}
	return unreachable, nil
}

// ReasonUninstalled is the reason for which a LAN is not Ready after k8slan was uninstalled.
const ReasonUninstalled = "Uninstalled"

// RemoveObjects removes what k8slan wrote to the API: NADs, LANNodes, the controller's lease, and the finalizers of
// LANs. LANs stay. Their statuses keep what they hold, so that they get the same again from a later installation.
func (r Release) RemoveObjects(ctx context.Context) error {
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: r.Namespace, Name: Lease}}
	return errors.Join(
		r.removeNADs(ctx),
		r.uninstallLANs(ctx),
		r.removeLANNodes(ctx),
		ignoreAbsent(r.Client.Delete(ctx, lease)),
	)
}

func (r Release) removeNADs(ctx context.Context) error {
	var nads nadv1.NetworkAttachmentDefinitionList
	if err := r.Client.List(ctx, &nads, client.MatchingLabels{"app.kubernetes.io/managed-by": "k8slan"}); err != nil {
		return ignoreAbsent(err)
	}
	var errs []error
	deleted := 0
	for i := range nads.Items {
		nad := &nads.Items[i]
		owner := metav1.GetControllerOf(nad)
		if owner == nil || owner.Kind != "LAN" || owner.APIVersion != v1beta1.GroupVersion.String() {
			continue
		}
		if err := ignoreAbsent(r.Client.Delete(ctx, nad, client.Preconditions{UID: &nad.UID})); err != nil {
			errs = append(errs, fmt.Errorf("delete NAD %s/%s: %w", nad.Namespace, nad.Name, err))
			continue
		}
		deleted++
	}
	r.Log.Info("deleted NADs", "number", deleted)
	return errors.Join(errs...)
}

func (r Release) uninstallLANs(ctx context.Context) error {
	var lans v1beta1.LANList
	if err := r.Client.List(ctx, &lans); err != nil {
		return ignoreAbsent(err)
	}
	var errs []error
	for i := range lans.Items {
		if err := ignoreAbsent(r.uninstallLAN(ctx, &lans.Items[i])); err != nil {
			errs = append(errs, fmt.Errorf("LAN %s/%s: %w", lans.Items[i].Namespace, lans.Items[i].Name, err))
		}
	}
	r.Log.Info("removed the finalizers of LANs, which stay", "number", len(lans.Items))
	return errors.Join(errs...)
}

func (r Release) uninstallLAN(ctx context.Context, lan *v1beta1.LAN) error {
	before := lan.DeepCopy()
	lan.Status = v1beta1.LANStatus{
		ObservedGeneration: lan.Status.ObservedGeneration, Holds: lan.Status.Holds, SpokeCount: lan.Status.SpokeCount,
		Conditions: lan.Status.Conditions, Reason: ReasonUninstalled,
	}
	meta.SetStatusCondition(&lan.Status.Conditions, metav1.Condition{
		Type: v1beta1.ConditionReady, Status: metav1.ConditionFalse, ObservedGeneration: lan.Generation,
		Reason:  ReasonUninstalled,
		Message: "k8slan is not installed any more; the LAN works again when k8slan is installed again",
	})
	if err := r.Client.Status().Patch(ctx, lan, client.MergeFrom(before)); err != nil {
		return fmt.Errorf("write the status: %w", err)
	}
	before = lan.DeepCopy()
	lan.Finalizers = slices.DeleteFunc(lan.Finalizers, func(f string) bool {
		return strings.HasPrefix(f, v1beta1.GroupVersion.Group+"/")
	})
	if len(lan.Finalizers) == len(before.Finalizers) {
		return nil
	}
	patch := client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
	if err := r.Client.Patch(ctx, lan, patch); err != nil {
		return fmt.Errorf("remove the finalizer: %w", err)
	}
	return nil
}

func (r Release) removeLANNodes(ctx context.Context) error {
	if err := r.Client.DeleteAllOf(ctx, &v1beta1.LANNode{}); ignoreAbsent(err) != nil {
		return fmt.Errorf("delete LANNodes: %w", err)
	}
	return nil
}

// ignoreAbsent drops the error that an object or its kind does not exist.
func ignoreAbsent(err error) error {
	if apierrors.IsNotFound(err) || meta.IsNoMatchError(err) {
		return nil
	}
	return err
}
