// Package kernel reads and changes a node's kernel for LANs: everything that is netlink, a network namespace or a sysctl.
package kernel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// DefaultRun is where k8slan keeps what lives as long as the node is up.
const DefaultRun = "/run/k8slan"

// Paths says where a node keeps its things.
type Paths struct {
	Run       string // network namespaces, records and locks; empty: DefaultRun
	HostNetns string // the node's own network namespace; empty: that of the calling thread
}

// Node is the kernel of one node. Its methods may be called from many goroutines, and several processes may have
// a Node each: what must not happen at once is kept apart by a file lock per segment.
type Node struct {
	paths Paths

	mu       sync.Mutex
	held     map[string]*held // by the netns's name
	numbered map[int]string   // the names in held, by the namespace's number
	taken    chan struct{}    // closed, and made anew, whenever there is one more in held
}

// New returns the node's kernel.
func New(p Paths) *Node {
	if p.Run == "" {
		p.Run = DefaultRun
	}
	return &Node{paths: p, held: map[string]*held{}, numbered: map[int]string{}, taken: make(chan struct{})}
}

// Close lets go of the namespaces in hand; they stay.
func (n *Node) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name, h := range n.held {
		n.drop(name, h)
	}
}

func (n *Node) netnsPath(name string) string  { return filepath.Join(n.paths.Run, "netns", name) }
func (n *Node) recordPath(name string) string { return filepath.Join(n.paths.Run, "lan", name+".json") }
func (n *Node) lockPath(name string) string   { return filepath.Join(n.paths.Run, "lock", name) }

// host opens the node's own network namespace.
func (n *Node) host() (netns.NsHandle, error) {
	if n.paths.HostNetns != "" {
		return openNetns(n.paths.HostNetns)
	}
	return netns.Get()
}

// checkName refuses what is not the plain name of a file.
func checkName(netnsName string) error {
	if netnsName == "" || netnsName == "." || netnsName == ".." || strings.ContainsAny(netnsName, "/\x00") || len(netnsName) > 250 {
		return fmt.Errorf("ns %q is not the name of a network namespace: it must be the plain name of a file", netnsName)
	}
	return nil
}

// ErrNoLAN says that a LAN is not on this node.
var ErrNoLAN = errors.New("the LAN is not on this node")

// Record reads what the node last wanted of a segment. ErrNoLAN where there is none.
func (n *Node) Record(netnsName string) (segment.Segment, error) {
	if err := checkName(netnsName); err != nil {
		return segment.Segment{}, err
	}
	b, err := os.ReadFile(n.recordPath(netnsName))
	if errors.Is(err, fs.ErrNotExist) {
		return segment.Segment{}, fmt.Errorf("%w (no %s)", ErrNoLAN, n.recordPath(netnsName))
	}
	if err != nil {
		return segment.Segment{}, fmt.Errorf("read the record of a LAN: %w", err)
	}
	var s segment.Segment
	if err := json.Unmarshal(b, &s); err != nil {
		return segment.Segment{}, fmt.Errorf("record %s is damaged, the daemon will write it anew: %w", n.recordPath(netnsName), err)
	}
	return s, nil
}

// Records are those of all segments on the node. One that is damaged is passed over: the daemon writes it anew.
func (n *Node) Records() ([]segment.Segment, error) {
	entries, err := os.ReadDir(filepath.Join(n.paths.Run, "lan"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the records of LANs: %w", err)
	}
	var records []segment.Segment
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || strings.HasPrefix(name, ".") {
			continue // half written
		}
		r, err := n.Record(name)
		switch {
		case err == nil:
			records = append(records, r)
		case !errors.Is(err, ErrNoLAN) && !isDamaged(err):
			return nil, err
		}
	}
	return records, nil
}

// writeRecord publishes a segment; whoever reads sees the old one or the new one, whole.
func (n *Node) writeRecord(s segment.Segment) error {
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode the record of %s: %w", s.LAN, err)
	}
	path := n.recordPath(s.Netns)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("write the record of %s: %w", s.LAN, err)
	}
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path))
	err = os.WriteFile(tmp, b, 0o600)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil { // a full file system takes the file's name, but not its content
		return errors.Join(fmt.Errorf("write the record of %s: %w", s.LAN, err), removeFile(tmp))
	}
	return nil
}

// List names the segments that are on this node in whole or in part, sorted.
func (n *Node) List() ([]string, error) {
	var names []string
	entries, err := os.ReadDir(filepath.Join(n.paths.Run, "netns"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the network namespaces of LANs: %w", err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

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
