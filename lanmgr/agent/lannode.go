package agent

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Spoke is one spoke, or one pool, as this node offers it.
type Spoke struct {
	Name    string
	Ports   int  // of a pool; 0 for a single spoke
	Healthy bool // a pod may have it now
}

// Advertised are the spokes to offer to kubelet, sorted. A spoke is offered from when its segment was first worked on, so
// that kubelet isn't told twice, and is healthy while the segment stands as planned.
func Advertised(plans []Plan, reports []lanmgr.Report) []Spoke {
	byNetns := reportsByNetns(reports)
	byName := make(map[string]Spoke)
	for _, p := range plans {
		r, ok := byNetns[p.Segment.Netns]
		if !ok || r.Leaving || r.Segment.LAN != p.Segment.LAN {
			continue
		}
		for _, spoke := range held(p.Segment.Spokes, r.Segment.Spokes) {
			offer := Spoke{Name: spoke, Healthy: healthy(p, r)}
			if pool, _, ok := segment.PoolOf(spoke); ok {
				offer.Name, offer.Ports = pool, byName[pool].Ports+1
			}
			byName[offer.Name] = offer
		}
	}
	return slices.SortedFunc(maps.Values(byName), func(a, b Spoke) int { return cmp.Compare(a.Name, b.Name) })
}

// healthy says whether the segment is built in all that its spokes need. A plan with other spokes than the report, or
// with another VXLAN than the one that stands, changes nothing for those that stay: what becomes of it is in the next
// report. But where the underlay was away, what was built has no VXLAN.
func healthy(p Plan, r lanmgr.Report) bool {
	return r.Built && !p.Problem.Blocking && (r.Segment.VXLAN.UnderlayIndex != 0 || p.Segment.VXLAN.UnderlayIndex == 0)
}

func reportsByNetns(reports []lanmgr.Report) map[string]lanmgr.Report {
	byNetns := make(map[string]lanmgr.Report, len(reports))
	for _, r := range reports {
		byNetns[r.Segment.Netns] = r
	}
	return byNetns
}

// Status is what the node has of each LAN, sorted by netns, with the underlays for that, and the LANs that are gone.
func Status(plans []Plan, reports []lanmgr.Report, underlays kernel.Underlays, gone []v1beta1.GoneLAN, version string) v1beta1.LANNodeStatus {
	segments := make(map[string]v1beta1.SegmentStatus)
	for _, p := range plans {
		segments[p.Segment.Netns] = plannedStatus(p)
	}
	byNetns := make(map[string]Plan, len(plans))
	for _, p := range plans {
		byNetns[p.Segment.Netns] = p
	}
	for _, r := range reports {
		p, wanted := byNetns[r.Segment.Netns]
		found := r.Leaving && r.Segment.OnDemand // the manager has not heard yet that it is wanted
		if !wanted || r.Leaving && !found || r.Segment.LAN != p.Segment.LAN {
			segments[r.Segment.Netns] = leavingStatus(r)
		} else {
			segments[r.Segment.Netns] = reportedStatus(p, r)
		}
	}
	status := v1beta1.LANNodeStatus{Version: version, Gone: gone, LANs: int32(len(segments))}
	for _, netns := range slices.Sorted(maps.Keys(segments)) {
		s := segments[netns]
		status.Segments = append(status.Segments, s)
		status.Attached += int32(len(s.Attachments))
		if s.State == v1beta1.SegmentReady {
			status.Ready++
		}
	}
	status.Underlays = usedUnderlays(underlays, status.Segments)
	return status
}

// usedUnderlays are the underlays of segments, sorted by name.
func usedUnderlays(underlays kernel.Underlays, segments []v1beta1.SegmentStatus) []v1beta1.NodeUnderlay {
	var list []v1beta1.NodeUnderlay
	for _, name := range slices.Sorted(maps.Keys(underlays.Devices)) {
		device := underlays.Devices[name]
		if len(device.Sources) == 0 || !slices.ContainsFunc(segments, func(s v1beta1.SegmentStatus) bool { return s.Underlay == name }) {
			continue
		}
		u := v1beta1.NodeUnderlay{Name: name}
		for _, a := range device.Sources {
			u.Addresses = append(u.Addresses, a.String())
		}
		list = append(list, u)
	}
	return list
}

func segmentStatus(s segment.Segment) v1beta1.SegmentStatus {
	lan := s.LAN.String()
	if s.LAN.Name == "" {
		lan = "unknown" // its record is lost
	}
	status := v1beta1.SegmentStatus{
		LAN:      lan,
		UID:      types.UID(s.LAN.UID),
		VNI:      int32(s.VXLAN.VNI),
		Port:     int32(s.VXLAN.Port),
		NS:       s.Netns,
		Underlay: s.VXLAN.Underlay,
		MTU:      int32(s.MTU),
	}
	if s.VXLAN.Local.IsValid() && s.VXLAN.UnderlayIndex != 0 {
		status.VTEP = s.VXLAN.Local.String()
	}
	return status
}

// plannedStatus is a segment that was not worked on yet.
func plannedStatus(p Plan) v1beta1.SegmentStatus {
	s := segmentStatus(p.Segment)
	s.State, s.Message = v1beta1.SegmentNotReady, "is being built"
	if p.VTEP.IsValid() && p.Segment.VXLAN.UnderlayIndex != 0 { // nobody hears there without a VXLAN
		s.VTEP = p.VTEP.String()
	}
	if p.Problem.Blocking {
		s.Reason, s.Message = p.Problem.Reason, p.Problem.Message
	}
	return s
}

// reportedStatus is a segment that is wanted and was worked on.
func reportedStatus(p Plan, r lanmgr.Report) v1beta1.SegmentStatus {
	s := plannedStatus(p)
	s.Attachments = attachments(r.Claims)
	if r.Built {
		s.Generation = r.Segment.Generation
	}
	problem := problemOf(p, r)
	switch {
	case problem.Blocking:
		s.Reason, s.Message = problem.Reason, problem.Message
		return s
	case !healthy(p, r):
		return s
	case problem.Reason != "":
		s.State, s.Reason, s.Message = v1beta1.SegmentDegraded, problem.Reason, problem.Message
	default:
		s.State, s.Message = v1beta1.SegmentReady, ""
	}
	s.Offered = int32(len(held(p.Segment.Spokes, r.Segment.Spokes)))
	return s
}

// problemOf is the plan's problem, if it blocks, before what the kernel refused. What failed beside a segment that
// stands is no problem of the segment.
func problemOf(p Plan, r lanmgr.Report) Problem {
	if p.Problem.Blocking || r.Err == nil || r.Built {
		return p.Problem
	}
	if taken := (*kernel.VNITaken)(nil); errors.As(r.Err, &taken) {
		return Problem{v1beta1.ReasonVNITaken, "vxlan " + p.Segment.VXLAN.Name + ": " + taken.Error() + "; pods wait until then", true}
	}
	return Problem{v1beta1.ReasonBuildFailed, r.Err.Error() + ". It is tried again; pods wait until it stands", true}
}

// leavingStatus is a segment that is not wanted any more, or whose name another LAN wants.
func leavingStatus(r lanmgr.Report) v1beta1.SegmentStatus {
	s := segmentStatus(r.Segment)
	s.State, s.Attachments = v1beta1.SegmentLeaving, attachments(r.Claims)
	switch {
	case r.Err != nil:
		s.Reason, s.Message = v1beta1.ReasonBuildFailed, r.Err.Error()+". It is tried again"
	case len(s.Attachments) > 0:
		pods := make([]string, len(s.Attachments))
		for i, a := range s.Attachments {
			pods[i] = a.Pod + " (spoke " + a.Spoke + ")"
		}
		s.Message = "stays until its pods are gone: " + strings.Join(pods, ", ")
	}
	return s
}

// attachments are the claims that say who they are, sorted by spoke; one that is just being made does not yet.
func attachments(claims []segment.Claim) []v1beta1.Attachment {
	var list []v1beta1.Attachment
	for _, c := range claims {
		if c.Kind == "" || c.Since.IsZero() {
			continue
		}
		pool, _, _ := segment.PoolOf(c.Spoke)
		list = append(list, v1beta1.Attachment{
			Spoke:     c.Spoke,
			Pool:      pool,
			Pod:       c.PodNamespace + "/" + c.Pod,
			Interface: c.Interface,
			MAC:       c.MAC.String(),
			Kind:      v1beta1.AttachmentKind(c.Kind),
			Since:     metav1.NewTime(c.Since),
		})
	}
	slices.SortFunc(list, func(a, b v1beta1.Attachment) int {
		return cmp.Or(cmp.Compare(a.Spoke, b.Spoke), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.Interface, b.Interface))
	})
	return list
}
