package node

import (
	"context"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// joinFabric joins the LANs to EVPN until ctx ends.
func (a *Agent) joinFabric(ctx context.Context) {
	retry := newRetry()
	defer retry.stop()
	for {
		err := a.Fabric.Run(ctx)
		if ctx.Err() != nil {
			if err != nil {
				a.Log.Error("cannot leave BGP in order", "err", err)
			}
			return
		}
		retry.failed(a.Log, "cannot join EVPN, what is known of other routers stays as it is", err)
		select {
		case <-ctx.Done():
			return
		case <-retry.timer.C:
		}
	}
}

// evpnLANs are the LANs with discovery evpn that the node has, by netns.
func evpnLANs(plans []Plan, reports []lanmgr.Report) map[string]evpn.LAN {
	byNetns := index(reports)
	lans := make(map[string]evpn.LAN)
	for _, p := range plans {
		r, built := byNetns[p.Segment.Netns]
		if p.EVPN && built && !r.Leaving && r.Segment.LAN == p.Segment.LAN && p.VTEP.IsValid() {
			lans[p.Segment.Netns] = evpnLAN(p, r)
		}
	}
	return lans
}

// evpnLAN is a LAN as the node takes part in it. A VM's MAC is told once it has spoken: two nodes have it while it moves.
func evpnLAN(p Plan, r lanmgr.Report) evpn.LAN {
	lan := evpn.LAN{VNI: p.Segment.VXLAN.VNI, VTEP: p.VTEP, Claimed: len(r.Claims) > 0}
	for _, c := range r.Claims {
		if c.Kind == segment.Veth && len(c.MAC) == len(evpn.MAC{}) {
			lan.Attached = append(lan.Attached, evpn.MAC(c.MAC))
		}
	}
	return lan
}
