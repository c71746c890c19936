package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

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

// inode is what tells a network namespace from others, as long as somebody has it open.
type inode struct{ dev, ino uint64 }

func inodeOf(ns netns.NsHandle) (inode, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(ns), &st); err != nil {
		return inode{}, fmt.Errorf("stat network namespace: %w", err)
	}
	return inode{st.Dev, st.Ino}, nil
}

// isAt says whether the namespace has that name.
func (i inode) isAt(path string) (bool, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return i == inode{st.Dev, st.Ino}, nil
}
