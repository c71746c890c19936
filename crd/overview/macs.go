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

// Table is where a node has the MACs of a LAN.
type Table struct {
	Node   string
	Places []MACEntry
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
	Tables   []Table  // of nodes that were asked
	Only     []string // MACs to show, as text; empty: all
}

// DrawMACs is the text of where the MACs are. agree is false where nodes have one in different places, or one that was asked for nowhere.
func (s Screen) DrawMACs(m MACs) (text string, agree bool) {
	var p page
	p.Screen = s
	all := m.stations()
	p.line(fmt.Sprintf("%s  %s, vni %d, %s; %s asked", p.paint(bold, named(&m.LAN)),
		cmp.Or(m.LAN.Status.Discovery, "unknown"), m.LAN.Spec.VNI, counted(len(all), "MAC"), counted(len(m.Tables), "node")))
	agree = true
	t := table{head: []string{"MAC", "NODE", "SPOKE", "POD", "SINCE", "HEARD", "VTEP"}, spare: []string{"VTEP", "SPOKE", "SINCE"}}
	for _, mac := range keys(all) {
		if len(m.Only) > 0 && !slices.Contains(m.Only, mac) {
			continue
		}
		for _, at := range all[mac].rows() {
			t.row(plain(mac, at.node, at.spoke, at.pod, at.since(p.Now), at.heard, at.vtep))
		}
		if sentence := m.doubt(all[mac]); sentence != "" {
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

// station is who has a MAC.
type station struct {
	here   []spot
	behind map[string][]string // nodes that have it there, by VTEP
	owner  map[string]string   // nodes, by VTEP
}

// spot is a MAC's place on the node that it is on.
type spot struct {
	node, spoke, pod, vtep, heard string
	attached                      metav1.Time // of the pod whose own MAC it is
}

func (s spot) since(now time.Time) string {
	if s.attached.IsZero() {
		return ""
	}
	return age(now, s.attached)
}

// stations are all MACs that a node has, and those of pods that have not spoken.
func (m MACs) stations() map[string]*station {
	all, owner := map[string]*station{}, map[string]string{}
	of := func(mac string) *station {
		if all[mac] == nil {
			all[mac] = &station{behind: map[string][]string{}, owner: owner}
		}
		return all[mac]
	}
	segments := map[string]v1beta1.SegmentStatus{}
	for _, n := range m.LANNodes {
		for _, s := range n.Status.Segments {
			if IsOf(&m.LAN, s) {
				segments[n.Name], owner[s.VTEP] = s, n.Name
			}
		}
	}
	for _, t := range slices.SortedFunc(slices.Values(m.Tables), func(a, b Table) int { return cmp.Compare(a.Node, b.Node) }) {
		segment := segments[t.Node]
		for _, place := range t.Places {
			s := of(place.MAC)
			if place.Spoke == "" {
				s.behind[place.VTEP] = append(s.behind[place.VTEP], t.Node)
				continue
			}
			at := spot{node: t.Node, spoke: place.Spoke, vtep: segment.VTEP, heard: duration.HumanDuration(place.LastSeen) + " ago"}
			for _, a := range segment.Attachments {
				if a.Spoke == place.Spoke {
					at.pod = a.Pod
					if a.MAC == place.MAC {
						at.attached = a.Since
					}
				}
			}
			s.here = append(s.here, at)
		}
		for _, a := range segment.Attachments {
			s := all[a.MAC]
			if a.Kind == v1beta1.KindVeth && (s == nil || !s.isOn(t.Node)) { // a VM that has not spoken may be on its way here
				s = of(a.MAC)
				s.here = append(s.here, spot{node: t.Node, spoke: a.Spoke, pod: a.Pod, vtep: segment.VTEP, attached: a.Since})
			}
		}
	}
	return all
}

func (s *station) isOn(node string) bool {
	return slices.ContainsFunc(s.here, func(at spot) bool { return at.node == node })
}

// rows are where the MAC is; where no node that was asked has it, where the others have it.
func (s *station) rows() []spot {
	if len(s.here) > 0 {
		return s.here
	}
	var spots []spot
	for _, vtep := range keys(s.behind) {
		spots = append(spots, spot{node: s.owner[vtep], vtep: vtep})
	}
	return spots
}

// doubt says who has a MAC elsewhere than it is; empty where all is well.
func (m MACs) doubt(s *station) string {
	var words []string
	var at []string // VTEPs
	for _, here := range s.here {
		at = append(at, here.vtep)
	}
	if len(s.here) > 1 {
		words = append(words, fmt.Sprintf("is on %d nodes at once, and each keeps its own", len(s.here)))
	}
	if len(s.here) == 0 && len(s.behind) > 1 {
		words = append(words, "the nodes do not agree where it is")
	}
	known := map[string]bool{}
	for _, vtep := range keys(s.behind) {
		for _, node := range s.behind[vtep] {
			known[node] = true
		}
		if len(s.here) > 0 && !slices.Contains(at, vtep) || len(s.here) == 0 && len(s.behind) > 1 {
			to := vtep
			if owner := s.owner[vtep]; owner != "" {
				to = owner + " (" + vtep + ")"
			}
			words = append(words, fmt.Sprintf("frames for it go to %s from %s", to, few(s.behind[vtep])))
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
			words = append(words, "not told to "+few(unaware)+": frames for it are flooded from there")
		}
	}
	return strings.Join(words, "; ")
}

// few names nodes, but not many.
func few(nodes []string) string {
	slices.Sort(nodes)
	if more := len(nodes) - maxNodes; more > 1 {
		return strings.Join(nodes[:maxNodes], ", ") + fmt.Sprintf(" and %d more", more)
	}
	return strings.Join(nodes, ", ")
}

// maxNodes is how many nodes are named in a sentence.
const maxNodes = 5

func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
