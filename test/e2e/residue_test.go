package e2e

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// kubelet gives a spoke that is gone up after five minutes (endpointStopGracePeriod in pkg/kubelet/cm/devicemanager), and would list
// it with the value 0 for ever. The test waits beside those that come after it, some of which take k8slan and all LANs away and put
// k8slan back; run alone, it is about the controller.
func TestSpokeThatIsGoneLeavesNoResourceOnTheNode(t *testing.T) {
	l := newLab(t)
	l.lan("residue", 1093, []string{"residue-1", "residue-2"})
	for _, spoke := range []string{"residue-1", "residue-2"} {
		l.awaitAllocatable(worker1, spoke, 1)
	}
	begin := time.Now()
	l.setSpokes("residue", "residue-1")
	l.awaitAllocatable(worker1, "residue-2", 0)

	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 7*time.Minute)
	defer cancel()
	which := []client.ListOption{client.MatchingFields{"metadata.name": worker1}}
	_, err := await(ctx, bed.client, &corev1.NodeList{}, which, func(all []*corev1.Node) bool {
		return len(all) == 1 && !lists(all[0], v1beta1.Resource("residue-2"))
	})
	if err != nil {
		t.Fatalf("waited for the spoke's resource to go from the node: %v", err)
	}
	l.logTime("until the resource of a spoke was gone from the node", begin)
}

// lists says whether a Node's status has a resource.
func lists(n *corev1.Node, name string) bool {
	_, capacity := n.Status.Capacity[corev1.ResourceName(name)]
	_, allocatable := n.Status.Allocatable[corev1.ResourceName(name)]
	return capacity || allocatable
}
