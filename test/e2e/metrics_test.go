package e2e

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/cluster/install"
)

// metricsPort is the port of the daemon on each node, and of controller and reflectors in their pods.
const metricsPort = "9472"

// exposition is the answer of a program at /metrics.
type exposition string

// value returns the value of a series; 0 if there is none.
func (e exposition) value(series string) float64 {
	for line := range strings.Lines(string(e)) {
		if words := strings.TrimPrefix(line, series+" "); words != line {
			v, err := strconv.ParseFloat(strings.TrimSpace(words), 64)
			if err != nil {
				panic(fmt.Sprintf("%q: %v", line, err))
			}
			return v
		}
	}
	return 0
}

// programs returns the running pods of the daemon ("node") or the controller.
func (l lab) programs(ctx context.Context, component string) []corev1.Pod {
	l.Helper()
	var pods corev1.PodList
	err := l.bed.client.List(ctx, &pods, client.InNamespace(install.Namespace),
		client.MatchingLabels{"app.kubernetes.io/component": component},
		client.MatchingFields{"status.phase": "Running"})
	if err != nil {
		l.Fatal(err)
	}
	return pods.Items
}

// scrape asks a pod for its metrics, as Prometheus would.
func (l lab) scrape(pod corev1.Pod) exposition {
	l.Helper()
	return exposition(l.kubectl("get", "--raw",
		"/api/v1/namespaces/"+pod.Namespace+"/pods/"+pod.Name+":"+metricsPort+"/proxy/metrics"))
}

// awaitMetric scrapes until a value is large enough: a change of a counter is no event anywhere.
func (l lab) awaitMetric(what string, scrape func() float64, least float64) {
	l.Helper()
	again, deadline := time.NewTicker(200*time.Millisecond), time.After(patience)
	defer again.Stop()
	for value := scrape(); value < least; value = scrape() {
		select {
		case <-again.C:
		case <-deadline:
			l.Fatalf("%s is %v, want at least %v", what, value, least)
		}
	}
}

// lanNode returns the LANNode of a node.
func (l lab) lanNode(node string) *v1beta1.LANNode {
	l.Helper()
	lanNode := &v1beta1.LANNode{}
	if err := l.bed.client.Get(l.Context(), client.ObjectKey{Name: node}, lanNode); err != nil {
		l.Fatal(err)
	}
	return lanNode
}

// attachedOn returns how many attachments of a kind the node reports.
func (l lab) attachedOn(node, kind string) (count float64) {
	l.Helper()
	for _, s := range l.lanNode(node).Status.Segments {
		for _, a := range s.Attachments {
			if string(a.Kind) == kind {
				count++
			}
		}
	}
	return count
}

func TestMetricsCountWhatHappensInTheCluster(t *testing.T) {
	l := newLab(t)
	daemon := *l.podOf("node", worker1)
	before := l.scrape(daemon)
	rises := func(series string) {
		t.Helper()
		l.awaitMetric(series, func() float64 { return l.scrape(daemon).value(series) }, before.value(series)+1)
	}
	l.lan("metered", 1160, []string{"metered", "metered-vm"})
	l.ready("metered")
	l.awaitMetric("LANs that are Ready, as in LANNode", func() float64 {
		have := l.scrape(daemon).value(`k8slan_segments{state="Ready"}`)
		if have != float64(l.lanNode(worker1).Status.Ready) {
			return -1
		}
		return have
	}, 1)
	l.awaitMetric("healthy spokes, all registered with kubelet, as in LANNode", func() float64 {
		now, offered := l.scrape(daemon), int32(0)
		for _, s := range l.lanNode(worker1).Status.Segments {
			offered += s.Offered
		}
		have := now.value(`k8slan_spokes{state="healthy"}`)
		if have != float64(offered) || have != now.value(`k8slan_spokes_registered`) {
			return -1
		}
		return have
	}, 2)
	rises(`k8slan_operations_total{operation="AddPair"}`)
	rises(`k8slan_kubelet_registrations_total`)
	l.start(pod("metered", worker1, "metered"), vm("metered-vm", worker1, "metered-vm", "10.160.0.2/24"))
	for _, kind := range []string{"veth", "macvtap"} {
		rises(`k8slan_attach_duration_seconds_count{kind="` + kind + `",result="succeeded"}`)
		l.awaitMetric("the "+kind+"s attached, as in LANNode", func() float64 {
			have, want := l.scrape(daemon).value(`k8slan_attachments{kind="`+kind+`"}`), l.attachedOn(worker1, kind)
			if have != want {
				return -1
			}
			return have
		}, 1)
	}
	refused := pod("refused", worker1, "metered")
	refused.Spokes = nil
	l.create(refused)
	rises(`k8slan_attach_failures_total{reason="no_device"}`)

	var leaders []string
	var spokes float64
	lans := func() (sum float64) {
		leaders, spokes = nil, 0
		for _, p := range l.programs(t.Context(), "controller") {
			if e := l.scrape(p); strings.Contains(string(e), "k8slan_lans{") {
				leaders = append(leaders, p.Name)
				sum += e.value(`k8slan_lans{state="Ready"}`)
				spokes += e.value(`k8slan_lan_spokes{state="attached"}`)
			}
		}
		return sum
	}
	l.awaitMetric("Ready LANs", lans, 1)
	l.awaitMetric("attached spokes", func() float64 { lans(); return spokes }, 2)
	if len(leaders) != 1 {
		t.Errorf("%v have metrics of LANs, want only the leader", leaders)
	}
	for _, p := range append(l.programs(t.Context(), "controller"), daemon) {
		problems, err := promlint.New(strings.NewReader(string(l.scrape(p)))).Lint()
		if err != nil {
			t.Fatal(err)
		}
		for _, problem := range problems {
			t.Errorf("%s: %s: %s", p.Name, problem.Metric, problem.Text)
		}
	}
	l.delete(&corev1.Pod{}, "metered")
	rises(`k8slan_detach_duration_seconds_count{kind="veth",result="succeeded"}`)
}
