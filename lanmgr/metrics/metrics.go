// Package metrics has the Prometheus metrics of a node's daemon and of a reflector.
package metrics

import (
	"reflect"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/agent"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Metrics counts events on a node, and reads its state at each scrape. It implements prometheus.Collector.
type Metrics struct {
	sources Sources
	counted []prometheus.Collector // the metrics below

	attached, detached *prometheus.HistogramVec
	attachFailed       *prometheus.CounterVec
	detachFailed       *prometheus.CounterVec
	takeovers          prometheus.Counter
	observations       *prometheus.HistogramVec
	operations         *prometheus.CounterVec
	repairs            *prometheus.CounterVec
	registrations      prometheus.Counter
	registrationFailed prometheus.Counter
	collected          prometheus.Counter

	mu      sync.Mutex
	status  *v1beta1.LANNodeStatus // nil: not known yet
	healthy map[bool]int           // number of advertised spokes, by health
}

// Sources are read at each scrape.
type Sources struct {
	Reports    func() []lanmgr.Report   // what the node has
	Registered func() int               // number of advertised spokes that are registered with kubelet
	Dropped    func() map[string]uint64 // dropped packets of non-members, by the LAN's name
	EVPN       EVPN                     // nil: the daemon runs no EVPN
}

// EVPN has the counts of a node's EVPN instance. evpn.Instance implements it.
type EVPN interface {
	Sessions() []bgp.Session
	Count(netns string) (macvrf.Count, bool)
}

var (
	segmentsDesc = prometheus.NewDesc("k8slan_segments",
		"LANs on this node, by their state in its LANNode.", []string{"state"}, nil)
	spokesDesc = prometheus.NewDesc("k8slan_spokes",
		"Spokes, and ports of pools, that this node advertises to kubelet, by health.", []string{"state"}, nil)
	registeredDesc = prometheus.NewDesc("k8slan_spokes_registered",
		"Advertised spokes, and ports of pools, that are registered with kubelet.", nil, nil)
	attachmentsDesc = prometheus.NewDesc("k8slan_attachments",
		"Pods and VMs that are attached on this node, read from the kernel.", []string{"kind"}, nil)
	learnedDesc = prometheus.NewDesc("k8slan_fdb_learned_entries",
		"Ethernet addresses that the LAN's bridge on this node learned, as of a minute ago at most. Needs Linux 6.7.",
		[]string{"lan"}, nil)
	remotesDesc = prometheus.NewDesc("k8slan_remotes",
		"Nodes to which this node sends a copy of each flooded frame. Not for LANs with discovery multicast.",
		[]string{"lan"}, nil)
	droppedDesc = prometheus.NewDesc("k8slan_nonmember_packets_dropped_total",
		"VXLAN packets with the VNI of a LAN that were dropped because they came from no member. "+
			"Only for LANs with strict peers.", []string{"lan"}, nil)
	sessionsDesc = prometheus.NewDesc("k8slan_bgp_sessions",
		"BGP sessions of this node, by state.", []string{"state"}, nil)
	routesDesc = prometheus.NewDesc("k8slan_evpn_routes",
		"EVPN routes of a LAN: those that this node advertises, and those of other routers that it uses or cannot use.",
		[]string{"lan", "use"}, nil)
	macsDesc = prometheus.NewDesc("k8slan_evpn_macs",
		"Ethernet addresses on a LAN: on this node, on another, or on both at once.", []string{"lan", "place"}, nil)
	movesDesc = prometheus.NewDesc("k8slan_evpn_mac_moves_total",
		"Moves of Ethernet addresses on a LAN from one node to another, this one or not.", []string{"lan"}, nil)
)

// Buckets in seconds. An attachment takes some milliseconds, with addresses a second or two, and at most a minute. A
// reconciliation without operations takes less than a millisecond.
var (
	attachBuckets    = []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}
	reconcileBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10}
)

// Results of a call of the plugin, and of a reconciliation.
const (
	succeeded = "succeeded"
	failed    = "failed"
	changed   = "changed"
	unchanged = "unchanged"
)

// New returns the metrics of a node.
func New(sources Sources) *Metrics {
	m := &Metrics{sources: sources, healthy: map[bool]int{}}
	m.attached = m.histogram("k8slan_attach_duration_seconds",
		"Time that the CNI plugin took to attach a pod or VM, or to refuse it, including its IPAM plugin.",
		attachBuckets, "kind", "result")
	m.attachFailed = m.counters("k8slan_attach_failures_total",
		"Attachments that the CNI plugin refused or failed to make. kubelet retries until the pod is deleted.",
		"reason")
	m.detached = m.histogram("k8slan_detach_duration_seconds",
		"Time that the CNI plugin took to detach a pod or VM, including its IPAM plugin.",
		attachBuckets, "kind", "result")
	m.detachFailed = m.counters("k8slan_detach_failures_total",
		"Attachments that the CNI plugin failed to end. The container runtime retries.", "reason")
	m.takeovers = m.counter("k8slan_takeovers_total",
		"Attachments to a spoke that the sandbox of an earlier pod still had.")
	m.observations = m.histogram("k8slan_reconcile_duration_seconds",
		"Time that the daemon took to reconcile a LAN on this node.", reconcileBuckets, "result")
	m.operations = m.counters("k8slan_operations_total",
		"Operations that the daemon applied to this node's kernel and records, by kind.", "operation")
	m.repairs = m.counters("k8slan_repairs_total",
		"Operations that restored a LAN after something other than k8slan had changed it.", "operation")
	m.registrations = m.counter("k8slan_kubelet_registrations_total",
		"Registrations of spokes with kubelet, repeated whenever kubelet starts.")
	m.registrationFailed = m.counter("k8slan_kubelet_registration_failures_total",
		"Registrations of spokes that kubelet refused or did not answer.")
	m.collected = m.counter("k8slan_claims_collected_total",
		"Attachments that the daemon ended because kubelet no longer had their pod, and no CNI DEL had ended them.")
	m.addZeros()
	return m
}

func (m *Metrics) counter(name, help string) prometheus.Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	m.counted = append(m.counted, c)
	return c
}

func (m *Metrics) counters(name, help, label string) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
	m.counted = append(m.counted, c)
	return c
}

func (m *Metrics) histogram(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
	m.counted = append(m.counted, h)
	return h
}

// addZeros adds series with the value 0, so that their first event is an increase.
func (m *Metrics) addZeros() {
	for _, reason := range report.Reasons {
		m.attachFailed.WithLabelValues(string(reason))
		m.detachFailed.WithLabelValues(string(reason))
	}
	for _, kind := range []segment.Kind{segment.Veth, segment.Macvtap} {
		for _, result := range []string{succeeded, failed} {
			m.attached.WithLabelValues(string(kind), result)
			m.detached.WithLabelValues(string(kind), result)
		}
	}
}

// Outcome counts a call of the CNI plugin.
func (m *Metrics) Outcome(o report.Outcome) {
	durations, failures := m.attached, m.attachFailed
	if o.Verb == report.Del {
		durations, failures = m.detached, m.detachFailed
	}
	kind, result := "unknown", succeeded
	if o.Kind == segment.Veth || o.Kind == segment.Macvtap {
		kind = string(o.Kind)
	}
	if o.Reason != "" {
		result = failed
		if !slices.Contains(report.Reasons, o.Reason) { // from a plugin of another version
			o.Reason = report.Other
		}
		failures.WithLabelValues(string(o.Reason)).Inc()
	}
	durations.WithLabelValues(kind, result).Observe(o.Took.Seconds())
	if o.TookOver {
		m.takeovers.Inc()
	}
}

// Observed counts a reconciliation of a segment.
func (m *Metrics) Observed(o lanmgr.Observation) {
	result := unchanged
	switch {
	case o.Err != nil:
		result = failed
	case len(o.Done) > 0:
		result = changed
	}
	m.observations.WithLabelValues(result).Observe(o.Took.Seconds())
	for _, op := range o.Done {
		kind := reflect.TypeOf(op).Name()
		m.operations.WithLabelValues(kind).Inc()
		if _, readOnly := op.(segment.VerifyClaim); o.Repair && !readOnly {
			m.repairs.WithLabelValues(kind).Inc()
		}
	}
}

// Registration counts a registration with kubelet.
func (m *Metrics) Registration(err error) {
	if err != nil {
		m.registrationFailed.Inc()
		return
	}
	m.registrations.Inc()
}

// Collected counts a claim that was ended because kubelet no longer had its pod.
func (m *Metrics) Collected() { m.collected.Inc() }

// Published sets the status that the node's LANNode has.
func (m *Metrics) Published(status v1beta1.LANNodeStatus) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status = &status
}

// Advertised sets the spokes that the node advertises to kubelet.
func (m *Metrics) Advertised(spokes []agent.Spoke) {
	healthy := map[bool]int{}
	for _, s := range spokes {
		healthy[s.Healthy] += max(s.Ports, 1)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.healthy = healthy
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		segmentsDesc, spokesDesc, registeredDesc, attachmentsDesc, learnedDesc, remotesDesc, droppedDesc,
		sessionsDesc, routesDesc, macsDesc, movesDesc,
	} {
		to <- d
	}
	for _, c := range m.counted {
		c.Describe(to)
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(to chan<- prometheus.Metric) {
	for _, c := range m.counted {
		c.Collect(to)
	}
	gauge(to, registeredDesc, m.sources.Registered())
	m.collectReports(to)
	m.collectSessions(to)
	for lan, packets := range m.sources.Dropped() {
		to <- prometheus.MustNewConstMetric(droppedDesc, prometheus.CounterValue, float64(packets), lan)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	gauge(to, spokesDesc, m.healthy[true], "healthy")
	gauge(to, spokesDesc, m.healthy[false], "unhealthy")
	if m.status != nil { // before that, 0 would be wrong
		collectStatus(to, *m.status)
	}
}

func gauge(to chan<- prometheus.Metric, desc *prometheus.Desc, value int, labels ...string) {
	to <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(value), labels...)
}

// collectReports collects the metrics of each LAN on the node.
func (m *Metrics) collectReports(to chan<- prometheus.Metric) {
	collected := map[string]bool{}
	for _, r := range m.sources.Reports() {
		lan := r.Segment.LAN.String()
		if r.Segment.LAN.Name == "" || collected[lan] { // a LAN can be leaving one network namespace and be in another
			continue
		}
		collected[lan] = true
		if r.Learned >= 0 {
			gauge(to, learnedDesc, r.Learned, lan)
		}
		if r.Remotes >= 0 {
			gauge(to, remotesDesc, r.Remotes, lan)
		}
		m.collectEVPN(to, lan, r.Segment.Netns)
	}
}

// collectEVPN collects the metrics of a LAN with discovery evpn.
func (m *Metrics) collectEVPN(to chan<- prometheus.Metric, lan, netns string) {
	if m.sources.EVPN == nil {
		return
	}
	c, ok := m.sources.EVPN.Count(netns)
	if !ok {
		return
	}
	gauge(to, routesDesc, c.Advertised, lan, "advertised")
	gauge(to, routesDesc, c.Used, lan, "used")
	gauge(to, routesDesc, c.Refused, lan, "refused")
	gauge(to, macsDesc, c.Local, lan, "here")
	gauge(to, macsDesc, c.Remote, lan, "elsewhere")
	gauge(to, macsDesc, c.Duplicate, lan, "twice")
	to <- prometheus.MustNewConstMetric(movesDesc, prometheus.CounterValue, float64(c.Moves), lan)
}

// collectSessions counts the node's BGP sessions.
func (m *Metrics) collectSessions(to chan<- prometheus.Metric) {
	if m.sources.EVPN == nil {
		return
	}
	up := map[bool]int{}
	for _, s := range m.sources.EVPN.Sessions() {
		up[s.Up]++
	}
	gauge(to, sessionsDesc, up[true], "up")
	gauge(to, sessionsDesc, up[false], "down")
}

// collectStatus counts segments and attachments in the status of the LANNode.
func collectStatus(to chan<- prometheus.Metric, status v1beta1.LANNodeStatus) {
	states, kinds := map[v1beta1.SegmentState]int{}, map[v1beta1.AttachmentKind]int{}
	for _, s := range status.Segments {
		states[s.State]++
		for _, a := range s.Attachments {
			kinds[a.Kind]++
		}
	}
	for _, state := range []v1beta1.SegmentState{
		v1beta1.SegmentReady, v1beta1.SegmentDegraded, v1beta1.SegmentNotReady, v1beta1.SegmentLeaving,
	} {
		gauge(to, segmentsDesc, states[state], string(state))
	}
	for _, kind := range []v1beta1.AttachmentKind{v1beta1.KindVeth, v1beta1.KindMacvtap} {
		gauge(to, attachmentsDesc, kinds[kind], string(kind))
	}
}
