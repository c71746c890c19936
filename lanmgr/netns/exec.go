package netns

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Exec replaces this program by itself, started again with the network and mount namespaces of a process. It returns
// only if that fails. It takes CAP_SYS_ADMIN and a view of the process.
func Exec(pid int, args []string) error {
	program, err := os.Open("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("open this program: %w", err)
	}
	defer program.Close()
	// The thread that enters the namespaces becomes the new program; exec ends the others.
	runtime.LockOSThread()
	// A thread that shares its root and working directory with others may not change its mount namespace (setns(2)).
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare root and working directory: %w", err)
	}
	for _, kind := range []string{"net", "mnt"} {
		if err := enter(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); err != nil {
			return fmt.Errorf("enter the namespaces of process %d: %w", pid, err)
		}
	}
	err = unix.Exec(fmt.Sprintf("/proc/self/fd/%d", program.Fd()), args, os.Environ())
	return fmt.Errorf("start this program again: %w", err)
}

func enter(path string) error {
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), 0); err != nil {
		return fmt.Errorf("setns %s: %w", path, err)
	}
	return nil
}
