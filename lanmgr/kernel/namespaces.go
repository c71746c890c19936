package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// dialHost connects to the node's own network namespace.
func (n *Node) dialHost() (*conn, error) {
	ns, err := n.host()
	if err != nil {
		return nil, fmt.Errorf("open the node's own network namespace: %w", err)
	}
	return dial(ns)
}

// forgetReplaced forgets an open namespace if its name stands for another one: another process has removed the segment
// and created it again.
func (n *Node) forgetReplaced(name string) error {
	o := n.acquire(name)
	if o == nil {
		return nil
	}
	defer n.put(o)
	if named, err := o.inode.IsAt(n.netnsPath(name)); named || err != nil {
		return err
	}
	ns, err := netns.Open(n.netnsPath(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // only the name is gone
	}
	if err != nil {
		return err
	}
	n.forget(name)
	return ns.Close()
}

// acquireOrOpen returns a segment's namespace where find finds one, and keeps it open; else nil. The caller has to put
// it.
func (n *Node) acquireOrOpen(s *segment.State) (*OpenNetns, error) {
	o, ns, err := n.find(s)
	if err != nil || o != nil || !s.Exists {
		return o, err
	}
	if o, err = n.keep(s.Netns, ns); err != nil {
		return nil, fmt.Errorf("observe %s: %w", s.Netns, err)
	}
	return o, nil
}

// dialSegment connects to a segment's namespace where find finds one; else it returns nil. It keeps no namespace open.
func (n *Node) dialSegment(s *segment.State) (*conn, error) {
	o, ns, err := n.find(s)
	if err != nil {
		return nil, err
	}
	if o != nil {
		defer n.put(o)
		if ns, err = netns.Dup(o.conn.ns); err != nil {
			return nil, err
		}
	} else if !s.Exists {
		return nil, nil
	}
	return dial(ns)
}

// find finds a segment's namespace: the one that is open already, or else the one that has the segment's name, which it
// opens. It sets in the state which of the two there is.
func (n *Node) find(s *segment.State) (o *OpenNetns, ns netns.Handle, err error) {
	if o = n.acquire(s.Netns); o != nil {
		if s.Exists, err = o.inode.IsAt(n.netnsPath(s.Netns)); err != nil {
			n.put(o)
			return nil, ns, fmt.Errorf("observe %s: %w", s.Netns, err)
		}
		s.LostName = !s.Exists
		return o, ns, nil
	}
	ns, err = netns.Open(n.netnsPath(s.Netns))
	if s.Exists = err == nil; s.Exists {
		return nil, ns, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, ns, fmt.Errorf("observe %s: %w", s.Netns, err)
	}
	info, err := os.Lstat(n.netnsPath(s.Netns))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, ns, fmt.Errorf("observe %s: %w", s.Netns, err)
	}
	s.StaleName = err == nil && info.Mode().IsRegular()
	return nil, ns, nil
}

// createNetns makes a segment's namespace. It is silent before it has its name, so that no process can find it
// otherwise.
func (n *Node) createNetns(name string) error {
	path := n.netnsPath(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make the folder of network namespaces: %w", err)
	}
	return netns.Create(path, silence)
}

// restoreNetns gives the open namespace its name back, in place of whatever has it.
func (n *Node) restoreNetns(name string) error {
	o := n.acquire(name)
	if o == nil {
		return fmt.Errorf("network namespace %s is not open", name)
	}
	defer n.put(o)
	path := n.netnsPath(name)
	if err := netns.Unmount(path); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make the folder of network namespaces: %w", err)
	}
	return netns.Mount(o.conn.ns, path)
}

// removeNetns removes a segment's name and lock.
func (n *Node) removeNetns(name string) error {
	n.forget(name)
	if err := netns.Unmount(n.netnsPath(name)); err != nil {
		return err
	}
	return removeFile(n.lockPath(name))
}

// InLANNetns runs f on a thread that is in a segment's network namespace. Sockets that f opens stay there. It fails
// with ErrNoLAN where there is no such namespace.
func (n *Node) InLANNetns(netnsName string, f func() error) error {
	if err := checkName(netnsName); err != nil {
		return err
	}
	ns, err := netns.Open(n.netnsPath(netnsName))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w (no %s)", ErrNoLAN, n.netnsPath(netnsName))
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	return netns.Do(ns, f)
}

// InHostNetns runs f on a thread that is in the node's own network namespace.
func (n *Node) InHostNetns(f func() error) error {
	ns, err := n.host()
	if err != nil {
		return err
	}
	defer ns.Close()
	return netns.Do(ns, f)
}

// host opens the node's own network namespace.
func (n *Node) host() (netns.Handle, error) {
	if n.paths.HostNetns != "" {
		return netns.Open(n.paths.HostNetns)
	}
	return netns.Current()
}
