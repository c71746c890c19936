package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Observe reads a segment as it is. One that is not there at all is an empty State and no error.
func (n *Node) Observe(_ context.Context, netnsName string) (segment.State, error) {
	if err := checkName(netnsName); err != nil {
		return segment.State{}, err
	}
	s := segment.State{Netns: netnsName}
	if r, err := n.Record(netnsName); err == nil {
		s.Record = &r
	} else if !errors.Is(err, ErrNoLAN) && !isDamaged(err) {
		return s, err
	}
	ns, found, err := n.find(&s)
	if err != nil || !found {
		return s, err
	}
	c := &conn{ns: ns}
	defer c.close()
	err = do(ns, func() (err error) {
		if s.Silent, err = isSilent(); err != nil {
			return err
		}
		return c.openSocket()
	})
	if err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	if s.Links, err = c.links(); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	if s.Record != nil && len(s.Record.TxChecksumOff) > 0 {
		if err := c.askTxChecksums(s.Links, s.Record.TxChecksumOff); err != nil {
			return s, fmt.Errorf("observe %s: %w", netnsName, err)
		}
	}
	return s, nil
}

// isDamaged says whether a record is there but cannot be understood; it is written anew then.
func isDamaged(err error) bool {
	var pathErr *fs.PathError
	return !errors.As(err, &pathErr)
}

// reach connects to a segment's namespace where find finds it; nil where it doesn't.
func (n *Node) reach(s *segment.State) (*conn, error) {
	ns, found, err := n.find(s)
	if err != nil || !found {
		return nil, err
	}
	return dial(ns)
}

// find opens a segment's namespace, by its name or, where the name is lost, by what is in hand, if there is one of the two.
// It notes in the state which.
func (n *Node) find(s *segment.State) (ns netns.NsHandle, found bool, err error) {
	if ns, err = openNetns(n.netnsPath(s.Netns)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return ns, false, fmt.Errorf("observe %s: %w", s.Netns, err)
	}
	named := err == nil
	held, inHand, err := n.inHand(s.Netns)
	if err != nil {
		if named {
			ns.Close()
		}
		return ns, false, fmt.Errorf("observe %s: %w", s.Netns, err)
	}
	switch {
	case !named && !inHand:
		info, err := os.Lstat(n.netnsPath(s.Netns))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return ns, false, fmt.Errorf("observe %s: %w", s.Netns, err)
		}
		s.Dead = err == nil && info.Mode().IsRegular()
		return ns, false, nil
	case !named:
		s.Lost = true
		return held, true, nil
	case !inHand:
		s.Exists = true
		if err := n.hold(s.Netns, ns); err != nil {
			ns.Close()
			return ns, false, fmt.Errorf("observe %s: %w", s.Netns, err)
		}
		return ns, true, nil
	}
	same, err := sameNetns(held, ns)
	if err != nil {
		err = fmt.Errorf("observe %s: %w", s.Netns, err)
	}
	s.Exists, s.Lost = same, !same
	if err != nil || same {
		held.Close()
	}
	if err != nil || !same {
		ns.Close()
	}
	switch {
	case err != nil:
		return ns, false, err
	case same:
		return ns, true, nil
	}
	return held, true, nil
}

// hold keeps a namespace in hand, and gives it the number by which the host's netns will know events from it.
func (n *Node) hold(name string, ns netns.NsHandle) error {
	mine, err := dup(ns)
	if err != nil {
		return err
	}
	id, err := n.number(mine)
	if err != nil {
		mine.Close()
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if old, ok := n.held[name]; ok {
		old.ns.Close()
		n.forgetNumber(old.id, name)
	}
	n.held[name], n.numbered[id] = held{ns: mine, id: id}, name
	return nil
}

// letGo is the end of hold.
func (n *Node) letGo(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if h, ok := n.held[name]; ok {
		h.ns.Close()
		delete(n.held, name)
		n.forgetNumber(h.id, name)
	}
}

// forgetNumber takes back what hold noted; n.mu is held.
func (n *Node) forgetNumber(id int, name string) {
	if n.numbered[id] == name {
		delete(n.numbered, id)
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

// removeFile removes a file; absent is success.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
