package api

import (
	"encoding/json"
	"fmt"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// A LANNode is sent to many nodes on every change, and its managedFields with it.
func TestManagedFieldsOfLANNodeDoNotGrowWithLANs(t *testing.T) {
	// Without a field on creation, the API server would keep no managedFields (skipnonapplied.go in apimachinery's
	// managedfields).
	n := create(t, &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{
		Name:   "managed",
		Labels: map[string]string{"test": "managed"},
	}})
	size := func(lans int) int {
		t.Helper()
		n.Status.Segments = nil
		for i := range lans {
			name := fmt.Sprint("lan-", i)
			n.Status.Segments = append(n.Status.Segments, v1beta1.SegmentStatus{
				LAN: "default/" + name, UID: types.UID("uid-" + name), NS: "default." + name,
				State: v1beta1.SegmentReady, VNI: int32(1 + i), MTU: 1442,
			})
		}
		if err := api.Status().Update(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		if err := api.Get(t.Context(), client.ObjectKeyFromObject(n), n); err != nil {
			t.Fatal(err)
		}
		fields, err := json.Marshal(n.ManagedFields)
		if err != nil {
			t.Fatal(err)
		}
		if len(n.ManagedFields) == 0 {
			t.Fatal("the LANNode has no managedFields")
		}
		return len(fields)
	}
	one, many := size(1), size(50)
	t.Logf("%d bytes with one LAN, %d with 50", one, many)
	if many > one+50 {
		t.Errorf("managedFields have %d bytes with one LAN and %d with 50", one, many)
	}
}
