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

// NodeTable is where a node has the MACs of a LAN.
type NodeTable struct {
	Node    string
	Entries []MACEntry
}

// MACEntry is where a node has a MAC: on a port of its own, or behind a VTEP.
type MACEntry struct {
	MAC      string
	Spoke    string        // by whose port it speaks; empty behind a VTEP
	VTEP     string        // behind which it is; empty on a port
	LastSeen time.Duration // on a port, how long ago it spoke last
}

// MACs are the MACs of one LAN.
type MACs struct {
	LAN      v1beta1.LAN
	LANNodes []v1beta1.LANNode
	Tables   []NodeTable // of nodes that were asked
	Only     []string    // MACs to show, as text; empty: all
}

// MACs is the text of where the MACs are. agree is false where nodes have one in different places, or one that was asked for nowhere.
func (s Screen) MACs(m MACs) (text string, agree bool) {
	var p page
	p.Screen = s
	all := m.locate()
	p.line(fmt.Sprintf("%s  %s, vni %d, %s; %s asked", p.paint(bold, lanName(&m.LAN)),
		cmp.Or(m.LAN.Status.Discovery, "unknown"), m.LAN.Spec.VNI, plural(len(all), "MAC"), plural(len(m.Tables), "node")))
	agree = true
	t := table{head: []string{"MAC", "NODE", "SPOKE", "POD", "SINCE", "HEARD", "VTEP"}, spare: []string{"VTEP", "SPOKE", "SINCE"}}
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
			p.sentence("  ", mac+" is on no node that was asked: it has not spoken for minutes, or is not on this LAN")
			agree = false
		}
	}
	return p.text.String(), agree
}

// macLocations is who has a MAC.
type macLocations struct {
	local      []location
	remote     map[string][]string // nodes that have it there, by VTEP
	nodeOfVTEP map[string]string   // nodes, by VTEP
}

// location is a MAC's place on the node that it is on.
type location struct {
	node, spoke, pod, vtep, lastSeen string
	attached                         metav1.Time // of the pod whose own MAC it is
}

func (s location) since(now time.Time) string {
	if s.attached.IsZero() {
		return ""
	}
	return age(now, s.attached)
}

// locate are all MACs that a node has, and those of pods that have not spoken.
func (m MACs) locate() map[string]*macLocations {
	all, owner := map[string]*macLocations{}, map[string]string{}
	of := func(mac string) *macLocations {
		if all[mac] == nil {
			all[mac] = &macLocations{remote: map[string][]string{}, nodeOfVTEP: owner}
		}
		return all[mac]
	}
	segments := map[string]v1beta1.SegmentStatus{}
	for _, n := range m.LANNodes {
		for _, s := range n.Status.Segments {
			if IsSegmentOf(&m.LAN, s) {
				segments[n.Name], owner[s.VTEP] = s, n.Name
			}
		}
	}
	for _, t := range slices.SortedFunc(slices.Values(m.Tables), func(a, b NodeTable) int { return cmp.Compare(a.Node, b.Node) }) {
		segment := segments[t.Node]
		for _, place := range t.Entries {
			s := of(place.MAC)
			if place.Spoke == "" {
				s.remote[place.VTEP] = append(s.remote[place.VTEP], t.Node)
				continue
			}
			at := location{node: t.Node, spoke: place.Spoke, vtep: segment.VTEP, lastSeen: duration.HumanDuration(place.LastSeen) + " ago"}
			for _, a := range segment.Attachments {
				if a.Spoke == place.Spoke {
					at.pod = a.Pod
					if a.MAC == place.MAC {
						at.attached = a.Since
					}
				}
			}
			s.local = append(s.local, at)
		}
		for _, a := range segment.Attachments {
			s := all[a.MAC]
			if a.Kind == v1beta1.KindVeth && (s == nil || !s.isOn(t.Node)) { // a VM that has not spoken may be on its way here
				s = of(a.MAC)
				s.local = append(s.local, location{node: t.Node, spoke: a.Spoke, pod: a.Pod, vtep: segment.VTEP, attached: a.Since})
			}
		}
	}
	return all
}

func (s *macLocations) isOn(node string) bool {
	return slices.ContainsFunc(s.local, func(at location) bool { return at.node == node })
}

// rows are where the MAC is; where no node that was asked has it, where the others have it.
func (s *macLocations) rows() []location {
	if len(s.local) > 0 {
		return s.local
	}
	var spots []location
	for _, vtep := range sortedKeys(s.remote) {
		spots = append(spots, location{node: s.nodeOfVTEP[vtep], vtep: vtep})
	}
	return spots
}

// disagreement says who has a MAC elsewhere than it is; empty where all is well.
func (m MACs) disagreement(s *macLocations) string {
	var words []string
	var at []string // VTEPs
	for _, here := range s.local {
		at = append(at, here.vtep)
	}
	if len(s.local) > 1 {
		words = append(words, fmt.Sprintf("is on %d nodes at once, and each keeps its own", len(s.local)))
	}
	if len(s.local) == 0 && len(s.remote) > 1 {
		words = append(words, "the nodes do not agree where it is")
	}
	known := map[string]bool{}
	for _, vtep := range sortedKeys(s.remote) {
		for _, node := range s.remote[vtep] {
			known[node] = true
		}
		if len(s.local) > 0 && !slices.Contains(at, vtep) || len(s.local) == 0 && len(s.remote) > 1 {
			to := vtep
			if owner := s.nodeOfVTEP[vtep]; owner != "" {
				to = owner + " (" + vtep + ")"
			}
			words = append(words, fmt.Sprintf("frames for it go to %s from %s", to, joinNodes(s.remote[vtep])))
		}
	}
	if m.LAN.Status.Discovery == string(v1beta1.EVPN) {
		var unaware []string
		for _, t := range m.Tables {
			if !known[t.Node] && !s.isOn(t.Node) {
				unaware = append(unaware, t.Node)
			}
		}
		if len(unaware) > 0 {
			words = append(words, "not told to "+joinNodes(unaware)+": frames for it are flooded from there")
		}
	}
	return strings.Join(words, "; ")
}

// joinNodes names nodes, but not many.
func joinNodes(nodes []string) string {
	slices.Sort(nodes)
	if more := len(nodes) - maxNodes; more > 1 {
		return strings.Join(nodes[:maxNodes], ", ") + fmt.Sprintf(" and %d more", more)
	}
	return strings.Join(nodes, ", ")
}

// maxNodes is how many nodes are named in a sentence.
const maxNodes = 5

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
