package controller

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

var (
	lansDesc = prometheus.NewDesc("k8slan_lans",
		"LANs of the cluster by state. Only the leading controller exports it.", []string{"state"}, nil)
	lanSpokesDesc = prometheus.NewDesc("k8slan_lan_spokes",
		"Spokes of the cluster's LANs, and ports of pools on all nodes, by state: attached, free, or refused because "+
			"another LAN holds the name. Only the leading controller exports it.",
		[]string{"state"}, nil)
)

// Metrics has the controller's own metrics. It is a prometheus.Collector.
type Metrics struct {
	residue prometheus.Counter

	mu     sync.Mutex
	leads  bool // record has been called, so this controller leads
	lans   map[v1beta1.LANState]int
	spokes map[string]int
}

// NewMetrics returns the metrics of one controller.
func NewMetrics() *Metrics {
	return &Metrics{residue: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "k8slan_residue_removed_total",
		Help: "Resources of spokes that no LAN holds, removed from the status of Nodes, where kubelet leaves them " +
			"with the value 0.",
	})}
}

// record counts LANs and spokes by the statuses of all LANs.
func (m *Metrics) record(lans []v1beta1.LANStatus) {
	states, spokes := map[v1beta1.LANState]int{}, map[string]int{}
	for _, s := range lans {
		states[s.State]++
		taken := map[string]bool{}
		for _, spoke := range s.Spokes {
			switch {
			case spoke.Refused != "":
				spokes["refused"]++
			case len(spoke.Attachments) > 0:
				spokes["attached"]++
				taken[spoke.Name] = true
			}
		}
		pools := map[string]bool{}
		for _, pool := range s.Pools {
			pools[pool.Name] = true
			spokes["attached"] += int(pool.Attached)
			spokes["free"] += int(max(pool.Ports-pool.Attached, 0))
			if pool.Refused != "" {
				spokes["refused"]++
			}
		}
		if s.Holds == nil {
			continue
		}
		for _, spoke := range s.Holds.Spokes {
			if !taken[spoke] && !pools[spoke] {
				spokes["free"]++
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leads, m.lans, m.spokes = true, states, spokes
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(to chan<- *prometheus.Desc) {
	to <- lansDesc
	to <- lanSpokesDesc
	m.residue.Describe(to)
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(to chan<- prometheus.Metric) {
	m.residue.Collect(to)
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.leads {
		return
	}
	for _, state := range []v1beta1.LANState{
		v1beta1.StatePending, v1beta1.StateReady, v1beta1.StateDegraded, v1beta1.StateConflict, v1beta1.StateDeleting,
	} {
		to <- prometheus.MustNewConstMetric(lansDesc, prometheus.GaugeValue, float64(m.lans[state]), string(state))
	}
	for _, state := range []string{"attached", "free", "refused"} {
		to <- prometheus.MustNewConstMetric(lanSpokesDesc, prometheus.GaugeValue, float64(m.spokes[state]), state)
	}
}
