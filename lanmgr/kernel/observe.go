package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/vishvananda/netns"

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
	if s.Record != nil && s.Record.OnDemand {
		if err := n.follow(netnsName); err != nil {
			return s, fmt.Errorf("observe %s: %w", netnsName, err)
		}
	}
	h, err := n.take(&s)
	if err != nil || h == nil {
		return s, err
	}
	defer n.giveBack(h)
	if s.Silent, err = h.settings.areMade(h.conn.ns); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	if s.Links, err = h.conn.links(); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	n.noteVXLAN(h, s.Links)
	if err := h.conn.askRemotes(&s); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	if err := h.conn.askNeighbors(&s); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	if s.Record != nil && len(s.Record.TxChecksumOff) > 0 {
		if err := h.conn.askTxChecksums(s.Links, s.Record.TxChecksumOff); err != nil {
			return s, fmt.Errorf("observe %s: %w", netnsName, err)
		}
	}
	return s, nil
}

// follow lets go of a namespace in hand whose name stands for another one: another process took the segment away and made it anew.
func (n *Node) follow(name string) error {
	h := n.inHand(name)
	if h == nil {
		return nil
	}
	defer n.giveBack(h)
	if named, err := h.inode.isAt(n.netnsPath(name)); named || err != nil {
		return err
	}
	ns, err := openNetns(n.netnsPath(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // somebody took the name alone
	}
	if err != nil {
		return err
	}
	n.letGo(name)
	return ns.Close()
}

// isDamaged says whether a record is there but cannot be understood; it is written anew then.
func isDamaged(err error) bool {
	var pathErr *fs.PathError
	return !errors.As(err, &pathErr)
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
		if ns, err = dup(h.conn.ns); err != nil {
			return nil, err
		}
	} else if !s.Exists {
		return nil, nil
	}
	return dial(ns)
}

// find finds a segment's namespace: in hand, or else by its name, open, if there is one of the two. It notes in the state which.
func (n *Node) find(s *segment.State) (h *held, ns netns.NsHandle, err error) {
	if h = n.inHand(s.Netns); h != nil {
		if s.Exists, err = h.inode.isAt(n.netnsPath(s.Netns)); err != nil {
			n.giveBack(h)
			return nil, ns, fmt.Errorf("observe %s: %w", s.Netns, err)
		}
		s.Lost = !s.Exists
		return h, ns, nil
	}
	ns, err = openNetns(n.netnsPath(s.Netns))
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
	s.Dead = err == nil && info.Mode().IsRegular()
	return nil, ns, nil
}

// removeFile removes a file; absent is success.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
