package api

import (
	"fmt"
	"slices"
	"testing"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// onPort returns the attachment of a pod to a port of a pool.
func onPort(pool string, number int) v1beta1.Attachment {
	a := pod(fmt.Sprintf("%s_%d", pool, number), fmt.Sprintf("%s-%d", pool, number))
	a.Pool = pool
	return a
}

func TestPoolHasNADsStatusAndUniqueName(t *testing.T) {
	startController(t)
	worker := node(t, "pool-1", nil)
	lan := createLAN(t, "pool", "{vni: 951, spokePools: [{name: web, size: 3}]}")
	awaitNADs(t, lan, "k8slan-veth-web", "k8slan-mac-web")
	nad := nadsOf(t, lan)["k8slan-mac-web"]
	config := `{"cniVersion":"1.0.0","name":"k8slan-mac-web","type":"k8slan","kind":"macvtap","lan":"default/pool",` +
		`"ns":"default.pool","pool":"web","capabilities":{"mac":true}}`
	if resource := nad.Annotations["k8s.v1.cni.cncf.io/resourceName"]; nad.Spec.Config != config ||
		resource != "macvtap.k8slan.io/k8slan-veth-web" {
		t.Errorf("%s: %s", resource, nad.Spec.Config)
	}
	clash := createLAN(t, "clash", "{vni: 952, spokes: [web, own]}")
	awaitCondition(t, clash, "Accepted",
		"False SpokeConflict: spoke web is held by default/pool; the other spokes are held")

	// use waits until the LAN's only pool has that status, and returns the number of attachments on its nodes.
	use := func(used, ports int32) (attached int32) {
		t.Helper()
		eventually(t, func() string {
			if p := read(t, lan).Status.Pools; len(p) != 1 || p[0].Name != "web" || p[0].Attached != used ||
				p[0].Ports != ports {
				return fmt.Sprintf("have %+v, want web %d of %d", p, used, ports)
			}
			return ""
		})
		for _, n := range lan.Status.Pools[0].Nodes {
			attached += n.Attached
		}
		return attached
	}
	offers := func(size int32, attachments ...v1beta1.Attachment) {
		t.Helper()
		s := offered(read(t, lan), attachments...)
		s.Offered = size
		report(t, worker, s)
	}
	offers(2)
	awaitCondition(t, lan, "Ready",
		"False Pending: node pool-1 offers 2 of 3 spokes so far; spokes are offered on 0 of 1 nodes")
	offers(3, onPort("web", 0), onPort("web", 1), onPort("web", 2))
	awaitSummary(t, lan, "Ready||web|1/1")
	if n := use(3, 3); n != 3 || lan.Status.Attached != 3 || lan.Status.SpokeCount != 3 || len(lan.Status.Spokes) != 0 {
		t.Errorf("status: %+v", lan.Status)
	}

	edit(t, lan, func(l *v1beta1.LAN) { l.Spec.SpokePools[0].Size = 2 })
	sentence := "pool web has size 2, and more pods are attached: 3 on pool-1; they stay attached, and no more pods " +
		"are placed there until enough of them are gone"
	awaitCondition(t, lan, "PoolExceeded", "True Shrunk: "+sentence)
	awaitEvent(t, lan, "Warning Shrunk: "+sentence)
	offers(2, onPort("web", 0), onPort("web", 2))
	use(2, 2)
	awaitCondition(t, lan, "PoolExceeded", "absent")
	awaitEvent(t, lan, "Normal Fits: no pool has more pods on a node than ports any more")

	// Its name is free when its last pod is gone.
	edit(t, lan, func(l *v1beta1.LAN) { l.Spec.Spokes, l.Spec.SpokePools = []string{"pool-srl"}, nil })
	use(2, 0)
	awaitCondition(t, clash, "Accepted",
		"False SpokeConflict: spoke web is still in use by default/web-0 on pool-1 (spoke web_0 of LAN default/pool), "+
			"default/web-2 on pool-1 (spoke web_2 of LAN default/pool); the other spokes are held")
	awaitNADs(t, lan, "k8slan-veth-pool-srl", "k8slan-mac-pool-srl")
	offers(1)
	eventually(t, func() string {
		if holds := read(t, clash).Status.Holds; holds == nil || !slices.Equal(holds.Spokes, []string{"own", "web"}) {
			return fmt.Sprintf("the other LAN holds %+v", holds)
		}
		return ""
	})
	eventually(t, func() string {
		if p := read(t, lan).Status.Pools; len(p) != 0 {
			return fmt.Sprintf("the status still has a removed pool: %+v", p)
		}
		return ""
	})
}
