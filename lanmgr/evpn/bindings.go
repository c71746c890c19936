package evpn

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/retry"
)

// watchBindings watches the IP–MAC bindings of each LAN that has a claim on this node, until ctx ends.
func (e *Instance) watchBindings(ctx context.Context) {
	var watches sync.WaitGroup
	defer watches.Wait()
	stops := map[string]context.CancelFunc{}
	defer func() {
		for _, stop := range stops {
			stop()
		}
	}()
	for {
		claimed := e.claimedLANs()
		for netns, stop := range stops {
			if !claimed[netns] {
				stop()
				delete(stops, netns)
			}
		}
		for netns := range claimed {
			if stops[netns] == nil {
				watch, stop := context.WithCancel(ctx)
				stops[netns] = stop
				watches.Go(func() { e.watchLANBindings(watch, netns) })
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-e.claimsChanged:
		}
	}
}

func (e *Instance) claimedLANs() map[string]bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	claimed := map[string]bool{}
	for netns, lan := range e.lans {
		if lan.Claimed {
			claimed[netns] = true
		}
	}
	return claimed
}

func (e *Instance) watchLANBindings(ctx context.Context, netns string) {
	events := watch.BindingEvents{
		Bound:     func(mac [6]byte, ip netip.Addr) { e.bind(netns, mac, ip) },
		Recreated: func() { e.relist(netns) },
	}
	retry.Loop(ctx, retry.Default, e.Log.With("netns", netns),
		"cannot watch which addresses hosts have, MACs are advertised without them; trying again",
		func(ctx context.Context, _ func()) error { return e.Kernel.WatchBindings(ctx, netns, events) })
}

// bind handles the event that a host has shown an address. Most are known.
func (e *Instance) bind(netns string, mac [6]byte, ip netip.Addr) {
	e.mu.Lock()
	defer e.mu.Unlock()
	vni, ok := e.vnis[netns]
	if !ok {
		return
	}
	changed, full := e.table.Bind(time.Now(), vni, mac, ip)
	if full && !e.bindingsFull[netns] {
		e.bindingsFull[netns] = true
		e.Log.Warn("a host has more addresses than are advertised of one MAC or LAN, ARP for the others is flooded",
			"netns", netns, "mac", macvrf.MAC(mac), "address", ip)
	}
	if changed {
		e.publish()
	}
}
