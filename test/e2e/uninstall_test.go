package e2e

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/helmhooks"
	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/cluster/install"
)

// reinstall says that the test changes what is installed. After the test k8slan is installed as usual again.
func (l lab) reinstall() {
	l.bed.usual = false
	l.Cleanup(func() {
		if l.bed.usual && !l.Failed() {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
		defer cancel()
		if err := l.bed.chart(ctx); err != nil {
			l.Error(err)
		}
	})
}

func TestUninstallLeavesNothingButTheLANs(t *testing.T) {
	l := newLab(t)
	one, two := l.pair("goes", 1076, "strictPeers: true")
	l.start(vm("goes-3", worker1, "goes-3", address(3)+"/24"))
	one.reaches(address(3))
	for _, m := range l.machines() {
		m.until("the filter of non-members", func() bool { return m.strict("goes") })
	}
	l.reinstall()

	ctx, cancel := context.WithTimeout(t.Context(), 12*patience)
	defer cancel()
	begin := time.Now()
	out := l.helm(ctx, "uninstall", install.Release, "--namespace", install.Namespace)
	l.logTime("helm uninstall", begin)
	for _, attached := range []string{one.pod, two.pod, "goes-3"} {
		if !strings.Contains(out, "pod="+l.namespace+"/"+attached) {
			t.Errorf("helm uninstall does not report that %s loses its interface", attached)
		}
	}
	for _, m := range l.machines() {
		m.wantsClean()
		m.wantsFreeVNI(1076)
	}
	l.wantsNoObjects()
	for _, s := range []host{one, two} {
		if out, err := s.try("ip", "link", "show", s.link); err == nil {
			t.Errorf("%s still has its interface: %s", s, out)
		}
	}
	lan := l.awaitLAN("goes", "kept", func(*v1beta1.LAN) bool { return true })
	if len(lan.Finalizers) > 0 || lan.Status.Reason != helmhooks.ReasonUninstalled ||
		condition(lan, v1beta1.ConditionReady).Reason != helmhooks.ReasonUninstalled {
		t.Errorf("the kept LAN has finalizers %q and status %+v", lan.Finalizers, lan.Status)
	}

	// A pod that was attached is deleted as fast as any other.
	begin = time.Now()
	l.delete(&corev1.Pod{}, one.pod)
	l.awaitPodGone(one.pod)
	l.logTime("deletion of a pod that had been attached", begin)

	// The last step starts. It needs the five minutes after which kubelet drops the resources, so the test waits for it
	// only on demand.
	if os.Getenv("K8SLAN_E2E_LONG") != "" {
		l.awaitNoResidue(ctx, begin)
	} else {
		l.awaitResidueRuns(ctx)
	}
	if err := l.bed.chart(ctx); err != nil {
		t.Fatal(err)
	}
	l.ready("goes")
	l.awaitNone(ctx, "ClusterRole", &rbacv1.ClusterRoleList{},
		client.MatchingFields{"metadata.name": helmhooks.Residue})
	l.delete(&corev1.Pod{}, two.pod)
	l.awaitPodGone(two.pod)
	again := l.start(pod("goes-1", worker1, "goes-1"), pod("goes-2", worker2, "goes-2"))
	again[0].address(address(1) + "/24")
	again[1].address(address(2) + "/24")
	again[0].pings(address(2))
}

// awaitNoResidue returns when the last step of an uninstallation has removed the resources from the nodes, and itself.
func (l lab) awaitNoResidue(ctx context.Context, begin time.Time) {
	l.Helper()
	_, err := await(ctx, l.bed.client, &corev1.NodeList{}, nil, func(all []*corev1.Node) bool {
		return !slices.ContainsFunc(all, func(n *corev1.Node) bool { return len(spokeResources(n)) > 0 })
	})
	if err != nil {
		l.Fatalf("waited for the resources to leave the nodes: %v", err)
	}
	l.logTime("until the last resource left the nodes", begin)
	for what, list := range map[string]client.ObjectList{
		"ClusterRole": &rbacv1.ClusterRoleList{}, "ClusterRoleBinding": &rbacv1.ClusterRoleBindingList{},
		"policy":           &admissionv1.ValidatingAdmissionPolicyList{},
		"policy's binding": &admissionv1.ValidatingAdmissionPolicyBindingList{},
	} {
		l.awaitNone(ctx, what, list, labelled...)
	}
	for what, list := range map[string]client.ObjectList{
		"Deployment": &appsv1.DeploymentList{},
		"pod":        &corev1.PodList{}, "ServiceAccount": &corev1.ServiceAccountList{},
	} {
		l.awaitNone(ctx, what, list, append([]client.ListOption{client.InNamespace(install.Namespace)}, labelled...)...)
	}
	l.logTime("until nothing was left", begin)
}

// awaitResidueRuns returns when the last step runs.
func (l lab) awaitResidueRuns(ctx context.Context) {
	l.Helper()
	which := []client.ListOption{
		client.InNamespace(install.Namespace),
		client.MatchingFields{"metadata.name": helmhooks.Residue},
	}
	_, err := await(ctx, l.bed.client, &appsv1.DeploymentList{}, which, func(all []*appsv1.Deployment) bool {
		return len(all) == 1 && all[0].Status.AvailableReplicas == 1 && len(all[0].OwnerReferences) == 1
	})
	if err != nil {
		l.Errorf("waited for the last step to run: %v", err)
	}
}

// awaitNone returns when no such object is left.
func (l lab) awaitNone(ctx context.Context, what string, list client.ObjectList, which ...client.ListOption) {
	l.Helper()
	if _, err := await(ctx, l.bed.client, list, which, func(all []client.Object) bool {
		return len(all) == 0
	}); err != nil {
		l.Errorf("waited for the end of the last %s: %v", what, err)
	}
}

func TestUninstallWithLANsAndADeadNode(t *testing.T) {
	l := newLab(t)
	l.lan("dead", 1084, []string{"dead"})
	ctx, cancel := context.WithTimeout(t.Context(), 6*patience)
	defer cancel()
	l.reinstall()
	l.try(l.bed.chart(ctx, "uninstall.removeLANs=true"))
	m := l.machine(worker2)
	m.powerOff(ctx)
	l.awaitReady(ctx, worker2, false)
	begin := time.Now()
	out := l.helm(ctx, "uninstall", install.Release, "--namespace", install.Namespace)
	l.logTime("helm uninstall with a dead node", begin)
	if !strings.Contains(out, "node is not clean") || !strings.Contains(out, "node="+worker2) ||
		strings.Contains(out, "node="+worker1) {
		t.Errorf("helm uninstall does not report that only %s is not clean:\n%s", worker2, out)
	}
	l.machine(worker1).wantsClean()
	l.machine(worker1).wantsFreeVNI(1084)
	l.wantsNoObjects()
	if out, err := l.bed.Kubectl(ctx, "get", "crds", "-o", "name"); err != nil || strings.Contains(out, "k8slan") {
		t.Errorf("CRDs are left (%v):\n%s", err, out)
	}

	m.powerOn(ctx)
	l.awaitReady(ctx, worker2, true)
	image := l.bed.Image()
	l.kubectl("debug", "node/"+worker2, "--profile=sysadmin", "--image="+image, "--", "/k8slan", "clean", "--host")
	if _, err := await(ctx, l.bed.client, &corev1.PodList{}, []client.ListOption{client.InNamespace(l.namespace)},
		func(all []*corev1.Pod) bool {
			return len(all) == 1 && all[0].Status.Phase == corev1.PodSucceeded
		}); err != nil {
		t.Fatalf("waited for k8slan clean to be done: %v", err)
	}
	m.wantsClean()
}

// awaitReady returns when a node is ready, or is not.
func (l lab) awaitReady(ctx context.Context, node string, want bool) {
	l.Helper()
	which := []client.ListOption{client.MatchingFields{"metadata.name": node}}
	_, err := await(ctx, l.bed.client, &corev1.NodeList{}, which, func(all []*corev1.Node) bool {
		return len(all) == 1 &&
			want == slices.ContainsFunc(all[0].Status.Conditions, func(c corev1.NodeCondition) bool {
				return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
			})
	})
	if err != nil {
		l.Fatalf("waited for node %s to be ready (%t): %v", node, want, err)
	}
}

// labelled selects the chart's objects.
var labelled = []client.ListOption{client.MatchingLabels{"app.kubernetes.io/name": "k8slan"}}

// spokeResources returns the resources of spokes that a node lists.
func spokeResources(n *corev1.Node) []string {
	var names []string
	for name := range n.Status.Capacity {
		if strings.HasPrefix(string(name), v1beta1.Resource("")) {
			names = append(names, string(name))
		}
	}
	return names
}

// wantsClean wants nothing of k8slan to be left on the node.
func (m machine) wantsClean() {
	m.Helper()
	for dir, ours := range map[string]func(string) bool{
		"/run":         func(f string) bool { return strings.HasPrefix(f, "k8slan") },
		"/var/run/cdi": func(f string) bool { return strings.Contains(f, "k8slan") },
		"/opt/cni/bin": func(f string) bool {
			return strings.Contains(f, "k8slan") || f == "megalos"
		},
		"/var/lib/kubelet/device-plugins": func(f string) bool { return strings.HasPrefix(f, "k8slan-") },
	} {
		if left := slices.DeleteFunc(m.files(dir), func(f string) bool { return !ours(f) }); len(left) > 0 {
			m.Errorf("%s has %q in %s", m, left, dir)
		}
	}
	if mounts := m.run("sh", "-c", "grep /run/k8slan /proc/1/mountinfo || true"); mounts != "" {
		m.Errorf("%s still has mounts:\n%s", m, mounts)
	}
	if links := m.run("sh", "-c", "ip -o link show type vxlan; ip -o link show type macvtap"); links != "" {
		m.Errorf("%s still has links:\n%s", m, links)
	}
	if tables := m.run("nft", "list", "tables"); strings.Contains(tables, "k8slan") {
		m.Errorf("%s still has tables of nftables:\n%s", m, tables)
	}
}

// wantsFreeVNI wants a VNI to be unused in all network namespaces: the kernel allows one VXLAN of each VNI, port and
// underlay.
func (m machine) wantsFreeVNI(vni int) {
	m.Helper()
	m.run("sh", "-ec", fmt.Sprintf("ip link add probe type vxlan id %d dstport 4789 group ff02::14 dev eth1 && ip "+
		"link set probe up; ip link del probe", vni))
}

// wantsNoObjects wants no object of k8slan in the API but LANs and the last step of the uninstallation.
func (l lab) wantsNoObjects() {
	l.Helper()
	ours := func(o client.Object) bool {
		return strings.HasPrefix(o.GetName(), "k8slan") && !strings.HasPrefix(o.GetName(), helmhooks.Residue) ||
			o.GetLabels()["app.kubernetes.io/managed-by"] == "k8slan"
	}
	for _, list := range []client.ObjectList{
		&v1beta1.LANNodeList{}, &nadv1.NetworkAttachmentDefinitionList{}, &coordinationv1.LeaseList{},
		&appsv1.DaemonSetList{}, &appsv1.DeploymentList{}, &batchv1.JobList{}, &policyv1.PodDisruptionBudgetList{},
		&networkingv1.NetworkPolicyList{}, &corev1.ServiceAccountList{}, &rbacv1.RoleList{}, &rbacv1.RoleBindingList{},
		&rbacv1.ClusterRoleList{}, &rbacv1.ClusterRoleBindingList{},
		&admissionv1.ValidatingAdmissionPolicyList{}, &admissionv1.ValidatingAdmissionPolicyBindingList{},
	} {
		if err := l.bed.client.List(l.Context(), list); apierrors.IsNotFound(err) || meta.IsNoMatchError(err) {
			continue // the CRD is deleted
		} else if err != nil {
			l.Fatal(err)
		}
		items, err := meta.ExtractList(list)
		if err != nil {
			l.Fatal(err)
		}
		for _, item := range items {
			o := item.(client.Object)
			if _, lanNode := o.(*v1beta1.LANNode); lanNode || ours(o) {
				l.Errorf("%T %s/%s is left", o, o.GetNamespace(), o.GetName())
			}
		}
	}
}

func TestUninstallWithoutHooksKeepsPodsAttached(t *testing.T) {
	l := newLab(t)
	one, two := l.pair("stays", 1075)
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	l.reinstall()
	losesNothing(one, two, func() {
		if _, err := l.bed.Helm(ctx, "uninstall", install.Release, "--namespace", install.Namespace, "--wait",
			"--no-hooks"); err != nil {
			t.Fatal(err)
		}
		// All of k8slan's pods have ended, and attached pods stay attached.
		if _, err := await(ctx, l.bed.client, &corev1.PodList{},
			[]client.ListOption{client.InNamespace(install.Namespace)},
			func(all []*corev1.Pod) bool { return len(all) == 0 }); err != nil {
			t.Fatal(err)
		}
	})
	if err := l.bed.chart(ctx); err != nil {
		t.Fatal(err)
	}
	l.ready("stays")
	third := l.start(pod("stays-3", worker1, "stays-3"))[0]
	third.address(address(3) + "/24")
	third.pings(address(2))
}
