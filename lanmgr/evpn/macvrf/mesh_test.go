package macvrf_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

var began = time.Unix(1_800_000_000, 0)

// mac returns the MAC of the host with that number.
func mac(n byte) macvrf.MAC { return macvrf.MAC{2, 0, 0, 0, 0, n} }

func vtep(n byte) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, n}) }

// node is one of several that exchange their routes.
type node struct {
	*macvrf.Table
	vtep netip.Addr
	sent map[macvrf.Key]macvrf.Route // what the others have received of it
}

func newNode(n byte) *node {
	return &node{Table: macvrf.New(65000, vtep(n)), vtep: vtep(n), sent: map[macvrf.Key]macvrf.Route{}}
}

// nodes returns n nodes that take part in LAN 222, each with pods that have these MACs.
func nodes(n int, attached ...macvrf.MAC) mesh {
	var m mesh
	for i := range n {
		o := newNode(byte(i + 1))
		o.Set(began, []macvrf.LAN{{VNI: 222, VTEP: o.vtep, Claimed: true, Attached: attached}})
		m = append(m, o)
	}
	return m
}

type mesh []*node

// exchange exchanges routes between the nodes until none has changes to send; it fails if that does not end.
func (m mesh) exchange(t *testing.T, now time.Time) {
	t.Helper()
	for range 50 {
		done := true
		for _, from := range m {
			own := map[macvrf.Key]macvrf.Route{}
			for _, r := range from.Advertised() {
				own[r.Key] = r
			}
			for key := range from.sent {
				if _, ok := own[key]; !ok {
					done = false
					m.others(from, func(o *node) { o.Withdraw(now, key) })
				}
			}
			for key, r := range own {
				if before, ok := from.sent[key]; !ok || !before.Equal(r) {
					done = false
					m.others(from, func(o *node) { o.Import(now, r) })
				}
			}
			from.sent = own
		}
		for _, n := range m { // a MAC behind another node is on no port: the bridge has it on the VXLAN
			_, fdb, _ := n.Forwarding(222)
			for _, e := range fdb {
				n.ForgetLocal(now, 222, e.MAC)
			}
		}
		if done {
			return
		}
	}
	t.Fatal("the nodes send changes without end")
}

func (m mesh) others(but *node, do func(*node)) {
	for _, o := range m {
		if o != but {
			do(o)
		}
	}
}

// state describes what a node has of LAN 222.
func state(n *node) string {
	var words []string
	for _, r := range n.Advertised() {
		if r.Type == macvrf.Multicast {
			words = slices.Insert(words, 0, "advertises itself")
		} else {
			words = append(words, fmt.Sprintf("advertises %d seq %d", r.MAC[5], r.Sequence))
		}
	}
	remotes, fdb, _ := n.Forwarding(222)
	for _, r := range remotes {
		words = append(words, fmt.Sprintf("floods %d", r.As4()[3]))
	}
	for _, e := range fdb {
		words = append(words, fmt.Sprintf("%d behind %d", e.MAC[5], e.VTEP.As4()[3]))
	}
	for _, d := range n.Duplicates(222) {
		words = append(words, fmt.Sprintf("duplicate %d", d[5]))
	}
	return strings.Join(words, ", ")
}

func expect(t *testing.T, when string, n *node, want string) {
	t.Helper()
	if got := state(n); got != want {
		t.Errorf("%s: node %d\n has %s\nwant %s", when, n.vtep.As4()[3], got, want)
	}
}

// route returns a route of LAN 222 that the node with that number advertises.
func route(kind macvrf.RouteType, from byte, change func(*macvrf.Route)) macvrf.Route {
	r := macvrf.Route{
		Key: macvrf.Key{Type: kind, RD: macvrf.RD{1: 1, 5: from, 7: 1}}, VTEP: vtep(from), VNI: 222,
		Targets: []macvrf.Target{macvrf.NewTarget(65000, 222)},
	}
	if r.IP = r.VTEP; kind == macvrf.MACIP {
		r.IP, r.MAC = netip.Addr{}, mac(9)
	}
	if change != nil {
		change(&r)
	}
	return r
}

func compare(a, b macvrf.MAC) int { return slices.Compare(a[:], b[:]) }
