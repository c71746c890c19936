package e2e

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// testLabel marks the namespaces of tests.
const testLabel = "k8slan.io/e2e"

// await watches objects until they fit. It returns their last state, the oldest object first.
func await[T client.Object](ctx context.Context, c client.WithWatch, kind client.ObjectList, which []client.ListOption,
	fits func([]T) bool,
) ([]T, error) {
	for {
		list := kind.DeepCopyObject().(client.ObjectList)
		if err := c.List(ctx, list, which...); err != nil {
			return nil, err
		}
		items, err := meta.ExtractList(list)
		if err != nil {
			return nil, err
		}
		have := map[client.ObjectKey]T{}
		for _, item := range items {
			o := item.(T)
			have[client.ObjectKeyFromObject(o)] = o
		}
		if all := sorted(have); fits(all) {
			return all, nil
		}
		from := &client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: list.GetResourceVersion()}}
		events, err := c.Watch(ctx, kind, append(slices.Clone(which), from)...)
		if err != nil {
			return sorted(have), err
		}
		done := follow(events, have, fits)
		if done || ctx.Err() != nil {
			return sorted(have), ctx.Err()
		}
	}
}

// follow applies events to the objects until these fit. It returns false if the watch ends before.
func follow[T client.Object](events watch.Interface, have map[client.ObjectKey]T, fits func([]T) bool) bool {
	defer events.Stop()
	for e := range events.ResultChan() {
		o, ok := e.Object.(T)
		if !ok { // an error, such as a resource version that is too old
			return false
		}
		if e.Type == watch.Deleted {
			delete(have, client.ObjectKeyFromObject(o))
		} else {
			have[client.ObjectKeyFromObject(o)] = o
		}
		if fits(sorted(have)) {
			return true
		}
	}
	return false
}

func sorted[T client.Object](have map[client.ObjectKey]T) []T {
	return slices.SortedFunc(maps.Values(have), func(x, y T) int {
		return cmp.Or(creationTime(x).Compare(creationTime(y)), cmp.Compare(x.GetName(), y.GetName()))
	})
}

// lab is a test with a cluster of its own for as long as it runs, and a namespace there.
type lab struct {
	*testing.T
	bed       *testbed
	namespace string
	underlay  underlay // of its LANs
}

// newLab begins a test: it waits for a free cluster, makes a namespace there, and after the test removes the namespace
// and frees the cluster. A test that fails first logs what is in the cluster.
func newLab(t *testing.T) lab {
	t.Helper()
	skipWithoutCluster(t)
	t.Parallel() // as many tests run side by side as there are clusters
	bed := <-free
	t.Cleanup(func() { free <- bed })
	return labOn(t, bed)
}

func skipWithoutCluster(t *testing.T) {
	t.Helper()
	if missing == "" {
		return
	}
	if os.Getenv("K8SLAN_NO_SKIP") == "1" {
		t.Fatal(missing)
	}
	t.Skip(missing)
}

// labOn makes a namespace on a cluster, and removes it after the test.
func labOn(t *testing.T, bed *testbed) lab {
	t.Helper()
	l := lab{T: t, bed: bed, namespace: bed.namespace(t)}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if t.Failed() {
			l.dump(ctx)
		} else {
			l.logDelays(ctx)
		}
		if err := bed.remove(ctx, l.namespace); err != nil {
			t.Error(err)
		}
	})
	return l.over(usual)
}

// fresh is a lab for a subtest, on the same cluster with a namespace of its own.
func (l lab) fresh(t *testing.T) lab {
	t.Helper()
	return labOn(t, l.bed)
}

// sideBySide runs subtests at the same time, on the same cluster and in the same namespace.
func (l lab) sideBySide(tests map[string]func(lab)) {
	l.Helper()
	var running sync.WaitGroup
	for name, test := range tests {
		running.Go(func() { l.Run(name, func(t *testing.T) { test(l.in(t)) }) })
	}
	running.Wait()
}

// apart runs subtests at the same time, on the same cluster, each in a namespace of its own.
func (l lab) apart(tests map[string]func(lab)) {
	l.Helper()
	for name, test := range tests {
		tests[name] = func(l lab) { test(l.fresh(l.T)) }
	}
	l.sideBySide(tests)
}

// try ends the test on an error.
func (l lab) try(err error) {
	l.Helper()
	if err != nil {
		l.Fatal(err)
	}
}

// namespace makes a namespace with the label of tests.
func (b *testbed) namespace(t *testing.T) string {
	t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		GenerateName: "e2e-",
		Labels:       map[string]string{testLabel: "true"},
	}}
	if err := b.client.Create(t.Context(), ns); err != nil {
		t.Fatalf("make a namespace: %v", err)
	}
	return ns.Name
}

// remove deletes a namespace, its pods and LANs first: they need not wait for each other.
func (b *testbed) remove(ctx context.Context, namespace string) error {
	here := client.InNamespace(namespace)
	return errors.Join(
		b.client.DeleteAllOf(ctx, &appsv1.StatefulSet{}, here),
		b.client.DeleteAllOf(ctx, &appsv1.Deployment{}, here,
			client.PropagationPolicy(metav1.DeletePropagationBackground)),
		b.client.DeleteAllOf(ctx, &corev1.Pod{}, here),
		b.client.DeleteAllOf(ctx, &v1beta1.LAN{}, here),
		client.IgnoreNotFound(b.client.Delete(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}})),
	)
}

// in returns the lab for a subtest.
func (l lab) in(t *testing.T) lab {
	l.T = t
	return l
}

// otherNamespace returns the lab of the same test in another namespace.
func (l lab) otherNamespace() lab {
	l.Helper()
	other := l
	other.namespace = l.bed.namespace(l.T)
	l.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if l.Failed() {
			other.dumpObjects(ctx)
		}
		if err := l.bed.remove(ctx, other.namespace); err != nil {
			l.Error(err)
		}
	})
	return other
}

// apply applies manifests as kubectl does, in the lab's namespace unless they name another.
func (l lab) apply(manifests string) {
	l.Helper()
	documents := yaml.NewYAMLOrJSONDecoder(bytes.NewBufferString(manifests), 4096)
	for {
		o := &unstructured.Unstructured{}
		err := documents.Decode(o)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			l.Fatalf("read manifest: %v\n%s", err, manifests)
		}
		if o.GetNamespace() == "" {
			o.SetNamespace(l.namespace)
		}
		err = l.bed.client.Apply(l.Context(), client.ApplyConfigurationFromUnstructured(o), client.FieldOwner("e2e"),
			client.ForceOwnership)
		if err != nil {
			l.Fatalf("apply %s %s: %v", o.GetKind(), o.GetName(), err)
		}
	}
}

// delete deletes an object of the lab.
func (l lab) delete(o client.Object, name string, options ...client.DeleteOption) {
	l.Helper()
	o.SetNamespace(l.namespace)
	o.SetName(name)
	if err := l.bed.client.Delete(l.Context(), o, options...); err != nil {
		l.Fatalf("delete %T %s: %v", o, name, err)
	}
}

// one returns an object once it fits. nil stands for an object that does not exist.
func one[T client.Object](l lab, kind client.ObjectList, namespace, name, what string, fits func(T) bool) (o T) {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	which := []client.ListOption{client.InNamespace(namespace), client.MatchingFields{"metadata.name": name}}
	all, err := await(ctx, l.bed.client, kind, which, func(all []T) bool { return fits(first(all)) })
	if err != nil {
		l.Fatalf("waited for %s to be %s: %v", name, what, err)
	}
	return first(all)
}

func first[T any](all []T) (o T) {
	if len(all) > 0 {
		o = all[0]
	}
	return o
}

// awaitLAN returns the LAN once it fits.
func (l lab) awaitLAN(name, what string, fits func(*v1beta1.LAN) bool) *v1beta1.LAN {
	l.Helper()
	return one(l, &v1beta1.LANList{}, l.namespace, name, what, func(lan *v1beta1.LAN) bool {
		return lan != nil && fits(lan)
	})
}

// ready returns the LAN once its present spec is applied on all its nodes.
func (l lab) ready(name string) *v1beta1.LAN {
	l.Helper()
	return l.awaitLAN(name, "Ready", isReady)
}

func isReady(lan *v1beta1.LAN) bool {
	c := meta.FindStatusCondition(lan.Status.Conditions, v1beta1.ConditionReady)
	return c != nil && c.Status == metav1.ConditionTrue && c.ObservedGeneration == lan.Generation &&
		lan.Status.ObservedGeneration == lan.Generation
}

// awaitGone returns when there is no LAN of that name.
func (l lab) awaitGone(name string) {
	l.Helper()
	one(l, &v1beta1.LANList{}, l.namespace, name, "gone", func(lan *v1beta1.LAN) bool { return lan == nil })
}

// edit changes a LAN's spec.
func (l lab) edit(name string, change func(*v1beta1.LANSpec)) {
	l.Helper()
	lan := &v1beta1.LAN{}
	if err := l.bed.client.Get(l.Context(), client.ObjectKey{Namespace: l.namespace, Name: name}, lan); err != nil {
		l.Fatal(err)
	}
	before := lan.DeepCopy()
	change(&lan.Spec)
	if err := l.bed.client.Patch(l.Context(), lan, client.MergeFrom(before)); err != nil {
		l.Fatalf("edit LAN %s: %v", name, err)
	}
}

// setSpokes gives a LAN another list of spokes.
func (l lab) setSpokes(name string, spokes ...string) {
	l.Helper()
	l.edit(name, func(s *v1beta1.LANSpec) { s.Spokes = spokes })
}

// awaitSegment returns the status of a LAN on a node once it fits.
func (l lab) awaitSegment(node, lan, what string, fits func(v1beta1.SegmentStatus) bool) v1beta1.SegmentStatus {
	l.Helper()
	var found v1beta1.SegmentStatus
	one(l, &v1beta1.LANNodeList{}, "", node, what, func(n *v1beta1.LANNode) bool {
		if n == nil {
			return false
		}
		for _, s := range n.Status.Segments {
			if s.LAN == l.namespace+"/"+lan && fits(s) {
				found = s
				return true
			}
		}
		return false
	})
	return found
}

// awaitEvent returns when an object of the lab has an event whose message has all the words.
func (l lab) awaitEvent(object, reason string, words ...string) {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	all, err := await(ctx, l.bed.client, &corev1.EventList{}, []client.ListOption{client.InNamespace(l.namespace)},
		func(all []*corev1.Event) bool {
			return slices.ContainsFunc(all, func(e *corev1.Event) bool {
				return e.InvolvedObject.Name == object && e.Reason == reason && containsAll(e.Message, words)
			})
		})
	if err != nil {
		l.Fatalf("waited for an event %s of %s with %q: %v; there are\n%s", reason, object, words, err, eventLines(all))
	}
}

func containsAll(text string, words []string) bool {
	return !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(text, word) })
}

func eventLines(all []*corev1.Event) string {
	var lines strings.Builder
	for _, e := range all {
		fmt.Fprintf(&lines, "  %s %s %s/%s: %s (%d times)\n", e.Type, e.Reason, e.InvolvedObject.Kind,
			e.InvolvedObject.Name, e.Message, max(e.Count, 1))
	}
	return lines.String()
}

// kubectl runs kubectl in the lab's namespace and returns what it prints.
func (l lab) kubectl(args ...string) string {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	out, err := l.bed.Kubectl(ctx, append([]string{"--namespace", l.namespace}, args...)...)
	if err != nil {
		l.Fatal(err)
	}
	return out
}

// logTime logs how long something took since it began.
func (l lab) logTime(what string, since time.Time) {
	l.Helper()
	l.Logf("%s: %s", what, time.Since(since).Round(time.Millisecond))
}
