package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// This file has the sentences of all problems. Each says what is wrong, then the way out.

// blocking returns a problem for which pods wait.
func blocking(reason, format string, args ...any) Problem {
	return Problem{Reason: reason, Message: fmt.Sprintf(format, args...) + "; pods wait until then", Blocking: true}
}

// degrading returns a problem with which pods are attached nevertheless.
func degrading(reason, format string, args ...any) Problem {
	return Problem{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// firstProblem returns the first of these that is one.
func firstProblem(problems ...Problem) Problem {
	for _, p := range problems {
		if p.Reason != "" {
			return p
		}
	}
	return Problem{}
}

// problemOf returns the plan's problem if that blocks, else the error of building the segment. An error while the
// segment is built does not concern the segment.
func problemOf(p Plan, r lanmgr.Report) Problem {
	if p.Problem.Blocking || r.Err == nil || r.Built {
		return p.Problem
	}
	if taken := (*kernel.VNITaken)(nil); errors.As(r.Err, &taken) {
		return blocking(v1beta1.ReasonVNITaken, "vxlan %s: %v", p.Segment.VXLAN.Name, taken)
	}
	return Problem{v1beta1.ReasonBuildFailed, r.Err.Error() + ". It is tried again; pods wait until it succeeds", true}
}

// leavingMessage returns why a segment is still leaving.
func leavingMessage(r lanmgr.Report, attachments []v1beta1.Attachment) (reason, message string) {
	if r.Err != nil {
		return v1beta1.ReasonBuildFailed, r.Err.Error() + ". It is tried again"
	}
	if len(attachments) == 0 {
		return "", ""
	}
	pods := make([]string, len(attachments))
	for i, a := range attachments {
		pods[i] = a.Pod + " (spoke " + a.Spoke + ")"
	}
	return "", "stays until its pods are gone: " + strings.Join(pods, ", ")
}

func groupProblem(group string) Problem {
	return Problem{
		v1beta1.ReasonBuildFailed,
		fmt.Sprintf("spec.vxlanGrp: %q is not a multicast address; pods wait until it is", group), true,
	}
}

func (pl *planner) underlayMissingProblem() Problem {
	name, field, node := pl.underlay.name, pl.underlay.field, pl.node.Name
	switch {
	case field == "" && pl.selector.strict:
		return blocking(v1beta1.ReasonUnderlayMissing,
			"no device has an address in %s (vtepCIDRs of k8slan's chart). "+
				"Give one such an address, or name a device in spec.defaultVxlanDev or spec.vxlanDevMap.%s",
			pl.selector, node)
	case field == "":
		return blocking(v1beta1.ReasonUnderlayMissing,
			"no default route, and the LAN names no device for this node. "+
				"Set spec.defaultVxlanDev or spec.vxlanDevMap.%s", node)
	}
	return blocking(v1beta1.ReasonUnderlayMissing, "no device %q (%s). Create it, or change %s", name, field, field)
}

// groupAddressProblem returns a problem if the device has no address of the group's family. A device that is down or
// has no carrier has no IPv6 address, or none yet; linkProblem reports that.
func groupAddressProblem(name string, device kernel.Underlay, group netip.Addr) Problem {
	switch {
	case group.Is4() && !device.IPv4.IsValid():
		return blocking(v1beta1.ReasonUnderlayNoAddress,
			"device %q has no IPv4 address, which the group %s needs. "+
				"Give it one, or choose an IPv6 group in spec.vxlanGrp", name, group)
	case group.Is4():
		return Problem{}
	case device.IPv6Off:
		return blocking(v1beta1.ReasonUnderlayNoAddress,
			"IPv6 is switched off on device %q, and the group %s needs it. "+
				"Set net.ipv6.conf.%s.disable_ipv6=0, or choose an IPv4 group in spec.vxlanGrp", name, group, name)
	case !device.IPv6.IsValid() && device.Up && device.Carrier:
		return blocking(v1beta1.ReasonUnderlayNoAddress,
			"device %q has no IPv6 address, which the group %s needs; a link-local one is enough. "+
				"Give it one, or choose an IPv4 group in spec.vxlanGrp", name, group)
	}
	return Problem{}
}

// problem returns a problem if the device has no VTEP, or has lost it.
func (s vtepSelector) problem(
	name string, device kernel.Underlay, vtep netip.Addr, discovery v1beta1.Discovery,
) Problem {
	if vtep.IsValid() {
		onDevice := slices.Contains(device.Addresses, vtep) || slices.Contains(device.Sources, vtep)
		if onDevice || !device.Up || !device.Carrier {
			return Problem{}
		}
		return degrading(v1beta1.ReasonUnderlayNoAddress,
			"device %q has lost its address %s: frames reach no other node. Add it again, or another one", name, vtep)
	}
	lacks, wayOut := "no IPv4 or IPv6 address", ""
	switch {
	case s.strict:
		lacks, wayOut = "no address in "+s.String()+" (vtepCIDRs of k8slan's chart)", ", or change those ranges"
	case s.family.Is4():
		lacks, wayOut = "no IPv4 address", ", or leave spec.vxlanGrp out, whose family nodes use"
	case s.family.IsValid():
		lacks, wayOut = "no IPv6 address", ", or leave spec.vxlanGrp out, whose family nodes use"
	}
	return blocking(v1beta1.ReasonUnderlayNoAddress,
		"device %q has %s that other nodes could send to, which discovery %s needs; a link-local one is not enough. "+
			"Give it one%s", name, lacks, discovery, wayOut)
}

func (pl *planner) mtuProblem() Problem {
	name, deviceMTU, mtu := pl.underlay.name, pl.underlay.device.MTU, int(pl.spec.MTU)
	untagged, doubleTagged := pl.overhead.untagged, pl.overhead.doubleTagged
	switch {
	case mtu == 0 && deviceMTU-doubleTagged < minMTU:
		return blocking(v1beta1.ReasonMTUTooLarge,
			"device %q has MTU %d, too little for a VXLAN. Raise it to %d at least",
			name, deviceMTU, minMTU+doubleTagged)
	case mtu+untagged > deviceMTU:
		return blocking(v1beta1.ReasonMTUTooLarge,
			"spec.mtu %d and %d bytes of VXLAN do not fit device %q with MTU %d. "+
				"Lower spec.mtu to %d (%d if frames bear two VLAN tags), or raise the device's MTU",
			mtu, untagged, name, deviceMTU, deviceMTU-untagged, deviceMTU-doubleTagged)
	}
	return Problem{}
}

func linkProblem(name string, device kernel.Underlay) Problem {
	switch {
	case !device.Up:
		return degrading(v1beta1.ReasonUnderlayDown, "device %q is down: frames reach no other node. Set it up", name)
	case !device.Carrier:
		return degrading(v1beta1.ReasonUnderlayDown,
			"device %q has no carrier: frames reach no other node. Check its cable and its peer", name)
	}
	return Problem{}
}

// noBGPProblem returns a problem if the LAN needs BGP and the daemon does not run it.
func noBGPProblem(missing bool) Problem {
	if !missing {
		return Problem{}
	}
	return blocking(v1beta1.ReasonBuildFailed,
		"discovery evpn needs BGP, and the daemon was started without it. "+
			"Set evpn.enabled in k8slan's chart (--evpn-as of the daemon), or choose another spec.discovery")
}

// targetProblem returns a problem if a route target is invalid. The API server should have rejected it.
func targetProblem(r segment.Routes) Problem {
	for _, t := range slices.Concat(r.Import, r.Export) {
		if _, err := macvrf.ParseTarget(t); err != nil {
			return Problem{v1beta1.ReasonBuildFailed, "spec.evpn: " + err.Error() + "; pods wait until it is", true}
		}
	}
	return Problem{}
}

func firewallProblem(err error) Problem {
	return degrading(v1beta1.ReasonNonMembersAccepted,
		"%v: the LAN accepts VXLAN packets from any sender. "+
			"Load the kernel module nf_tables on the node, or set spec.strictPeers: false", err)
}

func masterMissingProblem(name string) Problem {
	return degrading(v1beta1.ReasonUnderlayMissing,
		"no device %q, which the network names as master: frames reach no other node. Create it", name)
}

func noBGPOnDemandProblem() Problem {
	return degrading(v1beta1.ReasonBGPDown,
		"the daemon was started without BGP: frames reach no other node. Set evpn.enabled in k8slan's chart")
}

func vniOfLANProblem(vni uint32, lan string) Problem {
	return degrading(v1beta1.ReasonVNITaken,
		"VNI %d belongs to LAN %s: frames reach no other node. Choose another vxlanId", vni, lan)
}

func vniTwiceProblem(vni uint32, other segment.LAN) Problem {
	return degrading(v1beta1.ReasonVNITaken,
		"%s has VNI %d, too, on another port, and EVPN routes carry no port: no other node is reached. "+
			"Choose another vni", other, vni)
}

func sessionProblem(e evpn.Problems) Problem {
	switch {
	case e.NoPeers:
		return degrading(v1beta1.ReasonBGPDown,
			"no BGP peer is known: no other node is reached. Have k8slan's chart run reflectors "+
				"(evpn.reflectors.replicas), or name routers there (evpn.peers)")
	case len(e.Down) == 0:
		return Problem{}
	}
	var peers []string
	for _, s := range e.Down {
		peers = append(peers, fmt.Sprintf("%s (%s)", s.Peer, s.Why))
	}
	return degrading(v1beta1.ReasonBGPDown,
		"no BGP session is up, to %s: MACs that are new on other nodes are not reached, routes received before stay",
		strings.Join(peers, ", "))
}

func duplicateProblem(e evpn.Problems) Problem {
	if len(e.Duplicates) == 0 {
		return Problem{}
	}
	return degrading(v1beta1.ReasonMACTwice,
		"%s speaks on this node and on another%s: each node keeps its own. Change one of them",
		e.Duplicates[0], andOthers(len(e.Duplicates), "MAC"))
}

func withheldProblem(e evpn.Problems) Problem {
	if len(e.Withheld) == 0 {
		return Problem{}
	}
	var peers []string
	for _, p := range e.Withheld {
		peers = append(peers, p.String())
	}
	return degrading(v1beta1.ReasonRoutesWithheld,
		"%s: no route of the LAN is advertised, because its VTEP here is IPv6. "+
			"Give the LAN an underlay with IPv4, or set ipv6-vteps for peers that support them",
		strings.Join(peers, ", "))
}

func refusedProblem(e evpn.Problems) Problem {
	if e.Refusals == 0 {
		return Problem{}
	}
	message := e.Refused.String()
	if e.Refusals > 1 {
		// The number is not in the message, which would change all the time.
		message += "; other routes are refused, too (k8slan_evpn_routes counts them)"
	}
	return Problem{Reason: v1beta1.ReasonRoutesRefused, Message: message}
}

// andOthers counts what a message does not name: all but the first.
func andOthers(n int, what string) string {
	switch n {
	case 1:
		return ""
	case 2:
		return ", and 1 other " + what
	}
	return fmt.Sprintf(", and %d other %ss", n-1, what)
}
