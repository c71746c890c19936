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

// held is a segment's namespace as the daemon has it in hand. With it, a name that somebody took away can be given back, and
// a look needs no thread to enter the namespace.
type held struct {
	conn     *conn
	inode    netns.Inode
	settings *settingFiles
	id       int // of the namespace, as the host's netns counts: what link events bear
	vxlan    int // ifindex of its VXLAN at the last look, 0 if there was none; Node.mu guards it
	users    int // those who have it from inHand or hold, and Node.held; Node.mu guards it

	inHand context.Context // until it is let go
	end    context.CancelFunc
}

// inHand is the segment's namespace that is in hand, nil if none is; the caller gives it back.
func (n *Node) inHand(name string) *held {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.held[name]
	if h != nil {
		h.users++
	}
	return h
}

// await is the segment's namespace as soon as it is in hand, nil when the context ends before; the caller gives it back.
func (n *Node) await(ctx context.Context, name string) *held {
	for {
		n.mu.Lock()
		taken := n.taken
		n.mu.Unlock()
		if h := n.inHand(name); h != nil {
			return h
		}
		select {
		case <-ctx.Done():
			return nil
		case <-taken:
		}
	}
}

// hold takes a namespace in hand, which it owns from then on, also when it fails; the caller gives it back.
func (n *Node) hold(name string, ns netns.Handle) (*held, error) {
	h := &held{conn: &conn{ns: ns}, users: 2}
	h.inHand, h.end = context.WithCancel(context.Background())
	err := n.look(h)
	if err != nil {
		h.close()
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if old := n.held[name]; old != nil { // somebody else was faster
		n.drop(name, old)
	}
	n.held[name], n.numbered[h.id] = h, name
	close(n.taken)
	n.taken = make(chan struct{})
	return h, nil
}

// look finds out what the daemon needs to know of a namespace once, and opens what it looks with.
func (n *Node) look(h *held) (err error) {
	if h.inode, err = netns.InodeOf(h.conn.ns); err != nil {
		return err
	}
	if h.id, err = n.number(h.conn.ns); err != nil {
		return err
	}
	return netns.Do(h.conn.ns, func() (err error) {
		if h.conn.Handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("open a netlink socket: %w", err)
		}
		if err := h.conn.dialRTNL(); err != nil {
			return err
		}
		h.settings, err = openSettings()
		return err
	})
}

func (h *held) close() {
	if h.settings != nil {
		h.settings.close()
	}
	h.conn.close()
}

// giveBack is the end of hold and of inHand.
func (n *Node) giveBack(h *held) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.leave(h)
}

// letGo keeps a segment's namespace in hand no longer.
func (n *Node) letGo(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if h := n.held[name]; h != nil {
		n.drop(name, h)
	}
}

// drop takes back what hold noted; n.mu is held.
func (n *Node) drop(name string, h *held) {
	delete(n.held, name)
	if n.numbered[h.id] == name {
		delete(n.numbered, h.id)
	}
	h.end()
	n.leave(h)
}

// leave closes what nobody uses any more; n.mu is held.
func (n *Node) leave(h *held) {
	if h.users--; h.users == 0 {
		h.close()
	}
}

// number is the id of a namespace as the host's netns counts; it is given one if it has none.
func (n *Node) number(ns netns.Handle) (int, error) {
	c, err := n.dialHost()
	if err != nil {
		return 0, err
	}
	defer c.close()
	id, err := c.GetNetNsIdByFd(int(ns))
	if err != nil {
		return 0, fmt.Errorf("look up the number of a network namespace: %w", err)
	}
	if id >= 0 {
		return id, nil
	}
	if err := c.SetNetNsIdByFd(int(ns), -1); err != nil && !errors.Is(err, fs.ErrExist) {
		return 0, fmt.Errorf("number a network namespace: %w", err)
	}
	if id, err = c.GetNetNsIdByFd(int(ns)); err != nil {
		return 0, fmt.Errorf("look up the number of a network namespace: %w", err)
	}
	return id, nil
}

func (n *Node) dialHost() (*conn, error) {
	ns, err := n.host()
	if err != nil {
		return nil, fmt.Errorf("open the node's own network namespace: %w", err)
	}
	return dial(ns)
}

// follow lets go of a namespace in hand whose name stands for another one: another process took the segment away and made it anew.
func (n *Node) follow(name string) error {
	h := n.inHand(name)
	if h == nil {
		return nil
	}
	defer n.giveBack(h)
	if named, err := h.inode.IsAt(n.netnsPath(name)); named || err != nil {
		return err
	}
	ns, err := netns.Open(n.netnsPath(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // somebody took the name alone
	}
	if err != nil {
		return err
	}
	n.letGo(name)
	return ns.Close()
}

// take takes a segment's namespace in hand where find finds it; nil where it doesn't. The caller gives it back.
func (n *Node) take(s *segment.State) (*held, error) {
	h, ns, err := n.find(s)
	if err != nil || h != nil || !s.Exists {
		return h, err
	}
	if h, err = n.hold(s.Netns, ns); err != nil {
		return nil, fmt.Errorf("observe %s: %w", s.Netns, err)
	}
	return h, nil
}

// reach connects to a segment's namespace where find finds it, for once; nil where it doesn't.
func (n *Node) reach(s *segment.State) (*conn, error) {
	h, ns, err := n.find(s)
	if err != nil {
		return nil, err
	}
	if h != nil {
		defer n.giveBack(h)
		if ns, err = netns.Dup(h.conn.ns); err != nil {
			return nil, err
		}
	} else if !s.Exists {
		return nil, nil
	}
	return dial(ns)
}

// find finds a segment's namespace: in hand, or else by its name, open, if there is one of the two. It notes in the state which.
func (n *Node) find(s *segment.State) (h *held, ns netns.Handle, err error) {
	if h = n.inHand(s.Netns); h != nil {
		if s.Exists, err = h.inode.IsAt(n.netnsPath(s.Netns)); err != nil {
			n.giveBack(h)
			return nil, ns, fmt.Errorf("observe %s: %w", s.Netns, err)
		}
		s.LostName = !s.Exists
		return h, ns, nil
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

// createNetns makes a segment's namespace. It is silent before it has its name, so that no process can find it otherwise.
func (n *Node) createNetns(name string) error {
	path := n.netnsPath(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make the folder of network namespaces: %w", err)
	}
	return netns.Create(path, silence)
}

// restoreNetns mounts the namespace in hand at its name again, over whatever is there.
func (n *Node) restoreNetns(name string) error {
	h := n.inHand(name)
	if h == nil {
		return fmt.Errorf("network namespace %s is not in hand", name)
	}
	defer n.giveBack(h)
	path := n.netnsPath(name)
	if err := netns.Unmount(path); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make the folder of network namespaces: %w", err)
	}
	return netns.Mount(h.conn.ns, path)
}

// removeNetns takes a segment's name and lock away.
func (n *Node) removeNetns(name string) error {
	n.letGo(name)
	if err := netns.Unmount(n.netnsPath(name)); err != nil {
		return err
	}
	return removeFile(n.lockPath(name))
}
