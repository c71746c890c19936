package agent

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// watchObjects has the informers tell of changes. It returns when all of them know what there is, or with an error when ctx ends.
func (a *Agent) watchObjects(ctx context.Context) error {
	retry := newRetry()
	defer retry.stop()
	slow := time.AfterFunc(maxDelay, func() {
		a.Log.Warn("the API server has not yet told which LANs there are; LANs on this node stay as they are", "node", a.Node)
	})
	defer slow.Stop()
	type watch struct {
		kind    client.Object
		handler toolscache.ResourceEventHandler
	}
	watches := []watch{
		{&v1beta1.LAN{}, onChange(func(before, after any) {
			if lanChanged(before, after) {
				signal(a.inputsChanged)
			}
		})},
		{&corev1.Node{}, onChange(func(before, after any) {
			if nodeChanged(before, after) {
				signal(a.inputsChanged)
			}
		})},
		{&v1beta1.LANNode{}, onChange(func(before, after any) { a.publisher.observe(before, after) })},
	}
	if a.Reflectors.Name != "" {
		watches = append(watches, watch{&discoveryv1.EndpointSlice{}, onChange(func(any, any) { signal(a.inputsChanged) })})
	}
	for _, watch := range watches {
		for {
			err := a.watchKind(ctx, watch.kind, watch.handler)
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			retry.failed(a.Log, "cannot watch the API server's objects, trying again", err)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-retry.timer.C:
			}
		}
		retry.succeeded()
	}
	return nil
}

func (a *Agent) watchKind(ctx context.Context, kind client.Object, handler toolscache.ResourceEventHandler) error {
	informer, err := a.Informers.GetInformer(ctx, kind) // waits until it has synced
	if err != nil {
		return fmt.Errorf("watch %T: %w", kind, err)
	}
	if _, err := informer.AddEventHandler(handler); err != nil {
		return fmt.Errorf("watch %T: %w", kind, err)
	}
	return nil
}

// onChange calls changed with the object before and after; nil is for one that wasn't there or is not any more.
func onChange(changed func(before, after any)) toolscache.ResourceEventHandler {
	return toolscache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { changed(nil, obj) },
		UpdateFunc: changed,
		DeleteFunc: func(obj any) {
			if unknown, ok := obj.(toolscache.DeletedFinalStateUnknown); ok {
				obj = unknown.Obj
			}
			changed(obj, nil)
		},
	}
}

// lanChanged passes over what the controller sums up in the LAN's status.
func lanChanged(before, after any) bool {
	x, wasLAN := before.(*v1beta1.LAN)
	y, isLAN := after.(*v1beta1.LAN)
	return !wasLAN || !isLAN || x.UID != y.UID || x.Generation != y.Generation ||
		x.DeletionTimestamp.IsZero() != y.DeletionTimestamp.IsZero() || !equality.Semantic.DeepEqual(x.Status.Holds, y.Status.Holds)
}

// nodeChanged passes over the heartbeats of kubelet.
func nodeChanged(before, after any) bool {
	x, wasNode := before.(*corev1.Node)
	y, isNode := after.(*corev1.Node)
	return !wasNode || !isNode || x.UID != y.UID || !maps.Equal(x.Labels, y.Labels) ||
		!slices.Equal(internalIPs(x), internalIPs(y))
}
