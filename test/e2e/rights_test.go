package e2e

import (
	"context"
	"slices"
	"strings"
	"testing"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/controller"
	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/cluster/install"
)

// account returns a client with a token of one of k8slan's service accounts, as a pod has one. Without a pod the token
// belongs to no node.
func (l lab) account(name string, pod *corev1.Pod) client.Client {
	l.Helper()
	request := &authenticationv1.TokenRequest{}
	if pod != nil {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{
			Kind: "Pod", APIVersion: "v1",
			Name: pod.Name, UID: pod.UID,
		}
	}
	granted, err := l.bed.core.CoreV1().ServiceAccounts(install.Namespace).CreateToken(l.Context(), name, request,
		metav1.CreateOptions{})
	if err != nil {
		l.Fatal(err)
	}
	config := rest.AnonymousClientConfig(l.bed.config)
	config.BearerToken = granted.Status.Token
	c, err := client.New(config, client.Options{Scheme: controller.NewScheme()})
	if err != nil {
		l.Fatal(err)
	}
	return c
}

// podOf returns a running pod of one of k8slan's components, on a node if one is named.
func (l lab) podOf(component, node string) *corev1.Pod {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	fits := func(p *corev1.Pod) bool { return isRunning(p) && (node == "" || p.Spec.NodeName == node) }
	which := []client.ListOption{
		client.InNamespace(install.Namespace),
		client.MatchingLabels{"app.kubernetes.io/component": component},
	}
	all, err := await(ctx, l.bed.client, &corev1.PodList{}, which, func(all []*corev1.Pod) bool {
		return slices.ContainsFunc(all, fits)
	})
	if err != nil {
		l.Fatalf("waited for a pod of k8slan's %s to run: %v", component, err)
	}
	return all[slices.IndexFunc(all, fits)]
}

// wantsRefused wants the API server to refuse all attempts.
func (l lab) wantsRefused(who string, attempts map[string]error) {
	l.Helper()
	for what, err := range attempts {
		if !apierrors.IsForbidden(err) &&
			!(apierrors.IsInvalid(err) && strings.Contains(err.Error(), "ValidatingAdmissionPolicy")) {
			l.Errorf("%s: %s: %v, want it refused", who, what, err)
		}
	}
}

// forbidden tries what none of k8slan's accounts may do to objects that are not k8slan's.
func (l lab) forbidden(ctx context.Context, c client.Client) map[string]error {
	here := client.InNamespace(install.Namespace)
	somePod := l.podOf("node", "")
	return map[string]error{
		"list Secrets":                  c.List(ctx, &corev1.SecretList{}),
		"list Secrets in its namespace": c.List(ctx, &corev1.SecretList{}, here),
		"read a Secret": c.Get(ctx, client.ObjectKey{Namespace: "kube-system", Name: "any"},
			&corev1.Secret{}),
		"list pods":    c.List(ctx, &corev1.PodList{}, here),
		"delete a pod": c.Delete(ctx, somePod, client.DryRunAll),
		"create a pod": c.Create(ctx,
			&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: install.Namespace, Name: "mine"}}, client.DryRunAll),
		"run a command in a pod": c.SubResource("exec").Create(ctx, somePod, &corev1.Pod{}),
		"create a ClusterRoleBinding": c.Create(ctx,
			&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "mine"}}, client.DryRunAll),
		"delete a DaemonSet": c.Delete(ctx,
			&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: install.Namespace, Name: "k8slan-ds"}},
			client.DryRunAll),
		"label a node": c.Patch(ctx, nodeObject(worker1),
			merge(`{"metadata":{"labels":{"mine":""}}}`), client.DryRunAll),
		"give a node more of a resource": c.Status().Patch(ctx, nodeObject(worker1),
			merge(`{"status":{"capacity":{"cpu":"1000"}}}`), client.DryRunAll),
		"take a node's other resources": c.Status().Patch(ctx, nodeObject(worker1),
			merge(`{"status":{"capacity":{"memory":null}}}`), client.DryRunAll),
		"change the phase of a node": c.Status().Patch(ctx, nodeObject(worker1),
			merge(`{"status":{"phase":"Running"}}`), client.DryRunAll),
		"edit a LAN": c.Patch(ctx,
			&v1beta1.LAN{ObjectMeta: metav1.ObjectMeta{Namespace: l.namespace, Name: "rights"}},
			merge(`{"spec":{"spokes":["rights","more"]}}`), client.DryRunAll),
		"delete a LAN": c.Delete(ctx,
			&v1beta1.LAN{ObjectMeta: metav1.ObjectMeta{Namespace: l.namespace, Name: "rights"}}, client.DryRunAll),
	}
}

func nodeObject(name string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

func merge(patch string) client.Patch { return client.RawPatch(types.MergePatchType, []byte(patch)) }

func TestDaemonsTokenReachesNoSecretsAndNoOtherNode(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	l.lan("rights", 1078, []string{"rights"})
	own := l.account("k8slan-node", l.podOf("node", worker1))
	l.wantsRefused("the daemon of worker1", l.forbidden(ctx, own))

	// The node's own daemon writes the LANNode, too: a write after that is tried again with the new version.
	try := func(node string, do func(*v1beta1.LANNode) error) error {
		for {
			n := &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: node}}
			if err := l.bed.client.Get(ctx, client.ObjectKeyFromObject(n), n); err != nil {
				t.Fatal(err)
			}
			if err := do(n); !apierrors.IsConflict(err) {
				return err
			}
		}
	}
	write := func(c client.Client, node string) map[string]error {
		return map[string]error{
			"update LANNode " + node: try(node, func(n *v1beta1.LANNode) error {
				return c.Update(ctx, n, client.DryRunAll)
			}),
			"update status of LANNode " + node: try(node, func(n *v1beta1.LANNode) error {
				return c.Status().Update(ctx, n, client.DryRunAll)
			}),
			"delete LANNode " + node: try(node, func(n *v1beta1.LANNode) error {
				return c.Delete(ctx, n, client.DryRunAll)
			}),
		}
	}
	l.wantsRefused("the daemon of worker1", write(own, worker2))
	l.wantsRefused("a token of no node", write(l.account("k8slan-node", nil), worker2))
	made := own.Create(ctx, &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: "worker9"}}, client.DryRunAll)
	l.wantsRefused("the daemon of worker1", map[string]error{"create LANNode worker9": made})
	for what, err := range write(own, worker1) {
		if strings.HasPrefix(what, "delete") {
			continue // it may not delete its own LANNode either
		}
		// a conflict with the daemon itself means that the write was allowed
		if err != nil && !apierrors.IsConflict(err) {
			t.Errorf("the daemon of worker1: %s: %v", what, err)
		}
	}
}

func TestControllersTokenReachesNoSecretsPodsOrNodes(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	l.lan("rights", 1079, []string{"rights"})
	c := l.account("k8slan-controller", l.podOf("controller", ""))
	l.wantsRefused("the controller", l.forbidden(ctx, c))
	l.wantsRefused("the controller", map[string]error{
		"write a LANNode": c.Status().Patch(ctx, &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: worker1}},
			merge(`{"status":{"version":"x"}}`), client.DryRunAll),
		"label a LAN": c.Patch(ctx, &v1beta1.LAN{ObjectMeta: metav1.ObjectMeta{Namespace: l.namespace, Name: "rights"}},
			merge(`{"metadata":{"labels":{"mine":""}}}`), client.DryRunAll),
	})
	if err := c.List(ctx, &nadv1.NetworkAttachmentDefinitionList{}); err != nil {
		t.Errorf("the controller cannot list NADs: %v", err)
	}
}

func TestUsersWhoEditANamespaceMayHaveLANs(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	for user, role := range map[string]string{"viewer": "view", "editor": "edit", "owner": "admin"} {
		binding := &rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Namespace: l.namespace, Name: user},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
			Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: user}},
		}
		if err := l.bed.client.Create(ctx, binding); err != nil {
			t.Fatal(err)
		}
	}
	may := func(user, verb, what string) bool {
		resource, part, _ := strings.Cut(what, "/")
		out, err := l.bed.Kubectl(ctx, "auth", "can-i", verb, resource, "--subresource", part, "--as", user,
			"--namespace", l.namespace)
		return err == nil && strings.TrimSpace(out) == "yes"
	}
	for _, user := range []string{"viewer", "editor", "owner"} { // a binding has its effect a moment later
		l.machine(worker1).until("the rights of "+user, func() bool { return may(user, "list", "lans.lan.k8slan.io") })
	}
	for _, c := range []struct {
		user, verb, what string
		want             bool
	}{
		{"viewer", "create", "lans.lan.k8slan.io", false},
		{"editor", "create", "lans.lan.k8slan.io", true},
		{"editor", "patch", "lans.lan.k8slan.io/status", false},
		{"owner", "delete", "lans.lan.k8slan.io", true},
	} {
		if got := may(c.user, c.verb, c.what); got != c.want {
			t.Errorf("%s may %s %s: %t, want %t", c.user, c.verb, c.what, got, c.want)
		}
	}
}
