// Package receiver is the daemon's end of package report.
package receiver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/fsnotify/fsnotify"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/lanmgr/retry"
)

// pause is how long Run waits after a failure. It is long, because another daemon may have replaced the socket.
var pause = wait.Backoff{Duration: 10 * time.Second}

var errReplaced = errors.New("another process has replaced the CNI plugin's socket")

// Run calls handle with each outcome that plugins send to the daemon whose folder is run, one after the other, until
// the context ends. It makes the socket again when another process has removed it, and tries again after a pause where
// that fails. Outcomes that are sent meanwhile are lost.
func Run(ctx context.Context, run string, log *slog.Logger, handle func(report.Outcome)) {
	const failed = "attachments are not counted for now; trying again"
	retry.Loop(ctx, pause, log, failed, func(ctx context.Context, _ func()) error {
		return receive(ctx, run, handle)
	})
}

// receive is Run until the socket is gone.
func receive(ctx context.Context, run string, handle func(report.Outcome)) error {
	watch, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", run, err)
	}
	defer watch.Close()
	if err := os.MkdirAll(run, 0o755); err != nil {
		return fmt.Errorf("make the folder of the CNI plugin's socket: %w", err)
	}
	if err := watch.Add(run); err != nil {
		return fmt.Errorf("watch %s: %w", run, err)
	}
	path := report.Socket(run)
	conn, made, err := listen(path)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- read(conn, handle) }()
	defer func() {
		conn.Close()
		<-done
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-watch.Events:
		case err := <-watch.Errors:
			if !errors.Is(err, fsnotify.ErrEventOverflow) { // the socket's event may be among the lost ones
				return fmt.Errorf("watch %s: %w", run, err)
			}
		}
		now, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err == nil && !os.SameFile(made, now):
			return errReplaced
		case err != nil:
			return fmt.Errorf("look for the CNI plugin's socket: %w", err)
		}
	}
}

// listen makes the socket, for root only, in place of an earlier one.
func listen(path string) (*net.UnixConn, os.FileInfo, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("remove the socket of an earlier run: %w", err)
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, nil, fmt.Errorf("listen for the CNI plugin: %w", err)
	}
	err = os.Chmod(path, 0o600)
	var made os.FileInfo
	if err == nil {
		made, err = os.Lstat(path)
	}
	if err != nil {
		err = fmt.Errorf("the CNI plugin's socket was removed while it was made: %w", err)
		return nil, nil, errors.Join(err, conn.Close())
	}
	return conn, made, nil
}

// read reads until the connection is closed. It ignores messages that are no outcome.
func read(conn *net.UnixConn, handle func(report.Outcome)) error {
	message := make([]byte, 1024)
	for {
		n, err := conn.Read(message)
		if err != nil {
			return err
		}
		var o report.Outcome
		if json.Unmarshal(message[:n], &o) == nil && (o.Verb == report.Add || o.Verb == report.Del) {
			handle(o)
		}
	}
}
