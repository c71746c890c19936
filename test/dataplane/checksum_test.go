package dataplane

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/netlab"
)

// A network function that reads raw frames takes a frame as it is: TCP and UDP checksums that are left to hardware are
// wrong for it, and it cannot use a frame larger than the MTU.
func TestRawReaderReceivesFinishedChecksums(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	within := map[string]node{"within a node": a}
	both := map[string]node{"within a node": a, "across nodes": b}
	for i, c := range []struct {
		name       string
		off        []string
		nodes      map[string]node // of the speaker
		unfinished bool
	}{
		{"on for all", nil, both, true}, // the others are compared with this
		{"off for the reader", []string{"reader"}, both, false},
		{"off for both", []string{"reader", "speaker"}, both, false},
		// Not across nodes: generic receive offload merges there what arrives with finished checksums.
		{"off for the speaker", []string{"speaker"}, within, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := lan(fmt.Sprintf("raw%d", i), 140+uint32(i), "reader", "speaker")
			s.TxChecksumOff = c.off
			a.reconcile(t, a.withUnderlay(t, s))
			b.reconcile(t, b.withUnderlay(t, s))
			reader := a.claim(t, s, "reader", segment.Veth)
			a.addPodAddresses(t, reader, 1)
			for where, h := range c.nodes {
				t.Run(where, func(t *testing.T) {
					speaker := h.claim(t, s, "speaker", segment.Veth)
					defer h.release(t, speaker)
					h.addPodAddresses(t, speaker, 2)
					expectRaw(t, speaker, reader, c.unfinished)
				})
			}
		})
	}
}

// addPodAddresses adds addresses on the LAN to a pod.
func (n node) addPodAddresses(t *testing.T, pod *host, number int) {
	t.Helper()
	pod.Sysctl(t, "net/ipv6/conf/"+ifname+"/accept_dad", "0") // no other pod has them
	must(t, n.setPodAddresses(t, pod, fmt.Sprintf("10.77.0.%d/24", number), fmt.Sprintf("fd77::%d/64", number)))
	pod.AwaitCarrier(t, ifname)
}

// expectRaw sends TCP and UDP from one pod to another and expects a raw reader in the second to receive unfinished
// frames, or none.
func expectRaw(t *testing.T, from, to *host, unfinished bool) {
	t.Helper()
	for _, address := range []string{"10.77.0.1", "fd77::1"} {
		t.Run(address, func(t *testing.T) {
			r := to.readRaw(t, datagrams)
			expectTCP(t, from, to, address)
			must(t, from.Do(func() error { return sendUDP(address) }))
			seen := r.wait(t)
			if got := seen.unfinished+seen.large > 0; got != unfinished {
				t.Errorf("the reader received %+v; frames that are unfinished or too large: %t, want %t",
					seen, got, unfinished)
			}
			if seen.wrong > seen.unfinished {
				t.Errorf("the reader received %+v: the kernel calls wrong checksums finished", seen)
			}
		})
	}
}

// datagrams is how many bytes sendUDP sends.
const datagrams = 11_000

// sendUDP sends datagrams to the discard port, one of them as large as a sender may leave to be segmented.
func sendUDP(address string) error {
	conn, err := net.ListenUDP("udp", nil) // not connected, so that an ICMP answer does not block the second datagram
	if err != nil {
		return err
	}
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	if err := raw.Control(func(fd uintptr) {
		setErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000)
	}); err != nil || setErr != nil {
		return errors.Join(err, setErr)
	}
	for _, size := range []int{1000, datagrams - 1000} {
		if _, err := conn.WriteToUDP(make([]byte, size), &net.UDPAddr{IP: net.ParseIP(address), Port: 9}); err != nil {
			return err
		}
	}
	return nil
}

// seen counts the frames that a raw reader received.
type seen struct {
	tcp        int // frames with TCP
	udp        int // bytes of UDP payload
	unfinished int // frames with checksums that the kernel calls unfinished
	wrong      int // frames with wrong checksums
	large      int // frames larger than the MTU
}

// add counts one frame.
func (s *seen) add(frame []byte, unfinished bool) {
	protocol, payload, ok := checksum(frame)
	switch protocol {
	case unix.IPPROTO_TCP:
		s.tcp++
	case unix.IPPROTO_UDP:
		s.udp += payload - 8
	default:
		return
	}
	if unfinished {
		s.unfinished++
	}
	if !ok {
		s.wrong++
	}
	if len(frame) > 14+lanMTU {
		s.large++
	}
}

// checksum returns the protocol of a frame, the length that the TCP or UDP checksum covers, and whether the checksum is
// right; the protocol is 0 for other frames.
func checksum(frame []byte) (protocol, length int, ok bool) {
	packet := frame[14:]
	var pseudo, payload []byte
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		protocol = int(packet[9])
		pseudo, payload = packet[12:20], packet[int(packet[0]&15)*4:binary.BigEndian.Uint16(packet[2:])]
	case unix.ETH_P_IPV6:
		protocol = int(packet[6])
		pseudo, payload = packet[8:40], packet[40:40+int(binary.BigEndian.Uint16(packet[4:]))]
	}
	if protocol != unix.IPPROTO_TCP && protocol != unix.IPPROTO_UDP {
		return 0, 0, false
	}
	return protocol, len(payload), sum(sum(sum(uint32(protocol)+uint32(len(payload)), pseudo), payload), nil) == 0xffff
}

// sum adds to an Internet checksum (RFC 1071) that is not yet inverted.
func sum(s uint32, b []byte) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return s
}

// reader reads raw frames in a pod.
type reader struct {
	file *os.File
	seen seen
	err  error
	done chan struct{} // closed when it has ended
}

// readRaw reads what comes into the pod with a packet socket, as a network function does, until so many bytes of UDP
// came, which are sent last.
func (h *host) readRaw(t *testing.T, udp int) *reader {
	t.Helper()
	var fd int
	must(t, h.Do(func() (err error) {
		link, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: unix.ETH_P_ALL << 8, Ifindex: link.Index}))
	}))
	r := &reader{file: os.NewFile(uintptr(fd), "raw reader"), done: make(chan struct{})}
	t.Cleanup(func() {
		r.file.Close()
		<-r.done
	})
	conn, err := r.file.SyscallConn()
	must(t, err)
	go func() {
		defer close(r.done)
		r.err = r.run(conn, udp)
	}()
	return r
}

func (r *reader) run(conn syscall.RawConn, udp int) error {
	frame, control := make([]byte, 1<<17), make([]byte, 256)
	for r.seen.udp < udp {
		var n, nc int
		var receiveErr error
		err := conn.Read(func(fd uintptr) bool {
			n, nc, _, _, receiveErr = unix.Recvmsg(int(fd), frame, control, 0)
			return !errors.Is(receiveErr, unix.EAGAIN)
		})
		if err := errors.Join(err, receiveErr); err != nil {
			return err
		}
		messages, err := unix.ParseSocketControlMessage(control[:nc])
		if err != nil {
			return err
		}
		for _, m := range messages {
			if m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA {
				aux := *(*unix.TpacketAuxdata)(unsafe.Pointer(&m.Data[0]))
				r.seen.add(frame[:n], aux.Status&unix.TP_STATUS_CSUMNOTREADY != 0)
			}
		}
	}
	return nil
}

// wait returns the count when the last bytes have come.
func (r *reader) wait(t *testing.T) seen {
	t.Helper()
	must(t, r.file.SetReadDeadline(time.Now().Add(frameTimeout)))
	<-r.done
	if r.err != nil {
		t.Fatalf("the reader received %+v: %v", r.seen, r.err)
	}
	return r.seen
}

// A guest with the common virtio driver leaves its checksums to the host and accepts unfinished frames from it.
func TestRawReaderInOrBesideAVMReceivesFinishedChecksums(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	for i, c := range []struct {
		name            string
		off             []string
		intoVM, outOfVM bool // unfinished frames
	}{
		{"on for all", nil, true, true},
		{"off for the VM", []string{"vm"}, false, false},
		{"off for the pod", []string{"pod"}, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := lan(fmt.Sprintf("guest%d", i), 150+uint32(i), "vm", "pod")
			s.TxChecksumOff = c.off
			a.reconcile(t, a.withUnderlay(t, s))
			b.reconcile(t, b.withUnderlay(t, s))
			vm := a.claim(t, s, "vm", segment.Macvtap)
			tap := netlab.OpenOffloadTap(t, vm.TapMajor, vm.TapMinor)
			a.lanNetns(s).AwaitCarrier(t, vm.HostInterface)
			for where, h := range map[string]node{"of the same node": a, "of another node": b} {
				t.Run("pod "+where, func(t *testing.T) {
					pod := h.claim(t, s, "pod", segment.Veth)
					defer h.release(t, pod)
					h.addPodAddresses(t, pod, 2)
					h.lanNetns(s).AwaitCarrier(t, pod.HostInterface)
					pod.knows(t, "10.77.0.1", vm.MAC)
					must(t, pod.Do(func() error { return sendUDP("10.77.0.1") }))
					expectGuest(t, tap, c.intoVM)

					r := pod.readRaw(t, unfinishedSize)
					must(t, tap.SendUnfinished(unfinishedUDP(pod.MAC, vm.MAC), 14+20, 6))
					if seen := r.wait(t); (seen.unfinished == 1) != c.outOfVM || (seen.wrong == 1) != c.outOfVM {
						t.Errorf("the reader beside the VM received %+v; unfinished: want %t", seen, c.outOfVM)
					}
				})
			}
		})
	}
}

// knows adds a neighbor entry to a pod, for a host that does not answer ARP.
func (h *host) knows(t *testing.T, ip string, mac net.HardwareAddr) {
	t.Helper()
	links := h.Netlink(t)
	link, err := links.LinkByName(ifname)
	must(t, err)
	must(t, links.NeighSet(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP(ip), HardwareAddr: mac,
	}))
}

// expectGuest receives what sendUDP sent from a tap.
func expectGuest(t *testing.T, tap netlab.OffloadTap, unfinished bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), frameTimeout)
	defer cancel()
	var s seen
	for s.udp < datagrams {
		frame, left, err := tap.ReceiveUnfinished(ctx)
		if err != nil {
			t.Fatalf("the guest received %+v: %v", s, err)
		}
		s.add(frame, left)
	}
	if got := s.unfinished+s.large > 0; got != unfinished || s.wrong > s.unfinished {
		t.Errorf("the guest received %+v; unfinished: want %t", s, unfinished)
	}
}

const unfinishedSize = 64 // bytes

// unfinishedUDP is a datagram that has the checksum of its pseudo header only.
func unfinishedUDP(dst, src net.HardwareAddr) []byte {
	const size = unfinishedSize
	payload := make([]byte, size)
	from, to := netip.MustParseAddr("10.77.0.1").As4(), netip.MustParseAddr("10.77.0.2").As4()
	ip := []byte{0x45, 0, 0, 20 + 8 + size, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	ip = append(append(ip, from[:]...), to[:]...)
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum(0, ip)))
	udp := []byte{0, 9, 0, 9, 0, 8 + size, 0, 0}
	binary.BigEndian.PutUint16(udp[6:], uint16(sum(unix.IPPROTO_UDP+8+size, ip[12:20])))
	frame := append(append([]byte{}, dst...), src...)
	frame = append(frame, 8, 0)
	return append(append(append(frame, ip...), udp...), payload...)
}

// An edit while a pod is attached applies to the LAN's side at once, in both directions, and a change by hand is
// undone. The settings of a LAN without the option are not read.
func TestChecksumSettingFollowsAnEditAndIsRepaired(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	on := a.withUnderlay(t, lan("edited", 160, "reader", "speaker"))
	off := on
	off.TxChecksumOff = []string{"reader"}
	m := a.manage(t)
	m.runs(t, on)
	reader, speaker := a.claim(t, on, "reader", segment.Veth), a.claim(t, on, "speaker", segment.Veth)
	a.addPodAddresses(t, reader, 1)
	a.addPodAddresses(t, speaker, 2)
	expectRaw(t, speaker, reader, true)
	m.runs(t, off)
	expectRaw(t, speaker, reader, false)
	for _, link := range []string{reader.HostInterface, segment.PortName("reader"), segment.PlugName("reader")} {
		a.setFeature(t, on, link, "tx-checksum-ip-generic", true)
		a.awaitState(t, on, link+" switched back", func(have segment.State) bool {
			l, _ := have.Link(link)
			return l.TxChecksum == segment.TxChecksumOff
		})
	}
	m.runs(t, on)
	expectRaw(t, speaker, reader, true)
	for _, l := range a.observe(t, on).Links {
		if l.TxChecksum != segment.TxChecksumUnknown {
			t.Errorf("the setting of %s was read", l.Name)
		}
		if !a.feature(t, on, l.Name, "tx-checksum-ip-generic") {
			t.Errorf("%s does not leave checksums to hardware any more", l.Name)
		}
	}
}

// A daemon that was killed while it undid the option finishes that.
func TestChecksumSettingIsUndoneAfterAKill(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	on := a.withUnderlay(t, lan("halfway", 161, "reader"))
	off := on
	off.TxChecksumOff = []string{"reader"}
	a.reconcile(t, off)
	ops := segment.Diff(on, a.observe(t, off))
	for k := range ops {
		a.reconcile(t, off)
		undo := diffTo(on)
		reconcileWith(t, a.kernel, on.Netns, killedAfter(k, undo))
		a.reconcile(t, on)
		for _, link := range []string{segment.PortName("reader"), segment.PlugName("reader")} {
			if !a.feature(t, on, link, "tx-checksum-ip-generic") {
				t.Errorf("killed at step %d of %v: %s does not leave checksums to hardware", k, ops, link)
			}
		}
	}
}

// The standing pair that a take-over recreates for a VM has the settings of the old one.
func TestTakenOverPairFinishesChecksums(t *testing.T) {
	t.Parallel()
	netlab.NeedDevices(t)
	a, _ := twoNodes(t)
	s := a.withUnderlay(t, lan("taken", 162, "vm"))
	s.TxChecksumOff = []string{"vm"}
	a.reconcile(t, s)
	a.claim(t, s, "vm", segment.Macvtap)
	a.claim(t, s, "vm", segment.Macvtap)
	if ops := a.reconcile(t, s); len(ops) != 0 {
		t.Errorf("after a take-over the daemon did %v", ops)
	}
}

func (n node) setFeature(t *testing.T, s segment.Segment, link, feature string, on bool) {
	t.Helper()
	must(t, n.lanNetns(s).Do(func() error {
		e, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer e.Close()
		return e.Change(link, map[string]bool{feature: on})
	}))
}

func (n node) feature(t *testing.T, s segment.Segment, link, feature string) (on bool) {
	t.Helper()
	must(t, n.lanNetns(s).Do(func() error {
		e, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer e.Close()
		features, err := e.Features(link)
		on = features[feature]
		return err
	}))
	return on
}
