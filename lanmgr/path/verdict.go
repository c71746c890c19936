package path

import (
	"fmt"
	"strings"
)

// Verdict says in plain words what passes, and where the rest is lost and why; well where nothing is lost that a LAN carries.
func (c Course) Verdict() (well bool, sentences []string) {
	var lost, long []Shot // long are those that are lost though shorter ones pass
	depth := 0
	for _, s := range c.Shots {
		switch {
		case s.Reached == Arrived && s.Payload < shortest:
			depth = max(depth, s.Tags)
		case s.Reached == Arrived:
		case s.Payload > 2*shortest && c.Largest > 0:
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
	case len(lost) == len(c.Shots)-len(long) && len(lost) > 0:
		say("%s: nothing passes. %s.", way, c.why(furthest(lost)))
	case len(lost) > 0:
		say("%s: some kinds of frames do not pass: %s. %s.", way, kinds(lost), c.why(furthest(lost)))
	case len(long) > 0:
		say("%s: packets of up to %d bytes pass, longer ones do not; the LAN's MTU is %d. %s.", way, c.Largest, c.From.MTU, c.whyLong(furthest(long)))
	default:
		say("%s: every kind of frame passes, packets of up to %d bytes, up to %s.", way, c.Largest, tags(depth))
	}
	well = len(lost) == 0 && len(long) == 0
	for _, s := range c.Shots {
		if s.Reached == Arrived && s.Unfinished {
			say("%s: TCP, UDP and SCTP checksums arrive unfinished, left to hardware. Linux knows that; a network function that reads frames raw drops them: "+
				"set spokeOptions: {%s: {txChecksum: off}} for one that does.", way, c.To.Spoke)
		}
	}
	return well, sentences
}

func tags(depth int) string {
	switch depth {
	case 0:
		return "no VLAN tag"
	case 1:
		return "one VLAN tag"
	case deepest:
		return fmt.Sprintf("%d VLAN tags and maybe more", depth)
	}
	return fmt.Sprintf("%d VLAN tags", depth)
}

func kinds(shots []Shot) string {
	words := make([]string, len(shots))
	for i, s := range shots {
		words[i] = s.Kind
	}
	return strings.Join(words, ", ")
}

// furthest is the one of lost frames that got on the longest way.
func furthest(lost []Shot) Shot {
	best := lost[0]
	for _, s := range lost {
		if s.Reached > best.Reached {
			best = s
		}
	}
	return best
}

// portFault says why one of the two pods can neither send nor receive; empty where both can.
func (c Course) portFault() string {
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
func (c Course) why(s Shot) string {
	from, to := c.From, c.To
	switch s.Reached {
	case NotSent:
		return fmt.Sprintf("Node %s could not send it: %s", from.Node, s.Error)
	case Sent0:
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
		return fmt.Sprintf("It left node %s by %s but never came to %s of node %s: the network between them drops UDP port %d, or does not carry the packets' multicast "+
			"(many clouds and routed networks carry none)", from.Node, from.Underlay.Name, to.Underlay.Name, to.Node, from.UDPPort)
	case CameToNode:
		switch {
		case s.VNI != 0 && s.VNI != to.VNI:
			return fmt.Sprintf("It came to node %s with VNI %d, but VXLAN %s there has VNI %d, and drops it: the two nodes do not have the same LAN",
				to.Node, s.VNI, to.VXLAN.Name, to.VNI)
		case from.UDPPort != to.UDPPort:
			return fmt.Sprintf("It came to node %s on UDP port %d, but VXLAN %s there listens on %d", to.Node, from.UDPPort, to.VXLAN.Name, to.UDPPort)
		}
		return fmt.Sprintf("It came to %s of node %s, but not to VXLAN %s there%s", to.Underlay.Name, to.Node, to.VXLAN.Name,
			down(to.VXLAN, fmt.Sprintf(": a firewall on %s drops incoming UDP port %d (nft list ruleset)", to.Node, to.UDPPort)))
	case CameToVXLAN:
		return fmt.Sprintf("It came to VXLAN %s of node %s, but not to port %s of spoke %s: see bridge -d link show in the LAN's namespace there",
			to.VXLAN.Name, to.Node, to.Port.Name, to.Spoke)
	}
	return ""
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
func (c Course) whyLong(s Shot) string {
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
	case s.Reached < LeftNode && from.Underlay.Name != "" || from.Underlay.MTU != to.Underlay.MTU:
		return fmt.Sprintf("The underlay is too small for it: %s of node %s has MTU %d; %s", smaller.Underlay.Name, smaller.Node, smaller.Underlay.MTU, advice)
	case s.Reached == LeftNode:
		return fmt.Sprintf("They leave node %s by %s, in packets of %d bytes, but never come to %s of node %s: the MTU of the network between them is smaller than the nodes' %d; %s",
			from.Node, from.Underlay.Name, s.Length, to.Underlay.Name, to.Node, from.Underlay.MTU, advice)
	}
	return c.why(s)
}
