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

// lanReconciler decides what every LAN holds and writes every LAN's status. It must run one at a time.
type lanReconciler struct {
	cache    client.Client
	live     client.Reader
	recorder events.EventRecorder
	now      func() metav1.Time
	metrics  *Metrics

	discovery v1beta1.Discovery // of LANs that do not say
}

// clusterState is what the status of LANs depends on beside the LANs.
type clusterState struct {
	nodes []node
	nads  map[client.ObjectKey]*nadv1.NetworkAttachmentDefinition

	discovery v1beta1.Discovery // of LANs that do not say
}

// Reconcile brings the status of all LANs up to date.
func (c *lanReconciler) Reconcile(ctx context.Context, _ everything) (ctrl.Result, error) {
	around, err := c.observe(ctx)
	if err != nil {
		return ctrl.Result{}, err
	}
	result := ctrl.Result{RequeueAfter: untilNextLost(around.nodes, c.now().Time)}
	var lans v1beta1.LANList
	if err := c.cache.List(ctx, &lans); err != nil {
		return ctrl.Result{}, fmt.Errorf("list LANs: %w", err)
	}
	want := decide(lans.Items, around, c.now())
	if holdingsDiffer(lans.Items, want) {
		// The cache may lag behind what was granted a moment ago; on such a view the same claim could be granted twice.
		if err := c.live.List(ctx, &lans); err != nil {
			return ctrl.Result{}, fmt.Errorf("list LANs: %w", err)
		}
		want = decide(lans.Items, around, c.now())
	}
	c.metrics.record(want)
	if err := c.writeAll(ctx, lans.Items, want); err != nil {
		return ctrl.Result{}, err
	}
	return result, c.removeFinalizers(ctx, lans.Items, around.nodes)
}

// untilNextLost is how long it takes until the first of the silent nodes is lost, which is no event; 0 where all answer.
func untilNextLost(nodes []node, now time.Time) time.Duration {
	var first time.Duration
	for _, n := range nodes {
		if left := n.LostAt.Sub(now); !n.LostAt.IsZero() && (first == 0 || left < first) {
			first = max(left, time.Second)
		}
	}
	return first
}

func (c *lanReconciler) observe(ctx context.Context) (clusterState, error) {
	nodes, err := c.listNodes(ctx, c.cache)
	if err != nil {
		return clusterState{}, err
	}
	var nads nadv1.NetworkAttachmentDefinitionList
	if err := c.cache.List(ctx, &nads, client.UnsafeDisableDeepCopy); err != nil { // they are only read
		return clusterState{}, fmt.Errorf("list NADs: %w", err)
	}
	s := clusterState{
		nodes: nodes,
		nads:  make(map[client.ObjectKey]*nadv1.NetworkAttachmentDefinition, len(nads.Items)),

		discovery: c.discovery,
	}
	for i := range nads.Items {
		s.nads[client.ObjectKeyFromObject(&nads.Items[i])] = &nads.Items[i]
	}
	return s, nil
}

func (c *lanReconciler) listNodes(ctx context.Context, from client.Reader) ([]node, error) {
	var nodes corev1.NodeList
	var lanNodes v1beta1.LANNodeList
	for _, list := range []client.ObjectList{&nodes, &lanNodes} {
		if err := from.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil { // they are only read
			return nil, fmt.Errorf("list %T: %w", list, err)
		}
	}
	return nodesOf(nodes.Items, lanNodes.Items, c.now().Time), nil
}

// decide says what the status of each LAN should be.
func decide(lans []v1beta1.LAN, around clusterState, now metav1.Time) []v1beta1.LANStatus {
	verdicts := admit(lans, nodeSegments(around.nodes))
	want := make([]v1beta1.LANStatus, len(lans))
	for i := range lans {
		if deletionDone(&lans[i], around.nodes) {
			want[i] = lans[i].Status // nobody will read another
			continue
		}
		v := verdicts[lans[i].UID]
		v.Discovery = lans[i].DiscoveryOr(around.discovery)
		if v.Holds != nil {
			v.Holds.Discovery = v.Discovery
		}
		want[i] = status(&lans[i], v, around.nodes, around.foreignNADs(&lans[i], v.Holds), now)
	}
	return want
}

// foreignNADs are those that have the name of one of the LAN's but are not its own, as namespace/name. One that another LAN has not
// yet deleted, after it let the spoke go, is not among them.
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

// writeAll writes what changed: first all that LANs let go, and only when that is written what others take up.
func (c *lanReconciler) writeAll(ctx context.Context, lans []v1beta1.LAN, want []v1beta1.LANStatus) error {
	taken := heldVNIs(lans)
	for i := range lans {
		k := heldThroughout(lans[i].Status.Holds, want[i].Holds, taken)
		if equality.Semantic.DeepEqual(lans[i].Status.Holds, k) {
			continue
		}
		release := *want[i].DeepCopy()
		release.Holds = k
		if err := c.writeStatus(ctx, &lans[i], release); err != nil {
			return ignoreOutdated(err)
		}
	}
	var errs []error
	for i := range lans {
		errs = append(errs, ignoreOutdated(c.grant(ctx, &lans[i], want[i])))
	}
	return errors.Join(errs...)
}

// grant writes a status; what is to be there before a node reads that the LAN holds something is made first.
func (c *lanReconciler) grant(ctx context.Context, lan *v1beta1.LAN, want v1beta1.LANStatus) error {
	if err := c.addFinalizer(ctx, lan, want); err != nil {
		return err
	}
	if err := c.createNADs(ctx, lan, want); err != nil {
		return err
	}
	return c.writeStatus(ctx, lan, want)
}

// createNADs writes the NADs of spokes that a LAN is about to be granted. Nodes offer a spoke as soon as they read of it, and a pod
// that comes before its NAD waits long: kubelet tries again only after ten seconds and more.
func (c *lanReconciler) createNADs(ctx context.Context, lan *v1beta1.LAN, want v1beta1.LANStatus) error {
	if !gainsSpoke(lan.Status.Holds, want.Holds) || beingDeleted(lan) {
		return nil
	}
	granted := lan.DeepCopy()
	granted.Status.Holds, granted.Status.ObservedGeneration = want.Holds, want.ObservedGeneration
	nads := nadReconciler{client: c.cache}
	return nads.syncNADs(ctx, granted)
}

// gainsSpoke says whether a holding has a spoke that it had not before.
func gainsSpoke(before, after *v1beta1.Holding) bool {
	return after != nil && slices.ContainsFunc(after.Spokes, func(spoke string) bool {
		return before == nil || !slices.Contains(before.Spokes, spoke)
	})
}

// writeStatus writes a status that differs from the LAN's, and tells as events what changed in its conditions.
func (c *lanReconciler) writeStatus(ctx context.Context, lan *v1beta1.LAN, want v1beta1.LANStatus) error {
	if equality.Semantic.DeepEqual(lan.Status, want) {
		return nil
	}
	before := lan.Status
	lan.Status = want
	if err := c.cache.Status().Update(ctx, lan); err != nil {
		lan.Status = before
		return fmt.Errorf("write the status of LAN %s: %w", lanName(lan), err)
	}
	if before.State != want.State || before.Reason != want.Reason {
		log.FromContext(ctx).Info("LAN changed state", "lan", lanName(lan), "state", want.State, "reason", want.Reason, "nodes", want.Nodes)
	}
	for _, e := range conditionEvents(before.Conditions, want.Conditions) {
		c.recorder.Eventf(lan, nil, e.Type, e.Reason, e.Action, "%s", e.Note)
	}
	return nil
}

// ignoreOutdated drops the error of a write on an outdated view, or to a LAN that is gone: what outdated it is an event that leads here again.
func ignoreOutdated(err error) error {
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// lanEvent is an event on a LAN.
type lanEvent struct{ Type, Reason, Action, Note string }

// conditionEvents are the events for what changed in a LAN's conditions. What passes by itself within moments is none.
func conditionEvents(before, after []metav1.Condition) []lanEvent {
	var list []lanEvent
	for _, now := range after {
		was := meta.FindStatusCondition(before, now.Type)
		if was != nil && was.Status == now.Status && was.Reason == now.Reason && was.Message == now.Message {
			continue
		}
		e := lanEvent{Type: corev1.EventTypeWarning, Reason: now.Reason, Action: now.Type, Note: truncate(now.Message)}
		switch good := endEvents[now.Type] == (lanEvent{}) && now.Status == metav1.ConditionTrue; {
		case now.Type == v1beta1.ConditionAccepted && good && was == nil:
			continue // to be accepted at once is no news
		case now.Type == v1beta1.ConditionReady && passesUnreported(now.Reason):
			continue
		case good && was != nil && was.Status == now.Status:
			continue // still good, in other words
		case now.Reason == v1beta1.ReasonInUse && was != nil && was.Reason == now.Reason:
			continue // one pod less
		case now.Reason == v1beta1.ReasonShrunk && was != nil:
			continue // one pod less
		case good:
			e.Type = corev1.EventTypeNormal
		}
		list = append(list, e)
	}
	for _, was := range before {
		if end, ok := endEvents[was.Type]; ok && was.Status == metav1.ConditionTrue && !meta.IsStatusConditionTrue(after, was.Type) {
			list = append(list, end)
		}
	}
	return list
}

// endEvents are the conditions that are there only while something is wrong, and what is told when they go.
var endEvents = map[string]lanEvent{
	v1beta1.ConditionAttachedTwice: {corev1.EventTypeNormal, v1beta1.ReasonOneNode, v1beta1.ConditionAttachedTwice, "no spoke is attached twice any more"},
	v1beta1.ConditionPoolExceeded:  {corev1.EventTypeNormal, v1beta1.ReasonFits, v1beta1.ConditionPoolExceeded, "no pool has more pods on a node than ports any more"},
}

// passesUnreported is true for a reason of Ready that passes by itself, or that is told with condition Accepted.
func passesUnreported(reason string) bool {
	switch reason {
	case v1beta1.ReasonPending, v1beta1.ReasonConflict, v1beta1.ReasonSpokeConflict, v1beta1.ReasonDeleting:
		return true
	}
	return false
}

// truncate cuts a note to what an event takes (1,024 bytes, k8s.io/kubernetes/pkg/apis/core/validation/events.go).
func truncate(note string) string {
	const limit = 1000
	if len(note) <= limit {
		return note
	}
	cut := limit
	for cut > 0 && note[cut]&0xC0 == 0x80 { // never inside a UTF-8 sequence
		cut--
	}
	return note[:cut] + " …"
}
