package e2e

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/test/cluster/install"
)

// dump logs what a person needs to find out why a test failed.
func (l lab) dump(ctx context.Context) {
	l.Helper()
	l.dumpObjects(ctx)
	for _, node := range l.bed.Cluster.Nodes() {
		l.show(ctx, "kubelet of "+node.Name, local, "tail", "-n", "25",
			filepath.Join(l.bed.Cluster.Logs(), node.Name+"-kubelet.log"))
		l.show(ctx, "Multus of "+node.Name, node.Exec, "tail", "-n", "15", "/var/log/multus.log")
		l.show(ctx, "LANs of "+node.Name, node.Exec, "sh", "-c",
			`for ns in /run/k8slan/netns/*; do echo "== $ns"; nsenter --net=$ns ip -d link; done; ls -l `+
				`/run/k8slan/lan /var/run/cdi`)
	}
}

// dumpObjects logs the lab's objects and events, and the logs of k8slan.
func (l lab) dumpObjects(ctx context.Context) {
	l.Helper()
	kubectl := func(ctx context.Context, args ...string) ([]byte, error) {
		out, err := l.bed.Kubectl(ctx, args...)
		return []byte(out), err
	}
	l.show(ctx, "pods", kubectl, "get", "pods", "-n", l.namespace, "-o", "wide")
	l.show(ctx, "LANs", kubectl, "get", "lans,net-attach-def", "-n", l.namespace, "-o", "yaml")
	l.show(ctx, "LANNodes", kubectl, "get", "lannodes", "-o", "yaml")
	l.Logf("--- events\n%s", eventLines(l.events(ctx, func(*corev1.Event) bool { return true })))
	l.show(ctx, "k8slan", kubectl, "get", "pods", "-n", install.Namespace, "-o", "wide")
	for _, component := range []string{"node", "controller"} {
		l.show(ctx, component, kubectl, "logs", "-n", install.Namespace, "-l", "app.kubernetes.io/component="+component,
			"--tail=40", "--prefix")
	}
}

// logDelays logs what kubelet had to try a second time: it waits at least ten seconds before that.
func (l lab) logDelays(ctx context.Context) {
	l.Helper()
	if delays := l.events(ctx, func(e *corev1.Event) bool {
		return e.Reason == "FailedCreatePodSandBox" || e.Reason == "Failed"
	}); len(delays) > 0 {
		l.Logf("delays:\n%s", eventLines(delays))
	}
}

// events returns the lab's events that fit.
func (l lab) events(ctx context.Context, fits func(*corev1.Event) bool) []*corev1.Event {
	l.Helper()
	var list corev1.EventList
	if err := l.bed.client.List(ctx, &list, client.InNamespace(l.namespace)); err != nil {
		l.Logf("list events: %v", err)
	}
	var all []*corev1.Event
	for i := range list.Items {
		if fits(&list.Items[i]) {
			all = append(all, &list.Items[i])
		}
	}
	return all
}

// local runs a command on this machine.
func local(ctx context.Context, command ...string) ([]byte, error) {
	return exec.CommandContext(ctx, command[0], command[1:]...).CombinedOutput()
}

func (l lab) show(ctx context.Context, title string, run func(context.Context, ...string) ([]byte, error),
	command ...string,
) {
	l.Helper()
	out, err := run(ctx, command...)
	if err != nil {
		l.Logf("--- %s: %v", title, err)
	}
	l.Logf("--- %s\n%s", title, strings.TrimSpace(string(out)))
}
