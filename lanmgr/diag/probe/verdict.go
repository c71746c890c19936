package probe

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Verdict says in plain words what passes, and where the rest is lost and why; well where nothing is lost that a LAN carries.
func (c Path) Verdict() (well bool, sentences []string) {
	var lost, long, passed []FrameResult // long are those that are lost though shorter ones pass
	depth := 0
	for _, s := range c.Frames {
		switch {
		case s.Reached == Arrived:
			passed = append(passed, s)
			if s.Payload < minFrame {
				depth = max(depth, s.Tags)
			}
		case s.Payload > 2*minFrame && c.Largest > 0:
			long = append(long, s)
		default:
			lost = append(lost, s)
		}
	}
	say := func(format string, args ...any) { sentences = append(sentences, fmt.Sprintf(format, args...)) }
	way := fmt.Sprintf("%s → %s", c.From.Pod, c.To.Pod)
	switch {
	case c.portFault() != "": // a frame that starts behind the port says nothing of it
		say("%s: nothing passes. %s.", way, c.portFault())
		return false, sentences
	case len(lost) == len(c.Frames)-len(long) && len(lost) > 0:
		say("%s: nothing passes. %s.", way, c.why(furthest(lost)))
	case len(lost) > len(passed):
		say("%s: of the kinds of frames only these pass: %s. %s.", way, kinds(passed), c.why(furthest(lost)))
	case len(lost) > 0:
		say("%s: some kinds of frames do not pass: %s. %s.", way, kinds(lost), c.why(furthest(lost)))
	case len(long) > 0:
		say("%s: packets of up to %d bytes pass, longer ones do not; the LAN's MTU is %d. %s.", way, c.Largest, c.From.MTU, c.whyLong(furthest(long)))
	default:
		say("%s: every kind of frame passes, packets of up to %d bytes, up to %s.", way, c.Largest, tags(depth))
	}
	well = len(lost) == 0 && len(long) == 0
	return well, sentences
}

// Checksums says to whom checksums come unfinished, and for whom that matters; empty where they do to nobody.
func Checksums(courses ...Path) string {
	var pods, options []string
	for _, c := range courses {
		if slices.ContainsFunc(c.Frames, func(s FrameResult) bool { return s.Reached == Arrived && s.Unfinished }) {
			pods, options = append(pods, c.To.Pod), append(options, c.To.SpokeOrPool+": {txChecksum: off}")
		}
	}
	if len(pods) == 0 {
		return ""
	}
	return fmt.Sprintf("TCP, UDP and SCTP checksums come to %s unfinished, left to hardware. Linux knows that, but a network function that reads frames raw drops them: for one that does set spokeOptions: {%s}.",
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

func kinds(shots []FrameResult) string {
	words := make([]string, len(shots))
	for i, s := range shots {
		words[i] = s.Kind
	}
	return strings.Join(words, ", ")
}

// furthest is the one of lost frames that got on the longest way.
func furthest(lost []FrameResult) FrameResult {
	best := lost[0]
	for _, s := range lost {
		if s.Reached > best.Reached {
			best = s
		}
	}
	return best
}

// portFault says why one of the two pods can neither send nor receive; empty where both can.
func (c Path) portFault() string {
	for _, f := range []Facts{c.From, c.To} {
		switch {
		case !f.Port.Up:
			return fmt.Sprintf("Port %s of spoke %s on node %s is down, and the daemon should have set it up: see its log", f.Port.Name, f.Spoke, f.Node)
		case !f.Port.Carrier:
			return fmt.Sprintf("Interface %s in pod %s is down: port %s of spoke %s on node %s has no carrier. Set it up inside the pod",
				f.Interface, f.Pod, f.Port.Name, f.Spoke, f.Node)
		}
	}
	return ""
}

// why says where a frame was lost, and the likely cause.
func (c Path) why(s FrameResult) string {
	from, to := c.From, c.To
	if from.Bridge.Name == "" && s.Reached > NotSent {
		return "For where it is lost, run kubectl k8slan probe between two pods on a LAN of these nodes"
	}
	if s.Reached >= LeftVXLAN && s.Reached <= ReachedNode {
		if fault := c.floodFault(); fault != "" {
			return fault
		}
	}
	switch s.Reached {
	case NotSent:
		return fmt.Sprintf("Node %s could not send it: %s", from.Node, s.Error)
	case SentFromBridge:
		if from.Node == to.Node {
			return fmt.Sprintf("Lost between bridge %s and port %s on node %s: see bridge -d link show in the LAN's namespace", from.Bridge.Name, to.Port.Name, from.Node)
		}
		return fmt.Sprintf("Lost on node %s between bridge %s and VXLAN %s%s", from.Node, from.Bridge.Name, from.VXLAN.Name, down(from.VXLAN, "; see the daemon's log"))
	case LeftVXLAN:
		if from.Underlay.Name == "" {
			return fmt.Sprintf("VXLAN %s of node %s took it, and that of node %s did not get it; the underlay between them cannot be looked at from here", from.VXLAN.Name, from.Node, to.Node)
		}
		return fmt.Sprintf("VXLAN %s of node %s took it, but it did not leave by %s%s", from.VXLAN.Name, from.Node, from.Underlay.Name,
			down(from.Underlay, fmt.Sprintf(": a firewall on %s drops outgoing UDP port %d, or the node has no route to %s", from.Node, from.UDPPort, to.Node)))
	case LeftNode:
		if !to.Underlay.Carrier {
			return fmt.Sprintf("It left node %s, but %s of node %s is down or has no carrier", from.Node, to.Underlay.Name, to.Node)
		}
		return fmt.Sprintf("It left node %s by %s but never came to %s of node %s: %s", from.Node, from.Underlay.Name, to.Underlay.Name, to.Node, c.networkFault())
	case ReachedNode:
		switch {
		case s.VNI != 0 && s.VNI != to.VNI:
			return fmt.Sprintf("It came to node %s with VNI %d, but VXLAN %s there has VNI %d, and drops it: the two nodes do not have the same LAN",
				to.Node, s.VNI, to.VXLAN.Name, to.VNI)
		case from.UDPPort != to.UDPPort:
			return fmt.Sprintf("It came to node %s on UDP port %d, but VXLAN %s there listens on %d", to.Node, from.UDPPort, to.VXLAN.Name, to.UDPPort)
		case s.NonMember.IsValid():
			return fmt.Sprintf("It came to %s of node %s from %s, and is dropped there as a stranger's: the LAN has strictPeers, and no LANNode of another of its nodes has that "+
				"address. Compare kubectl get lannode %s -o yaml with nft list table inet k8slan on node %[2]s", to.Underlay.Name, to.Node, s.NonMember, from.Node)
		case s.WrongChecksum:
			return fmt.Sprintf("It came to %s of node %s with a wrong UDP checksum, and the kernel there drops it: the transmit checksum offload of %s on node %s, or of a device "+
				"on the way, is broken. Try ethtool -K %[3]s tx off on node %[4]s", to.Underlay.Name, to.Node, from.Underlay.Name, from.Node)
		}
		return fmt.Sprintf("It came to %s of node %s, but not to VXLAN %s there%s", to.Underlay.Name, to.Node, to.VXLAN.Name,
			down(to.VXLAN, fmt.Sprintf(": a firewall on %s drops incoming UDP port %d (nft list ruleset)", to.Node, to.UDPPort)))
	case ReachedVXLAN:
		return fmt.Sprintf("It came to VXLAN %s of node %s, but not to port %s of spoke %s: see bridge -d link show in the LAN's namespace there",
			to.VXLAN.Name, to.Node, to.Port.Name, to.Spoke)
	}
	return ""
}

// floodFault says why what the one node floods is not for the other; empty where it is.
func (c Path) floodFault() string {
	from, to := c.From, c.To
	switch {
	case from.Group.IsValid() && to.Group != from.Group:
		return fmt.Sprintf("VXLAN %s of node %s sends it to group %s, but that of node %s has %s: the two do not have the same discovery and group. See the daemon's log on both",
			from.VXLAN.Name, from.Node, from.Group, to.Node, floodsTo(to))
	case !from.Group.IsValid() && to.VTEP.IsValid() && !slices.Contains(from.Remotes, to.VTEP):
		return fmt.Sprintf("Node %s does not know node %s as a remote: its VXLAN %s has %s, and the other's address is %s. It learns of that from LANNode %[2]s: "+
			"see kubectl get lannode %[2]s -o yaml, and the daemon's log on both", from.Node, to.Node, from.VXLAN.Name, floodsTo(from), to.VTEP)
	}
	return ""
}

// floodsTo says where a VXLAN sends what is for everyone.
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

// networkFault says what the network between the nodes may do to packets that never come.
func (c Path) networkFault() string {
	from, to := c.From, c.To
	switch {
	case !from.Group.IsValid():
		return fmt.Sprintf("the network between them drops UDP port %d, or has no way to %s (firewall, security group, routes)", from.UDPPort, to.VTEP)
	case slices.ContainsFunc(c.Frames, func(s FrameResult) bool { return s.Reached == Arrived && s.Kind == knownUnicast }):
		return fmt.Sprintf("the network between them carries the LAN's unicast, but not its multicast to %s. Set spec.discovery to unicast, or let the network carry it", from.Group)
	}
	return fmt.Sprintf("the network between them drops UDP port %d, or carries no multicast to %s, as in clouds and routed networks. For the latter set spec.discovery to unicast",
		from.UDPPort, from.Group)
}

// down is what a link's state explains, or else the other cause.
func down(l Link, otherwise string) string {
	switch {
	case l.Name == "":
		return ", which is not there"
	case !l.Up:
		return ", which is down"
	case !l.Carrier:
		return ", which has no carrier"
	}
	return otherwise
}

// roomForTags is what a LAN's default MTU leaves free for two VLAN tags, in bytes.
const roomForTags = 8

// whyLong says the same of a frame that was too long.
func (c Path) whyLong(s FrameResult) string {
	from, to := c.From, c.To
	smaller := from
	if to.Underlay.MTU < from.Underlay.MTU {
		smaller = to
	}
	advice := fmt.Sprintf("raise it, or set spec.mtu to %d", c.Largest-roomForTags)
	switch {
	case from.MTU > to.MTU:
		return fmt.Sprintf("The LAN's MTU is %d on node %s and %d on node %s: give their underlays the same MTU, or set spec.mtu to %d", from.MTU, from.Node, to.MTU, to.Node, to.MTU)
	case s.Reached == NotSent:
		return fmt.Sprintf("Node %s could not send longer ones: %s", from.Node, s.Error)
	case from.Bridge.Name == "":
		return fmt.Sprintf("The MTU of an underlay, or of the network between the nodes, is too small for it: %s. kubectl k8slan probe says which", advice)
	case s.Reached < LeftNode && from.Underlay.Name != "" || from.Underlay.MTU != to.Underlay.MTU:
		return fmt.Sprintf("The underlay is too small for it: %s of node %s has MTU %d; %s", smaller.Underlay.Name, smaller.Node, smaller.Underlay.MTU, advice)
	case s.Reached == LeftNode:
		return fmt.Sprintf("They leave node %s by %s, in packets of %d bytes, but never come to %s of node %s: the MTU of the network between them is smaller than the nodes' %d; %s",
			from.Node, from.Underlay.Name, s.Length, to.Underlay.Name, to.Node, from.Underlay.MTU, advice)
	}
	return c.why(s)
}
