package api

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// setResources replaces the resources in a Node's status, as kubelet does.
func setResources(t *testing.T, node string, capacity map[string]string) {
	t.Helper()
	eventually(t, func() string {
		n := read(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}})
		n.Status.Capacity = corev1.ResourceList{}
		for name, value := range capacity {
			n.Status.Capacity[corev1.ResourceName(name)] = resource.MustParse(value)
		}
		n.Status.Allocatable = n.Status.Capacity
		if err := api.Status().Update(t.Context(), n); err != nil {
			return err.Error()
		}
		return ""
	})
}

func awaitResources(t *testing.T, node string, want ...string) {
	t.Helper()
	slices.Sort(want)
	eventually(t, func() string {
		n := read(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}})
		for part, list := range map[string]corev1.ResourceList{
			"capacity":    n.Status.Capacity,
			"allocatable": n.Status.Allocatable,
		} {
			var have []string
			for name := range maps.Keys(list) {
				have = append(have, string(name))
			}
			if slices.Sort(have); !slices.Equal(have, want) {
				return fmt.Sprintf("%s of %s:\nhave %v\nwant %v", part, node, have, want)
			}
		}
		return ""
	})
}

func TestResourcesThatNoLANHoldsAreRemovedFromNodes(t *testing.T) {
	policies(t, "policy-node-status.yaml")
	startController(t)
	node(t, "residue-1", nil)
	lan := createLAN(t, "residue", "{vni: 960, spokes: [r1, r2]}")
	awaitSummary(t, lan, "Pending|Pending|r1,r2|0/1")
	r1, r2, r3, r4 := v1beta1.Resource("r1"), v1beta1.Resource("r2"), v1beta1.Resource("r3"), v1beta1.Resource("r4")
	const foreign = "macvtap.network.kubevirt.io/dataplane"
	all := map[string]string{"cpu": "4", foreign: "0", r1: "0", r2: "0", r3: "0", r4: "1"}
	setResources(t, "residue-1", all)
	awaitResources(t, "residue-1", "cpu", foreign, r1, r2, r4) // r1 and r2 are held, and kubelet has not forgotten r4

	setResources(t, "residue-1", all) // kubelet writes it back
	awaitResources(t, "residue-1", "cpu", foreign, r1, r2, r4)

	edit(t, lan, func(l *v1beta1.LAN) { l.Spec.Spokes = []string{"r1"} })
	awaitResources(t, "residue-1", "cpu", foreign, r1, r4)
	edit(t, lan, func(l *v1beta1.LAN) { l.Spec.NodeSelector = map[string]v1beta1.LabelValue{"lab": "yes"} })
	awaitResources(t, "residue-1", "cpu", foreign, r4)
}

func TestControllerRemovesNothingElseFromNodes(t *testing.T) {
	policies(t, "policy-node-status.yaml")
	node(t, "strict-1", map[string]string{"a": "b"})
	zero, one := v1beta1.Resource("zero"), v1beta1.Resource("one")
	setResources(t, "strict-1", map[string]string{"cpu": "4", "example.com/zero": "0", zero: "0", one: "1"})
	setSilent(t, "strict-1", time.Now())
	c := clientAs(t, controllerAccount, nil)
	patch := func(body string) error {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "strict-1"}}
		return c.Status().Patch(t.Context(), n, client.RawPatch(types.JSONPatchType, []byte(body)), client.DryRunAll)
	}
	path := func(name string) string { return strings.ReplaceAll(name, "/", "~1") }
	const sentence = "k8slan's controller may only remove resources of spokes that are 0 from a Node's capacity and " +
		"allocatable"
	eventually(t, func() string { // a policy has effect a moment after it was created
		if err := patch(`[{"op":"remove","path":"/status/capacity/cpu"}]`); err == nil ||
			!strings.Contains(err.Error(), sentence) {
			return "cpu is removed: " + errorText(err)
		}
		return ""
	})
	for what, body := range map[string]string{
		"removes another's resource":      `[{"op":"remove","path":"/status/capacity/example.com~1zero"}]`,
		"removes a spoke that is offered": `[{"op":"remove","path":"/status/allocatable/` + path(one) + `"}]`,
		"removes all":                     `[{"op":"remove","path":"/status/capacity"}]`,
		"adds a resource": `[{"op":"add","path":"/status/capacity/` + path(v1beta1.Resource("new")) +
			`","value":"0"}]`,
		"changes a spoke's number": `[{"op":"replace","path":"/status/capacity/` + path(zero) +
			`","value":"1"}]`,
		"changes cpu":            `[{"op":"replace","path":"/status/allocatable/cpu","value":"0"}]`,
		"changes a condition":    `[{"op":"replace","path":"/status/conditions/0/status","value":"True"}]`,
		"removes the conditions": `[{"op":"remove","path":"/status/conditions"}]`,
		"adds an address": `[{"op":"add","path":"/status/addresses","value":[{"type":"InternalIP",` +
			`"address":"192.0.2.1"}]}]`,
		"changes a label": `[{"op":"replace","path":"/metadata/labels/a","value":"c"}]`,
		"annotates":       `[{"op":"add","path":"/metadata/annotations","value":{"a":"b"}}]`,
		"removes cpu with a spoke": `[{"op":"remove","path":"/status/capacity/` + path(zero) +
			`"},{"op":"remove","path":"/status/capacity/cpu"}]`,
	} {
		if err := patch(body); err == nil || !strings.Contains(err.Error(), "k8slan's controller") {
			t.Errorf("the controller %s: %s", what, errorText(err))
		}
	}
	right := `[{"op":"remove","path":"/status/capacity/` + path(zero) +
		`"},{"op":"remove","path":"/status/allocatable/` + path(zero) + `"}]`
	if err := patch(right); err != nil {
		t.Errorf("the controller cannot remove a resource that is 0: %v", err)
	}
	n := read(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "strict-1"}})
	n.Labels["a"] = "c"
	if err := c.Update(t.Context(), n, client.DryRunAll); err == nil ||
		!strings.Contains(err.Error(), "k8slan's controller") {
		t.Errorf("the controller labels a node: %s", errorText(err))
	}
}
