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

// What the end of a claim without DEL rests on: the daemon can ask kubelet, kubelet lists the daemon's own pod, and it
// lists a pod for as long as that has its sandbox, while it is being deleted too.
func TestKubeletListsAPodForAsLongAsItHasItsSandbox(t *testing.T) {
	l := newLab(t)
	t.Run("on a spoke", func(t *testing.T) {
		l := l.in(t)
		l.lan("listed", 1074, []string{"listed-1"})
		l.start(pod("listed-1", worker1, "listed-1"))
		l.isListed("listed-1")
	})
	t.Run("without a device", func(t *testing.T) {
		l := l.in(t)
		l.create(guest{Name: "plain", Node: worker1})
		l.isListed("plain")
	})
}

// isListed wants kubelet to list a pod, which it deletes, for as long as that has its sandbox.
func (l lab) isListed(name string) {
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
	looks := 0
	for ; ; looks++ {
		pods := list()
		if m.sandboxGone(string(p.UID)) {
			break
		}
		if !slices.Contains(pods, this) {
			l.Fatalf("kubelet no longer lists %v, which has its sandbox", this)
		}
		<-again.C
	}
	if looks == 0 {
		l.Error("the sandbox was gone at the first look")
	}
}
