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

// waitUntil watches objects until they fit.
func waitUntil[T any](ctx context.Context, c client.WithWatch, kind client.ObjectList, which []client.ListOption, fits func([]T) (bool, error)) error {
	source := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			list := kind.DeepCopyObject().(client.ObjectList)
			return list, c.List(ctx, list, append(which, &client.ListOptions{Raw: &options})...)
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			return c.Watch(ctx, kind.DeepCopyObject().(client.ObjectList), append(which, &client.ListOptions{Raw: &options})...)
		},
	}
	var store cache.Store
	look := func() (bool, error) {
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
			return look()
		},
		func(watch.Event) (bool, error) { return look() })
	return err
}
