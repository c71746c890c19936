package overview

import (
	"testing"
	"time"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

func TestMACsShowsPlacesAndDisagreements(t *testing.T) {
	evpn := func(l *v1beta1.LAN) { l.Status.Discovery = string(v1beta1.EVPN) }
	own := func(a v1beta1.Attachment, mac string) v1beta1.Attachment {
		a.MAC = mac
		return a
	}
	const (
		pod1, pod2, vm = "02:6b:5c:10:00:01", "02:6b:5c:10:00:02", "02:6b:5c:10:00:03"
		guest, outside = "52:54:00:00:00:01", "52:54:00:00:00:99"
	)
	nodes := []v1beta1.LANNode{
		lanNode("worker1", segment("lab", "192.0.2.1",
			own(pod("lab-1", "srl-1", v1beta1.KindVeth), pod1), own(pod("lab-3", "vm-1", v1beta1.KindMacvtap), vm))),
		lanNode("worker2", segment("lab", "192.0.2.2", own(pod("lab-2", "srl-2", v1beta1.KindVeth), pod2))),
		lanNode("worker3", segment("lab", "192.0.2.3")),
	}
	port := func(mac, spoke string, lastSeen time.Duration) MACEntry {
		return MACEntry{MAC: mac, Spoke: spoke, LastSeen: lastSeen}
	}
	behind := func(mac, vtep string) MACEntry { return MACEntry{MAC: mac, VTEP: vtep} }

	for _, test := range []struct {
		name   string
		screen Screen
		macs   MACs
		agree  bool
	}{
		{name: "macs", agree: true, macs: MACs{
			LAN: lan("lab", 222, evpn), LANNodes: nodes, Tables: []NodeTable{
				// the VM's port has the MAC of another guest, too; srl-2 has sent no frame
				{Node: "worker2", Entries: []MACEntry{
					behind(pod1, "192.0.2.1"), behind(vm, "192.0.2.1"),
					behind(guest, "192.0.2.1"), behind(outside, "192.0.2.99"),
				}},
				{Node: "worker1", Entries: []MACEntry{
					port(pod1, "lab-1", 3*time.Second), port(vm, "lab-3", 0), port(guest, "lab-3", 4*time.Minute),
					behind(pod2, "192.0.2.2"), behind(outside, "192.0.2.99"),
				}},
			},
		}},
		{name: "macs-differ", screen: Screen{Width: 90}, macs: MACs{
			LAN: lan("lab", 222, evpn), LANNodes: nodes, Tables: []NodeTable{
				{Node: "worker1", Entries: []MACEntry{
					port(pod1, "lab-1", time.Second),
					port(guest, "lab-3", time.Second), behind(pod2, "192.0.2.3"), behind(outside, "192.0.2.98"),
				}},
				{Node: "worker2", Entries: []MACEntry{
					port(guest, "lab-2", time.Minute), behind(outside, "192.0.2.99"),
					port(pod2, "lab-2", time.Second),
				}},
			},
		}},
		{name: "macs-learned", agree: true, macs: MACs{ // without EVPN, a node need not have learned a MAC
			LAN: lan("lab", 222), LANNodes: nodes, Tables: []NodeTable{
				{Node: "worker1", Entries: []MACEntry{port(pod1, "lab-1", time.Second)}},
				{Node: "worker2", Entries: []MACEntry{port(pod2, "lab-2", time.Second), behind(pod1, "192.0.2.1")}},
			},
		}},
		{name: "macs-on-demand", agree: true, macs: MACs{
			LAN: demanded().OnDemand("")[0], LANNodes: demanded().LANNodes, Tables: []NodeTable{
				{Node: "worker1", Entries: []MACEntry{
					port(pod1, "1a1a1a1a1a1a1a", time.Second),
					behind(pod2, "192.0.2.2"),
				}},
				{Node: "worker2", Entries: []MACEntry{
					behind(pod1, "192.0.2.1"),
					port(pod2, "2b2b2b2b2b2b2b", time.Second),
				}},
			},
		}},
		{name: "macs-named", macs: MACs{
			LAN: lan("lab", 222, evpn), LANNodes: nodes, Only: []string{pod1, guest}, Tables: []NodeTable{
				{Node: "worker1", Entries: []MACEntry{port(pod1, "lab-1", time.Second)}},
			},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.screen.Now = now
			got, agree := test.screen.MACs(test.macs)
			golden(t, test.name, got)
			if agree != test.agree {
				t.Errorf("the nodes agree: %t, want %t", agree, test.agree)
			}
		})
	}
}
