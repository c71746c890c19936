package controller

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// nodeSegment is a segment and the node that reports it. Segments of lost nodes are left out, so that nothing waits for
// them.
type nodeSegment struct {
	Node string
	v1beta1.SegmentStatus
}

// decision is what a LAN holds, and the reasons for which it does not hold all that it asks for.
type decision struct {
	Holds    *v1beta1.Holding  // nil if the LAN is refused
	Conflict string            // why the LAN is refused, such as "vni 222 is held by default/lab"
	Remedy   string            // what to do about the conflict
	Refused  map[string]string // refused spokes and pools, each with its reason

	Discovery v1beta1.Discovery // how its nodes find each other
}

// beingDeleted says whether the LAN is being deleted. It then holds what it held until the object is gone.
func beingDeleted(lan *v1beta1.LAN) bool { return !lan.DeletionTimestamp.IsZero() }

// vniKey is a VNI and a UDP port. No two LANs hold the same pair.
type vniKey struct{ vni, port int32 }

// admission is the state of one run of admit: the LANs that hold something so far.
type admission struct {
	segments    []nodeSegment
	nsHolder    map[string]*v1beta1.LAN
	vniHolder   map[vniKey]*v1beta1.LAN
	spokeHolder map[string]*v1beta1.LAN
	keepsNS     map[types.UID]bool // LANs that already hold their ns
}

// admit decides what each LAN holds, by UID. A LAN keeps what its status holds as long as its spec asks for it.
// Anything free goes to the LAN that was created first, or to the smaller UID if two were created in the same second.
// What a node still has of another LAN is not free, even if that LAN is gone. A LAN that is being deleted keeps what it
// holds and gets nothing more.
//
// No ns, no VNI on a port and no spoke has two holders in the result. Once the result is in the LANs' statuses, admit
// returns it again.
func admit(lans []v1beta1.LAN, segments []nodeSegment) map[types.UID]decision {
	a := admission{
		segments:    segments,
		nsHolder:    map[string]*v1beta1.LAN{},
		vniHolder:   map[vniKey]*v1beta1.LAN{},
		spokeHolder: map[string]*v1beta1.LAN{},
		keepsNS:     map[types.UID]bool{},
	}
	decisions := map[types.UID]decision{}
	var ranked []*v1beta1.LAN
	for _, lan := range byAge(lans) {
		if beingDeleted(lan) {
			decisions[lan.UID] = a.keepAll(lan)
			continue
		}
		ranked = append(ranked, lan)
		a.keepsNS[lan.UID] = priorityOf(lan) < holdsNothing
	}
	for _, lan := range byPriority(ranked) {
		a.admitLAN(lan)
	}
	for _, lan := range ranked {
		decisions[lan.UID] = a.explain(lan)
	}
	for _, lan := range ranked {
		a.keepSpokes(lan, decisions[lan.UID])
	}
	for _, lan := range ranked {
		a.admitSpokes(lan, decisions[lan.UID])
	}
	return decisions
}

// byAge sorts LANs by creation time, then UID.
func byAge(lans []v1beta1.LAN) []*v1beta1.LAN {
	ranked := make([]*v1beta1.LAN, len(lans))
	for i := range lans {
		ranked[i] = &lans[i]
	}
	slices.SortFunc(ranked, func(x, y *v1beta1.LAN) int {
		return cmp.Or(x.CreationTimestamp.Compare(y.CreationTimestamp.Time), cmp.Compare(x.UID, y.UID))
	})
	return ranked
}

// The priorities of LANs, the highest first.
const (
	holdsAll     = iota // holds the ns and VNI that it asks for
	changesPort         // holds its ns, but now asks for another VNI or port
	holdsNothing        // does not hold the ns that it asks for
)

func priorityOf(lan *v1beta1.LAN) int {
	holds, spec := lan.Status.Holds, lan.Effective()
	switch {
	case holds == nil || holds.NS != spec.NS:
		return holdsNothing
	case holds.VNI != spec.VNI || holds.Port != spec.VXLANPort:
		return changesPort
	}
	return holdsAll
}

// byPriority sorts LANs by priority, and keeps the order of LANs with the same priority.
func byPriority(ranked []*v1beta1.LAN) []*v1beta1.LAN {
	ordered := slices.Clone(ranked)
	slices.SortStableFunc(ordered, func(x, y *v1beta1.LAN) int { return cmp.Compare(priorityOf(x), priorityOf(y)) })
	return ordered
}

// keepAll lets a LAN that is being deleted keep all that it holds.
func (a admission) keepAll(lan *v1beta1.LAN) decision {
	holds := lan.Status.Holds.DeepCopy()
	if holds != nil {
		a.nsHolder[holds.NS], a.vniHolder[vniKey{holds.VNI, holds.Port}] = lan, lan
		for _, spoke := range holds.Spokes {
			a.spokeHolder[spoke] = lan
		}
	}
	return decision{Holds: holds}
}

// admitLAN lets the LAN hold its ns and VNI if both are free.
func (a admission) admitLAN(lan *v1beta1.LAN) {
	spec := lan.Effective()
	key := vniKey{spec.VNI, spec.VXLANPort}
	if a.nsHolder[spec.NS] == nil && a.vniHolder[key] == nil &&
		len(a.othersInNS(lan)) == 0 && len(a.othersOnVNI(lan)) == 0 {
		a.nsHolder[spec.NS], a.vniHolder[key] = lan, lan
	}
}

// explain returns the decision on the LAN's ns and VNI.
func (a admission) explain(lan *v1beta1.LAN) decision {
	spec := lan.Effective()
	key := vniKey{spec.VNI, spec.VXLANPort}
	switch {
	case a.nsHolder[spec.NS] == lan:
		return decision{
			Holds:   &v1beta1.Holding{NS: spec.NS, VNI: spec.VNI, Port: spec.VXLANPort},
			Refused: map[string]string{},
		}
	case a.nsHolder[spec.NS] != nil:
		return heldByOther(a.nsHolder[spec.NS], "ns "+spec.NS,
			"ns cannot be changed: delete this LAN and create it with another ns, or without one")
	case a.vniHolder[key] != nil:
		return heldByOther(a.vniHolder[key], "vni "+key.String(),
			"vni cannot be changed: choose another vxlanPort, or delete this LAN and create it with another vni")
	}
	if left := a.othersOnVNI(lan); len(left) > 0 {
		return inUseOnNodes(left, "vni "+key.String())
	}
	return inUseOnNodes(a.othersInNS(lan), "ns "+spec.NS)
}

// heldByOther refuses something to a LAN because another LAN holds it.
func heldByOther(other *v1beta1.LAN, what, remedy string) decision {
	if beingDeleted(other) {
		return decision{
			Conflict: fmt.Sprintf("%s is still in use by %s (being deleted)", what, lanName(other)),
			Remedy: fmt.Sprintf("this LAN gets it when that LAN is gone; "+
				"kubectl describe lan -n %s %s says what that LAN waits for", other.Namespace, other.Name),
		}
	}
	return decision{Conflict: fmt.Sprintf("%s is held by %s", what, lanName(other)), Remedy: remedy}
}

// inUseOnNodes refuses something to a LAN because nodes still have these segments of other LANs.
func inUseOnNodes(left []nodeSegment, what string) decision {
	how := "leaving"
	if left[0].OnDemand() {
		how = "created by its pods"
	}
	d := decision{
		Conflict: fmt.Sprintf("%s is still in use by %s (%s) on node %s", what, left[0].LAN, how, left[0].Node),
		Remedy:   "this LAN gets it when the node has removed it",
	}
	if more := len(left) - 1; more > 0 {
		d.Conflict += fmt.Sprintf(" and %d more", more)
	}
	if pods := attachmentsIn(left, func(v1beta1.Attachment) bool { return true }); len(pods) > 0 {
		d.Remedy = "this LAN gets it when these pods are gone: " + enumerate(pods, ", ")
	}
	return d
}

// othersInNS returns the segments of other LANs in the LAN's ns. It returns none for a LAN that already holds the ns.
func (a admission) othersInNS(lan *v1beta1.LAN) []nodeSegment {
	if a.keepsNS[lan.UID] {
		return nil
	}
	ns := lan.Effective().NS
	return a.otherSegments(lan, func(s nodeSegment) bool { return s.NS == ns })
}

// othersOnVNI returns the segments of other LANs that use the LAN's VNI and port. It leaves out segments of a LAN that
// has changed its port, because their nodes will soon rebuild them, unless they are leaving.
func (a admission) othersOnVNI(lan *v1beta1.LAN) []nodeSegment {
	if priorityOf(lan) == holdsAll {
		return nil
	}
	spec := lan.Effective()
	return a.otherSegments(lan, func(s nodeSegment) bool {
		if s.VNI != spec.VNI || s.Port != spec.VXLANPort {
			return false
		}
		rebuilt := a.keepsNS[s.UID] && (a.keepsNS[lan.UID] || a.nsHolder[s.NS] != nil && a.nsHolder[s.NS].UID == s.UID)
		return !rebuilt || s.State == v1beta1.SegmentLeaving
	})
}

// keepSpokes lets an admitted LAN keep the spokes and pools that it holds and still asks for.
func (a admission) keepSpokes(lan *v1beta1.LAN, d decision) {
	if d.Holds == nil || lan.Status.Holds == nil {
		return
	}
	names := lan.Spec.SpokesAndPools()
	for _, spoke := range lan.Status.Holds.Spokes {
		if a.spokeHolder[spoke] == nil && slices.Contains(names, spoke) {
			a.spokeHolder[spoke] = lan
		}
	}
}

// admitSpokes lets an admitted LAN hold those of its spokes and pools that are free. It fills in d.Holds.Spokes and
// d.Refused.
func (a admission) admitSpokes(lan *v1beta1.LAN, d decision) {
	if d.Holds == nil {
		return
	}
	for _, spoke := range slices.Sorted(slices.Values(lan.Spec.SpokesAndPools())) {
		holder := a.spokeHolder[spoke]
		if holder != nil && holder != lan {
			d.Refused[spoke] = heldByOther(holder, "spoke "+spoke, "").Conflict
			continue
		}
		if holder == nil {
			others := a.otherSegments(lan, func(nodeSegment) bool { return true })
			onSpoke := func(p v1beta1.Attachment) bool { return p.SpokeOrPool() == spoke }
			if pods := attachmentsIn(others, onSpoke); len(pods) > 0 {
				d.Refused[spoke] = fmt.Sprintf("spoke %s is still in use by %s", spoke, enumerate(pods, ", "))
				continue
			}
		}
		a.spokeHolder[spoke] = lan
		d.Holds.Spokes = append(d.Holds.Spokes, spoke)
	}
}

// otherSegments returns the segments of other LANs that match.
func (a admission) otherSegments(lan *v1beta1.LAN, match func(nodeSegment) bool) []nodeSegment {
	var segments []nodeSegment
	for _, s := range a.segments {
		if s.UID != lan.UID && match(s) {
			segments = append(segments, s)
		}
	}
	return segments
}

// attachmentsIn returns the attachments that match, such as "default/srl-1 on worker1 (spoke srl of LAN default/lab)".
func attachmentsIn(segments []nodeSegment, match func(v1beta1.Attachment) bool) []string {
	var words []string
	for _, s := range segments {
		for _, p := range s.Attachments {
			if match(p) {
				words = append(words, fmt.Sprintf("%s on %s (spoke %s of LAN %s)", p.Pod, s.Node, p.Spoke, s.LAN))
			}
		}
	}
	return words
}

// heldVNIs returns the VNIs that LANs hold according to their statuses.
func heldVNIs(lans []v1beta1.LAN) map[vniKey]bool {
	held := map[vniKey]bool{}
	for i := range lans {
		if h := lans[i].Status.Holds; h != nil {
			held[vniKey{h.VNI, h.Port}] = true
		}
	}
	return held
}

// heldThroughout returns what a LAN holds both before and after. It can be written before any LAN is granted more. A
// LAN that changes to a port on which its VNI is free keeps the rest, because nodes would remove a LAN that holds
// nothing.
func heldThroughout(before, after *v1beta1.Holding, taken map[vniKey]bool) *v1beta1.Holding {
	if before == nil || after == nil || before.NS != after.NS {
		return nil
	}
	now := vniKey{after.VNI, after.Port}
	if now != (vniKey{before.VNI, before.Port}) && taken[now] {
		return nil
	}
	both := &v1beta1.Holding{NS: after.NS, VNI: after.VNI, Port: after.Port, Discovery: before.Discovery}
	for _, spoke := range after.Spokes {
		if slices.Contains(before.Spokes, spoke) {
			both.Spokes = append(both.Spokes, spoke)
		}
	}
	return both
}

// String returns the VNI, and the port if it is not the default.
func (k vniKey) String() string {
	if k.port == v1beta1.DefaultPort {
		return fmt.Sprint(k.vni)
	}
	return fmt.Sprintf("%d on port %d", k.vni, k.port)
}

func lanName(lan *v1beta1.LAN) string { return lan.Namespace + "/" + lan.Name }

// enumerate joins the first three items and the number of the others.
func enumerate(items []string, separator string) string {
	const most = 3
	if more := len(items) - most; more > 1 {
		items = append(slices.Clone(items[:most]), fmt.Sprintf("and %d more", more))
	}
	return strings.Join(items, separator)
}
