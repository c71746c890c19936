package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// lanReconciler decides what every LAN holds and writes every LAN's status. Only one may run at a time.
type lanReconciler struct {
	cache    client.Client
	live     client.Reader
	recorder events.EventRecorder
	now      func() metav1.Time
	metrics  *Metrics

	discovery v1beta1.Discovery // of LANs whose spec has none
}

// clusterState is what the statuses of LANs depend on, besides the LANs.
type clusterState struct {
	nodes []node
	nads  map[client.ObjectKey]*nadv1.NetworkAttachmentDefinition

	discovery v1beta1.Discovery // of LANs whose spec has none
}

// Reconcile writes the statuses of all LANs and removes the finalizers of those that can be deleted.
func (r *lanReconciler) Reconcile(ctx context.Context, _ everything) (ctrl.Result, error) {
	state, err := r.observe(ctx)
	if err != nil {
		return ctrl.Result{}, err
	}
	result := ctrl.Result{RequeueAfter: untilNextLost(state.nodes, r.now().Time)}
	var lans v1beta1.LANList
	if err := r.cache.List(ctx, &lans); err != nil {
		return ctrl.Result{}, fmt.Errorf("list LANs: %w", err)
	}
	want := decide(lans.Items, state, r.now())
	if holdingsDiffer(lans.Items, want) {
		// The cache may lag behind what was granted a moment ago. From an outdated list, two LANs could get the same
		// thing.
		if err := r.live.List(ctx, &lans); err != nil {
			return ctrl.Result{}, fmt.Errorf("list LANs: %w", err)
		}
		want = decide(lans.Items, state, r.now())
	}
	r.metrics.record(want)
	if err := r.writeAll(ctx, lans.Items, want); err != nil {
		return ctrl.Result{}, err
	}
	return result, r.removeFinalizers(ctx, lans.Items, state.nodes)
}

// untilNextLost returns the time until the next silent node counts as lost, because no event reports that. It returns 0
// if all nodes answer.
func untilNextLost(nodes []node, now time.Time) time.Duration {
	var first time.Duration
	for _, n := range nodes {
		if left := n.LostAt.Sub(now); !n.LostAt.IsZero() && (first == 0 || left < first) {
			first = max(left, time.Second)
		}
	}
	return first
}

func (r *lanReconciler) observe(ctx context.Context) (clusterState, error) {
	nodes, err := r.listNodes(ctx, r.cache)
	if err != nil {
		return clusterState{}, err
	}
	var nads nadv1.NetworkAttachmentDefinitionList
	if err := r.cache.List(ctx, &nads, client.UnsafeDisableDeepCopy); err != nil { // NADs are only read
		return clusterState{}, fmt.Errorf("list NADs: %w", err)
	}
	s := clusterState{
		nodes: nodes,
		nads:  make(map[client.ObjectKey]*nadv1.NetworkAttachmentDefinition, len(nads.Items)),

		discovery: r.discovery,
	}
	for i := range nads.Items {
		s.nads[client.ObjectKeyFromObject(&nads.Items[i])] = &nads.Items[i]
	}
	return s, nil
}

func (r *lanReconciler) listNodes(ctx context.Context, from client.Reader) ([]node, error) {
	var nodes corev1.NodeList
	var lanNodes v1beta1.LANNodeList
	for _, list := range []client.ObjectList{&nodes, &lanNodes} {
		if err := from.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil { // nodes are only read
			return nil, fmt.Errorf("list %T: %w", list, err)
		}
	}
	return nodesOf(nodes.Items, lanNodes.Items, r.now().Time), nil
}

// decide returns the desired status of each LAN.
func decide(lans []v1beta1.LAN, state clusterState, now metav1.Time) []v1beta1.LANStatus {
	decisions := admit(lans, nodeSegments(state.nodes))
	want := make([]v1beta1.LANStatus, len(lans))
	for i := range lans {
		if deletionDone(&lans[i], state.nodes) {
			want[i] = lans[i].Status // the object is about to be removed
			continue
		}
		d := decisions[lans[i].UID]
		d.Discovery = lans[i].DiscoveryOr(state.discovery)
		if d.Holds != nil {
			d.Holds.Discovery = d.Discovery
		}
		want[i] = status(&lans[i], d, state.nodes, state.foreignNADs(&lans[i], d.Holds), now)
	}
	return want
}

// foreignNADs returns the NADs, as namespace/name, that have the name of one of the LAN's NADs and belong to no LAN. A
// NAD of another LAN is left out, because that LAN deletes it once it no longer holds the spoke.
func (s clusterState) foreignNADs(lan *v1beta1.LAN, holds *v1beta1.Holding) []string {
	if holds == nil {
		return nil
	}
	var foreign []string
	for _, spoke := range holds.Spokes {
		for _, n := range []string{v1beta1.VethNAD(spoke), v1beta1.MacvtapNAD(spoke)} {
			key := client.ObjectKey{Namespace: lan.Namespace, Name: n}
			if nad := s.nads[key]; nad != nil && !mayRepair(lan, nad) && !belongsToLAN(nad) {
				foreign = append(foreign, key.String())
			}
		}
	}
	return foreign
}

func holdingsDiffer(lans []v1beta1.LAN, want []v1beta1.LANStatus) bool {
	for i := range lans {
		if !equality.Semantic.DeepEqual(lans[i].Status.Holds, want[i].Holds) {
			return true
		}
	}
	return false
}

// writeAll writes the statuses that changed. It first writes what LANs no longer hold, and only after that what other
// LANs get, so that no two statuses ever hold the same thing.
func (r *lanReconciler) writeAll(ctx context.Context, lans []v1beta1.LAN, want []v1beta1.LANStatus) error {
	held := heldVNIs(lans)
	for i := range lans {
		holds := heldThroughout(lans[i].Status.Holds, want[i].Holds, held)
		if equality.Semantic.DeepEqual(lans[i].Status.Holds, holds) {
			continue
		}
		reduced := *want[i].DeepCopy()
		reduced.Holds = holds
		if err := r.writeStatus(ctx, &lans[i], reduced); err != nil {
			return ignoreOutdated(err)
		}
	}
	var errs []error
	for i := range lans {
		errs = append(errs, ignoreOutdated(r.grant(ctx, &lans[i], want[i])))
	}
	return errors.Join(errs...)
}

// grant writes a status. Before that it writes the finalizer and the NADs, which must exist before a node reads what
// the LAN holds.
func (r *lanReconciler) grant(ctx context.Context, lan *v1beta1.LAN, want v1beta1.LANStatus) error {
	if err := r.addFinalizer(ctx, lan, want); err != nil {
		return err
	}
	if err := r.createNADs(ctx, lan, want); err != nil {
		return err
	}
	return r.writeStatus(ctx, lan, want)
}

// createNADs writes the NADs of spokes that a LAN is about to get. Nodes offer a spoke as soon as they read that the
// LAN holds it. A pod that starts before its NAD exists waits long, because kubelet retries after ten seconds or more.
func (r *lanReconciler) createNADs(ctx context.Context, lan *v1beta1.LAN, want v1beta1.LANStatus) error {
	if !gainsSpoke(lan.Status.Holds, want.Holds) || beingDeleted(lan) {
		return nil
	}
	granted := lan.DeepCopy()
	granted.Status.Holds, granted.Status.ObservedGeneration = want.Holds, want.ObservedGeneration
	nads := nadReconciler{client: r.cache}
	return nads.syncNADs(ctx, granted)
}

// gainsSpoke says whether after has a spoke that before has not.
func gainsSpoke(before, after *v1beta1.Holding) bool {
	return after != nil && slices.ContainsFunc(after.Spokes, func(spoke string) bool {
		return before == nil || !slices.Contains(before.Spokes, spoke)
	})
}

// writeStatus writes a status if it differs from the LAN's, and an event for each condition that changed.
func (r *lanReconciler) writeStatus(ctx context.Context, lan *v1beta1.LAN, want v1beta1.LANStatus) error {
	if equality.Semantic.DeepEqual(lan.Status, want) {
		return nil
	}
	before := lan.Status
	lan.Status = want
	if err := r.cache.Status().Update(ctx, lan); err != nil {
		lan.Status = before
		return fmt.Errorf("write the status of LAN %s: %w", lanName(lan), err)
	}
	if before.State != want.State || before.Reason != want.Reason {
		log.FromContext(ctx).Info("LAN changed state", "lan", lanName(lan), "state", want.State, "reason", want.Reason,
			"nodes", want.Nodes)
	}
	for _, e := range conditionEvents(before.Conditions, want.Conditions) {
		r.recorder.Eventf(lan, nil, e.Type, e.Reason, e.Action, "%s", e.Note)
	}
	return nil
}

// ignoreOutdated drops the error of a write to a LAN that has changed or is gone. That change is an event, which starts
// the next run.
func ignoreOutdated(err error) error {
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// lanEvent is an event on a LAN.
type lanEvent struct{ Type, Reason, Action, Note string }

// conditionEvents returns the events for changes of a LAN's conditions. States that end by themselves within moments
// get no event.
func conditionEvents(before, after []metav1.Condition) []lanEvent {
	var changes []lanEvent
	for _, now := range after {
		was := meta.FindStatusCondition(before, now.Type)
		if was != nil && was.Status == now.Status && was.Reason == now.Reason && was.Message == now.Message {
			continue
		}
		e := lanEvent{Type: corev1.EventTypeWarning, Reason: now.Reason, Action: now.Type, Note: truncate(now.Message)}
		switch good := endEvents[now.Type] == (lanEvent{}) && now.Status == metav1.ConditionTrue; {
		case now.Type == v1beta1.ConditionAccepted && good && was == nil:
			continue // accepted at once is the normal case
		case now.Type == v1beta1.ConditionReady && hasNoEvent(now.Reason):
			continue
		case good && was != nil && was.Status == now.Status:
			continue // still good, with another message
		case now.Reason == v1beta1.ReasonInUse && was != nil && was.Reason == now.Reason:
			continue // one pod less
		case now.Reason == v1beta1.ReasonShrunk && was != nil:
			continue // one pod less
		case good:
			e.Type = corev1.EventTypeNormal
		}
		changes = append(changes, e)
	}
	for _, was := range before {
		if end, ok := endEvents[was.Type]; ok && was.Status == metav1.ConditionTrue &&
			!meta.IsStatusConditionTrue(after, was.Type) {
			changes = append(changes, end)
		}
	}
	return changes
}

// endEvents are the events for the end of conditions that exist only while something is wrong.
var endEvents = map[string]lanEvent{
	v1beta1.ConditionAttachedTwice: {
		corev1.EventTypeNormal, v1beta1.ReasonOneNode, v1beta1.ConditionAttachedTwice,
		"no spoke is attached twice any more",
	},
	v1beta1.ConditionPoolExceeded: {
		corev1.EventTypeNormal, v1beta1.ReasonFits, v1beta1.ConditionPoolExceeded,
		"no pool has more pods on a node than ports any more",
	},
}

// hasNoEvent says whether a reason of Ready gets no event, because it ends by itself or condition Accepted reports it.
func hasNoEvent(reason string) bool {
	switch reason {
	case v1beta1.ReasonPending, v1beta1.ReasonConflict, v1beta1.ReasonSpokeConflict, v1beta1.ReasonDeleting:
		return true
	}
	return false
}

// truncate cuts a note to the length that an event may have (1,024 bytes,
// k8s.io/kubernetes/pkg/apis/core/validation/events.go).
func truncate(note string) string {
	const limit = 1000
	if len(note) <= limit {
		return note
	}
	cut := limit
	for cut > 0 && note[cut]&0xC0 == 0x80 { // not within a UTF-8 sequence
		cut--
	}
	return note[:cut] + " …"
}
