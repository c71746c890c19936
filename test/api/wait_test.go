package api

import (
	"context"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// deadline is far beyond what anything here takes; it bounds a failure.
const deadline = 2 * time.Minute

// eventually waits until look finds nothing amiss; what it found last is the failure.
func eventually(t *testing.T, look func() (amiss string)) {
	t.Helper()
	amiss := ""
	err := wait.PollUntilContextTimeout(t.Context(), 20*time.Millisecond, deadline, true, func(context.Context) (bool, error) {
		amiss = look()
		return amiss == "", nil
	})
	if err != nil {
		t.Fatal(amiss)
	}
}

// remove deletes an object, if it is there, and waits until it is gone.
func remove(t *testing.T, object client.Object) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // clean-up happens after the test's context ends
	if err := api.Delete(ctx, object); client.IgnoreNotFound(err) != nil {
		t.Errorf("delete %s: %v", object.GetName(), err)
		return
	}
	awaitGone(t, object)
}

// forget is remove for a LAN that the nodes of the test, or the controller, may never let go.
func forget(t *testing.T, lan *v1beta1.LAN) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	err := api.Delete(ctx, lan)
	if err == nil {
		free := client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`))
		err = api.Patch(ctx, lan.DeepCopy(), free)
	}
	if client.IgnoreNotFound(err) != nil {
		t.Errorf("delete LAN %s: %v", lan.Name, err)
		return
	}
	awaitGone(t, lan)
}

// awaitGone waits until an object is gone.
func awaitGone(t *testing.T, object client.Object) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	uid := object.GetUID()
	gone := func(ctx context.Context) (bool, error) {
		err := api.Get(ctx, client.ObjectKeyFromObject(object), object)
		return apierrors.IsNotFound(err) || err == nil && object.GetUID() != uid, client.IgnoreNotFound(err)
	}
	if err := wait.PollUntilContextTimeout(ctx, 20*time.Millisecond, deadline, true, gone); err != nil {
		t.Errorf("%s is still there: %v", object.GetName(), err)
	}
}
