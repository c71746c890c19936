package e2e

import (
	"context"
	"embed"
	"fmt"
	"slices"
	"strings"
	"text/template"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// networksAnnotation is where a pod asks Multus for networks.
const networksAnnotation = "k8s.v1.cni.cncf.io/networks"

//go:embed manifests
var manifests embed.FS

// manifest returns one of the manifests, with its template filled in.
func (l lab) manifest(name string, with any) string {
	l.Helper()
	t, err := template.New(name+".yaml").Option("missingkey=error").ParseFS(manifests, "manifests/"+name+".yaml")
	if err != nil {
		l.Fatal(err)
	}
	var out strings.Builder
	if err := t.Execute(&out, with); err != nil {
		l.Fatal(err)
	}
	return out.String()
}

// workload is a pod or a VM as a user describes it.
type workload struct {
	Name, Node string
	Networks   string   // the value of the annotation
	Spokes     []string // one resource limit each
	Addresses  string   // of a VM's guest, with prefix lengths, separated by commas
	Plain      bool     // a VM whose NIC offers its guest no offloads
	Wait       bool     // a VM that opens its tap, but starts QEMU only on command
	vm         bool
}

// pod returns a pod on one spoke.
func pod(name, node, spoke string) workload {
	return workload{Name: name, Node: node, Networks: v1beta1.VethNAD(spoke), Spokes: []string{spoke}}
}

// vm returns a VM on one spoke, whose interface has the name that KubeVirt uses.
func vm(name, node, spoke string, addresses ...string) workload {
	return workload{
		Name: name, Node: node, Networks: v1beta1.MacvtapNAD(spoke) + "@" + tapName, Spokes: []string{spoke},
		Addresses: strings.Join(addresses, ","), vm: true,
	}
}

// tapName is KubeVirt's name for a pod's interface: "pod" and 11 hexadecimal digits of a hash of the network's name.
const tapName = "pod37a8eec1ce1"

// yaml returns the workload's manifest.
func (l lab) yaml(g workload) string {
	l.Helper()
	if g.vm {
		return l.manifest("vm", g)
	}
	return l.manifest("pod", g)
}

// create creates pods and VMs.
func (l lab) create(all ...workload) {
	l.Helper()
	for _, g := range all {
		l.apply(l.yaml(g))
	}
}

// start creates pods and VMs, and returns their hosts once they run.
func (l lab) start(all ...workload) []host {
	l.Helper()
	l.create(all...)
	var hosts []host
	for _, g := range all {
		hosts = append(hosts, l.host(g))
	}
	return hosts
}

// startSet creates a StatefulSet of one pod on one spoke, and returns the pod's host once it runs. If kubelet rejects
// the pod, the StatefulSet creates it again.
func (l lab) startSet(name, node, spoke string) host {
	l.Helper()
	l.apply(l.controlled("StatefulSet", pod(name, node, spoke)))
	return l.host(pod(name+"-0", node, spoke))
}

// controlled returns the manifest of a StatefulSet or a Deployment of one such workload.
func (l lab) controlled(kind string, g workload) string {
	l.Helper()
	template := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(l.yaml(g)), &template.Object); err != nil {
		l.Fatal(err)
	}
	labels := map[string]any{appLabel: g.Name}
	set := map[string]any{
		"apiVersion": "apps/v1", "kind": kind, "metadata": map[string]any{"name": g.Name},
		"spec": map[string]any{
			"selector": map[string]any{"matchLabels": labels},
			"template": map[string]any{
				"metadata": map[string]any{"labels": labels, "annotations": template.GetAnnotations()},
				"spec":     template.Object["spec"],
			},
		},
	}
	manifest, err := yaml.Marshal(set)
	if err != nil {
		l.Fatal(err)
	}
	return string(manifest)
}

// appLabel marks the pods of a controller.
const appLabel = "app"

// onlyPodOf returns the pod of a controller once it fits.
func (l lab) onlyPodOf(name, what string, fits func(*corev1.Pod) bool) *corev1.Pod {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	which := []client.ListOption{client.InNamespace(l.namespace), client.MatchingLabels{appLabel: name}}
	all, err := await(ctx, l.bed.client, &corev1.PodList{}, which, func(all []*corev1.Pod) bool {
		return slices.ContainsFunc(all, fits)
	})
	if err != nil {
		l.Fatalf("waited for a pod of %s to be %s: %v", name, what, err)
	}
	return all[slices.IndexFunc(all, fits)]
}

// host returns the host of a workload once it runs.
func (l lab) host(g workload) host {
	l.Helper()
	p := l.awaitRunning(g.Name)
	s := host{lab: l, pod: p.Name, node: p.Spec.NodeName, uid: string(p.UID), link: "net1"}
	if _, name, ok := strings.Cut(g.Networks, "@"); ok {
		s.link = name
	}
	if g.vm {
		if g.Wait {
			return s
		}
		s.prefix, s.link = []string{"/vm", "exec"}, "eth0"
	}
	s.readLink()
	return s
}

// awaitPod returns the pod once it fits.
func (l lab) awaitPod(name, what string, fits func(*corev1.Pod) bool) *corev1.Pod {
	l.Helper()
	return one(l, &corev1.PodList{}, l.namespace, name, what, func(p *corev1.Pod) bool { return p != nil && fits(p) })
}

// awaitRunning returns the pod once all its containers run.
func (l lab) awaitRunning(name string) *corev1.Pod {
	l.Helper()
	return l.awaitPod(name, "Running", isRunning)
}

func isRunning(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil &&
		len(p.Status.ContainerStatuses) == len(p.Spec.Containers) &&
		!slices.ContainsFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return !c.Ready })
}

// awaitPending returns when the scheduler has found that no node has the spoke's resource.
func (l lab) awaitPending(name, spoke string) {
	l.Helper()
	l.awaitPod(name, "unschedulable for want of spoke "+spoke, func(p *corev1.Pod) bool {
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
				return p.Status.Phase == corev1.PodPending &&
					strings.Contains(c.Message, "Insufficient "+v1beta1.Resource(spoke))
			}
		}
		return false
	})
}

// awaitAllocatable returns when a node has count of a spoke's resource for the scheduler.
func (l lab) awaitAllocatable(node, spoke string, count int64) {
	l.Helper()
	one(l, &corev1.NodeList{}, "", node, fmt.Sprintf("with %d of spoke %s", count, spoke), func(n *corev1.Node) bool {
		if n == nil {
			return false
		}
		have := n.Status.Allocatable[corev1.ResourceName(v1beta1.Resource(spoke))]
		return have.Value() == count
	})
}

// awaitPodGone returns when there is no pod of that name.
func (l lab) awaitPodGone(name string) {
	l.Helper()
	one(l, &corev1.PodList{}, l.namespace, name, "gone", func(p *corev1.Pod) bool { return p == nil })
}

// lan applies a LAN with spokes and further lines of its spec, and returns when it is Ready.
func (l lab) lan(name string, vni int, spokes []string, more ...string) *v1beta1.LAN {
	l.Helper()
	l.apply(l.lanYAML(name, vni, spokes, more...))
	return l.ready(name)
}

// pair creates a LAN with a pod on each node, gives the pods addresses, and lets one ping the other. The LAN has a
// third spoke; the spokes are called like the LAN, with -1, -2 and -3.
func (l lab) pair(name string, vni int, more ...string) (one, two host) {
	l.Helper()
	l.lan(name, vni, []string{name + "-1", name + "-2", name + "-3"}, more...)
	both := l.start(pod(name+"-1", worker1, name+"-1"), pod(name+"-2", worker2, name+"-2"))
	for i, s := range both {
		s.address(address(i+1) + "/24")
	}
	both[0].pings(address(2))
	return both[0], both[1]
}

// address returns the address of one pod of a pair.
func address(i int) string { return fmt.Sprintf("10.99.0.%d", i) }

func (l lab) lanYAML(name string, vni int, spokes []string, more ...string) string {
	return fmt.Sprintf(`apiVersion: lan.k8slan.io/v1beta1
kind: LAN
metadata:
  name: %s
spec:
  vni: %d
  spokes: [%s]
  %s
  %s
`, name, vni, strings.Join(spokes, ", "), l.underlay.spec(), strings.Join(more, "\n  "))
}
