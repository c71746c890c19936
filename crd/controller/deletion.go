package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// blockers are what a LAN that is being deleted waits for, in words, and the lost nodes that it does not wait for.
type blockers struct {
	Pods   []string // that are attached
	Nodes  []string // that have not said yet that nothing is left
	Silent []string // the same, but do not answer
	Lost   []string // that had something of the LAN and never said that it is gone
}

// blockersOf says what holds a LAN that is being deleted. A node lets it go by its word alone: one that reports nothing of the LAN may
// not have heard of it yet.
func blockersOf(lan *v1beta1.LAN, nodes []node) blockers {
	var h blockers
	for _, n := range nodes {
		if slices.ContainsFunc(n.Gone, func(g v1beta1.GoneLAN) bool { return g.UID == lan.UID }) {
			continue
		}
		i := slices.IndexFunc(n.Segments, func(s v1beta1.SegmentStatus) bool { return s.UID == lan.UID })
		switch {
		case n.Lost != "" && i >= 0:
			h.Lost = append(h.Lost, fmt.Sprintf("node %s (%s)", n.Name, n.Lost))
		case n.Lost != "":
		case !n.Answers:
			h.Silent = append(h.Silent, n.Name)
		case i >= 0 && n.Segments[i].State == v1beta1.SegmentLeaving && n.Segments[i].Reason != "":
			h.Nodes = append(h.Nodes, fmt.Sprintf("%s (%s)", n.Name, n.Segments[i].Message))
		case i < 0 || len(n.Segments[i].Attachments) == 0:
			h.Nodes = append(h.Nodes, n.Name)
		}
		if n.Lost != "" || i < 0 {
			continue
		}
		for _, a := range n.Segments[i].Attachments {
			h.Pods = append(h.Pods, fmt.Sprintf("%s on %s (spoke %s)", a.Pod, n.Name, a.Spoke))
		}
	}
	attachments, used := lastKnown(lan, nodes)
	for _, a := range attachments {
		h.addLost(a.Node)
	}
	for _, pool := range used {
		for _, n := range pool.Nodes {
			h.addLost(n.Node)
		}
	}
	return h
}

func (h *blockers) addLost(node string) {
	if lost := fmt.Sprintf("node %s (its LANNode is gone)", node); !slices.Contains(h.Lost, lost) {
		h.Lost = append(h.Lost, lost)
	}
}

// lastKnown are the attachments that a LAN which is being deleted last had on nodes whose LANNode has gone since, and the use of its
// pools there: Kubernetes' garbage collector deletes it with the Node, and what it said is known from the LAN alone then.
func lastKnown(lan *v1beta1.LAN, nodes []node) (attachments []v1beta1.SpokeAttachment, pools []v1beta1.PoolStatus) {
	if !beingDeleted(lan) {
		return nil, nil
	}
	heard := func(name string) bool { return slices.ContainsFunc(nodes, func(n node) bool { return n.Name == name }) }
	for _, spoke := range lan.Status.Spokes {
		for _, a := range spoke.Attachments {
			if !heard(a.Node) {
				attachments = append(attachments, a)
			}
		}
	}
	for _, pool := range lan.Status.Pools {
		pool.Nodes = slices.DeleteFunc(slices.Clone(pool.Nodes), func(n v1beta1.PoolNode) bool { return heard(n.Node) })
		pools = append(pools, pool)
	}
	return attachments, pools
}

// empty is true when the LAN can go.
func (h blockers) empty() bool { return len(h.Pods)+len(h.Nodes)+len(h.Silent) == 0 }

// problem is the state of the deletion: a reason and a sentence.
func (h blockers) problem(lan *v1beta1.LAN) problem {
	p := problem{Reason: v1beta1.ReasonDeleting}
	var parts []string
	if len(h.Pods) > 0 {
		p.Reason = v1beta1.ReasonInUse
		parts = append(parts, fmt.Sprintf("%s stays until its pods are gone: %s", lan.Name, enumerate(h.Pods, ", ")))
	}
	if len(h.Silent) > 0 {
		if len(h.Pods) == 0 {
			p.Reason = v1beta1.ReasonUnreachable
		}
		parts = append(parts, fmt.Sprintf("%s waits for nodes that do not answer: %s; a node that is silent for %s counts no more",
			lan.Name, enumerate(h.Silent, ", "), minutes(LostAfter)))
	}
	if len(h.Nodes) > 0 {
		parts = append(parts, fmt.Sprintf("%s goes when these nodes have let it go: %s", lan.Name, enumerate(h.Nodes, ", ")))
	}
	if len(h.Lost) > 0 {
		parts = append(parts, h.describeLost())
	}
	if len(parts) == 0 {
		parts = []string{lan.Name + " goes now"}
	}
	p.Message = strings.Join(parts, "; ")
	return p
}

func (h blockers) describeLost() string {
	return fmt.Sprintf("lost, does not count and may still forward: %s", enumerate(h.Lost, ", "))
}

// deletionDone is true for a LAN that only the controller's finalizer still holds.
func deletionDone(lan *v1beta1.LAN, nodes []node) bool {
	return beingDeleted(lan) && controllerutil.ContainsFinalizer(lan, v1beta1.Finalizer) && blockersOf(lan, nodes).empty()
}

// addFinalizer puts the finalizer on a LAN that holds something or is about to: from then on it goes only when release says so.
func (c *lanReconciler) addFinalizer(ctx context.Context, lan *v1beta1.LAN, want v1beta1.LANStatus) error {
	if want.Holds == nil || beingDeleted(lan) {
		return nil
	}
	return c.patchFinalizers(ctx, lan, controllerutil.AddFinalizer)
}

// patchFinalizers writes what change does to a LAN's finalizers and nothing else, if nobody has written the LAN since it was read.
func (c *lanReconciler) patchFinalizers(ctx context.Context, lan *v1beta1.LAN, change func(client.Object, string) bool) error {
	before := lan.DeepCopy()
	if !change(lan, v1beta1.Finalizer) {
		return nil
	}
	patch := client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
	if err := c.cache.Patch(ctx, lan, patch); err != nil {
		before.DeepCopyInto(lan)
		return fmt.Errorf("write the finalizer of LAN %s: %w", lanName(lan), err)
	}
	return nil
}

// removeFinalizers lets those LANs go that are being deleted and that nothing holds any more. The view of the nodes may lag behind one
// that has just come, so it is taken anew first; the word of a node, once given, stays true.
func (c *lanReconciler) removeFinalizers(ctx context.Context, lans []v1beta1.LAN, nodes []node) error {
	var free []*v1beta1.LAN
	for i := range lans {
		if deletionDone(&lans[i], nodes) {
			free = append(free, &lans[i])
		}
	}
	if len(free) == 0 {
		return nil
	}
	nodes, err := c.listNodes(ctx, c.live)
	if err != nil {
		return err
	}
	var errs []error
	for _, lan := range free {
		held := blockersOf(lan, nodes)
		if !held.empty() {
			continue
		}
		if len(held.Lost) > 0 {
			c.recorder.Eventf(lan, nil, corev1.EventTypeWarning, v1beta1.ReasonNodeLost, v1beta1.ConditionReady, "%s",
				truncate(lan.Name+" goes without the word of all nodes; "+held.describeLost()))
		}
		err := c.patchFinalizers(ctx, lan, controllerutil.RemoveFinalizer)
		if err == nil {
			log.FromContext(ctx).Info("LAN is gone", "lan", lanName(lan), "uid", lan.UID)
		}
		errs = append(errs, ignoreOutdated(err))
	}
	return errors.Join(errs...)
}
