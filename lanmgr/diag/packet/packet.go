// Package packet sends and receives whole Ethernet frames at a link of the node, and writes them down.
package packet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Largest is the longest frame that a socket takes, in bytes: veths hand on what is still to be cut, up to 64 KiB of payload.
const Largest = 1<<16 + 64

// buffer is how much the kernel may keep for a socket, in bytes: a busy second.
const buffer = 32 << 20

// Frame is one frame at a link.
type Frame struct {
	Bytes      []byte // from the destination address on, VLAN tags where they were, without the checksum
	Outgoing   bool   // the link sends it, for a pod's port: to the pod
	Unfinished bool   // its TCP, UDP or SCTP checksum is left to hardware
	At         time.Time
}

// Socket is a packet socket on one link: it hears what the link receives and what it sends, and sends.
type Socket struct {
	Link net.Interface // as it was when the socket was opened

	file   *os.File
	raw    syscall.RawConn
	buffer []byte
}

// Open opens a link of the calling thread's network namespace, which takes CAP_NET_RAW. Frames are kept for Receive from now
// on: those that the filter takes, or all without one.
func Open(link string, filter ...unix.SockFilter) (*Socket, error) {
	l, err := net.InterfaceByName(link)
	if err != nil {
		return nil, fmt.Errorf("find link %s: %w", link, err)
	}
	// Without a protocol until it is bound, or it hears all links.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open a packet socket (needs CAP_NET_RAW): %w", err)
	}
	if err := bind(fd, l.Index, filter); err != nil {
		return nil, errors.Join(fmt.Errorf("open a packet socket on %s: %w", link, err), unix.Close(fd))
	}
	s := &Socket{Link: *l, file: os.NewFile(uintptr(fd), link), buffer: make([]byte, Largest)}
	if s.raw, err = s.file.SyscallConn(); err != nil {
		return nil, errors.Join(fmt.Errorf("open a packet socket on %s: %w", link, err), s.file.Close())
	}
	return s, nil
}

func bind(fd, ifindex int, filter []unix.SockFilter) error {
	err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
	)
	if err != nil {
		return err
	}
	if len(filter) > 0 {
		program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program); err != nil {
			return err
		}
	}
	// Beyond the system's limit if we may, else up to it.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer) != nil {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, buffer); err != nil {
			return err
		}
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifindex})
}

// Close closes the socket; whoever receives gets an error.
func (s *Socket) Close() error { return s.file.Close() }

// Send sends a frame as it is.
func (s *Socket) Send(frame []byte) error {
	if _, err := s.file.Write(frame); err != nil {
		return fmt.Errorf("send a frame of %d bytes: %w", len(frame), err)
	}
	return nil
}

// SendUnfinished sends a frame whose checksum is left to hardware: of all bytes from start on, to be put at offset from there. It
// is for links of the calling thread's network namespace.
func (s *Socket) SendUnfinished(frame []byte, start, offset uint16) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a packet socket (needs CAP_NET_RAW): %w", err)
	}
	defer unix.Close(fd)
	const needsChecksum = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM (include/uapi/linux/virtio_net.h); the header is in the machine's byte order
	header := []byte{needsChecksum, 0, 0, 0, 0, 0}
	header = binary.NativeEndian.AppendUint16(binary.NativeEndian.AppendUint16(header, start), offset)
	err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: s.Link.Index})
	}
	if err == nil {
		_, err = unix.Write(fd, append(header, frame...))
	}
	if err != nil {
		return fmt.Errorf("send a frame of %d bytes with an unfinished checksum: %w", len(frame), err)
	}
	return nil
}

// ErrNoFrame says that no frame waits.
var ErrNoFrame = errors.New("no frame waits")

// Receive returns the next frame, or ctx's error when that ends. Its bytes are the caller's.
func (s *Socket) Receive(ctx context.Context) (Frame, error) {
	interrupted := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { interrupted <- s.file.SetReadDeadline(time.Unix(1, 0)) })
	f, err := s.receive(true)
	if !stop() { // another call may follow, with another context
		err = errors.Join(err, <-interrupted, s.file.SetReadDeadline(time.Time{}))
	}
	if err != nil && ctx.Err() != nil {
		return Frame{}, ctx.Err()
	}
	return f, err
}

// Next returns a frame that waits already, or ErrNothing.
func (s *Socket) Next() (Frame, error) { return s.receive(false) }

func (s *Socket) receive(wait bool) (Frame, error) {
	control := make([]byte, unix.CmsgSpace(int(unsafe.Sizeof(unix.TpacketAuxdata{})))+unix.CmsgSpace(int(unsafe.Sizeof(unix.Timespec{}))))
	var n, controls int
	var from unix.Sockaddr
	var receiveErr error
	err := s.raw.Read(func(fd uintptr) bool {
		n, controls, _, from, receiveErr = unix.Recvmsg(int(fd), s.buffer, control, 0)
		return !wait || !errors.Is(receiveErr, unix.EAGAIN)
	})
	if errors.Is(receiveErr, unix.EAGAIN) {
		return Frame{}, ErrNoFrame
	}
	if err := errors.Join(err, receiveErr); err != nil {
		return Frame{}, fmt.Errorf("receive on %s: %w", s.Link.Name, err)
	}
	f := Frame{Bytes: slices.Clone(s.buffer[:n])}
	if address, ok := from.(*unix.SockaddrLinklayer); ok {
		f.Outgoing = address.Pkttype == unix.PACKET_OUTGOING
	}
	return f, f.readControl(control[:controls])
}

// readControl takes what the kernel says beside a frame: it keeps the outermost VLAN tag there, which is put back.
func (f *Frame) readControl(control []byte) error {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return fmt.Errorf("read what the kernel says about a frame: %w", err)
	}
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA && len(m.Data) >= int(unsafe.Sizeof(unix.TpacketAuxdata{})):
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
		case m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= int(unsafe.Sizeof(unix.Timespec{})):
			at := *(*unix.Timespec)(unsafe.Pointer(&m.Data[0]))
			f.At = time.Unix(at.Unix())
		}
	}
	return nil
}

// Dropped is how many frames the kernel had no room for since the last call.
func (s *Socket) Dropped() (dropped uint32, err error) {
	var stats *unix.TpacketStats
	var statsErr error
	err = s.raw.Control(func(fd uintptr) {
		stats, statsErr = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
	})
	if err := errors.Join(err, statsErr); err != nil {
		return 0, fmt.Errorf("ask how many frames were dropped on %s: %w", s.Link.Name, err)
	}
	return stats.Drops, nil
}
