package dataplane

import (
	"context"
	"io"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/k8slan/k8slan/lanmgr/diag/probe"
	"github.com/k8slan/k8slan/lanmgr/diag/probe/endpoint"
	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/netlab"
)

// startEndpoint starts a probe's endpoint on a spoke.
func (n node) startEndpoint(t *testing.T, s segment.Segment, spoke string) probe.Endpoint {
	t.Helper()
	orders, order := io.Pipe()
	says, say := io.Pipe()
	end := make(chan error, 1)
	go func() {
		err := endpoint.Run(context.WithoutCancel(t.Context()), n.kernel, s.Netns, spoke, orders, say)
		_ = say.CloseWithError(err)
		end <- err
	}()
	t.Cleanup(func() {
		_, _ = order.Close(), says.Close()
		if err := <-end; err != nil && !strings.Contains(err.Error(), io.ErrClosedPipe.Error()) {
			t.Errorf("the endpoint of %s: %v", spoke, err)
		}
	})
	return probe.Endpoint{Node: n.Name, Orders: order, Messages: says}
}

// expectProbe expects a probe to report these words about the path from one to two and about the path back, and whether
// all is well.
func expectProbe(t *testing.T, one, two probe.Endpoint, well bool, there, back string) {
	t.Helper()
	forth, home, err := probe.Run(t.Context(), one, two)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		course probe.Path
		want   string
	}{{forth, there}, {home, back}} {
		ok, sentences := c.course.Verdict()
		said := strings.Join(sentences, "\n")
		t.Log(said)
		if ok != well || !strings.Contains(said, c.want) {
			t.Errorf("all is well %t, and the probe reports:\n%s\nwant %t, %q", ok, said, well, c.want)
		}
	}
}

func TestProbeReportsWhatPassesAndWhereFramesAreLost(t *testing.T) {
	t.Parallel()
	const all = "every kind of frame passes, packets of up to 1422 bytes, up to 4 VLAN tags and maybe more"
	for _, c := range []struct {
		name        string
		fault       func(t *testing.T, a, b node, s segment.Segment, pod *host)
		well        bool
		there, back string
	}{
		{
			name: "nothing is wrong", well: true, there: all, back: all,
			fault: func(*testing.T, node, node, segment.Segment, *host) {},
		},
		{
			name:  "the MTU of the network between the nodes is too small",
			there: "packets of up to 1334 bytes pass, longer ones do not", back: "raise it, or set spec.mtu to 1326",
			fault: func(t *testing.T, a, b node, _ segment.Segment, _ *host) {
				setLink(t, a.underlay.Netlink(t), b.Port(), func(h *netlink.Handle, l netlink.Link) error {
					return h.LinkSetMTU(l, 1400)
				})
			},
		},
		{
			name:  "a pod's interface is down",
			there: "Interface net1 in pod default/two is down", back: "Set it up inside the pod",
			fault: func(t *testing.T, _, b node, s segment.Segment, pod *host) {
				setLink(t, pod.Netlink(t), ifname, (*netlink.Handle).LinkSetDown)
			},
		},
		{
			name:  "the other node has another VNI",
			there: "with VNI 250, but VXLAN vx250 there has VNI 999",
			back:  "with VNI 999, but VXLAN vx250 there has VNI 250",
			fault: func(t *testing.T, _, b node, s segment.Segment, _ *host) {
				s.VXLAN.VNI = 999
				b.reconcile(t, b.withUnderlay(t, s))
			},
		},
		{
			name:  "neither node is a member for the other",
			there: "is dropped there because that is not a member: the LAN has strictPeers",
			back:  "kubectl get lannode worker2 -o yaml",
			fault: func(t *testing.T, a, b node, s segment.Segment, _ *host) {
				for _, h := range []node{a, b} {
					filter, _ := h.filter(t)
					filter.Set([]firewall.LAN{strict(s)})
					eventually(t, "the filter", func() bool { return drops(filter, s) == 0 })
				}
			},
		},
		{
			name:  "the VXLAN is down",
			there: "but not to VXLAN vx250 there, which is down",
			back:  "Lost on node worker2 between bridge br250 and VXLAN vx250, which is down",
			fault: func(t *testing.T, _, b node, s segment.Segment, _ *host) {
				setLink(t, b.lanNetns(s).Netlink(t), s.VXLAN.Name, (*netlink.Handle).LinkSetDown)
			},
		},
		{
			name:  "the underlay has no carrier",
			there: "but eth1 of node worker2 is down or has no carrier",
			back:  "did not leave by eth1, which has no carrier",
			fault: func(t *testing.T, a, b node, _ segment.Segment, _ *host) {
				setLink(t, a.underlay.Netlink(t), b.Port(), (*netlink.Handle).LinkSetDown)
				b.AwaitNoCarrier(t, netlab.UnderlayDevice)
			},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a, b := twoNodes(t)
			s := lan("path", 250, "one", "two")
			a.reconcile(t, a.withUnderlay(t, s))
			b.reconcile(t, b.withUnderlay(t, s))
			one, two := a.claim(t, s, "one", segment.Veth), b.claim(t, s, "two", segment.Veth)
			for n, pod := range map[node]*host{a: one, b: two} {
				pod.AwaitCarrier(t, ifname)
				n.lanNetns(s).AwaitCarrier(t, pod.HostInterface)
			}
			a.reconcile(t, a.withUnderlay(t, s)) // with a claim, the VXLAN goes up
			b.reconcile(t, b.withUnderlay(t, s))
			c.fault(t, a, b, s, two)
			expectProbe(t, a.startEndpoint(t, s, "one"), b.startEndpoint(t, s, "two"), c.well, c.there, c.back)
		})
	}
}

func TestProbeReportsUnfinishedChecksums(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	s := lan("sums", 251, "plain", "raw")
	s.TxChecksumOff = []string{"raw"}
	a.reconcile(t, a.withUnderlay(t, s))
	for _, spoke := range s.Spokes {
		pod := a.claim(t, s, spoke, segment.Veth)
		pod.AwaitCarrier(t, ifname)
		a.lanNetns(s).AwaitCarrier(t, pod.HostInterface)
	}
	there, back, err := probe.Run(t.Context(), a.startEndpoint(t, s, "plain"), a.startEndpoint(t, s, "raw"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []probe.Path{there, back} {
		if well, said := c.Verdict(); !well {
			t.Errorf("frames are lost: %q", said)
		}
	}
	if said := probe.Checksums(there); said != "" {
		t.Errorf("to a spoke whose txChecksum is off: %q", said)
	}
	said := probe.Checksums(back)
	if !hasAll(said, "come to default/plain unfinished", "spokeOptions: {plain: {txChecksum: off}}") {
		t.Errorf("to a spoke whose txChecksum is on: %q", said)
	}
}

func setLink(t *testing.T, h *netlink.Handle, name string, change func(*netlink.Handle, netlink.Link) error) {
	t.Helper()
	l, err := h.LinkByName(name)
	if err == nil {
		err = change(h, l)
	}
	if err != nil {
		t.Fatal(err)
	}
}
