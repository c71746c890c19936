package main

import (
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

func TestAPortIsFoundByItsNameOrThatOfItsPool(t *testing.T) {
	lans := []v1beta1.LAN{{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "lab"},
		Spec: v1beta1.LANSpec{
			Spokes:     []string{"srl"},
			SpokePools: []v1beta1.SpokePool{{Name: "web", Size: 3}, {Name: "refused", Size: 3}},
		},
		Status: v1beta1.LANStatus{Holds: &v1beta1.Holding{NS: "default.lab", Spokes: []string{"srl", "web"}}},
	}}
	on := func(node string, attachments ...v1beta1.Attachment) v1beta1.LANNode {
		return v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: node}, Status: v1beta1.LANNodeStatus{
			Segments: []v1beta1.SegmentStatus{{LAN: "default/lab", NS: "default.lab", Attachments: attachments}},
		}}
	}
	port := func(port string) v1beta1.Attachment {
		return v1beta1.Attachment{Spoke: port, Pool: "web", Pod: "default/" + strings.ReplaceAll(port, "_", "-")}
	}
	one := []v1beta1.LANNode{on("worker1", port("web_0")), on("worker2")}
	two := []v1beta1.LANNode{on("worker1", port("web_0"), port("web_2")), on("worker2", port("web_0"))}
	for _, c := range []struct {
		name        string
		nodes       []v1beta1.LANNode
		spoke, node string
		want        string // node/spoke, or a part of the error
	}{
		{"the pool's only one", one, "web", "", "worker1/web_0"},
		{"the pool's only one on a node", two, "web", "worker2", "worker2/web_0"},
		{"a port", two, "web_2", "", "worker1/web_2"},
		{
			"one of several", two, "web", "worker1",
			"default/web-0 on worker1 (web_0), default/web-2 on worker1 (web_2); choose one",
		},
		{"a pool without pods there", one, "web", "worker2", "give its name, such as web_0, and --node"},
		{"a free port", one, "web_1", "worker2", "worker2/web_1"},
		{
			"a free port on any node", one, "web_1", "",
			"no pod is attached to spoke web_1 of LAN default/lab; give --node",
		},
		{"a port beyond the size", one, "web_3", "worker1", "3 ports on each node, web_0 to web_2"},
		{"a free spoke", one, "srl", "worker2", "worker2/srl"},
		{"a pool that is not held", one, "refused_0", "worker1", "no LAN has a spoke refused_0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := locate(c.nodes, lans, c.spoke, c.node)
			if have := p.node + "/" + p.spoke; err == nil && have != c.want ||
				err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("found %s, %v; want %s", have, err, c.want)
			}
		})
	}
}
