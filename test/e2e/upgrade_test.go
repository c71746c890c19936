package e2e

import (
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	podresources "k8s.io/kubelet/pkg/apis/podresources/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	definitions "github.com/k8slan/k8slan/crd/manifests"
	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/cluster/install"
)

func TestUpgradeKeepsPodsAttached(t *testing.T) {
	l := newLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 6*patience)
	defer cancel()
	dir := t.TempDir()
	previous, commit, err := l.bed.Previous(ctx, dir)
	if errors.Is(err, install.ErrNoHistory) {
		t.Logf("NO UPGRADE FROM ANOTHER COMMIT WAS TESTED, only from this one under another version: %v", err)
		previous, err = l.bed.As("previous", dir), nil
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the previous commit is %s", commit)
	l.reinstall()
	l.try(inOrder(ctx, previous.Build, previous.Definitions, previous.Load))
	l.try(l.bed.install(ctx, previous, "--no-hooks"))
	l.awaitVersion(previous.Version())
	one, two := l.pair("upgraded", 1077)

	var gaps []*outages
	losesNothing(one, two, func() {
		for _, m := range l.machines() {
			gaps = append(gaps, m.watchResource("upgraded-3"))
		}
		begin := time.Now()
		l.try(l.bed.install(ctx, l.bed.Bed))
		l.logTime("helm upgrade", begin)
		l.awaitVersion(l.bed.Version())
		for _, g := range gaps {
			g.end()
		}
	})
	for _, s := range []host{one, two} {
		p := l.awaitRunning(s.pod)
		if string(p.UID) != s.uid || p.Status.ContainerStatuses[0].RestartCount != 0 {
			t.Errorf("%s was restarted: %+v", s, p.Status.ContainerStatuses)
		}
	}
	for _, m := range l.machines() {
		if have, want := sum(l, m.path("/opt/cni/bin/k8slan")), sum(l, l.bed.Built("k8slan-cni")); have != want {
			t.Errorf("%s does not have the new CNI plugin", m)
		}
	}
	l.wantsCurrentCRDs()
	l.ready("upgraded")
	third := l.start(pod("upgraded-3", worker1, "upgraded-3"))[0]
	third.address(address(3) + "/24")
	third.pings(address(1), address(2))
}

// awaitVersion returns when the daemons of both nodes have that version.
func (l lab) awaitVersion(version string) {
	l.Helper()
	for _, node := range []string{worker1, worker2} {
		one(l, &v1beta1.LANNodeList{}, "", node, "of version "+version, func(n *v1beta1.LANNode) bool {
			return n != nil && n.Status.Version == version
		})
	}
}

// wantsCurrentCRDs wants the CRDs in the cluster to be those of this version.
func (l lab) wantsCurrentCRDs() {
	l.Helper()
	for _, file := range []string{"lan.k8slan.io_lans.yaml", "lan.k8slan.io_lannodes.yaml"} {
		content, err := definitions.Files.ReadFile(file)
		if err != nil {
			l.Fatal(err)
		}
		var want, have apiextensionsv1.CustomResourceDefinition
		if err := yaml.Unmarshal(content, &want); err != nil {
			l.Fatal(err)
		}
		out := l.kubectl("get", "crd", want.Name, "-o", "yaml")
		if err := yaml.Unmarshal([]byte(out), &have); err != nil {
			l.Fatal(err)
		}
		if !equality.Semantic.DeepEqual(have.Spec.Versions, want.Spec.Versions) {
			l.Errorf("helm upgrade did not bring CRD %s up to date", want.Name)
		}
	}
}

func sum(l lab, path string) [sha256.Size]byte {
	l.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		l.Fatal(err)
	}
	return sha256.Sum256(content)
}

// outages are the times during which kubelet cannot allocate a spoke, from its first answer without the spoke to the
// first with it.
type outages struct {
	m     machine
	spoke string
	stop  context.CancelFunc
	wait  sync.WaitGroup

	spans []time.Duration
}

// watchResource asks kubelet again and again whether it can allocate a spoke, because a change is no event anywhere.
func (m machine) watchResource(spoke string) *outages {
	m.Helper()
	conn, err := grpc.NewClient("unix:"+m.path("/var/lib/kubelet/pod-resources/kubelet.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		m.Fatal(err)
	}
	ctx, cancel := context.WithCancel(m.Context())
	g := &outages{m: m, spoke: spoke, stop: cancel}
	g.wait.Go(func() {
		defer conn.Close()
		var gone time.Time
		again := time.NewTicker(25 * time.Millisecond) // kubelet answers 100 such calls a second
		defer again.Stop()
		for {
			answer, err := podresources.NewPodResourcesListerClient(conn).GetAllocatableResources(ctx,
				&podresources.AllocatableResourcesRequest{})
			healthy := slices.ContainsFunc(answer.GetDevices(), func(d *podresources.ContainerDevices) bool {
				return d.GetResourceName() == v1beta1.Resource(spoke) && len(d.GetDeviceIds()) > 0
			})
			switch {
			case err == nil && !healthy && gone.IsZero():
				gone = time.Now()
			case healthy && !gone.IsZero():
				g.spans = append(g.spans, time.Since(gone))
				gone = time.Time{}
			}
			select {
			case <-again.C:
			case <-ctx.Done():
				return
			}
		}
	})
	return g
}

// end ends the watch and wants exactly one outage.
func (g *outages) end() {
	g.m.Helper()
	g.stop()
	g.wait.Wait()
	g.m.Logf("%s could not allocate spoke %s for %v", g.m, g.spoke, g.spans)
	if len(g.spans) != 1 {
		g.m.Errorf("%s withdrew spoke %s %d times, want once", g.m, g.spoke, len(g.spans))
	}
}

func TestUpgradeToAMissingImageChangesNothing(t *testing.T) {
	l := newLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	l.reinstall()
	daemons := func() (uids []string) {
		var pods corev1.PodList
		if err := l.bed.client.List(ctx, &pods, client.InNamespace(install.Namespace),
			client.MatchingLabels{"app.kubernetes.io/component": "node"}); err != nil {
			t.Fatal(err)
		}
		for _, p := range pods.Items {
			uids = append(uids, string(p.UID))
		}
		slices.Sort(uids)
		return uids
	}
	before := daemons()
	// The hook's pods run the present image, as if only one node could not get the new one.
	_, err := l.bed.Helm(ctx, "upgrade", install.Release, chartDir, "--namespace", install.Namespace, "--reuse-values",
		"--set", "image.tag=nowhere", "--set", "upgrade.timeout=5s", "--timeout", "15s")
	if err == nil {
		t.Error("helm upgrade succeeds with an image that no node can get")
	}
	if after := daemons(); !slices.Equal(before, after) {
		t.Errorf("the daemons were replaced: %v, before %v", after, before)
	}
}
