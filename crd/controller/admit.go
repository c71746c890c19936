package controller

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// standing is a segment that a node has, whatever became of its LAN. The segments of lost nodes are none: they hold nothing back.
type standing struct {
	Node string
	v1beta1.SegmentStatus
}

// verdict is what a LAN holds, and why not all that it asks for.
type verdict struct {
	Holds   *v1beta1.Holding  // nil: the LAN is refused
	Clash   string            // why the LAN is refused, as a phrase: "vni 222 is default/lab's"
	WayOut  string            // what to do about it
	Refused map[string]string // refused spokes and why, as phrases

	Discovery v1beta1.Discovery // how its nodes find each other
}

// A LAN that is being deleted holds what it held, until it is gone.
func deleted(lan *v1beta1.LAN) bool { return !lan.DeletionTimestamp.IsZero() }

// vniKey is what a VNI is unique by.
type vniKey struct{ vni, port int32 }

// admission is the state of one run of admit: who holds what so far.
type admission struct {
	segments []standing
	ns       map[string]*v1beta1.LAN
	vni      map[vniKey]*v1beta1.LAN
	spoke    map[string]*v1beta1.LAN
	stays    map[types.UID]bool // has its ns since before
}

// admit decides what each LAN holds, by UID. A LAN keeps what its status says it holds as long as its spec asks for it; what is
// free goes to the LAN that was created first, then to the smaller UID. What a node still has of another LAN is not free, even if
// that LAN is gone. A LAN that is being deleted keeps what it holds and gets nothing more.
// No ns, no VNI on a port and no spoke ever has two holders in the answer, and answering the answer again changes nothing.
func admit(lans []v1beta1.LAN, segments []standing) map[types.UID]verdict {
	a := admission{
		segments: segments,
		ns:       map[string]*v1beta1.LAN{},
		vni:      map[vniKey]*v1beta1.LAN{},
		spoke:    map[string]*v1beta1.LAN{},
		stays:    map[types.UID]bool{},
	}
	verdicts := map[types.UID]verdict{}
	var ranked []*v1beta1.LAN
	for _, lan := range rank(lans) {
		if deleted(lan) {
			verdicts[lan.UID] = a.keepAll(lan)
			continue
		}
		ranked = append(ranked, lan)
		a.stays[lan.UID] = tenure(lan) < newcomer
	}
	for _, lan := range byTenure(ranked) {
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

// rank orders LANs by creation time, then UID.
func rank(lans []v1beta1.LAN) []*v1beta1.LAN {
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
	holder   = iota // holds all that it asks for
	moving          // holds its ns, but asks for another port now
	newcomer        // holds nothing
)

func tenure(lan *v1beta1.LAN) int {
	holds, spec := lan.Status.Holds, lan.Effective()
	switch {
	case holds == nil || holds.NS != spec.NS:
		return newcomer
	case holds.VNI != spec.VNI || holds.Port != spec.VXLANPort:
		return moving
	}
	return holder
}

// byTenure puts holders first, then who moves, then newcomers.
func byTenure(ranked []*v1beta1.LAN) []*v1beta1.LAN {
	ordered := slices.Clone(ranked)
	slices.SortStableFunc(ordered, func(x, y *v1beta1.LAN) int { return cmp.Compare(tenure(x), tenure(y)) })
	return ordered
}

// keepAll leaves a LAN that is being deleted all that it holds.
func (a admission) keepAll(lan *v1beta1.LAN) verdict {
	holds := lan.Status.Holds.DeepCopy()
	if holds != nil {
		a.ns[holds.NS], a.vni[vniKey{holds.VNI, holds.Port}] = lan, lan
		for _, spoke := range holds.Spokes {
			a.spoke[spoke] = lan
		}
	}
	return verdict{Holds: holds}
}

// admitLAN gives the LAN its ns and VNI if both are free.
func (a admission) admitLAN(lan *v1beta1.LAN) {
	spec := lan.Effective()
	key := vniKey{spec.VNI, spec.VXLANPort}
	if a.ns[spec.NS] == nil && a.vni[key] == nil && len(a.inNS(lan)) == 0 && len(a.onVNI(lan)) == 0 {
		a.ns[spec.NS], a.vni[key] = lan, lan
	}
}

// explain is the verdict on the LAN, but for its spokes.
func (a admission) explain(lan *v1beta1.LAN) verdict {
	spec := lan.Effective()
	key := vniKey{spec.VNI, spec.VXLANPort}
	switch {
	case a.ns[spec.NS] == lan:
		return verdict{
			Holds:   &v1beta1.Holding{NS: spec.NS, VNI: spec.VNI, Port: spec.VXLANPort},
			Refused: map[string]string{},
		}
	case a.ns[spec.NS] != nil:
		return takenBy(a.ns[spec.NS], "ns "+spec.NS, "ns cannot change: delete this LAN and create it with another ns, or without one")
	case a.vni[key] != nil:
		return takenBy(a.vni[key], "vni "+key.String(), "vni cannot change: choose another vxlanPort, or delete this LAN and create it with another vni")
	}
	if left := a.onVNI(lan); len(left) > 0 {
		return leftBy(left, "vni "+key.String())
	}
	return leftBy(a.inNS(lan), "ns "+spec.NS)
}

// takenBy refuses a LAN what another one holds.
func takenBy(other *v1beta1.LAN, what, wayOut string) verdict {
	if deleted(other) {
		return verdict{
			Clash:  fmt.Sprintf("%s is still in use by %s (being deleted)", what, name(other)),
			WayOut: fmt.Sprintf("it is taken up by itself when that LAN is gone; what it waits for: kubectl describe lan -n %s %s", other.Namespace, other.Name),
		}
	}
	return verdict{Clash: fmt.Sprintf("%s is %s's", what, name(other)), WayOut: wayOut}
}

// leftBy refuses a LAN what nodes still have of others.
func leftBy(left []standing, what string) verdict {
	how := "leaving"
	if left[0].OnDemand() {
		how = "made by its pods"
	}
	v := verdict{
		Clash:  fmt.Sprintf("%s is still in use by %s (%s) on node %s", what, left[0].LAN, how, left[0].Node),
		WayOut: "it is taken up by itself when the node has let it go",
	}
	if more := len(left) - 1; more > 0 {
		v.Clash += fmt.Sprintf(" and %d more", more)
	}
	if pods := podsOf(left, func(v1beta1.Attachment) bool { return true }); len(pods) > 0 {
		v.WayOut = "it is taken up by itself when these pods are gone: " + enumerate(pods, ", ")
	}
	return v
}

// inNS are the segments of other LANs under the name of the LAN's ns; none for a LAN that has the ns already.
func (a admission) inNS(lan *v1beta1.LAN) []standing {
	if a.stays[lan.UID] {
		return nil
	}
	ns := lan.Effective().NS
	return a.others(lan, func(s standing) bool { return s.NS == ns })
}

// onVNI are the segments of other LANs that occupy the LAN's VNI and are there to stay until a pod or the node lets them go. Those of a
// LAN that moved to another port are not: their node rebuilds them in a moment.
func (a admission) onVNI(lan *v1beta1.LAN) []standing {
	if tenure(lan) == holder {
		return nil
	}
	spec := lan.Effective()
	return a.others(lan, func(s standing) bool {
		if s.VNI != spec.VNI || s.Port != spec.VXLANPort {
			return false
		}
		moves := a.stays[s.UID] && (a.stays[lan.UID] || a.ns[s.NS] != nil && a.ns[s.NS].UID == s.UID)
		return !moves || s.State == v1beta1.SegmentLeaving
	})
}

// keepSpokes leaves an admitted LAN the spokes and pools that it holds and still asks for.
func (a admission) keepSpokes(lan *v1beta1.LAN, v verdict) {
	if v.Holds == nil || lan.Status.Holds == nil {
		return
	}
	names := lan.Spec.Names()
	for _, spoke := range lan.Status.Holds.Spokes {
		if a.spoke[spoke] == nil && slices.Contains(names, spoke) {
			a.spoke[spoke] = lan
		}
	}
}

// admitSpokes gives an admitted LAN those of its spokes and pools that nobody holds, and fills in what it holds and what is refused.
func (a admission) admitSpokes(lan *v1beta1.LAN, v verdict) {
	if v.Holds == nil {
		return
	}
	for _, spoke := range slices.Sorted(slices.Values(lan.Spec.Names())) {
		holder := a.spoke[spoke]
		if holder != nil && holder != lan {
			v.Refused[spoke] = takenBy(holder, "spoke "+spoke, "").Clash
			continue
		}
		if holder == nil {
			everywhere := a.others(lan, func(standing) bool { return true })
			if pods := podsOf(everywhere, func(p v1beta1.Attachment) bool { return p.Offer() == spoke }); len(pods) > 0 {
				v.Refused[spoke] = fmt.Sprintf("spoke %s is still in use by %s", spoke, enumerate(pods, ", "))
				continue
			}
		}
		a.spoke[spoke] = lan
		v.Holds.Spokes = append(v.Holds.Spokes, spoke)
	}
}

// others are the segments of other LANs that match.
func (a admission) others(lan *v1beta1.LAN, match func(standing) bool) []standing {
	var segments []standing
	for _, s := range a.segments {
		if s.UID != lan.UID && match(s) {
			segments = append(segments, s)
		}
	}
	return segments
}

// podsOf are the attachments that match, in words: "default/srl-1 on worker1 (spoke srl of LAN default/lab)".
func podsOf(segments []standing, match func(v1beta1.Attachment) bool) []string {
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

// vnis are those that LANs hold.
func vnis(lans []v1beta1.LAN) map[vniKey]bool {
	taken := map[vniKey]bool{}
	for i := range lans {
		if h := lans[i].Status.Holds; h != nil {
			taken[vniKey{h.VNI, h.Port}] = true
		}
	}
	return taken
}

// kept is what a LAN held before and still holds: what may be written before anything is granted. A LAN that moves to another
// port, where nobody has its VNI, keeps the rest: without anything held, nodes would tear it down.
func kept(before, after *v1beta1.Holding, taken map[vniKey]bool) *v1beta1.Holding {
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

func name(lan *v1beta1.LAN) string { return lan.Namespace + "/" + lan.Name }

// enumerate joins the first few words and says how many more there are.
func enumerate(words []string, separator string) string {
	const few = 3
	if more := len(words) - few; more > 1 {
		words = append(slices.Clone(words[:few]), fmt.Sprintf("and %d more", more))
	}
	return strings.Join(words, separator)
}
