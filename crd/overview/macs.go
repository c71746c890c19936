package overview

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// NodeTable is the table by which a node forwards the frames of a LAN.
type NodeTable struct {
	Node    string
	Entries []MACEntry
}

// MACEntry is an entry of the table: a MAC on a port of the node, or behind a VTEP.
type MACEntry struct {
	MAC      string
	Spoke    string        // whose port it is on; empty behind a VTEP
	VTEP     string        // behind which it is; empty on a port
	LastSeen time.Duration // on a port, the time since its last frame
}

// MACs are the MACs of one LAN.
type MACs struct {
	LAN      v1beta1.LAN
	LANNodes []v1beta1.LANNode
	Tables   []NodeTable // of the nodes that were asked
	Only     []string    // MACs to show, as text; empty for all
}

// MACs renders where the MACs are. agree is false if nodes have a MAC in different places, or no node has one of
// m.Only.
func (s Screen) MACs(m MACs) (text string, agree bool) {
	var p page
	p.Screen = s
	all := m.locate()
	p.line(fmt.Sprintf("%s  %s, vni %d, %s; %s asked", p.paint(bold, lanName(&m.LAN)),
		cmp.Or(m.LAN.Status.Discovery, "unknown"), m.LAN.Spec.VNI,
		plural(len(all), "MAC"), plural(len(m.Tables), "node")))
	agree = true
	t := table{
		head:  []string{"MAC", "NODE", "SPOKE", "POD", "SINCE", "SEEN", "VTEP"},
		spare: []string{"VTEP", "SPOKE", "SINCE"},
	}
	for _, mac := range sortedKeys(all) {
		if len(m.Only) > 0 && !slices.Contains(m.Only, mac) {
			continue
		}
		for _, at := range all[mac].rows() {
			t.row(plain(mac, at.node, at.spoke, at.pod, at.since(p.Now), at.lastSeen, at.vtep))
		}
		if sentence := m.disagreement(all[mac]); sentence != "" {
			t.below[len(t.rows)-1], agree = sentence, false
		}
	}
	p.table(t)
	for _, mac := range m.Only {
		if all[mac] == nil {
			p.sentence("  ", mac+" is on no node that was asked: it has sent no frame for minutes, or is not on this "+
				"LAN")
			agree = false
		}
	}
	return p.text.String(), agree
}

// macLocations are the places where the nodes that were asked have a MAC.
type macLocations struct {
	local      []location          // on ports of nodes
	remote     map[string][]string // by VTEP, the nodes that have it behind that VTEP
	nodeOfVTEP map[string]string
}

// location is a port of a node that has a MAC, or its VTEP if no port is known.
type location struct {
	node, spoke, pod, vtep, lastSeen string
	attached                         metav1.Time // since when, if it is the MAC of the pod itself
}

func (l location) since(now time.Time) string {
	if l.attached.IsZero() {
		return ""
	}
	return age(now, l.attached)
}

// locate returns the locations of all MACs in the nodes' tables, and of the MACs of pods that have sent no frame.
func (m MACs) locate() map[string]*macLocations {
	all, nodeOfVTEP := map[string]*macLocations{}, map[string]string{}
	of := func(mac string) *macLocations {
		if all[mac] == nil {
			all[mac] = &macLocations{remote: map[string][]string{}, nodeOfVTEP: nodeOfVTEP}
		}
		return all[mac]
	}
	segments := map[string]v1beta1.SegmentStatus{}
	for _, n := range m.LANNodes {
		for _, s := range n.Status.Segments {
			if IsSegmentOf(&m.LAN, s) {
				segments[n.Name], nodeOfVTEP[s.VTEP] = s, n.Name
			}
		}
	}
	byNode := func(a, b NodeTable) int { return cmp.Compare(a.Node, b.Node) }
	for _, t := range slices.SortedFunc(slices.Values(m.Tables), byNode) {
		segment := segments[t.Node]
		for _, e := range t.Entries {
			if e.Spoke == "" {
				of(e.MAC).remote[e.VTEP] = append(of(e.MAC).remote[e.VTEP], t.Node)
				continue
			}
			of(e.MAC).local = append(of(e.MAC).local, onPort(t.Node, segment, e))
		}
		for _, a := range segment.Attachments {
			known := all[a.MAC] != nil && all[a.MAC].isOn(t.Node)
			if a.Kind != v1beta1.KindVeth || known { // a VM that has sent no frame may be migrating to this node
				continue
			}
			of(a.MAC).local = append(of(a.MAC).local,
				location{node: t.Node, spoke: a.Spoke, pod: a.Pod, vtep: segment.VTEP, attached: a.Since})
		}
	}
	return all
}

// onPort returns the location of a MAC on a port of a node.
func onPort(node string, segment v1beta1.SegmentStatus, e MACEntry) location {
	l := location{
		node: node, spoke: e.Spoke, vtep: segment.VTEP, lastSeen: duration.HumanDuration(e.LastSeen) + " ago",
	}
	for _, a := range segment.Attachments {
		if a.Spoke == e.Spoke {
			l.pod = a.Pod
			if a.MAC == e.MAC {
				l.attached = a.Since
			}
		}
	}
	return l
}

func (m *macLocations) isOn(node string) bool {
	return slices.ContainsFunc(m.local, func(l location) bool { return l.node == node })
}

// rows returns the ports that have the MAC or, if there are none, the VTEPs behind which nodes have it.
func (m *macLocations) rows() []location {
	if len(m.local) > 0 {
		return m.local
	}
	var locations []location
	for _, vtep := range sortedKeys(m.remote) {
		locations = append(locations, location{node: m.nodeOfVTEP[vtep], vtep: vtep})
	}
	return locations
}

// disagreement says which nodes do not have a MAC where it is. It returns "" if all have it there.
func (m MACs) disagreement(mac *macLocations) string {
	var words []string
	var vteps []string // of the nodes that have it on a port
	for _, l := range mac.local {
		vteps = append(vteps, l.vtep)
	}
	if len(mac.local) > 1 {
		words = append(words, fmt.Sprintf("is on %d nodes at once, and each keeps its own", len(mac.local)))
	}
	if len(mac.local) == 0 && len(mac.remote) > 1 {
		words = append(words, "the nodes do not agree where it is")
	}
	known := map[string]bool{}
	for _, vtep := range sortedKeys(mac.remote) {
		for _, node := range mac.remote[vtep] {
			known[node] = true
		}
		if len(mac.local) > 0 && !slices.Contains(vteps, vtep) || len(mac.local) == 0 && len(mac.remote) > 1 {
			to := vtep
			if node := mac.nodeOfVTEP[vtep]; node != "" {
				to = node + " (" + vtep + ")"
			}
			words = append(words, fmt.Sprintf("frames for it from %s go to %s", joinNodes(mac.remote[vtep]), to))
		}
	}
	if m.LAN.Status.Discovery == string(v1beta1.EVPN) {
		var without []string
		for _, t := range m.Tables {
			if !known[t.Node] && !mac.isOn(t.Node) {
				without = append(without, t.Node)
			}
		}
		if len(without) > 0 {
			words = append(words, "unknown on "+joinNodes(without)+": frames for it are flooded from there")
		}
	}
	return strings.Join(words, "; ")
}

// joinNodes joins the names of nodes, but not of many.
func joinNodes(nodes []string) string {
	slices.Sort(nodes)
	if more := len(nodes) - maxNodes; more > 1 {
		return strings.Join(nodes[:maxNodes], ", ") + fmt.Sprintf(" and %d more", more)
	}
	return strings.Join(nodes, ", ")
}

// maxNodes is the largest number of node names in a sentence.
const maxNodes = 5

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
