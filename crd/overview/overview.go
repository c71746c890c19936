// Package overview renders LANs, their attachments, their nodes and their problems as text for a terminal.
package overview

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// Objects are the objects from which the text is rendered.
type Objects struct {
	LANs       []v1beta1.LAN
	LANNodes   []v1beta1.LANNode
	Nodes      []corev1.Node
	Unreadable []string // sentences about what could not be read, and why
}

// Screen says how to render the text.
type Screen struct {
	Width  int  // in characters; 0 means no limit
	Colour bool // with the escape sequences of a terminal
	Brief  bool // only the headline of a LAN that is Ready
	Now    time.Time
}

// AllReady says whether every LAN is Ready with its present spec.
func AllReady(lans []v1beta1.LAN) bool {
	return !slices.ContainsFunc(lans, func(l v1beta1.LAN) bool { return !ready(&l) })
}

func ready(l *v1beta1.LAN) bool {
	return l.Status.State == v1beta1.StateReady && l.Status.ObservedGeneration == l.Generation &&
		l.DeletionTimestamp.IsZero()
}

// Status renders the status of the LANs.
func (s Screen) Status(o Objects) string {
	var p page
	p.Screen = s
	for _, why := range o.Unreadable {
		p.sentence("", why)
	}
	for i := range o.LANs {
		lan := &o.LANs[i]
		brief := s.Brief && ready(lan)
		if i > 0 && !(brief && ready(&o.LANs[i-1])) {
			p.line("")
		}
		p.headline(lan)
		if brief {
			continue
		}
		nodes := o.nodeStates(lan)
		p.faults(lan, nodes)
		p.spokes(lan, o.attachments(lan))
		p.nodes(nodes)
	}
	if slices.ContainsFunc(o.LANs, func(l v1beta1.LAN) bool { return l.Status.Discovery == string(v1beta1.EVPN) }) {
		p.sessions(o)
	}
	return p.text.String()
}

// sessions writes a line about the BGP sessions of all nodes that answer, and a table of those that are down.
func (p *page) sessions(o Objects) {
	t := table{head: []string{"NODE", "PEER", "AS", "DOWN SINCE"}, spare: []string{"AS"}}
	byName, all := o.nodesByName(), 0
	for _, ln := range o.LANNodes {
		if n := byName[ln.Name]; n != nil && !answers(n) {
			continue
		}
		for _, s := range ln.Status.Sessions {
			if all++; s.State == v1beta1.SessionUp {
				continue
			}
			t.row(plain(ln.Name, s.Peer, strconv.FormatInt(s.AS, 10), age(p.Now, s.Since)))
			if s.Message != "" {
				t.below[len(t.rows)-1] = s.Message
			}
		}
	}
	if all == 0 {
		return
	}
	p.line("")
	name, state := p.paint(bold, "BGP"), p.paint(green, "Up")
	if len(t.rows) > 0 {
		state = p.paint(yellow, "Degraded")
	}
	p.line(fmt.Sprintf("%s  %s  %d of %d sessions are up", name, state, all-len(t.rows), all))
	p.table(t)
}

func (o Objects) nodesByName() map[string]*corev1.Node {
	byName := map[string]*corev1.Node{}
	for i := range o.Nodes {
		byName[o.Nodes[i].Name] = &o.Nodes[i]
	}
	return byName
}

// OnDemand returns LANs for the segments that have no LAN object, sorted by name. It returns those with a pod in the
// namespace or, if that is empty, all.
func (o Objects) OnDemand(namespace string) (lans []v1beta1.LAN) {
	vnis := map[string]int32{} // by name
	for _, n := range o.LANNodes {
		for _, s := range n.Status.Segments {
			inNamespace := func(a v1beta1.Attachment) bool { return strings.HasPrefix(a.Pod, namespace+"/") }
			if s.OnDemand() && (namespace == "" || slices.ContainsFunc(s.Attachments, inNamespace)) {
				vnis[s.LAN] = s.VNI
			}
		}
	}
	for _, name := range sortedKeys(vnis) {
		lan := v1beta1.LAN{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1beta1.LANSpec{VNI: vnis[name]}}
		nodes, ready := o.nodeStates(&lan), 0
		for _, n := range nodes {
			lan.Status.Attached += int32(len(n.segment.Attachments))
			if n.state == string(v1beta1.SegmentReady) {
				ready++
			}
		}
		lan.Status.Discovery, lan.Status.Nodes = string(v1beta1.EVPN), fmt.Sprintf("%d/%d", ready, len(nodes))
		lan.Status.State = v1beta1.StateReady
		if ready < len(nodes) {
			lan.Status.State = v1beta1.StateDegraded
		}
		lans = append(lans, lan)
	}
	return lans
}

// isOnDemand says whether the LAN is one of those that OnDemand returns.
func isOnDemand(lan *v1beta1.LAN) bool { return lan.Namespace == "" }

// IsSegmentOf says whether a node's segment belongs to the LAN.
func IsSegmentOf(lan *v1beta1.LAN, s v1beta1.SegmentStatus) bool {
	if isOnDemand(lan) {
		return s.OnDemand() && s.LAN == lan.Name
	}
	return s.UID == lan.UID
}

// lanName returns the LAN's namespace/name, or megalos:<vni> without a LAN object.
func lanName(lan *v1beta1.LAN) string {
	if isOnDemand(lan) {
		return lan.Name
	}
	return lan.Namespace + "/" + lan.Name
}

// headline writes a LAN's name, state and numbers.
func (p *page) headline(lan *v1beta1.LAN) {
	st := lan.Status
	state := cmp.Or(string(st.State), "Unknown")
	if !lan.DeletionTimestamp.IsZero() {
		state = string(v1beta1.StateDeleting)
	}
	words := []string{fmt.Sprintf("vni %d", lan.Spec.VNI)}
	if st.Discovery != "" {
		words = append(words, st.Discovery)
	}
	if st.Nodes != "" {
		words = append(words, st.Nodes+" nodes")
	}
	if isOnDemand(lan) {
		words = append(words, fmt.Sprintf("no LAN object, %d attached", st.Attached))
	} else {
		words = append(words,
			fmt.Sprintf("%d spokes, %d attached", st.SpokeCount, st.Attached), age(p.Now, lan.CreationTimestamp))
	}
	name, colour := lanName(lan), colourOf(state)
	if st.Reason != "" && st.Reason != state && !strings.Contains(st.Reason, " ") { // a phrase is in a condition, too
		state += " " + st.Reason
	}
	head, about := p.paint(bold, name)+"  "+p.paint(colour, state), strings.Join(words, ", ")
	if p.Width > 0 && len(name)+len(state)+len(about)+4 > p.Width {
		p.line(head)
		p.sentence("  ", about)
		return
	}
	p.line(head + "  " + about)
}

// faults writes the LAN's own problems. Those of its nodes are in the table of nodes.
func (p *page) faults(lan *v1beta1.LAN, nodes []nodeState) {
	for _, sentence := range faultsOf(lan, nodes) {
		p.sentence("  ", sentence)
	}
}

func faultsOf(lan *v1beta1.LAN, nodes []nodeState) (sentences []string) {
	if len(lan.Status.Conditions) == 0 && !isOnDemand(lan) {
		return []string{"the controller has not observed it yet: kubectl get pods -n k8slan-system"}
	}
	accepted := meta.FindStatusCondition(lan.Status.Conditions, v1beta1.ConditionAccepted)
	refused := accepted != nil && accepted.Status == metav1.ConditionFalse
	if refused {
		sentences = append(sentences, accepted.Message)
	}
	for _, kind := range []string{v1beta1.ConditionAttachedTwice, v1beta1.ConditionPoolExceeded} {
		if c := meta.FindStatusCondition(lan.Status.Conditions, kind); c != nil && c.Status == metav1.ConditionTrue {
			sentences = append(sentences, c.Message)
		}
	}
	c := meta.FindStatusCondition(lan.Status.Conditions, v1beta1.ConditionReady)
	onNode := func(n nodeState) bool { return n.reason == lan.Status.Reason && n.sentence != "" }
	if c != nil && c.Status == metav1.ConditionFalse && !refused && !slices.ContainsFunc(nodes, onNode) {
		sentences = append(sentences, c.Message)
	}
	if mtus := mtuMismatch(nodes); mtus != "" {
		sentences = append(sentences, mtus)
	}
	return sentences
}

// mtuMismatch says that a LAN has different MTUs on its nodes. It returns "" if they are the same.
func mtuMismatch(nodes []nodeState) string {
	var words []string
	var smallest, largest int32
	for _, n := range nodes {
		if n.segment.MTU == 0 {
			continue
		}
		words = append(words, fmt.Sprintf("%d on %s", n.segment.MTU, n.name))
		if smallest == 0 || n.segment.MTU < smallest {
			smallest = n.segment.MTU
		}
		largest = max(largest, n.segment.MTU)
	}
	if smallest == largest {
		return ""
	}
	return fmt.Sprintf("its MTU is %s, because their underlays differ: packets longer than %d bytes do not reach "+
		"every node; give all underlays the same MTU, or set spec.mtu to %[2]d", strings.Join(words, ", "), smallest)
}

// attachments returns the LAN's attachments by spoke, from the LANNodes or, if they could not be read, from the LAN's
// status.
func (o Objects) attachments(lan *v1beta1.LAN) map[string][]v1beta1.SpokeAttachment {
	bySpoke := map[string][]v1beta1.SpokeAttachment{}
	if len(o.LANNodes) == 0 {
		for _, s := range lan.Status.Spokes {
			bySpoke[s.Name] = s.Attachments
		}
		return bySpoke
	}
	for _, n := range o.LANNodes {
		for _, seg := range n.Status.Segments {
			if !IsSegmentOf(lan, seg) {
				continue
			}
			for _, a := range seg.Attachments {
				bySpoke[a.Spoke] = append(bySpoke[a.Spoke], v1beta1.SpokeAttachment{Node: n.Name, Attachment: a})
			}
		}
	}
	return bySpoke
}

// spokes writes a table of the spokes with attachments, a line of the free ones, and a line for each pool.
func (p *page) spokes(lan *v1beta1.LAN, attached map[string][]v1beta1.SpokeAttachment) {
	t := table{
		head:  []string{"SPOKE", "POD", "NODE", "INTERFACE", "MAC", "KIND", "SINCE"},
		spare: []string{"KIND", "INTERFACE", "MAC"},
	}
	for _, spoke := range sortedKeys(attached) {
		for _, a := range attached[spoke] {
			t.row(plain(spoke, a.Pod, a.Node, a.Interface, a.MAC, string(a.Kind), age(p.Now, a.Since)))
		}
	}
	p.table(t)
	var free []string
	if lan.Status.Holds != nil && lan.DeletionTimestamp.IsZero() {
		for _, spoke := range lan.Status.Holds.Spokes {
			if _, pool := lan.Spec.Pool(spoke); !pool && len(attached[spoke]) == 0 {
				free = append(free, spoke)
			}
		}
	}
	if more := len(free) - maxFree; more > 0 {
		free = append(free[:maxFree], fmt.Sprintf("and %d more", more))
	}
	if len(free) > 0 {
		p.sentence("  ", "free: "+strings.Join(free, ", "))
	}
	for _, pool := range lan.Status.Pools {
		p.sentence("  ", fmt.Sprintf("pool %s: %d attached, %d ports", pool.Name, pool.Attached, pool.Ports))
	}
}

// maxFree is the largest number of free spokes in the line.
const maxFree = 20

// nodeState is the state of a LAN on one node.
type nodeState struct {
	name             string
	segment          v1beta1.SegmentStatus
	state            string
	reason, sentence string // what is wrong
}

// nodeStates returns the LAN's states on the nodes that have it or should have it.
func (o Objects) nodeStates(lan *v1beta1.LAN) []nodeState {
	byName := o.nodesByName()
	var nodes []nodeState
	for _, ln := range o.LANNodes {
		n := nodeState{name: ln.Name, state: "Pending"}
		i := slices.IndexFunc(ln.Status.Segments, func(s v1beta1.SegmentStatus) bool { return IsSegmentOf(lan, s) })
		switch {
		case i >= 0:
			n.segment = ln.Status.Segments[i]
			n.state, n.reason, n.sentence = string(n.segment.State), n.segment.Reason, n.segment.Message
			if n.segment.State == v1beta1.SegmentReady && n.segment.Generation != lan.Generation {
				n.reason, n.sentence = v1beta1.ReasonPending, "is still applying the last change"
			}
		case spans(lan, byName[ln.Name]):
			n.reason, n.sentence = v1beta1.ReasonPending, "does not report the LAN yet"
		default:
			continue
		}
		if node := byName[ln.Name]; node != nil && !answers(node) {
			n.state, n.reason = "Silent", v1beta1.ReasonUnreachable
			n.sentence = "does not answer; it may still forward. This is its last report"
		}
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(x, y nodeState) int { return cmp.Compare(x.name, y.name) })
	return nodes
}

// spans says whether the LAN should be on a node.
func spans(lan *v1beta1.LAN, node *corev1.Node) bool {
	if node == nil || lan.Status.Holds == nil || !lan.DeletionTimestamp.IsZero() {
		return false
	}
	selector := labels.Set{}
	for k, v := range lan.Spec.NodeSelector {
		selector[k] = string(v)
	}
	return selector.AsSelector().Matches(labels.Set(node.Labels))
}

// answers says whether a node's kubelet still reports its status. A node that reports that it is not ready answers.
func answers(node *corev1.Node) bool {
	return !slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionUnknown
	})
}

// nodes writes a table of nodes, with a sentence below each node that has a problem.
func (p *page) nodes(nodes []nodeState) {
	t := table{
		head:  []string{"NODE", "STATE", "VTEP", "UNDERLAY", "MTU", "OFFERED", "ATTACHED"},
		spare: []string{"OFFERED", "ATTACHED", "MTU"},
	}
	for _, n := range nodes {
		s := n.segment
		mtu := ""
		if s.MTU != 0 {
			mtu = strconv.Itoa(int(s.MTU))
		}
		state := n.state
		if n.reason != "" && n.reason != n.state {
			state += " " + n.reason
		}
		cells := plain(n.name, state, s.VTEP, s.Underlay, mtu,
			strconv.Itoa(int(s.Offered)), strconv.Itoa(len(s.Attachments)))
		cells[1].colour = colourOf(n.state)
		t.row(cells)
		if n.sentence != "" {
			t.below[len(t.rows)-1] = n.sentence
		}
	}
	p.table(t)
}

func age(now time.Time, since metav1.Time) string {
	if since.IsZero() {
		return "-"
	}
	return duration.HumanDuration(now.Sub(since.Time))
}
