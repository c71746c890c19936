// Package packet sends and receives whole Ethernet frames on a link of the node, and writes them as pcap.
package packet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"
	"unsafe"

	"github.com/mdlayher/socket"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Largest is the longest frame that a socket receives, in bytes. Frames on a veth may not be segmented yet, and then
// have up to 64 KiB of payload.
const Largest = 1<<16 + 64

// buffer is the size of a socket's receive buffer in bytes. It holds the frames of a busy second.
const buffer = 32 << 20

// Frame is one frame on a link.
type Frame struct {
	Bytes      []byte // from the destination address on, with VLAN tags, without the checksum
	Outgoing   bool   // the link sent it; on a pod's port: to the pod
	Unfinished bool   // its TCP, UDP or SCTP checksum is left to hardware
	At         time.Time
}

// Socket is a packet socket on one link. It receives the frames that the link receives and sends, and it can send.
type Socket struct {
	Link net.Interface // as it was when the socket was opened

	conn   *socket.Conn
	buffer []byte
}

// Open opens a link of the calling thread's network namespace. It needs CAP_NET_RAW. From then on the kernel keeps
// frames for Receive: those that the filter passes, or all frames without a filter.
func Open(link string, filter ...bpf.RawInstruction) (*Socket, error) {
	l, err := net.InterfaceByName(link)
	if err != nil {
		return nil, fmt.Errorf("find link %s: %w", link, err)
	}
	conn, err := open(link)
	if err != nil {
		return nil, err
	}
	if err := configure(conn, l.Index, filter); err != nil {
		return nil, errors.Join(fmt.Errorf("open a packet socket on %s: %w", link, err), conn.Close())
	}
	return &Socket{Link: *l, conn: conn, buffer: make([]byte, Largest)}, nil
}

// open opens a packet socket. It has no protocol until it is bound, so that it receives nothing from other links.
func open(link string) (*socket.Conn, error) {
	conn, err := socket.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0, link, nil)
	if err != nil {
		return nil, fmt.Errorf("open a packet socket (needs CAP_NET_RAW): %w", err)
	}
	return conn, nil
}

// configure prepares a socket to receive, and binds it.
func configure(conn *socket.Conn, ifindex int, filter []bpf.RawInstruction) error {
	err := errors.Join(
		conn.SetsockoptInt(unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
		conn.SetsockoptInt(unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
		conn.SetReadBuffer(buffer),
	)
	if err == nil && len(filter) > 0 {
		err = conn.SetBPF(filter)
	}
	if err != nil {
		return err
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	return conn.Bind(&unix.SockaddrLinklayer{Protocol: all, Ifindex: ifindex})
}

// Close closes the socket; a Receive that waits returns an error.
func (s *Socket) Close() error { return s.conn.Close() }

// Send sends a frame unchanged.
func (s *Socket) Send(frame []byte) error {
	if _, err := s.conn.Write(frame); err != nil {
		return fmt.Errorf("send a frame of %d bytes: %w", len(frame), err)
	}
	return nil
}

// SendUnfinished sends a frame whose checksum is left to hardware. The checksum covers all bytes from start on, and
// belongs at offset from there. The link must be in the calling thread's network namespace.
func (s *Socket) SendUnfinished(frame []byte, start, offset uint16) error {
	conn, err := open(s.Link.Name)
	if err != nil {
		return err
	}
	defer conn.Close()
	// VIRTIO_NET_HDR_F_NEEDS_CSUM (include/uapi/linux/virtio_net.h). The header is in the machine's byte order.
	const needsChecksum = 1
	header := []byte{needsChecksum, 0, 0, 0, 0, 0}
	header = binary.NativeEndian.AppendUint16(binary.NativeEndian.AppendUint16(header, start), offset)
	err = conn.SetsockoptInt(unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)
	if err == nil {
		err = conn.Bind(&unix.SockaddrLinklayer{Ifindex: s.Link.Index})
	}
	if err == nil {
		_, err = conn.Write(append(header, frame...))
	}
	if err != nil {
		return fmt.Errorf("send a frame of %d bytes with an unfinished checksum: %w", len(frame), err)
	}
	return nil
}

// ErrNoFrame says that no frame is waiting.
var ErrNoFrame = errors.New("no frame is waiting")

// Receive returns the next frame, or ctx's error when ctx ends. The caller owns the frame's bytes.
func (s *Socket) Receive(ctx context.Context) (Frame, error) {
	control := newControl()
	n, controls, _, from, err := s.conn.Recvmsg(ctx, s.buffer, control, 0)
	if err != nil && ctx.Err() != nil {
		return Frame{}, ctx.Err()
	}
	return s.frame(n, control[:controls], from, err)
}

// Next returns a frame that is already waiting, or ErrNoFrame.
func (s *Socket) Next() (Frame, error) {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return Frame{}, err
	}
	control := newControl()
	var n, controls int
	var from unix.Sockaddr
	var receiveErr error
	err = raw.Read(func(fd uintptr) bool {
		n, controls, _, from, receiveErr = unix.Recvmsg(int(fd), s.buffer, control, 0)
		return true
	})
	if errors.Is(receiveErr, unix.EAGAIN) {
		return Frame{}, ErrNoFrame
	}
	return s.frame(n, control[:controls], from, errors.Join(err, receiveErr))
}

// newControl returns a buffer for the control messages of a frame.
func newControl() []byte {
	return make([]byte, unix.CmsgSpace(auxdataSize)+unix.CmsgSpace(timespecSize))
}

const (
	auxdataSize  = int(unsafe.Sizeof(unix.TpacketAuxdata{}))
	timespecSize = int(unsafe.Sizeof(unix.Timespec{}))
)

// frame returns the frame in the buffer.
func (s *Socket) frame(n int, control []byte, from unix.Sockaddr, err error) (Frame, error) {
	if err != nil {
		return Frame{}, fmt.Errorf("receive on %s: %w", s.Link.Name, err)
	}
	f := Frame{Bytes: slices.Clone(s.buffer[:n])}
	if address, ok := from.(*unix.SockaddrLinklayer); ok {
		f.Outgoing = address.Pkttype == unix.PACKET_OUTGOING
	}
	return f, f.readControl(control)
}

// readControl reads the control messages that come with a frame. They contain the outermost VLAN tag, which the kernel
// removes from the frame, and readControl inserts it again.
func (f *Frame) readControl(control []byte) error {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return fmt.Errorf("read the control messages of a frame: %w", err)
	}
	for _, m := range messages {
		isPacket, isSocket := m.Header.Level == unix.SOL_PACKET, m.Header.Level == unix.SOL_SOCKET
		switch {
		case isPacket && m.Header.Type == unix.PACKET_AUXDATA && len(m.Data) >= auxdataSize:
			aux := *(*unix.TpacketAuxdata)(unsafe.Pointer(&m.Data[0]))
			f.Unfinished = aux.Status&unix.TP_STATUS_CSUMNOTREADY != 0
			if aux.Status&unix.TP_STATUS_VLAN_VALID != 0 && len(f.Bytes) >= 12 {
				protocol := uint16(unix.ETH_P_8021Q)
				if aux.Status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
					protocol = aux.Vlan_tpid
				}
				tag := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, protocol), aux.Vlan_tci)
				f.Bytes = slices.Insert(f.Bytes, 12, tag...)
			}
		case isSocket && m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= timespecSize:
			at := *(*unix.Timespec)(unsafe.Pointer(&m.Data[0]))
			f.At = time.Unix(at.Unix())
		}
	}
	return nil
}

// Dropped returns the number of frames that the kernel dropped since the last call because the buffer was full.
func (s *Socket) Dropped() (dropped uint32, err error) {
	stats, err := s.conn.GetsockoptTpacketStats(unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return 0, fmt.Errorf("count dropped frames on %s: %w", s.Link.Name, err)
	}
	return stats.Drops, nil
}
