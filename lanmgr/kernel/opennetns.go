package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

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

// putLocked is put with n.mu held. The last use closes the namespace.
func (n *Node) putLocked(o *OpenNetns) {
	if o.users--; o.users == 0 {
		o.close()
	}
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
