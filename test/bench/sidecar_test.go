package bench

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/k8slan/k8slan/test/netlab"
)

// sidecar measures B12: a LAN by sidecars between two pods on two nodes, against the pods' own network, over which it
// runs: a cluster network that routes without encapsulation.
func sidecar(t *testing.T, b *bench) {
	u := netlab.NewUnderlay(t, netlab.UnderlayMTU)
	nodes := [2]node{addNode(t, u, "worker1"), addNode(t, u, "worker2")}
	var plain, lan [2]pod
	for i, n := range nodes {
		plain[i] = pod{netlab.New(t, "pod"), podAddress(i)}
		lan[i] = pod{plain[i].Namespace, netip.AddrFrom4([4]byte{192, 168, 69, byte(1 + i)})}
		ip(t, n.Namespace, "addr add %s/24 dev %s", vtep(i), netlab.UnderlayDevice)
		ip(t, n.Namespace, "link add pod mtu %d type veth peer name eth0 mtu %d netns %s",
			netlab.UnderlayMTU, netlab.UnderlayMTU, plain[i].Path)
		ip(t, n.Namespace, "addr add %s/24 dev pod", podAddress(i).Prev())
		ip(t, n.Namespace, "link set pod up")
		ip(t, n.Namespace, "route add %s/24 via %s", podAddress(1-i).Prev().Prev(), vtep(1-i))
		n.Sysctl(t, "net/ipv4/ip_forward", "1")
		ip(t, plain[i].Namespace, "addr add %s/24 dev eth0", podAddress(i))
		ip(t, plain[i].Namespace, "link set eth0 up")
		ip(t, plain[i].Namespace, "route add default via %s", podAddress(i).Prev())
	}
	binary := buildBinary(t)
	for i, p := range plain {
		config := filepath.Join(t.TempDir(), "kubelan.yaml")
		const text = "peers: [%s]\npod: lan-%d\nnamespace: default\nvxlan: {addresses: ['%s/24']}\n"
		must(t, os.WriteFile(config, fmt.Appendf(nil, text,
			plain[1-i].address, i, lan[i].address), 0o644))
		startIn(t, p.Do, filepath.Join(t.TempDir(), "log"), "KUBECONFIG=", binary, "sidecar", "--config="+config)
	}
	eventually(t, "the LAN of the sidecars", func() bool {
		return lan[0].Do(exec.Command("ping", "-c", "1", "-W", "1", lan[1].address.String()).Run) == nil
	})
	span := time.Duration(times(100, 20)) * time.Millisecond
	for _, kind := range []struct {
		id, what, unit string
		target         float64
		measure        func(path, time.Duration) (float64, error)
		less           bool // less is better
	}{
		{"tcp", "TCP throughput", "Gbit/s", 0.8, tcpRate, false},
		{"rtt", "round trips of 64 bytes", "µs", 0.75, roundTrip, true},
	} {
		once := func(name string, pods [2]pod) contender {
			return contender{name, func() (float64, error) { return kind.measure(path{pods[0], pods[1]}, span) }}
		}
		got := race(t, times(60, 1), once("sidecar", lan), once("plain", plain))
		ours, theirs := got["sidecar"], got["plain"]
		ratio := ours.over(theirs)
		if kind.less {
			ratio = theirs.over(ours)
		}
		b.atLeast("B12-"+kind.id, kind.what+" on a LAN by sidecars, against the pods' own network",
			ratio.median(), kind.target, fmt.Sprintf("%v / %v %s, middle half %s, %d rounds",
				round(ours.median()), round(theirs.median()), kind.unit, ratio.spread(), len(ratio)))
	}
}

// podAddress is the address of the pod on a node.
func podAddress(node int) netip.Addr { return netip.AddrFrom4([4]byte{10, 244, byte(node), 2}) }
