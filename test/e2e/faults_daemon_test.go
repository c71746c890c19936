package e2e

import (
	"context"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/cluster/install"
)

func TestDaemonIsKilledWhilePodsTalk(t *testing.T) { newLab(t).daemonIsKilledWhilePodsTalk() }

func (l lab) daemonIsKilledWhilePodsTalk() {
	l.Helper()
	one, two := l.pair("killed", 1070)
	m, ns := l.machine(worker2), l.namespace+".killed"
	if l.underlay.discovery == v1beta1.EVPN {
		m.replaceDaemon()
	}
	before, inPod := m.indexes(ns), two.index()
	var third host
	losesNothing(one, two, func() {
		l.awaitDaemon(worker2, "restarted", m.killDaemon())
		l.setSpokes("killed", "killed-1", "killed-2", "killed-3", "killed-4")
		l.ready("killed") // by the new daemon
		third = l.start(pod("killed-4", worker2, "killed-4"))[0]
	})
	after := m.indexes(ns)
	for name, index := range before {
		if after[name] != index {
			l.Errorf("link %s was recreated: its index is %d, it was %d", name, after[name], index)
		}
	}
	if index := two.index(); index != inPod {
		l.Errorf("the pod's link has index %s, it was %s", index, inPod)
	}
	third.address(address(4) + "/24")
	third.pings(address(1))
	l.awaitSegment(worker2, "killed", "with both pods", func(s v1beta1.SegmentStatus) bool {
		return len(s.Attachments) == 2
	})
}

// index returns the index of the pod's link.
func (s host) index() string { return s.sh("cat /sys/class/net/%s/ifindex", s.link) }

// killDaemon kills the node's daemon, and runs further commands before kubelet starts it again. It returns a condition
// that the daemon's pod fulfils when the new daemon is ready.
func (m machine) killDaemon(more ...string) func(*corev1.Pod) bool {
	m.Helper()
	return m.signalDaemon("KILL", more...)
}

// replaceDaemon gives the node a daemon in a new pod, which kubelet starts again at once when it is killed. In an old
// pod kubelet waits longer each time (10 s, 20 s and so on), and after bgp.RestartTime the other nodes take the node
// for dead.
func (m machine) replaceDaemon() {
	m.Helper()
	var old *corev1.Pod
	m.awaitDaemon(m.Name, "created", func(p *corev1.Pod) bool {
		old = p
		return true
	})
	if err := m.bed.client.Delete(m.Context(), old); err != nil {
		m.Fatalf("delete the daemon of %s: %v", m, err)
	}
	m.awaitDaemon(m.Name, "another", func(p *corev1.Pod) bool {
		return p.UID != old.UID && p.Status.ContainerStatuses[0].Ready
	})
}

// signalDaemon is like killDaemon, with another signal that ends the daemon.
func (m machine) signalDaemon(signal string, more ...string) func(*corev1.Pod) bool {
	m.Helper()
	var before int32
	m.awaitDaemon(m.Name, "ready", func(p *corev1.Pod) bool {
		before = p.Status.ContainerStatuses[0].RestartCount
		return p.Status.ContainerStatuses[0].Ready
	})
	pid := m.daemon()
	m.run("sh", "-ec", strings.Join(append([]string{"kill -" + signal + " " + pid}, more...), "\n"))
	return func(p *corev1.Pod) bool {
		return p.Status.ContainerStatuses[0].RestartCount > before && p.Status.ContainerStatuses[0].Ready
	}
}

// awaitDaemon returns when the pod of a node's daemon fits.
func (l lab) awaitDaemon(node, what string, fits func(*corev1.Pod) bool) {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	which := []client.ListOption{
		client.InNamespace(install.Namespace),
		client.MatchingLabels{"app.kubernetes.io/component": "node"},
		client.MatchingFields{"spec.nodeName": node},
	}
	_, err := await(ctx, l.bed.client, &corev1.PodList{}, which, func(all []*corev1.Pod) bool {
		return len(all) == 1 && len(all[0].Status.ContainerStatuses) == 1 && fits(all[0])
	})
	if err != nil {
		l.Fatalf("waited for the daemon of %s to be %s: %v", node, what, err)
	}
}

func TestKubeletIsRestartedWhilePodsTalk(t *testing.T) {
	l := newLab(t)
	one, two := l.pair("kubelet", 1071)
	m := l.machine(worker2)
	const spokesOfLAN = 60
	var spokes []string
	for i := range spokesOfLAN {
		spokes = append(spokes, "kubelet-"+strconv.Itoa(i+1))
	}
	l.setSpokes("kubelet", spokes...)
	l.ready("kubelet")
	m.until("kubelet to have all spokes", func() bool { return m.allocatable(t.Context(), "kubelet-") == spokesOfLAN })
	losesNothing(one, two, func() {
		if err := m.StopKubelet(t.Context()); err != nil {
			t.Fatal(err)
		}
		stopped := time.Now()
		if err := m.StartKubelet(t.Context()); err != nil {
			t.Fatal(err)
		}
		listens := m.awaitSocket("/var/lib/kubelet/device-plugins/kubelet.sock", stopped)
		m.until("all spokes to be allocatable again", func() bool {
			return m.allocatable(t.Context(), "kubelet-") == spokesOfLAN
		})
		took := time.Since(listens)
		t.Logf("from kubelet's socket to %d allocatable spokes: %s", spokesOfLAN, took.Round(time.Millisecond))
		// On a slow machine the limit is the time that kubelet itself needs to start.
		if itself := listens.Sub(stopped); took > max(2*time.Second, itself) {
			t.Errorf("kubelet had the spokes again %s after its socket, which took %s; want 2 s at most", took, itself)
		}
		l.startSet("again", worker2, "kubelet-3")
	})
	for _, s := range []host{one, two} {
		p := l.awaitRunning(s.pod)
		if string(p.UID) != s.uid || p.Status.ContainerStatuses[0].RestartCount != 0 {
			t.Errorf("%s was restarted: %+v", s, p.Status.ContainerStatuses)
		}
	}
}

// Pods of controllers are attached again. A bare pod is not: kubelet admits it before the daemon, which is a pod
// itself, can advertise its spoke, and fails it for good.
func TestNodeLosesPowerAndComesBack(t *testing.T) {
	l := newLab(t)
	one, bare := l.pair("power", 1072)
	l.setSpokes("power", "power-1", "power-2", "power-3", "power-4", "power-5")
	l.ready("power")
	l.apply(l.controlled("Deployment", pod("deployed", worker2, "power-4")))
	l.apply(l.controlled("StatefulSet", vm("vm", worker2, "power-5", address(5)+"/24")))
	before := l.startSet("back", worker2, "power-3")
	before.address(address(3) + "/24")
	one.pings(address(3))
	deployed := l.onlyPodOf("deployed", "running", isRunning)
	machine := l.host(vm("vm-0", worker2, "power-5"))
	one.reaches(address(5))
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	m := l.machine(worker2)
	m.powerOff(ctx)
	begin := time.Now()
	m.powerOn(ctx)
	l.logTime("until the node was Ready", begin)
	l.awaitPod(before.pod, "another one that runs", func(p *corev1.Pod) bool {
		return string(p.UID) != before.uid && isRunning(p)
	})
	l.logTime("until the StatefulSet's pod ran again", begin)
	after := l.host(pod(before.pod, worker2, "power-3"))
	if after.mac.String() != before.mac.String() {
		t.Errorf("the pod's MAC is %s, before it was %s", after.mac, before.mac)
	}
	after.address(address(3) + "/24")
	one.reaches(address(3))
	l.onlyPodOf("deployed", "another one that runs", func(p *corev1.Pod) bool {
		return p.UID != deployed.UID && isRunning(p)
	})
	l.logTime("until the Deployment's pod ran again", begin)
	l.awaitPod("vm-0", "another one that runs", func(p *corev1.Pod) bool {
		return string(p.UID) != machine.uid && isRunning(p)
	})
	one.reaches(address(5))
	l.logTime("until the VM answered through a new tap", begin)
	failed := l.awaitPod(bare.pod, "failed", func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodFailed })
	if failed.Status.Reason != "UnexpectedAdmissionError" ||
		!strings.Contains(failed.Status.Message, v1beta1.Resource("power-2")) {
		t.Errorf("the bare pod failed for %s: %s", failed.Status.Reason, failed.Status.Message)
	}
	if p := l.awaitRunning(one.pod); string(p.UID) != one.uid || p.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("%s was restarted: %+v", one, p.Status.ContainerStatuses)
	}
	l.ready("power")
	if err := l.bed.awaitInstalled(ctx); err != nil {
		t.Error(err)
	}
}

func TestDeletedLinksAreRepairedWithinASecond(t *testing.T) {
	l := newLab(t)
	one, two := l.pair("mended", 1073)
	m, ns := l.machine(worker2), l.namespace+".mended"
	whole := func(links linkList) bool {
		return links.up("br1073") && links.up("vx1073") && links.up("mended-3_b") && links.up("mended-3_p") &&
			links.have("mended-2_b", "mended-2_p")
	}
	m.awaitLinks(ns, "whole", whole)
	inside := "nsenter --net=/run/k8slan/netns/" + ns + " "
	for _, c := range []struct{ what, command string }{
		{"the VXLAN", inside + "ip link del vx1073"},
		{"the bridge", inside + "ip link del br1073"},
		{"a waiting spoke's port", inside + "ip link del mended-3_b"},
		{"a waiting spoke's plug", inside + "ip link del mended-3_p"},
		{"the port beside an attached pod", inside + "ip link del mended-2_b"},
		{"the plug beside an attached pod", inside + "ip link del mended-2_p"},
		{"all of them at once", inside +
			"sh -c 'for l in vx1073 br1073 mended-2_b mended-3_b; do ip link del $l; done'"},
		{"the name of the network namespace", "umount -l /run/k8slan/netns/" + ns},
	} {
		t.Run(c.what, func(t *testing.T) {
			l := l.in(t)
			m := l.machine(worker2)
			losesLittle(one.in(t), two.in(t), func() {
				begin := time.Now()
				m.run("sh", "-c", c.command)
				m.until("the name of the network namespace", func() bool {
					_, err := m.Exec(t.Context(), "nsenter", "--net=/run/k8slan/netns/"+ns, "true")
					return err == nil
				})
				m.awaitLinks(ns, "whole again", whole)
				l.logTime("until the last link was repaired", begin)
			})
		})
	}
	l.ready("mended")
	one.fetches(two, address(2))
}

// With a pod's own link, or the plug of a VM's tap, the kernel deletes the pod's end: the pod loses its interface, and
// only its successor gets another one.
func TestSuccessorGetsALinkWhenThePodsWasDeleted(t *testing.T) {
	l := newLab(t)
	l.lan("cutoff", 1130, []string{"cutoff-1", "cutoff-2", "cutoff-3", "cutoff-4"})
	one := l.start(pod("cutoff-1", worker1, "cutoff-1"))[0]
	one.address(address(1) + "/24")
	attached := l.startSet("attached", worker2, "cutoff-2")
	l.apply(l.controlled("StatefulSet", vm("vm", worker2, "cutoff-3", address(3)+"/24")))
	machine := l.host(vm("vm-0", worker2, "cutoff-3"))
	stays := l.start(pod("cutoff-4", worker2, "cutoff-4"))[0]
	one.reaches(address(3))
	m, ns := l.machine(worker2), l.namespace+".cutoff"
	losesNothing(one, stays, func() {
		for _, link := range []string{"cutoff-2", "cutoff-3_p"} { // the first is an altname
			m.run("nsenter", "--net=/run/k8slan/netns/"+ns, "ip", "link", "del", link)
		}
		l.awaitSegment(worker2, "cutoff", "without both attachments", func(s v1beta1.SegmentStatus) bool {
			return s.State == v1beta1.SegmentReady && len(s.Attachments) == 1
		})
	})
	for _, s := range []host{attached, machine} {
		l.delete(&corev1.Pod{}, s.pod)
		l.awaitPod(s.pod, "another one that runs", func(p *corev1.Pod) bool {
			return string(p.UID) != s.uid && isRunning(p)
		})
	}
	next := l.host(pod("attached-0", worker2, "cutoff-2"))
	next.address(address(2) + "/24")
	one.reaches(address(2))
	one.reaches(address(3))
	l.awaitSegment(worker2, "cutoff", "with all pods", func(s v1beta1.SegmentStatus) bool {
		return len(s.Attachments) == 3
	})
}

// Without the daemon and the name, nothing holds the network namespace: the kernel deletes it and the interfaces of its
// pods.
func TestDeletedNetworkNamespaceIsRecreated(t *testing.T) {
	l := newLab(t)
	l.lan("dead", 1131, []string{"dead-1", "dead-2"})
	one := l.start(pod("dead-1", worker1, "dead-1"))[0]
	one.address(address(1) + "/24")
	before := l.startSet("reborn", worker2, "dead-2")
	m, ns := l.machine(worker2), l.namespace+".dead"
	restarted := m.killDaemon(`umount -l /run/k8slan/netns/` + ns)
	before.sh("until ! [ -e /sys/class/net/%s ]; do usleep 20000; done", before.link)
	l.awaitDaemon(worker2, "restarted", restarted)
	l.awaitSegment(worker2, "dead", "Ready without a pod", func(s v1beta1.SegmentStatus) bool {
		return s.State == v1beta1.SegmentReady && len(s.Attachments) == 0
	})
	l.delete(&corev1.Pod{}, before.pod)
	l.awaitPod(before.pod, "another one that runs", func(p *corev1.Pod) bool {
		return string(p.UID) != before.uid && isRunning(p)
	})
	after := l.host(pod(before.pod, worker2, "dead-2"))
	after.address(address(2) + "/24")
	one.reaches(address(2))
	losesNothing(one, after, func() {})
}
