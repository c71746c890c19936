package chart

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/cluster"
)

const (
	chart     = "../../charts/k8slan"
	generated = "../../crd/manifests"
)

func TestEveryNamespacedObjectIsInTheReleasesNamespace(t *testing.T) {
	clusterWide := []string{
		"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition",
		"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding",
	}
	for _, o := range render(t, "blue") {
		if got := o.GetNamespace(); got != "blue" && !slices.Contains(clusterWide, o.GetKind()) {
			t.Errorf("%s %s is in namespace %q, want blue", o.GetKind(), o.GetName(), got)
		}
		for _, subject := range subjects(o) {
			if subject.Namespace != "blue" {
				t.Errorf("%s %s binds the account %s of namespace %q, want blue", o.GetKind(), o.GetName(),
					subject.Name, subject.Namespace)
			}
		}
	}
}

func TestControllerAndReflectorsRunWithoutPrivileges(t *testing.T) {
	for _, name := range []string{"k8slan-controller-manager", "k8slan-reflector"} {
		pod := find[appsv1.Deployment](t, render(t, "k8slan-system", "evpn.enabled=true"), name).Spec.Template.Spec
		if pod.HostNetwork || pod.HostPID || pod.HostIPC || len(pod.Volumes) > 0 {
			t.Errorf("%s: the pod uses the node's namespaces or has volumes", name)
		}
		if !*pod.SecurityContext.RunAsNonRoot ||
			pod.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
			t.Errorf("%s: the pod has security context %+v", name, pod.SecurityContext)
		}
		for _, c := range pod.Containers {
			if s := c.SecurityContext; *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem ||
				!slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
				t.Errorf("%s: container %s has security context %+v", name, c.Name, s)
			}
		}
	}
}

// Reflectors run only if LANs may use EVPN. Passwords come from mounted Secrets and are in no arguments.
func TestReflectorsRunOnlyWithEVPN(t *testing.T) {
	for _, o := range render(t, "k8slan-system") {
		if strings.Contains(o.GetName(), "reflector") {
			t.Errorf("without EVPN the chart has %s %s", o.GetKind(), o.GetName())
		}
	}
	for _, value := range []string{"discovery=evpn", "evpn.enabled=true"} {
		objects := render(t, "k8slan-system", value, "evpn.as=4200000000", "evpn.reflectors.passwordSecret=inside",
			"evpn.peers[0].address=192.0.2.1", "evpn.peers[1].address=2001:db8::1", "evpn.peers[1].as=4200000001",
			"evpn.peers[1].port=1179",
			"evpn.peers[1].holdTime=30s", "evpn.peers[1].multihop=2", "evpn.peers[1].passwordSecret=outside",
			"evpn.peers[1].ipv6VTEPs=true")
		daemon := find[appsv1.DaemonSet](t, objects, "k8slan-ds").Spec.Template
		for _, want := range []string{
			"--evpn-as=4200000000", "--evpn-reflectors=k8slan-reflector",
			"--evpn-reflectors-password-file=/etc/k8slan/bgp/reflectors/password",
			"--evpn-peer=address=192.0.2.1",
			"--evpn-peer=address=2001:db8::1,port=1179,as=4200000001,hold-time=30s,multihop=2," +
				"password-file=/etc/k8slan/bgp/peer-1/password,ipv6-vteps",
		} {
			if !slices.Contains(daemon.Spec.Containers[0].Args, want) {
				t.Errorf("%s: the daemon's arguments lack %s: %q", value, want, daemon.Spec.Containers[0].Args)
			}
		}
		deployment := find[appsv1.Deployment](t, objects, "k8slan-reflector")
		reflector := deployment.Spec.Template
		mounts := map[string][]corev1.PodTemplateSpec{"inside": {daemon, reflector}, "outside": {daemon}}
		for secret, pods := range mounts {
			for _, pod := range pods {
				i := slices.IndexFunc(pod.Spec.Volumes,
					func(v corev1.Volume) bool { return v.Secret != nil && v.Secret.SecretName == secret })
				if i < 0 || !slices.ContainsFunc(pod.Spec.Containers[0].VolumeMounts,
					func(m corev1.VolumeMount) bool { return m.Name == pod.Spec.Volumes[i].Name }) {
					t.Errorf("%s: Secret %s is not mounted into %s", value, secret, pod.Spec.Containers[0].Name)
				}
			}
		}
		if *deployment.Spec.Replicas != 2 || !slices.Contains(reflector.Spec.Containers[0].Args, "--as=4200000000") ||
			*reflector.Spec.AutomountServiceAccountToken {
			t.Errorf("%s: the reflectors are %+v", value, deployment.Spec)
		}
		service, policy := find[corev1.Service](t, objects, "k8slan-reflector"),
			find[networkingv1.NetworkPolicy](t, objects, "k8slan-reflector")
		if !labels.SelectorFromSet(service.Spec.Selector).Matches(labels.Set(reflector.Labels)) ||
			service.Spec.Ports[0].Port != reflector.Spec.Containers[0].Ports[0].ContainerPort {
			t.Errorf("%s: the Service does not select the reflectors: %+v", value, service.Spec)
		}
		if !labels.SelectorFromSet(policy.Spec.PodSelector.MatchLabels).Matches(labels.Set(reflector.Labels)) ||
			policy.Spec.Ingress[0].Ports[0].Port.IntVal != service.Spec.Ports[0].Port {
			t.Errorf("%s: the NetworkPolicy does not let nodes in: %+v", value, policy.Spec)
		}
	}
	for _, o := range render(t, "k8slan-system", "evpn.enabled=true", "evpn.reflectors.replicas=0",
		"evpn.peers[0].address=192.0.2.1") {
		if strings.Contains(o.GetName(), "reflector") {
			t.Errorf("with replicas 0 the chart has %s %s", o.GetKind(), o.GetName())
		}
	}
}

func TestNeverTwoDaemonsOnANode(t *testing.T) {
	daemons := find[appsv1.DaemonSet](t, render(t, "k8slan-system"), "k8slan-ds")
	if surge := daemons.Spec.UpdateStrategy.RollingUpdate.MaxSurge; surge.IntValue() != 0 {
		t.Errorf("maxSurge is %s, want 0: kubelet drops the second of two daemons that register one spoke", surge)
	}
}

func TestRightsHaveNoWildcards(t *testing.T) {
	for _, o := range render(t, "k8slan-system") {
		if o.GetKind() != "ClusterRole" && o.GetKind() != "Role" {
			continue
		}
		for _, rule := range convert[rbacv1.ClusterRole](t, o).Rules {
			if slices.Contains(slices.Concat(rule.APIGroups, rule.Resources, rule.Verbs), "*") {
				t.Errorf("%s %s has a wildcard: %v", o.GetKind(), o.GetName(), rule)
			}
			onlyReadsPods := o.GetKind() == "Role" &&
				!slices.ContainsFunc(rule.Verbs, func(v string) bool { return v != "list" && v != "watch" })
			if slices.Contains(rule.Resources, "secrets") || slices.Contains(rule.Resources, "pods") && !onlyReadsPods {
				t.Errorf("%s %s has rights it does not need: %v", o.GetKind(), o.GetName(), rule)
			}
		}
	}
}

func TestValuesReachTheDaemon(t *testing.T) {
	daemons := find[appsv1.DaemonSet](t, render(t, "k8slan-system",
		"image.repository=registry.example/k8slan", "image.tag=v7", "node.cniBinDir=/usr/libexec/cni",
		"node.kubeletDir=/var/lib/k0s/kubelet"), "k8slan-ds")
	pod := daemons.Spec.Template.Spec
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		if c.Image != "registry.example/k8slan:v7" {
			t.Errorf("container %s has image %s", c.Name, c.Image)
		}
	}
	host := map[string]string{}
	for _, v := range pod.Volumes {
		host[v.Name] = v.HostPath.Path
	}
	want := map[string]string{
		"run": "/run/k8slan", "cdi": "/var/run/cdi",
		"device-plugins": "/var/lib/k0s/kubelet/device-plugins", "pod-resources": "/var/lib/k0s/kubelet/pod-resources",
		"cni-bin": "/usr/libexec/cni",
	}
	if !maps.Equal(host, want) {
		t.Errorf("paths on the node are %v, want %v", host, want)
	}
}

func TestMegalosFlagFollowsItsValue(t *testing.T) {
	for _, on := range []bool{false, true} {
		daemons := find[appsv1.DaemonSet](t, render(t, "k8slan-system",
			fmt.Sprintf("evpn.enabled=true,node.megalos=%t", on)), "k8slan-ds")
		if has := slices.Contains(daemons.Spec.Template.Spec.Containers[0].Args, "--megalos"); has != on {
			t.Errorf("node.megalos=%t: --megalos is %t", on, has)
		}
	}
}

func TestInvalidValuesAreRefused(t *testing.T) {
	for _, value := range []string{
		"node.cniBinDirectory=/opt/cni/bin", "image.pullPolicy=Sometimes", "node.healthPort=70000",
		"node.cniBinDir=opt/cni/bin", "logLevel=chatty", "controller.replicas=-1",
		"limits.vniRange={1000}", "limits.vniRange={1000,20000000}", "limits.vniRange={2000,1000}",
		"limits.underlayDevices=eth1",
		"networkPolicy.apiServerPorts=null", "discovery=bgp", "evpn.as=0", "evpn.peers[0].port=179",
		"evpn.reflectors.port=179",
		"evpn.enabled=true,evpn.reflectors.replicas=0", "evpn.peers[0].address=192.0.2.1,evpn.peers[0].holdTime=1s",
		"vtepCIDRs={10.20.0.1}", "node.megalos=perhaps", "node.megalos=true", "vtepCIDRs=10.20.0.0/16",
	} {
		if _, err := helm(t, "template", "k8slan", chart, "--kube-version", "1.31.0", "--set", value); err == nil {
			t.Errorf("helm accepts %s", value)
		}
	}
}

func TestManifestHasNamespaceAndCRDs(t *testing.T) {
	kinds := map[string]int{}
	for _, o := range renderWith(t, []string{"--no-hooks"}, "k8slan-system", "createNamespace=true") {
		if o.GetAnnotations()["helm.sh/hook"] != "" {
			t.Errorf("the manifest has %s %s, a hook that kubectl would create at once", o.GetKind(), o.GetName())
		}
		kinds[o.GetKind()]++
		if o.GetKind() == "Namespace" && o.GetName() != "k8slan-system" {
			t.Errorf("the manifest has namespace %s, want k8slan-system", o.GetName())
		}
	}
	if kinds["Namespace"] != 1 || kinds["CustomResourceDefinition"] != 2 {
		t.Errorf("the manifest has %d namespaces and %d CRDs, want 1 and 2", kinds["Namespace"],
			kinds["CustomResourceDefinition"])
	}
}

func TestChartHasTheGeneratedCRDs(t *testing.T) {
	want, have := manifests(t, generated), manifests(t, filepath.Join(chart, "crds"))
	if !maps.Equal(want, have) {
		t.Errorf("%s and %s/crds differ: run make generate", generated, chart)
	}
}

func TestEveryValueHasAComment(t *testing.T) {
	values, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(values), "\n")
	for i, line := range lines {
		key := strings.TrimLeft(line, " ")
		indent := len(line) - len(key)
		if name, _, ok := strings.Cut(key, ":"); ok && indent <= 2 && !strings.HasPrefix(key, "#") &&
			!strings.HasPrefix(key, "-") {
			if i == 0 || !strings.HasPrefix(strings.TrimSpace(lines[i-1]), "#") {
				t.Errorf("values.yaml:%d: %s has no comment above it", i+1, name)
			}
		}
	}
}

func TestEveryValueIsInTheSchemaWithADescription(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join(chart, "values.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	type property struct {
		Description string
		Properties  map[string]property
	}
	var schema property
	if err := json.Unmarshal(raw, &schema); err != nil {
		t.Fatal(err)
	}
	var check func(path string, p property, depth int)
	check = func(path string, p property, depth int) {
		if p.Description == "" {
			t.Errorf("values.schema.json lacks a description of %s", path)
		}
		for name, below := range p.Properties {
			if depth < 2 {
				check(path+"."+name, below, depth+1)
			}
		}
	}
	for name, p := range schema.Properties {
		check(name, p, 1)
	}
	values, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var defaults map[string]any
	if err := yaml.Unmarshal(values, &defaults); err != nil {
		t.Fatal(err)
	}
	for name, value := range defaults {
		below, _ := value.(map[string]any)
		for sub := range below {
			if _, ok := schema.Properties[name].Properties[sub]; !ok {
				t.Errorf("values.schema.json lacks %s.%s", name, sub)
			}
		}
		if _, ok := schema.Properties[name]; !ok {
			t.Errorf("values.schema.json lacks %s", name)
		}
	}
}

func TestDisruptionBudgetOnlyWithTwoControllers(t *testing.T) {
	for replicas, want := range map[string]int{"1": 0, "2": 1} {
		budgets := 0
		for _, o := range render(t, "k8slan-system", "controller.replicas="+replicas) {
			if o.GetKind() == "PodDisruptionBudget" {
				budgets++
			}
		}
		if budgets != want {
			t.Errorf("%s replicas have %d disruption budgets, want %d: with a single pod a budget would block every "+
				"drain", replicas, budgets, want)
		}
	}
}

func TestOnlyTheDaemonIsPrivileged(t *testing.T) {
	for _, o := range renderAll(t) {
		pod, ok, err := unstructured.NestedMap(o.Object, "spec", "template", "spec")
		if !ok || err != nil {
			continue
		}
		var spec corev1.PodSpec
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(pod, &spec); err != nil {
			t.Fatal(err)
		}
		for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
			s := c.SecurityContext
			if s == nil || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
				t.Errorf("%s, container %s: its root file system is writable", o.GetName(), c.Name)
				continue
			}
			privileged := s.Privileged != nil && *s.Privileged
			if privileged != slices.Contains(privilegedContainers, o.GetName()+"/"+c.Name) {
				t.Errorf("%s, container %s: privileged is %t", o.GetName(), c.Name, privileged)
			}
		}
	}
}

// privilegedContainers are the containers that create and remove network namespaces on a node.
var privilegedContainers = []string{"k8slan-ds/node", "k8slan-clean/clean"}

func TestHelmTestStaysWithinLimits(t *testing.T) {
	for _, c := range []struct {
		values []string
		vni    int32
		device string
	}{
		{nil, 16777215, ""},
		{[]string{"limits.vniRange={1000,1999}", "limits.underlayDevices={eth1,eth2}"}, 1999, "eth1"},
		{[]string{"limits.underlayDevices={eth1,}"}, 16777215, ""},
		{[]string{"limits.vniRange={1000,1999}", "test.vni=1500", "test.underlayDevice=eth3"}, 1500, "eth3"},
	} {
		lan := find[v1beta1.LAN](t, render(t, "k8slan-system", c.values...), "k8slan-test")
		if lan.Spec.VNI != c.vni || string(lan.Spec.DefaultVXLANDev) != c.device {
			t.Errorf("%v: helm test uses VNI %d over %q, want %d over %q", c.values, lan.Spec.VNI,
				lan.Spec.DefaultVXLANDev, c.vni, c.device)
		}
	}
}

func TestMetricsAreOffUnlessSet(t *testing.T) {
	for _, set := range [][]string{
		nil, {"node.metricsPort=9100", "controller.metricsPort=9101", "evpn.reflectors.metricsPort=9102"},
	} {
		objects := render(t, "k8slan-system", append(set, "evpn.enabled=true")...)
		node := find[appsv1.DaemonSet](t, objects, "k8slan-ds").Spec.Template.Spec.Containers[0]
		controller := find[appsv1.Deployment](t, objects, "k8slan-controller-manager").Spec.Template.Spec.Containers[0]
		reflector := find[appsv1.Deployment](t, objects, "k8slan-reflector").Spec.Template.Spec.Containers[0]
		on := set != nil
		for i, c := range []corev1.Container{node, controller, reflector} {
			if slices.Contains(c.Args, fmt.Sprintf("--metrics-address=:%d", 9100+i)) != on {
				t.Errorf("with %v the %s has arguments %q", set, c.Name, c.Args)
			}
		}
		more := 0
		if on {
			more = 1
		}
		for name, ports := range map[string]int{"k8slan-controller-manager": 1, "k8slan-reflector": 2} {
			policy := find[networkingv1.NetworkPolicy](t, objects, name)
			if len(policy.Spec.Ingress[0].Ports) != ports+more {
				t.Errorf("with %v NetworkPolicy %s allows ports %v", set, name, policy.Spec.Ingress[0].Ports)
			}
		}
	}
}

func TestPodMonitorSelectsPodsWithMetrics(t *testing.T) {
	objects := render(t, "k8slan-system", "podMonitor.enabled=true", "podMonitor.labels.release=prometheus",
		"node.metricsPort=9100", "controller.metricsPort=9101",
		"evpn.enabled=true", "evpn.reflectors.metricsPort=9102")
	i := slices.IndexFunc(objects, func(o unstructured.Unstructured) bool { return o.GetKind() == "PodMonitor" })
	if i < 0 {
		t.Fatal("the chart has no PodMonitor")
	}
	if objects[i].GetLabels()["release"] != "prometheus" {
		t.Errorf("the PodMonitor has labels %v", objects[i].GetLabels())
	}
	selector, _, err := unstructured.NestedStringMap(objects[i].Object, "spec", "selector", "matchLabels")
	if err != nil {
		t.Fatal(err)
	}
	for name, pod := range map[string]corev1.PodTemplateSpec{
		"daemon":     find[appsv1.DaemonSet](t, objects, "k8slan-ds").Spec.Template,
		"controller": find[appsv1.Deployment](t, objects, "k8slan-controller-manager").Spec.Template,
		"reflector":  find[appsv1.Deployment](t, objects, "k8slan-reflector").Spec.Template,
	} {
		if !labels.SelectorFromSet(selector).Matches(labels.Set(pod.Labels)) {
			t.Errorf("the PodMonitor does not select the %s", name)
		}
		if !slices.ContainsFunc(pod.Spec.Containers[0].Ports,
			func(p corev1.ContainerPort) bool { return p.Name == "metrics" }) {
			t.Errorf("the %s has no port called metrics, which the PodMonitor scrapes", name)
		}
	}
	_, err = helm(t, "template", "k8slan", chart, "--kube-version", "1.31.0", "--set", "podMonitor.enabled=true")
	const want = "needs node.metricsPort, controller.metricsPort or evpn.reflectors.metricsPort"
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("without a port: %v", err)
	}
}

func TestHelmLintPasses(t *testing.T) {
	if out, err := helm(t, "lint", "--strict", "--quiet", chart); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// render returns all objects of the chart, CRDs included, for an installation in the namespace with these values, such
// as "image.tag=v7".
func render(t *testing.T, namespace string, set ...string) []unstructured.Unstructured {
	t.Helper()
	return renderWith(t, nil, namespace, set...)
}

// renderWith does what render does, with more flags for Helm.
func renderWith(t *testing.T, flags []string, namespace string, set ...string) []unstructured.Unstructured {
	t.Helper()
	args := append([]string{
		"template", "k8slan", chart, "--namespace", namespace, "--include-crds", "--kube-version",
		"1.31.0",
	}, flags...)
	for _, value := range set {
		args = append(args, "--set", value)
	}
	out, err := helm(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	var objects []unstructured.Unstructured
	decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(out), 4096)
	for {
		var o unstructured.Unstructured
		err := decoder.Decode(&o.Object)
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatalf("decode helm's output: %v", err)
		}
		if o.Object != nil {
			objects = append(objects, o)
		}
	}
}

// helm runs the test cluster's Helm and returns its standard output.
func helm(t *testing.T, args ...string) ([]byte, error) {
	t.Helper()
	dir, err := cluster.Build(t.Context(), cluster.Config{
		CacheDir: cluster.CacheDir(os.Getenv),
		Log:      slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}, "helm")
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), filepath.Join(dir, "helm"), args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("helm %s: %w\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return out, nil
}

func find[T any](t *testing.T, objects []unstructured.Unstructured, name string) T {
	t.Helper()
	kind := reflect.TypeFor[T]().Name()
	i := slices.IndexFunc(objects, func(o unstructured.Unstructured) bool {
		return o.GetKind() == kind && o.GetName() == name
	})
	if i < 0 {
		t.Fatalf("the chart has no %s %s", kind, name)
	}
	return convert[T](t, objects[i])
}

func convert[T any](t *testing.T, o unstructured.Unstructured) T {
	t.Helper()
	var object T
	if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(o.Object, &object, true); err != nil {
		t.Fatalf("%s %s: %v", o.GetKind(), o.GetName(), err)
	}
	return object
}

func subjects(o unstructured.Unstructured) []rbacv1.Subject {
	var binding rbacv1.ClusterRoleBinding
	if !strings.HasSuffix(o.GetKind(), "Binding") ||
		runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &binding) != nil {
		return nil
	}
	return binding.Subjects
}

// manifests returns the contents of the YAML files in dir by name.
func manifests(t *testing.T, dir string) map[string]string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil || len(names) == 0 {
		t.Fatalf("%s has no YAML files (%v)", dir, err)
	}
	files := map[string]string{}
	for _, name := range names {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Base(name)] = string(content)
	}
	return files
}
