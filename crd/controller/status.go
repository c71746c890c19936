package controller

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// problem is something that keeps a LAN from being Ready.
type problem struct{ Reason, Message string }

// status returns a LAN's status, given the decision on what it holds, the nodes, and the NADs, as namespace/name, that
// have the names of its NADs and are not its own.
func status(
	lan *v1beta1.LAN, d decision, nodes []node, foreignNADs []string, now metav1.Time,
) v1beta1.LANStatus {
	spanned := spannedBy(lan, nodes)
	s := v1beta1.LANStatus{
		ObservedGeneration: lan.Generation,
		Holds:              d.Holds,
		Discovery:          string(d.Discovery),
		SpokeCount:         portCount(lan, d.Holds),
		Spokes:             spokeStatuses(lan, d, nodes),
		Pools:              poolStatuses(lan, d, nodes, len(spanned)),
		Conditions:         slices.Clone(lan.Status.Conditions),
	}
	s.Attached = attachedCount(s)
	w := conditionWriter{&s.Conditions, lan.Generation, now}
	w.setWhile(v1beta1.ConditionAttachedTwice, v1beta1.ReasonTwoNodes, attachedTwice(s.Spokes, nodes))
	w.setWhile(v1beta1.ConditionPoolExceeded, v1beta1.ReasonShrunk, poolExceeded(lan, s.Pools))
	for i, pool := range s.Pools { // only now, because poolExceeded needs all nodes
		s.Pools[i].Nodes = pool.Nodes[:min(len(pool.Nodes), v1beta1.MaxPoolNodes)]
	}
	if beingDeleted(lan) {
		s.Nodes = fmt.Sprintf("0/%d", len(spanned))
		s.State, s.Reason = deletionState(w, blockersOf(lan, nodes).problem(lan))
		return s
	}
	ready, offered, problems := summarizeNodes(lan, d, spanned)
	problems = slices.Concat(problems, refusedSpokes(d), nadProblems(foreignNADs))
	s.Nodes = fmt.Sprintf("%d/%d", ready, len(spanned))
	w.set(acceptedCondition(d))
	summary := fmt.Sprintf("spokes are offered on %d of %d nodes", offered, len(spanned))
	s.State, s.Reason = readyState(w, d, problems, summary)
	return s
}

// conditionWriter writes conditions of one LAN.
type conditionWriter struct {
	conditions *[]metav1.Condition
	generation int64
	now        metav1.Time
}

// set writes a condition.
func (w conditionWriter) set(c metav1.Condition) {
	c.ObservedGeneration, c.LastTransitionTime = w.generation, w.now
	meta.SetStatusCondition(w.conditions, c)
}

// setWhile writes a condition that is True, or removes it if the message is empty.
func (w conditionWriter) setWhile(kind, reason, message string) {
	if message == "" {
		meta.RemoveStatusCondition(w.conditions, kind)
		return
	}
	w.set(metav1.Condition{Type: kind, Status: metav1.ConditionTrue, Reason: reason, Message: message})
}

// deletionState writes condition Ready of a LAN that is being deleted, and returns its state and reason.
func deletionState(w conditionWriter, p problem) (v1beta1.LANState, string) {
	w.set(metav1.Condition{
		Type: v1beta1.ConditionReady, Status: metav1.ConditionFalse, Reason: p.Reason, Message: p.Message,
	})
	if p.Reason == v1beta1.ReasonDeleting { // the state says it already
		return v1beta1.StateDeleting, ""
	}
	return v1beta1.StateDeleting, p.Reason
}

// readyState writes condition Ready of a LAN and returns its state and reason. The summary ends the condition's
// message.
func readyState(w conditionWriter, d decision, problems []problem, summary string) (v1beta1.LANState, string) {
	c := metav1.Condition{Type: v1beta1.ConditionReady, Status: metav1.ConditionFalse}
	switch {
	case d.Holds == nil:
		c.Reason, c.Message = v1beta1.ReasonConflict, d.Conflict
		w.set(c)
		return v1beta1.StateConflict, d.Conflict
	case len(problems) == 0:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, v1beta1.ReasonOffered, summary
		w.set(c)
		return v1beta1.StateReady, ""
	}
	c.Reason, c.Message = worstReason(problems), joinProblems(problems)+"; "+summary
	w.set(c)
	if isTransient(c.Reason) {
		return v1beta1.StatePending, c.Reason
	}
	return v1beta1.StateDegraded, c.Reason
}

// acceptedCondition returns condition Accepted, which says whether the LAN holds all that it asks for.
func acceptedCondition(d decision) metav1.Condition {
	c := metav1.Condition{Type: v1beta1.ConditionAccepted, Status: metav1.ConditionFalse}
	switch {
	case d.Holds == nil:
		c.Reason, c.Message = v1beta1.ReasonConflict, d.Conflict+"; "+d.Remedy
	case len(d.Refused) > 0:
		c.Reason, c.Message = v1beta1.ReasonSpokeConflict, joinProblems(refusedSpokes(d))+"; the other spokes are held"
	default:
		c.Status, c.Reason = metav1.ConditionTrue, v1beta1.ReasonHeld
		c.Message = fmt.Sprintf("holds ns %s, vni %s and its spokes", d.Holds.NS, vniKey{d.Holds.VNI, d.Holds.Port})
	}
	return c
}

func refusedSpokes(d decision) []problem {
	var problems []problem
	for _, spoke := range slices.Sorted(maps.Keys(d.Refused)) {
		problems = append(problems, problem{v1beta1.ReasonSpokeConflict, d.Refused[spoke]})
	}
	return problems
}

func nadProblems(foreign []string) []problem {
	var problems []problem
	for _, nad := range foreign {
		problems = append(problems, problem{
			v1beta1.ReasonNADConflict,
			"NetworkAttachmentDefinition " + nad +
				" does not belong to this LAN; delete it, and k8slan creates its own",
		})
	}
	return problems
}

// summarizeNodes counts the nodes on which the LAN is ready and those that offer its spokes, and returns the problems
// on the others.
func summarizeNodes(lan *v1beta1.LAN, d decision, spanned []node) (ready, offered int, problems []problem) {
	if d.Holds == nil {
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
		seg, p := segmentOn(lan, d, n)
		if p == nil {
			ready, offered = ready+1, offered+1
			continue
		}
		if held := portCount(lan, d.Holds); seg.Offered > 0 && seg.Offered >= held {
			offered++ // the segment is Degraded, or has not applied the last change
		}
		problems = append(problems, *p)
	}
	if p := mixedFamilies(lan, d, spanned); p != nil {
		problems = append(problems, *p)
	}
	return ready, offered, problems
}

// mixedFamilies returns a problem if some nodes have IPv4 VTEPs and others IPv6 VTEPs, because these do not reach each
// other.
func mixedFamilies(lan *v1beta1.LAN, d decision, spanned []node) *problem {
	if d.Discovery == v1beta1.Multicast {
		return nil
	}
	var ipv4, ipv6 []string
	for _, n := range spanned {
		for _, s := range n.Segments {
			vtep, err := netip.ParseAddr(s.VTEP)
			switch {
			case err != nil || s.UID != lan.UID || s.Generation != lan.Generation:
			case vtep.IsLinkLocalUnicast(): // still that of multicast
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
		"the underlay has IPv4 addresses on %s and only IPv6 addresses on %s, and they do not reach each other. "+
			"Give all nodes addresses of one family, or set spec.vxlanGrp to a group of the family to use",
		enumerate(ipv4, ", "), enumerate(ipv6, ", "))}
}

// segmentOn returns the LAN's segment on a node, and the problem with it or nil.
func segmentOn(lan *v1beta1.LAN, d decision, n node) (v1beta1.SegmentStatus, *problem) {
	i := slices.IndexFunc(n.Segments, func(s v1beta1.SegmentStatus) bool { return s.UID == lan.UID })
	pending := func(what string) *problem {
		return &problem{v1beta1.ReasonPending, "node " + n.Name + " " + what}
	}
	if !n.Answers {
		p := problem{v1beta1.ReasonUnreachable, "node " + n.Name + " does not answer; it may still forward"}
		return v1beta1.SegmentStatus{}, &p
	}
	if i < 0 || n.Segments[i].State == v1beta1.SegmentLeaving {
		return v1beta1.SegmentStatus{}, pending("does not report the LAN yet")
	}
	seg, held := n.Segments[i], portCount(lan, d.Holds)
	switch {
	case seg.State != v1beta1.SegmentReady && seg.Reason == "":
		return seg, pending("is still building the LAN")
	case seg.State != v1beta1.SegmentReady:
		return seg, &problem{seg.Reason, "node " + n.Name + ": " + seg.Message}
	case seg.Generation != lan.Generation:
		return seg, pending("is still applying the last change")
	case seg.Offered < held:
		return seg, pending(fmt.Sprintf("offers %d of %d spokes so far", seg.Offered, held))
	}
	return seg, nil
}

// worstReason returns the first reason that is not transient, or else the first one.
func worstReason(problems []problem) string {
	for _, p := range problems {
		if !isTransient(p.Reason) {
			return p.Reason
		}
	}
	return problems[0].Reason
}

// isTransient says whether a reason is no fault: nodes have not joined yet, or have not finished.
func isTransient(reason string) bool {
	return reason == v1beta1.ReasonPending || reason == v1beta1.ReasonNoNodes
}

func joinProblems(problems []problem) string {
	messages := make([]string, len(problems))
	for i, p := range problems {
		messages[i] = p.Message
	}
	return enumerate(messages, "; ")
}
