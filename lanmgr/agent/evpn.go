package agent

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// runEVPN joins the LANs to EVPN until ctx ends.
func (a *Agent) runEVPN(ctx context.Context) {
	retry := newRetry()
	defer retry.stop()
	for {
		err := a.EVPN.Run(ctx)
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

// oneLANPerVNI takes out of EVPN what has the VNI of another LAN there, on another port: routes do not tell ports. The older one has it.
func oneLANPerVNI(plans []Plan) {
	taken := make(map[uint32]segment.LAN)
	for i := range plans {
		p := &plans[i]
		vni := p.Segment.VXLAN.VNI
		other, twice := taken[vni]
		switch {
		case !p.EVPN:
		case !twice:
			taken[vni] = p.Segment.LAN
		default:
			p.EVPN = false
			if p.Problem.Reason == "" {
				p.Problem = Problem{v1beta1.ReasonVNITaken, fmt.Sprintf(
					"VNI %d is that of %s, too, on another port, and EVPN tells no ports: no other node is reached. Choose another vni", vni, other), false}
			}
		}
	}
}

// evpnLANs are the LANs with discovery evpn that the node has, by netns. One that is planned no more stays for who is still attached.
func evpnLANs(plans []Plan, reports []lanmgr.Report) map[string]macvrf.LAN {
	byNetns := reportsByNetns(reports)
	lans, planned, taken := make(map[string]macvrf.LAN), make(map[string]bool), make(map[uint32]bool)
	for _, p := range plans {
		r, built := byNetns[p.Segment.Netns]
		if !built || r.Segment.LAN != p.Segment.LAN {
			continue
		}
		planned[p.Segment.Netns] = true
		if vni := p.Segment.VXLAN.VNI; p.EVPN && p.VTEP.IsValid() {
			lans[p.Segment.Netns], taken[vni] = evpnLAN(p.Segment, p.VTEP, r.Claims), true
		}
	}
	for _, r := range reports {
		v := r.Segment.VXLAN
		if !planned[r.Segment.Netns] && v.NoLearning && v.Local.IsValid() && len(r.Claims) > 0 && !taken[v.VNI] {
			lans[r.Segment.Netns], taken[v.VNI] = evpnLAN(r.Segment, v.Local, r.Claims), true
		}
	}
	return lans
}

// evpnLAN is a LAN as the node takes part in it. A VM's MAC is told once it has spoken: two nodes have it while it moves.
func evpnLAN(s segment.Segment, vtep netip.Addr, claims []segment.Claim) macvrf.LAN {
	lan := macvrf.LAN{
		VNI: s.VXLAN.VNI, VTEP: vtep, Claimed: len(claims) > 0,
		Import: targets(s.Routes.Import), Export: targets(s.Routes.Export), RD: s.Routes.RD, Suppress: s.VXLAN.SuppressNeighbors,
	}
	for _, c := range claims {
		if c.Kind == segment.Veth && len(c.MAC) == len(macvrf.MAC{}) {
			lan.Attached = append(lan.Attached, macvrf.MAC(c.MAC))
		}
	}
	return lan
}

// targets reads route targets; targetProblem tells of what is none.
func targets(texts []string) (targets []macvrf.Target) {
	for _, text := range texts {
		if t, err := macvrf.ParseTarget(text); err == nil {
			targets = append(targets, t)
		}
	}
	return targets
}

// setEVPNProblem makes what the fabric tells the plan's problem, where it has none of its own, and says whether it is another since.
func (p *Plan) setEVPNProblem(t evpn.Problems) bool {
	switch p.Problem.Reason {
	case "", v1beta1.ReasonBGPDown, v1beta1.ReasonMACTwice, v1beta1.ReasonRoutesWithheld, v1beta1.ReasonRoutesRefused:
	default:
		return false
	}
	before := p.Problem
	p.Problem = firstProblem(sessionProblem(t), duplicateProblem(t), withheldProblem(t), refusedProblem(t))
	return p.Problem != before
}

func sessionProblem(t evpn.Problems) Problem {
	switch {
	case t.NoPeers:
		return Problem{v1beta1.ReasonBGPDown, "no BGP session is up, for there is nobody to speak with: no other node is reached. Have k8slan's chart run reflectors (evpn.reflectors.replicas), or name routers there (evpn.peers)", false}
	case len(t.Down) == 0:
		return Problem{}
	}
	var peers []string
	for _, s := range t.Down {
		peers = append(peers, fmt.Sprintf("%s (%s)", s.Peer, s.Why))
	}
	return Problem{v1beta1.ReasonBGPDown, fmt.Sprintf(
		"no BGP session is up, to %s: what is new on other nodes is not reached, what was told before stays", strings.Join(peers, ", ")), false}
}

func duplicateProblem(t evpn.Problems) Problem {
	if len(t.Duplicates) == 0 {
		return Problem{}
	}
	return Problem{v1beta1.ReasonMACTwice, fmt.Sprintf(
		"%s speaks on this node and on another%s: each node keeps its own. Change one of them", t.Duplicates[0], andOthers(len(t.Duplicates), "MAC")), false}
}

func withheldProblem(t evpn.Problems) Problem {
	if len(t.Withheld) == 0 {
		return Problem{}
	}
	var peers []string
	for _, p := range t.Withheld {
		peers = append(peers, p.String())
	}
	return Problem{v1beta1.ReasonRoutesWithheld, fmt.Sprintf(
		"%s: told nothing of the LAN, whose VTEP here is IPv6. Give the LAN an underlay with IPv4, or peers that can take them ipv6-vteps",
		strings.Join(peers, ", ")), false}
}

func refusedProblem(t evpn.Problems) Problem {
	if t.Refusals == 0 {
		return Problem{}
	}
	message := t.Refused.String()
	if t.Refusals > 1 {
		message += "; nor are others (k8slan_evpn_routes counts them)" // another router may change how many all the time
	}
	return Problem{v1beta1.ReasonRoutesRefused, message, false}
}

// sessionsOf are sessions as the LANNode tells of them.
func sessionsOf(sessions []bgp.Session) []v1beta1.BGPSession {
	var list []v1beta1.BGPSession
	for _, s := range sessions {
		told := v1beta1.BGPSession{
			Peer: s.Peer.At().String(), AS: int64(s.Peer.AS), State: v1beta1.SessionUp,
			Since: metav1.NewTime(s.Since.Truncate(time.Second)), // as the API keeps it
		}
		if !s.Up {
			told.State, told.Message = v1beta1.SessionDown, s.Why
		}
		list = append(list, told)
	}
	return list
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
