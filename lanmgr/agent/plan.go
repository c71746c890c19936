package agent

import (
	"cmp"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Node is what a plan needs to know of the node.
type Node struct {
	Name      string
	Labels    map[string]string
	Underlays kernel.Underlays
	Addresses []netip.Addr   // InternalIPs of the Node, by which the cluster knows it
	VTEPs     []netip.Prefix // ranges of VTEPs, the preferred ones first; empty: any address
	EVPN      bool           // the daemon runs BGP
}

// Plan is a LAN as this node should have it.
type Plan struct {
	Segment segment.Segment
	VTEP    netip.Addr // the node's address on the underlay; the zero Addr if it has none
	Unicast bool       // the segment's Remotes come from the other nodes' LANNodes
	Strict  bool       // VXLAN packets of non-members are dropped
	EVPN    bool       // the segment's Remotes and FDB come from BGP routes
	Problem Problem
}

// Problem is what keeps a LAN on this node from working well. The zero value means that there is none.
type Problem struct {
	Reason   string // one of the reasons of v1beta1
	Message  string // what is wrong and the way out
	Blocking bool   // pods wait
}

// planAll plans every LAN. Two LANs can seem to hold one network namespace, because the cache has an older version of
// one than of the other. The LAN that was created first has it then.
func planAll(lans []v1beta1.LAN, node Node, have map[string]segment.Segment) []Plan {
	byAge := slices.Clone(lans)
	slices.SortFunc(byAge, func(x, y v1beta1.LAN) int {
		return cmp.Or(x.CreationTimestamp.Compare(y.CreationTimestamp.Time), cmp.Compare(x.UID, y.UID))
	})
	var plans []Plan
	taken := make(map[string]bool)
	for i := range byAge {
		lan := &byAge[i]
		if lan.Status.Holds == nil {
			continue
		}
		s := have[lan.Status.Holds.NS]
		if s.LAN.UID != string(lan.UID) {
			s = segment.Segment{}
		}
		p, ok := NewPlan(lan, node, s)
		if !ok || taken[p.Segment.Netns] {
			continue
		}
		taken[p.Segment.Netns] = true
		plans = append(plans, p)
	}
	return plans
}

// NewPlan decides what the node should have of a LAN; ok is false if that is nothing. have is what the LAN has on the
// node, or had before this daemon started; it is zero if that is nothing.
//
// A LAN that cannot reach other nodes is planned without its VXLAN, so that its pods reach each other within the node.
// A LAN whose underlay is missing keeps its MTU. A LAN that the underlay can no longer carry with a changed spec keeps
// its VXLAN and MTU, for the pods that are attached.
func NewPlan(lan *v1beta1.LAN, node Node, have segment.Segment) (p Plan, ok bool) {
	if !wantedOn(lan, node) {
		return Plan{}, false
	}
	pl := planner{
		spec: lan.Effective(), node: node, have: have, discovery: lan.DiscoveryOr(lan.Status.Holds.Discovery),
	}
	pl.setSegment(lan)
	if !pl.parseGroup() {
		return pl.plan, true
	}
	pl.selectVTEP(lan.Spec.VXLANGroup != "")
	pl.chooseUnderlay()
	pl.setVTEP()
	pl.setMTU()
	pl.plan.Problem = pl.problem()
	pl.setUnderlayIndex()
	return pl.plan, true
}

// planner has the results of NewPlan's steps.
type planner struct {
	spec      v1beta1.LANSpec // with defaults
	node      Node
	have      segment.Segment
	discovery v1beta1.Discovery
	group     netip.Addr
	selector  vtepSelector
	underlay  underlayChoice
	overhead  overhead
	plan      Plan
}

// setSegment sets what does not depend on the network between nodes.
func (pl *planner) setSegment(lan *v1beta1.LAN) {
	spec, holds := &pl.spec, lan.Status.Holds
	pl.plan = Plan{
		Unicast: pl.discovery == v1beta1.Unicast,
		EVPN:    pl.discovery == v1beta1.EVPN,
		Strict:  lan.Spec.Strict(pl.discovery),
	}
	pl.plan.Segment = segment.Segment{
		LAN:               segment.LAN{Namespace: lan.Namespace, Name: lan.Name, UID: string(lan.UID)},
		Generation:        lan.Generation,
		Netns:             holds.NS,
		Bridge:            spec.Bridge,
		Spokes:            ports(spec, held(spec.SpokesAndPools(), holds.Spokes)),
		TxChecksumOff:     ports(spec, held(spec.TxChecksumOff(), holds.Spokes)),
		MACByOrdinal:      held(poolsByOrdinal(spec.SpokePools), holds.Spokes),
		AllowedNamespaces: slices.Sorted(slices.Values(spec.AllowedNamespaces)),
		VXLAN: segment.VXLAN{
			Name: spec.VXLAN, VNI: uint32(holds.VNI), Port: uint16(holds.Port), NoLearning: pl.plan.EVPN,
		},
	}
	if len(spec.SpokePools) > 0 {
		pl.plan.Segment.Node = pl.node.Name
	}
	if e := spec.EVPN; e != nil {
		pl.plan.Segment.Routes = segment.Routes{
			Import: texts(e.ImportTargets), Export: texts(e.ExportTargets), RD: uint16(e.RD),
		}
		pl.plan.Segment.VXLAN.SuppressNeighbors = pl.plan.EVPN && e.SuppressNeighbors
	}
}

// parseGroup parses the multicast group. If that is invalid, the plan is complete, with a problem.
func (pl *planner) parseGroup() bool {
	group, err := netip.ParseAddr(pl.spec.VXLANGroup)
	if err != nil || !group.IsMulticast() {
		pl.overhead = overhead6
		pl.keepMTU()
		pl.plan.Problem = groupProblem(pl.spec.VXLANGroup)
		return false
	}
	pl.group = group
	return true
}

// usesGroup reports whether the LAN floods to a multicast group. If not, its remotes are unicast addresses.
func (pl *planner) usesGroup() bool { return !pl.plan.Unicast && !pl.plan.EVPN }

// problem returns the plan's first problem.
func (pl *planner) problem() Problem {
	if !pl.underlay.found {
		return pl.underlayMissingProblem()
	}
	name, device := pl.underlay.name, pl.underlay.device
	noAddress := groupAddressProblem(name, device, pl.group)
	if !pl.usesGroup() {
		noAddress = pl.selector.problem(name, device, pl.plan.VTEP, pl.discovery)
	}
	return firstProblem(
		noBGPProblem(pl.plan.EVPN && !pl.node.EVPN),
		targetProblem(pl.plan.Segment.Routes),
		noAddress,
		pl.mtuProblem(),
		linkProblem(name, device))
}

// setUnderlayIndex sets the VXLAN's underlay, unless a problem blocks that. The VXLAN that the node has on the same
// underlay then stays unchanged, with its MTU.
func (pl *planner) setUnderlayIndex() {
	index := pl.underlay.device.Index
	want, have := pl.plan.Segment.VXLAN, pl.have.VXLAN
	sameVXLAN := have.Name == want.Name && have.VNI == want.VNI && have.Port == want.Port
	switch {
	case !pl.plan.Problem.Blocking:
		pl.plan.Segment.VXLAN.UnderlayIndex = index
	case index != 0 && have.UnderlayIndex == index && sameVXLAN:
		pl.plan.Segment.VXLAN, pl.plan.Segment.MTU = have, pl.have.MTU
	default:
		pl.keepMTU()
	}
}

// wantedOn reports whether the LAN is admitted, not being deleted, and selects the node.
func wantedOn(lan *v1beta1.LAN, node Node) bool {
	if lan.Status.Holds == nil || !lan.DeletionTimestamp.IsZero() {
		return false
	}
	selector := make(labels.Set, len(lan.Spec.NodeSelector))
	for key, value := range lan.Spec.NodeSelector {
		selector[key] = string(value)
	}
	return selector.AsSelector().Matches(labels.Set(node.Labels))
}

// held returns the names that are both requested and held, sorted.
func held(requested, holds []string) []string {
	isHeld := make(map[string]bool, len(holds))
	for _, spoke := range holds {
		isHeld[spoke] = true
	}
	spokes := slices.DeleteFunc(slices.Clone(requested), func(spoke string) bool { return !isHeld[spoke] })
	slices.Sort(spokes)
	return spokes
}

// ports replaces the names of pools by the names of their ports, and sorts the result.
func ports(spec *v1beta1.LANSpec, names []string) []string {
	spokes := slices.Clone(names[:0])
	for _, name := range names {
		pool, ok := spec.Pool(name)
		if !ok {
			spokes = append(spokes, name)
		}
		for number := range int(pool.Size) {
			spokes = append(spokes, segment.Port(name, number))
		}
	}
	slices.Sort(spokes)
	return spokes
}

// texts returns route targets as sorted strings.
func texts(targets []v1beta1.RouteTarget) (list []string) {
	for _, t := range targets {
		list = append(list, string(t))
	}
	slices.Sort(list)
	return list
}

// poolsByOrdinal returns the pools whose pods have MACs by their ordinals.
func poolsByOrdinal(pools []v1beta1.SpokePool) []string {
	var names []string
	for _, pool := range pools {
		if pool.MACBy == v1beta1.MACByOrdinal {
			names = append(names, pool.Name)
		}
	}
	return names
}
