package agent

import (
	"context"
	"net/netip"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/retry"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// runEVPN runs EVPN until ctx ends.
func (a *Agent) runEVPN(ctx context.Context) {
	message := "cannot join EVPN, what is known of other routers stays unchanged"
	retry.Loop(ctx, retry.Default, a.Log, message, func(ctx context.Context, _ func()) error {
		err := a.EVPN.Run(ctx)
		if ctx.Err() != nil && err != nil {
			a.Log.Error("cannot end the BGP sessions properly", "err", err)
		}
		return err
	})
}

// oneLANPerVNI removes from EVPN a LAN that has the VNI of an older one, on another port: routes carry no port.
func oneLANPerVNI(plans []Plan) {
	owners := make(map[uint32]segment.LAN)
	for i := range plans {
		p := &plans[i]
		if !p.EVPN {
			continue
		}
		vni := p.Segment.VXLAN.VNI
		owner, taken := owners[vni]
		if !taken {
			owners[vni] = p.Segment.LAN
			continue
		}
		p.EVPN = false
		if p.Problem.Reason == "" {
			p.Problem = vniTwiceProblem(vni, owner)
		}
	}
}

// evpnLANs returns the LANs with discovery evpn that the node has, by network namespace. One that is not planned any
// more stays until its last claim ends.
func evpnLANs(plans []Plan, reports []lanmgr.Report) map[string]macvrf.LAN {
	byNetns := reportsByNetns(reports)
	lans, planned, taken := make(map[string]macvrf.LAN), make(map[string]bool), make(map[uint32]bool)
	for _, p := range plans {
		r, reported := byNetns[p.Segment.Netns]
		if !reported || r.Segment.LAN != p.Segment.LAN {
			continue
		}
		planned[p.Segment.Netns] = true
		if vni := p.Segment.VXLAN.VNI; p.EVPN && p.VTEP.IsValid() {
			lans[p.Segment.Netns], taken[vni] = evpnLAN(p.Segment, p.VTEP, r.Claims), true
		}
	}
	for _, r := range reports {
		v := r.Segment.VXLAN
		leavingEVPN := !planned[r.Segment.Netns] && v.NoLearning && v.Local.IsValid()
		if leavingEVPN && len(r.Claims) > 0 && !taken[v.VNI] {
			lans[r.Segment.Netns], taken[v.VNI] = evpnLAN(r.Segment, v.Local, r.Claims), true
		}
	}
	return lans
}

// evpnLAN returns the LAN for EVPN. The MAC of a pod is in it. That of a VM is not, so it is advertised only once the
// VM has sent a frame: two nodes have it while it moves.
func evpnLAN(s segment.Segment, vtep netip.Addr, claims []segment.Claim) macvrf.LAN {
	lan := macvrf.LAN{
		VNI: s.VXLAN.VNI, VTEP: vtep, Claimed: len(claims) > 0, RD: s.Routes.RD,
		Import: targets(s.Routes.Import), Export: targets(s.Routes.Export), Suppress: s.VXLAN.SuppressNeighbors,
	}
	for _, c := range claims {
		if c.Kind == segment.Veth && len(c.MAC) == len(macvrf.MAC{}) {
			lan.Attached = append(lan.Attached, macvrf.MAC(c.MAC))
		}
	}
	return lan
}

// targets parses route targets. It skips invalid ones, which targetProblem reports.
func targets(texts []string) (targets []macvrf.Target) {
	for _, text := range texts {
		if t, err := macvrf.ParseTarget(text); err == nil {
			targets = append(targets, t)
		}
	}
	return targets
}

// setEVPNProblem sets the plan's problem to the one that EVPN reports, unless the plan has another one. It reports
// whether the problem changed.
func (p *Plan) setEVPNProblem(e evpn.Problems) (changed bool) {
	switch p.Problem.Reason {
	case "", v1beta1.ReasonBGPDown, v1beta1.ReasonMACTwice, v1beta1.ReasonRoutesWithheld, v1beta1.ReasonRoutesRefused:
	default:
		return false
	}
	before := p.Problem
	p.Problem = firstProblem(sessionProblem(e), duplicateProblem(e), withheldProblem(e), refusedProblem(e))
	return p.Problem != before
}

// sessionStatus returns BGP sessions as the LANNode has them.
func sessionStatus(sessions []bgp.Session) []v1beta1.BGPSession {
	var list []v1beta1.BGPSession
	for _, s := range sessions {
		status := v1beta1.BGPSession{
			Peer: s.Peer.At().String(), AS: int64(s.Peer.AS), State: v1beta1.SessionUp,
			Since: metav1.NewTime(s.Since.Truncate(time.Second)), // the API's precision
		}
		if !s.Up {
			status.State, status.Message = v1beta1.SessionDown, s.Why
		}
		list = append(list, status)
	}
	return list
}
