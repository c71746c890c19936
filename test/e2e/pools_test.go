package e2e

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// pool applies a LAN with one pool of the same name and further lines, and returns when it is Ready.
func (l lab) pool(name string, vni, size int, more ...string) {
	l.Helper()
	l.apply(fmt.Sprintf(`apiVersion: lan.k8slan.io/v1beta1
kind: LAN
metadata:
  name: %s
spec:
  vni: %d
  %[5]s
  spokePools:
  - name: %[1]s
    size: %[3]d
    %[4]s
`, name, vni, size, strings.Join(more, "\n    "), l.underlay.spec()))
	l.ready(name)
	for _, node := range []string{worker1, worker2} {
		l.awaitAllocatable(node, name, int64(size))
	}
}

// replicas creates a Deployment of number such pods. If the pod names no node, the Deployment spreads them evenly over
// the nodes.
func (l lab) replicas(g workload, number int) {
	l.Helper()
	var set appsv1.Deployment
	if err := yaml.Unmarshal([]byte(l.controlled("Deployment", g)), &set); err != nil {
		l.Fatal(err)
	}
	if g.Node == "" {
		spec := &set.Spec.Template.Spec
		spec.NodeSelector = nil
		spec.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{
			MaxSkew: 1, TopologyKey: corev1.LabelHostname, WhenUnsatisfiable: corev1.DoNotSchedule,
			LabelSelector: set.Spec.Selector,
		}}
	}
	replicas := int32(number)
	set.Namespace, set.Spec.Replicas = l.namespace, &replicas
	if err := l.bed.client.Create(l.Context(), &set); err != nil {
		l.Fatalf("create Deployment %s: %v", g.Name, err)
	}
}

// scale gives a Deployment another number of pods.
func (l lab) scale(name string, number int32) {
	l.Helper()
	set := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: l.namespace, Name: name}}
	patch := merge(fmt.Sprintf(`{"spec": {"replicas": %d}}`, number))
	if err := l.bed.client.Patch(l.Context(), set, patch); err != nil {
		l.Fatalf("scale Deployment %s: %v", name, err)
	}
}

// awaitPods returns a controller's pods once exactly number of them exist and all run.
func (l lab) awaitPods(ctx context.Context, name string, number int) []*corev1.Pod {
	l.Helper()
	which := []client.ListOption{client.InNamespace(l.namespace), client.MatchingLabels{appLabel: name}}
	all, err := await(ctx, l.bed.client, &corev1.PodList{}, which, func(all []*corev1.Pod) bool {
		return len(all) == number && !slices.ContainsFunc(all, func(p *corev1.Pod) bool { return !isRunning(p) })
	})
	if err != nil {
		l.Fatalf("waited for %d pods of %s to run: %v; there are %d", number, name, err, len(all))
	}
	return all
}

// hosts gives number pods of a controller an address each, and returns their hosts.
func (l lab) hosts(name string, number int) (all []host) {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	for i, p := range l.awaitPods(ctx, name, number) {
		s := host{lab: l, pod: p.Name, node: p.Spec.NodeName, uid: string(p.UID), link: "net1"}
		s.readLink()
		s.sh("ip addr flush dev net1")
		s.address(address(i+1) + "/24")
		all = append(all, s)
	}
	return all
}

// allPing wants each host to get answers from all others, and no two to have the same MAC.
func allPing(all []host) {
	all[0].Helper()
	macs := map[string]string{}
	for i, s := range all {
		if other := macs[s.mac.String()]; other != "" {
			s.Errorf("%s and %s have the MAC %s", other, s, s.mac)
		}
		macs[s.mac.String()] = s.String()
		var others []string
		for j := range all {
			if j != i {
				others = append(others, address(j+1))
			}
		}
		s.sh("for a in %s; do ping -c 1 -W 5 $a; done", strings.Join(others, " "))
	}
}

// awaitUse returns a LAN when its only pool has that many ports, of which that many have a pod.
func (l lab) awaitUse(name string, attached, ports int) *v1beta1.LAN {
	l.Helper()
	return l.awaitLAN(name, fmt.Sprintf("used %d/%d", attached, ports), func(lan *v1beta1.LAN) bool {
		return isUsed(lan, attached, ports)
	})
}

func isUsed(lan *v1beta1.LAN, attached, ports int) bool {
	p := lan.Status.Pools
	return len(p) == 1 && int(p[0].Attached) == attached && int(p[0].Ports) == ports
}

func TestDeploymentOnAPoolTalksIsScaledAndLeavesNothing(t *testing.T) {
	l := newLab(t)
	l.pool("web", 1150, 4)
	begin := time.Now()
	l.replicas(pod("web", "", "web"), 5)
	five := l.hosts("web", 5)
	l.logTime("until 5 pods on a pool of 2 nodes were attached and had addresses", begin)
	allPing(five)
	if mac := five[0].sh("echo $K8SLAN_WEB_MAC"); mac != five[0].mac.String() {
		t.Errorf("K8SLAN_WEB_MAC is %q, %s has %s", mac, five[0], five[0].mac)
	}
	lan := l.awaitUse("web", 5, 8)
	if lan.Status.Attached != 5 || lan.Status.SpokeCount != 4 || len(lan.Status.Spokes) != 0 ||
		len(lan.Status.Pools[0].Nodes) != 2 {
		t.Errorf("status is %+v", lan.Status)
	}
	seg := l.awaitSegment(worker1, "web", "attached", func(s v1beta1.SegmentStatus) bool {
		return len(s.Attachments) > 0
	})
	if a := seg.Attachments[0]; a.Spoke != "web_0" || a.Pool != "web" || seg.Offered != 4 {
		t.Errorf("worker1 advertises %d ports and has %+v first, want the port with the lowest number", seg.Offered, a)
	}

	l.scale("web", 8)
	eight := l.hosts("web", 8)
	allPing(eight)
	l.awaitUse("web", 8, 8)

	// The pool grows under the pods, then becomes smaller than its use. No pod loses its port.
	size := func(n int32) { l.edit("web", func(s *v1beta1.LANSpec) { s.SpokePools[0].Size = n }) }
	losesNothing(eight[0], eight[7], func() {
		size(6)
		l.awaitAllocatable(worker1, "web", 6)
		size(2)
		l.awaitAllocatable(worker1, "web", 2)
		exceeded := "pool web has size 2, and more pods are attached: 4 on worker1, 4 on worker2"
		l.awaitLAN("web", "exceeded", func(lan *v1beta1.LAN) bool {
			return meta.IsStatusConditionTrue(lan.Status.Conditions, v1beta1.ConditionPoolExceeded) &&
				strings.Contains(condition(lan, v1beta1.ConditionPoolExceeded).Message, exceeded) && isUsed(lan, 8, 4)
		})
		l.awaitEvent("web", v1beta1.ReasonShrunk, exceeded)
	})
	allPing(eight)
	size(4)
	l.awaitEvent("web", v1beta1.ReasonFits)

	l.scale("web", 0)
	l.awaitUse("web", 0, 8)
	two := pod("two", worker2, "web")
	two.Networks += ", " + two.Networks
	l.apply(strings.Replace(l.yaml(two), "veth-web: 1", "veth-web: 2", 1))
	l.host(two).sh("ip link show net1 && ip link show net2")
	l.awaitUse("web", 2, 8)
	l.delete(&corev1.Pod{}, "two")
	l.awaitUse("web", 0, 8)
	for _, m := range l.machines() {
		m.awaitLinks(l.namespace+".web", "all ports, waiting for pods", func(links linkList) bool {
			ports := slices.DeleteFunc(slices.Clone(links), func(l netlink.Link) bool {
				return !strings.HasPrefix(l.Attrs().Name, "web_")
			})
			return len(ports) == 8 && len(links) == 8+3 // lo, bridge and VXLAN
		})
		m.until("the end of the CDI devices", func() bool {
			return !slices.ContainsFunc(m.files("/var/run/cdi"), func(f string) bool {
				return strings.Contains(f, "spoke_web_")
			})
		})
	}
	l.delete(&v1beta1.LAN{}, "web")
	l.awaitGone("web")
	for _, m := range l.machines() {
		m.awaitNothingOfLAN("web")
		m.until("the end of the device plugin", func() bool {
			return !slices.Contains(m.files("/var/lib/kubelet/device-plugins"), "k8slan-web.sock")
		})
	}
}

func TestStatefulSetKeepsItsMACsByOrdinal(t *testing.T) {
	l := newLab(t)
	l.pool("db", 1151, 3, "macBy: ordinal")
	l.apply(l.controlled("StatefulSet", pod("db", worker1, "db")))
	set := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: l.namespace, Name: "db"}}
	change := func(patch string) {
		t.Helper()
		if err := l.bed.client.Patch(t.Context(), set, merge(patch)); err != nil {
			t.Fatal(err)
		}
	}
	change(`{"spec": {"replicas": 2}}`)
	macs := func(node string) map[string]string {
		t.Helper()
		l.onlyPodOf("db", "on "+node, func(p *corev1.Pod) bool {
			return p.Name == "db-0" && p.Spec.NodeName == node && isRunning(p)
		})
		l.onlyPodOf("db", "on "+node, func(p *corev1.Pod) bool {
			return p.Name == "db-1" && p.Spec.NodeName == node && isRunning(p)
		})
		all := l.hosts("db", 2)
		allPing(all)
		have := map[string]string{}
		for _, s := range all {
			have[s.pod] = s.mac.String()
		}
		return have
	}
	before := macs(worker1)
	change(`{"spec": {"template": {"spec": {"nodeSelector": {"kubernetes.io/hostname": "worker2"}}}}}`)
	if after := macs(worker2); !maps.Equal(before, after) {
		t.Errorf("on worker1 the MACs were %v, on worker2 %v", before, after)
	}
	l.create(pod("nameless", worker1, "db"))
	l.awaitEvent("nameless", "FailedCreatePodSandBox",
		`the pod has no ordinal: pool db derives MACs from it, and the pod is called "nameless"`, "macBy: ordinal")
}

func TestFullNodeHasAPortForEachPod(t *testing.T) {
	l := newLab(t)
	fit := l.roomOn(worker1)
	l.pool("full", 1152, fit)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	begin := time.Now()
	l.replicas(pod("full", worker1, "full"), fit)
	l.awaitPods(ctx, "full", fit)
	l.logTime(fmt.Sprintf("until %d pods ran, with a port of a pool each", fit), begin)
	l.awaitUse("full", fit, 2*fit)
	l.scale("full", 0)
	l.awaitPods(ctx, "full", 0)
	l.awaitUse("full", 0, 2*fit)
}

// roomOn returns how many more pods a node accepts.
func (l lab) roomOn(node string) int {
	l.Helper()
	n := one(l, &corev1.NodeList{}, "", node, "there", func(n *corev1.Node) bool { return n != nil })
	room := int(n.Status.Allocatable.Pods().Value())
	var pods corev1.PodList
	if err := l.bed.client.List(l.Context(), &pods, client.MatchingFields{"spec.nodeName": node}); err != nil {
		l.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed {
			room--
		}
	}
	return room
}
