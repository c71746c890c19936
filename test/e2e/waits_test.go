package e2e

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// Kubelet drops the resource of a removed spoke after five minutes (endpointStopGracePeriod in
// pkg/kubelet/cm/devicemanager), and would list it with the value 0 for ever. So this test removes the spoke before the
// other tests start, and a subtest waits: it queues behind all of them. Some of them uninstall k8slan, delete all LANs,
// and install k8slan again.
func TestRemovedSpokeLeavesNoResourceOnTheNode(t *testing.T) {
	skipWithoutCluster(t)
	bed := <-free
	l := labOn(t, bed)
	l.lan("residue", 1093, []string{"residue-1", "residue-2"})
	for _, spoke := range []string{"residue-1", "residue-2"} {
		l.awaitAllocatable(worker1, spoke, 1)
	}
	begin := time.Now()
	l.setSpokes("residue", "residue-1")
	l.awaitAllocatable(worker1, "residue-2", 0)
	free <- bed

	t.Parallel()
	t.Run("five minutes later", func(t *testing.T) {
		t.Parallel()
		l.in(t).awaitNoResource(worker1, v1beta1.Resource("residue-2"))
		l.logTime("until the resource of a removed spoke left the node", begin)
	})
}

// awaitNoResource returns when a Node's status does not list a resource.
func (l lab) awaitNoResource(node, resource string) {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), 7*time.Minute)
	defer cancel()
	which := []client.ListOption{client.MatchingFields{"metadata.name": node}}
	for {
		_, err := await(ctx, l.bed.client, &corev1.NodeList{}, which, func(all []*corev1.Node) bool {
			return len(all) == 1 && !lists(all[0], resource)
		})
		if err == nil {
			return
		}
		select { // another test may have stopped the API server
		case <-time.After(time.Second):
		case <-ctx.Done():
			l.Fatalf("waited for the resource %s to leave %s: %v", resource, node, err)
		}
	}
}

// lists says whether a Node's status has a resource.
func lists(n *corev1.Node, name string) bool {
	_, capacity := n.Status.Capacity[corev1.ResourceName(name)]
	_, allocatable := n.Status.Allocatable[corev1.ResourceName(name)]
	return capacity || allocatable
}
