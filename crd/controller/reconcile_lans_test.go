package controller

import (
	"context"
	"slices"
	"testing"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// apiServer returns a fake API server with these LANs. It calls written after every write of a status.
func apiServer(t *testing.T, written func(*v1beta1.LAN), lans ...v1beta1.LAN) client.WithWatch {
	t.Helper()
	objects := make([]client.Object, len(lans))
	for i := range lans {
		objects[i] = lans[i].DeepCopy()
	}
	builder := fake.NewClientBuilder().WithScheme(NewScheme()).WithObjects(objects...)
	return builder.WithStatusSubresource(&v1beta1.LAN{}).
		WithInterceptorFuncs(interceptor.Funcs{
			SubResourceUpdate: func(ctx context.Context, c client.Client, _ string, o client.Object,
				opts ...client.SubResourceUpdateOption,
			) error {
				if err := c.Status().Update(ctx, o, opts...); err != nil {
					return err
				}
				written(o.(*v1beta1.LAN))
				return nil
			},
		}).Build()
}

func holds(t *testing.T, c client.Reader, name string) *v1beta1.Holding {
	t.Helper()
	var l v1beta1.LAN
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: "default", Name: name}, &l); err != nil {
		t.Fatal(err)
	}
	return l.Status.Holds
}

func reconcileLANs(t *testing.T, cache client.Client, live client.Reader) {
	t.Helper()
	c := &lanReconciler{
		cache: cache, live: live, recorder: events.NewFakeRecorder(100),
		now: func() metav1.Time { return epoch }, metrics: NewMetrics(),
	}
	if _, err := c.Reconcile(t.Context(), everything{}); err != nil {
		t.Fatal(err)
	}
}

// The cache does not show yet that "granted" got the VNI a moment ago. It shows "older", which would get it first.
func TestNothingIsGrantedOnAnOutdatedView(t *testing.T) {
	granted, older := lan("granted", 5, 222, "x"), lan("older", 0, 222, "y")
	server := apiServer(t, func(*v1beta1.LAN) {}, with(granted, holding("x")), older)
	lagging := interceptor.NewClient(server, interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			if err := c.List(ctx, list, opts...); err != nil {
				return err
			}
			if lans, ok := list.(*v1beta1.LANList); ok {
				for i := range lans.Items {
					lans.Items[i].Status = v1beta1.LANStatus{}
				}
			}
			return nil
		},
	})
	reconcileLANs(t, lagging, server)
	if holds(t, server, "older") != nil || holds(t, server, "granted") == nil {
		t.Errorf("older holds %v, granted holds %v", holds(t, server, "older"), holds(t, server, "granted"))
	}
}

func TestSpokeIsTakenFromOldHolderBeforeNewHolderGetsIt(t *testing.T) {
	var order []string
	waiting := with(lan("a-waits", 0, 1, "srl"), holding())
	holder := with(lan("b-holds", 0, 2, "other"), holding("srl")) // "srl" is no longer in its spec
	server := apiServer(t, func(l *v1beta1.LAN) { order = append(order, l.Name) }, waiting, holder)
	reconcileLANs(t, server, server)
	if len(order) < 2 || order[0] != "b-holds" || holds(t, server, "a-waits").Spokes[0] != "srl" {
		t.Errorf("written in the order %v; a-waits holds %v", order, holds(t, server, "a-waits"))
	}
}

func TestSpokeStaysWithOldHolderIfItsStatusCannotBeWritten(t *testing.T) {
	waiting := with(lan("a-waits", 0, 1, "srl"), holding())
	holder := with(lan("b-holds", 0, 2, "other"), holding("srl"))
	server := apiServer(t, func(*v1beta1.LAN) {}, waiting, holder)
	// b-holds is written between the read and the write of the controller
	outdated := interceptor.NewClient(server, interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			err := c.List(ctx, list, opts...)
			if lans, ok := list.(*v1beta1.LANList); ok {
				for i := range lans.Items {
					if lans.Items[i].Name == "b-holds" {
						lans.Items[i].ResourceVersion = "1"
					}
				}
			}
			return err
		},
	})
	reconcileLANs(t, outdated, outdated)
	if h := holds(t, server, "a-waits"); len(h.Spokes) > 0 {
		t.Errorf("a-waits holds %v, which b-holds still holds", h.Spokes)
	}
}

func TestSecondRunWritesNothing(t *testing.T) {
	writes := 0
	server := apiServer(t, func(*v1beta1.LAN) { writes++ }, lan("a", 0, 1, "srl"), lan("b", 1, 1, "x"),
		lan("c", 2, 3, "srl", "y"))
	reconcileLANs(t, server, server)
	if writes != 3 {
		t.Errorf("the first run writes %d times, want once for each LAN", writes)
	}
	before := v1beta1.LANList{}
	if err := server.List(t.Context(), &before); err != nil {
		t.Fatal(err)
	}
	reconcileLANs(t, server, server)
	after := v1beta1.LANList{}
	if err := server.List(t.Context(), &after); err != nil {
		t.Fatal(err)
	}
	if writes != 3 || !equality.Semantic.DeepEqual(before.Items, after.Items) {
		t.Errorf("the second run wrote: %d writes in all", writes)
	}
}

func TestLANThatHoldsSomethingHasFinalizer(t *testing.T) {
	server := apiServer(t, func(l *v1beta1.LAN) {
		if l.Status.Holds != nil && !slices.Contains(l.Finalizers, v1beta1.Finalizer) {
			t.Errorf("LAN %s holds something before it has the finalizer", l.Name)
		}
	}, lan("new", 0, 1, "srl"), lan("refused", 1, 1, "x"), with(lan("of-an-older-version", 0, 2, "vm"), holding("vm")))
	reconcileLANs(t, server, server)
	for name, want := range map[string]bool{"new": true, "refused": false, "of-an-older-version": true} {
		var l v1beta1.LAN
		if err := server.Get(t.Context(), client.ObjectKey{Namespace: "default", Name: name}, &l); err != nil {
			t.Fatal(err)
		}
		if slices.Contains(l.Finalizers, v1beta1.Finalizer) != want {
			t.Errorf("LAN %s has the finalizers %v", name, l.Finalizers)
		}
	}
}

// The cache lacks a node that has just joined and may have read the LAN before it was deleted.
func TestDeletedLANWaitsForNodeThatCacheLacks(t *testing.T) {
	gone := with(lan("lab", 0, 1, "srl"), holding("srl"), deleting)
	server := apiServer(t, func(*v1beta1.LAN) {}, gone)
	worker1 := &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: "worker1"}}
	for _, o := range []client.Object{&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "worker1"}}, worker1} {
		if err := server.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	lagging := interceptor.NewClient(server, interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			if _, ok := list.(*v1beta1.LANNodeList); ok {
				return nil
			}
			return c.List(ctx, list, opts...)
		},
	})
	var l v1beta1.LAN
	reconcileLANs(t, lagging, server)
	if err := server.Get(t.Context(), client.ObjectKey{Namespace: "default", Name: "lab"}, &l); err != nil {
		t.Fatalf("the LAN is gone: %v", err)
	}
	worker1.Status.Gone = []v1beta1.GoneLAN{{UID: gone.UID}}
	if err := server.Update(t.Context(), worker1); err != nil {
		t.Fatal(err)
	}
	reconcileLANs(t, lagging, server)
	if err := server.Get(t.Context(), client.ObjectKey{Namespace: "default", Name: "lab"},
		&l); !apierrors.IsNotFound(err) {
		t.Errorf("every node has removed it, but: %v", err)
	}
}

// A node offers a spoke as soon as it reads that the LAN holds it. A pod that starts then must find the NAD.
func TestNADsExistBeforeTheirSpokeIsGranted(t *testing.T) {
	var server client.WithWatch
	granted := 0
	server = apiServer(t, func(l *v1beta1.LAN) {
		for _, spoke := range l.Status.Holds.Spokes {
			for _, name := range []string{v1beta1.VethNAD(spoke), v1beta1.MacvtapNAD(spoke)} {
				granted++
				if err := server.Get(t.Context(), client.ObjectKey{Namespace: l.Namespace, Name: name},
					&nadv1.NetworkAttachmentDefinition{}); err != nil {
					t.Errorf("when %s is granted: %v", spoke, err)
				}
			}
		}
	}, lan("new", 0, 1, "srl"), with(lan("grows", 0, 2, "vm", "more"), holding("vm")))
	reconcileLANs(t, server, server)
	if granted != 6 {
		t.Errorf("%d NADs belong to what was granted, want 6", granted)
	}
}
