package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"k8s.io/utils/ptr"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// nonMember creates a host on the network between the nodes, beside this node. It returns a function that sends a VXLAN
// packet from there to the other node.
func (m machine) nonMember(vni uint32) func(frame []byte) {
	m.Helper()
	const name = "e2e-nonmember"
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

// encapsulated returns a frame in a packet of a VXLAN, without its UDP header.
func encapsulated(vni uint32, frame []byte) []byte {
	header := binary.BigEndian.AppendUint32([]byte{0x08, 0, 0, 0}, vni<<8) // RFC 7348, section 5
	return append(header, frame...)
}

// A host on the network between the nodes is not a member and knows the VNI. Its packets reach no pod and are counted.
// If the LAN accepts packets from anywhere, they reach the pods.
func TestNonMemberReachesNoPod(t *testing.T) {
	l := newLab(t)
	for i, u := range []underlay{subnet4, subnet6} {
		t.Run(u.name, func(t *testing.T) {
			l := l.fresh(t).over(u)
			const lan = "strict"
			vni := 1180 + i
			one, two := l.pair(lan, vni)
			send := l.machine(worker2).nonMember(uint32(vni))
			foreign := frames.Stream(nil, segment.MAC(segment.LAN{}, "nonmember"), 66, 1)
			daemon := *l.podOf("node", worker1)
			dropped := func() float64 {
				return l.scrape(daemon).value(fmt.Sprintf(`k8slan_nonmember_packets_dropped_total{lan="%s/%s"}`,
					l.namespace, lan))
			}
			before := dropped()

			const packets = 10
			// receives wants the pod to receive this frame first.
			receives := func(what string, do func(), want []byte) {
				t.Helper()
				listener := one.listen("listen", "--for", "20s", "--count", "1", "--marker", frames.Marker)
				do()
				received, err := listener.all()
				if err != nil || len(received) != 1 || received[0] != hexed(want) {
					t.Errorf("%s: received %v, %v; want %s", what, received, err, hexed(want))
				}
			}
			after := frames.Stream(nil, two.mac, 1, 0)
			receives("frames of a non-member and then of the other pod", func() {
				for range packets {
					send(foreign)
				}
				l.awaitMetric("packets dropped", func() float64 { return dropped() - before }, packets)
				two.run("frames", "-i", two.link, "stream", "send", "--count", "1")
			}, after)
			losesNothing(two, one, func() {
				// The table is recreated when it is deleted.
				m := l.machine(worker1)
				m.run("nft", "delete", "table", "inet", "k8slan")
				m.until("the table", func() bool { return m.strict(lan) })
				l.change(lan, func(s *v1beta1.LANSpec) { s.StrictPeers = ptr.To(false) })
			})
			receives("a frame of a non-member without strict peers", func() { send(foreign) }, foreign)
			l.machine(worker1).until("the end of the filter", func() bool { return !l.machine(worker1).strict(lan) })
			l.change(lan, func(s *v1beta1.LANSpec) { s.StrictPeers = nil })
			l.machine(worker1).until("the filter", func() bool { return l.machine(worker1).strict(lan) })
			crosses(two, one)
			crosses(one, two)
		})
	}
}

// strict says whether the node's filter has the LAN.
func (m machine) strict(lan string) bool {
	m.Helper()
	ctx, cancel := context.WithTimeout(m.Context(), patience)
	defer cancel()
	out, err := m.Exec(ctx, "nft", "list", "set", "inet", "k8slan", "lans")
	return err == nil && strings.Contains(string(out), m.namespace+"/"+lan+`"`)
}
