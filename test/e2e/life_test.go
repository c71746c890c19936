package e2e

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/install"
)

func TestDaemonIsKilledWhilePodsTalk(t *testing.T) {
	l := newLab(t)
	one, two := l.pair("killed", 1070)
	m := l.machine(worker2)
	var third station
	losesNothing(one, two, 15*time.Second, func() {
		l.awaitDaemon(worker2, "restarted", m.killDaemon())
		l.setSpokes("killed", "killed-1", "killed-2", "killed-4")
		l.ready("killed") // by the new daemon
		third = l.start(pod("killed-4", worker2, "killed-4"))[0]
	})
	third.address(address(4) + "/24")
	third.pings(address(1))
	l.awaitSegment(worker2, "killed", "told of both pods", func(s v1beta1.SegmentStatus) bool { return len(s.Attachments) == 2 })
}

// killDaemon kills the node's daemon and returns what fits its pod when it is ready again.
func (m machine) killDaemon() func(*corev1.Pod) bool {
	m.Helper()
	var before int32
	m.awaitDaemon(m.Name, "ready", func(p *corev1.Pod) bool {
		before = p.Status.ContainerStatuses[0].RestartCount
		return p.Status.ContainerStatuses[0].Ready
	})
	m.run("kill", "-9", m.daemon())
	return func(p *corev1.Pod) bool {
		return p.Status.ContainerStatuses[0].RestartCount > before && p.Status.ContainerStatuses[0].Ready
	}
}

// awaitDaemon returns when the daemon's pod on a node fits.
func (l lab) awaitDaemon(node, what string, fits func(*corev1.Pod) bool) {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	which := []client.ListOption{
		client.InNamespace(install.Namespace),
		client.MatchingLabels{"app.kubernetes.io/component": "node"},
		client.MatchingFields{"spec.nodeName": node},
	}
	_, err := await(ctx, bed.client, &corev1.PodList{}, which, func(all []*corev1.Pod) bool {
		return len(all) == 1 && len(all[0].Status.ContainerStatuses) == 1 && fits(all[0])
	})
	if err != nil {
		l.Fatalf("waited for the daemon of %s to be %s: %v", node, what, err)
	}
}

func TestKubeletIsRestartedWhilePodsTalk(t *testing.T) {
	l := newLab(t)
	one, two := l.pair("kubelet", 1071)
	losesNothing(one, two, 15*time.Second, func() {
		if err := l.machine(worker2).RestartKubelet(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.startSet("again", worker2, "kubelet-3") // the spoke is offered again
	})
	for _, s := range []station{one, two} {
		p := l.awaitRunning(s.pod)
		if string(p.UID) != s.uid || p.Status.ContainerStatuses[0].RestartCount != 0 {
			t.Errorf("%s was touched: %+v", s, p.Status.ContainerStatuses)
		}
	}
}

func TestNodeLosesPowerAndComesBack(t *testing.T) {
	l := newLab(t)
	one, _ := l.pair("power", 1072)
	before := l.startSet("back", worker2, "power-3")
	before.address(address(3) + "/24")
	one.pings(address(3))
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	m := l.machine(worker2)
	if err := m.PowerOff(ctx); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := m.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
	l.logTime("until the node was Ready", begin)
	l.awaitPod(before.pod, "another one that runs", func(p *corev1.Pod) bool { return string(p.UID) != before.uid && isRunning(p) })
	l.logTime("until the StatefulSet's pod ran again", begin)
	after := l.station(pod(before.pod, worker2, "power-3"))
	if after.mac.String() != before.mac.String() {
		t.Errorf("the pod's MAC is %s, before it was %s", after.mac, before.mac)
	}
	after.address(address(3) + "/24")
	one.reaches(address(3))
	if p := l.awaitRunning(one.pod); string(p.UID) != one.uid || p.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("%s was touched: %+v", one, p.Status.ContainerStatuses)
	}
	l.ready("power")
	if err := bed.awaitInstalled(ctx); err != nil {
		t.Error(err)
	}
}

func TestWhatIsDeletedByHandIsRepaired(t *testing.T) {
	l := newLab(t)
	one, two := l.pair("mended", 1073)
	m, ns := l.machine(worker2), l.namespace+".mended"
	whole := func(links linkList) bool {
		return links.up("br1073") && links.up("vx1073") && links.up("mended-3_b") && links.up("mended-3_p") && links.have("mended-2_b", "mended-2_p")
	}
	m.awaitLinks(ns, "whole", whole)
	for _, link := range []string{"vx1073", "mended-3_b", "mended-3_p", "mended-2_b", "br1073"} {
		t.Run(link, func(t *testing.T) {
			l := l.in(t)
			m, one, two := l.machine(worker2), one.in(t), two.in(t)
			begin := time.Now()
			m.run("nsenter", "--net=/run/k8slan/netns/"+ns, "ip", "link", "del", link)
			m.awaitLinks(ns, "whole again", whole)
			l.logTime("from ip link del to the last repaired link", begin)
			one.reaches(address(2))
			two.pings(address(1))
		})
	}
	t.Run("the name of the network namespace", func(t *testing.T) {
		l := l.in(t)
		m, one, two := l.machine(worker2), one.in(t), two.in(t)
		begin := time.Now()
		m.run("sh", "-ec", "umount -l /run/k8slan/netns/"+ns)
		m.until("the name to be back", func() bool {
			_, err := m.Exec(t.Context(), "nsenter", "--net=/run/k8slan/netns/"+ns, "ip", "link", "show", "br1073")
			return err == nil
		})
		l.logTime("from umount to a name that leads to the bridge", begin)
		one.reaches(address(2))
		two.pings(address(1))
	})
	l.ready("mended")
	one.fetches(two, address(2))
}
