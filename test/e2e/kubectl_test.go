package e2e

import (
	"cmp"
	"context"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/cluster/install"
)

func TestKubectlShowsLANsWaitsForThemAndExplainsThem(t *testing.T) {
	l := newLab(t)
	l.apply(l.lanYAML("shown", 1080, []string{"shown-1", "shown-2"}))
	l.kubectl("wait", "--for=condition=Ready", "lan/shown", "--timeout=60s")
	l.start(pod("shown-1", worker1, "shown-1"))
	l.awaitLAN("shown", "with its pod", func(lan *v1beta1.LAN) bool { return lan.Status.Attached == 1 })

	lines := strings.Split(strings.TrimSpace(l.kubectl("get", "lans")), "\n")
	if got, want := strings.Join(strings.Fields(lines[0]), " "),
		"NAME VNI DISCOVERY SPOKES ATTACHED NODES STATE REASON AGE"; got != want {
		t.Errorf("kubectl get lans has the columns %s, want %s", got, want)
	}
	if got, want := strings.Join(strings.Fields(lines[1])[:7], " "),
		"shown 1080 "+string(cmp.Or(l.underlay.discovery, v1beta1.Multicast))+" 2 1 2/2 Ready"; got != want {
		t.Errorf("kubectl get lans prints %q, want %q", got, want)
	}
	if out := l.kubectl("describe", "lan", "shown"); !containsAll(out,
		[]string{l.namespace + "/shown-1", "worker1", "veth"}) {
		t.Errorf("kubectl describe lan does not show the pod:\n%s", out)
	}
	if out := l.kubectl("get", "lannodes"); !containsAll(out, []string{worker1, worker2, "ATTACHED"}) {
		t.Errorf("kubectl get lannodes prints\n%s", out)
	}
	if out := l.kubectl("explain", "lan.spec"); !containsAll(out,
		[]string{"vxlanDevMap", "VNI is the VXLAN network identifier", "allowedNamespaces"}) {
		t.Errorf("kubectl explain lan.spec prints\n%s", out)
	}
}

func TestSecondLANWithTheSameVNINsOrSpokeWaits(t *testing.T) {
	l := newLab(t)
	l.lan("holder", 1081, []string{"held"}, "ns: e2e-held")
	l.apply(l.lanYAML("same-vni", 1081, []string{"vni-1"}))
	l.apply(l.lanYAML("same-ns", 1082, []string{"ns-1"}, "ns: e2e-held"))
	l.apply(l.lanYAML("same-spoke", 1083, []string{"held", "free"}))
	for name, why := range map[string]string{
		"same-vni": "vni 1081 is held by " + l.namespace + "/holder",
		"same-ns":  "ns e2e-held is held by " + l.namespace + "/holder",
	} {
		l.awaitLAN(name, "refused", func(lan *v1beta1.LAN) bool {
			return lan.Status.State == v1beta1.StateConflict && lan.Status.Reason == why && lan.Status.Holds == nil &&
				condition(lan, v1beta1.ConditionAccepted).Status == metav1.ConditionFalse
		})
		l.awaitEvent(name, v1beta1.ReasonConflict, why)
	}
	why := "spoke held is held by " + l.namespace + "/holder"
	l.awaitLAN("same-spoke", "without the spoke", func(lan *v1beta1.LAN) bool {
		c := condition(lan, v1beta1.ConditionAccepted)
		return c.Reason == v1beta1.ReasonSpokeConflict && strings.Contains(c.Message, why) &&
			len(lan.Status.Holds.Spokes) == 1 && lan.Status.State == v1beta1.StateDegraded
	})
	l.start(pod("free", worker1, "free")) // the spoke without a conflict works

	l.delete(&v1beta1.LAN{}, "holder")
	for _, name := range []string{"same-vni", "same-ns", "same-spoke"} {
		l.ready(name)
	}
}

func TestAllInOneManifestIsAcceptedByTheAPIServer(t *testing.T) {
	l := newLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	all, err := l.bed.Helm(ctx, "template", install.Release, chartDir, "--namespace", install.Namespace,
		"--include-crds", "--no-hooks",
		"--kube-version", "1.31.0", "--set", "createNamespace=true")
	if err != nil {
		t.Fatal(err)
	}
	cmd := l.bed.KubectlCommand(ctx, "apply", "--dry-run=server", "-f", "-")
	cmd.Stdin = strings.NewReader(all)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("kubectl apply: %v\n%s", err, out)
	}
	if !containsAll(string(out),
		[]string{
			"daemonset.apps/k8slan-ds", "deployment.apps/k8slan-controller-manager", "lans.lan.k8slan.io",
			"namespace/" + install.Namespace,
		}) {
		l.Errorf("kubectl apply prints\n%s", out)
	}
}

// condition returns a condition of a LAN, empty if the LAN has none of that type.
func condition(lan *v1beta1.LAN, kind string) metav1.Condition {
	if c := meta.FindStatusCondition(lan.Status.Conditions, kind); c != nil {
		return *c
	}
	return metav1.Condition{}
}
