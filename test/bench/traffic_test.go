package bench

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/test/netlab"
)

// pod is an end of a path.
type pod struct {
	netlab.Namespace
	address netip.Addr
}

// path is two pods, of which one sends to the other.
type path struct{ from, to pod }

// traffic measures B8: the throughput and delay of a LAN, against a network made by ip(8) between the same nodes.
func traffic(t *testing.T, b *bench) {
	u := netlab.NewUnderlay(t, netlab.UnderlayMTU)
	nodes := [2]node{addNode(t, u, "worker1"), addNode(t, u, "worker2")}
	ways := map[string][2]path{ // within a node, and across nodes
		"k8slan": ways(attachedPods(t, nodes)),
		"hand":   ways(podsByHand(t, nodes)),
	}
	span := time.Duration(times(100, 20)) * time.Millisecond
	for i, where := range []string{"node", "across"} {
		for _, kind := range []struct {
			id, what, unit string
			measure        func(path, time.Duration) (float64, error)
			less           bool // less is better
		}{
			{"tcp", "TCP throughput", "Gbit/s", tcpRate, false},
			{"udp", "UDP packets of 64 bytes per second", "kpps", packetRate, false},
			{"rtt", "round trips of 64 bytes", "µs", roundTrip, true},
		} {
			once := func(name string) contender {
				return contender{name, func() (float64, error) { return kind.measure(ways[name][i], span) }}
			}
			got := race(t, times(60, 1), once("k8slan"), once("hand"))
			ours, theirs := got["k8slan"], got["hand"]
			ratio := ours.over(theirs)
			if kind.less {
				ratio = theirs.over(ours)
			}
			scope := map[string]string{"node": " within a node", "across": " across nodes"}[where]
			b.atLeast("B8-"+kind.id+"-"+where, kind.what+scope+", against the same made by hand",
				ratio.median(), 0.97, fmt.Sprintf("%v / %v %s, middle half %s, %d rounds",
					round(ours.median()), round(theirs.median()), kind.unit, ratio.spread(), len(ratio)))
		}
	}
}

func ways(pods [3]pod) [2]path { return [2]path{{pods[0], pods[1]}, {pods[0], pods[2]}} }

// attachedPods returns two pods on the first node and one on the second, on a LAN of k8slan.
func attachedPods(t *testing.T, nodes [2]node) (pods [3]pod) {
	t.Helper()
	for i := range pods {
		n := nodes[i/2]
		s := netlab.LAN(1, n.device, "a", "b", "c")
		n.reconcile(t, s)
		box := sandbox(t)
		pods[i] = pod{box.Namespace, netip.AddrFrom4([4]byte{10, 1, 0, byte(1 + i)})}
		_, err := n.kernel.Claim(t.Context(), claimRequest(s.Netns, s.Spokes[i], box))
		must(t, err)
		ip(t, box.Namespace, "addr add %s/24 dev %s", pods[i].address, box.Interface)
	}
	return pods
}

// podsByHand returns such pods on a LAN made by ip(8).
func podsByHand(t *testing.T, nodes [2]node) (pods [3]pod) {
	t.Helper()
	var lans [2]netlab.Namespace
	for i, n := range nodes {
		lans[i] = netlab.New(t, "hand")
		lans[i].Sysctl(t, "net/ipv6/conf/all/disable_ipv6", "1")
		if loaded, err := filepath.Glob("/proc/sys/net/bridge/bridge-nf-call-*"); err == nil {
			for _, setting := range loaded {
				lans[i].Sysctl(t, strings.TrimPrefix(setting, "/proc/sys/"), "0")
			}
		}
		ip(t, lans[i], "link add lan mtu %d type bridge mcast_snooping 0", netlab.MTU)
		ip(t, lans[i], "link set lan up")
		ip(t, n.Namespace, "link add vxlan mtu %d netns %s type vxlan id 4711 group ff02::14 dev %s dstport 4789",
			netlab.MTU, lans[i].Path, netlab.UnderlayDevice)
		ip(t, lans[i], "link set vxlan master lan up")
	}
	for i := range pods {
		box, lan := sandbox(t), lans[i/2]
		pods[i] = pod{box.Namespace, netip.AddrFrom4([4]byte{10, 2, 0, byte(1 + i)})}
		ip(t, lan, "link add port%d mtu %d type veth peer name net1 mtu %d netns %s",
			i, netlab.MTU, netlab.MTU, box.Path)
		ip(t, lan, "link set port%d master lan up", i)
		ip(t, box.Namespace, "link set net1 up")
		ip(t, box.Namespace, "addr add %s/24 dev net1", pods[i].address)
	}
	return pods
}

// ip runs the ip command in a namespace.
func ip(t *testing.T, ns netlab.Namespace, format string, args ...any) {
	t.Helper()
	line := fmt.Sprintf(format, args...)
	var out []byte
	err := ns.Do(func() (err error) {
		out, err = exec.Command("ip", strings.Fields(line)...).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("ip %s: %v\n%s", line, err, out)
	}
}

const port = 5001

// tcpRate sends for that time and returns how many Gbit/s arrived.
func tcpRate(p path, span time.Duration) (float64, error) {
	var listener net.Listener
	address := netip.AddrPortFrom(p.to.address, port).String()
	err := p.to.Do(func() (err error) {
		listener, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	type count struct {
		bytes int64
		err   error
	}
	received := make(chan count, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			received <- count{err: err}
			return
		}
		defer conn.Close()
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{conn}, make([]byte, 1<<18))
		received <- count{n, err}
	}()
	var conn net.Conn
	err = p.from.Do(func() (err error) {
		conn, err = net.DialTimeout("tcp", address, 5*time.Second)
		return err
	})
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	began, buf := time.Now(), make([]byte, 1<<17)
	for time.Since(began) < span {
		if _, err := conn.Write(buf); err != nil {
			return 0, err
		}
	}
	conn.Close()
	got := <-received
	return float64(got.bytes) * 8 / 1e9 / time.Since(began).Seconds(), got.err
}

// datagrams opens a UDP socket in each of the two pods; reading from them times out soon.
func datagrams(p path) (from, to int, end func(), err error) {
	to, err = datagramSocket(p.to, nil)
	if err != nil {
		return 0, 0, nil, err
	}
	from, err = datagramSocket(p.from, &unix.SockaddrInet4{Port: port, Addr: p.to.address.As4()})
	if err != nil {
		unix.Close(to)
		return 0, 0, nil, err
	}
	return from, to, func() { unix.Close(from); unix.Close(to) }, nil
}

func datagramSocket(p pod, peer unix.Sockaddr) (fd int, err error) {
	err = p.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return 0, err
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 512<<20), // for everything that is sent
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20_000}),
	)
	if peer != nil {
		err = errors.Join(err, unix.Connect(fd, peer))
	} else {
		err = errors.Join(err, unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: p.address.As4()}))
	}
	if err != nil {
		unix.Close(fd)
	}
	return fd, err
}

const datagram = 64 // bytes of payload

// packetRate sends small packets for that time and returns how many thousand a second arrived.
func packetRate(p path, span time.Duration) (float64, error) {
	from, to, end, err := datagrams(p)
	if err != nil {
		return 0, err
	}
	defer end()
	var sent atomic.Bool
	received := make(chan int, 1)
	go func() {
		count, buf := 0, make([]byte, 2*datagram)
		for {
			if _, err := unix.Read(to, buf); err == nil {
				count++
			} else if sent.Load() {
				received <- count
				return
			}
		}
	}()
	began, buf := time.Now(), make([]byte, datagram)
	for time.Since(began) < span {
		for range 64 {
			if _, err = unix.Write(from, buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
				break
			}
		}
	}
	took := time.Since(began)
	sent.Store(true)
	return float64(<-received) / 1000 / took.Seconds(), err
}

// roundTrip sends a packet there and back again and again, and returns the median in microseconds.
func roundTrip(p path, span time.Duration) (float64, error) {
	from, to, end, err := datagrams(p)
	if err != nil {
		return 0, err
	}
	defer end()
	var done atomic.Bool
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for buf := make([]byte, 2*datagram); !done.Load(); {
			if n, peer, err := unix.Recvfrom(to, buf, 0); err == nil {
				_ = unix.Sendto(to, buf[:n], 0, peer) // a lost packet is sent again
			}
		}
	}()
	defer func() { done.Store(true); <-ended }()
	var trips samples
	buf := make([]byte, datagram)
	for began := time.Now(); time.Since(began) < span || len(trips) == 0; {
		start := time.Now()
		if _, err := unix.Write(from, buf); err != nil {
			return 0, err
		}
		if _, err := unix.Read(from, buf); err == nil {
			trips = append(trips, float64(time.Since(start).Nanoseconds())/1000)
		} else if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return 0, err
		}
	}
	return trips.median(), nil
}
