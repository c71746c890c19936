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
	for range 2 { // the second run shows that the first leaves nothing that disturbs it
		begin := time.Now()
		out := l.helm(ctx, "test", install.Release, "--namespace", install.Namespace)
		l.logTime("helm test", begin)
		report := regexp.MustCompile(`1000 frames of 60 and \d+ bytes went from node (\S+) to node (\S+) and back, ` +
			`none was lost.*`).FindStringSubmatch(out)
		if report == nil || report[1] == report[2] {
			t.Errorf("helm test does not report frames between two nodes:\n%s", out)
		} else {
			t.Log(report[0])
		}
		if want := "every kind of frame passes, packets of up to 1422 bytes, up to 4 VLAN tags"; !strings.Contains(out,
			want) {
			t.Errorf("helm test does not print %q:\n%s", want, out)
		}
	}
	const name = "k8slan-test"
	for _, o := range []client.Object{&appsv1.Deployment{}, &batchv1.Job{}, &rbacv1.Role{}} {
		if err := l.bed.client.Get(ctx, client.ObjectKey{Namespace: install.Namespace, Name: name},
			o); client.IgnoreNotFound(err) != nil || err == nil {
			t.Errorf("%T %s still exists (%v)", o, name, err)
		}
	}
	one(l, &v1beta1.LANList{}, install.Namespace, name, "gone", func(lan *v1beta1.LAN) bool { return lan == nil })
}

// helm runs Helm, which must succeed, and returns all that it and its hooks print.
func (l lab) helm(ctx context.Context, args ...string) string {
	l.Helper()
	cmd, err := l.bed.HelmCommand(ctx, args...)
	if err != nil {
		l.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		l.Fatalf("helm %s: %v\n%s", args[0], err, out)
	}
	return string(out)
}
