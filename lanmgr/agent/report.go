package agent

import (
	"cmp"
	"context"
	"log/slog"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// report publishes the state of the plans: spokes to kubelet, the LANNode's status, events, and readiness.
func (a *Agent) report() {
	if !a.planned {
		return
	}
	a.mu.Lock()
	underlays := *a.underlays
	a.mu.Unlock()
	removed := a.removedLANs() // before the reports, so that no LAN is in both
	reports := a.Manager.Reports()
	a.setFirewall() // a segment that was leaving may be removed by now
	if a.EVPN != nil {
		a.EVPN.Set(evpnLANs(a.plans, reports))
	}
	if spokes := Advertised(a.plans, reports); a.advertised == nil || !slices.Equal(spokes, a.advertised) {
		a.advertised = spokes
		a.Advertise(spokes)
	}
	if a.Manager.Observed() { // attachments that are not observed yet would be missing
		status := Status(a.plans, reports, underlays, removed, a.Version)
		status.Sessions = a.sessions
		a.publisher.set(status)
		if a.OnPublish != nil {
			a.OnPublish(status)
		}
	}
	a.sendEvents(reports)

	byNetns := reportsByNetns(reports)
	a.ready.Store(!slices.ContainsFunc(a.plans, func(p Plan) bool {
		_, reported := byNetns[p.Segment.Netns]
		return !reported
	}))
}

// removedLANs returns the LANs that are being deleted and of which the node has nothing left. Their spokes are no
// longer advertised: that ended with the plan that has them no more.
func (a *Agent) removedLANs() []v1beta1.GoneLAN {
	var removed []v1beta1.GoneLAN
	for _, lan := range a.lans {
		key := segment.LAN{Namespace: lan.Namespace, Name: lan.Name, UID: string(lan.UID)}
		if !lan.DeletionTimestamp.IsZero() && a.Manager.Removed(key, lan.Effective().NS) {
			removed = append(removed, v1beta1.GoneLAN{LAN: key.String(), UID: lan.UID, Generation: lan.Generation})
		}
	}
	slices.SortFunc(removed, func(x, y v1beta1.GoneLAN) int { return cmp.Compare(x.UID, y.UID) })
	return removed
}

// sendEvents sends an event for each LAN object whose segment has a new problem, or has no problem any more.
func (a *Agent) sendEvents(reports []lanmgr.Report) {
	byNetns := reportsByNetns(reports)
	sent := make(map[types.UID]Problem, len(a.eventSent))
	for _, p := range a.plans[:a.objectCount] {
		uid := types.UID(p.Segment.LAN.UID)
		before := a.eventSent[uid]
		problem, recovered := p.Problem, false
		if r, ok := byNetns[p.Segment.Netns]; ok && !r.Leaving && r.Segment.LAN == p.Segment.LAN {
			problem = problemOf(p, r)
			recovered = healthy(p, r) && problem.Reason == ""
		}
		switch {
		case problem.Reason != "" && problem != before:
			a.sendEvent(uid, corev1.EventTypeWarning, problem.Reason, problem.Message)
		case before.Reason != "" && recovered:
			a.sendEvent(uid, corev1.EventTypeNormal, "Ready", "the segment is ready, its spokes are advertised")
		case before.Reason != "" && problem.Reason == "":
			problem = before // the segment is still being built
		}
		if problem.Reason != "" {
			sent[uid] = problem
		}
	}
	a.eventSent = sent
}

// maxNote is the API's limit for an event's note (NoteLengthLimit in pkg/apis/core/validation/events.go).
const maxNote = 1024

// sendEvent sends an event on a LAN, and logs it.
func (a *Agent) sendEvent(uid types.UID, kind, reason, message string) {
	lan := a.lans[uid]
	note := a.Node + ": " + message
	if len(note) > maxNote {
		note = note[:maxNote]
	}
	a.Events.Eventf(lan, nil, kind, reason, "BuildSegment", "%s", note)
	level := slog.LevelInfo
	if kind == corev1.EventTypeWarning {
		level = slog.LevelWarn
	}
	a.Log.Log(context.Background(), level, message, "lan", lan.Namespace+"/"+lan.Name, "reason", reason)
}
