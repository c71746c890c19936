package dataplane

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A step is one system call by which a process changes something that outlives it: a netlink request that changes
// something, a file or directory, a mount, a sysctl, a feature of a link, a lock.
type step string

// walk runs a process and returns the steps it was about to take. The process is killed before the step with the number
// killAt, from 0. All of it happens on the calling thread.
func walk(cmd *exec.Cmd, killAt int) (steps []step, killed bool, err error) {
	// Pdeathsig and EXITKILL end the process with the test, however the test ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, false, err
	}
	pid := cmd.Process.Pid
	defer func() { err = errors.Join(err, cmd.Process.Release()) }()
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil {
		return nil, false, fmt.Errorf("wait for the start: %w", err)
	}
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(pid, options); err != nil {
		return nil, false, fmt.Errorf("trace: %w", err)
	}
	resume := func(tid int, signal unix.Signal) error {
		err := unix.PtraceSyscall(tid, int(signal))
		if errors.Is(err, unix.ESRCH) { // the process has been killed
			return nil
		}
		return err
	}
	if err := resume(pid, 0); err != nil {
		return nil, false, err
	}
	for {
		tid, err := unix.Wait4(-1, &status, unix.WALL|unix.WNOTHREAD, nil)
		if err != nil {
			return steps, killed, fmt.Errorf("wait for a stop: %w", err)
		}
		if status.Exited() || status.Signaled() {
			if tid != pid {
				continue
			}
			switch {
			case killed != (status.Signaled() && status.Signal() == unix.SIGKILL):
				err = fmt.Errorf("ended by %v with status %d, killed: %t", status.Signal(), status.ExitStatus(), killed)
			case !killed && status.ExitStatus() != 0:
				err = exitStatus(status.ExitStatus())
			}
			return steps, killed, err
		}
		var signal unix.Signal
		switch stop := status.StopSignal(); {
		case stop == unix.SIGTRAP|0x80:
			s, err := stepOf(tid)
			if err != nil {
				return steps, killed, err
			}
			if s == "" || killed {
				break
			}
			if len(steps) == killAt {
				killed = true
				if err := unix.Kill(pid, unix.SIGKILL); err != nil {
					return steps, killed, err
				}
			}
			steps = append(steps, s)
		case stop == unix.SIGTRAP, stop == unix.SIGSTOP: // a new thread stops, and so does the thread that made it
		default:
			signal = stop
		}
		if err := resume(tid, signal); err != nil {
			return steps, killed, fmt.Errorf("go on: %w", err)
		}
	}
}

// exitStatus is the status of a process that exited by itself.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// entry is struct ptrace_syscall_info (include/uapi/linux/ptrace.h) where a system call begins.
type entry struct {
	op        uint8
	_         [3]byte
	_         uint32
	_, _      uint64
	number    uint64
	arguments [6]uint64
}

// stepOf returns the step that a stopped thread is about to take; "" for another system call.
func stepOf(tid int) (step, error) {
	const ptraceGetSyscallInfo, atEntry = 0x420e, 1
	var e entry
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceGetSyscallInfo, uintptr(tid),
		unsafe.Sizeof(e), uintptr(unsafe.Pointer(&e)), 0, 0)
	if errno == unix.ESRCH {
		return "", nil
	}
	if errno != 0 {
		return "", fmt.Errorf("read a system call: %w", errno)
	}
	if e.op != atEntry {
		return "", nil
	}
	p := process(tid)
	a := e.arguments
	switch e.number {
	case unix.SYS_SENDTO:
		return p.request(a)
	case unix.SYS_OPENAT:
		if a[2]&(unix.O_CREAT|unix.O_TRUNC) != 0 {
			return p.path("open", a[1])
		}
	case unix.SYS_WRITE:
		if file := p.file(a[0]); strings.HasPrefix(file, "/proc/sys/") || strings.HasPrefix(file, "/run/") {
			return step("write " + file), nil
		}
	case unix.SYS_MKDIRAT:
		return p.path("mkdir", a[1])
	case unix.SYS_UNLINKAT:
		return p.path("remove", a[1])
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		return p.path("rename to", a[3])
	case unix.SYS_MOUNT:
		return p.path("mount", a[1])
	case unix.SYS_UMOUNT2:
		return p.path("unmount", a[0])
	case unix.SYS_FLOCK:
		return step("lock " + p.file(a[0])), nil
	case unix.SYS_IOCTL:
		return p.ethtool(a)
	case unix.SYS_SENDMSG, unix.SYS_WRITEV, unix.SYS_FTRUNCATE, unix.SYS_FCHMODAT,
		unix.SYS_LINKAT, unix.SYS_SYMLINKAT, unix.SYS_MKNODAT:
		return "", fmt.Errorf("system call %d is not known as a step: add what it changes", e.number)
	}
	return "", nil
}

// process is a stopped thread, by its ID.
type process int

func (p process) read(address uint64, size int) ([]byte, error) {
	b := make([]byte, size)
	n, err := unix.ProcessVMReadv(int(p), []unix.Iovec{{Base: &b[0], Len: uint64(size)}},
		[]unix.RemoteIovec{{Base: uintptr(address), Len: size}}, 0)
	if err != nil {
		return nil, fmt.Errorf("read a system call's argument: %w", err)
	}
	return b[:n], nil
}

func (p process) file(fd uint64) string {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", int(p), int32(fd)))
	if err != nil {
		return ""
	}
	return path
}

func (p process) path(verb string, address uint64) (step, error) {
	b, err := p.read(address, 1) // it may be the last byte of a mapping
	if err != nil {
		return "", err
	}
	if more, err := p.read(address, unix.PathMax); err == nil {
		b = more
	} else if more, err := p.read(address, int(4096-address%4096)); err == nil {
		b = more
	}
	name, _, _ := bytes.Cut(b, []byte{0})
	return step(verb + " " + filepath.Clean(string(name))), nil
}

// request returns the step of a message to rtnetlink that is not a get request.
func (p process) request(a [6]uint64) (step, error) {
	if a[4] == 0 || a[5] < unix.SizeofSockaddrNetlink || a[2] < unix.SizeofNlMsghdr {
		return "", nil
	}
	to, err := p.read(a[4], 2)
	if err != nil || binary.NativeEndian.Uint16(to) != unix.AF_NETLINK {
		return "", err
	}
	header, err := p.read(a[1], unix.SizeofNlMsghdr)
	if err != nil {
		return "", err
	}
	kind := binary.NativeEndian.Uint16(header[4:])
	const get = 2 // the kinds come in fours: new, delete, get, set (include/uapi/linux/rtnetlink.h)
	if kind < unix.RTM_BASE || (kind-unix.RTM_BASE)%4 == get {
		return "", nil
	}
	return step(fmt.Sprintf("rtnetlink %d of %d bytes", kind, a[2])), nil
}

// ethtool returns the step of a change of a link's features.
func (p process) ethtool(a [6]uint64) (step, error) {
	if a[1] != unix.SIOCETHTOOL {
		return "", nil
	}
	request, err := p.read(a[2], unix.IFNAMSIZ+8)
	if err != nil {
		return "", err
	}
	command, err := p.read(binary.NativeEndian.Uint64(request[unix.IFNAMSIZ:]), 4)
	if err != nil || binary.NativeEndian.Uint32(command) != unix.ETHTOOL_SFEATURES {
		return "", err
	}
	name, _, _ := bytes.Cut(request[:unix.IFNAMSIZ], []byte{0})
	return step("features of " + string(name)), nil
}
