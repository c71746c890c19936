// Package outcome carries word of what became of an attachment from the CNI plugin, whose process ends with it, to the daemon,
// which counts.
package report

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Verb is what the plugin was called for.
type Verb string

// The verbs that are told of.
const (
	Add Verb = "ADD"
	Del Verb = "DEL"
)

// Reason is why it failed, in a word.
type Reason string

// The reasons.
const (
	Configuration Reason = "configuration" // the network's configuration or the runtime's environment cannot be right
	Netns         Reason = "netns"         // the pod's network namespace cannot be used
	Unavailable   Reason = "unavailable"   // the LAN is not on the node, or the node is busy with it
	NoDevice      Reason = "no_device"     // kubelet allocated no spoke to the pod
	WrongDevice   Reason = "wrong_device"  // kubelet allocated another spoke
	Forbidden     Reason = "forbidden"     // the LAN is not open to the pod's namespace
	NoSpoke       Reason = "no_spoke"      // the LAN has no such spoke on the node
	NameTaken     Reason = "name_taken"    // the pod has an interface of that name
	SameSandbox   Reason = "same_sandbox"  // the pod has the spoke already
	Kernel        Reason = "kernel"        // the kernel or the file system refused a step
	IPAM          Reason = "ipam"          // the IPAM plugin failed
	CDI           Reason = "cdi"           // the CDI file could not be written or removed
	Other         Reason = "other"
)

// Reasons are all of them.
var Reasons = []Reason{Configuration, Netns, Unavailable, NoDevice, WrongDevice, Forbidden, NoSpoke, NameTaken, SameSandbox, Kernel, IPAM, CDI, Other}

// Outcome is what became of one call of the plugin.
type Outcome struct {
	Verb     Verb          `json:"verb"`
	Kind     segment.Kind  `json:"kind,omitempty"`     // empty where the configuration does not say
	Reason   Reason        `json:"reason,omitempty"`   // empty: it went well
	TookOver bool          `json:"tookOver,omitempty"` // the spoke was another sandbox's until then
	Took     time.Duration `json:"took"`               // from the call to the answer
}

// path is that of the daemon's socket, for the folder of what lives as long as the node is up.
func path(run string) string { return filepath.Join(run, "outcomes.sock") }

// patience is how long Send waits for a daemon that has not read what others sent. The kernel keeps ten datagrams
// (net.unix.max_dgram_qlen), 512 where systemd runs.
const patience = 20 * time.Millisecond

// Send tells the daemon whose folder is run. Without a daemon, or with one that does not read, it is lost; the error says so.
func Send(run string, o Outcome) error {
	message, err := json.Marshal(o)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket to the daemon: %w", err)
	}
	defer unix.Close(fd)
	wait := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait); err != nil {
		return fmt.Errorf("limit the wait for the daemon: %w", err)
	}
	if err := unix.Sendto(fd, message, unix.MSG_NOSIGNAL, &unix.SockaddrUnix{Name: path(run)}); err != nil {
		return fmt.Errorf("tell the daemon at %s: %w", path(run), err)
	}
	return nil
}

// again is how long Listen rests after it could not listen.
const again = 10 * time.Second

// errReplaced says that somebody else listens: another daemon, whose turn it is for a while.
var errReplaced = errors.New("somebody else has taken the CNI plugin's socket")

// Listen calls told for each outcome that is sent, one after the other, until the context ends. It makes the socket anew when
// somebody has removed it, and tries again after a rest where that fails; what is sent meanwhile is lost.
func Listen(ctx context.Context, run string, log *slog.Logger, told func(Outcome)) {
	for failed := ""; ctx.Err() == nil; {
		err := listen(ctx, run, told)
		if err == nil {
			failed = ""
			continue
		}
		if err.Error() != failed {
			failed = err.Error()
			log.Warn("attachments are not counted for now; trying again", "err", err)
		}
		rest := time.NewTimer(again)
		select {
		case <-ctx.Done():
		case <-rest.C:
		}
		rest.Stop()
	}
}

// listen is Listen until the socket is gone.
func listen(ctx context.Context, run string, told func(Outcome)) error {
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
	conn, made, err := bind(path(run))
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- read(conn, told) }()
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
			if !errors.Is(err, fsnotify.ErrEventOverflow) { // which may have had that of the socket
				return fmt.Errorf("watch %s: %w", run, err)
			}
		}
		now, err := os.Lstat(path(run))
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

// bind makes the socket, for root only, in place of an earlier one.
func bind(path string) (*net.UnixConn, os.FileInfo, error) {
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
		return nil, nil, errors.Join(fmt.Errorf("the CNI plugin's socket vanished while it was made: %w", err), conn.Close())
	}
	return conn, made, nil
}

// read reads until the connection is closed. What is no outcome is passed over.
func read(conn *net.UnixConn, told func(Outcome)) error {
	message := make([]byte, 1024)
	for {
		n, err := conn.Read(message)
		if err != nil {
			return err
		}
		var o Outcome
		if json.Unmarshal(message[:n], &o) == nil && (o.Verb == Add || o.Verb == Del) {
			told(o)
		}
	}
}
