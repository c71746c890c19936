package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// All switching of threads between network namespaces is in this file.

// do runs f inside the network namespace.
func do(ns netns.NsHandle, f func() error) error {
	return elsewhere(func() error { return netns.Set(ns) }, f)
}

// createNetns makes a network namespace and mounts it at path. Its settings are made before it has its name,
// so that nobody can find it talkative.
func createNetns(path string) error {
	return elsewhere(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() error {
		if err := silence(); err != nil {
			return err
		}
		return mountNetns("/proc/thread-self/ns/net", path)
	})
}

// elsewhere runs f on a thread of its own after it has entered another network namespace. The thread is given back
// only after it returned to where it was; otherwise it ends with its goroutine.
func elsewhere(enter, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			result <- fmt.Errorf("open the thread's own network namespace: %w", err)
			return
		}
		defer home.Close()
		if err := enter(); err != nil {
			runtime.UnlockOSThread()
			result <- fmt.Errorf("enter a network namespace: %w", err)
			return
		}
		err = f()
		if backErr := netns.Set(home); backErr != nil {
			result <- errors.Join(err, fmt.Errorf("leave a network namespace: %w", backErr))
			return
		}
		runtime.UnlockOSThread()
		result <- err
	}()
	return <-result
}

// mountNetns gives the namespace that source stands for a name.
func mountNetns(source, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make the file for the network namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount(source, path, "none", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount the network namespace at %s: %w", path, err)
	}
	return nil
}

// unmountNetns takes the name away, whatever it stands for; absent is success.
func unmountNetns(path string) error {
	for {
		// Detached, because somebody may be looking at it; once more for each mount on top of another.
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the file of the network namespace: %w", err)
	}
	return nil
}

// openNetns opens a named namespace. A name without a namespace behind it is fs.ErrNotExist.
func openNetns(path string) (netns.NsHandle, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return netns.None(), fmt.Errorf("open network namespace %s: %w", path, err)
	}
	var st unix.Statfs_t // of what was opened: the name may be taken away meanwhile
	if err := unix.Fstatfs(int(ns), &st); err != nil {
		ns.Close()
		return netns.None(), &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	if st.Type != unix.NSFS_MAGIC {
		ns.Close()
		return netns.None(), &fs.PathError{Op: "open network namespace", Path: path, Err: fs.ErrNotExist}
	}
	return ns, nil
}

// sameNetns says whether two handles stand for one namespace.
func sameNetns(a, b netns.NsHandle) (bool, error) {
	var sa, sb unix.Stat_t
	if err := unix.Fstat(int(a), &sa); err != nil {
		return false, fmt.Errorf("stat network namespace: %w", err)
	}
	if err := unix.Fstat(int(b), &sb); err != nil {
		return false, fmt.Errorf("stat network namespace: %w", err)
	}
	return sa.Dev == sb.Dev && sa.Ino == sb.Ino, nil
}

// The settings that keep a LAN silent and transparent. New links inherit "default"; "all" is for those that are there.
// Bridge netfilter starts switched on in every namespace (brnf_init_net in net/bridge/br_netfilter_hooks.c) and would
// pass a LAN's frames through IP validation; its files are absent where the module is not loaded.
var settings = []struct {
	dir, value string
	files      []string
}{
	{"/proc/sys/net/ipv6/conf", "1", []string{"all/disable_ipv6", "default/disable_ipv6"}},
	{"/proc/sys/net/bridge", "0", []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables", "bridge-nf-call-arptables"}},
}

// silence makes the settings in the thread's own namespace.
func silence() error {
	for _, s := range settings {
		for _, file := range s.files {
			if err := os.WriteFile(filepath.Join(s.dir, file), []byte(s.value), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("sysctl: %w", err)
			}
		}
	}
	return nil
}

// isSilent reads them back. Each folder is looked up once: in the kernel's cache of names, the folders of all namespaces
// are in one chain, so that a look-up takes time in proportion to the LANs (proc_sys_compare in fs/proc/proc_sysctl.c).
func isSilent() (bool, error) {
	for _, s := range settings {
		dir, err := unix.Open(s.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("sysctl: open %s: %w", s.dir, err)
		}
		defer unix.Close(dir)
		for _, file := range s.files {
			value, err := readAt(dir, file)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return false, fmt.Errorf("sysctl: read %s in %s: %w", file, s.dir, err)
			}
			if value != s.value {
				return false, nil
			}
		}
	}
	return true, nil
}

// readAt reads a short file of one line in a folder.
func readAt(dir int, file string) (string, error) {
	fd, err := unix.Openat(dir, file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	line := make([]byte, 32)
	n, err := unix.Read(fd, line)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(line[:n])), nil
}

// noIPv6 keeps one link in the thread's own namespace from speaking IPv6 for itself.
func noIPv6(link string) error {
	err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", link, "disable_ipv6"), []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("switch IPv6 off on %s: %w", link, err)
	}
	return nil
}
