package netns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Wire is where a test puts frames in and takes them out: a packet socket on a link, or the tap that a VM opens. One
// goroutine may send while another receives.
type Wire struct {
	name string
	file *os.File
	// header is what stands before each frame in the file: a tap's virtio header, as long as QEMU's.
	header int
	read   func(fd int, buf []byte) ([]byte, error)
	buf    []byte
}

// Open opens a packet socket on a link of the namespace, which sees what arrives on that link: on a pod's link what
// reaches the pod. VLAN tags that the kernel keeps beside the frame are put back where they were.
func (n Namespace) Open(t testing.TB, link string) *Wire {
	t.Helper()
	return n.open(t, link, false)
}

// Tap opens a packet socket that sees both what arrives on a link and what is sent out of it.
func (n Namespace) Tap(t testing.TB, link string) *Wire {
	t.Helper()
	return n.open(t, link, true)
}

func (n Namespace) open(t testing.TB, link string, outgoing bool) *Wire {
	t.Helper()
	h := n.Netlink(t)
	l, err := h.LinkByName(link)
	if err != nil {
		t.Fatalf("%s in %s: %v", link, n.Path, err)
	}
	var fd int
	err = n.Do(func() (err error) {
		fd, err = packetSocket(l.Attrs().Index, outgoing)
		return err
	})
	if err != nil {
		t.Fatalf("packet socket on %s in %s: %v", link, n.Path, err)
	}
	return newWire(t, &Wire{name: link, file: os.NewFile(uintptr(fd), link), read: readPacket})
}

// packetSocket opens a socket for all frames of one link of the thread's namespace.
func packetSocket(index int, outgoing bool) (int, error) {
	// Protocol 0 until it is bound: no frame of another link gets in.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<20),
	); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if !outgoing {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// readPacket receives one frame and puts its VLAN tag back.
func readPacket(fd int, buf []byte) ([]byte, error) {
	oob := make([]byte, 128)
	n, oobn, _, _, err := unix.Recvmsg(fd, buf, oob, 0)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	frame := buf[:n]
	for _, m := range messages {
		if m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA {
			frame = untuck(frame, m.Data)
		}
	}
	return frame, nil
}

// untuck puts the VLAN tag that a packet socket delivers in its auxiliary data (struct tpacket_auxdata of
// linux/if_packet.h) back into the frame.
func untuck(frame, aux []byte) []byte {
	if len(aux) < 20 || len(frame) < 12 || binary.NativeEndian.Uint32(aux)&unix.TP_STATUS_VLAN_VALID == 0 {
		return frame
	}
	tpid := uint16(unix.ETH_P_8021Q)
	if binary.NativeEndian.Uint32(aux)&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
		tpid = binary.NativeEndian.Uint16(aux[18:])
	}
	tagged := append(make([]byte, 0, len(frame)+4), frame[:12]...)
	tagged = binary.BigEndian.AppendUint16(tagged, tpid)
	tagged = binary.BigEndian.AppendUint16(tagged, binary.NativeEndian.Uint16(aux[16:]))
	return append(tagged, frame[12:]...)
}

// OpenTap opens a macvtap's character device by its numbers, as a VM does: with virtio headers, without offloads. It
// needs no device node on the machine, and skips the test where nobody may make one.
func OpenTap(t testing.TB, major, minor uint32) *Wire {
	t.Helper()
	NeedDevices(t)
	dir, err := os.MkdirTemp("/run", "tap-")
	if err != nil {
		t.Fatalf("directory of the tap: %v", err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "tap")
	if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))); err != nil {
		t.Fatalf("device node of the tap: %v", err)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open the tap %d:%d: %v", major, minor, err)
	}
	const header = 12 // struct virtio_net_hdr_mrg_rxbuf
	if err := configureTap(fd, header); err != nil {
		unix.Close(fd)
		t.Fatalf("tap %d:%d: %v", major, minor, err)
	}
	return newWire(t, &Wire{
		name: fmt.Sprintf("tap %d:%d", major, minor), file: os.NewFile(uintptr(fd), path), header: header, read: readTap,
	})
}

func configureTap(fd, header int) error {
	var request struct { // struct ifreq
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	request.flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return fmt.Errorf("TUNSETIFF: %w", errno)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, header); err != nil {
		return fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); err != nil {
		return fmt.Errorf("TUNSETOFFLOAD: %w", err)
	}
	return nil
}

func readTap(fd int, buf []byte) ([]byte, error) {
	n, err := unix.Read(fd, buf)
	if err != nil {
		return nil, err
	}
	return buf[:n], nil
}

func newWire(t testing.TB, w *Wire) *Wire {
	t.Cleanup(w.Close)
	w.buf = make([]byte, 1<<16+64)
	return w
}

// Close closes the wire; a VM closes its tap when it ends. Closing twice does no harm.
func (w *Wire) Close() {
	// The second close of a file is the only error here, and it is allowed.
	_ = w.file.Close()
}

// Send puts one frame in, without its checksum at the end.
func (w *Wire) Send(frame []byte) error {
	if _, err := w.file.Write(append(make([]byte, w.header, w.header+len(frame)), frame...)); err != nil {
		return fmt.Errorf("send %d bytes on %s: %w", len(frame), w.name, err)
	}
	return nil
}

// Receive takes the next frame out. It is os.ErrDeadlineExceeded when none came by the deadline.
func (w *Wire) Receive(deadline time.Time) ([]byte, error) {
	if err := w.file.SetReadDeadline(deadline); err != nil {
		return nil, fmt.Errorf("deadline on %s: %w", w.name, err)
	}
	conn, err := w.file.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("receive on %s: %w", w.name, err)
	}
	var frame []byte
	var failed error
	err = conn.Read(func(fd uintptr) bool {
		frame, failed = w.read(int(fd), w.buf)
		return !errors.Is(failed, syscall.EAGAIN)
	})
	if err := errors.Join(err, failed); err != nil {
		return nil, fmt.Errorf("receive on %s: %w", w.name, err)
	}
	return bytes.Clone(frame[w.header:]), nil
}

// Await takes frames out until one fits, and returns it; the others are dropped. It is os.ErrDeadlineExceeded when
// none came within the time.
func (w *Wire) Await(within time.Duration, fits func(frame []byte) bool) ([]byte, error) {
	deadline := time.Now().Add(within)
	for {
		frame, err := w.Receive(deadline)
		if err != nil || fits(frame) {
			return frame, err
		}
	}
}
