package kernel

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// A tap's ifindex is chosen from a range far above what the kernel hands out, by LAN and spoke: a spoke has one tap
// on a node, so two taps have different ones. (A guest's device is made by CDI from major:minor; the kernel's own
// /dev/tap<ifindex> on the host is not used.)
const (
	tapIndexMin   = 1 << 24
	tapIndexSpan  = 1 << 30
	tapIndexTries = 16
)

func tapIndex(lan segment.LAN, spoke string, try uint32) int {
	sum := sha256.Sum256([]byte(lan.String() + "/" + spoke))
	return tapIndexMin + int((binary.BigEndian.Uint32(sum[:])+try)%tapIndexSpan)
}

// tapDevice reads the numbers of a macvtap's character device. They show in a sysfs of the namespace the link lives in,
// so one is mounted there, for nobody else to see (fsmount, Linux 5.2).
func tapDevice(ns netns.NsHandle, link string, index int) (major, minor uint32, err error) {
	err = do(ns, func() error {
		sysfs, err := mountSysfs()
		if err != nil {
			return err
		}
		defer unix.Close(sysfs)
		dev, err := readTapDevice(sysfs, link, index)
		if err != nil {
			return err
		}
		if _, err := fmt.Sscanf(dev, "%d:%d", &major, &minor); err != nil {
			return fmt.Errorf("tap of %s: device number %q: %w", link, dev, err)
		}
		return nil
	})
	return major, minor, err
}

// mountSysfs returns a sysfs of the thread's network namespace, mounted nowhere.
func mountSysfs() (int, error) {
	fsfd, err := unix.Fsopen("sysfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open a sysfs: %w", err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return -1, fmt.Errorf("set a sysfs up: %w", err)
	}
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, fmt.Errorf("mount a sysfs: %w", err)
	}
	return fd, nil
}

func readTapDevice(sysfs int, link string, index int) (string, error) {
	var errs []error
	for _, format := range []string{"class/net/%s/macvtap/tap%d/dev", "class/net/%s/tap%d/dev"} {
		path := fmt.Sprintf(format, link, index)
		fd, err := unix.Openat(sysfs, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("no %s in sysfs", path))
			continue
		}
		if err != nil {
			return "", fmt.Errorf("open %s in sysfs: %w", path, err)
		}
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		b := make([]byte, 32)
		n, err := f.Read(b)
		if err != nil {
			return "", fmt.Errorf("read %s in sysfs: %w", path, err)
		}
		return strings.TrimSpace(string(b[:n])), nil
	}
	return "", fmt.Errorf("tap of %s has no device: %w", link, errors.Join(errs...))
}
