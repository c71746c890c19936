package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// nadReconciler creates, repairs and deletes the NADs of one LAN.
type nadReconciler struct{ client client.Client }

// Reconcile creates, repairs and deletes the LAN's NADs. The NADs of a LAN that is being deleted stay until it is gone,
// because an attached pod may get a new sandbox. Then the garbage collector deletes them.
func (r *nadReconciler) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	var lan v1beta1.LAN
	if err := r.client.Get(ctx, request.NamespacedName, &lan); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if beingDeleted(&lan) {
		return ctrl.Result{}, nil
	}
	return ctrl.Result{}, r.syncNADs(ctx, &lan)
}

// syncNADs creates, repairs and deletes NADs until the LAN has those of the spokes that it holds.
func (r *nadReconciler) syncNADs(ctx context.Context, lan *v1beta1.LAN) error {
	var have nadv1.NetworkAttachmentDefinitionList
	if err := r.client.List(ctx, &have, client.InNamespace(lan.Namespace)); err != nil {
		return fmt.Errorf("list the NADs of namespace %s: %w", lan.Namespace, err)
	}
	want, err := wantNADs(lan)
	if err != nil {
		return err
	}
	changes := diffNADs(lan, want, have.Items)
	if lan.Status.ObservedGeneration != lan.Generation {
		changes.remove = nil // the status is outdated: it may be about to hold these spokes
	}
	return r.apply(ctx, changes)
}

func (r *nadReconciler) apply(ctx context.Context, changes nadChanges) error {
	type write = func(*nadv1.NetworkAttachmentDefinition) error
	logged := func(verb string, f write) write {
		return func(nad *nadv1.NetworkAttachmentDefinition) error {
			err := f(nad)
			switch {
			case apierrors.IsAlreadyExists(err), apierrors.IsConflict(err), apierrors.IsNotFound(err):
				return nil // the cache was outdated; its next event starts the next run
			case err != nil:
				return fmt.Errorf("%s NAD %s/%s: %w", verb, nad.Namespace, nad.Name, err)
			}
			log.FromContext(ctx).Info(verb+" NAD", "nad", nad.Namespace+"/"+nad.Name)
			return nil
		}
	}
	return errors.Join(
		apply(changes.create, logged("create", func(nad *nadv1.NetworkAttachmentDefinition) error {
			return r.client.Create(ctx, nad)
		})),
		apply(changes.update, logged("repair", func(nad *nadv1.NetworkAttachmentDefinition) error {
			return r.client.Update(ctx, nad)
		})),
		apply(changes.remove, logged("delete", func(nad *nadv1.NetworkAttachmentDefinition) error {
			return r.client.Delete(ctx, nad, client.Preconditions{UID: &nad.UID, ResourceVersion: &nad.ResourceVersion})
		})),
	)
}

// lansOf returns the LANs that a NAD concerns: its owner, and each LAN in its namespace that holds a spoke with this
// NAD.
func (r *nadReconciler) lansOf(ctx context.Context, nad client.Object) []reconcile.Request {
	var requests []reconcile.Request
	if owner := metav1.GetControllerOf(nad); isLAN(owner) {
		key := client.ObjectKey{Namespace: nad.GetNamespace(), Name: owner.Name}
		requests = append(requests, reconcile.Request{NamespacedName: key})
	}
	spoke, ok := strings.CutPrefix(nad.GetName(), v1beta1.VethNAD(""))
	if !ok {
		spoke, ok = strings.CutPrefix(nad.GetName(), v1beta1.MacvtapNAD(""))
	}
	if !ok {
		return requests
	}
	var lans v1beta1.LANList
	err := r.client.List(ctx, &lans, client.InNamespace(nad.GetNamespace()), client.UnsafeDisableDeepCopy)
	if err != nil {
		log.FromContext(ctx).Error(err, "list the LANs of a NAD's namespace",
			"nad", nad.GetNamespace()+"/"+nad.GetName())
		return requests
	}
	for i := range lans.Items {
		holds := lans.Items[i].Status.Holds
		request := reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&lans.Items[i])}
		if holds != nil && slices.Contains(holds.Spokes, spoke) && !slices.Contains(requests, request) {
			requests = append(requests, request)
		}
	}
	return requests
}
