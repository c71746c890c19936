package e2e

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/lanmgr/gc"
	"github.com/k8slan/k8slan/test/cluster/install"
)

// The daemon ends claims without a DEL when kubelet no longer lists their pod. That is right if the daemon can ask
// kubelet, if kubelet lists the daemon's own pod, and if it lists each pod as long as the pod has a sandbox, even
// during deletion.
func TestKubeletListsAPodAsLongAsItHasASandbox(t *testing.T) {
	l := newLab(t)
	t.Run("on a spoke", func(t *testing.T) {
		l := l.in(t)
		l.lan("listed", 1074, []string{"listed-1"})
		l.start(pod("listed-1", worker1, "listed-1"))
		l.wantsListed("listed-1")
	})
	t.Run("without a device", func(t *testing.T) {
		l := l.in(t)
		l.create(workload{Name: "plain", Node: worker1})
		l.wantsListed("plain")
	})
}

// wantsListed deletes a pod, and wants kubelet to list it as long as it has a sandbox.
func (l lab) wantsListed(name string) {
	l.Helper()
	p := l.awaitRunning(name)
	m := l.machine(p.Spec.NodeName)
	daemon := m.daemon()
	list := func() []gc.Pod {
		ctx, cancel := context.WithTimeout(l.Context(), patience)
		defer cancel()
		pods, err := gc.List(ctx, m.path("/proc/"+daemon+"/root"+gc.Socket))
		if err != nil {
			l.Fatal(err)
		}
		return pods
	}
	environment := strings.Split(m.run("cat", "/proc/"+daemon+"/environ"), "\x00")
	self := gc.Pod{Namespace: install.Namespace}
	for _, e := range environment {
		if name, ok := strings.CutPrefix(e, "POD_NAME="); ok {
			self.Name = name
		}
	}
	this := gc.Pod{Namespace: l.namespace, Name: name}
	if pods := list(); !slices.Contains(pods, self) || !slices.Contains(pods, this) {
		l.Fatalf("kubelet lists %v, want %v and %v", pods, self, this)
	}
	l.delete(&corev1.Pod{}, name, client.GracePeriodSeconds(3))
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	answers := 0
	for ; ; answers++ {
		pods := list()
		if m.sandboxGone(string(p.UID)) {
			break
		}
		if !slices.Contains(pods, this) {
			l.Fatalf("kubelet no longer lists %v, which has a sandbox", this)
		}
		<-again.C
	}
	if answers == 0 {
		l.Error("the sandbox had ended before kubelet was asked")
	}
}
