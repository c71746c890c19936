package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// held is a segment's namespace as the daemon has it in hand. With it, a name that somebody took away can be given back, and
// a look needs no thread to enter the namespace.
type held struct {
	conn     *conn
	inode    inode
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
func (n *Node) hold(name string, ns netns.NsHandle) (*held, error) {
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
	if h.inode, err = inodeOf(h.conn.ns); err != nil {
		return err
	}
	if h.id, err = n.number(h.conn.ns); err != nil {
		return err
	}
	return do(h.conn.ns, func() (err error) {
		if h.conn.Handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("open a netlink socket: %w", err)
		}
		if err := h.conn.openSocket(); err != nil {
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
func (n *Node) number(ns netns.NsHandle) (int, error) {
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

// dup opens a namespace once more.
func dup(ns netns.NsHandle) (netns.NsHandle, error) {
	fd, err := unix.FcntlInt(uintptr(ns), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return netns.None(), fmt.Errorf("open a network namespace again: %w", err)
	}
	return netns.NsHandle(fd), nil
}
