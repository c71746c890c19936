// Package process remembers processes across runs of a program, ends them, and
// moves the calling process into the namespaces of another.
package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Record names a process so that another one that got its number later is not
// taken for it.
type Record struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks from the machine's boot to the process's start
	Boot  string `json:"boot"`  // the machine's boot ID
}

// Identify returns the record of a running process.
func Identify(pid int) (Record, error) {
	boot, err := BootID()
	if err != nil {
		return Record{}, err
	}
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return Record{}, fmt.Errorf("read process %d: %w", pid, err)
	}
	state, start, err := parseStat(string(stat))
	if err != nil {
		return Record{}, fmt.Errorf("read process %d: %w", pid, err)
	}
	if state == "Z" || state == "X" {
		return Record{}, fmt.Errorf("process %d has ended: %w", pid, fs.ErrNotExist)
	}
	return Record{PID: pid, Start: start, Boot: boot}, nil
}

// parseStat returns state and start time from /proc/PID/stat (fields 3 and 22
// of proc_pid_stat(5)); the second field, a name in parentheses, may hold
// spaces and parentheses itself.
func parseStat(stat string) (state string, start uint64, err error) {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return "", 0, fmt.Errorf("unexpected content %q", stat)
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return fields[0], start, err
}

// BootID is a value that changes with each boot of the machine.
func BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the machine's boot ID: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}

// Load reads a record that Save wrote; fs.ErrNotExist if there is none.
func Load(path string) (Record, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return Record{}, fmt.Errorf("read process record: %w", err)
	}
	var r Record
	if err := json.Unmarshal(content, &r); err != nil {
		return Record{}, fmt.Errorf("read process record %s: %w", path, err)
	}
	return r, nil
}

// Save writes the record to a file.
func (r Record) Save(path string) error {
	content, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write process record %s: %w", path, err)
	}
	if err := os.WriteFile(path, append(content, '\n'), 0o644); err != nil {
		return fmt.Errorf("write process record: %w", err)
	}
	return nil
}

// Alive says whether the process still runs; one that ended and was not
// waited for by its parent does not.
func (r Record) Alive() (bool, error) {
	now, err := Identify(r.PID)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	return now == r, err
}

// Stop sends the process a signal and waits until it has ended, or the context
// has. It is no error if the process has ended before.
func (r Record) Stop(ctx context.Context, signal unix.Signal) error {
	return r.opened(func(fd int) error {
		if err := unix.PidfdSendSignal(fd, signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("send %v to process %d: %w", signal, r.PID, err)
		}
		return r.waitFor(ctx, fd)
	})
}

// Wait returns when the process has ended, or the context has.
func (r Record) Wait(ctx context.Context) error {
	return r.opened(func(fd int) error { return r.waitFor(ctx, fd) })
}

// opened calls f with a descriptor of the process, unless it has ended.
func (r Record) opened(f func(fd int) error) error {
	fd, err := unix.PidfdOpen(r.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", r.PID, err)
	}
	defer unix.Close(fd)
	// Only now is the number known to stay with the process that the descriptor refers to.
	if alive, err := r.Alive(); err != nil || !alive {
		return err
	}
	return f(fd)
}

func (r Record) waitFor(ctx context.Context, fd int) error {
	for {
		// Bounded, so that an ended context is noticed.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 200)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", r.PID, err)
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("wait for process %d to end: %w", r.PID, err)
		}
	}
}

// Name is what the process was called by: the last part of its first argument,
// or the kernel's name for it (at most 15 bytes) if that is not readable.
func Name(pid int) (string, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	args, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return "", err
	}
	if first, _, _ := strings.Cut(string(args), "\x00"); first != "" {
		return filepath.Base(first), nil
	}
	comm, err := os.ReadFile(filepath.Join(dir, "comm"))
	return strings.TrimSpace(string(comm)), err
}

// Enter moves the calling goroutine into all namespaces of the process but its
// user namespace, and locks it to its thread for ever: what it starts from
// then on runs there. It is meant for a program that does nothing else.
func (r Record) Enter() error {
	runtime.LockOSThread()
	fd, err := unix.PidfdOpen(r.PID, 0)
	if err != nil {
		return fmt.Errorf("open process %d: %w", r.PID, err)
	}
	defer unix.Close(fd)
	if alive, err := r.Alive(); err != nil || !alive {
		return errors.Join(fmt.Errorf("process %d does not run any more", r.PID), err)
	}
	// A thread that shares its root directory with others may not change its mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare the root directory: %w", err)
	}
	all := unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET |
		unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP
	if err := unix.Setns(fd, all); err != nil {
		return fmt.Errorf("enter the namespaces of process %d: %w", r.PID, err)
	}
	return nil
}

// EnterNetns moves the calling goroutine into the network namespace at path
// and locks it to its thread for ever.
func EnterNetns(path string) error {
	runtime.LockOSThread()
	return setNetns(path)
}

// InNetns calls f in the network namespace at path and comes back.
func InNetns(path string, f func() error) error {
	done := make(chan error)
	// A goroutine of its own: if the way back fails, its locked thread ends with it.
	go func() {
		done <- func() error {
			if err := EnterNetns(path); err != nil {
				return err
			}
			return f()
		}()
	}()
	return <-done
}

func setNetns(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return nil
}
