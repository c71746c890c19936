// Package controller decides what each LAN holds, writes the LANs' NADs and statuses, and removes the finalizer of a
// deleted LAN when every node has removed it.
//
// It has three reconcilers, each with a pure core. lanReconciler handles all LANs together, one run at a time: admit
// decides what each LAN holds (status.holds), and status sums up what the nodes report. nadReconciler handles one LAN
// at a time and keeps two NADs for each spoke and pool that it holds. residueReconciler handles one node at a time and
// removes resources that no LAN has any more from its status.
package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// NewScheme returns a scheme with the kinds that the controller reads and writes.
func NewScheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	kinds := []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, nadv1.AddToScheme, v1beta1.AddToScheme}
	for _, add := range kinds {
		if err := add(scheme); err != nil {
			panic(fmt.Sprintf("register types in the scheme: %v", err))
		}
	}
	return scheme
}

// Setup registers the controller's reconcilers with a manager, which must have the scheme of NewScheme. If several
// replicas run, the manager must elect a leader, because only one controller may decide what LANs hold. discovery is
// for LANs whose spec has none. The caller registers m with Prometheus.
func Setup(mgr ctrl.Manager, discovery v1beta1.Discovery, m *Metrics) error {
	if err := setupLANs(mgr, discovery, m); err != nil {
		return fmt.Errorf("set up the controller of LANs: %w", err)
	}
	if err := setupNADs(mgr); err != nil {
		return fmt.Errorf("set up the controller of NADs: %w", err)
	}
	if err := setupResidue(mgr, m); err != nil {
		return fmt.Errorf("set up the controller of residue: %w", err)
	}
	return nil
}

// everything is the only key in the work queue of lanReconciler.
type everything struct{}

func setupLANs(mgr ctrl.Manager, discovery v1beta1.Discovery, m *Metrics) error {
	all := handler.TypedEnqueueRequestsFromMapFunc(func(context.Context, client.Object) []everything {
		return []everything{{}}
	})
	return builder.TypedControllerManagedBy[everything](mgr).
		Named("claims"). // a label of metrics
		Watches(&v1beta1.LAN{}, all).
		Watches(&v1beta1.LANNode{}, all).
		Watches(&corev1.Node{}, all, builder.WithPredicates(predicate.Funcs{
			UpdateFunc: func(e event.UpdateEvent) bool { return nodeChanged(e.ObjectOld, e.ObjectNew) },
		})).
		Watches(&nadv1.NetworkAttachmentDefinition{}, all, builder.WithPredicates(predicate.Funcs{
			CreateFunc: func(e event.CreateEvent) bool { return !belongsToLAN(e.Object) },
			DeleteFunc: func(e event.DeleteEvent) bool { return !belongsToLAN(e.Object) },
			UpdateFunc: func(e event.UpdateEvent) bool {
				return !belongsToLAN(e.ObjectOld) || !belongsToLAN(e.ObjectNew)
			},
		})).
		Complete(&lanReconciler{
			cache:    mgr.GetClient(),
			live:     mgr.GetAPIReader(),
			recorder: mgr.GetEventRecorder("k8slan-controller"),
			now:      metav1.Now,
			metrics:  m,

			discovery: discovery,
		})
}

func setupNADs(mgr ctrl.Manager) error {
	r := &nadReconciler{client: mgr.GetClient()}
	return ctrl.NewControllerManagedBy(mgr).
		Named("nads").
		For(&v1beta1.LAN{}).
		Watches(&nadv1.NetworkAttachmentDefinition{}, handler.EnqueueRequestsFromMapFunc(r.lansOf)).
		Complete(r)
}

func setupResidue(mgr ctrl.Manager, m *Metrics) error {
	r := &residueReconciler{client: mgr.GetClient(), now: time.Now, pauses: map[string]pause{}, metrics: m}
	return ctrl.NewControllerManagedBy(mgr).
		Named("residue").
		For(&corev1.Node{}, builder.WithPredicates(predicate.NewPredicateFuncs(hasResidue))).
		Watches(&v1beta1.LAN{}, handler.EnqueueRequestsFromMapFunc(r.nodesWithResidue),
			builder.WithPredicates(predicate.Funcs{
				CreateFunc: func(event.CreateEvent) bool { return false }, // a new LAN leaves no residue
				UpdateFunc: func(e event.UpdateEvent) bool {
					return mayLeaveResidue(e.ObjectOld.(*v1beta1.LAN), e.ObjectNew.(*v1beta1.LAN))
				},
			})).
		WithOptions(controller.Options{MaxConcurrentReconciles: 1}).
		Complete(r)
}

// mayLeaveResidue says whether a LAN's spokes or nodes have changed, so that a node may list a resource with the value
// 0.
func mayLeaveResidue(before, after *v1beta1.LAN) bool {
	return !equality.Semantic.DeepEqual(before.Status.Holds, after.Status.Holds) ||
		!maps.Equal(before.Spec.NodeSelector, after.Spec.NodeSelector)
}

// nodeChanged says whether a Node's labels or health have changed. It ignores kubelet's heartbeats.
func nodeChanged(before, after client.Object) bool {
	return !equality.Semantic.DeepEqual(before.GetLabels(), after.GetLabels()) ||
		healthOf(before.(*corev1.Node)) != healthOf(after.(*corev1.Node))
}

// belongsToLAN says whether a NAD is owned by a LAN and so cannot be foreign to one.
func belongsToLAN(nad client.Object) bool { return isLAN(metav1.GetControllerOf(nad)) }

// apply runs change on each object and joins the errors, so that one bad object does not stop the others.
func apply[T any](objects []T, change func(*T) error) error {
	var errs []error
	for i := range objects {
		errs = append(errs, change(&objects[i]))
	}
	return errors.Join(errs...)
}
