package probe

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Verdict returns sentences that say what passes, and where and why the rest is lost. ok is false if a frame is lost
// that a LAN carries.
func (p Path) Verdict() (ok bool, sentences []string) {
	var lost, long, passed []FrameResult // long: lost although shorter frames pass
	depth := 0
	for _, f := range p.Frames {
		switch {
		case f.Reached == Arrived:
			passed = append(passed, f)
			if f.Payload < minFrame {
				depth = max(depth, f.Tags)
			}
		case f.Payload > 2*minFrame && p.Largest > 0:
			long = append(long, f)
		default:
			lost = append(lost, f)
		}
	}
	say := func(format string, args ...any) { sentences = append(sentences, fmt.Sprintf(format, args...)) }
	way := fmt.Sprintf("%s → %s", p.From.Pod, p.To.Pod)
	switch {
	case p.portFault() != "": // the probe's frames do not pass the sender's own port
		say("%s: nothing passes. %s.", way, p.portFault())
		return false, sentences
	case len(lost) == len(p.Frames)-len(long) && len(lost) > 0:
		say("%s: nothing passes. %s.", way, p.why(furthest(lost)))
	case len(lost) > len(passed):
		say("%s: of all kinds of frames only these pass: %s. %s.", way, kinds(passed), p.why(furthest(lost)))
	case len(lost) > 0:
		say("%s: some kinds of frames do not pass: %s. %s.", way, kinds(lost), p.why(furthest(lost)))
	case len(long) > 0:
		say("%s: packets of up to %d bytes pass, longer ones do not; the LAN's MTU is %d. %s.",
			way, p.Largest, p.From.MTU, p.whyLong(furthest(long)))
	default:
		say("%s: every kind of frame passes, packets of up to %d bytes, up to %s.", way, p.Largest, tags(depth))
	}
	return len(lost) == 0 && len(long) == 0, sentences
}

// Checksums returns a sentence that names the pods that receive unfinished checksums, and says what to do. It is empty
// if there are none.
func Checksums(paths ...Path) string {
	var pods, options []string
	for _, p := range paths {
		if slices.ContainsFunc(p.Frames, func(f FrameResult) bool { return f.Reached == Arrived && f.Unfinished }) {
			pods, options = append(pods, p.To.Pod), append(options, p.To.SpokeOrPool+": {txChecksum: off}")
		}
	}
	if len(pods) == 0 {
		return ""
	}
	return fmt.Sprintf("TCP, UDP and SCTP checksums come to %s unfinished, left to hardware. Linux accepts them, "+
		"but a network function that reads raw frames drops them: for such a pod set spokeOptions: {%s}.",
		strings.Join(pods, " and "), strings.Join(slices.Compact(options), ", "))
}

func tags(depth int) string {
	switch depth {
	case 0:
		return "no VLAN tag"
	case 1:
		return "one VLAN tag"
	case maxTags:
		return fmt.Sprintf("%d VLAN tags and maybe more", depth)
	}
	return fmt.Sprintf("%d VLAN tags", depth)
}

func kinds(frames []FrameResult) string {
	words := make([]string, len(frames))
	for i, f := range frames {
		words[i] = f.Kind
	}
	return strings.Join(words, ", ")
}

// furthest returns the lost frame that got furthest.
func furthest(lost []FrameResult) FrameResult {
	best := lost[0]
	for _, f := range lost {
		if f.Reached > best.Reached {
			best = f
		}
	}
	return best
}

// portFault says why one of the two pods can neither send nor receive. It is empty if both can.
func (p Path) portFault() string {
	for _, f := range []Facts{p.From, p.To} {
		switch {
		case !f.Port.Up:
			return fmt.Sprintf("Port %s of spoke %s on node %s is down, and the daemon should have set it up: "+
				"see its log",
				f.Port.Name, f.Spoke, f.Node)
		case !f.Port.Carrier:
			return fmt.Sprintf("Interface %s in pod %s is down: port %s of spoke %s on node %s has no carrier. "+
				"Set it up inside the pod", f.Interface, f.Pod, f.Port.Name, f.Spoke, f.Node)
		}
	}
	return ""
}

// why says where a frame was lost, and the likely cause.
func (p Path) why(f FrameResult) string {
	from, to := p.From, p.To
	if from.Bridge.Name == "" && f.Reached > NotSent {
		return "For where it is lost, run kubectl k8slan probe between two pods on a LAN of these nodes"
	}
	if f.Reached >= LeftVXLAN && f.Reached <= ReachedNode {
		if fault := p.floodFault(); fault != "" {
			return fault
		}
	}
	switch f.Reached {
	case NotSent:
		return fmt.Sprintf("Node %s could not send it: %s", from.Node, f.Error)
	case SentFromBridge:
		return p.whyInBridge()
	case LeftVXLAN:
		return p.whyNotLeft()
	case LeftNode:
		if !to.Underlay.Carrier {
			return fmt.Sprintf("It left node %s, but %s of node %s is down or has no carrier",
				from.Node, to.Underlay.Name, to.Node)
		}
		return fmt.Sprintf("It left node %s by %s but never came to %s of node %s: %s",
			from.Node, from.Underlay.Name, to.Underlay.Name, to.Node, p.networkFault())
	case ReachedNode:
		return p.whyNotReceived(f)
	case ReachedVXLAN:
		return fmt.Sprintf("It came to VXLAN %s of node %s, but not to port %s of spoke %s: "+
			"see bridge -d link show in the LAN's namespace there", to.VXLAN.Name, to.Node, to.Port.Name, to.Spoke)
	}
	return ""
}

// whyInBridge says why a frame did not leave the bridge of the sender's node.
func (p Path) whyInBridge() string {
	from, to := p.From, p.To
	if from.Node == to.Node {
		return fmt.Sprintf("Lost between bridge %s and port %s on node %s: see bridge -d link show in the LAN's "+
			"namespace",
			from.Bridge.Name, to.Port.Name, from.Node)
	}
	return fmt.Sprintf("Lost on node %s between bridge %s and VXLAN %s%s",
		from.Node, from.Bridge.Name, from.VXLAN.Name, down(from.VXLAN, "; see the daemon's log"))
}

// whyNotLeft says why a frame that the VXLAN sent did not leave the sender's node.
func (p Path) whyNotLeft() string {
	from, to := p.From, p.To
	if from.Underlay.Name == "" {
		return fmt.Sprintf("VXLAN %s of node %s sent it, and that of node %s did not receive it; "+
			"the underlay between them cannot be observed from here", from.VXLAN.Name, from.Node, to.Node)
	}
	otherwise := fmt.Sprintf(": a firewall on %s drops outgoing UDP port %d, or the node has no route to %s",
		from.Node, from.UDPPort, to.Node)
	return fmt.Sprintf("VXLAN %s of node %s sent it, but it did not leave by %s%s",
		from.VXLAN.Name, from.Node, from.Underlay.Name, down(from.Underlay, otherwise))
}

// whyNotReceived says why a frame that came to the underlay device of the other node did not come to its VXLAN.
func (p Path) whyNotReceived(f FrameResult) string {
	from, to := p.From, p.To
	switch {
	case f.VNI != 0 && f.VNI != to.VNI:
		return fmt.Sprintf("It came to node %s with VNI %d, but VXLAN %s there has VNI %d, and drops it: "+
			"the two nodes do not have the same LAN", to.Node, f.VNI, to.VXLAN.Name, to.VNI)
	case from.UDPPort != to.UDPPort:
		return fmt.Sprintf("It came to node %s on UDP port %d, but VXLAN %s there listens on %d",
			to.Node, from.UDPPort, to.VXLAN.Name, to.UDPPort)
	case f.NonMember.IsValid():
		return fmt.Sprintf("It came to %s of node %s from %s, and is dropped there because that is not a member: "+
			"the LAN has strictPeers, and no LANNode of its other nodes has that address. "+
			"Compare kubectl get lannode %s -o yaml with nft list table inet k8slan on node %[2]s",
			to.Underlay.Name, to.Node, f.NonMember, from.Node)
	case f.WrongChecksum:
		return fmt.Sprintf("It came to %s of node %s with a wrong UDP checksum, and the kernel there drops it: "+
			"the transmit checksum offload of %s on node %s, or of a device on the way, is broken. "+
			"Try ethtool -K %[3]s tx off on node %[4]s", to.Underlay.Name, to.Node, from.Underlay.Name, from.Node)
	}
	otherwise := fmt.Sprintf(": a firewall on %s drops incoming UDP port %d (nft list ruleset)", to.Node, to.UDPPort)
	return fmt.Sprintf("It came to %s of node %s, but not to VXLAN %s there%s",
		to.Underlay.Name, to.Node, to.VXLAN.Name, down(to.VXLAN, otherwise))
}

// floodFault says why what one node floods does not reach the other. It is empty if it does.
func (p Path) floodFault() string {
	from, to := p.From, p.To
	switch {
	case from.Group.IsValid() && to.Group != from.Group:
		return fmt.Sprintf("VXLAN %s of node %s sends it to group %s, but that of node %s has %s: "+
			"the two do not have the same discovery and group. See the daemon's log on both",
			from.VXLAN.Name, from.Node, from.Group, to.Node, floodsTo(to))
	case !from.Group.IsValid() && to.VTEP.IsValid() && !slices.Contains(from.Remotes, to.VTEP):
		return fmt.Sprintf("Node %s does not know node %s as a remote: its VXLAN %s has %s, and the other's "+
			"address is %s. "+
			"It reads that address from LANNode %[2]s: see kubectl get lannode %[2]s -o yaml, and the daemon's "+
			"log on both",
			from.Node, to.Node, from.VXLAN.Name, floodsTo(from), to.VTEP)
	}
	return ""
}

// floodsTo says to which group or remotes a VXLAN floods.
func floodsTo(f Facts) string {
	const few = 4
	switch {
	case f.Group.IsValid():
		return "group " + f.Group.String()
	case len(f.Remotes) == 0:
		return "no remotes"
	case len(f.Remotes) > few:
		return fmt.Sprintf("%d remotes without it", len(f.Remotes))
	}
	return "the remotes " + addresses(f.Remotes)
}

func addresses(all []netip.Addr) string {
	words := make([]string, len(all))
	for i, a := range all {
		words[i] = a.String()
	}
	return strings.Join(words, ", ")
}

// networkFault says what the network between the nodes may do to packets that it loses.
func (p Path) networkFault() string {
	from, to := p.From, p.To
	switch {
	case !from.Group.IsValid():
		return fmt.Sprintf("the network between them drops UDP port %d, or has no route to %s "+
			"(firewall, security group, routes)", from.UDPPort, to.VTEP)
	case slices.ContainsFunc(p.Frames,
		func(f FrameResult) bool { return f.Reached == Arrived && f.Kind == knownUnicast }):
		return fmt.Sprintf("the network between them carries the LAN's unicast, but not its multicast to %s. "+
			"Set spec.discovery to unicast, or let the network carry it", from.Group)
	}
	return fmt.Sprintf("the network between them drops UDP port %d, or carries no multicast to %s, "+
		"as in clouds and routed networks. For the latter set spec.discovery to unicast", from.UDPPort, from.Group)
}

// down returns the fault in a link's state, or else the other cause.
func down(l Link, otherwise string) string {
	switch {
	case l.Name == "":
		return ", which does not exist"
	case !l.Up:
		return ", which is down"
	case !l.Carrier:
		return ", which has no carrier"
	}
	return otherwise
}

// roomForTags is the number of bytes that a LAN's default MTU leaves for two VLAN tags.
const roomForTags = 8

// whyLong says why a frame was too long.
func (p Path) whyLong(f FrameResult) string {
	from, to := p.From, p.To
	smaller := from
	if to.Underlay.MTU < from.Underlay.MTU {
		smaller = to
	}
	advice := fmt.Sprintf("raise it, or set spec.mtu to %d", p.Largest-roomForTags)
	switch {
	case from.MTU > to.MTU:
		return fmt.Sprintf("The LAN's MTU is %d on node %s and %d on node %s: set the same MTU on their underlays, "+
			"or set spec.mtu to %d", from.MTU, from.Node, to.MTU, to.Node, to.MTU)
	case f.Reached == NotSent:
		return fmt.Sprintf("Node %s could not send longer ones: %s", from.Node, f.Error)
	case from.Bridge.Name == "":
		return fmt.Sprintf("The MTU of an underlay, or of the network between the nodes, is too small for it: %s. "+
			"kubectl k8slan probe says which", advice)
	case f.Reached < LeftNode && from.Underlay.Name != "" || from.Underlay.MTU != to.Underlay.MTU:
		return fmt.Sprintf("The underlay is too small for it: %s of node %s has MTU %d; %s",
			smaller.Underlay.Name, smaller.Node, smaller.Underlay.MTU, advice)
	case f.Reached == LeftNode:
		return fmt.Sprintf("They leave node %s by %s, in packets of %d bytes, but never come to %s of node %s: "+
			"the MTU of the network between them is smaller than the nodes' %d; %s",
			from.Node, from.Underlay.Name, f.Length, to.Underlay.Name, to.Node, from.Underlay.MTU, advice)
	}
	return p.why(f)
}
