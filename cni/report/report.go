// Package report sends the outcome of each CNI call from the plugin, whose process ends with the call, to the daemon.
package report

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Verb is the CNI operation that the plugin was called for.
type Verb string

// The verbs whose outcomes are reported.
const (
	Add Verb = "ADD"
	Del Verb = "DEL"
)

// Reason is the cause of a failure, in one word.
type Reason string

// The reasons.
const (
	Configuration Reason = "configuration" // the network's configuration or the runtime's environment cannot be right
	Netns         Reason = "netns"         // the pod's network namespace cannot be used
	Unavailable   Reason = "unavailable"   // the LAN is not on the node, or the node is busy with it
	NoDevice      Reason = "no_device"     // kubelet allocated no spoke to the pod
	WrongDevice   Reason = "wrong_device"  // kubelet allocated another spoke
	Forbidden     Reason = "forbidden"     // the LAN does not allow the pod's namespace
	NoSpoke       Reason = "no_spoke"      // the LAN has no such spoke on the node
	NameTaken     Reason = "name_taken"    // the pod has an interface of that name
	SameSandbox   Reason = "same_sandbox"  // the pod has the spoke already
	Kernel        Reason = "kernel"        // the kernel or the file system refused a step
	IPAM          Reason = "ipam"          // the IPAM plugin failed
	CDI           Reason = "cdi"           // the CDI file could not be written or removed
	Other         Reason = "other"
)

// Reasons are all of them.
var Reasons = []Reason{
	Configuration, Netns, Unavailable, NoDevice, WrongDevice, Forbidden, NoSpoke, NameTaken, SameSandbox,
	Kernel, IPAM, CDI, Other,
}

// Outcome is how one call of the plugin ended.
type Outcome struct {
	Verb     Verb          `json:"verb"`
	Kind     segment.Kind  `json:"kind,omitempty"`     // empty where the configuration does not have it
	Reason   Reason        `json:"reason,omitempty"`   // empty for success
	TookOver bool          `json:"tookOver,omitempty"` // another sandbox had the spoke until then
	Took     time.Duration `json:"took"`               // from the call to the answer
}

// Socket returns the path of the daemon's socket, in the folder of what lives as long as the node is up.
func Socket(run string) string { return filepath.Join(run, "outcomes.sock") }

// sendTimeout is how long Send waits for a daemon that has not read earlier outcomes. The kernel keeps ten datagrams
// (net.unix.max_dgram_qlen), 512 where systemd runs.
const sendTimeout = 20 * time.Millisecond

// Send sends an outcome to the daemon whose folder is run. Without a daemon, or with one that does not read, the
// outcome is lost and Send fails.
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
	timeout := unix.NsecToTimeval(sendTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout); err != nil {
		return fmt.Errorf("limit the wait for the daemon: %w", err)
	}
	if err := unix.Sendto(fd, message, unix.MSG_NOSIGNAL, &unix.SockaddrUnix{Name: Socket(run)}); err != nil {
		return fmt.Errorf("report to the daemon at %s: %w", Socket(run), err)
	}
	return nil
}
