package watch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/retry"
)

// openRecords watches the folder of records, so that a change that another program makes to one is undone.
func openRecords(dir string, poke func(netnsName string)) (runFunc, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	if err := w.Add(dir); err != nil {
		w.Close()
		return nil, err
	}
	return func(ctx context.Context) error {
		defer w.Close()
		for {
			select {
			case <-ctx.Done():
				return nil
			case event := <-w.Events:
				name, ok := strings.CutSuffix(filepath.Base(event.Name), ".json")
				if ok && !strings.HasPrefix(name, ".") && !event.Has(fsnotify.Chmod) {
					poke(name)
				}
			case err := <-w.Errors:
				return err
			}
		}
	}, nil
}

// mountsPause is how long the mount table is not read again after a change. Reading takes time in proportion to the
// LANs, and each LAN that comes or goes is a change.
const mountsPause = 50 * time.Millisecond

// openMounts watches the mount table, which signals a change by POLLPRI (mounts_poll in fs/proc_namespace.c). It pokes
// the segments whose name no longer stands for their namespace, and those that another process has created.
func (n Node) openMounts(poke func(netnsName string)) (runFunc, error) {
	// Not an os.File: the Go runtime would poll it too and take some of the signals, each of which the kernel gives
	// once.
	mounts, err := unix.Open("/proc/thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the mount table: %w", err)
	}
	ended, end, err := os.Pipe() // wakes the poll when the context ends
	if err != nil {
		return nil, errors.Join(err, unix.Close(mounts))
	}
	return func(ctx context.Context) error {
		defer unix.Close(mounts)
		defer ended.Close()
		defer context.AfterFunc(ctx, func() { end.Close() })()
		fds := []unix.PollFd{{Fd: int32(mounts), Events: unix.POLLPRI}, {Fd: int32(ended.Fd()), Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			if ctx.Err() != nil {
				return nil
			}
			if err := n.pokeMounts(poke); err != nil {
				return err
			}
			if !retry.Pause(ctx, mountsPause) {
				return nil
			}
		}
	}, nil
}

func (n Node) pokeMounts(poke func(netnsName string)) error {
	for _, name := range n.OpenSegments() {
		if lost, err := n.LostName(name); lost || err != nil {
			poke(name)
		}
	}
	names, err := n.List()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !n.IsOpen(name) {
			poke(name)
		}
	}
	return nil
}
