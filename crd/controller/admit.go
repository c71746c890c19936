package controller

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// nodeSegment is a segment that a node has, whatever became of its LAN. The segments of lost nodes are none: they hold nothing back.
type nodeSegment struct {
	Node string
	v1beta1.SegmentStatus
}

// decision is what a LAN holds, and why not all that it asks for.
type decision struct {
	Holds    *v1beta1.Holding  // nil: the LAN is refused
	Conflict string            // why the LAN is refused, as a phrase: "vni 222 is default/lab's"
	Remedy   string            // what to do about it
	Refused  map[string]string // refused spokes and why, as phrases

	Discovery v1beta1.Discovery // how its nodes find each other
}

// A LAN that is being deleted holds what it held, until it is gone.
func beingDeleted(lan *v1beta1.LAN) bool { return !lan.DeletionTimestamp.IsZero() }

// vniKey is what a VNI is unique by.
type vniKey struct{ vni, port int32 }

// admission is the state of one run of admit: who holds what so far.
type admission struct {
	segments    []nodeSegment
	nsHolder    map[string]*v1beta1.LAN
	vniHolder   map[vniKey]*v1beta1.LAN
	spokeHolder map[string]*v1beta1.LAN
	keepsNS     map[types.UID]bool // has its ns since before
}

// admit decides what each LAN holds, by UID. A LAN keeps what its status says it holds as long as its spec asks for it; what is
// free goes to the LAN that was created first, then to the smaller UID. What a node still has of another LAN is not free, even if
// that LAN is gone. A LAN that is being deleted keeps what it holds and gets nothing more.
// No ns, no VNI on a port and no spoke ever has two holders in the answer, and answering the answer again changes nothing.
func admit(lans []v1beta1.LAN, segments []nodeSegment) map[types.UID]decision {
	a := admission{
		segments:    segments,
		nsHolder:    map[string]*v1beta1.LAN{},
		vniHolder:   map[vniKey]*v1beta1.LAN{},
		spokeHolder: map[string]*v1beta1.LAN{},
		keepsNS:     map[types.UID]bool{},
	}
	verdicts := map[types.UID]decision{}
	var ranked []*v1beta1.LAN
	for _, lan := range byAge(lans) {
		if beingDeleted(lan) {
			verdicts[lan.UID] = a.keepAll(lan)
			continue
		}
		ranked = append(ranked, lan)
		a.keepsNS[lan.UID] = priorityOf(lan) < holdsNothing
	}
	for _, lan := range byPriority(ranked) {
		a.admitLAN(lan)
	}
	for _, lan := range ranked {
		verdicts[lan.UID] = a.explain(lan)
	}
	for _, lan := range ranked {
		a.keepSpokes(lan, verdicts[lan.UID])
	}
	for _, lan := range ranked {
		a.admitSpokes(lan, verdicts[lan.UID])
	}
	return verdicts
}

// byAge orders LANs by creation time, then UID.
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

// The tenures of LANs.
const (
	holdsAll     = iota // holds all that it asks for
	changesPort         // holds its ns, but asks for another port now
	holdsNothing        // holds nothing
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

// byPriority puts holders first, then who moves, then newcomers.
func byPriority(ranked []*v1beta1.LAN) []*v1beta1.LAN {
	ordered := slices.Clone(ranked)
	slices.SortStableFunc(ordered, func(x, y *v1beta1.LAN) int { return cmp.Compare(priorityOf(x), priorityOf(y)) })
	return ordered
}

// keepAll leaves a LAN that is being deleted all that it holds.
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

// admitLAN gives the LAN its ns and VNI if both are free.
func (a admission) admitLAN(lan *v1beta1.LAN) {
	spec := lan.Effective()
	key := vniKey{spec.VNI, spec.VXLANPort}
	if a.nsHolder[spec.NS] == nil && a.vniHolder[key] == nil && len(a.othersInNS(lan)) == 0 && len(a.othersOnVNI(lan)) == 0 {
		a.nsHolder[spec.NS], a.vniHolder[key] = lan, lan
	}
}

// explain is the verdict on the LAN, but for its spokes.
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
		return heldByOther(a.nsHolder[spec.NS], "ns "+spec.NS, "ns cannot change: delete this LAN and create it with another ns, or without one")
	case a.vniHolder[key] != nil:
		return heldByOther(a.vniHolder[key], "vni "+key.String(), "vni cannot change: choose another vxlanPort, or delete this LAN and create it with another vni")
	}
	if left := a.othersOnVNI(lan); len(left) > 0 {
		return inUseOnNodes(left, "vni "+key.String())
	}
	return inUseOnNodes(a.othersInNS(lan), "ns "+spec.NS)
}

// heldByOther refuses a LAN what another one holds.
func heldByOther(other *v1beta1.LAN, what, wayOut string) decision {
	if beingDeleted(other) {
		return decision{
			Conflict: fmt.Sprintf("%s is still in use by %s (being deleted)", what, lanName(other)),
			Remedy:   fmt.Sprintf("it is taken up by itself when that LAN is gone; what it waits for: kubectl describe lan -n %s %s", other.Namespace, other.Name),
		}
	}
	return decision{Conflict: fmt.Sprintf("%s is %s's", what, lanName(other)), Remedy: wayOut}
}

// inUseOnNodes refuses a LAN what nodes still have of others.
func inUseOnNodes(left []nodeSegment, what string) decision {
	how := "leaving"
	if left[0].OnDemand() {
		how = "made by its pods"
	}
	v := decision{
		Conflict: fmt.Sprintf("%s is still in use by %s (%s) on node %s", what, left[0].LAN, how, left[0].Node),
		Remedy:   "it is taken up by itself when the node has let it go",
	}
	if more := len(left) - 1; more > 0 {
		v.Conflict += fmt.Sprintf(" and %d more", more)
	}
	if pods := attachmentsIn(left, func(v1beta1.Attachment) bool { return true }); len(pods) > 0 {
		v.Remedy = "it is taken up by itself when these pods are gone: " + enumerate(pods, ", ")
	}
	return v
}

// othersInNS are the segments of other LANs under the name of the LAN's ns; none for a LAN that has the ns already.
func (a admission) othersInNS(lan *v1beta1.LAN) []nodeSegment {
	if a.keepsNS[lan.UID] {
		return nil
	}
	ns := lan.Effective().NS
	return a.otherSegments(lan, func(s nodeSegment) bool { return s.NS == ns })
}

// othersOnVNI are the segments of other LANs that occupy the LAN's VNI and are there to stay until a pod or the node lets them go. Those of a
// LAN that moved to another port are not: their node rebuilds them in a moment.
func (a admission) othersOnVNI(lan *v1beta1.LAN) []nodeSegment {
	if priorityOf(lan) == holdsAll {
		return nil
	}
	spec := lan.Effective()
	return a.otherSegments(lan, func(s nodeSegment) bool {
		if s.VNI != spec.VNI || s.Port != spec.VXLANPort {
			return false
		}
		moves := a.keepsNS[s.UID] && (a.keepsNS[lan.UID] || a.nsHolder[s.NS] != nil && a.nsHolder[s.NS].UID == s.UID)
		return !moves || s.State == v1beta1.SegmentLeaving
	})
}

// keepSpokes leaves an admitted LAN the spokes and pools that it holds and still asks for.
func (a admission) keepSpokes(lan *v1beta1.LAN, v decision) {
	if v.Holds == nil || lan.Status.Holds == nil {
		return
	}
	names := lan.Spec.SpokesAndPools()
	for _, spoke := range lan.Status.Holds.Spokes {
		if a.spokeHolder[spoke] == nil && slices.Contains(names, spoke) {
			a.spokeHolder[spoke] = lan
		}
	}
}

// admitSpokes gives an admitted LAN those of its spokes and pools that nobody holds, and fills in what it holds and what is refused.
func (a admission) admitSpokes(lan *v1beta1.LAN, v decision) {
	if v.Holds == nil {
		return
	}
	for _, spoke := range slices.Sorted(slices.Values(lan.Spec.SpokesAndPools())) {
		holder := a.spokeHolder[spoke]
		if holder != nil && holder != lan {
			v.Refused[spoke] = heldByOther(holder, "spoke "+spoke, "").Conflict
			continue
		}
		if holder == nil {
			everywhere := a.otherSegments(lan, func(nodeSegment) bool { return true })
			if pods := attachmentsIn(everywhere, func(p v1beta1.Attachment) bool { return p.SpokeOrPool() == spoke }); len(pods) > 0 {
				v.Refused[spoke] = fmt.Sprintf("spoke %s is still in use by %s", spoke, enumerate(pods, ", "))
				continue
			}
		}
		a.spokeHolder[spoke] = lan
		v.Holds.Spokes = append(v.Holds.Spokes, spoke)
	}
}

// otherSegments are the segments of other LANs that match.
func (a admission) otherSegments(lan *v1beta1.LAN, match func(nodeSegment) bool) []nodeSegment {
	var segments []nodeSegment
	for _, s := range a.segments {
		if s.UID != lan.UID && match(s) {
			segments = append(segments, s)
		}
	}
	return segments
}

// attachmentsIn are the attachments that match, in words: "default/srl-1 on worker1 (spoke srl of LAN default/lab)".
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

// heldVNIs are those that LANs hold.
func heldVNIs(lans []v1beta1.LAN) map[vniKey]bool {
	taken := map[vniKey]bool{}
	for i := range lans {
		if h := lans[i].Status.Holds; h != nil {
			taken[vniKey{h.VNI, h.Port}] = true
		}
	}
	return taken
}

// heldThroughout is what a LAN held before and still holds: what may be written before anything is granted. A LAN that moves to another
// port, where nobody has its VNI, keeps the rest: without anything held, nodes would tear it down.
func heldThroughout(before, after *v1beta1.Holding, taken map[vniKey]bool) *v1beta1.Holding {
	if before == nil || after == nil || before.NS != after.NS {
		return nil
	}
	now := vniKey{after.VNI, after.Port}
	if now != (vniKey{before.VNI, before.Port}) && taken[now] {
		return nil
	}
	k := &v1beta1.Holding{NS: after.NS, VNI: after.VNI, Port: after.Port, Discovery: before.Discovery}
	for _, spoke := range after.Spokes {
		if slices.Contains(before.Spokes, spoke) {
			k.Spokes = append(k.Spokes, spoke)
		}
	}
	return k
}

// String names the port where it is not the usual one.
func (k vniKey) String() string {
	if k.port == v1beta1.DefaultPort {
		return fmt.Sprint(k.vni)
	}
	return fmt.Sprintf("%d on port %d", k.vni, k.port)
}

func lanName(lan *v1beta1.LAN) string { return lan.Namespace + "/" + lan.Name }

// enumerate joins the first few words and says how many more there are.
func enumerate(words []string, separator string) string {
	const few = 3
	if more := len(words) - few; more > 1 {
		words = append(slices.Clone(words[:few]), fmt.Sprintf("and %d more", more))
	}
	return strings.Join(words, separator)
}
