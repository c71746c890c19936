package controller

import (
	"maps"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// scrape returns the value of each series. Its key is the name, a space and the value of the label.
func scrape(t *testing.T, m *Metrics) map[string]float64 {
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
			name := family.GetName()
			for _, l := range metric.GetLabel() {
				name += " " + l.GetValue()
			}
			series[name] = metric.GetGauge().GetValue() + metric.GetCounter().GetValue()
		}
	}
	return series
}

func TestOnlyLeaderExportsLANMetrics(t *testing.T) {
	m := NewMetrics()
	if have := scrape(t, m); !maps.Equal(have, map[string]float64{"k8slan_residue_removed_total": 0}) {
		t.Errorf("a controller that has not led exports %v", have)
	}
	on := []v1beta1.SpokeAttachment{{Node: "worker1"}}
	m.record([]v1beta1.LANStatus{
		{
			State: v1beta1.StateReady, Holds: &v1beta1.Holding{Spokes: []string{"a", "b", "c"}},
			Spokes: []v1beta1.SpokeStatus{
				{Name: "a", Attachments: on}, {Name: "withdrawn", Attachments: on},
			},
		},
		{State: v1beta1.StateReady, Holds: &v1beta1.Holding{Spokes: []string{"web"}}, Pools: []v1beta1.PoolStatus{
			{Name: "web", Attached: 3, Ports: 10},
			{Name: "small", Attached: 5, Ports: 4},
			{Name: "db", Refused: "held by another LAN"},
		}},
		{
			State: v1beta1.StateReady, Holds: &v1beta1.Holding{Spokes: []string{"d"}},
			Spokes: []v1beta1.SpokeStatus{{Name: "a", Refused: "held by another LAN"}},
		},
		{State: v1beta1.StateConflict},
	})
	want := map[string]float64{
		"k8slan_lans Ready": 3, "k8slan_lans Conflict": 1, "k8slan_lans Pending": 0, "k8slan_lans Degraded": 0,
		"k8slan_lans Deleting":       0,
		"k8slan_lan_spokes attached": 10, "k8slan_lan_spokes free": 10, "k8slan_lan_spokes refused": 2,
		"k8slan_residue_removed_total": 0,
	}
	if have := scrape(t, m); !maps.Equal(have, want) {
		t.Errorf("have %v\nwant %v", have, want)
	}
}
