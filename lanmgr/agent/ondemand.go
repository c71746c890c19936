package agent

import (
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// plansOnDemand returns the plans of segments on demand, sorted by network namespace. The CNI plugin made each for pods
// that are attached, and it is kept while one is. Only its underlay may change. A network namespace that a LAN object
// has belongs to that LAN. A VNI does, too: the plugin does not know a LAN that is not on this node, so a segment with
// its VNI may exist, but is not joined to EVPN.
func plansOnDemand(
	objectPlans []Plan, lans map[types.UID]*v1beta1.LAN, reports []lanmgr.Report, node Node,
) []Plan {
	holders := make(map[uint32]string)
	for _, lan := range lans {
		if lan.Status.Holds != nil {
			holders[uint32(lan.Status.Holds.VNI)] = lan.Namespace + "/" + lan.Name
		}
	}
	var plans []Plan
	for _, r := range reports {
		sameNetns := func(p Plan) bool { return p.Segment.Netns == r.Segment.Netns }
		if !r.Segment.OnDemand || len(r.Claims) == 0 || slices.ContainsFunc(objectPlans, sameNetns) {
			continue
		}
		p := planOneOnDemand(r.Segment.Recorded(), node)
		if holder, held := holders[p.Segment.VXLAN.VNI]; held {
			p.EVPN = false
			p.Problem = vniOfLANProblem(p.Segment.VXLAN.VNI, holder)
		}
		plans = append(plans, p)
	}
	return plans
}

func planOneOnDemand(s segment.Segment, node Node) Plan {
	name := s.VXLAN.Underlay
	device, found := node.Underlays.Devices[name]
	s.VXLAN.UnderlayIndex = device.Index // 0 where the device is missing
	s.VXLAN.Local = vtepOnDemand(device, s.VXLAN.Local)
	p := Plan{Segment: s, VTEP: s.VXLAN.Local, EVPN: true}
	switch {
	case !found:
		p.Problem = masterMissingProblem(name)
	case !node.EVPN:
		p.Problem = noBGPOnDemandProblem()
	default:
		p.Problem = firstProblem(
			vtepSelector{}.problem(name, device, p.VTEP, v1beta1.EVPN),
			linkProblem(name, device))
	}
	return p
}

// vtepOnDemand returns the address that the LAN had or, where the device has lost it, another of its family.
func vtepOnDemand(device kernel.Underlay, had netip.Addr) netip.Addr {
	if slices.Contains(device.Addresses, had) {
		return had
	}
	if i := slices.IndexFunc(device.Addresses, func(a netip.Addr) bool { return a.Is4() == had.Is4() }); i >= 0 {
		return device.Addresses[i]
	}
	return had
}
