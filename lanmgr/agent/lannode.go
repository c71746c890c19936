package agent

import (
	"cmp"
	"maps"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

func reportsByNetns(reports []lanmgr.Report) map[string]lanmgr.Report {
	byNetns := make(map[string]lanmgr.Report, len(reports))
	for _, r := range reports {
		byNetns[r.Segment.Netns] = r
	}
	return byNetns
}

// Status returns the status of the node's LANNode: its segments, sorted by network namespace, the underlays of those,
// and the LANs that were removed.
func Status(
	plans []Plan, reports []lanmgr.Report, underlays kernel.Underlays, removed []v1beta1.GoneLAN, version string,
) v1beta1.LANNodeStatus {
	segments := make(map[string]v1beta1.SegmentStatus)
	byNetns := make(map[string]Plan, len(plans))
	for _, p := range plans {
		segments[p.Segment.Netns] = plannedStatus(p)
		byNetns[p.Segment.Netns] = p
	}
	for _, r := range reports {
		p, planned := byNetns[r.Segment.Netns]
		justFound := r.Leaving && r.Segment.OnDemand // the manager has not received the plan of it yet
		if !planned || r.Leaving && !justFound || r.Segment.LAN != p.Segment.LAN {
			segments[r.Segment.Netns] = leavingStatus(r)
		} else {
			segments[r.Segment.Netns] = reportedStatus(p, r)
		}
	}
	status := v1beta1.LANNodeStatus{Version: version, Gone: removed, LANs: int32(len(segments))}
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

// usedUnderlays returns the underlays of segments, sorted by name.
func usedUnderlays(underlays kernel.Underlays, segments []v1beta1.SegmentStatus) []v1beta1.NodeUnderlay {
	var list []v1beta1.NodeUnderlay
	for _, name := range slices.Sorted(maps.Keys(underlays.Devices)) {
		device := underlays.Devices[name]
		uses := func(s v1beta1.SegmentStatus) bool { return s.Underlay == name }
		if len(device.Sources) == 0 || !slices.ContainsFunc(segments, uses) {
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

// segmentStatus returns what every status of a segment has.
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

// plannedStatus is the status of a segment that the manager has not worked on yet.
func plannedStatus(p Plan) v1beta1.SegmentStatus {
	s := segmentStatus(p.Segment)
	s.State, s.Message = v1beta1.SegmentNotReady, "is being built"
	if p.VTEP.IsValid() && p.Segment.VXLAN.UnderlayIndex != 0 { // without a VXLAN the address receives nothing
		s.VTEP = p.VTEP.String()
	}
	if p.Problem.Blocking {
		s.Reason, s.Message = p.Problem.Reason, p.Problem.Message
	}
	return s
}

// reportedStatus is the status of a segment that is planned and that the manager has worked on.
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

// leavingStatus is the status of a segment that is not wanted any more, or whose name another LAN wants.
func leavingStatus(r lanmgr.Report) v1beta1.SegmentStatus {
	s := segmentStatus(r.Segment)
	s.State, s.Attachments = v1beta1.SegmentLeaving, attachments(r.Claims)
	s.Reason, s.Message = leavingMessage(r, s.Attachments)
	return s
}

// attachments returns the claims that name their pod, sorted by spoke. A claim that is just being made does not yet.
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
