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
	"github.com/k8slan/k8slan/lanmgr/retry"
)

// slowSync is how long the API server may take to list objects before the agent logs that it waits.
const slowSync = 10 * time.Second

// watchObjects sets inputsChanged when objects change. It returns when all objects are listed, or false when ctx ends.
func (a *Agent) watchObjects(ctx context.Context) bool {
	slow := time.AfterFunc(slowSync, func() {
		a.Log.Warn("waiting for the API server to list the LANs; LANs on this node stay unchanged", "node", a.Node)
	})
	defer slow.Stop()
	type watch struct {
		kind    client.Object
		handler toolscache.ResourceEventHandler
	}
	watches := []watch{
		{&v1beta1.LAN{}, a.inputHandler(lanChanged)},
		{&corev1.Node{}, a.inputHandler(nodeChanged)},
		{&v1beta1.LANNode{}, onChange(a.publisher.observe)},
	}
	if a.Reflectors.Name != "" {
		always := func(any, any) bool { return true }
		watches = append(watches, watch{&discoveryv1.EndpointSlice{}, a.inputHandler(always)})
	}
	for _, w := range watches {
		message := "cannot watch the API server's objects, trying again"
		watched := a.untilDone(ctx, message, func() error { return a.watchKind(ctx, w.kind, w.handler) })
		if !watched {
			return false
		}
	}
	return true
}

// untilDone repeats work until it succeeds, and logs message after a failure. It returns false when ctx ends first.
func (a *Agent) untilDone(ctx context.Context, message string, work func() error) bool {
	timer := retry.NewTimer(retry.Default)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
		}
		err := work()
		switch {
		case err == nil:
			return true
		case ctx.Err() != nil:
			return false
		case timer.Failed(err):
			a.Log.Error(message, "err", err)
		}
	}
}

func (a *Agent) watchKind(ctx context.Context, kind client.Object, handler toolscache.ResourceEventHandler) error {
	informer, err := a.Informers.GetInformer(ctx, kind) // returns when it has synced
	if err != nil {
		return fmt.Errorf("watch %T: %w", kind, err)
	}
	if _, err := informer.AddEventHandler(handler); err != nil {
		return fmt.Errorf("watch %T: %w", kind, err)
	}
	return nil
}

// inputHandler returns a handler that sets inputsChanged where changed says that the plan depends on the change.
func (a *Agent) inputHandler(changed func(before, after any) bool) toolscache.ResourceEventHandler {
	return onChange(func(before, after any) {
		if changed(before, after) {
			a.inputsChanged.Set()
		}
	})
}

// onChange returns a handler that calls changed with the object before and after. Before is nil for a new object, after
// is nil for a deleted one.
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

// lanChanged ignores what the controller summarizes in the LAN's status.
func lanChanged(before, after any) bool {
	x, wasLAN := before.(*v1beta1.LAN)
	y, isLAN := after.(*v1beta1.LAN)
	return !wasLAN || !isLAN || x.UID != y.UID || x.Generation != y.Generation ||
		x.DeletionTimestamp.IsZero() != y.DeletionTimestamp.IsZero() ||
		!equality.Semantic.DeepEqual(x.Status.Holds, y.Status.Holds)
}

// nodeChanged ignores kubelet's heartbeats.
func nodeChanged(before, after any) bool {
	x, wasNode := before.(*corev1.Node)
	y, isNode := after.(*corev1.Node)
	return !wasNode || !isNode || x.UID != y.UID || !maps.Equal(x.Labels, y.Labels) ||
		!slices.Equal(internalIPs(x), internalIPs(y))
}
