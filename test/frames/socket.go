package frames

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// receiveBuffer is large enough for a second of a busy test on a busy machine.
const receiveBuffer = 32 << 20

// Sender sends frames out of an interface.
type Sender struct {
	Interface net.Interface // its state when the sender was made
	fd        int
}

// NewSender opens an interface of the calling thread's network namespace, which needs CAP_NET_RAW there.
func NewSender(iface string) (*Sender, error) {
	fd, link, err := open(iface, 0, 0)
	if err != nil {
		return nil, fmt.Errorf("open interface %s to send: %w", iface, err)
	}
	return &Sender{Interface: *link, fd: fd}, nil
}

// Send sends the frame as it is.
func (s *Sender) Send(frame []byte) error {
	if _, err := unix.Write(s.fd, frame); err != nil {
		return fmt.Errorf("send a frame of %d bytes on %s: %w", len(frame), s.Interface.Name, err)
	}
	return nil
}

// Close closes the sender.
func (s *Sender) Close() error { return unix.Close(s.fd) }

// Receiver receives every frame that arrives at an interface, whatever its destination.
type Receiver struct {
	Interface net.Interface // its state when the receiver was made
	file      *os.File
	raw       syscall.RawConn
	buffer    []byte
}

// NewReceiver opens an interface of the calling thread's network namespace, which needs CAP_NET_RAW there, and makes it
// promiscuous until Close. Frames are queued for Receive from now on.
func NewReceiver(iface string) (*Receiver, error) {
	fd, link, err := open(iface, unix.SOCK_NONBLOCK, unix.ETH_P_ALL)
	if err != nil {
		return nil, fmt.Errorf("open interface %s to receive: %w", iface, err)
	}
	file := os.NewFile(uintptr(fd), "frames on "+iface)
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open interface %s to receive: %w", iface, err), file.Close())
	}
	return &Receiver{Interface: *link, file: file, raw: raw, buffer: make([]byte, 1<<16)}, nil
}

// Receive returns the next frame that arrived. It restores the outermost VLAN tag, which the kernel removes. It returns
// ctx's error when ctx ends.
func (r *Receiver) Receive(ctx context.Context) (frame []byte, err error) {
	interrupted := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { interrupted <- r.file.SetReadDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() { // another call may follow, with another context
			err = errors.Join(err, <-interrupted, r.file.SetReadDeadline(time.Time{}))
		}
	}()
	control := make([]byte, unix.CmsgSpace(int(unsafe.Sizeof(unix.TpacketAuxdata{}))))
	var n, nc int
	var receiveErr error
	err = r.raw.Read(func(fd uintptr) bool {
		n, nc, _, _, receiveErr = unix.Recvmsg(int(fd), r.buffer, control, 0)
		return !errors.Is(receiveErr, unix.EAGAIN)
	})
	if err := errors.Join(err, receiveErr); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("receive on %s: %w", r.Interface.Name, err)
	}
	return restoreTag(append([]byte(nil), r.buffer[:n]...), control[:nc])
}

// Dropped returns how many frames the kernel dropped since the last call because Receive was too slow.
func (r *Receiver) Dropped() (uint32, error) {
	var stats *unix.TpacketStats
	var statsErr error
	err := r.raw.Control(func(fd uintptr) {
		stats, statsErr = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
	})
	if err := errors.Join(err, statsErr); err != nil {
		return 0, fmt.Errorf("ask how many frames were dropped on %s: %w", r.Interface.Name, err)
	}
	return stats.Drops, nil
}

// Close closes the receiver and ends the interface's promiscuous mode.
func (r *Receiver) Close() error { return r.file.Close() }

// open returns a packet socket on an interface that receives frames of an ethertype from others; 0 means none.
func open(iface string, flags int, protocol uint16) (int, *net.Interface, error) {
	link, err := net.InterfaceByName(iface)
	if err != nil {
		return 0, nil, err
	}
	// The protocol is set by bind: a socket that has one before receives from all interfaces.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|flags, 0)
	if err != nil {
		return 0, nil, fmt.Errorf("packet socket: %w", err)
	}
	if protocol != 0 {
		err = prepare(fd, link.Index)
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(protocol), Ifindex: link.Index})
	}
	if err != nil {
		return 0, nil, errors.Join(err, unix.Close(fd))
	}
	return fd, link, nil
}

// prepare sets a receiving socket's options.
func prepare(fd, ifindex int) error {
	promiscuous := unix.PacketMreq{Ifindex: int32(ifindex), Type: unix.PACKET_MR_PROMISC}
	err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &promiscuous),
	)
	if err != nil {
		return fmt.Errorf("set up packet socket: %w", err)
	}
	// This exceeds the system's limit if the process may do that.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	return nil
}

// restoreTag restores a VLAN tag that the kernel reports beside the frame.
func restoreTag(frame, control []byte) ([]byte, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, fmt.Errorf("read what the kernel reports about a frame: %w", err)
	}
	for _, m := range messages {
		if m.Header.Level != unix.SOL_PACKET || m.Header.Type != unix.PACKET_AUXDATA ||
			len(m.Data) < int(unsafe.Sizeof(unix.TpacketAuxdata{})) {
			continue
		}
		aux := *(*unix.TpacketAuxdata)(unsafe.Pointer(&m.Data[0]))
		if aux.Status&unix.TP_STATUS_VLAN_VALID == 0 {
			continue
		}
		protocol := Dot1Q
		if aux.Status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
			protocol = aux.Vlan_tpid
		}
		return Tag(frame, protocol, aux.Vlan_tci), nil
	}
	return frame, nil
}

func networkOrder(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}
