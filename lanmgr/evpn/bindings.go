package evpn

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/kernel"
)

// watchBindings hears in each LAN with somebody attached here who has which address, until ctx ends.
func (f *Instance) watchBindings(ctx context.Context) {
	var watches sync.WaitGroup
	defer watches.Wait()
	stops := map[string]context.CancelFunc{}
	defer func() {
		for _, stop := range stops {
			stop()
		}
	}()
	for {
		claimed := f.claimedLANs()
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
				watches.Go(func() { f.watchLANBindings(watch, netns) })
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-f.claimsChanged:
		}
	}
}

func (f *Instance) claimedLANs() map[string]bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	claimed := map[string]bool{}
	for netns, lan := range f.lans {
		if lan.Claimed {
			claimed[netns] = true
		}
	}
	return claimed
}

// addressRest is how long it takes to try again to hear a LAN.
const addressRest = 10 * time.Second

func (f *Instance) watchLANBindings(ctx context.Context, netns string) {
	rest := time.NewTimer(addressRest)
	defer rest.Stop()
	tell := kernel.Bindings{
		Bound:     func(mac [6]byte, ip netip.Addr) { f.bind(netns, mac, ip) },
		Recreated: func() { f.relist(netns) },
	}
	for said := false; ; said = true {
		err := f.Kernel.WatchBindings(ctx, netns, tell)
		if ctx.Err() != nil {
			return
		}
		if !said {
			f.Log.Warn("cannot hear which addresses stations have, others are told MACs alone; trying again", "netns", netns, "err", err)
		}
		rest.Reset(addressRest)
		select {
		case <-ctx.Done():
			return
		case <-rest.C:
		}
	}
}

// bind takes in that a station has an address; most are known.
func (f *Instance) bind(netns string, mac [6]byte, ip netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	vni, ok := f.vnis[netns]
	if !ok {
		return
	}
	told, full := f.table.Bind(time.Now(), vni, mac, ip)
	if full && !f.bindingsFull[netns] {
		f.bindingsFull[netns] = true
		f.Log.Warn("a station shows more addresses than are told of one MAC or LAN: others find the rest by flooding", "netns", netns, "mac", macvrf.MAC(mac), "address", ip)
	}
	if told {
		f.publish()
	}
}
