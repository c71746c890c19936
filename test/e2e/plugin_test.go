package e2e

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// plugin is kubectl k8slan in the lab's namespace, ready to be started.
func (l lab) plugin(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, bed.Built("kubectl-k8slan"), append([]string{"--kubeconfig", bed.Cluster.Kubeconfig(), "--namespace", l.namespace}, args...)...)
}

// k8slan runs kubectl k8slan, which must end with that code, and returns what it prints.
func (l lab) k8slan(code int, args ...string) string {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	cmd := l.plugin(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		l.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		l.Fatalf("kubectl k8slan %s ended with %d, want %d\n%s%s", strings.Join(args, " "), got, code, &stdout, &stderr)
	}
	return stdout.String() + stderr.String()
}

func TestStatusShowsLANsPodsAndNodesOnOneScreen(t *testing.T) {
	l := newLab(t)
	l.apply(lanYAML("seen", 1085, []string{"seen-1", "seen-2"}))
	l.apply(lanYAML("seen-broken", 1086, []string{"seen-3"}, "vxlanDevMap: {worker2: eth7}"))
	l.ready("seen")
	l.start(pod("seen-1", worker1, "seen-1"))
	l.awaitLAN("seen", "told of its pod", func(lan *v1beta1.LAN) bool { return lan.Status.Attached == 1 })
	l.awaitLAN("seen-broken", "Degraded", func(lan *v1beta1.LAN) bool { return lan.Status.State == v1beta1.StateDegraded })

	out := l.k8slan(0, "status", "seen")
	if !containsAll(out, []string{
		l.namespace + "/seen  Ready  vni 1085, multicast, 2/2 nodes, 2 spokes, 1 attached",
		l.namespace + "/seen-1", "free: seen-2", worker1, worker2, "eth1",
	}) {
		t.Errorf("kubectl k8slan status says\n%s", out)
	}
	out = l.k8slan(1, "status")
	if !containsAll(out, []string{"/seen  Ready", "/seen-broken  Degraded UnderlayMissing", `no device "eth7" (spec.vxlanDevMap.worker2)`}) {
		t.Errorf("kubectl k8slan status of a LAN that is not well says\n%s", out)
	}
	if out := l.k8slan(1, "status", "nowhere"); !strings.Contains(out, "there is no LAN nowhere in namespace "+l.namespace) {
		t.Errorf("kubectl k8slan status of a LAN that is not there says\n%s", out)
	}
	if out := l.k8slan(2, "status", "--as", "nobody"); !strings.Contains(out, "forbidden") {
		t.Errorf("kubectl k8slan status for somebody without rights says\n%s", out)
	}
}
