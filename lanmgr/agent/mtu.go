package agent

import "github.com/k8slan/k8slan/lanmgr/segment"

const (
	// fallbackMTU is the MTU of Ethernet. It stands for that of an underlay that is missing.
	fallbackMTU = 1500
	// minMTU is the least MTU of a link (ETH_MIN_MTU in include/uapi/linux/if_ether.h).
	minMTU = 68
)

// overhead is the number of bytes that a VXLAN adds to a packet of the LAN.
type overhead struct {
	untagged     int // inner Ethernet, VXLAN, UDP and IP headers
	doubleTagged int // the same with two VLAN tags in the inner Ethernet header
}

var (
	overhead4 = overhead{untagged: 50, doubleTagged: segment.Overhead4}
	overhead6 = overhead{untagged: 70, doubleTagged: segment.Overhead6}
)

// setMTU sets the MTU of the spec, or else what the underlay's MTU leaves.
func (pl *planner) setMTU() {
	pl.overhead = overhead6
	if pl.plan.Segment.VXLAN.Group.Is4() || pl.plan.VTEP.Is4() {
		pl.overhead = overhead4
	}
	pl.plan.Segment.MTU = firstPositive(int(pl.spec.MTU), pl.underlay.device.MTU-pl.overhead.doubleTagged)
}

// keepMTU sets the MTU of the spec, or else the one that the LAN has: with a smaller one, the bridge would drop frames
// of pods that are attached.
func (pl *planner) keepMTU() {
	pl.plan.Segment.MTU = firstPositive(int(pl.spec.MTU), pl.have.MTU, fallbackMTU-pl.overhead.doubleTagged)
}

// firstPositive returns the first number above zero.
func firstPositive(numbers ...int) int {
	for _, n := range numbers {
		if n > 0 {
			return n
		}
	}
	return 0
}
