package e2e

import (
	"context"
	"regexp"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/cluster/install"
)

func TestHelmTestSendsFramesBetweenTwoNodesAndLeavesNothing(t *testing.T) {
	l := newLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
	defer cancel()
	for range 2 { // what the first run leaves must not be in the second one's way
		begin := time.Now()
		out := l.helm(ctx, "test", install.Release, "--namespace", install.Namespace)
		l.logTime("helm test", begin)
		said := regexp.MustCompile(`1000 frames of 60 and \d+ bytes went from node (\S+) to node (\S+) and back, none was lost.*`).FindStringSubmatch(out)
		if said == nil || said[1] == said[2] {
			t.Errorf("helm test does not say that frames went between two nodes:\n%s", out)
		} else {
			t.Log(said[0])
		}
		if want := "every kind of frame passes, packets of up to 1422 bytes, up to 4 VLAN tags"; !strings.Contains(out, want) {
			t.Errorf("helm test does not say that %s:\n%s", want, out)
		}
	}
	const name = "k8slan-test"
	for _, o := range []client.Object{&appsv1.Deployment{}, &batchv1.Job{}, &rbacv1.Role{}} {
		if err := bed.client.Get(ctx, client.ObjectKey{Namespace: install.Namespace, Name: name}, o); client.IgnoreNotFound(err) != nil || err == nil {
			t.Errorf("%T %s is still there (%v)", o, name, err)
		}
	}
	one(l, &v1beta1.LANList{}, install.Namespace, name, "gone", func(lan *v1beta1.LAN) bool { return lan == nil })
}

// helm runs Helm, which must succeed, and returns all that it and its hooks print.
func (l lab) helm(ctx context.Context, args ...string) string {
	l.Helper()
	cmd, err := bed.HelmCommand(ctx, args...)
	if err != nil {
		l.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		l.Fatalf("helm %s: %v\n%s", args[0], err, out)
	}
	return string(out)
}
