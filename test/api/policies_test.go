package api

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/controller"
	"github.com/k8slan/k8slan/crd/v1beta1"
)

// policies applies one of the chart's files with these values until the test ends.
func policies(t *testing.T, file string, values ...string) {
	t.Helper()
	args := []string{
		"template", "k8slan", "../../charts/k8slan", "--namespace", chartNamespace, "--kube-version", "1.36.3",
		"--show-only", "templates/" + file,
	}
	for _, v := range values {
		args = append(args, "--set-json", v)
	}
	helm := exec.CommandContext(t.Context(), filepath.Join(kube.helm, "helm"), args...)
	helm.Env = append(os.Environ(), "HOME="+kube.Dir)
	rendered, err := helm.Output()
	if err != nil {
		t.Fatalf("render %s: %v%s", file, err, stderr(err))
	}
	if _, err := kube.kubectl(t.Context(), string(rendered), "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if _, err := kube.kubectl(ctx, string(rendered), "delete", "--wait=false", "-f", "-"); err != nil {
			t.Error(err)
		}
		// A policy still has effect for a moment after it was deleted.
		beyond := parse(t, manifest("beyond", "{vni: 7, spokes: [beyond], defaultVxlanDev: eth7}"))
		free := func(ctx context.Context) (bool, error) {
			return api.Create(ctx, beyond.DeepCopy(), client.DryRunAll) == nil, nil
		}
		if err := wait.PollUntilContextTimeout(ctx, 20*time.Millisecond, deadline, true, free); err != nil {
			t.Errorf("the limits still have effect: %v", err)
		}
	})
}

// clientAs returns a client that may do everything and that admission policies see as this user.
func clientAs(t *testing.T, user string, extra map[string][]string) client.Client {
	t.Helper()
	config := rest.CopyConfig(kube.Client)
	config.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: []string{"system:masters"}, Extra: extra}
	c, err := client.New(config, client.Options{Scheme: controller.NewScheme()})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestLANsBeyondLimitsAreRefusedWithReason(t *testing.T) {
	before := parse(t, manifest("before", "{vni: 5, spokes: [before], defaultVxlanDev: eth9}"))
	if err := api.Create(t.Context(), before); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { remove(t, before) })
	policies(t, "policy-limits.yaml", "limits.vniRange=[1000,1999]", `limits.underlayDevices=["","eth1"]`)
	const (
		vni = "this cluster's administrator allows the VNIs 1000 to 1999 (limits.vniRange of k8slan's chart), and " +
			"vni is 222; choose a VNI in the range, or ask the administrator to widen it"
		device = "this cluster's administrator allows these underlay devices: the device that a node chooses, eth1 " +
			"(limits.underlayDevices of k8slan's chart), and this LAN asks for eth2; change defaultVxlanDev or " +
			"vxlanDevMap, or ask the administrator to allow it"
	)
	eventually(t, func() string { // a policy has effect a moment after it was created
		if said := refusal(t, manifest("lab", "{vni: 222, spokes: [srl]}")); !strings.Contains(said, vni) {
			return "VNI 222 beyond the range: " + said + "; want " + vni
		}
		return ""
	})
	for _, c := range []struct{ name, spec, want string }{
		{"within", "{vni: 1000, spokes: [srl]}", ""},
		{
			"the last VNI, an allowed device",
			"{vni: 1999, spokes: [srl], defaultVxlanDev: eth1, vxlanDevMap: {worker1: eth1}}", "",
		},
		{"one too many", "{vni: 2000, spokes: [srl]}", "vni is 2000"},
		{"another default", "{vni: 1000, spokes: [srl], defaultVxlanDev: eth2}", device},
		{"another for one node", "{vni: 1000, spokes: [srl], vxlanDevMap: {worker1: eth1, worker2: eth2}}", device},
	} {
		if said := refusal(t, manifest("lab", c.spec)); (said == "") != (c.want == "") ||
			!strings.Contains(said, c.want) {
			t.Errorf("%s: the API server says %q, want %q", c.name, said, c.want)
		}
	}

	// An older LAN can be edited, but not moved to another device.
	edited := before.DeepCopy()
	edited.SetFinalizers([]string{"example.com/kept"})
	if err := api.Update(t.Context(), edited, client.DryRunAll); err != nil {
		t.Errorf("a LAN that is older than the limits cannot be edited: %v", err)
	}
	if err := api.Get(t.Context(), client.ObjectKeyFromObject(before), edited); err != nil {
		t.Fatal(err)
	}
	edited.Object["spec"].(map[string]any)["defaultVxlanDev"] = "eth2"
	if err := api.Update(t.Context(), edited, client.DryRunAll); err == nil ||
		!strings.Contains(err.Error(), "asks for eth2") {
		t.Errorf("a LAN that is older than the limits can be moved to eth2: %v", err)
	}
}

func TestLimitWithoutEmptyDeviceRefusesNodesChoice(t *testing.T) {
	policies(t, "policy-limits.yaml", `limits.underlayDevices=["eth1"]`)
	eventually(t, func() string {
		const want = "allows these underlay devices: eth1 (limits.underlayDevices of k8slan's chart), and this LAN " +
			"asks for the device that a node chooses; "
		if said := refusal(t, manifest("lab", "{vni: 222, spokes: [srl]}")); !strings.Contains(said, want) {
			return "a LAN without a device: " + said + "; want " + want
		}
		return ""
	})
	if said := refusal(t, manifest("lab", "{vni: 222, spokes: [srl], defaultVxlanDev: eth1}")); said != "" {
		t.Errorf("a LAN over eth1 is refused: %s", said)
	}
}

func TestDaemonWritesOnlyItsOwnLANNode(t *testing.T) {
	policies(t, "policy-accounts.yaml")
	const daemon = "system:serviceaccount:" + chartNamespace + ":k8slan-node"
	on := func(node string) client.Client {
		return clientAs(t, daemon, map[string][]string{"authentication.kubernetes.io/node-name": {node}})
	}
	lanNode := func(name string) *v1beta1.LANNode { return &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: name}} }
	const want = "this token is of node worker1, the LANNode is worker2"
	eventually(t, func() string {
		if err := on("worker1").Create(t.Context(), lanNode("worker2"), client.DryRunAll); err == nil ||
			!strings.Contains(err.Error(), want) {
			return "worker1 creates worker2's LANNode: " + errorText(err)
		}
		return ""
	})
	own := lanNode("worker1")
	if err := on("worker1").Create(t.Context(), own); err != nil {
		t.Fatalf("worker1 cannot create its own LANNode: %v", err)
	}
	t.Cleanup(func() { remove(t, own) })
	if err := on("worker1").Status().Update(t.Context(), own.DeepCopy()); err != nil {
		t.Errorf("worker1 cannot write its own status: %v", err)
	}
	if err := api.Get(t.Context(), client.ObjectKeyFromObject(own), own); err != nil {
		t.Fatal(err)
	}
	for who, c := range map[string]client.Client{
		"worker2's token":    on("worker2"),
		"a token of no node": clientAs(t, daemon, nil),
	} {
		for what, err := range map[string]error{
			"update": c.Update(t.Context(), own.DeepCopy(), client.DryRunAll),
			"status": c.Status().Update(t.Context(), own.DeepCopy(), client.DryRunAll),
			"delete": c.Delete(t.Context(), own.DeepCopy(), client.DryRunAll),
		} {
			if err == nil || !strings.Contains(err.Error(),
				"k8slan's daemon may write only the LANNode of its own node") {
				t.Errorf("%s, %s of worker1's LANNode: %v", who, what, err)
			}
		}
	}
	if err := clientAs(t, "admin", nil).Update(t.Context(), own.DeepCopy(), client.DryRunAll); err != nil {
		t.Errorf("the policy refuses a write of an administrator: %v", err)
	}
}

func TestControllerChangesOnlyItsFinalizerOnLANs(t *testing.T) {
	lan := &v1beta1.LAN{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: "mine", Labels: map[string]string{"a": "b"},
			Finalizers: []string{"example.com/theirs"},
		},
		Spec: v1beta1.LANSpec{VNI: 6, Spokes: []string{"mine"}},
	}
	if err := api.Create(t.Context(), lan); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		lan.Finalizers = nil
		if err := api.Update(context.WithoutCancel(t.Context()), lan); err != nil {
			t.Error(err)
		}
		remove(t, lan)
	})
	policies(t, "policy-accounts.yaml")
	c := clientAs(t, controllerAccount, nil)
	change := func(f func(*v1beta1.LAN)) error {
		changed := lan.DeepCopy()
		f(changed)
		return c.Update(t.Context(), changed, client.DryRunAll)
	}
	eventually(t, func() string {
		err := change(func(l *v1beta1.LAN) { l.Spec.Spokes = []string{"other"} })
		if err == nil || !strings.Contains(err.Error(), "may change only its own finalizer") {
			return "the controller edits a spec: " + errorText(err)
		}
		return ""
	})
	for what, f := range map[string]func(*v1beta1.LAN){
		"a label":                             func(l *v1beta1.LAN) { l.Labels["a"] = "c" },
		"a new annotation":                    func(l *v1beta1.LAN) { l.Annotations = map[string]string{"x": "y"} },
		"the finalizer of another controller": func(l *v1beta1.LAN) { l.Finalizers = nil },
		"an owner": func(l *v1beta1.LAN) {
			l.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: "x", UID: "y"}}
		},
	} {
		if err := change(f); err == nil {
			t.Errorf("the controller changes %s", what)
		}
	}
	for what, f := range map[string]func(*v1beta1.LAN){
		"put its finalizer on": func(l *v1beta1.LAN) { l.Finalizers = append(l.Finalizers, "lan.k8slan.io/nodes") },
		"change nothing":       func(*v1beta1.LAN) {},
	} {
		if err := change(f); err != nil {
			t.Errorf("the controller cannot %s: %v", what, err)
		}
	}
}

func errorText(err error) string {
	if err == nil {
		return "no error"
	}
	return err.Error()
}
