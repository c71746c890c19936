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

// lock takes the lock of a segment and returns what gives it back; it waits no longer than ctx. The file goes with the
// segment, so a lock that was taken on a file which has gone meanwhile is taken again.
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
		var mine, now unix.Stat_t
		if unix.Fstat(int(f.Fd()), &mine) == nil && unix.Stat(path, &now) == nil && mine.Ino == now.Ino {
			return func() { f.Close() }, nil
		}
		f.Close()
	}
}

// flock locks a file, or closes it. A wait for somebody's lock cannot be broken off: where ctx ends first, it goes on with
// nobody behind it, and what it gets is given back.
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
			<-locked // taken or not, closing gives it back
			f.Close()
		}()
		return ctx.Err()
	}
}
