package agent

import (
	"maps"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// StrictLANs returns the node's LANs that accept packets from their members only. A segment that is not planned (it is
// leaving, or not known to be wanted yet) has unknown members, so the firewall keeps those that it has. have is what
// the node has, by network namespace.
func StrictLANs(
	plans []Plan, have map[string]segment.Segment, members func(types.UID) []netip.Addr,
) []firewall.LAN {
	type key struct {
		port uint16
		vni  uint32
	}
	planned := map[key]bool{}
	var lans []firewall.LAN
	for _, p := range plans {
		vxlan := p.Segment.VXLAN
		planned[key{vxlan.Port, vxlan.VNI}] = true
		if p.Strict {
			lans = append(lans, firewall.LAN{
				Name: p.Segment.LAN.String(), Port: vxlan.Port, VNI: vxlan.VNI,
				Members: members(types.UID(p.Segment.LAN.UID)),
			})
		}
	}
	for _, netns := range slices.Sorted(maps.Keys(have)) {
		s := have[netns]
		if vxlan := s.VXLAN; vxlan.VNI != 0 && !planned[key{vxlan.Port, vxlan.VNI}] {
			lans = append(lans, firewall.LAN{Name: s.LAN.String(), Port: vxlan.Port, VNI: vxlan.VNI})
		}
	}
	return lans
}
