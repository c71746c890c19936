package e2e

import (
	"context"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/cluster/install"
)

// patience is how long a test waits for what takes a second or two on an idle machine.
const patience = 3 * time.Minute

// sweep removes what earlier runs and the demo left: pods on LANs, LANs, and the tests' namespaces.
func (b *testbed) sweep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	var pods corev1.PodList
	if err := b.client.List(ctx, &pods); err != nil {
		return fmt.Errorf("look for what earlier runs left: %w", err)
	}
	for _, p := range pods.Items {
		if p.Annotations[networksAnnotation] != "" {
			if err := b.client.Delete(ctx, &p, client.GracePeriodSeconds(0)); client.IgnoreNotFound(err) != nil {
				return fmt.Errorf("remove what earlier runs left: %w", err)
			}
		}
	}
	var namespaces corev1.NamespaceList
	if err := b.client.List(ctx, &namespaces, client.HasLabels{testLabel}); err != nil {
		return fmt.Errorf("look for what earlier runs left: %w", err)
	}
	for _, ns := range namespaces.Items {
		if err := b.client.Delete(ctx, &ns); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("remove what earlier runs left: %w", err)
		}
	}
	var lans v1beta1.LANList
	if err := b.client.List(ctx, &lans); meta.IsNoMatchError(err) || apierrors.IsNotFound(err) {
		return nil // a cluster that has never seen k8slan
	} else if err != nil {
		return fmt.Errorf("look for what earlier runs left: %w", err)
	}
	for _, lan := range lans.Items {
		if err := b.client.Delete(ctx, &lan); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("remove what earlier runs left: %w", err)
		}
	}
	_, err := await(ctx, b.client, &corev1.NamespaceList{}, []client.ListOption{client.HasLabels{testLabel}},
		func(left []*corev1.Namespace) bool { return len(left) == 0 })
	return err
}

// chartDir is the chart, in the checkout.
const chartDir = "charts/k8slan"

// byEVPN has the chart run what LANs with discovery evpn need.
const byEVPN = "evpn.enabled=true"

// chart installs the chart, or what changed in it, and returns when all of k8slan is ready.
func (b *testbed) chart(ctx context.Context) error {
	if err := b.Chart(ctx, "node.metricsPort="+metricsPort, "controller.metricsPort="+metricsPort, byEVPN, "evpn.reflectors.metricsPort="+metricsPort, "node.megalos=true"); err != nil {
		return err
	}
	return b.awaitInstalled(ctx)
}

// awaitInstalled returns when the daemon, the controller and the reflectors are ready.
func (b *testbed) awaitInstalled(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	here := []client.ListOption{client.InNamespace(install.Namespace)}
	if _, err := await(ctx, b.client, &appsv1.DaemonSetList{}, here, func(all []*appsv1.DaemonSet) bool {
		return len(all) == 1 && daemonsReady(all[0])
	}); err != nil {
		return fmt.Errorf("wait for daemonset k8slan-ds: %w", err)
	}
	if _, err := await(ctx, b.client, &appsv1.DeploymentList{}, here, func(all []*appsv1.Deployment) bool {
		return len(all) == 2 && deploymentReady(all[0]) && deploymentReady(all[1])
	}); err != nil {
		return fmt.Errorf("wait for deployments k8slan-controller-manager and k8slan-reflector: %w", err)
	}
	return nil
}

func daemonsReady(d *appsv1.DaemonSet) bool {
	s := d.Status
	return s.ObservedGeneration == d.Generation && s.DesiredNumberScheduled == 2 &&
		s.UpdatedNumberScheduled == s.DesiredNumberScheduled && s.NumberReady == s.DesiredNumberScheduled
}

func deploymentReady(d *appsv1.Deployment) bool {
	s := d.Status
	return s.ObservedGeneration == d.Generation && s.Replicas == *d.Spec.Replicas &&
		s.UpdatedReplicas == *d.Spec.Replicas && s.ReadyReplicas == *d.Spec.Replicas
}

// created orders by age.
func created(o metav1.Object) time.Time { return o.GetCreationTimestamp().Time }
