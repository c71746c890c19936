package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/crd/controller"
	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/metrics"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// oneLAN is an EVPN instance with one LAN.
type oneLAN struct{}

func (oneLAN) Sessions() []bgp.Session           { return []bgp.Session{{Up: true}} }
func (oneLAN) Count(string) (macvrf.Count, bool) { return macvrf.Count{}, true }

// nodeMetrics returns the metrics of a daemon that had every kind of event once.
func nodeMetrics() *metrics.Metrics {
	lab := segment.Segment{LAN: segment.LAN{Namespace: "default", Name: "lab"}}
	m := metrics.New(metrics.Sources{
		Registered: func() int { return 1 },
		Reports:    func() []lanmgr.Report { return []lanmgr.Report{{Segment: lab}} },
		Dropped:    func() map[string]uint64 { return map[string]uint64{"default/lab": 1} },
		EVPN:       oneLAN{},
	})
	m.Published(v1beta1.LANNodeStatus{})
	m.Observed(lanmgr.Observation{Done: []segment.Op{segment.AddBridge{}}, Repair: true})
	m.Registration(nil)
	m.Registration(errors.New("refused"))
	m.Collected()
	for _, verb := range []report.Verb{report.Add, report.Del} {
		m.Outcome(report.Outcome{Verb: verb, Kind: segment.Veth, Reason: report.Kernel})
	}
	return m
}

// reflectorMetrics are the metrics of a route reflector.
var reflectorMetrics = metrics.Reflector{Count: func(context.Context) (bgp.Count, error) { return bgp.Count{}, nil }}

// The metrics, with those of controller-runtime, follow Prometheus's conventions.
func TestPrometheusFindsNoProblemInTheMetrics(t *testing.T) {
	for name, c := range map[string]prometheus.Collector{
		"daemon": nodeMetrics(), "controller": controller.NewMetrics(), "reflector": reflectorMetrics,
	} {
		registry := prometheus.NewPedanticRegistry()
		if err := registry.Register(c); err != nil {
			t.Fatal(err)
		}
		families, err := prometheus.Gatherers{registry, ctrlmetrics.Registry}.Gather()
		if err != nil {
			t.Fatal(err)
		}
		if len(families) < 10 { // the Go runtime has more
			t.Fatalf("the %s has %d metrics", name, len(families))
		}
		problems, err := promlint.NewWithMetricFamilies(families).Lint()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range problems {
			t.Errorf("%s: %s: %s", name, p.Metric, p.Text)
		}
	}
}

const metricsPage = "../../docs/metrics.md"

// rows returns a collector's metrics as rows of the page's tables.
func rows(t *testing.T, c prometheus.Collector) []string {
	t.Helper()
	descs := make(chan *prometheus.Desc, 100)
	c.Describe(descs)
	close(descs)
	var rows []string
	for d := range descs {
		fields := regexp.MustCompile(`fqName: "(\w+)", help: "([^"]*)".* variableLabels: {([^}]*)}`)
		match := fields.FindStringSubmatch(d.String())
		if match == nil {
			t.Fatalf("metric %s cannot be parsed", d)
		}
		name, help, labels := match[1], match[2], match[3]
		kind := "gauge"
		switch {
		case strings.HasSuffix(name, "_total"):
			kind = "counter"
		case strings.HasSuffix(name, "_seconds"):
			kind = "histogram"
		}
		if labels != "" {
			labels = "`" + strings.ReplaceAll(labels, ",", "`, `") + "`"
		}
		rows = append(rows, fmt.Sprintf("| `%s` | %s | %s | %s |", name, kind, labels, help))
	}
	return rows
}

func TestMetricsPageMatchesTheCode(t *testing.T) {
	page, err := os.ReadFile(metricsPage)
	if err != nil {
		t.Fatal(err)
	}
	want := slices.Concat(rows(t, nodeMetrics()), rows(t, controller.NewMetrics()), rows(t, reflectorMetrics))
	var have []string
	for line := range strings.Lines(string(page)) {
		if strings.HasPrefix(line, "| `k8slan_") {
			have = append(have, strings.TrimSpace(line))
		}
	}
	if !slices.Equal(have, want) {
		t.Errorf("the tables of docs/metrics.md are\n%s\nwant\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}
	known := strings.Join(want, "\n")
	for _, name := range regexp.MustCompile(`\bk8slan_\w+`).FindAllString(string(page), -1) {
		base := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
		if !strings.Contains(known, "`"+base+"`") {
			t.Errorf("docs/metrics.md names %s, which does not exist", name)
		}
	}
}
