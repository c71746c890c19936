package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// OpenNetns is a segment's network namespace that this process keeps open. With it, the namespace can get a lost name
// back, and the segment is observed without a thread that enters the namespace.
type OpenNetns struct {
	conn     *conn
	inode    netns.Inode
	settings *settingFiles
	id       int // by which the host's netns knows the namespace; link events carry it
	vxlan    int // ifindex of its VXLAN when it was last observed, 0 for none; Node.mu guards it
	users    int // Node.open, and each that has to put it; Node.mu guards it

	life context.Context // ends when the namespace is forgotten
	end  context.CancelFunc
}

// Do runs f on a thread that is in the namespace.
func (o *OpenNetns) Do(f func() error) error { return netns.Do(o.conn.ns, f) }

// Link looks up a link by its index.
func (o *OpenNetns) Link(index int) (l netlink.Link, ok bool, err error) {
	l, err = o.conn.LinkByIndex(index)
	if isNotFound(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look up link %d: %w", index, err)
	}
	return l, true, nil
}

// acquire returns the segment's namespace if it is open, else nil. The caller has to put it.
func (n *Node) acquire(name string) *OpenNetns {
	n.mu.Lock()
	defer n.mu.Unlock()
	o := n.open[name]
	if o != nil {
		o.users++
	}
	return o
}

// awaitOpen returns the segment's namespace as soon as it is open, or nil if the context ends before. The caller has to
// put it.
func (n *Node) awaitOpen(ctx context.Context, name string) *OpenNetns {
	for {
		n.mu.Lock()
		opened := n.opened
		n.mu.Unlock()
		if o := n.acquire(name); o != nil {
			return o
		}
		select {
		case <-ctx.Done():
			return nil
		case <-opened:
		}
	}
}

// WhileOpen waits until the segment's namespace is open and calls f with it. The context of f ends when that namespace
// is forgotten. It returns nil without a call if ctx ends before.
func (n *Node) WhileOpen(ctx context.Context, name string, f func(context.Context, *OpenNetns) error) error {
	o := n.awaitOpen(ctx, name)
	if o == nil {
		return nil
	}
	defer n.put(o)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(o.life, cancel)()
	return f(ctx, o)
}

// keep adds an open namespace to those that the process keeps open. It owns the handle from then on, also when it
// fails. The caller has to put the result.
func (n *Node) keep(name string, ns netns.Handle) (*OpenNetns, error) {
	o := &OpenNetns{conn: &conn{ns: ns}, users: 2}
	o.life, o.end = context.WithCancel(context.Background())
	if err := n.prepare(o); err != nil {
		o.close()
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if old := n.open[name]; old != nil { // another goroutine was faster
		n.forgetLocked(name, old)
	}
	n.open[name], n.byID[o.id] = o, name
	close(n.opened)
	n.opened = make(chan struct{})
	return o, nil
}

// prepare reads what never changes of a namespace, and opens what it is observed with.
func (n *Node) prepare(o *OpenNetns) (err error) {
	if o.inode, err = netns.InodeOf(o.conn.ns); err != nil {
		return err
	}
	if o.id, err = n.idOf(o.conn.ns); err != nil {
		return err
	}
	return o.Do(func() (err error) {
		if o.conn.Handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("open a netlink socket: %w", err)
		}
		if err := o.conn.dialRTNL(); err != nil {
			return err
		}
		o.settings, err = openSettings()
		return err
	})
}

func (o *OpenNetns) close() {
	if o.settings != nil {
		o.settings.close()
	}
	o.conn.close()
}

// put ends one use of a namespace.
func (n *Node) put(o *OpenNetns) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.putLocked(o)
}

// forget keeps a segment's namespace open no longer than others use it.
func (n *Node) forget(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if o := n.open[name]; o != nil {
		n.forgetLocked(name, o)
	}
}

// forgetLocked is forget with n.mu held.
func (n *Node) forgetLocked(name string, o *OpenNetns) {
	delete(n.open, name)
	if n.byID[o.id] == name {
		delete(n.byID, o.id)
	}
	o.end()
	n.putLocked(o)
}

// putLocked is put with n.mu held. The last use closes the namespace.
func (n *Node) putLocked(o *OpenNetns) {
	if o.users--; o.users == 0 {
		o.close()
	}
}

// idOf returns the ID by which the host's netns knows a namespace, and assigns one if there is none.
func (n *Node) idOf(ns netns.Handle) (int, error) {
	c, err := n.dialHost()
	if err != nil {
		return 0, err
	}
	defer c.close()
	id, err := c.GetNetNsIdByFd(int(ns))
	if err != nil {
		return 0, fmt.Errorf("look up the ID of a network namespace: %w", err)
	}
	if id >= 0 {
		return id, nil
	}
	if err := c.SetNetNsIdByFd(int(ns), -1); err != nil && !errors.Is(err, fs.ErrExist) {
		return 0, fmt.Errorf("assign an ID to a network namespace: %w", err)
	}
	if id, err = c.GetNetNsIdByFd(int(ns)); err != nil {
		return 0, fmt.Errorf("look up the ID of a network namespace: %w", err)
	}
	return id, nil
}

// dialHost connects to the node's own network namespace.
func (n *Node) dialHost() (*conn, error) {
	ns, err := n.host()
	if err != nil {
		return nil, fmt.Errorf("open the node's own network namespace: %w", err)
	}
	return dial(ns)
}

// SegmentByNetnsID returns the segment whose open namespace has that ID in the host's netns.
func (n *Node) SegmentByNetnsID(netnsID int) (name string, ok bool) {
	if netnsID < 0 {
		return "", false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	name, ok = n.byID[netnsID]
	return name, ok
}

// OpenSegments names the segments whose namespace is open.
func (n *Node) OpenSegments() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	names := make([]string, 0, len(n.open))
	for name := range n.open {
		names = append(names, name)
	}
	return names
}

// IsOpen reports whether a segment's namespace is open.
func (n *Node) IsOpen(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.open[name] != nil
}

// IsVXLAN reports whether a link was a segment's VXLAN when that was last observed. Until learning is off on that port,
// the bridge also reports MACs behind it.
func (n *Node) IsVXLAN(name string, index int) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	o := n.open[name]
	return o != nil && o.vxlan == index
}

// noteVXLAN notes which of a segment's links is its VXLAN.
func (n *Node) noteVXLAN(o *OpenNetns, links []segment.Link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	o.vxlan = 0
	for _, l := range links {
		if l.Type == "vxlan" {
			o.vxlan = l.Index
		}
	}
}

// LostName reports whether a segment's name no longer stands for the namespace that is open.
func (n *Node) LostName(name string) (bool, error) {
	o := n.acquire(name)
	if o == nil {
		return false, nil
	}
	defer n.put(o)
	named, err := o.inode.IsAt(n.netnsPath(name))
	return !named, err
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
