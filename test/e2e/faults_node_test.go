package e2e

import (
	"context"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// The test stops the API server for the time in K8SLAN_E2E_OUTAGE, or for 4 seconds: Kubernetes' own parts try again
// less and less often, so that they need a multiple of that to come back. The LANs are one over the usual underlay, one
// in unicast over a router and one by EVPN.
func TestAPIServerIsDownWhilePodsTalk(t *testing.T) {
	outage := 4 * time.Second
	if text := os.Getenv("K8SLAN_E2E_OUTAGE"); text != "" {
		var err error
		if outage, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	l := newLab(t)
	m := l.machine(worker2)
	type lan struct {
		name     string
		one, two host
		third    sandbox
		links    map[string]int
	}
	var lans []lan
	for i, u := range []underlay{l.underlay, routed6, evpn4} {
		name := []string{"away", "afar", "abgp"}[i]
		one, two := l.over(u).pair(name, 1132+17*i)
		lans = append(lans, lan{name, one, two, m.sandbox(name, name+"-3"), m.indexes(l.namespace + "." + name)})
	}
	ctx, cancel := context.WithTimeout(t.Context(), outage+4*patience)
	defer cancel()
	t.Cleanup(func() { // every other test needs it
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := l.bed.Cluster.StartAPIServer(ctx); err != nil {
			t.Error(err)
		}
	})
	away := func() {
		l.try(l.bed.Cluster.StopAPIServer(ctx))
		over := time.After(outage)
		for attached := 0; ; attached++ {
			for _, n := range lans {
				n.third.must("ADD")
				n.third.pings(address(3), address(1))
				n.third.must("DEL")
			}
			select {
			case <-over:
				t.Logf("the plugin attached and detached %d times on each LAN without an API server", attached+1)
			default:
				continue
			}
			break
		}
		l.try(l.bed.Cluster.StartAPIServer(ctx))
		l.awaitCluster(ctx)
		for _, n := range lans {
			l.ready(n.name)
		}
	}
	for _, n := range lans {
		inner := away
		away = func() { losesNothing(n.one, n.two, inner) }
	}
	away()
	if err := l.bed.awaitInstalled(ctx); err != nil {
		t.Error(err)
	}
	for _, n := range lans {
		if after := m.indexes(l.namespace + "." + n.name); !maps.Equal(n.links, after) {
			t.Errorf("the links of LAN %s are %v, they were %v", n.name, after, n.links)
		}
		third := l.start(pod(n.name+"-3", worker2, n.name+"-3"))[0]
		third.address(address(3) + "/24")
		third.pings(address(1))
		l.awaitSegment(worker2, n.name, "with two pods", func(s v1beta1.SegmentStatus) bool {
			return len(s.Attachments) == 2
		})
	}
}

// awaitCluster returns when Kubernetes works again on both nodes. After an outage its parts try again less and less
// often, up to a minute apart.
func (l lab) awaitCluster(ctx context.Context) {
	l.Helper()
	begin := time.Now()
	fresh := l.otherNamespace()
	here := []client.ListOption{client.InNamespace(fresh.namespace)}
	if _, err := await(ctx, l.bed.client, &corev1.ServiceAccountList{}, here, func(all []*corev1.ServiceAccount) bool {
		return len(all) > 0
	}); err != nil {
		l.Fatalf("waited for the controller manager: %v", err)
	}
	for _, m := range l.machines() {
		fresh.create(workload{Name: "plain-" + m.Name, Node: m.Name})
	}
	if _, err := await(ctx, l.bed.client, &corev1.PodList{}, here, func(all []*corev1.Pod) bool {
		return len(all) == 2 && isRunning(all[0]) && isRunning(all[1])
	}); err != nil {
		l.Fatalf("waited for the scheduler and the kubelets: %v", err)
	}
	l.logTime("until Kubernetes worked again", begin)
}

func TestRunIsFullWhilePodsTalk(t *testing.T) {
	const full = "no space left on device"
	l := newLab(t)
	one, two := l.pair("full", 1133)
	m, ns := l.machine(worker2), l.namespace+".full"
	before, devices := m.indexes(ns), m.files("/run/cdi")
	s := m.sandbox("full", "full-3")
	losesNothing(one, two, func() {
		m.fillRun()
		// The plugin reports it and undoes what it has done.
		if err := s.call("ADD"); err == nil || !strings.Contains(err.Error(), full) {
			t.Errorf("ADD returns %v, want %q", err, full)
		}
		if after := m.indexes(ns); !maps.Equal(before, after) {
			t.Errorf("after a failed ADD the LAN's links are %v, before it they were %v", after, before)
		}
		if after := m.files("/run/cdi"); !slices.Equal(devices, after) {
			t.Errorf("after a failed ADD the CDI devices are %v, before it they were %v", after, devices)
		}
		// The daemon reports it for a new LAN and for a changed one.
		l.apply(l.lanYAML("late", 1134, []string{"late-1"}))
		l.setSpokes("full", "full-1", "full-2", "full-3", "full-4")
		for _, lan := range []string{"late", "full"} {
			l.awaitSegment(worker2, lan, "NotReady because of "+full, func(s v1beta1.SegmentStatus) bool {
				return s.State == v1beta1.SegmentNotReady && s.Reason == v1beta1.ReasonBuildFailed &&
					strings.Contains(s.Message, full)
			})
			l.awaitEvent(lan, v1beta1.ReasonBuildFailed, worker2, full)
		}
		if status := l.awaitSegment(worker2, "full", "with its pod", func(s v1beta1.SegmentStatus) bool {
			return true
		}); len(status.Attachments) != 1 {
			t.Errorf("LANNode has the attachments %v", status.Attachments)
		}
		m.emptyRun()
		begin := time.Now()
		l.ready("late")
		l.ready("full")
		l.logTime("from free space to two Ready LANs", begin)
		s.must("ADD")
		s.pings(address(3), address(1))
		s.must("DEL")
	})
	after := m.indexes(ns)
	for name, index := range before {
		if after[name] != index {
			t.Errorf("link %s was recreated", name)
		}
	}
	l.start(pod("late-1", worker2, "late-1"), pod("full-4", worker2, "full-4"))
	for _, dir := range []string{"/run/k8slan/lan", "/run/cdi"} {
		for _, file := range m.files(dir) {
			if !strings.HasSuffix(file, ".json") {
				t.Errorf("%s/%s is half written", dir, file)
			}
		}
	}
}

// fillRun cuts the size of the node's /run to little more than its content, and fills it.
func (m machine) fillRun() {
	m.Helper()
	m.Cleanup(func() {
		if m.Failed() {
			m.emptyRun()
		}
	})
	used, err := strconv.Atoi(strings.Fields(m.run("df", "--output=used", "/run"))[1])
	if err != nil {
		m.Fatal(err)
	}
	m.run("mount", "-o", "remount,size="+strconv.Itoa(used+1024)+"k", "/run")
	m.run("sh", "-c", "cat /dev/zero >/run/full; ! echo 1 >/run/one") // ends when it is full
}

// emptyRun undoes fillRun.
func (m machine) emptyRun() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := m.Exec(ctx, "sh", "-ec", "rm -f /run/full /run/one; mount -o remount,size=50% /run"); err != nil {
		m.Error(err)
	}
}

// Many pods attach at once to a LAN that is edited meanwhile. No spoke may be advertised as unhealthy meanwhile.
func TestNoSpokeIsWithdrawnWhileManyPodsAttach(t *testing.T) {
	const pods = 12 // on each node
	l := newLab(t)
	var spokes []string
	for i := range 2*pods + 8 {
		spokes = append(spokes, "many-"+strconv.Itoa(i))
	}
	l.lan("many", 1135, spokes)
	for _, m := range l.machines() {
		m.until("kubelet to have all spokes", func() bool { return m.allocatable(t.Context(), "many-") == len(spokes) })
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	fewest := make(chan string, 2)
	for _, m := range l.machines() {
		go func() { // ends with the context
			least, answers := len(spokes), 0
			for tick := time.NewTicker(20 * time.Millisecond); ; {
				select {
				case <-ctx.Done():
					tick.Stop()
					if least < len(spokes) || answers < 10 {
						fewest <- m.Name + " had only " + strconv.Itoa(least) + " spokes, in " + strconv.Itoa(answers) +
							" answers of kubelet"
						return
					}
					fewest <- ""
					return
				case <-tick.C:
					if n := m.allocatable(context.WithoutCancel(ctx), "many-"); n >= 0 {
						least = min(least, n)
						answers++
					}
				}
			}
		}()
	}
	begin := time.Now()
	var guests []workload
	for i := range pods {
		guests = append(guests, pod("many-"+strconv.Itoa(i), worker1, spokes[i]),
			pod("many-"+strconv.Itoa(pods+i), worker2, spokes[pods+i]))
	}
	l.create(guests...)
	for i := range 4 {
		l.setSpokes("many", append(slices.Clone(spokes), "more-"+strconv.Itoa(i))...)
		l.ready("many")
	}
	for _, g := range guests {
		l.awaitRunning(g.Name)
	}
	l.logTime("until "+strconv.Itoa(2*pods)+" pods ran", begin)
	cancel()
	for range l.machines() {
		if failure := <-fewest; failure != "" {
			t.Error(failure)
		}
	}
}
