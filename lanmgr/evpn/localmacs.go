package evpn

import (
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// learnLocal handles the event that a bridge has learned a MAC on a port.
func (e *Instance) learnLocal(netns string, mac [6]byte) {
	e.handle(func(now time.Time) {
		vni, ok := e.vnis[netns]
		if !ok {
			return
		}
		if full := e.table.LearnLocal(now, vni, mac); full && !e.macsFull[netns] {
			e.macsFull[netns] = true
			e.Log.Warn("this node has more MACs of a LAN than it advertises, frames to the others are flooded",
				"netns", netns, "limit", macvrf.MaxMACs)
		}
	})
}

// forgetLocal handles the event that a MAC is on no port any more.
func (e *Instance) forgetLocal(netns string, mac [6]byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if vni, ok := e.vnis[netns]; ok && e.table.ForgetLocal(time.Now(), vni, mac) {
		e.publish()
	}
}

// relistAll reads the MACs on the ports of every LAN again, because events may have been lost.
func (e *Instance) relistAll() {
	e.handle(func(now time.Time) {
		for netns, vni := range e.vnis {
			e.readLocalMACs(now, netns, vni)
		}
	})
}

// relist reads the MACs on the ports of one LAN again.
func (e *Instance) relist(netns string) {
	e.handle(func(now time.Time) {
		if vni, ok := e.vnis[netns]; ok {
			e.readLocalMACs(now, netns, vni)
		}
	})
}

func (e *Instance) readLocalMACs(now time.Time, netns string, vni uint32) {
	macs, err := e.Kernel.LocalMACs(netns)
	if err != nil {
		e.Log.Error("cannot read which MACs are on a LAN, only those learned from now on are advertised",
			"netns", netns, "err", err)
		return
	}
	all := make([]macvrf.MAC, len(macs))
	for i, mac := range macs {
		all[i] = mac
	}
	e.table.SetLocal(now, vni, all)
}
