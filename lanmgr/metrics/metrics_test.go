package metrics_test

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/agent"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/metrics"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// read returns the value of each series that is not 0, or the count of a histogram.
func read(t *testing.T, m prometheus.Collector) map[string]float64 {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	if err := registry.Register(m); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	series := map[string]float64{}
	for _, family := range families {
		for _, metric := range family.GetMetric() {
			if v := value(metric); v != 0 {
				series[family.GetName()+labels(metric)] = v
			}
		}
	}
	return series
}

func value(m *dto.Metric) float64 {
	switch {
	case m.GetHistogram() != nil:
		return float64(m.GetHistogram().GetSampleCount())
	case m.GetCounter() != nil:
		return m.GetCounter().GetValue()
	}
	return m.GetGauge().GetValue()
}

func labels(m *dto.Metric) string {
	var pairs []string
	for _, l := range m.GetLabel() {
		pairs = append(pairs, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
	}
	if pairs == nil {
		return ""
	}
	return "{" + strings.Join(pairs, ",") + "}"
}

// fakeEVPN has three sessions and a LAN.
type fakeEVPN struct{}

func (fakeEVPN) Sessions() []bgp.Session { return []bgp.Session{{Up: true}, {Up: true}, {}} }

func (fakeEVPN) Count(netns string) (macvrf.Count, bool) {
	return macvrf.Count{
		Advertised: 11,
		Used:       12,
		Refused:    13,
		Local:      14,
		Remote:     15,
		Duplicate:  16,
		Moves:      17,
	}, netns == "default.lab"
}

func TestEveryMetricCountsItsEvents(t *testing.T) {
	lab := segment.LAN{Namespace: "default", Name: "lab", UID: "1"}
	m := metrics.New(metrics.Sources{
		Registered: func() int { return 3 },
		Dropped:    func() map[string]uint64 { return map[string]uint64{"default/lab": 5} },
		Reports: func() []lanmgr.Report {
			return []lanmgr.Report{
				{Segment: segment.Segment{LAN: lab, Netns: "default.lab"}, Learned: 7, Remotes: 4},
				{
					Segment: segment.Segment{LAN: lab, Netns: "before"},
					Learned: 8,
					Leaving: true,
				}, // the LAN moves to another network namespace
				{
					Segment: segment.Segment{LAN: segment.LAN{Namespace: "default", Name: "old"}},
					Learned: -1,
					Remotes: -1,
				},
				{Segment: segment.Segment{Netns: "unknown"}, Learned: 9},
			}
		},
		EVPN: fakeEVPN{},
	})
	if before := read(t, m); len(before) != 13 { // registered, learned, remotes, dropped, and nine of EVPN
		t.Errorf("before any event: %v", before)
	}
	m.Advertised([]agent.Spoke{{Name: "a", Healthy: true}, {Name: "b", Healthy: true}, {Name: "c"}})
	m.Published(v1beta1.LANNodeStatus{Segments: []v1beta1.SegmentStatus{
		{
			State:       v1beta1.SegmentReady,
			Attachments: []v1beta1.Attachment{{Kind: v1beta1.KindVeth}, {Kind: v1beta1.KindMacvtap}},
		},
		{State: v1beta1.SegmentReady, Attachments: []v1beta1.Attachment{{Kind: v1beta1.KindVeth}}},
		{State: v1beta1.SegmentNotReady},
		{State: v1beta1.SegmentDegraded},
		{State: v1beta1.SegmentLeaving},
	}})
	m.Outcome(report.Outcome{Verb: report.Add, Kind: segment.Veth, Took: time.Millisecond, TookOver: true})
	m.Outcome(report.Outcome{Verb: report.Add, Kind: segment.Macvtap, Took: time.Millisecond, Reason: report.NoDevice})
	m.Outcome(report.Outcome{Verb: report.Add, Kind: "pod/default/srl-1", Reason: "pod/default/srl-1"})
	m.Outcome(report.Outcome{Verb: report.Del, Kind: segment.Veth})
	m.Outcome(report.Outcome{Verb: report.Del, Kind: segment.Veth, Reason: report.Kernel})
	bridge, verify := segment.AddBridge{}, segment.VerifyClaim{}
	m.Observed(lanmgr.Observation{})
	m.Observed(lanmgr.Observation{Done: []segment.Op{bridge, segment.WriteRecord{}}})
	m.Observed(lanmgr.Observation{Done: []segment.Op{bridge, verify}, Repair: true})
	m.Observed(lanmgr.Observation{Done: []segment.Op{bridge}, Err: errors.New("no buffer space available")})
	m.Registration(nil)
	m.Registration(errors.New("no resources"))
	m.Collected()

	have := read(t, m)
	want := map[string]float64{
		`k8slan_segments{state="Ready"}`:                                 2,
		`k8slan_segments{state="NotReady"}`:                              1,
		`k8slan_segments{state="Degraded"}`:                              1,
		`k8slan_segments{state="Leaving"}`:                               1,
		`k8slan_spokes{state="healthy"}`:                                 2,
		`k8slan_spokes{state="unhealthy"}`:                               1,
		`k8slan_spokes_registered`:                                       3,
		`k8slan_attachments{kind="veth"}`:                                2,
		`k8slan_attachments{kind="macvtap"}`:                             1,
		`k8slan_fdb_learned_entries{lan="default/lab"}`:                  7,
		`k8slan_remotes{lan="default/lab"}`:                              4,
		`k8slan_nonmember_packets_dropped_total{lan="default/lab"}`:      5,
		`k8slan_bgp_sessions{state="up"}`:                                2,
		`k8slan_bgp_sessions{state="down"}`:                              1,
		`k8slan_evpn_routes{lan="default/lab",use="advertised"}`:         11,
		`k8slan_evpn_routes{lan="default/lab",use="used"}`:               12,
		`k8slan_evpn_routes{lan="default/lab",use="refused"}`:            13,
		`k8slan_evpn_macs{lan="default/lab",place="here"}`:               14,
		`k8slan_evpn_macs{lan="default/lab",place="elsewhere"}`:          15,
		`k8slan_evpn_macs{lan="default/lab",place="twice"}`:              16,
		`k8slan_evpn_mac_moves_total{lan="default/lab"}`:                 17,
		`k8slan_attach_duration_seconds{kind="veth",result="succeeded"}`: 1,
		`k8slan_attach_duration_seconds{kind="macvtap",result="failed"}`: 1,
		`k8slan_attach_duration_seconds{kind="unknown",result="failed"}`: 1,
		`k8slan_attach_failures_total{reason="no_device"}`:               1,
		`k8slan_attach_failures_total{reason="other"}`:                   1,
		`k8slan_detach_duration_seconds{kind="veth",result="succeeded"}`: 1,
		`k8slan_detach_duration_seconds{kind="veth",result="failed"}`:    1,
		`k8slan_detach_failures_total{reason="kernel"}`:                  1,
		`k8slan_takeovers_total`:                                         1,
		`k8slan_reconcile_duration_seconds{result="unchanged"}`:          1,
		`k8slan_reconcile_duration_seconds{result="changed"}`:            2,
		`k8slan_reconcile_duration_seconds{result="failed"}`:             1,
		`k8slan_operations_total{operation="AddBridge"}`:                 3,
		`k8slan_operations_total{operation="WriteRecord"}`:               1,
		`k8slan_operations_total{operation="VerifyClaim"}`:               1,
		`k8slan_repairs_total{operation="AddBridge"}`:                    1,
		`k8slan_kubelet_registrations_total`:                             1,
		`k8slan_kubelet_registration_failures_total`:                     1,
		`k8slan_claims_collected_total`:                                  1,
	}
	for name, v := range want {
		if have[name] != v {
			t.Errorf("%s is %v, want %v", name, have[name], v)
		}
		delete(have, name)
	}
	if len(have) > 0 {
		t.Errorf("unexpected series: %v", have)
	}
	for _, name := range described(m) {
		if !strings.Contains(fmt.Sprint(want), name) {
			t.Errorf("this test expects no series of %s", name)
		}
	}
}

// described returns the names of a collector's metrics.
func described(c prometheus.Collector) []string {
	descs := make(chan *prometheus.Desc, 100)
	c.Describe(descs)
	close(descs)
	var names []string
	for d := range descs {
		names = append(names, regexp.MustCompile(`fqName: "(\w+)"`).FindStringSubmatch(d.String())[1])
	}
	return names
}
