// Package metrics is what a node's daemon, and a reflector, tell Prometheus.
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

// Metrics counts what happens on a node and asks, at each scrape, how it is. It is a prometheus.Collector.
type Metrics struct {
	sources Sources
	counted []prometheus.Collector

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
	healthy map[bool]int           // spokes on offer
}

// Sources are asked at each scrape.
type Sources struct {
	Reports    func() []lanmgr.Report   // what the node has
	Registered func() int               // how many spokes on offer kubelet knows
	Dropped    func() map[string]uint64 // packets of strangers, by the LAN's name
	EVPN       EVPN                     // nil: the node takes no part in EVPN
}

// EVPN is what a node hears and tells by EVPN; fabric.Fabric is one.
type EVPN interface {
	Sessions() []bgp.Session
	Count(netns string) (macvrf.Count, bool)
}

var (
	segmentsDesc = prometheus.NewDesc("k8slan_segments",
		"LANs on this node by state, in the words of LANNode.", []string{"state"}, nil)
	spokesDesc = prometheus.NewDesc("k8slan_spokes",
		"Spokes, and ports of pools, that this node offers to kubelet: healthy ones a pod may have now.", []string{"state"}, nil)
	registeredDesc = prometheus.NewDesc("k8slan_spokes_registered",
		"Spokes, and ports of pools, on offer that kubelet knows.", nil, nil)
	attachmentsDesc = prometheus.NewDesc("k8slan_attachments",
		"Pods and VMs that are attached on this node, read from the kernel.", []string{"kind"}, nil)
	learnedDesc = prometheus.NewDesc("k8slan_fdb_learned_entries",
		"Ethernet addresses that a LAN's bridge on this node has learned, at most a minute ago. Needs Linux 6.7.", []string{"lan"}, nil)
	remotesDesc = prometheus.NewDesc("k8slan_remotes",
		"Nodes to which this one sends what a LAN floods, one by one. Not of LANs with multicast discovery.", []string{"lan"}, nil)
	droppedDesc = prometheus.NewDesc("k8slan_nonmember_packets_dropped_total",
		"VXLAN packets with the VNI of a LAN that came from none of its nodes, and were dropped. Only of LANs with strict peers.", []string{"lan"}, nil)
	sessionsDesc = prometheus.NewDesc("k8slan_bgp_sessions",
		"BGP sessions of this node by state.", []string{"state"}, nil)
	routesDesc = prometheus.NewDesc("k8slan_evpn_routes",
		"EVPN routes of a LAN: own ones that this node tells, those of others that it uses, and those of others that it cannot use.", []string{"lan", "use"}, nil)
	macsDesc = prometheus.NewDesc("k8slan_evpn_macs",
		"Ethernet addresses on a LAN: on this node, on another, or on both at once.", []string{"lan", "place"}, nil)
	movesDesc = prometheus.NewDesc("k8slan_evpn_mac_moves_total",
		"Ethernet addresses on a LAN that went from one node to another, this one or not.", []string{"lan"}, nil)
)

// Buckets in seconds: an attachment takes some milliseconds, with addresses a second or two, and at most a minute; a look at a
// segment with nothing to do takes less than one.
var (
	attachBuckets    = []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}
	reconcileBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10}
)

// What a call of the plugin and a look at a segment came to.
const (
	succeeded = "succeeded"
	failed    = "failed"
	changed   = "changed"
	unchanged = "unchanged"
)

// New returns the metrics of a node.
func New(sources Sources) *Metrics {
	m := &Metrics{sources: sources, healthy: map[bool]int{}}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		m.counted = append(m.counted, c)
		return c
	}
	counters := func(name, help string, label string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
		m.counted = append(m.counted, c)
		return c
	}
	durations := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
		m.counted = append(m.counted, h)
		return h
	}
	m.attached = durations("k8slan_attach_duration_seconds",
		"How long the CNI plugin took to attach a pod or VM, or to refuse it, its IPAM plugin included.", attachBuckets, "kind", "result")
	m.attachFailed = counters("k8slan_attach_failures_total",
		"Attachments that the CNI plugin refused or failed to make. kubelet tries each again until the pod is gone.", "reason")
	m.detached = durations("k8slan_detach_duration_seconds",
		"How long the CNI plugin took to detach a pod or VM, its IPAM plugin included.", attachBuckets, "kind", "result")
	m.detachFailed = counters("k8slan_detach_failures_total",
		"Attachments that the CNI plugin failed to end. The runtime tries each again.", "reason")
	m.takeovers = counter("k8slan_takeovers_total",
		"Attachments to a spoke that the sandbox of an earlier pod still had.")
	m.observations = durations("k8slan_reconcile_duration_seconds",
		"How long it took to look at a LAN on this node and to bring it in order.", reconcileBuckets, "result")
	m.operations = counters("k8slan_operations_total",
		"Changes that the daemon made to this node's kernel and records, by kind.", "operation")
	m.repairs = counters("k8slan_repairs_total",
		"Those of the changes that restored a LAN which stood, because something else than k8slan had changed it.", "operation")
	m.registrations = counter("k8slan_kubelet_registrations_total",
		"Spokes that were registered with kubelet, each again whenever kubelet starts.")
	m.registrationFailed = counter("k8slan_kubelet_registration_failures_total",
		"Registrations of spokes that kubelet refused or did not answer.")
	m.collected = counter("k8slan_claims_collected_total",
		"Attachments that the daemon ended because kubelet no longer had their pod and nobody had detached it.")
	// A series that is there from the start shows its first event as a rise.
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
	return m
}

// Outcome counts what became of an attachment.
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
		if !slices.Contains(report.Reasons, o.Reason) { // of a plugin of another version
			o.Reason = report.Other
		}
		failures.WithLabelValues(string(o.Reason)).Inc()
	}
	durations.WithLabelValues(kind, result).Observe(o.Took.Seconds())
	if o.TookOver {
		m.takeovers.Inc()
	}
}

// Observedrvation counts a look at a segment.
func (m *Metrics) Observed(l lanmgr.Observation) {
	result := unchanged
	switch {
	case l.Err != nil:
		result = failed
	case len(l.Done) > 0:
		result = changed
	}
	m.observations.WithLabelValues(result).Observe(l.Took.Seconds())
	for _, op := range l.Done {
		kind := reflect.TypeOf(op).Name()
		m.operations.WithLabelValues(kind).Inc()
		if _, question := op.(segment.VerifyClaim); l.Repair && !question {
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

// Collected counts a claim that was ended because its pod had gone.
func (m *Metrics) Collected() { m.collected.Inc() }

// Published keeps what the node reports of its LANs.
func (m *Metrics) Published(status v1beta1.LANNodeStatus) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status = &status
}

// Advertised keeps how many spokes the node offers to kubelet.
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
	gauge := func(desc *prometheus.Desc, value int, labels ...string) {
		to <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(value), labels...)
	}
	gauge(registeredDesc, m.sources.Registered())
	lans := map[string]bool{}
	for _, r := range m.sources.Reports() {
		lan := r.Segment.LAN.String()
		if r.Segment.LAN.Name == "" || lans[lan] { // a LAN may be leaving one netns and be in another
			continue
		}
		lans[lan] = true
		if r.Learned >= 0 {
			gauge(learnedDesc, r.Learned, lan)
		}
		if r.Remotes >= 0 {
			gauge(remotesDesc, r.Remotes, lan)
		}
		m.collectEVPN(to, lan, r.Segment.Netns)
	}
	if m.sources.EVPN != nil {
		up := map[bool]int{}
		for _, s := range m.sources.EVPN.Sessions() {
			up[s.Up]++
		}
		gauge(sessionsDesc, up[true], "up")
		gauge(sessionsDesc, up[false], "down")
	}
	for lan, packets := range m.sources.Dropped() {
		to <- prometheus.MustNewConstMetric(droppedDesc, prometheus.CounterValue, float64(packets), lan)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	gauge(spokesDesc, m.healthy[true], "healthy")
	gauge(spokesDesc, m.healthy[false], "unhealthy")
	if m.status == nil {
		return // to say 0 would be wrong
	}
	states, kinds := map[v1beta1.SegmentState]int{}, map[v1beta1.AttachmentKind]int{}
	for _, s := range m.status.Segments {
		states[s.State]++
		for _, a := range s.Attachments {
			kinds[a.Kind]++
		}
	}
	for _, state := range []v1beta1.SegmentState{v1beta1.SegmentReady, v1beta1.SegmentDegraded, v1beta1.SegmentNotReady, v1beta1.SegmentLeaving} {
		gauge(segmentsDesc, states[state], string(state))
	}
	for _, kind := range []v1beta1.AttachmentKind{v1beta1.KindVeth, v1beta1.KindMacvtap} {
		gauge(attachmentsDesc, kinds[kind], string(kind))
	}
}

// collectEVPN tells of a LAN with discovery evpn.
func (m *Metrics) collectEVPN(to chan<- prometheus.Metric, lan, netns string) {
	if m.sources.EVPN == nil {
		return
	}
	c, ok := m.sources.EVPN.Count(netns)
	if !ok {
		return
	}
	gauge := func(desc *prometheus.Desc, value int, label string) {
		to <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(value), lan, label)
	}
	gauge(routesDesc, c.Advertised, "advertised")
	gauge(routesDesc, c.Used, "used")
	gauge(routesDesc, c.Refused, "refused")
	gauge(macsDesc, c.Local, "here")
	gauge(macsDesc, c.Remote, "elsewhere")
	gauge(macsDesc, c.Duplicate, "twice")
	to <- prometheus.MustNewConstMetric(movesDesc, prometheus.CounterValue, float64(c.Moves), lan)
}
