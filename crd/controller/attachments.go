package controller

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// portCount returns how many spokes each node should offer, the ports of pools included.
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

// attachedCount returns the number of attachments in a status.
func attachedCount(s v1beta1.LANStatus) (n int32) {
	for _, spoke := range s.Spokes {
		n += int32(len(spoke.Attachments))
	}
	for _, pool := range s.Pools {
		n += pool.Attached
	}
	return n
}

// attachmentsOf returns the LAN's attachments on all nodes. It leaves out nodes that no longer exist, unless the LAN is
// being deleted.
func attachmentsOf(lan *v1beta1.LAN, nodes []node) []v1beta1.SpokeAttachment {
	var attachments []v1beta1.SpokeAttachment
	for _, n := range nodes {
		if !n.Exists && !beingDeleted(lan) {
			continue
		}
		for _, seg := range n.Segments {
			if seg.UID != lan.UID {
				continue
			}
			for _, a := range seg.Attachments {
				attachments = append(attachments, v1beta1.SpokeAttachment{Node: n.Name, Attachment: a})
			}
		}
	}
	return attachments
}

// spokeStatuses returns the single spokes that have attachments, in the spec or not, and those that are refused. A LAN
// that is being deleted keeps the attachments that it had on nodes that are gone, because these may still forward.
func spokeStatuses(lan *v1beta1.LAN, d decision, nodes []node) []v1beta1.SpokeStatus {
	byName := map[string]*v1beta1.SpokeStatus{}
	entry := func(spoke string) *v1beta1.SpokeStatus {
		if byName[spoke] == nil {
			byName[spoke] = &v1beta1.SpokeStatus{Name: spoke}
		}
		return byName[spoke]
	}
	for spoke, why := range d.Refused {
		if _, pool := lan.Spec.Pool(spoke); !pool {
			entry(spoke).Refused = why
		}
	}
	last, _ := lastKnown(lan, nodes)
	for _, a := range slices.Concat(last, attachmentsOf(lan, nodes)) {
		if a.Pool == "" {
			e := entry(a.Spoke)
			e.Attachments = append(e.Attachments, a)
		}
	}
	var statuses []v1beta1.SpokeStatus
	for _, spoke := range slices.Sorted(maps.Keys(byName)) {
		slices.SortStableFunc(byName[spoke].Attachments, func(x, y v1beta1.SpokeAttachment) int {
			return cmp.Or(cmp.Compare(x.Node, y.Node), cmp.Compare(x.Pod, y.Pod), cmp.Compare(x.Interface, y.Interface))
		})
		statuses = append(statuses, *byName[spoke])
	}
	return statuses
}

// poolStatuses returns the LAN's pools, and those that were removed from its spec and still have attachments, sorted.
// It counts the attachments on each node and does not list them, because that would be too much for one object. A LAN
// that is being deleted keeps what it had on nodes that are gone, as in spokeStatuses.
func poolStatuses(lan *v1beta1.LAN, d decision, nodes []node, spanned int) []v1beta1.PoolStatus {
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
	for _, a := range attachmentsOf(lan, nodes) {
		if a.Pool != "" {
			use(a.Pool, a.Node, 1)
		}
	}
	var statuses []v1beta1.PoolStatus
	for _, name := range slices.Sorted(maps.Keys(used)) {
		s := v1beta1.PoolStatus{Name: name, Refused: d.Refused[name]}
		for _, n := range slices.Sorted(maps.Keys(used[name])) {
			s.Nodes = append(s.Nodes, v1beta1.PoolNode{Node: n, Attached: used[name][n]})
			s.Attached += used[name][n]
		}
		if d.Holds != nil && !beingDeleted(lan) && slices.Contains(d.Holds.Spokes, name) {
			pool, _ := lan.Spec.Pool(name)
			s.Ports = pool.Size * int32(spanned)
		}
		statuses = append(statuses, s)
	}
	return statuses
}

// poolExceeded says which pools have more attachments on a node than ports, and where. It returns "" if none has.
func poolExceeded(lan *v1beta1.LAN, pools []v1beta1.PoolStatus) string {
	var exceeded []string
	for _, s := range pools {
		pool, ok := lan.Spec.Pool(s.Name)
		var where []string
		for _, n := range s.Nodes {
			if ok && n.Attached > pool.Size {
				where = append(where, fmt.Sprintf("%d on %s", n.Attached, n.Node))
			}
		}
		if len(where) > 0 {
			exceeded = append(exceeded, fmt.Sprintf("pool %s has size %d, and more pods are attached: %s",
				s.Name, pool.Size, enumerate(where, ", ")))
		}
	}
	if len(exceeded) == 0 {
		return ""
	}
	return enumerate(exceeded, "; ") +
		"; they stay attached, and no more pods are placed there until enough of them are gone"
}

// attachedTwice says which spokes are attached on more than one node, and where. It returns "" if none is.
func attachedTwice(spokes []v1beta1.SpokeStatus, nodes []node) string {
	silent := map[string]bool{}
	for _, n := range nodes {
		silent[n.Name] = !n.Answers
	}
	var twice []string
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
			twice = append(twice, fmt.Sprintf("spoke %s is attached twice: %s", spoke.Name, strings.Join(where, ", ")))
		}
	}
	if len(twice) == 0 {
		return ""
	}
	return enumerate(twice, "; ") +
		"; this is right only during a live migration, because both have the same MAC unless another was requested"
}
