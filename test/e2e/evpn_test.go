package e2e

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/test/cluster/install"
)

// The networks carry no multicast, so nodes know each other only from the reflectors.
func TestFramesOfEveryKindCrossByEVPN(t *testing.T) { newLab(t).framesCross(evpns, 1170) }

func TestPodIsReachedByEVPNAtOnce(t *testing.T) {
	l := newLab(t)
	for i, u := range []underlay{evpn4, evpn6r} {
		t.Run(u.name, func(t *testing.T) { l.fresh(t).over(u).podIsReached(1190+i, 50*time.Millisecond) })
	}
}

// A LAN without a discovery uses EVPN if that is the chart's. Sessions can have a password; while a node's password is
// wrong, the status of its LANs says so.
func TestEVPNByDefaultAndWithAPassword(t *testing.T) {
	u := evpn4
	u.discovery = ""
	l := newLab(t).over(u)
	secret := l.password("e2e-bgp", "e2e")
	other := l.password("e2e-bgp-other", "another")
	l.reinstall()
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	l.try(l.bed.chart(ctx, "discovery=evpn", "evpn.reflectors.passwordSecret="+secret.Name))
	l.try(l.bed.awaitDeployment(ctx, "k8slan-reflector"))
	one, two := l.pair("bydefault", 1176)
	if lan := l.ready("bydefault"); lan.Status.Discovery != string(v1beta1.EVPN) {
		t.Errorf("status.discovery is %q", lan.Status.Discovery)
	}
	for _, node := range []string{worker1, worker2} {
		l.awaitSessions(node, v1beta1.SessionUp)
	}

	// The reflectors get another password than the nodes have, and then the nodes get it, too.
	// The patch sets a strategy that the chart does not have.
	l.kubectlAfterwards("--namespace", install.Namespace, "delete", "deployment", "k8slan-reflector")
	losesNothing(one, two, func() {
		l.kubectl("--namespace", install.Namespace, "patch", "deployment", "k8slan-reflector", "--type", "json",
			"--patch",
			`[{"op": "replace", "path": "/spec/strategy", "value": {"type": "Recreate"}},
			{"op": "replace", "path": "/spec/template/spec/volumes/0/secret/secretName", "value": "`+other.Name+`"}]`)
		for _, node := range []string{worker1, worker2} {
			l.awaitSessions(node, v1beta1.SessionDown)
			l.awaitSegment(node, "bydefault", "without BGP", func(s v1beta1.SegmentStatus) bool {
				return s.Reason == v1beta1.ReasonBGPDown &&
					strings.Contains(s.Message, "a wrong password looks like this")
			})
		}
		secret.Data = other.Data
		l.try(l.bed.client.Update(ctx, secret))
		begin := time.Now()
		for _, node := range []string{worker1, worker2} {
			l.awaitSessions(node, v1beta1.SessionUp)
		}
		l.logTime("from the right password until all sessions were up", begin)
	})
}

// Both nodes report the same place of each MAC, also after a VM has moved to the other node.
func TestKubectlShowsWhereMACsAre(t *testing.T) {
	l := newLab(t).over(evpn4)
	one, two := l.pair("macs", 1179)
	vtep := map[string]string{worker1: l.underlay.vteps[0], worker2: l.underlay.vteps[1]}
	var mac string
	for _, node := range []string{worker1, worker2} {
		guest := l.start(vm("macs-3", node, "macs-3", address(3)+"/24"))[0]
		one.reaches(address(3))
		two.pings(address(3))
		if mac == "" {
			mac = guest.mac.String()
		}
		if guest.mac.String() != mac {
			t.Fatalf("the VM's MAC is %s, it was %s", guest.mac, mac)
		}
		l.awaitSegment(node, "macs", "with two attachments", func(s v1beta1.SegmentStatus) bool {
			return len(s.Attachments) == 2
		})
		for s, at := range map[string]string{one.mac.String(): worker1, two.mac.String(): worker2, mac: node} {
			rows := strings.Split(strings.TrimSpace(l.k8slan(0, "macs", "macs", s)), "\n")
			if len(rows) != 3 || !containsAll(rows[0], []string{"evpn, vni 1179, 3 MACs; 2 nodes asked"}) ||
				!containsAll(rows[2], []string{s, at, vtep[at], " ago "}) {
				t.Errorf("kubectl k8slan macs shows MAC %s, which is on %s, as\n%s", s, at, strings.Join(rows, "\n"))
			}
		}
		if node == worker1 {
			l.delete(&corev1.Pod{}, "macs-3")
			l.awaitPodGone("macs-3")
		}
	}
	for _, r := range l.reflectors() {
		l.awaitMetric("sessions of "+r.Name, func() float64 {
			return l.scrape(r).value("k8slan_reflector_sessions")
		}, 2)
		// a multicast route of each node, and three MACs
		l.awaitMetric("routes of "+r.Name, func() float64 { return l.scrape(r).value("k8slan_reflector_routes") }, 2+3)
	}
	nowhere := "02:00:5e:00:53:01"
	if out := l.k8slan(1, "macs", "macs", nowhere); !strings.Contains(out, nowhere+" is on no node that was asked") {
		t.Errorf("kubectl k8slan macs shows a MAC that no host has as\n%s", out)
	}
	if out := l.k8slan(0, "status", "macs"); !containsAll(out,
		[]string{"macs  Ready  vni 1179, evpn, 2/2 nodes", "BGP  Up  4 of 4 sessions are up"}) {
		t.Errorf("kubectl k8slan status prints\n%s", out)
	}
}

// password creates a Secret with that password for the time of the test.
func (l lab) password(name, text string) *corev1.Secret {
	l.Helper()
	s := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: install.Namespace, Name: name},
		Data:       map[string][]byte{"password": []byte(text)},
	}
	l.try(l.bed.client.Create(l.Context(), s))
	l.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := l.bed.client.Delete(ctx, s); err != nil {
			l.Error(err)
		}
	})
	return s
}

// awaitSessions returns when a node has two BGP sessions in that state, with the time since which both are in it.
func (l lab) awaitSessions(node string, state v1beta1.SessionState) (since time.Time) {
	l.Helper()
	n := one(l, &v1beta1.LANNodeList{}, "", node, "with two sessions "+string(state), func(n *v1beta1.LANNode) bool {
		return n != nil && len(n.Status.Sessions) == 2 && n.Status.Sessions[0].State == state &&
			n.Status.Sessions[1].State == state
	})
	for _, s := range n.Status.Sessions {
		if s.Since.After(since) {
			since = s.Since.Time
		}
	}
	return since
}

func TestDaemonIsKilledByEVPN(t *testing.T) { newLab(t).over(evpn4r).daemonIsKilledWhilePodsTalk() }

func TestDaemonsAreStoppedByEVPN(t *testing.T) {
	newLab(t).over(evpn4r).daemonsAreStoppedWhilePodsTalk()
}

func TestReflectorsAreLostWhilePodsTalk(t *testing.T) {
	newLab(t).over(evpn4).reflectorsAreLostWhilePodsTalk()
}

func TestDeadNodeIsForgottenByEVPN(t *testing.T) { newLab(t).over(evpn4r).deadNodeIsForgotten() }

func TestTrafficIsBackWithinASecondOfItsUnderlayByEVPN(t *testing.T) {
	newLab(t).over(evpn6).trafficIsBackWithinASecondOfItsUnderlay()
}

// All daemons are rolled out, and then one is stopped by SIGTERM.
func (l lab) daemonsAreStoppedWhilePodsTalk() {
	l.Helper()
	one, two := l.pair("stopped", 1178)
	third := l.machine(worker2).sandbox("stopped", "stopped-3")
	reached := func() {
		l.Helper()
		third.must("ADD")
		third.pings(address(3), address(1))
		third.must("DEL")
	}
	losesNothing(one, two, func() {
		begin := time.Now()
		l.kubectl("rollout", "restart", "--namespace", install.Namespace, "daemonset/k8slan-ds")
		l.kubectl("rollout", "status", "--namespace", install.Namespace, "daemonset/k8slan-ds")
		l.logTime("until all daemons were replaced", begin)
		reached()
		begin = time.Now()
		l.awaitDaemon(worker2, "restarted", l.machine(worker2).signalDaemon("TERM"))
		l.logTime("until the stopped daemon was back", begin)
		<-time.After(bgp.RestartTime + 2*aMoment) // by then a route that it has not advertised again is withdrawn
		reached()
	})
}

// deadNodeIsForgotten switches off a node that has a reflector.
func (l lab) deadNodeIsForgotten() {
	l.Helper()
	l.spreadReflectors()
	l.lan("edead", 1177, []string{"edead-1", "edead-2", "edead-3"})
	both := l.start(pod("edead-1", worker1, "edead-1"), pod("edead-2", worker1, "edead-2"))
	lost := l.startSet("elost", worker2, "edead-3")
	ctx, cancel := context.WithTimeout(l.Context(), 4*patience)
	defer cancel()
	alive, dead := l.machine(worker1), l.machine(worker2)
	alive.awaitRemotes("edead", l.underlay.vteps[1])
	losesNothing(both[0], both[1], func() {
		begin := time.Now()
		dead.powerOff(ctx)
		alive.awaitRemotes("edead")
		took := time.Since(begin)
		l.Logf("a node was no remote %s after its death", took.Round(time.Millisecond))
		if most := bgp.HoldTime + bgp.RestartTime + 2*aMoment; took > most {
			l.Errorf("a dead node was a remote for %s, want %s at most", took, most)
		}
		dead.powerOn(ctx)
		l.awaitPod(lost.pod, "another one that runs", func(p *corev1.Pod) bool {
			return string(p.UID) != lost.uid && isRunning(p)
		})
		alive.awaitRemotes("edead", l.underlay.vteps[1])
	})
	l.try(l.bed.awaitInstalled(ctx))
}

// spreadReflectors returns when each node has one reflector, and all nodes have received all routes from both.
func (l lab) spreadReflectors() {
	l.Helper()
	for { // the scheduler spreads them if both nodes accept pods
		pods := l.reflectors()
		if pods[0].Spec.NodeName != pods[1].Spec.NodeName {
			break
		}
		l.try(l.bed.client.Delete(l.Context(), &pods[0]))
		l.awaitReflectors("another one", func(now []*corev1.Pod) bool {
			return !slices.ContainsFunc(now, func(p *corev1.Pod) bool { return p.UID == pods[0].UID })
		})
	}
	for _, node := range []string{worker1, worker2} {
		since := l.awaitSessions(node, v1beta1.SessionUp)
		<-time.After(time.Until(since.Add(bgp.SyncTime + time.Second))) // since is in whole seconds
	}
}

func (l lab) reflectorsAreLostWhilePodsTalk() {
	l.Helper()
	one, two := l.pair("reflected", 1175)
	third := l.machine(worker2).sandbox("reflected", "reflected-3")
	reached := func() { // a new pod, through the reflectors that run
		l.Helper()
		third.must("ADD")
		third.pings(address(3), address(1))
		third.must("DEL")
	}
	losesNothing(one, two, func() {
		pods := l.reflectors()
		begin := time.Now()
		first, second := l.kill(pods[0]), l.kill(pods[1])
		first()
		second()
		l.logTime("until both reflectors were back", begin)
		<-time.After(bgp.SyncTime + 2*aMoment) // by then a route that no node has advertised again is withdrawn
		reached()

		for i := range pods {
			l.try(l.bed.client.Delete(l.Context(), &pods[i]))
		}
		l.awaitReflectors("two others that are ready", func(now []*corev1.Pod) bool {
			return len(now) == len(pods) && !slices.ContainsFunc(now, func(p *corev1.Pod) bool {
				return !isRunning(p) || slices.ContainsFunc(pods, func(old corev1.Pod) bool { return old.UID == p.UID })
			})
		})
		reached()

		// Last, because kubelet lets a container wait before it starts it a second time.
		back := l.kill(l.reflectors()[0])
		reached()
		back()
	})
}

// reflectors returns the pods of the reflectors.
func (l lab) reflectors() (pods []corev1.Pod) {
	l.Helper()
	for _, p := range l.awaitReflectors("two that are ready", func(now []*corev1.Pod) bool {
		return len(now) == 2 && isRunning(now[0]) && isRunning(now[1])
	}) {
		pods = append(pods, *p)
	}
	return pods
}

// awaitReflectors returns when the reflectors' pods fit.
func (l lab) awaitReflectors(what string, fits func([]*corev1.Pod) bool) (pods []*corev1.Pod) {
	l.Helper()
	which := []client.ListOption{
		client.InNamespace(install.Namespace),
		client.MatchingLabels{"app.kubernetes.io/component": "reflector"},
	}
	pods, err := await(l.Context(), l.bed.client, &corev1.PodList{}, which, fits)
	if err != nil {
		l.Fatalf("waited for reflectors, %s: %v", what, err)
	}
	return pods
}

// kill kills the program of a reflector's pod. The function back returns when kubelet has started it again.
func (l lab) kill(p corev1.Pod) (back func()) {
	l.Helper()
	m := l.machine(p.Spec.NodeName)
	var restarts int32
	l.awaitReflectors("started", func(now []*corev1.Pod) bool {
		i := slices.IndexFunc(now, func(o *corev1.Pod) bool { return o.UID == p.UID && isRunning(o) })
		if i >= 0 {
			restarts = now[i].Status.ContainerStatuses[0].RestartCount
		}
		return i >= 0
	})
	m.run("pkill", "-9", "-f", "^/k8slan reflector .*[[]"+p.Status.PodIP+"[]]")
	return func() {
		l.Helper()
		l.awaitReflectors("started again, restart "+strconv.Itoa(int(restarts)+1), func(now []*corev1.Pod) bool {
			return slices.ContainsFunc(now, func(o *corev1.Pod) bool {
				return o.UID == p.UID && isRunning(o) && o.Status.ContainerStatuses[0].RestartCount > restarts
			})
		})
	}
}
