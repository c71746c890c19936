package helmhooks

import (
	"context"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// waitUntil lists and watches objects, and returns when fits returns true for all of them together.
func waitUntil[T any](
	ctx context.Context, c client.WithWatch, kind client.ObjectList, selection []client.ListOption,
	fits func([]T) (bool, error),
) error {
	with := func(options metav1.ListOptions) []client.ListOption {
		return append(selection, &client.ListOptions{Raw: &options})
	}
	source := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			list := kind.DeepCopyObject().(client.ObjectList)
			return list, c.List(ctx, list, with(options)...)
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			return c.Watch(ctx, kind.DeepCopyObject().(client.ObjectList), with(options)...)
		},
	}
	var store cache.Store
	check := func() (bool, error) {
		var all []T
		for _, o := range store.List() {
			all = append(all, *o.(*T))
		}
		return fits(all)
	}
	var one any = new(T)
	_, err := watchtools.UntilWithSync(ctx, source, one.(runtime.Object),
		func(s cache.Store) (bool, error) {
			store = s
			return check()
		},
		func(watch.Event) (bool, error) { return check() })
	return err
}
