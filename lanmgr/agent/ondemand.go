package agent

import (
	"fmt"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// plansOnDemand are the LANs that no object wants, sorted by netns: the CNI plugin made them for pods that are attached. They stay as it made them, but for
// the underlay, as long as one is. A name that a LAN object has is that LAN's, and so is a VNI: who has it without the plugin having known, since the object is
// not on this node, is not joined to others.
func plansOnDemand(objects []Plan, lans map[types.UID]*v1beta1.LAN, reports []lanmgr.Report, node Node) []Plan {
	holders := make(map[uint32]string)
	for _, lan := range lans {
		if lan.Status.Holds != nil {
			holders[uint32(lan.Status.Holds.VNI)] = lan.Namespace + "/" + lan.Name
		}
	}
	var plans []Plan
	for _, r := range reports {
		taken := slices.ContainsFunc(objects, func(p Plan) bool { return p.Segment.Netns == r.Segment.Netns })
		if r.Segment.OnDemand && len(r.Claims) > 0 && !taken {
			p := planOneOnDemand(r.Segment.Recorded(), node)
			if holder, held := holders[p.Segment.VXLAN.VNI]; held {
				p.EVPN = false
				p.Problem = Problem{v1beta1.ReasonVNITaken, fmt.Sprintf(
					"VNI %d is that of LAN %s: frames reach no other node. Choose another vxlanId", p.Segment.VXLAN.VNI, holder), false}
			}
			plans = append(plans, p)
		}
	}
	return plans
}

func planOneOnDemand(s segment.Segment, node Node) Plan {
	device, found := node.Underlays.Devices[s.VXLAN.Underlay]
	s.VXLAN.UnderlayIndex = device.Index // 0 where there is none
	s.VXLAN.Local = vtepOnDemand(device, s.VXLAN.Local)
	p := Plan{Segment: s, VTEP: s.VXLAN.Local, EVPN: true}
	switch {
	case !found:
		p.Problem = Problem{v1beta1.ReasonUnderlayMissing, fmt.Sprintf(
			"device %q, which the network names as master, is gone: frames reach no other node. Make it again", s.VXLAN.Underlay), false}
	case !node.EVPN:
		p.Problem = Problem{v1beta1.ReasonBGPDown, "the daemon was started without BGP: frames reach no other node. Have k8slan's chart start it it (evpn.enabled)", false}
	default:
		p.Problem = firstProblem(vtepSelector{}.problem(s.VXLAN.Underlay, device, p.VTEP, v1beta1.EVPN), linkProblem(s.VXLAN.Underlay, device))
	}
	return p
}

// vtepOnDemand is the address that the LAN has had or, where the device has lost it, another of that family.
func vtepOnDemand(device kernel.Underlay, had netip.Addr) netip.Addr {
	if slices.Contains(device.Addresses, had) {
		return had
	}
	if i := slices.IndexFunc(device.Addresses, func(a netip.Addr) bool { return a.Is4() == had.Is4() }); i >= 0 {
		return device.Addresses[i]
	}
	return had
}
