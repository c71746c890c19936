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

// A network function that reads frames raw takes a frame as it is: TCP and UDP checksums that are left to hardware are
// wrong for it, and a frame larger than the MTU is none.
func TestRawReaderReceivesFinishedChecksums(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	within, across := a, b
	for i, c := range []struct {
		name       string
		off        []string
		nodes      map[string]node // of the speaker
		unfinished bool
	}{
		{"on for all", nil, map[string]node{"within a node": within, "across nodes": across}, true}, // what the others are compared with
		{"off for the reader", []string{"reader"}, map[string]node{"within a node": within, "across nodes": across}, false},
		{"off for both", []string{"reader", "speaker"}, map[string]node{"within a node": within, "across nodes": across}, false},
		// Not across nodes: what comes finished there is put together again by generic receive offload.
		{"off for the speaker", []string{"speaker"}, map[string]node{"within a node": within}, false},
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

// addPodAddresses gives a pod addresses on the LAN.
func (h node) addPodAddresses(t *testing.T, st *host, n int) {
	t.Helper()
	st.Sysctl(t, "net/ipv6/conf/"+ifname+"/accept_dad", "0") // nobody else has it
	must(t, h.setPodAddresses(t, st, fmt.Sprintf("10.77.0.%d/24", n), fmt.Sprintf("fd77::%d/64", n)))
	st.AwaitCarrier(t, ifname)
}

// expectRaw has two pods speak TCP and UDP, and wants that a raw reader in the second sees unfinished frames among it,
// or none.
func expectRaw(t *testing.T, from, to *host, unfinished bool) {
	t.Helper()
	for _, address := range []string{"10.77.0.1", "fd77::1"} {
		t.Run(address, func(t *testing.T) {
			r := to.readRaw(t, datagrams)
			expectTCP(t, from, to, address)
			must(t, from.Do(func() error { return sendUDP(address) }))
			seen := r.wait(t)
			if got := seen.unfinished+seen.large > 0; got != unfinished {
				t.Errorf("the reader saw %+v; frames that are unfinished or too large: %t, want %t", seen, got, unfinished)
			}
			if seen.wrong > seen.unfinished {
				t.Errorf("the reader saw %+v: checksums are wrong that the kernel calls finished", seen)
			}
		})
	}
}

// datagrams is how much sendUDP sends, in bytes.
const datagrams = 11_000

// sendUDP sends datagrams to the discard port, one as large as a sender may leave to be cut.
func sendUDP(address string) error {
	conn, err := net.ListenUDP("udp", nil) // not connected, so that no answer is in the way of the second one
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

// seen is what a raw reader saw.
type seen struct {
	tcp        int // frames
	udp        int // bytes of payload
	unfinished int // of which the kernel says so
	wrong      int // whose checksum is not that of what they carry
	large      int // than the MTU
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

// checksum says whether the TCP or UDP checksum of a frame is right, and how many bytes it is of; another frame's protocol is 0.
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

// reader is a raw reader at work in a pod.
type reader struct {
	file *os.File
	seen seen
	err  error
	done chan struct{} // closed when it has ended
}

// readRaw reads what comes into the pod with a packet socket, as a network function does, until there were so many
// bytes of UDP: they are sent last.
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

// wait returns what the reader saw when it has seen it all.
func (r *reader) wait(t *testing.T) seen {
	t.Helper()
	must(t, r.file.SetReadDeadline(time.Now().Add(frameTimeout)))
	<-r.done
	if r.err != nil {
		t.Fatalf("the reader saw %+v: %v", r.seen, r.err)
	}
	return r.seen
}

// A guest with the common virtio driver leaves its checksums to the host, and takes frames from it that are unfinished.
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
						t.Errorf("the reader beside the VM saw %+v; unfinished: want %t", seen, c.outOfVM)
					}
				})
			}
		})
	}
}

// knows lets a pod send to somebody who answers no ARP.
func (h *host) knows(t *testing.T, ip string, mac net.HardwareAddr) {
	t.Helper()
	links := h.Netlink(t)
	link, err := links.LinkByName(ifname)
	must(t, err)
	must(t, links.NeighSet(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP(ip), HardwareAddr: mac,
	}))
}

// expectGuest takes what sendUDP sent out of a tap.
func expectGuest(t *testing.T, tap netlab.OffloadTap, unfinished bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), frameTimeout)
	defer cancel()
	var s seen
	for s.udp < datagrams {
		frame, left, err := tap.ReceiveUnfinished(ctx)
		if err != nil {
			t.Fatalf("the guest saw %+v: %v", s, err)
		}
		s.add(frame, left)
	}
	if got := s.unfinished+s.large > 0; got != unfinished || s.wrong > s.unfinished {
		t.Errorf("the guest saw %+v; unfinished: want %t", s, unfinished)
	}
}

const unfinishedSize = 64 // bytes

// unfinishedUDP is a datagram whose checksum is that of its pseudo header alone.
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

// What is edited while a pod is attached holds for what the LAN's side does, at once and both ways, and what somebody
// switches by hand is switched back. A LAN for which nobody wished it is asked nothing.
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
			t.Errorf("%s was asked", l.Name)
		}
		if !a.feature(t, on, l.Name, "tx-checksum-ip-generic") {
			t.Errorf("%s leaves no checksums to hardware any more", l.Name)
		}
	}
}

// A daemon that was killed halfway through taking the wish back goes on with it.
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
		reconcileWith(t, a.kernel, on.Netns, killedAfter(k, func(have segment.State) []segment.Op { return segment.Diff(on, have) }))
		a.reconcile(t, on)
		for _, link := range []string{segment.PortName("reader"), segment.PlugName("reader")} {
			if !a.feature(t, on, link, "tx-checksum-ip-generic") {
				t.Errorf("killed at step %d of %v: %s leaves no checksums to hardware", k, ops, link)
			}
		}
	}
}

// A VM's standing pair that is made anew in a take-over is like the old one.
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
		t.Errorf("after a take-over there was to do: %v", ops)
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
