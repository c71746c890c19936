// Package kernel reads and changes a node's kernel for LANs: it observes segments, applies operations and claims
// spokes.
package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// DefaultRun is where k8slan keeps what lives as long as the node is up.
const DefaultRun = "/run/k8slan"

// Paths are a node's folders and network namespace.
type Paths struct {
	Run       string // network namespaces, records and locks; empty: DefaultRun
	HostNetns string // the node's own network namespace; empty: that of the calling thread
}

// Node is the kernel of one node. Many goroutines may call its methods, and several processes may have a Node each: a
// file lock per segment keeps changes of one segment apart.
type Node struct {
	paths Paths

	mu     sync.Mutex
	open   map[string]*OpenNetns // by the netns's name
	byID   map[int]string        // the names in open, by the ID that the host's netns has for the namespace
	opened chan struct{}         // closed, and replaced by another, whenever open has one more
}

// New returns the node's kernel.
func New(p Paths) *Node {
	if p.Run == "" {
		p.Run = DefaultRun
	}
	return &Node{paths: p, open: map[string]*OpenNetns{}, byID: map[int]string{}, opened: make(chan struct{})}
}

// Close closes the namespaces that are open. They stay on the node.
func (n *Node) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name, o := range n.open {
		n.forgetLocked(name, o)
	}
}

func (n *Node) netnsPath(name string) string { return filepath.Join(n.paths.Run, "netns", name) }

// checkName fails unless the name is the plain name of a file.
func checkName(netnsName string) error {
	isDir := netnsName == "" || netnsName == "." || netnsName == ".."
	if isDir || strings.ContainsAny(netnsName, "/\x00") || len(netnsName) > 250 {
		return fmt.Errorf("ns %q is not the name of a network namespace: it must be the plain name of a file",
			netnsName)
	}
	return nil
}

// ErrNoLAN says that a LAN is not on this node.
var ErrNoLAN = errors.New("the LAN is not on this node")

// List names the segments that are on this node, whole or in part, sorted.
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

// removeFile removes a file. It is no error if there is none.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
