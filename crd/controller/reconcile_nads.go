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

// nadReconciler keeps the NADs of one LAN as they should be.
type nadReconciler struct{ client client.Client }

// Reconcile creates, repairs and deletes the LAN's NADs. Those of a LAN that is being deleted stay until it is gone, because an attached
// pod may get a new sandbox; then they are the garbage collector's.
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

// syncNADs makes a LAN's NADs those of the spokes it holds.
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
		changes.remove = nil // what is too many may be what the status is about to grant
	}
	return r.apply(ctx, changes)
}

func (r *nadReconciler) apply(ctx context.Context, changes nadChanges) error {
	do := func(verb string, write func(*nadv1.NetworkAttachmentDefinition) error) func(*nadv1.NetworkAttachmentDefinition) error {
		return func(nad *nadv1.NetworkAttachmentDefinition) error {
			err := write(nad)
			switch {
			case apierrors.IsAlreadyExists(err), apierrors.IsConflict(err), apierrors.IsNotFound(err):
				return nil // the cache was behind; its next event leads here again
			case err != nil:
				return fmt.Errorf("%s NAD %s/%s: %w", verb, nad.Namespace, nad.Name, err)
			}
			log.FromContext(ctx).Info(verb+" NAD", "nad", nad.Namespace+"/"+nad.Name)
			return nil
		}
	}
	return errors.Join(
		apply(changes.create, do("create", func(nad *nadv1.NetworkAttachmentDefinition) error { return r.client.Create(ctx, nad) })),
		apply(changes.update, do("repair", func(nad *nadv1.NetworkAttachmentDefinition) error { return r.client.Update(ctx, nad) })),
		apply(changes.remove, do("delete", func(nad *nadv1.NetworkAttachmentDefinition) error {
			return r.client.Delete(ctx, nad, client.Preconditions{UID: &nad.UID, ResourceVersion: &nad.ResourceVersion})
		})),
	)
}

// lansOf are the LANs that a NAD concerns: its owner, and any LAN of its namespace that wants its name.
func (r *nadReconciler) lansOf(ctx context.Context, nad client.Object) []reconcile.Request {
	var requests []reconcile.Request
	if owner := metav1.GetControllerOf(nad); isLAN(owner) {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKey{Namespace: nad.GetNamespace(), Name: owner.Name}})
	}
	spoke, ok := strings.CutPrefix(nad.GetName(), v1beta1.VethNAD(""))
	if !ok {
		spoke, ok = strings.CutPrefix(nad.GetName(), v1beta1.MacvtapNAD(""))
	}
	if !ok {
		return requests
	}
	var lans v1beta1.LANList
	if err := r.client.List(ctx, &lans, client.InNamespace(nad.GetNamespace()), client.UnsafeDisableDeepCopy); err != nil {
		log.FromContext(ctx).Error(err, "list the LANs that want a NAD", "nad", nad.GetNamespace()+"/"+nad.GetName())
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
