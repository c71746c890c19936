package frames

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"syscall"
	"unsafe"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// receiveBuffer is large enough for a second of a busy test on a busy machine.
const receiveBuffer = 32 << 20

// Sender sends frames out of an interface.
type Sender struct {
	Interface net.Interface // its state when the sender was made
	conn      *socket.Conn
}

// NewSender opens an interface of the calling thread's network namespace, which needs CAP_NET_RAW there.
func NewSender(iface string) (*Sender, error) {
	conn, link, err := open(iface, 0)
	if err != nil {
		return nil, fmt.Errorf("open interface %s to send: %w", iface, err)
	}
	return &Sender{Interface: *link, conn: conn}, nil
}

// Send sends the frame as it is.
func (s *Sender) Send(frame []byte) error {
	if _, err := s.conn.Write(frame); err != nil {
		return fmt.Errorf("send a frame of %d bytes on %s: %w", len(frame), s.Interface.Name, err)
	}
	return nil
}

// Close closes the sender.
func (s *Sender) Close() error { return s.conn.Close() }

// Receiver receives every frame that arrives at an interface, whatever its destination.
type Receiver struct {
	Interface net.Interface // its state when the receiver was made
	conn      *socket.Conn
	buffer    []byte
}

// NewReceiver opens an interface of the calling thread's network namespace, which needs CAP_NET_RAW there, and makes it
// promiscuous until Close. Frames are queued for Receive from now on.
func NewReceiver(iface string) (*Receiver, error) {
	conn, link, err := open(iface, unix.ETH_P_ALL)
	if err != nil {
		return nil, fmt.Errorf("open interface %s to receive: %w", iface, err)
	}
	return &Receiver{Interface: *link, conn: conn, buffer: make([]byte, 1<<16)}, nil
}

// Receive returns the next frame that arrived. It restores the outermost VLAN tag, which the kernel removes. It returns
// ctx's error when ctx ends.
func (r *Receiver) Receive(ctx context.Context) (frame []byte, err error) {
	control := make([]byte, unix.CmsgSpace(auxdataSize))
	n, nc, _, _, err := r.conn.Recvmsg(ctx, r.buffer, control, 0)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("receive on %s: %w", r.Interface.Name, err)
	}
	return restoreTag(bytes.Clone(r.buffer[:n]), control[:nc])
}

const auxdataSize = int(unsafe.Sizeof(unix.TpacketAuxdata{}))

// Drain drops the frames that have arrived so far.
func (r *Receiver) Drain() error {
	raw, err := r.conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("drop the frames that have arrived: %w", err)
	}
	return Drain(raw)
}

// Drain reads from a non-blocking file until nothing is left.
func Drain(file syscall.RawConn) error {
	var readErr error
	buffer := make([]byte, 1<<16)
	err := file.Control(func(fd uintptr) {
		for readErr == nil || errors.Is(readErr, unix.EINTR) {
			_, readErr = unix.Read(int(fd), buffer)
		}
	})
	if !errors.Is(readErr, unix.EAGAIN) {
		err = errors.Join(err, readErr)
	}
	if err != nil {
		return fmt.Errorf("drop the frames that have arrived: %w", err)
	}
	return nil
}

// Dropped returns how many frames the kernel had to drop since the last call, because Receive was too slow.
func (r *Receiver) Dropped() (uint32, error) {
	stats, err := r.conn.GetsockoptTpacketStats(unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return 0, fmt.Errorf("ask how many frames were dropped on %s: %w", r.Interface.Name, err)
	}
	return stats.Drops, nil
}

// Close closes the receiver and ends the interface's promiscuity.
func (r *Receiver) Close() error { return r.conn.Close() }

// open returns a packet socket on an interface that receives frames of an ethertype from others; 0 means none.
func open(iface string, protocol uint16) (*socket.Conn, *net.Interface, error) {
	link, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, nil, err
	}
	// The protocol is set by bind: a socket that has one before receives from all interfaces.
	conn, err := socket.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0, iface, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("packet socket: %w", err)
	}
	if protocol != 0 {
		err = prepare(conn, link.Index)
	}
	if err == nil {
		err = conn.Bind(&unix.SockaddrLinklayer{Protocol: networkOrder(protocol), Ifindex: link.Index})
	}
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	return conn, link, nil
}

// prepare sets a receiving socket's options.
func prepare(conn *socket.Conn, ifindex int) error {
	promiscuous := unix.PacketMreq{Ifindex: int32(ifindex), Type: unix.PACKET_MR_PROMISC}
	err := errors.Join(
		conn.SetsockoptInt(unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
		conn.SetsockoptInt(unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		conn.SetsockoptPacketMreq(unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &promiscuous),
		conn.SetReadBuffer(receiveBuffer),
	)
	if err != nil {
		return fmt.Errorf("set up packet socket: %w", err)
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
		if m.Header.Level != unix.SOL_PACKET || m.Header.Type != unix.PACKET_AUXDATA || len(m.Data) < auxdataSize {
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
