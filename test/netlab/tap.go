package netlab

import (
	"bytes"
	"context"
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

	"github.com/k8slan/k8slan/test/frames"
)

// virtioHeader is the length of the header that QEMU has before each frame, struct virtio_net_hdr_mrg_rxbuf.
const virtioHeader = 12

// tap is a macvtap's character device as QEMU opens it.
type tap struct {
	file *os.File
	raw  syscall.RawConn
	buf  []byte
}

// OpenTap opens a macvtap's character device by its numbers, with virtio headers and without offloads. It needs no
// device node on the machine, and skips the test if the process may not make one.
func OpenTap(t testing.TB, major, minor uint32) Wire {
	t.Helper()
	return openTap(t, major, minor, 0)
}

// OffloadTap is a tap as the virtio driver of a common guest uses it: frames in both directions may have unfinished
// checksums and be larger than the MTU.
type OffloadTap struct{ tap }

// OpenOffloadTap opens a tap like OpenTap, with the offloads for checksums and segmentation.
func OpenOffloadTap(t testing.TB, major, minor uint32) OffloadTap {
	t.Helper()
	const udpSegmentation = 0x20 | 0x40 // TUN_F_USO4, TUN_F_USO6: Linux 6.2
	return OffloadTap{openTap(t, major, minor, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6|udpSegmentation)}
}

// These are the offsets of the fields of struct virtio_net_hdr, and the flag for an unfinished checksum.
const (
	virtioFlags, virtioSegmentation       = 0, 1
	virtioChecksumStart, virtioChecksumAt = 6, 8
	virtioNeedsChecksum                   = 1
)

// SendUnfinished sends one frame whose checksum covers the bytes from start on and belongs at offset from there. The
// frame has the sum of the pseudo header in its place.
func (w OffloadTap) SendUnfinished(frame []byte, start, offset uint16) error {
	header := make([]byte, virtioHeader, virtioHeader+len(frame))
	header[virtioFlags] = virtioNeedsChecksum
	binary.NativeEndian.PutUint16(header[virtioChecksumStart:], start)
	binary.NativeEndian.PutUint16(header[virtioChecksumAt:], offset)
	if _, err := w.file.Write(append(header, frame...)); err != nil {
		return fmt.Errorf("send a frame of %d bytes into %s: %w", len(frame), w.file.Name(), err)
	}
	return nil
}

// ReceiveUnfinished receives the next frame and reports whether its checksum, or its segmentation, is left to the
// guest.
func (w OffloadTap) ReceiveUnfinished(ctx context.Context) (frame []byte, unfinished bool, err error) {
	b, err := w.receive(ctx)
	if err != nil {
		return nil, false, err
	}
	return b[virtioHeader:], b[virtioFlags]&virtioNeedsChecksum != 0 || b[virtioSegmentation] != 0, nil
}

func openTap(t testing.TB, major, minor uint32, offloads int) tap {
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
	name := fmt.Sprintf("tap %d:%d", major, minor)
	w := tap{file: os.NewFile(uintptr(fd), name), buf: make([]byte, 1<<16+virtioHeader)}
	t.Cleanup(func() { _ = w.Close() }) // the test may have closed it
	if err := configureTap(fd, offloads); err != nil {
		t.Fatalf("%s: %v", w.file.Name(), err)
	}
	if w.raw, err = w.file.SyscallConn(); err != nil {
		t.Fatalf("%s: %v", w.file.Name(), err)
	}
	return w
}

func configureTap(fd, offloads int) error {
	var request struct { // struct ifreq
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	request.flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&request)))
	if errno != 0 {
		return fmt.Errorf("TUNSETIFF: %w", errno)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, virtioHeader); err != nil {
		return fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads); err != nil {
		return fmt.Errorf("TUNSETOFFLOAD: %w", err)
	}
	return nil
}

// Send sends one frame, with an empty virtio header.
func (w tap) Send(frame []byte) error {
	if _, err := w.file.Write(append(make([]byte, virtioHeader, virtioHeader+len(frame)), frame...)); err != nil {
		return fmt.Errorf("send a frame of %d bytes into %s: %w", len(frame), w.file.Name(), err)
	}
	return nil
}

// Receive receives the next frame.
func (w tap) Receive(ctx context.Context) ([]byte, error) {
	b, err := w.receive(ctx)
	if err != nil {
		return nil, err
	}
	return b[virtioHeader:], nil
}

// receive receives the next frame with its virtio header.
func (w tap) receive(ctx context.Context) ([]byte, error) {
	if err := w.file.SetReadDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("receive from %s: %w", w.file.Name(), err)
	}
	interrupted := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { interrupted <- w.file.SetReadDeadline(time.Unix(1, 0)) })
	var n int
	var readErr error
	err := w.raw.Read(func(fd uintptr) bool {
		n, readErr = unix.Read(int(fd), w.buf)
		return !errors.Is(readErr, unix.EAGAIN)
	})
	if !stop() {
		err = errors.Join(err, <-interrupted)
	}
	if ctx.Err() != nil && n < virtioHeader {
		return nil, ctx.Err()
	}
	if err := errors.Join(err, readErr); err != nil {
		return nil, fmt.Errorf("receive from %s: %w", w.file.Name(), err)
	}
	return bytes.Clone(w.buf[:n]), nil
}

// Drain drops the frames that the kernel has for the guest.
func (w tap) Drain() error { return frames.Drain(w.raw) }

// Close closes the tap, as the end of a VM does.
func (w tap) Close() error { return w.file.Close() }
