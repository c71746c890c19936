package agent

import (
	"context"
	"reflect"
	"time"

	"github.com/k8slan/k8slan/lanmgr/retry"
)

// watchKernel passes the kernel's events on until ctx ends.
func (a *Agent) watchKernel(ctx context.Context) {
	message := "cannot watch the kernel, trying again"
	retry.Loop(ctx, retry.Default, a.Log, message, func(ctx context.Context, _ func()) error {
		return a.Kernel.Watch(ctx, func(netns string) {
			if netns == "" {
				a.hostChanged.Set()
			} else {
				a.Manager.Enqueue(netns)
			}
		})
	})
}

// underlaysInterval is the least time between two observations of the node's underlays. On a busy node links change all
// the time.
const underlaysInterval = 50 * time.Millisecond

// readUnderlays observes the node's underlays after each event, and has the LANs planned again when they changed.
func (a *Agent) readUnderlays(ctx context.Context) {
	timer := retry.NewTimer(retry.Default)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.hostChanged:
		case <-timer.C:
		}
		began := time.Now()
		underlays, err := a.Kernel.Underlays(ctx)
		if err != nil {
			if timer.Failed(err) {
				a.Log.Error("cannot read the node's links, LANs stay unchanged", "err", err)
			}
			continue
		}
		timer.Succeeded()
		a.mu.Lock()
		changed := a.underlays == nil || !reflect.DeepEqual(*a.underlays, underlays)
		a.underlays = &underlays
		a.mu.Unlock()
		if changed {
			a.inputsChanged.Set()
		}
		if !retry.Pause(ctx, max(underlaysInterval, 4*time.Since(began))) {
			return
		}
	}
}
