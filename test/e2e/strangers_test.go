package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// stranger is somebody on the network between the nodes who is none of them, beside this one. It returns what sends a VXLAN packet from
// there to the other node.
func (m machine) stranger(vni uint32) func(frame []byte) {
	m.Helper()
	const name = "e2e-stranger"
	u := m.underlay.spare()
	m.run("ip", "netns", "add", name)
	m.afterwards("ip", "netns", "del", name)
	m.run("ip", "link", "add", "eth0", "netns", name, "link", u.device, "type", "macvlan", "mode", "bridge")
	m.run("ip", "-n", name, "link", "set", "eth0", "up")
	add := []string{"ip", "-n", name, "addr", "add", u.address(1), "dev", "eth0"}
	if netip.MustParseAddr(u.vteps[1]).Is6() {
		add = append(add, "nodad")
	}
	m.run(add...)
	var c net.Conn
	err := netlab.At(m.path("/run/netns/" + name)).Do(func() (err error) {
		c, err = net.Dial("udp", net.JoinHostPort(u.vteps[0], "4789"))
		return err
	})
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { c.Close() })
	return func(frame []byte) {
		m.Helper()
		if _, err := c.Write(encapsulated(vni, frame)); err != nil {
			m.Fatal(err)
		}
	}
}

// encapsulated is a frame as a VXLAN's packets have it.
func encapsulated(vni uint32, frame []byte) []byte {
	header := binary.BigEndian.AppendUint32([]byte{0x08, 0, 0, 0}, vni<<8) // RFC 7348, section 5
	return append(header, frame...)
}

// A stranger on the network between the nodes knows the VNI. Nothing that it sends reaches a pod, and it is counted; where the LAN
// hears everyone, it is heard.
func TestAStrangerReachesNoPod(t *testing.T) {
	for i, u := range []underlay{subnet4, subnet6} {
		t.Run(u.name, func(t *testing.T) {
			l := newLab(t).over(u)
			const lan = "strict"
			vni := 1180 + i
			one, two := l.pair(lan, vni)
			send := l.machine(worker2).stranger(uint32(vni))
			said := frames.Stream(nil, segment.MAC(segment.LAN{}, "stranger"), 66, 1)
			var daemon corev1.Pod
			for _, p := range l.programs(t.Context(), "node") {
				if p.Spec.NodeName == worker1 {
					daemon = p
				}
			}
			dropped := func() float64 {
				return l.scrape(daemon).value(fmt.Sprintf(`k8slan_nonmember_packets_dropped_total{lan="%s/%s"}`, l.namespace, lan))
			}
			before := dropped()

			const packets = 10
			// hears wants the first frame that the pod hears to be that one.
			hears := func(what string, do func(), want []byte) {
				t.Helper()
				ear := one.listen("listen", "--for", "20s", "--count", "1", "--marker", frames.Marker)
				do()
				heard, err := ear.all()
				if err != nil || len(heard) != 1 || heard[0] != hexed(want) {
					t.Errorf("%s: heard %v, %v; want %s", what, heard, err, hexed(want))
				}
			}
			after := frames.Stream(nil, two.mac, 1, 0)
			hears("a stranger, then the other pod", func() {
				for range packets {
					send(said)
				}
				l.awaitMetric("packets dropped", func() float64 { return dropped() - before }, packets)
				two.run("frames", "-i", two.link, "stream", "send", "--count", "1")
			}, after)
			losesNothing(two, one, func() {
				// Somebody deletes the table: it is back.
				m := l.machine(worker1)
				m.run("nft", "delete", "table", "inet", "k8slan")
				m.until("the table to be back", func() bool { return m.strict(lan) })
				l.change(lan, func(s *v1beta1.LANSpec) { s.StrictPeers = ptr.To(false) })
			})
			hears("a stranger, where all are heard", func() { send(said) }, said)
			l.machine(worker1).until("the filter to be gone", func() bool { return !l.machine(worker1).strict(lan) })
			l.change(lan, func(s *v1beta1.LANSpec) { s.StrictPeers = nil })
			l.machine(worker1).until("the filter to be there", func() bool { return l.machine(worker1).strict(lan) })
			crosses(two, one)
			crosses(one, two)
		})
	}
}

// strict says whether the node's filter knows the LAN.
func (m machine) strict(lan string) bool {
	m.Helper()
	ctx, cancel := context.WithTimeout(m.Context(), patience)
	defer cancel()
	out, err := m.Exec(ctx, "nft", "list", "set", "inet", "k8slan", "lans")
	return err == nil && strings.Contains(string(out), m.namespace+"/"+lan+`"`)
}
