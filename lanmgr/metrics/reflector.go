package metrics

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
)

// Reflector reads the counts of a reflector at each scrape. It implements prometheus.Collector.
type Reflector struct {
	Count func(context.Context) (bgp.Count, error)
}

var (
	reflectedSessionsDesc = prometheus.NewDesc("k8slan_reflector_sessions",
		"BGP sessions of nodes with this reflector that are up.", nil, nil)
	reflectedRoutesDesc = prometheus.NewDesc("k8slan_reflector_routes",
		"EVPN routes that nodes have advertised to this reflector, including those it keeps for disconnected nodes.",
		nil, nil)
)

// answerTimeout is how long the reflector may take to count.
const answerTimeout = 5 * time.Second

// Describe implements prometheus.Collector.
func (r Reflector) Describe(to chan<- *prometheus.Desc) {
	to <- reflectedSessionsDesc
	to <- reflectedRoutesDesc
}

// Collect implements prometheus.Collector.
func (r Reflector) Collect(to chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
	defer cancel()
	c, err := r.Count(ctx)
	if err != nil {
		to <- prometheus.NewInvalidMetric(reflectedSessionsDesc, err)
		return
	}
	to <- prometheus.MustNewConstMetric(reflectedSessionsDesc, prometheus.GaugeValue, float64(c.Sessions))
	to <- prometheus.MustNewConstMetric(reflectedRoutesDesc, prometheus.GaugeValue, float64(c.Routes))
}
