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

// deadline is much longer than anything here takes. It limits the time until a failure.
const deadline = 2 * time.Minute

// eventually waits until check returns "". The test fails with what it returned last.
func eventually(t *testing.T, check func() (problem string)) {
	t.Helper()
	problem := ""
	err := wait.PollUntilContextTimeout(t.Context(), 20*time.Millisecond, deadline, true,
		func(context.Context) (bool, error) {
			problem = check()
			return problem == "", nil
		})
	if err != nil {
		t.Fatal(problem)
	}
}

// remove deletes an object, if it exists, and waits until it is gone.
func remove(t *testing.T, object client.Object) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // clean-up happens after the test's context ends
	if err := api.Delete(ctx, object); client.IgnoreNotFound(err) != nil {
		t.Errorf("delete %s: %v", object.GetName(), err)
		return
	}
	awaitGone(t, object)
}

// removeByForce removes a LAN with its finalizers, which the controller may never remove.
func removeByForce(t *testing.T, lan *v1beta1.LAN) {
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
		t.Errorf("%s still exists: %v", object.GetName(), err)
	}
}
