package dataplane

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/k8slan/k8slan/cni"
	"github.com/k8slan/k8slan/cni/report/receiver"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/metrics"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
)

// meteredNode is a node on which the daemon's manager runs, with its metrics.
type meteredNode struct {
	managed
	registry *prometheus.Registry
}

// startMetered starts the manager with its metrics, which also count the reports of the CNI plugin.
func (n node) startMetered(t *testing.T) meteredNode {
	t.Helper()
	c := meteredNode{managed: n.manage(t), registry: prometheus.NewRegistry()}
	drop := firewall.New(n.Path, firewall.TableName, slog.New(slog.DiscardHandler))
	m := metrics.New(metrics.Sources{
		Reports: c.Reports, Registered: func() int { return 0 }, Dropped: drop.Dropped,
	})
	c.Manager.OnObserve = m.Observed // the manager observes nothing before the first Set
	must(t, c.registry.Register(m))
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		receiver.Run(ctx, n.Run, slog.New(slog.NewTextHandler(t.Output(), nil)), m.Outcome)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return c
}

// value returns the value of a series, "name" or "name label=value …", or the count of a histogram; -1 if there is no
// such series.
func (c meteredNode) value(t *testing.T, series string) float64 {
	t.Helper()
	families, err := c.registry.Gather()
	must(t, err)
	for _, family := range families {
		for _, m := range family.GetMetric() {
			name := family.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetName() + "=" + l.GetValue()
			}
			if name == series {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return -1
}

// awaitSeries returns when a series has at least that value.
func (c meteredNode) awaitSeries(t *testing.T, series string, least float64) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s to be %v", series, least), func() bool { return c.value(t, series) >= least })
}

func TestMetricsCountWhatHappensOnANode(t *testing.T) {
	t.Parallel()
	h, s := nodeWithLAN(t)
	c := h.startMetered(t)
	eventually(t, "the daemon to listen", func() bool { return exists(h.Run + "/outcomes.sock") })
	c.runs(t, s)
	const (
		attached = "k8slan_attach_duration_seconds kind=veth result=succeeded"
		detached = "k8slan_detach_duration_seconds kind=veth result=succeeded"
		learnt   = "k8slan_fdb_learned_entries lan=default/lab"
		remotes  = "k8slan_remotes lan=default/lab"
	)
	if v := c.value(t, remotes); v != -1 {
		t.Errorf("a LAN with a group has %v remotes", v)
	}
	pod, vm := h.sandbox(t), h.sandbox(t)
	podNetwork := network(s, "srl", segment.Veth, nil)
	wire, _ := pod.add(t, s, podNetwork)
	c.awaitSeries(t, attached, 1)
	vm.add(t, s, network(s, "vm", segment.Macvtap, nil))
	c.awaitSeries(t, "k8slan_attach_duration_seconds kind=macvtap result=succeeded", 1)
	h.sandbox(t).mustFail(t, "ADD", with(podNetwork, keys{"deviceID": ""}), cni.CodeNoDevice, "allocated no")
	c.awaitSeries(t, "k8slan_attach_failures_total reason=no_device", 1)
	nowhere := with(podNetwork, keys{"ns": "nowhere"})
	h.sandbox(t).mustFail(t, "ADD", nowhere, types.ErrTryAgainLater, "is not on this node")
	c.awaitSeries(t, "k8slan_attach_failures_total reason=unavailable", 1)

	before := c.value(t, learnt)
	for i := range 5 {
		must(t, wire.Send(frames.Stream(nil, segment.MAC(s.LAN, fmt.Sprint("behind the pod ", i)), 1, 1)))
	}
	var major, minor int
	_, err := fmt.Sscanf(read(t, "/proc/sys/kernel/osrelease"), "%d.%d", &major, &minor)
	must(t, err)
	if major > 6 || major == 6 && minor >= 7 {
		h.awaitState(t, s, "the bridge to learn", func(have segment.State) bool {
			bridge, _ := have.Link(s.Bridge)
			return bridge.Learned >= int(before)+5
		})
		c.Enqueue(s.Netns)
		c.awaitSeries(t, learnt, before+5)
	} else if before != -1 {
		t.Errorf("%v addresses on a kernel that does not count them", before)
	}

	next := h.sandbox(t)
	next.add(t, s, podNetwork)
	c.awaitSeries(t, "k8slan_takeovers_total", 1)
	next.mustCall(t, "DEL", podNetwork)
	c.awaitSeries(t, detached, 1)
	absent := with(podNetwork, keys{"ipam": keys{"type": "no-such-plugin"}})
	h.sandbox(t).mustFail(t, "DEL", absent, cni.CodeIPAM, "no-such-plugin")
	c.awaitSeries(t, "k8slan_detach_failures_total reason=ipam", 1)
	c.awaitReports(t, "the VM's claim only", func(reports []lanmgr.Report) bool {
		return len(reports[0].Claims) == 1 && reports[0].Built
	})

	repairs := "k8slan_repairs_total operation=AddPair"
	if v := c.value(t, repairs); v > 0 {
		t.Errorf("%v repairs before anything was damaged", v)
	}
	built := max(0, c.value(t, "k8slan_operations_total operation=AddPair"))
	inside := h.lanNetns(s).Netlink(t)
	port, err := inside.LinkByName(segment.PortName("srl"))
	must(t, err)
	must(t, inside.LinkDel(port))
	c.awaitSeries(t, repairs, 1)
	c.awaitSeries(t, "k8slan_operations_total operation=AddPair", built+1)
	c.awaitSeries(t, "k8slan_reconcile_duration_seconds result=changed", 1)
	c.awaitSeries(t, "k8slan_reconcile_duration_seconds result=unchanged", 1)

	vtep := netip.MustParseAddr("192.0.2.1")
	h.addUnderlayAddress(t, netip.PrefixFrom(vtep, 24))
	repaired := c.value(t, repairs)
	c.Set([]segment.Segment{unicast(s, vtep, netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.3"))})
	c.awaitSeries(t, remotes, 2)
	if v := c.value(t, repairs); v != repaired {
		t.Errorf("%v repairs, %v before the LAN got remotes", v, repaired)
	}
}
