package main

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/overview"
	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

func TestANodesAnswerIsRead(t *testing.T) {
	answer, err := json.Marshal([]segment.MACEntry{
		{MAC: "02:00:00:00:00:01", Spoke: "srl", LastSeen: 3 * time.Second},
		{MAC: "02:00:00:00:00:02", VTEP: netip.MustParseAddr("2001:db8::2")},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []overview.MACEntry{
		{MAC: "02:00:00:00:00:01", Spoke: "srl", LastSeen: 3 * time.Second},
		{MAC: "02:00:00:00:00:02", VTEP: "2001:db8::2"},
	}
	if have, err := readMACTable("worker1", answer); err != nil || !slices.Equal(have, want) {
		t.Errorf("read %+v, %v; want %+v", have, err, want)
	}
	if _, err := readMACTable("worker1", []byte("unknown command")); err == nil ||
		!strings.Contains(err.Error(), "worker1") {
		t.Errorf("the error for an invalid answer is %v", err)
	}
}

// Exactly the nodes with a pod on the LAN are queried. The error names each node that does not answer.
func TestOnlyNodesWithPodsAreQueried(t *testing.T) {
	on := func(node string, attachments ...v1beta1.Attachment) v1beta1.LANNode {
		return v1beta1.LANNode{
			ObjectMeta: metav1.ObjectMeta{Name: node},
			Status: v1beta1.LANNodeStatus{Segments: []v1beta1.SegmentStatus{
				{UID: "lab", NS: "default.lab", Attachments: attachments},
				{UID: "other", NS: "default.other", Attachments: []v1beta1.Attachment{{}}},
			}},
		}
	}
	nodes := []v1beta1.LANNode{on("worker1", v1beta1.Attachment{}), on("worker2"), on("worker3", v1beta1.Attachment{})}
	lan := &v1beta1.LAN{ObjectMeta: metav1.ObjectMeta{Namespace: "default", UID: "lab"}}
	tables, err := daemons{system: "k8slan-system"}.tables(t.Context(), nodes, lan) // no node has a daemon
	if len(tables) > 0 || err == nil {
		t.Fatalf("tables %v, %v", tables, err)
	}
	for node, asked := range map[string]bool{"worker1": true, "worker2": false, "worker3": true} {
		if strings.Contains(err.Error(), "node "+node) != asked {
			t.Errorf("node %s is queried: want %t; the error is %v", node, asked, err)
		}
	}
}
