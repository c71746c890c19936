package agent

import (
	"cmp"
	"maps"
	"slices"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Spoke is one spoke or one pool, as this node advertises it to kubelet.
type Spoke struct {
	Name    string
	Ports   int  // of a pool; 0 for a single spoke
	Healthy bool // kubelet may allocate it
}

// Advertised returns the spokes to advertise to kubelet, sorted. A spoke is advertised once the manager has worked on
// its segment, so that kubelet does not get it as unhealthy first. It is healthy while its segment has what was
// planned.
func Advertised(plans []Plan, reports []lanmgr.Report) []Spoke {
	byNetns := reportsByNetns(reports)
	byName := make(map[string]Spoke)
	for _, p := range plans {
		r, ok := byNetns[p.Segment.Netns]
		if !ok || r.Leaving || r.Segment.LAN != p.Segment.LAN {
			continue
		}
		for _, name := range held(p.Segment.Spokes, r.Segment.Spokes) {
			spoke := Spoke{Name: name, Healthy: healthy(p, r)}
			if pool, _, ok := segment.PoolOf(name); ok {
				spoke.Name, spoke.Ports = pool, byName[pool].Ports+1
			}
			byName[spoke.Name] = spoke
		}
	}
	return slices.SortedFunc(maps.Values(byName), func(a, b Spoke) int { return cmp.Compare(a.Name, b.Name) })
}

// healthy reports whether the segment has all that its spokes need. Where the plan has other spokes or another VXLAN
// than the report, spokes that are in both stay healthy: the next report follows soon. But a segment that was built
// while its underlay was missing has no VXLAN, and is not healthy.
func healthy(p Plan, r lanmgr.Report) bool {
	hasVXLAN := r.Segment.VXLAN.UnderlayIndex != 0 || p.Segment.VXLAN.UnderlayIndex == 0
	return r.Built && !p.Problem.Blocking && hasVXLAN
}
