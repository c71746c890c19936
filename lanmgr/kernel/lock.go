package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

func (n *Node) lockPath(name string) string { return filepath.Join(n.paths.Run, "lock", name) }

// lock acquires the lock of a segment and returns what releases it. It waits until ctx ends at the longest. The file is
// removed with the segment, so that a lock on a file which was removed meanwhile does not count.
func (n *Node) lock(ctx context.Context, netnsName string) (unlock func(), err error) {
	path := n.lockPath(netnsName)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("lock segment %s: %w", netnsName, err)
	}
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock segment %s: %w", netnsName, err)
		}
		if err := flock(ctx, f); err != nil {
			return nil, fmt.Errorf("lock segment %s: %w", netnsName, err)
		}
		var locked, now unix.Stat_t
		if unix.Fstat(int(f.Fd()), &locked) == nil && unix.Stat(path, &now) == nil && locked.Ino == now.Ino {
			return func() { f.Close() }, nil
		}
		f.Close()
	}
}

// flock locks a file, or closes it. The system call cannot be interrupted: where ctx ends first, a goroutine goes on to
// wait and then releases the lock.
func flock(ctx context.Context, f *os.File) error {
	locked := make(chan error, 1)
	go func() {
		for {
			err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
			if !errors.Is(err, unix.EINTR) {
				locked <- err
				return
			}
		}
	}()
	select {
	case err := <-locked:
		if err != nil {
			f.Close()
		}
		return err
	case <-ctx.Done():
		go func() {
			<-locked // closing the file releases the lock
			f.Close()
		}()
		return ctx.Err()
	}
}
