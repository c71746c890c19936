package e2e

import (
	"context"
	"fmt"
	"slices"
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

// patience is how long a test waits for something that takes a second or two on an idle machine.
const patience = 3 * time.Minute

// sweep removes the remains of earlier runs and of the demo: pods on LANs, LANs, and the tests' namespaces.
func (b *testbed) sweep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	var pods corev1.PodList
	if err := b.client.List(ctx, &pods); err != nil {
		return fmt.Errorf("list the remains of earlier runs: %w", err)
	}
	for _, p := range pods.Items {
		if p.Annotations[networksAnnotation] != "" {
			if err := b.client.Delete(ctx, &p, client.GracePeriodSeconds(0)); client.IgnoreNotFound(err) != nil {
				return fmt.Errorf("remove the remains of earlier runs: %w", err)
			}
		}
	}
	var namespaces corev1.NamespaceList
	if err := b.client.List(ctx, &namespaces, client.HasLabels{testLabel}); err != nil {
		return fmt.Errorf("list the remains of earlier runs: %w", err)
	}
	for _, ns := range namespaces.Items {
		if err := b.client.Delete(ctx, &ns); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("remove the remains of earlier runs: %w", err)
		}
	}
	var lans v1beta1.LANList
	if err := b.client.List(ctx, &lans); meta.IsNoMatchError(err) || apierrors.IsNotFound(err) {
		return nil // k8slan was never installed on this cluster
	} else if err != nil {
		return fmt.Errorf("list the remains of earlier runs: %w", err)
	}
	for _, lan := range lans.Items {
		if err := b.client.Delete(ctx, &lan); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("remove the remains of earlier runs: %w", err)
		}
	}
	_, err := await(ctx, b.client, &corev1.NamespaceList{}, []client.ListOption{client.HasLabels{testLabel}},
		func(left []*corev1.Namespace) bool { return len(left) == 0 })
	return err
}

// chartDir is the path of the chart in the checkout.
const chartDir = "charts/k8slan"

// usualValues are the chart's values of all tests that do not ask for others.
var usualValues = []string{
	"node.metricsPort=" + metricsPort, "controller.metricsPort=" + metricsPort,
	"evpn.enabled=true", "evpn.reflectors.metricsPort=" + metricsPort, "node.megalos=true",
}

// chart installs the chart with the usual values and changes to them, and returns when all of k8slan is ready but the
// reflectors: they are replaced one after the other, 10 s apart, and only EVPN needs them. What the hooks do, the nodes
// have: the image and the CRDs.
func (b *testbed) chart(ctx context.Context, changes ...string) error {
	return b.install(ctx, b.Bed, append([]string{"--no-hooks"}, set(changes)...)...)
}

// install installs a version with the usual values and further arguments of helm upgrade.
func (b *testbed) install(ctx context.Context, version *install.Bed, args ...string) error {
	if err := version.Install(ctx, append(set(usualValues), args...)...); err != nil {
		return err
	}
	b.usual = version == b.Bed && !slices.Contains(args, "--set")
	return b.awaitInstalled(ctx)
}

// set returns the arguments of Helm for values.
func set(values []string) (args []string) {
	for _, v := range values {
		args = append(args, "--set", v)
	}
	return args
}

// awaitInstalled returns when the daemons and the controllers are ready.
func (b *testbed) awaitInstalled(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	here := []client.ListOption{client.InNamespace(install.Namespace)}
	if _, err := await(ctx, b.client, &appsv1.DaemonSetList{}, here, func(all []*appsv1.DaemonSet) bool {
		return len(all) == 1 && daemonsReady(all[0])
	}); err != nil {
		return fmt.Errorf("wait for daemonset k8slan-ds: %w", err)
	}
	return b.awaitDeployment(ctx, "k8slan-controller-manager")
}

// awaitDeployment returns when all pods of one of k8slan's Deployments are new and ready, and no other is left.
func (b *testbed) awaitDeployment(ctx context.Context, name string) error {
	which := []client.ListOption{client.InNamespace(install.Namespace), client.MatchingFields{"metadata.name": name}}
	_, err := await(ctx, b.client, &appsv1.DeploymentList{}, which, func(all []*appsv1.Deployment) bool {
		return len(all) == 1 && deploymentReady(all[0])
	})
	if err != nil {
		return fmt.Errorf("wait for deployment %s: %w", name, err)
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

// creationTime returns when an object was created.
func creationTime(o metav1.Object) time.Time { return o.GetCreationTimestamp().Time }
