package e2e

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/lanmgr/podresources"
	"github.com/k8slan/k8slan/test/install"
)

// What the end of a claim without DEL rests on: the daemon can ask kubelet, kubelet lists the daemon's own pod, and it
// lists a pod for as long as that has its sandbox, while it is being deleted too.
func TestKubeletListsAPodForAsLongAsItHasItsSandbox(t *testing.T) {
	l := newLab(t)
	l.lan("listed", 1074, []string{"listed-1"})
	p := l.start(pod("listed-1", worker1, "listed-1"))[0]
	m := l.machine(worker1)
	daemon := m.daemon()
	list := func() []podresources.Pod {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		pods, err := podresources.List(ctx, m.path("/proc/"+daemon+"/root"+podresources.Socket))
		if err != nil {
			t.Fatal(err)
		}
		return pods
	}
	environment := strings.Split(m.run("cat", "/proc/"+daemon+"/environ"), "\x00")
	self := podresources.Pod{Namespace: install.Namespace}
	for _, e := range environment {
		if name, ok := strings.CutPrefix(e, "POD_NAME="); ok {
			self.Name = name
		}
	}
	this := podresources.Pod{Namespace: l.namespace, Name: p.pod}
	if pods := list(); !slices.Contains(pods, self) || !slices.Contains(pods, this) {
		t.Fatalf("kubelet lists %v, want %v and %v", pods, self, this)
	}
	l.delete(&corev1.Pod{}, p.pod, client.GracePeriodSeconds(3))
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	looks := 0
	for ; ; looks++ {
		pods := list()
		if m.sandboxGone(p.uid) {
			break
		}
		if !slices.Contains(pods, this) {
			t.Fatalf("kubelet no longer lists %v, which has its sandbox", this)
		}
		<-again.C
	}
	if looks == 0 {
		t.Error("the sandbox was gone at the first look")
	}
}
