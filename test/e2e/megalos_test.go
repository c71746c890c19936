package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/frames"
)

// network applies a network of type megalos, as Kathará writes it.
func (l lab) network(name string, vni int) {
	l.Helper()
	l.apply(fmt.Sprintf(`apiVersion: k8s.cni.cncf.io/v1
kind: NetworkAttachmentDefinition
metadata:
  name: %s
spec:
  config: '{"cniVersion": "0.3.0", "name": "%[1]s", "type": "megalos", "suffix": "%s", "vxlanId": %d, "master": "%s"}'
`, name, l.namespace[len("e2e-"):], vni, l.underlay.device))
}

// attachmentRequest is an interface that a pod asks Multus for.
type attachmentRequest struct {
	Name      string `json:"name"` // of the network
	Namespace string `json:"namespace"`
	Interface string `json:"interface"`
	MAC       string `json:"mac,omitempty"`
}

// katharaPod returns a pod as Kathará creates it: only its interfaces name its networks.
func (l lab) katharaPod(name, node string, interfaces ...attachmentRequest) workload {
	l.Helper()
	for i := range interfaces {
		interfaces[i].Namespace, interfaces[i].Interface = l.namespace, "net"+strconv.Itoa(i)
	}
	networks, err := json.Marshal(interfaces)
	if err != nil {
		l.Fatal(err)
	}
	return workload{Name: name, Node: node, Networks: string(networks)}
}

// katharaHosts returns the hosts of a pod once it runs, one for each interface. They must have the requested MACs.
func (l lab) katharaHosts(g workload) (all []host) {
	l.Helper()
	var requests []attachmentRequest
	if err := json.Unmarshal([]byte(g.Networks), &requests); err != nil {
		l.Fatal(err)
	}
	p := l.awaitRunning(g.Name)
	for _, i := range requests {
		s := host{lab: l, pod: p.Name, node: p.Spec.NodeName, uid: string(p.UID), link: i.Interface}
		s.readLink()
		if i.MAC != "" && s.mac.String() != i.MAC {
			l.Errorf("%s of %s has MAC %s, want %s", i.Interface, g.Name, s.mac, i.MAC)
		}
		if s.mtu != l.underlay.mtu {
			l.Errorf("%s of %s has MTU %d", i.Interface, g.Name, s.mtu)
		}
		all = append(all, s)
	}
	return all
}

// awaitVNI returns what a node reports of an on-demand LAN once exactly these pods are attached there, each with its
// MAC.
func (l lab) awaitVNI(node string, vni int, pods map[string]string) v1beta1.SegmentStatus {
	l.Helper()
	var found v1beta1.SegmentStatus
	one(l, &v1beta1.LANNodeList{}, "", node, fmt.Sprintf("with VNI %d and the pods %v", vni, pods),
		func(n *v1beta1.LANNode) bool {
			if n == nil {
				return false
			}
			found = v1beta1.SegmentStatus{}
			for _, s := range n.Status.Segments {
				if s.LAN == fmt.Sprintf("megalos:%d", vni) {
					found = s
				}
			}
			have := map[string]string{}
			for _, a := range found.Attachments {
				have[strings.TrimPrefix(a.Pod, l.namespace+"/")] = a.MAC
			}
			return maps.Equal(have, pods) && (found.State == v1beta1.SegmentReady || len(pods) == 0 && found.LAN == "")
		})
	return found
}

// vniFiles returns the paths of the files and mounts that a node has of on-demand LANs.
func (m machine) vniFiles() (names []string) {
	m.Helper()
	for _, dir := range []string{"/run/k8slan/netns", "/run/k8slan/lan", "/run/k8slan/lock"} {
		for _, file := range m.files(dir) {
			if strings.HasPrefix(file, "megalos-") {
				names = append(names, dir+"/"+file)
			}
		}
	}
	return append(names, strings.Fields(m.run("sh", "-c",
		"grep -o '/run/k8slan/netns/megalos-[0-9]*' /proc/1/mountinfo || true"))...)
}

// hasVNI says whether any network namespace has a VXLAN with a VNI on the underlay. The kernel allows only one.
func (m machine) hasVNI(vni int) bool {
	m.Helper()
	local := m.underlay.vteps[slices.Index([]string{worker1, worker2}, m.Name)]
	out := m.run("sh", "-c", fmt.Sprintf(`ip link add probe type vxlan id %d dstport 4789 local %s dev %s nolearning &&
ip link set probe up && echo free; ip link del probe 2>/dev/null; true`, vni, local, m.underlay.device))
	return !strings.Contains(out, "free")
}

// onDemand matches the CDI file of an on-demand spoke.
var onDemand = regexp.MustCompile(`spoke_[0-9a-f]{14}_`)

// awaitNothingOf returns when neither node has any part of the VNIs. The plugin has removed its files when the pods are
// gone; the kernel deletes the links of a network namespace some time later, and reports that nowhere.
func (l lab) awaitNothingOf(vnis ...int) {
	l.Helper()
	for _, m := range l.machines() {
		if left := m.vniFiles(); len(left) > 0 {
			l.Errorf("%s has %q", m, left)
		}
		for _, file := range m.files("/var/run/cdi") {
			if onDemand.MatchString(file) {
				l.Errorf("%s has CDI device %s", m, file)
			}
		}
		for _, vni := range vnis {
			m.until(fmt.Sprintf("VNI %d to become free", vni), func() bool { return !m.hasVNI(vni) })
			l.awaitVNI(m.Name, vni, map[string]string{})
		}
	}
}

// The Kathará lab: two networks, three pods on two nodes.
func TestKatharaPodsMeetByVNI(t *testing.T) {
	const red, blue = 5001, 70002
	l := newLab(t).over(evpn4)
	l.network("red", red)
	l.network("blue", blue)
	guests := []workload{
		l.katharaPod("r1", worker1, attachmentRequest{Name: "red", MAC: "02:aa:00:00:00:01"},
			attachmentRequest{Name: "blue", MAC: "02:aa:00:00:00:02"}),
		l.katharaPod("r2", worker2, attachmentRequest{Name: "red", MAC: "02:aa:00:00:00:03"}),
		l.katharaPod("r3", worker2, attachmentRequest{Name: "blue", MAC: "02:aa:00:00:00:04"}),
	}
	begin := time.Now()
	l.create(guests...)
	r1, r2, r3 := l.katharaHosts(guests[0]), l.katharaHosts(guests[1]), l.katharaHosts(guests[2])
	l.logTime("until three pods ran", begin)
	for i, vteps := 0, l.underlay.vteps; i < 2; i++ {
		node := []string{worker1, worker2}[i]
		onRed := l.awaitVNI(node, red, []map[string]string{{"r1": "02:aa:00:00:00:01"}, {"r2": "02:aa:00:00:00:03"}}[i])
		l.awaitVNI(node, blue, []map[string]string{{"r1": "02:aa:00:00:00:02"}, {"r3": "02:aa:00:00:00:04"}}[i])
		if onRed.VTEP != vteps[i] || onRed.Underlay != l.underlay.device || onRed.VNI != red || onRed.Offered != 0 {
			t.Errorf("%s reports %+v", node, onRed)
		}
		if !l.machine(node).hasVNI(red) {
			t.Error("VNI 5001 exists and is not found")
		}
		daemon := *l.podOf("node", node)
		l.awaitMetric("attached pods", func() float64 {
			have, want := l.scrape(daemon).value(`k8slan_attachments{kind="veth"}`), l.attachedOn(node, "veth")
			if have != want {
				return -1
			}
			return have
		}, 2)
	}
	r1[0].address("10.98.0.1/24", "fd98::1/64")
	r2[0].address("10.98.0.2/24", "fd98::2/64")
	r1[1].address("10.99.0.1/24")
	r3[0].address("10.99.0.3/24")
	r1[0].pings("10.98.0.2", "fd98::2")
	r1[1].pings("10.99.0.3")
	crosses(r1[0], r2[0])
	crosses(r2[0], r1[0])

	// Floods on red do not reach blue: the first frame that arrives there is blue's own.
	listener := r3[0].listen("listen", "--for", "20s", "--count", "1", "--marker", frames.Marker)
	r1[0].run("frames", "-i", r1[0].link, "catalog")
	r2[0].run("frames", "-i", r2[0].link, "catalog")
	r1[1].run("frames", "-i", r1[1].link, "stream", "send", "--count", "1")
	if received, err := listener.all(); err != nil || len(received) != 1 ||
		!strings.Contains(received[0], strings.ReplaceAll(r1[1].mac.String(), ":", "")) {
		t.Errorf("blue received %q (%v), want only r1's frame", received, err)
	}

	out := l.k8slan(0, "status")
	if !containsAll(out, []string{
		"megalos:5001  Ready  vni 5001, evpn, 2/2 nodes, no LAN object, 2 attached", "megalos:70002  Ready",
		l.namespace + "/r1", l.namespace + "/r3",
	}) {
		t.Errorf("kubectl k8slan status prints\n%s", out)
	}
	out = l.k8slan(0, "macs", "megalos:5001")
	if !containsAll(out, []string{
		"megalos:5001  evpn, vni 5001, ", "; 2 nodes asked", "02:aa:00:00:00:01  worker1",
		"02:aa:00:00:00:03  worker2",
	}) {
		t.Errorf("kubectl k8slan macs prints\n%s", out)
	}

	m := l.machine(worker2)
	m.replaceDaemon()
	l.awaitSessions(worker2, v1beta1.SessionUp)
	links := m.indexes("megalos-" + strconv.Itoa(red))
	losesNothing(r1[0], r2[0], func() {
		l.awaitDaemon(worker2, "restarted", m.killDaemon())
		l.awaitSessions(worker2, v1beta1.SessionUp)
		l.awaitVNI(worker2, red, map[string]string{"r2": "02:aa:00:00:00:03"})
		late := l.katharaPod("r4", worker2, attachmentRequest{Name: "red"})
		l.create(late)
		r4 := l.katharaHosts(late)[0]
		r4.address("10.98.0.4/24")
		r4.pings("10.98.0.1", "10.98.0.2")
		l.delete(&corev1.Pod{}, "r4")
		l.awaitPodGone("r4")
	})
	if after := m.indexes("megalos-" + strconv.Itoa(red)); !maps.Equal(links, after) {
		t.Errorf("the links are %v, they were %v", after, links)
	}

	for _, g := range guests {
		l.delete(&corev1.Pod{}, g.Name)
	}
	for _, g := range guests {
		l.awaitPodGone(g.Name)
	}
	l.awaitNothingOf(red, blue)
}

// A pod that ends while the daemon is paused leaves nothing; nor does one whose network is deleted while kubelet is
// down. After a loss of power a node has its pods again.
func TestKatharaPodsEndWithoutDaemonKubeletOrPower(t *testing.T) {
	const vni = 5002
	l := newLab(t).over(evpn4)
	l.network("red", vni)
	near, far := l.katharaPod("r1", worker1, attachmentRequest{Name: "red"}),
		l.katharaPod("r2", worker2, attachmentRequest{Name: "red", MAC: "02:aa:00:00:00:02"})
	m := l.machine(worker2)
	l.create(near)
	one := l.katharaHosts(near)[0]
	one.address("10.98.0.1/24")
	ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
	defer cancel()
	meet := func() host {
		t.Helper()
		l.awaitVNI(worker2, vni, map[string]string{"r2": "02:aa:00:00:00:02"})
		two := l.katharaHosts(far)[0]
		two.address("10.98.0.2/24")
		m.until("worker1 to be a remote", func() bool { // a daemon that has just started must find the reflectors first
			return slices.Contains(m.remotesIn(m.lanNetns(fmt.Sprintf("megalos-%d", vni))),
				netip.MustParseAddr(l.underlay.vteps[0]))
		})
		two.pings("10.98.0.1")
		return two
	}
	wantsGone := func() {
		t.Helper()
		m.until("the end of the VNI", func() bool { return len(m.vniFiles()) == 0 && !m.hasVNI(vni) })
		l.awaitVNI(worker2, vni, map[string]string{})
	}

	l.create(far)
	meet()
	daemon := m.daemon()
	m.run("kill", "-STOP", daemon)
	l.delete(&corev1.Pod{}, "r2")
	l.awaitPodGone("r2")
	if left := m.vniFiles(); len(left) > 0 {
		t.Errorf("without the daemon %s has %q", m, left)
	}
	m.run("kill", "-CONT", daemon)
	wantsGone()

	l.create(far)
	two := meet()
	l.try(m.StopKubelet(ctx))
	t.Cleanup(func() {
		if t.Failed() {
			_ = m.StartKubelet(context.Background()) // it may run already
		}
	})
	l.delete(&nadv1.NetworkAttachmentDefinition{}, "red")
	l.delete(&corev1.Pod{}, "r2", client.GracePeriodSeconds(0))
	l.try(m.StartKubelet(ctx))
	m.awaitSandboxGone(two.uid)
	wantsGone()

	l.network("red", vni)
	l.create(far)
	before := meet()
	m.powerOff(ctx)
	m.powerOn(ctx)
	l.awaitPod("r2", "running again", func(p *corev1.Pod) bool {
		return string(p.UID) == before.uid && isRunning(p) && p.Status.ContainerStatuses[0].RestartCount > 0
	})
	meet()
	l.delete(&corev1.Pod{}, "r1")
	l.delete(&corev1.Pod{}, "r2")
	l.awaitPodGone("r1")
	l.awaitPodGone("r2")
	l.awaitNothingOf(vni)
	if err := l.bed.awaitInstalled(ctx); err != nil {
		t.Error(err)
	}
}

// When the chart disables networks of type megalos, attached pods stay attached and can end; no new pod can attach, and
// then the plugin's second name is removed.
func TestKatharaPodsOutliveTheChartsOption(t *testing.T) {
	const vni = 5003
	l := newLab(t).over(evpn4)
	l.network("red", vni)
	guests := []workload{
		l.katharaPod("r1", worker1, attachmentRequest{Name: "red"}),
		l.katharaPod("r2", worker2, attachmentRequest{Name: "red"}),
	}
	l.create(guests...)
	one, two := l.katharaHosts(guests[0])[0], l.katharaHosts(guests[1])[0]
	one.address("10.98.0.1/24")
	two.address("10.98.0.2/24")
	one.pings("10.98.0.2")
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	l.reinstall()
	losesNothing(one, two, func() {
		l.try(l.bed.chart(ctx, "node.megalos=false"))
	})
	l.create(l.katharaPod("r3", worker1, attachmentRequest{Name: "red"}))
	l.awaitEvent("r3", "FailedCreatePodSandBox",
		fmt.Sprintf("VNI %d: networks of type megalos are disabled on this node", vni))
	guests = append(guests, workload{Name: "r3"})
	for _, g := range guests {
		l.delete(&corev1.Pod{}, g.Name)
	}
	for _, g := range guests {
		l.awaitPodGone(g.Name)
	}
	l.awaitNothingOf(vni)
	for _, m := range l.machines() {
		l.awaitDaemon(m.Name, "restarted", m.killDaemon())
		if slices.Contains(m.files("/opt/cni/bin"), "megalos") {
			t.Errorf("%s still has the plugin by the name megalos", m)
		}
	}
}

// The VNI of a LAN means that LAN. It is closed to other namespaces, unless the LAN allows them.
func TestKatharaPodsUseTheVNIOfALAN(t *testing.T) {
	const vni = 1178
	l := newLab(t).over(evpn4)
	one, two := l.pair("owned", vni)
	blue := l.otherNamespace()
	blue.network("stolen", vni)
	thief := blue.katharaPod("thief", worker2, attachmentRequest{Name: "stolen", MAC: "02:aa:00:00:00:09"})
	blue.create(thief)
	blue.awaitEvent("thief", "FailedCreatePodSandBox",
		fmt.Sprintf(`VNI %d belongs to LAN %s/owned, which is not open to namespace "%s"; its owner can add that to `+
			`spec.allowedNamespaces, or choose another vxlanId`, vni, l.namespace, blue.namespace))
	l.edit("owned", func(s *v1beta1.LANSpec) { s.AllowedNamespaces = []string{blue.namespace} })
	blue.awaitRunning("thief")
	s := host{lab: blue, pod: "thief", node: worker2, link: "net0"}
	s.readLink()
	s.address(address(9) + "/24")
	s.pings(address(1), address(2))
	crosses(s, one)
	segment := l.awaitSegment(worker2, "owned", "with two pods", func(s v1beta1.SegmentStatus) bool {
		return len(s.Attachments) == 2
	})
	if !slices.ContainsFunc(segment.Attachments, func(a v1beta1.Attachment) bool {
		return a.Pod == blue.namespace+"/thief" && a.MAC == "02:aa:00:00:00:09"
	}) {
		t.Errorf("%s reports %+v", worker2, segment.Attachments)
	}
	if left := l.machine(worker2).vniFiles(); len(left) > 0 {
		t.Errorf("%s has %q", worker2, left)
	}
	losesNothing(one, two, func() {
		blue.delete(&corev1.Pod{}, "thief")
		blue.awaitPodGone("thief")
	})
	l.awaitSegment(worker2, "owned", "with one pod", func(s v1beta1.SegmentStatus) bool {
		return len(s.Attachments) == 1
	})
}
