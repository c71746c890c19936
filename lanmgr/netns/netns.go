// Package netns makes, opens and enters network namespaces. Only this package moves threads between them.
package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Handle is an open network namespace.
type Handle = netns.NsHandle

// None returns a handle of no namespace.
func None() Handle { return netns.None() }

// Current opens the network namespace of the calling thread.
func Current() (Handle, error) { return netns.Get() }

// Open opens a namespace by its name in the file system. The error of a name without a namespace behind it is
// fs.ErrNotExist.
func Open(path string) (Handle, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return None(), fmt.Errorf("open network namespace %s: %w", path, err)
	}
	var st unix.Statfs_t // of the open file, because the name may be removed meanwhile
	if err := unix.Fstatfs(int(ns), &st); err != nil {
		ns.Close()
		return None(), &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	if st.Type != unix.NSFS_MAGIC {
		ns.Close()
		return None(), &fs.PathError{Op: "open network namespace", Path: path, Err: fs.ErrNotExist}
	}
	return ns, nil
}

// Dup opens an open namespace once more.
func Dup(ns Handle) (Handle, error) {
	fd, err := unix.FcntlInt(uintptr(ns), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return None(), fmt.Errorf("open a network namespace again: %w", err)
	}
	return Handle(fd), nil
}

// Do runs f on a thread that is in the namespace.
func Do(ns Handle, f func() error) error {
	return elsewhere(func() error { return netns.Set(ns) }, f)
}

// Create makes a network namespace and mounts it at path. It runs prepare in the namespace before that has its name.
func Create(path string, prepare func() error) error {
	return elsewhere(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() error {
		if err := prepare(); err != nil {
			return err
		}
		return mount("/proc/thread-self/ns/net", path)
	})
}

// elsewhere runs f on a thread that has entered another network namespace. The thread goes back to the Go runtime
// only if it has returned to its own namespace; otherwise it ends with its goroutine.
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

// Mount gives an open namespace a name in the file system.
func Mount(ns Handle, path string) error {
	return mount(fmt.Sprintf("/proc/self/fd/%d", int(ns)), path)
}

func mount(source, path string) error {
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

// Unmount removes a name, whatever is mounted there. It is no error if there is no such name.
func Unmount(path string) error {
	for {
		// Detached, because a process may have it open. One call for each of several mounts on top of each other.
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

// Inode distinguishes network namespaces from each other, as long as they are open.
type Inode struct{ dev, ino uint64 }

// InodeOf returns the inode of an open namespace.
func InodeOf(ns Handle) (Inode, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(ns), &st); err != nil {
		return Inode{}, fmt.Errorf("stat network namespace: %w", err)
	}
	return Inode{st.Dev, st.Ino}, nil
}

// IsAt reports whether the namespace is mounted at path.
func (i Inode) IsAt(path string) (bool, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return i == Inode{st.Dev, st.Ino}, nil
}
