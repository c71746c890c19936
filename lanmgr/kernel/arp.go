package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Frames a second that are read of a LAN, and how many at once: a station may send very many, and of what is shown most is known.
const (
	arpRate  = 1000
	arpBurst = 1000
)

// Bindings is what stations on a LAN's own ports show of themselves.
type Bindings struct {
	// Bound says that a station has shown by ARP or neighbour discovery that it has the address.
	Bound func(mac [6]byte, ip netip.Addr)
	// Recreated says that the LAN is in another network namespace now, of which nothing was told so far: Node.Stations tells who is there.
	Recreated func()
}

// WatchBindings tells of a LAN's addresses as long as it is in hand, and again when another namespace of its name is, until the context ends.
// What is sent to others is heard, and what comes from other nodes is not.
func (n *Node) WatchBindings(ctx context.Context, netnsName string, tell Bindings) error {
	anew := func() {} // at first who is there is known
	for ctx.Err() == nil {
		h := n.await(ctx, netnsName)
		if h == nil {
			break
		}
		err := h.hear(ctx, tell.Bound, anew)
		n.giveBack(h)
		if err != nil {
			return fmt.Errorf("hear ARP on %s: %w", netnsName, err)
		}
		anew = tell.Recreated
	}
	return nil
}

// hear tells of addresses in the namespace until the context ends, or it is in hand no more.
func (h *held) hear(ctx context.Context, shown func(mac [6]byte, ip netip.Addr), begun func()) error {
	var f *os.File
	if err := netns.Do(h.conn.ns, func() (err error) { f, err = openARP(); return err }); err != nil {
		return err
	}
	defer f.Close()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(h.inHand, stop)()
	defer context.AfterFunc(ctx, func() { f.Close() })()
	begun()
	ear := arpEar{conn: h.conn, file: f, ports: map[int]bool{}}
	pace := rate.NewLimiter(arpRate, arpBurst)
	for buf := make([]byte, arpLongest); ; {
		size, from, err := receiveFrom(f, buf)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil && ear.isPort(from) {
			if mac, ip, ok := shownBy(buf[:size]); ok {
				shown(mac, ip)
			}
		}
		if err == nil {
			err = ear.err
		}
		if err != nil {
			return err
		}
		if pace.Wait(ctx) != nil {
			return nil
		}
	}
}

// openARP opens a socket in the thread's own namespace that hears ARP and neighbour discovery come in by any link. It has to hear all
// links' frames before they get to the bridge, which takes them (__netif_receive_skb_core in net/core/dev.c); the filter is asked before
// a frame is copied, and what goes out is not looked at at all.
func openARP() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open a packet socket (needs CAP_NET_RAW): %w", err)
	}
	f := os.NewFile(uintptr(fd), "arp")
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		setFilter(fd, arpFilter(nil)),
	)
	if err == nil {
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all})
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func setFilter(fd int, filter []unix.SockFilter) error {
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
}

// arpLongest is how much of a frame is read, in bytes: with neighbour discovery, room for options.
const arpLongest = 256

// Where things are in a frame without VLAN tags, and types of ICMPv6 (RFC 4861).
const (
	etherType    = 12
	ipv6         = 14
	icmpv6       = ipv6 + 40
	solicitation = 135
	advertising  = 136
)

// arpFilter passes ARP and neighbour discovery without VLAN tags that have not come in by one of the deaf links. All else is done with after two or
// three comparisons.
func arpFilter(deaf []int) []unix.SockFilter {
	program := []bpf.Instruction{
		bpf.LoadAbsolute{Off: etherType, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_ARP, SkipTrue: 7},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.ETH_P_IPV6, SkipTrue: 5},
		bpf.LoadAbsolute{Off: ipv6 + 6, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_ICMPV6, SkipTrue: 3},
		bpf.LoadAbsolute{Off: icmpv6, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: solicitation, SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: advertising, SkipTrue: 1},
		bpf.RetConstant{},
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1},
		bpf.RetConstant{},
		bpf.LoadExtension{Num: bpf.ExtInterfaceIndex},
	}
	for _, index := range deaf {
		program = append(program, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(index), SkipTrue: 1}, bpf.RetConstant{})
	}
	raw, err := bpf.Assemble(append(program, bpf.RetConstant{Val: arpLongest}))
	if err != nil {
		panic(err) // a mistake in the lines above
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return filter
}

// receiveFrom waits for a frame and says by which link it has come in.
func receiveFrom(f *os.File, buf []byte) (size, link int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	var from unix.Sockaddr
	var receiveErr error
	err = raw.Read(func(fd uintptr) bool {
		size, from, receiveErr = unix.Recvfrom(int(fd), buf, 0)
		return !errors.Is(receiveErr, unix.EAGAIN)
	})
	if err := errors.Join(err, receiveErr); err != nil {
		return 0, 0, err
	}
	if address, ok := from.(*unix.SockaddrLinklayer); ok {
		link = address.Ifindex
	}
	return size, link, nil
}

// arpEar knows which links of a LAN are ports of stations. What comes in by others it hears once: the filter has them then.
type arpEar struct {
	conn  *conn
	file  *os.File
	ports map[int]bool // by index, as far as is known
	err   error
}

// isPort says whether a link is a port of a station: one of the bridge that is not the VXLAN. Plugs, which stand between a port and a macvtap, hear
// what is sent to their VM.
func (e *arpEar) isPort(index int) bool {
	is, known := e.ports[index]
	if known {
		return is
	}
	l, err := e.conn.LinkByIndex(index)
	if err != nil {
		if !isNotFound(err) { // else it is gone
			e.err = fmt.Errorf("look up link %d: %w", index, err)
		}
		return false
	}
	is = l.Attrs().MasterIndex != 0 && l.Type() != "vxlan"
	if e.ports[index] = is; is {
		return true
	}
	if l.Type() != "vxlan" && l.Type() != "bridge" && !strings.HasSuffix(l.Attrs().Name, segment.PlugName("")) {
		delete(e.ports, index) // may become one
		return false
	}
	var deaf []int
	for index, is := range e.ports {
		if !is {
			deaf = append(deaf, index)
		}
	}
	slices.Sort(deaf)
	raw, err := e.file.SyscallConn()
	if err == nil {
		err = errors.Join(raw.Control(func(fd uintptr) { e.err = setFilter(int(fd), arpFilter(deaf)) }))
	}
	e.err = errors.Join(e.err, err)
	return false
}

// shownBy reads which address the sender of a frame shows that it has. What is told of somebody else is not taken, nor is a question
// whether an address is free (RFC 5227, RFC 4862).
func shownBy(frame []byte) (mac [6]byte, ip netip.Addr, ok bool) {
	if len(frame) < ipv6 {
		return mac, ip, false
	}
	source, payload := frame[6:12], frame[ipv6:]
	switch binary.BigEndian.Uint16(frame[etherType:]) {
	case unix.ETH_P_ARP:
		ip, ok = shownByARP(payload, source)
	case unix.ETH_P_IPV6:
		ip, ok = shownByND(payload, source)
	}
	return [6]byte(source), ip, ok && !ip.IsUnspecified() && !ip.IsMulticast()
}

// shownByARP reads ARP for IPv4 on Ethernet (RFC 826).
func shownByARP(arp, source []byte) (netip.Addr, bool) {
	head := []byte{0, 1, 8, 0, 6, 4, 0} // the operation is 1 or 2
	if len(arp) < 28 || !bytes.HasPrefix(arp, head) || arp[7] < 1 || arp[7] > 2 || !bytes.Equal(arp[8:14], source) {
		return netip.Addr{}, false
	}
	return netip.AddrFromSlice(arp[14:18])
}

// shownByND reads a solicitation, whose source has the address, or an advertisement, of its target.
func shownByND(packet, source []byte) (ip netip.Addr, ok bool) {
	const header, hopLimit = 40, 255 // of one that no router has passed on
	if len(packet) < header+24 || packet[0]>>4 != 6 || packet[6] != unix.IPPROTO_ICMPV6 || packet[7] != hopLimit {
		return ip, false
	}
	message := packet[header:]
	option := byte(1) // the source's link-layer address
	switch message[0] {
	case solicitation:
		ip, ok = netip.AddrFromSlice(packet[8:24])
	case advertising:
		ip, ok = netip.AddrFromSlice(message[8:24])
		option = 2 // the target's
	}
	for options := message[24:]; len(options) >= 8; {
		length := 8 * int(options[1])
		if length == 0 || length > len(options) {
			return ip, false
		}
		if options[0] == option && !bytes.Equal(options[2:8], source) {
			return ip, false
		}
		options = options[length:]
	}
	return ip, ok
}
