package netns

import (
	"bytes"
	"context"
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

// virtioHeader is the length of what QEMU has before each frame, struct virtio_net_hdr_mrg_rxbuf.
const virtioHeader = 12

// tap is a macvtap's character device as QEMU opens it.
type tap struct {
	file *os.File
	raw  syscall.RawConn
	buf  []byte
}

// OpenTap opens a macvtap's character device by its numbers, with virtio headers and without offloads. It needs no
// device node on the machine, and skips the test where nobody may make one.
func OpenTap(t testing.TB, major, minor uint32) Wire {
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
	w := tap{file: os.NewFile(uintptr(fd), fmt.Sprintf("tap %d:%d", major, minor)), buf: make([]byte, 1<<16+virtioHeader)}
	t.Cleanup(func() { _ = w.Close() }) // the test may have closed it
	if err := configureTap(fd); err != nil {
		t.Fatalf("%s: %v", w.file.Name(), err)
	}
	if w.raw, err = w.file.SyscallConn(); err != nil {
		t.Fatalf("%s: %v", w.file.Name(), err)
	}
	return w
}

func configureTap(fd int) error {
	var request struct { // struct ifreq
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	request.flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return fmt.Errorf("TUNSETIFF: %w", errno)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, virtioHeader); err != nil {
		return fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); err != nil {
		return fmt.Errorf("TUNSETOFFLOAD: %w", err)
	}
	return nil
}

// Send puts one frame in, with an empty virtio header.
func (w tap) Send(frame []byte) error {
	if _, err := w.file.Write(append(make([]byte, virtioHeader, virtioHeader+len(frame)), frame...)); err != nil {
		return fmt.Errorf("send a frame of %d bytes into %s: %w", len(frame), w.file.Name(), err)
	}
	return nil
}

// Receive takes the next frame out.
func (w tap) Receive(ctx context.Context) ([]byte, error) {
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
	return bytes.Clone(w.buf[virtioHeader:n]), nil
}

// Close closes the tap; a VM does so when it ends.
func (w tap) Close() error { return w.file.Close() }
