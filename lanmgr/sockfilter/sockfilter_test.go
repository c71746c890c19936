package sockfilter_test

import (
	"encoding/binary"
	"net"
	"os"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/sockfilter"
)

// passes reports whether the kernel lets a packet pass a filter.
func passes(t *testing.T, filter []bpf.RawInstruction, packet []byte) bool {
	t.Helper()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ends[0])
	defer unix.Close(ends[1])
	attach(t, ends[1], filter)
	_ = unix.Send(ends[0], packet, 0) // fails where the filter drops the packet
	n, err := unix.Read(ends[1], make([]byte, 1<<16))
	if err == unix.EAGAIN {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	if n != len(packet) {
		t.Errorf("%d bytes of %d pass", n, len(packet))
	}
	return true
}

func attach(t *testing.T, fd int, filter []bpf.RawInstruction) {
	t.Helper()
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: (*unix.SockFilter)(unsafe.Pointer(&filter[0]))}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program); err != nil {
		t.Fatal("the kernel refuses the filter: ", err)
	}
}

// neighbor is the kernel's message about a neighbour: struct nlmsghdr, struct ndmsg, and attributes.
func neighbor(family, flags byte, attributes ...[]byte) []byte {
	m := make([]byte, unix.SizeofNlMsghdr+12)
	m[unix.SizeofNlMsghdr], m[unix.SizeofNlMsghdr+10] = family, flags
	return append(m, slices.Concat(attributes...)...)
}

func attribute(kind uint16, value ...byte) []byte {
	a := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofRtAttr+len(value)))
	a = append(binary.NativeEndian.AppendUint16(a, kind), value...)
	return append(a, make([]byte, -len(a)&(unix.NLMSG_ALIGNTO-1))...)
}

func TestRemotes(t *testing.T) {
	mac := func(mac ...byte) []byte { return attribute(unix.NDA_LLADDR, mac...) }
	destination, zero := attribute(unix.NDA_DST, 192, 0, 2, 1), mac(0, 0, 0, 0, 0, 0)
	for name, tt := range map[string]struct {
		message []byte
		want    bool
	}{
		"a remote":                     {neighbor(unix.AF_BRIDGE, unix.NTF_SELF, zero, destination), true},
		"a remote, attributes swapped": {neighbor(unix.AF_BRIDGE, unix.NTF_SELF, destination, zero), true},
		"a MAC":                        {neighbor(unix.AF_BRIDGE, 0, mac(0, 0, 0, 0, 0, 1)), false},
		"another MAC":                  {neighbor(unix.AF_BRIDGE, 0, mac(2, 0, 0, 0, 0, 0)), false},
		"a MAC and a remote":           {neighbor(unix.AF_BRIDGE, 0, mac(0, 0, 0, 1, 0, 0), destination), false},
		"no MAC":                       {neighbor(unix.AF_BRIDGE, unix.NTF_SELF, destination), false},
		"a neighbour by IPv4":          {neighbor(unix.AF_INET, 0, zero, destination), false},
	} {
		if got := passes(t, sockfilter.Remotes(), tt.message); got != tt.want {
			t.Errorf("%s passes: %t, want %t", name, got, tt.want)
		}
	}
}

func TestBridgeFDB(t *testing.T) {
	mac := attribute(unix.NDA_LLADDR, 2, 0, 0, 0, 0, 1)
	for name, tt := range map[string]struct {
		message []byte
		want    bool
	}{
		"a bridge's entry":          {neighbor(unix.AF_BRIDGE, unix.NTF_MASTER, mac), true},
		"a bridge's external entry": {neighbor(unix.AF_BRIDGE, unix.NTF_EXT_LEARNED, mac), true},
		"a VXLAN's entry":           {neighbor(unix.AF_BRIDGE, unix.NTF_SELF|unix.NTF_EXT_LEARNED, mac), false},
		"a neighbour by IPv6":       {neighbor(unix.AF_INET6, 0, mac), false},
	} {
		if got := passes(t, sockfilter.BridgeFDB(), tt.message); got != tt.want {
			t.Errorf("%s passes: %t, want %t", name, got, tt.want)
		}
	}
}

// frame is an Ethernet frame without VLAN tags.
func frame(etherType uint16, payload ...byte) []byte {
	f := []byte{2, 0, 0, 0, 0, 2, 2, 0x6b, 0x38, 0x70, 0, 1}
	return append(binary.BigEndian.AppendUint16(f, etherType), append(payload, make([]byte, 64)...)...)
}

// ipv4 and ipv6 are the beginnings of a packet.
func ipv4(words, protocol byte, payload ...byte) []byte {
	header := make([]byte, 4*int(words))
	header[0], header[9] = 0x40|words, protocol
	return frame(unix.ETH_P_IP, append(header, payload...)...)
}

func ipv6(next byte, payload ...byte) []byte {
	header := make([]byte, 40)
	header[0], header[6] = 0x60, next
	return frame(unix.ETH_P_IPV6, append(header, payload...)...)
}

func TestUDPPort(t *testing.T) {
	udp, other := []byte{0xc0, 0, 0x12, 0xb5}, []byte{0x12, 0xb5, 0, 53}
	for name, tt := range map[string]struct {
		frame []byte
		want  bool
	}{
		"IPv4":                        {ipv4(5, unix.IPPROTO_UDP, udp...), true},
		"IPv4 with options":           {ipv4(7, unix.IPPROTO_UDP, udp...), true},
		"IPv4, another port":          {ipv4(5, unix.IPPROTO_UDP, other...), false},
		"IPv4, TCP":                   {ipv4(5, unix.IPPROTO_TCP, udp...), false},
		"IPv6":                        {ipv6(unix.IPPROTO_UDP, udp...), true},
		"IPv6 in fragments":           {ipv6(unix.IPPROTO_FRAGMENT, other...), true},
		"IPv6, another port":          {ipv6(unix.IPPROTO_UDP, other...), false},
		"IPv6, TCP":                   {ipv6(unix.IPPROTO_TCP, udp...), false},
		"ARP":                         {frame(unix.ETH_P_ARP, udp...), false},
		"less than an Ethernet frame": {[]byte{1}, false},
	} {
		if got := passes(t, sockfilter.UDPPort(1<<16, 4789), tt.frame); got != tt.want {
			t.Errorf("%s passes: %t, want %t", name, got, tt.want)
		}
	}
}

func TestSource(t *testing.T) {
	f := frame(0x88b5)
	if !passes(t, sockfilter.Source(1<<16, [4]byte{2, 0x6b, 0x38, 0x70}), f) {
		t.Error("a frame from the address does not pass")
	}
	if passes(t, sockfilter.Source(1<<16, [4]byte{2, 0x6b, 0x38, 0x71}), f) {
		t.Error("a frame from another address passes")
	}
	if passes(t, sockfilter.None(), f) {
		t.Error("a frame passes a filter that drops all")
	}
}

// lo is the loopback interface of this machine, and two sockets that are connected over it. A filter that asks for the
// interface needs packets with one.
type lo struct {
	index    int
	from, to *net.UDPConn
}

func loopback(t *testing.T) (l lo) {
	t.Helper()
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if link.Flags&net.FlagLoopback != 0 {
			l.index = link.Index
		}
	}
	if l.to, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.to.Close() })
	if l.from, err = net.DialUDP("udp4", nil, l.to.LocalAddr().(*net.UDPAddr)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.from.Close() })
	return l
}

// passes sends a frame as a UDP packet: the filter sees the UDP header in place of the first bytes.
func (l lo) passes(t *testing.T, filter []bpf.RawInstruction, frame []byte) bool {
	t.Helper()
	const udpHeader = 8
	raw, err := l.to.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) { attach(t, int(fd), filter) }); err != nil {
		t.Fatal(err)
	}
	if _, err := l.from.Write(frame[udpHeader:]); err != nil {
		t.Fatal(err)
	}
	if err := l.to.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	_, err = l.to.Read(make([]byte, 1<<16))
	if err != nil && !os.IsTimeout(err) {
		t.Fatal(err)
	}
	return err == nil
}

func TestBindings(t *testing.T) {
	l := loopback(t)
	many := slices.Repeat([]int{l.index + 1}, 1000)
	for name, tt := range map[string]struct {
		frame   []byte
		ignored []int
		want    bool
	}{
		"ARP":                          {frame(unix.ETH_P_ARP), nil, true},
		"ARP by another link":          {frame(unix.ETH_P_ARP), []int{l.index + 1, l.index + 2}, true},
		"ARP by an ignored link":       {frame(unix.ETH_P_ARP), []int{l.index + 1, l.index, l.index + 2}, false},
		"a solicitation":               {ipv6(unix.IPPROTO_ICMPV6, 135), nil, true},
		"an advertisement":             {ipv6(unix.IPPROTO_ICMPV6, 136), nil, true},
		"an ignored advertisement":     {ipv6(unix.IPPROTO_ICMPV6, 136), []int{l.index}, false},
		"an echo request":              {ipv6(unix.IPPROTO_ICMPV6, 128), nil, false},
		"UDP":                          {ipv6(unix.IPPROTO_UDP, 135), nil, false},
		"IPv4":                         {ipv4(5, unix.IPPROTO_ICMP, 136), nil, false},
		"ARP, and a thousand ignored":  {frame(unix.ETH_P_ARP), many, true},
		"IPv4, and a thousand ignored": {ipv4(5, unix.IPPROTO_ICMP, 136), many, false},
	} {
		if got := l.passes(t, sockfilter.Bindings(1<<16, tt.ignored), tt.frame); got != tt.want {
			t.Errorf("%s passes: %t, want %t", name, got, tt.want)
		}
	}
}
