package sidecar

import (
	"context"
	"net/netip"
	"slices"
	"sync"

	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/notify"
)

// podKernel implements evpn.Kernel for a pod. The pod's interface is in no bridge, so its own MAC and addresses are all
// there are.
type podKernel struct {
	changed notify.Flag

	mu        sync.Mutex
	mac       [6]byte
	addresses []netip.Addr
}

func newPodKernel() *podKernel { return &podKernel{changed: notify.New()} }

// set stores the MAC and the addresses of the interface.
func (k *podKernel) set(mac [6]byte, addresses []netip.Addr) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.mac == mac && slices.Equal(k.addresses, addresses) {
		return
	}
	k.mac, k.addresses = mac, addresses
	k.changed.Set()
}

// WatchFDB reports no events: there is no bridge.
func (k *podKernel) WatchFDB(ctx context.Context, _ watch.FDBEvents) error {
	<-ctx.Done()
	return nil
}

// LocalMACs returns none: there is no bridge.
func (k *podKernel) LocalMACs(string) ([][6]byte, error) { return nil, nil }

// WatchBindings reports the interface's own addresses.
func (k *podKernel) WatchBindings(ctx context.Context, _ string, events watch.BindingEvents) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-k.changed:
		}
		k.mu.Lock()
		mac, addresses := k.mac, k.addresses
		k.mu.Unlock()
		for _, a := range addresses {
			events.Bound(mac, a)
		}
	}
}
