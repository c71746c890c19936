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

// blockers are what a LAN that is being deleted waits for, and the lost nodes that it does not wait for, as phrases.
type blockers struct {
	Pods   []string // attached pods
	Nodes  []string // nodes that have not reported yet that they have removed the LAN
	Silent []string // such nodes that do not answer
	Lost   []string // lost nodes that had the LAN and did not report that they have removed it
}

// blockersOf returns what a LAN that is being deleted waits for. It waits for each node to list the LAN as gone,
// because a node that reports nothing of the LAN may not have read it yet.
func blockersOf(lan *v1beta1.LAN, nodes []node) blockers {
	var b blockers
	for _, n := range nodes {
		if slices.ContainsFunc(n.Gone, func(g v1beta1.GoneLAN) bool { return g.UID == lan.UID }) {
			continue
		}
		i := slices.IndexFunc(n.Segments, func(s v1beta1.SegmentStatus) bool { return s.UID == lan.UID })
		switch {
		case n.Lost != "" && i >= 0:
			b.Lost = append(b.Lost, fmt.Sprintf("node %s (%s)", n.Name, n.Lost))
		case n.Lost != "":
		case !n.Answers:
			b.Silent = append(b.Silent, n.Name)
		case i >= 0 && n.Segments[i].State == v1beta1.SegmentLeaving && n.Segments[i].Reason != "":
			b.Nodes = append(b.Nodes, fmt.Sprintf("%s (%s)", n.Name, n.Segments[i].Message))
		case i < 0 || len(n.Segments[i].Attachments) == 0:
			b.Nodes = append(b.Nodes, n.Name)
		}
		if n.Lost != "" || i < 0 {
			continue
		}
		for _, a := range n.Segments[i].Attachments {
			b.Pods = append(b.Pods, fmt.Sprintf("%s on %s (spoke %s)", a.Pod, n.Name, a.Spoke))
		}
	}
	attachments, used := lastKnown(lan, nodes)
	for _, a := range attachments {
		b.addLost(a.Node)
	}
	for _, pool := range used {
		for _, n := range pool.Nodes {
			b.addLost(n.Node)
		}
	}
	return b
}

func (b *blockers) addLost(node string) {
	if lost := fmt.Sprintf("node %s (its LANNode is gone)", node); !slices.Contains(b.Lost, lost) {
		b.Lost = append(b.Lost, lost)
	}
}

// lastKnown returns the attachments and the use of pools that a LAN which is being deleted had on nodes whose LANNode
// is gone. Kubernetes' garbage collector deletes a LANNode with its Node, and then only the LAN's status has this.
func lastKnown(lan *v1beta1.LAN, nodes []node) (attachments []v1beta1.SpokeAttachment, pools []v1beta1.PoolStatus) {
	if !beingDeleted(lan) {
		return nil, nil
	}
	reports := func(name string) bool { return slices.ContainsFunc(nodes, func(n node) bool { return n.Name == name }) }
	for _, spoke := range lan.Status.Spokes {
		for _, a := range spoke.Attachments {
			if !reports(a.Node) {
				attachments = append(attachments, a)
			}
		}
	}
	for _, pool := range lan.Status.Pools {
		pool.Nodes = slices.DeleteFunc(slices.Clone(pool.Nodes),
			func(n v1beta1.PoolNode) bool { return reports(n.Node) })
		pools = append(pools, pool)
	}
	return attachments, pools
}

// empty says whether the LAN waits for nothing.
func (b blockers) empty() bool { return len(b.Pods)+len(b.Nodes)+len(b.Silent) == 0 }

// problem returns the state of the deletion as a reason and a sentence.
func (b blockers) problem(lan *v1beta1.LAN) problem {
	p := problem{Reason: v1beta1.ReasonDeleting}
	var parts []string
	if len(b.Pods) > 0 {
		p.Reason = v1beta1.ReasonInUse
		parts = append(parts, fmt.Sprintf("%s stays until its pods are gone: %s", lan.Name, enumerate(b.Pods, ", ")))
	}
	if len(b.Silent) > 0 {
		if len(b.Pods) == 0 {
			p.Reason = v1beta1.ReasonUnreachable
		}
		parts = append(parts, fmt.Sprintf(
			"%s waits for nodes that do not answer: %s; it does not wait for a node that has not answered for %s",
			lan.Name, enumerate(b.Silent, ", "), minutes(LostAfter)))
	}
	if len(b.Nodes) > 0 {
		parts = append(parts, fmt.Sprintf("%s stays until these nodes have removed it: %s",
			lan.Name, enumerate(b.Nodes, ", ")))
	}
	if len(b.Lost) > 0 {
		parts = append(parts, b.describeLost())
	}
	if len(parts) == 0 {
		parts = []string{lan.Name + " is removed now"}
	}
	p.Message = strings.Join(parts, "; ")
	return p
}

func (b blockers) describeLost() string {
	return fmt.Sprintf("it does not wait for lost nodes, which may still forward: %s", enumerate(b.Lost, ", "))
}

// deletionDone says whether a LAN that is being deleted waits for nothing but the removal of its finalizer.
func deletionDone(lan *v1beta1.LAN, nodes []node) bool {
	return beingDeleted(lan) && controllerutil.ContainsFinalizer(lan, v1beta1.Finalizer) &&
		blockersOf(lan, nodes).empty()
}

// addFinalizer adds the finalizer to a LAN that holds something or is about to. The object then stays until
// removeFinalizers removes it.
func (r *lanReconciler) addFinalizer(ctx context.Context, lan *v1beta1.LAN, want v1beta1.LANStatus) error {
	if want.Holds == nil || beingDeleted(lan) {
		return nil
	}
	return r.patchFinalizers(ctx, lan, controllerutil.AddFinalizer)
}

// patchFinalizers changes a LAN's finalizers and nothing else. It fails if the LAN has been written since it was read.
func (r *lanReconciler) patchFinalizers(
	ctx context.Context, lan *v1beta1.LAN, change func(client.Object, string) bool,
) error {
	before := lan.DeepCopy()
	if !change(lan, v1beta1.Finalizer) {
		return nil
	}
	patch := client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
	if err := r.cache.Patch(ctx, lan, patch); err != nil {
		before.DeepCopyInto(lan)
		return fmt.Errorf("write the finalizer of LAN %s: %w", lanName(lan), err)
	}
	return nil
}

// removeFinalizers removes the finalizer of each LAN that is being deleted and waits for nothing. The cache may lack a
// node that has just joined, so it first lists the nodes from the API server. A node that lists a LAN as gone never
// builds it again.
func (r *lanReconciler) removeFinalizers(ctx context.Context, lans []v1beta1.LAN, nodes []node) error {
	var free []*v1beta1.LAN
	for i := range lans {
		if deletionDone(&lans[i], nodes) {
			free = append(free, &lans[i])
		}
	}
	if len(free) == 0 {
		return nil
	}
	nodes, err := r.listNodes(ctx, r.live)
	if err != nil {
		return err
	}
	var errs []error
	for _, lan := range free {
		rest := blockersOf(lan, nodes)
		if !rest.empty() {
			continue
		}
		if len(rest.Lost) > 0 {
			r.recorder.Eventf(lan, nil, corev1.EventTypeWarning, v1beta1.ReasonNodeLost, v1beta1.ConditionReady, "%s",
				truncate(lan.Name+" is removed; "+rest.describeLost()))
		}
		err := r.patchFinalizers(ctx, lan, controllerutil.RemoveFinalizer)
		if err == nil {
			log.FromContext(ctx).Info("LAN is removed", "lan", lanName(lan), "uid", lan.UID)
		}
		errs = append(errs, ignoreOutdated(err))
	}
	return errors.Join(errs...)
}
