package controller

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// LostAfter is how long a node may be silent before it counts as lost: what it has holds nothing back any more. It is as long
// as Kubernetes leaves pods on such a node (defaultTolerationSeconds of the admission plugin DefaultTolerationSeconds).
const LostAfter = 5 * time.Minute

// node is a node that runs k8slan, with what it reports.
type node struct {
	Name     string
	Labels   map[string]string
	Exists   bool      // false where there is a LANNode but no Node any more
	Answers  bool      // false once the node controller has given it up
	Lost     string    // why the node counts for nothing any more, "its Node is gone"; empty for one that counts
	LostAt   time.Time // when a node that does not answer will be lost
	Segments []v1beta1.SegmentStatus
	Gone     []v1beta1.GoneLAN
}

// nodesOf pairs LANNodes with their Nodes, sorted by name. A Node without a LANNode has nothing of any LAN.
func nodesOf(nodes []corev1.Node, lanNodes []v1beta1.LANNode, now time.Time) []node {
	byName := map[string]*corev1.Node{}
	for i := range nodes {
		byName[nodes[i].Name] = &nodes[i]
	}
	var paired []node
	for _, ln := range lanNodes {
		p := node{Name: ln.Name, Segments: ln.Status.Segments, Gone: ln.Status.Gone, Lost: "its Node is gone"}
		if n := byName[ln.Name]; n != nil {
			p.Labels, p.Exists, p.Answers = n.Labels, true, true
			p.Lost, p.LostAt = lostReason(healthOf(n), now)
			p.Answers = p.Lost == "" && p.LostAt.IsZero()
		}
		paired = append(paired, p)
	}
	slices.SortFunc(paired, func(x, y node) int { return cmp.Compare(x.Name, y.Name) })
	return paired
}

// health are what of a Node says whether it is alive.
type health struct {
	Ready        corev1.ConditionStatus
	Since        metav1.Time // of Ready
	OutOfService bool        // an administrator says that the node is down, with the taint node.kubernetes.io/out-of-service
}

func healthOf(n *corev1.Node) health {
	var v health
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			v.Ready, v.Since = c.Status, c.LastTransitionTime
		}
	}
	for _, t := range n.Spec.Taints {
		v.OutOfService = v.OutOfService || t.Key == corev1.TaintNodeOutOfService
	}
	return v
}

// lostReason says why a node is lost or, of one that has been silent for the node controller's grace period (Ready is Unknown
// then), when it will be. Like the pod garbage collector, it believes the taint of a Node only that is not ready.
func lostReason(v health, now time.Time) (why string, at time.Time) {
	switch at := v.Since.Add(LostAfter); {
	case v.OutOfService && v.Ready != corev1.ConditionTrue:
		return "it is out of service", time.Time{}
	case v.Ready != corev1.ConditionUnknown:
		return "", time.Time{}
	case now.Before(at):
		return "", at
	}
	return fmt.Sprintf("it has not answered for %s", minutes(LostAfter)), time.Time{}
}

// minutes is a duration of whole minutes.
func minutes(d time.Duration) string { return fmt.Sprintf("%d minutes", int(d.Minutes())) }

// nodeSegments lists the segments of all nodes that are not lost.
func nodeSegments(nodes []node) []nodeSegment {
	var segments []nodeSegment
	for _, n := range nodes {
		if n.Lost != "" {
			continue
		}
		for _, s := range n.Segments {
			segments = append(segments, nodeSegment{Node: n.Name, SegmentStatus: s})
		}
	}
	return segments
}

// problem is something that keeps a LAN from being Ready.
type problem struct{ Reason, Message string }

// status is the LAN's status by the verdict on its claims, its nodes and the NADs that stand in its way, given as namespace/name.
func status(lan *v1beta1.LAN, v decision, nodes []node, foreignNADs []string, now metav1.Time) v1beta1.LANStatus {
	spanned := spannedBy(lan, nodes)
	s := v1beta1.LANStatus{
		ObservedGeneration: lan.Generation,
		Holds:              v.Holds,
		Discovery:          string(v.Discovery),
		SpokeCount:         portCount(lan, v.Holds),
		Spokes:             spokeStatuses(lan, v, nodes),
		Pools:              poolStatuses(lan, v, nodes, len(spanned)),
		Conditions:         slices.Clone(lan.Status.Conditions),
	}
	for _, spoke := range s.Spokes {
		s.Attached += int32(len(spoke.Attachments))
	}
	for _, pool := range s.Pools {
		s.Attached += pool.Attached
	}
	set := func(c metav1.Condition) {
		c.ObservedGeneration, c.LastTransitionTime = lan.Generation, now
		meta.SetStatusCondition(&s.Conditions, c)
	}
	if twice := attachedTwice(s.Spokes, nodes); twice != "" {
		set(metav1.Condition{Type: v1beta1.ConditionAttachedTwice, Status: metav1.ConditionTrue, Reason: v1beta1.ReasonTwoNodes, Message: twice})
	} else {
		meta.RemoveStatusCondition(&s.Conditions, v1beta1.ConditionAttachedTwice)
	}
	exceeded := poolExceeded(lan, s.Pools)
	for i, pool := range s.Pools {
		s.Pools[i].Nodes = pool.Nodes[:min(len(pool.Nodes), v1beta1.MaxPoolNodes)]
	}
	if exceeded != "" {
		set(metav1.Condition{Type: v1beta1.ConditionPoolExceeded, Status: metav1.ConditionTrue, Reason: v1beta1.ReasonShrunk, Message: exceeded})
	} else {
		meta.RemoveStatusCondition(&s.Conditions, v1beta1.ConditionPoolExceeded)
	}
	if beingDeleted(lan) {
		p := blockersOf(lan, nodes).problem(lan)
		s.State, s.Nodes = v1beta1.StateDeleting, fmt.Sprintf("0/%d", len(spanned))
		if p.Reason != v1beta1.ReasonDeleting {
			s.Reason = p.Reason
		}
		set(metav1.Condition{Type: v1beta1.ConditionReady, Status: metav1.ConditionFalse, Reason: p.Reason, Message: p.Message})
		return s
	}
	ready, offered, problems := summarizeNodes(lan, v, spanned)
	s.Nodes = fmt.Sprintf("%d/%d", ready, len(spanned))
	problems = append(problems, refusedSpokes(v)...)
	for _, nad := range foreignNADs {
		problems = append(problems, problem{
			v1beta1.ReasonNADConflict,
			"NetworkAttachmentDefinition " + nad + " is not this LAN's; delete it, and k8slan writes its own",
		})
	}

	set(acceptedCondition(v))
	summary := fmt.Sprintf("spokes are offered on %d of %d nodes", offered, len(spanned))
	switch {
	case v.Holds == nil:
		s.State, s.Reason = v1beta1.StateConflict, v.Conflict
		set(metav1.Condition{Type: v1beta1.ConditionReady, Status: metav1.ConditionFalse, Reason: v1beta1.ReasonConflict, Message: v.Conflict})
	case len(problems) == 0:
		s.State = v1beta1.StateReady
		set(metav1.Condition{Type: v1beta1.ConditionReady, Status: metav1.ConditionTrue, Reason: v1beta1.ReasonOffered, Message: summary})
	default:
		worst := worstReason(problems)
		s.State, s.Reason = v1beta1.StateDegraded, worst
		if isTransient(worst) {
			s.State = v1beta1.StatePending
		}
		set(metav1.Condition{Type: v1beta1.ConditionReady, Status: metav1.ConditionFalse, Reason: worst, Message: joinProblems(problems) + "; " + summary})
	}
	return s
}

// acceptedCondition is the condition on the LAN's claims.
func acceptedCondition(v decision) metav1.Condition {
	c := metav1.Condition{Type: v1beta1.ConditionAccepted, Status: metav1.ConditionFalse}
	switch {
	case v.Holds == nil:
		c.Reason, c.Message = v1beta1.ReasonConflict, v.Conflict+"; "+v.Remedy
	case len(v.Refused) > 0:
		c.Reason, c.Message = v1beta1.ReasonSpokeConflict, joinProblems(refusedSpokes(v))+"; the other spokes are held"
	default:
		c.Status, c.Reason = metav1.ConditionTrue, v1beta1.ReasonHeld
		c.Message = fmt.Sprintf("holds ns %s, vni %s and its spokes", v.Holds.NS, vniKey{v.Holds.VNI, v.Holds.Port})
	}
	return c
}

func refusedSpokes(v decision) []problem {
	var problems []problem
	for _, spoke := range slices.Sorted(maps.Keys(v.Refused)) {
		problems = append(problems, problem{v1beta1.ReasonSpokeConflict, v.Refused[spoke]})
	}
	return problems
}

// spannedBy are the nodes that the LAN should be on.
func spannedBy(lan *v1beta1.LAN, nodes []node) []node {
	selector := labels.Set{}
	for k, v := range lan.Spec.NodeSelector {
		selector[k] = string(v)
	}
	var spanned []node
	for _, n := range nodes {
		if n.Exists && selector.AsSelector().Matches(labels.Set(n.Labels)) {
			spanned = append(spanned, n)
		}
	}
	return spanned
}

// summarizeNodes counts the nodes on which the LAN is ready and those that offer its spokes, and says what is wrong on the others.
func summarizeNodes(lan *v1beta1.LAN, v decision, spanned []node) (ready, offered int, problems []problem) {
	if v.Holds == nil {
		return 0, 0, nil
	}
	if len(spanned) == 0 {
		message := "no node runs k8slan"
		if len(lan.Spec.NodeSelector) > 0 {
			message = "no node that runs k8slan matches spec.nodeSelector"
		}
		return 0, 0, []problem{{v1beta1.ReasonNoNodes, message}}
	}
	for _, n := range spanned {
		seg, p := segmentOn(lan, v, n)
		if p == nil {
			ready, offered = ready+1, offered+1
			continue
		}
		if held := portCount(lan, v.Holds); seg.Offered > 0 && seg.Offered >= held {
			offered++ // Degraded, or with the spec of before the last change
		}
		problems = append(problems, *p)
	}
	if p := mixedFamilies(lan, v, spanned); p != nil {
		problems = append(problems, *p)
	}
	return ready, offered, problems
}

// mixedFamilies says that some nodes would be reached over IPv4 and others over IPv6: they do not reach each other.
func mixedFamilies(lan *v1beta1.LAN, v decision, spanned []node) *problem {
	if v.Discovery == v1beta1.Multicast {
		return nil
	}
	var ipv4, ipv6 []string
	for _, n := range spanned {
		for _, s := range n.Segments {
			vtep, err := netip.ParseAddr(s.VTEP)
			switch {
			case err != nil || s.UID != lan.UID || s.Generation != lan.Generation || vtep.IsLinkLocalUnicast(): // of multicast, until it changes
			case vtep.Is4():
				ipv4 = append(ipv4, n.Name)
			default:
				ipv6 = append(ipv6, n.Name)
			}
		}
	}
	if len(ipv4) == 0 || len(ipv6) == 0 {
		return nil
	}
	return &problem{v1beta1.ReasonMixedFamilies, fmt.Sprintf(
		"the underlay has IPv4 addresses on %s and only IPv6 ones on %s, which do not reach each other. Give all of one family, or say by spec.vxlanGrp which to use (an IPv6 group for IPv6)",
		enumerate(ipv4, ", "), enumerate(ipv6, ", "))}
}

// segmentOn is the LAN's segment on a node and what is wrong with it there, nil if nothing is.
func segmentOn(lan *v1beta1.LAN, v decision, n node) (v1beta1.SegmentStatus, *problem) {
	i := slices.IndexFunc(n.Segments, func(s v1beta1.SegmentStatus) bool { return s.UID == lan.UID })
	if !n.Answers {
		return v1beta1.SegmentStatus{}, &problem{v1beta1.ReasonUnreachable, "node " + n.Name + " does not answer; it may still forward"}
	}
	if i < 0 || n.Segments[i].State == v1beta1.SegmentLeaving {
		return v1beta1.SegmentStatus{}, &problem{v1beta1.ReasonPending, "node " + n.Name + " does not report the LAN yet"}
	}
	seg, held := n.Segments[i], portCount(lan, v.Holds)
	switch {
	case seg.State != v1beta1.SegmentReady && seg.Reason == "":
		return seg, &problem{v1beta1.ReasonPending, "node " + n.Name + " is still building the LAN"}
	case seg.State != v1beta1.SegmentReady:
		return seg, &problem{seg.Reason, "node " + n.Name + ": " + seg.Message}
	case seg.Generation != lan.Generation:
		return seg, &problem{v1beta1.ReasonPending, "node " + n.Name + " is still making the last change"}
	case seg.Offered < held:
		return seg, &problem{v1beta1.ReasonPending, fmt.Sprintf("node %s offers %d of %d spokes so far", n.Name, seg.Offered, held)}
	}
	return seg, nil
}

// worstReason is the first reason that is a fault, else the first.
func worstReason(problems []problem) string {
	for _, p := range problems {
		if !isTransient(p.Reason) {
			return p.Reason
		}
	}
	return problems[0].Reason
}

// isTransient is true for a reason that is no fault: nodes are still to come, or still at work.
func isTransient(reason string) bool {
	return reason == v1beta1.ReasonPending || reason == v1beta1.ReasonNoNodes
}

func joinProblems(problems []problem) string {
	words := make([]string, len(problems))
	for i, p := range problems {
		words[i] = p.Message
	}
	return enumerate(words, "; ")
}

// portCount is how many spokes each node should offer: of a pool that the LAN holds, its ports.
func portCount(lan *v1beta1.LAN, holds *v1beta1.Holding) (n int32) {
	if holds == nil {
		return 0
	}
	for _, name := range holds.Spokes {
		pool, _ := lan.Spec.Pool(name)
		n += max(pool.Size, 1)
	}
	return n
}

// spokeStatuses lists the single spokes that are attached, whether they are still in the spec or not, and those that are refused. A LAN that is
// being deleted keeps what it had on nodes that are gone: what they do now nobody knows.
func spokeStatuses(lan *v1beta1.LAN, v decision, nodes []node) []v1beta1.SpokeStatus {
	byName := map[string]*v1beta1.SpokeStatus{}
	entry := func(spoke string) *v1beta1.SpokeStatus {
		if byName[spoke] == nil {
			byName[spoke] = &v1beta1.SpokeStatus{Name: spoke}
		}
		return byName[spoke]
	}
	for spoke, why := range v.Refused {
		if _, pool := lan.Spec.Pool(spoke); !pool {
			entry(spoke).Refused = why
		}
	}
	last, _ := lastKnown(lan, nodes)
	for _, a := range last {
		e := entry(a.Spoke)
		e.Attachments = append(e.Attachments, a)
	}
	for _, n := range nodes {
		if !n.Exists && !beingDeleted(lan) {
			continue
		}
		for _, seg := range n.Segments {
			if seg.UID != lan.UID {
				continue
			}
			for _, a := range seg.Attachments {
				if a.Pool != "" {
					continue
				}
				e := entry(a.Spoke)
				e.Attachments = append(e.Attachments, v1beta1.SpokeAttachment{Node: n.Name, Attachment: a})
			}
		}
	}
	var list []v1beta1.SpokeStatus
	for _, spoke := range slices.Sorted(maps.Keys(byName)) {
		slices.SortStableFunc(byName[spoke].Attachments, func(x, y v1beta1.SpokeAttachment) int {
			return cmp.Or(cmp.Compare(x.Node, y.Node), cmp.Compare(x.Pod, y.Pod), cmp.Compare(x.Interface, y.Interface))
		})
		list = append(list, *byName[spoke])
	}
	return list
}

// poolStatuses sums up the LAN's pools, and those that are gone from its spec but still in use, sorted. What a LAN that is being deleted
// had on nodes that are gone stays, as with spokes. Which pods they are would be too much for one object.
func poolStatuses(lan *v1beta1.LAN, v decision, nodes []node, spanned int) []v1beta1.PoolStatus {
	used := map[string]map[string]int32{} // by pool and node
	use := func(pool, node string, n int32) {
		if used[pool] == nil {
			used[pool] = map[string]int32{}
		}
		if n > 0 {
			used[pool][node] += n
		}
	}
	for _, pool := range lan.Spec.SpokePools {
		use(pool.Name, "", 0)
	}
	_, last := lastKnown(lan, nodes)
	for _, pool := range last {
		for _, n := range pool.Nodes {
			use(pool.Name, n.Node, n.Attached)
		}
	}
	for _, n := range nodes {
		for _, seg := range n.Segments {
			for _, a := range seg.Attachments {
				if seg.UID == lan.UID && a.Pool != "" && (n.Exists || beingDeleted(lan)) {
					use(a.Pool, n.Name, 1)
				}
			}
		}
	}
	var list []v1beta1.PoolStatus
	for _, name := range slices.Sorted(maps.Keys(used)) {
		s := v1beta1.PoolStatus{Name: name, Refused: v.Refused[name]}
		for _, n := range slices.Sorted(maps.Keys(used[name])) {
			s.Nodes = append(s.Nodes, v1beta1.PoolNode{Node: n, Attached: used[name][n]})
			s.Attached += used[name][n]
		}
		if v.Holds != nil && !beingDeleted(lan) && slices.Contains(v.Holds.Spokes, name) {
			pool, _ := lan.Spec.Pool(name)
			s.Ports = pool.Size * int32(spanned)
		}
		list = append(list, s)
	}
	return list
}

// poolExceeded says which pools have more pods on a node than ports, and where; empty if none has.
func poolExceeded(lan *v1beta1.LAN, pools []v1beta1.PoolStatus) string {
	var words []string
	for _, s := range pools {
		pool, ok := lan.Spec.Pool(s.Name)
		var where []string
		for _, n := range s.Nodes {
			if ok && n.Attached > pool.Size {
				where = append(where, fmt.Sprintf("%d on %s", n.Attached, n.Node))
			}
		}
		if len(where) > 0 {
			words = append(words, fmt.Sprintf("pool %s is of size %d, and more pods are attached: %s", s.Name, pool.Size, enumerate(where, ", ")))
		}
	}
	if len(words) == 0 {
		return ""
	}
	return enumerate(words, "; ") + "; they stay until they go by themselves, and no more are placed there before"
}

// attachedTwice says which spokes are attached on more than one node, and where; empty if none is.
func attachedTwice(spokes []v1beta1.SpokeStatus, nodes []node) string {
	silent := map[string]bool{}
	for _, n := range nodes {
		silent[n.Name] = !n.Answers
	}
	var words []string
	for _, spoke := range spokes {
		on := map[string]bool{}
		var where []string
		for _, a := range spoke.Attachments {
			on[a.Node] = true
			place := a.Pod + " on " + a.Node
			if silent[a.Node] {
				place += " (which does not answer and may still forward)"
			}
			where = append(where, place)
		}
		if len(on) > 1 {
			words = append(words, fmt.Sprintf("spoke %s is attached twice: %s", spoke.Name, strings.Join(where, ", ")))
		}
	}
	if len(words) == 0 {
		return ""
	}
	return enumerate(words, "; ") + "; that is right during a live migration only, since both have the same MAC unless another was requested"
}
