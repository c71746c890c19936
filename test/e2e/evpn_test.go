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

// The networks carry no multicast, and nodes know of each other by the reflectors alone.
func TestFramesOfEveryKindCrossByEVPN(t *testing.T) { newLab(t).framesCross(evpns, 1170) }

func TestAPodIsReachedByEVPNAtOnce(t *testing.T) {
	for i, u := range []underlay{evpn4, evpn6r} {
		t.Run(u.name, func(t *testing.T) { newLab(t).over(u).podIsReached(1190+i, aMoment, 50*time.Millisecond) })
	}
}

// A LAN that does not say is by EVPN where the chart does, and sessions can have a password; while a node's is wrong, its LANs say so.
func TestEVPNByDefaultAndWithAPassword(t *testing.T) {
	u := evpn4
	u.discovery = ""
	l := newLab(t).over(u)
	secret := l.password("e2e-bgp", "e2e")
	other := l.password("e2e-bgp-other", "another")
	l.reinstall()
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	l.try(bed.Chart(ctx, "discovery=evpn", "evpn.reflectors.passwordSecret="+secret.Name))
	l.try(bed.awaitInstalled(ctx))
	one, two := l.pair("bydefault", 1176)
	if lan := l.ready("bydefault"); lan.Status.Discovery != string(v1beta1.EVPN) {
		t.Errorf("status.discovery is %q", lan.Status.Discovery)
	}
	for _, node := range []string{worker1, worker2} {
		l.awaitSessions(node, v1beta1.SessionUp)
	}

	// The reflectors get another password than the nodes have, and then those get it, too.
	losesNothing(one, two, func() {
		l.kubectl("--namespace", install.Namespace, "patch", "deployment", "k8slan-reflector", "--type", "json", "--patch",
			`[{"op": "replace", "path": "/spec/template/spec/volumes/0/secret/secretName", "value": "`+other.Name+`"}]`)
		for _, node := range []string{worker1, worker2} {
			l.awaitSessions(node, v1beta1.SessionDown)
			l.awaitSegment(node, "bydefault", "without BGP", func(s v1beta1.SegmentStatus) bool {
				return s.Reason == v1beta1.ReasonBGPDown && strings.Contains(s.Message, "a wrong password looks like this")
			})
		}
		secret.Data = other.Data
		l.try(bed.client.Update(ctx, secret))
		begin := time.Now()
		for _, node := range []string{worker1, worker2} {
			l.awaitSessions(node, v1beta1.SessionUp)
		}
		l.logTime("from the right password until all sessions were up", begin)
	})
}

// Both nodes say the same of where a MAC is, and follow a VM that goes to the other.
func TestMACsAreShownWhereTheyAre(t *testing.T) {
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
		l.awaitSegment(node, "macs", "with two attached", func(s v1beta1.SegmentStatus) bool { return len(s.Attachments) == 2 })
		for s, at := range map[string]string{one.mac.String(): worker1, two.mac.String(): worker2, mac: node} {
			rows := strings.Split(strings.TrimSpace(l.k8slan(0, "macs", "macs", s)), "\n")
			if len(rows) != 3 || !containsAll(rows[0], []string{"evpn, vni 1179, 3 MACs; 2 nodes asked"}) || !containsAll(rows[2], []string{s, at, vtep[at], " ago "}) {
				t.Errorf("of %s, which is on %s, kubectl k8slan macs says\n%s", s, at, strings.Join(rows, "\n"))
			}
		}
		if node == worker1 {
			l.delete(&corev1.Pod{}, "macs-3")
			l.awaitPodGone("macs-3")
		}
	}
	for _, r := range l.reflectors() {
		l.awaitMetric("sessions of "+r.Name, func() float64 { return l.scrape(r).value("k8slan_reflector_sessions") }, 2)
		l.awaitMetric("routes of "+r.Name, func() float64 { return l.scrape(r).value("k8slan_reflector_routes") }, 2+3) // a multicast route of each node, and three MACs
	}
	nowhere := "02:00:5e:00:53:01"
	if out := l.k8slan(1, "macs", "macs", nowhere); !strings.Contains(out, nowhere+" is on no node that was asked") {
		t.Errorf("of a MAC that nobody has kubectl k8slan macs says\n%s", out)
	}
	if out := l.k8slan(0, "status", "macs"); !containsAll(out, []string{"macs  Ready  vni 1179, evpn, 2/2 nodes", "BGP  Up  4 of 4 sessions are up"}) {
		t.Errorf("kubectl k8slan status says\n%s", out)
	}
}

// password is a Secret with that password, for the time of the test.
func (l lab) password(name, text string) *corev1.Secret {
	l.Helper()
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: install.Namespace, Name: name}, Data: map[string][]byte{"password": []byte(text)}}
	l.try(bed.client.Create(l.Context(), s))
	l.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := bed.client.Delete(ctx, s); err != nil {
			l.Error(err)
		}
	})
	return s
}

// awaitSessions returns when a node has two BGP sessions in that state.
func (l lab) awaitSessions(node string, state v1beta1.SessionState) {
	l.Helper()
	one(l, &v1beta1.LANNodeList{}, "", node, "with two sessions "+string(state), func(n *v1beta1.LANNode) bool {
		return n != nil && len(n.Status.Sessions) == 2 && n.Status.Sessions[0].State == state && n.Status.Sessions[1].State == state
	})
}

func TestFaultsByEVPN(t *testing.T) {
	for _, c := range []struct {
		what     string
		underlay underlay
		fault    func(lab)
	}{
		{"the daemon is killed", evpn4r, lab.daemonIsKilledWhilePodsTalk},
		{"daemons are stopped in order", evpn4r, lab.daemonsAreStoppedWhilePodsTalk},
		{"reflectors are killed and move", evpn4, lab.reflectorsAreLostWhilePodsTalk},
		{"a node dies and comes back", evpn4r, lab.deadNodeIsForgotten},
		{"the underlay is cut and comes back", evpn6, lab.trafficIsBackWithinASecondOfItsUnderlay},
	} {
		t.Run(c.what, func(t *testing.T) { c.fault(newLab(t).over(c.underlay)) })
	}
}

// A rollout of all daemons, and one that is told to stop.
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
		l.logTime("until all daemons were new", begin)
		reached()
		begin = time.Now()
		l.awaitDaemon(worker2, "restarted", l.machine(worker2).signalDaemon("TERM"))
		l.logTime("until the daemon was back that was stopped", begin)
		<-time.After(bgp.RestartTime + 2*aMoment) // by then what it has not told again is gone
		reached()
	})
}

// deadNodeIsForgotten takes the power from a node that a reflector is on.
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
		l.awaitPod(lost.pod, "another one that runs", func(p *corev1.Pod) bool { return string(p.UID) != lost.uid && isRunning(p) })
		alive.awaitRemotes("edead", l.underlay.vteps[1])
	})
	l.try(bed.awaitInstalled(ctx))
}

// spreadReflectors has one reflector on each node, and nodes that have heard all of both.
func (l lab) spreadReflectors() {
	l.Helper()
	for { // the scheduler spreads them, where both nodes take pods
		pods := l.reflectors()
		if pods[0].Spec.NodeName != pods[1].Spec.NodeName {
			break
		}
		l.try(bed.client.Delete(l.Context(), &pods[0]))
		l.awaitReflectors("another one", func(now []*corev1.Pod) bool {
			return !slices.ContainsFunc(now, func(p *corev1.Pod) bool { return p.UID == pods[0].UID })
		})
	}
	for _, node := range []string{worker1, worker2} {
		l.awaitSessions(node, v1beta1.SessionUp)
	}
	<-time.After(bgp.SyncTime)
}

func (l lab) reflectorsAreLostWhilePodsTalk() {
	l.Helper()
	one, two := l.pair("reflected", 1175)
	third := l.machine(worker2).sandbox("reflected", "reflected-3")
	reached := func() { // a pod that is new, by who is still there
		l.Helper()
		third.must("ADD")
		third.pings(address(3), address(1))
		third.must("DEL")
	}
	losesNothing(one, two, func() {
		pods := l.reflectors()
		back := l.kill(pods[0])
		reached()
		back()

		begin := time.Now()
		first, second := l.kill(pods[0]), l.kill(pods[1])
		first()
		second()
		l.logTime("until both reflectors were back", begin)
		<-time.After(bgp.SyncTime + 2*aMoment) // by then what nobody has told again is gone
		reached()

		for i := range pods {
			if err := bed.client.Delete(l.Context(), &pods[i]); err != nil {
				l.Fatal(err)
			}
		}
		l.awaitReflectors("two others that are ready", func(now []*corev1.Pod) bool {
			return len(now) == len(pods) && !slices.ContainsFunc(now, func(p *corev1.Pod) bool {
				return !isRunning(p) || slices.ContainsFunc(pods, func(old corev1.Pod) bool { return old.UID == p.UID })
			})
		})
		reached()
	})
}

// reflectors are the pods that reflect routes.
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
	which := []client.ListOption{client.InNamespace(install.Namespace), client.MatchingLabels{"app.kubernetes.io/component": "reflector"}}
	pods, err := await(l.Context(), bed.client, &corev1.PodList{}, which, fits)
	if err != nil {
		l.Fatalf("waited for reflectors, %s: %v", what, err)
	}
	return pods
}

// kill kills what runs in a pod of one container. The function that it returns returns when kubelet has started it again.
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
		l.awaitReflectors("started anew, restart "+strconv.Itoa(int(restarts)+1), func(now []*corev1.Pod) bool {
			return slices.ContainsFunc(now, func(o *corev1.Pod) bool {
				return o.UID == p.UID && isRunning(o) && o.Status.ContainerStatuses[0].RestartCount > restarts
			})
		})
	}
}
