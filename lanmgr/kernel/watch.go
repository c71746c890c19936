package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/netns"
)

// Watch tells what may have changed, until the context ends: poke is called with the name of a segment, or with ""
// for the links, addresses and default routes of the node's own netns. These are hints: what to do about them is
// found by observing. A segment is watched from when it was first observed; everything is poked once at the start,
// when nothing can be missed any more.
func (n *Node) Watch(ctx context.Context, poke func(netnsName string)) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	// An IPv6 address in a LAN's namespace is the only sign that somebody has switched IPv6 on there.
	links, err := n.subscribe(true, nil, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		return fmt.Errorf("watch the links of LANs: %w", err)
	}
	remotes, err := n.subscribe(true, ofRemotes, unix.RTNLGRP_NEIGH)
	if err != nil {
		links.Close()
		return fmt.Errorf("watch the remotes of LANs: %w", err)
	}
	host, err := n.subscribe(false, nil, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		links.Close()
		remotes.Close()
		return fmt.Errorf("watch the node's links: %w", err)
	}
	uevents, err := openUevents()
	if err != nil {
		links.Close()
		remotes.Close()
		host.Close()
		return fmt.Errorf("watch kernel modules: %w", err)
	}
	records, err := n.openRecords()
	if err != nil {
		links.Close()
		remotes.Close()
		host.Close()
		uevents.Close()
		return fmt.Errorf("watch the records of LANs: %w", err)
	}
	defer records.Close()
	var group sync.WaitGroup
	for what, read := range map[string]func() error{
		"the records of LANs": func() error { return readRecordEvents(ctx, records, poke) },
		"the links of LANs":   func() error { return n.readLinkEvents(ctx, links, poke) },
		"the remotes of LANs": func() error { return n.readLinkEvents(ctx, remotes, poke) },
		"the node's links":    func() error { return n.readHostEvents(ctx, host, poke) },
		"kernel modules":      func() error { return n.readUevents(ctx, uevents, poke) },
		"mounts":              func() error { return n.readMountEvents(ctx, poke) },
	} {
		group.Go(func() {
			if err := read(); err != nil {
				stop(fmt.Errorf("watch %s: %w", what, err))
			}
		})
	}
	poke("")
	n.pokeAll(poke)
	group.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// openRecords watches the folder of records: what somebody else does to one is undone.
func (n *Node) openRecords() (*fsnotify.Watcher, error) {
	dir := filepath.Dir(n.recordPath(""))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	if err := w.Add(dir); err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

func readRecordEvents(ctx context.Context, w *fsnotify.Watcher, poke func(string)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case event := <-w.Events:
			if name, ok := strings.CutSuffix(filepath.Base(event.Name), ".json"); ok && !strings.HasPrefix(name, ".") && !event.Has(fsnotify.Chmod) {
				poke(name)
			}
		case err := <-w.Errors:
			return err
		}
	}
}

// receiveBuffer is large because an overflow means to observe everything again.
const receiveBuffer = 8 << 20

// solNetlink and listenAllNSID are from include/linux/socket.h and include/uapi/linux/netlink.h: a socket so set gets the
// events of every namespace that has a number in its own, with that number.
const (
	solNetlink    = 270
	listenAllNSID = 8
)

// ofRemotes is a socket filter that lets the events of a VXLAN's remotes pass, in a bridge's or VXLAN's table (AF_BRIDGE) under the
// address of zeros. All else that becomes known of neighbours, in every namespace, wakes nobody.
var ofRemotes = []unix.SockFilter{
	{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: unix.SizeofNlMsghdr}, // ndm_family
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AF_BRIDGE, Jf: 9},
	{Code: unix.BPF_LD | unix.BPF_IMM, K: unix.SizeofNlMsghdr + 12}, // where the attributes begin, after struct ndmsg
	{Code: unix.BPF_LDX | unix.BPF_IMM, K: unix.NDA_LLADDR},
	{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0xfffff000 + 12}, // SKF_AD_OFF + SKF_AD_NLATTR: finds the attribute
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 0, Jt: 5},
	{Code: unix.BPF_MISC | unix.BPF_TAX},
	{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_IND, K: 4}, // the address, after struct nlattr
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 0, Jf: 2},
	{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_IND, K: 8},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 0, Jt: 1},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 18},
}

// subscribe opens a route socket in the node's own netns; it hears what the filter passes, if there is one.
func (n *Node) subscribe(all bool, filter []unix.SockFilter, groups ...int) (f *os.File, err error) {
	host, err := n.host()
	if err != nil {
		return nil, err
	}
	defer host.Close()
	err = netns.Do(host, func() (err error) {
		f, err = subscribe(all, filter, groups...)
		return err
	})
	return f, err
}

// subscribe opens such a socket in the thread's own namespace.
func subscribe(all bool, filter []unix.SockFilter, groups ...int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "rtnetlink")
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		// Without the right to exceed the limit, as much as it allows.
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	if err == nil && all {
		err = unix.SetsockoptInt(fd, solNetlink, listenAllNSID, 1)
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err == nil && len(filter) > 0 {
		err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	}
	for _, g := range groups { // after bind, which would leave the groups again (netlink_bind in net/netlink/af_netlink.c)
		if err == nil {
			err = unix.SetsockoptInt(fd, solNetlink, unix.NETLINK_ADD_MEMBERSHIP, g)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// receive hands each datagram to handle, with the number of the namespace it is from (-1: the socket's own), and calls
// overflow when some were lost. It closes the file when the context ends, and returns.
func receive(ctx context.Context, f *os.File, handle func(msg []byte, from int), overflow func()) error {
	defer context.AfterFunc(ctx, func() { f.Close() })()
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	buf, oob := make([]byte, 1<<16), make([]byte, 256)
	for {
		var size, oobSize int
		var recvErr error
		err := raw.Read(func(fd uintptr) bool {
			size, oobSize, _, _, recvErr = unix.Recvmsg(int(fd), buf, oob, 0)
			return !errors.Is(recvErr, unix.EAGAIN)
		})
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		case errors.Is(recvErr, unix.ENOBUFS):
			overflow()
		case errors.Is(recvErr, unix.EINTR):
		case recvErr != nil:
			return recvErr
		default:
			handle(buf[:size], sender(oob[:oobSize]))
		}
	}
}

// sender reads the namespace's number from the control message that comes with an event.
func sender(oob []byte) int {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return -1
	}
	for _, m := range msgs {
		if m.Header.Level == solNetlink && m.Header.Type == listenAllNSID && len(m.Data) >= 4 {
			return int(int32(nl.NativeEndian().Uint32(m.Data)))
		}
	}
	return -1
}

func (n *Node) readLinkEvents(ctx context.Context, f *os.File, poke func(string)) error {
	return receive(ctx, f, func(_ []byte, from int) {
		if name, ok := n.byNumber(from); ok {
			poke(name)
		}
	}, func() { n.pokeAll(poke) })
}

func (n *Node) byNumber(id int) (string, bool) {
	if id < 0 {
		return "", false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	name, ok := n.numbered[id]
	return name, ok
}

func (n *Node) pokeAll(poke func(string)) {
	for _, name := range n.heldNames() {
		poke(name)
	}
}

func (n *Node) heldNames() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	names := make([]string, 0, len(n.held))
	for name := range n.held {
		names = append(names, name)
	}
	return names
}

func (n *Node) readHostEvents(ctx context.Context, f *os.File, poke func(string)) error {
	return receive(ctx, f, func(msg []byte, _ int) {
		if matters(msg) {
			poke("")
		}
	}, func() { poke("") })
}

// matters passes over routes that are no default routes: a node may have very many.
func matters(msg []byte) bool {
	for len(msg) >= unix.SizeofNlMsghdr {
		length := int(nl.NativeEndian().Uint32(msg))
		if length < unix.SizeofNlMsghdr || length > len(msg) {
			return true
		}
		switch nl.NativeEndian().Uint16(msg[4:]) {
		case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
			const dstLen = unix.SizeofNlMsghdr + 1 // rtm_dst_len
			if length > dstLen && msg[dstLen] == 0 {
				return true
			}
		default:
			return true
		}
		next := (length + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1)
		if next >= len(msg) {
			return false
		}
		msg = msg[next:]
	}
	return false
}

// openUevents subscribes to the kernel's own events: br_netfilter, when it is loaded, switches itself on in every namespace.
func openUevents() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "uevent")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (n *Node) readUevents(ctx context.Context, f *os.File, poke func(string)) error {
	return receive(ctx, f, func(msg []byte, _ int) {
		if bytes.HasPrefix(msg, []byte("add@/module/br_netfilter")) {
			n.pokeAll(poke)
		}
	}, func() { n.pokeAll(poke) })
}

// readMountEvents pokes the segments whose name no longer stands for their namespace, and those that another process has made. The mount table signals a
// change by POLLPRI (mounts_poll in fs/proc_namespace.c).
func (n *Node) readMountEvents(ctx context.Context, poke func(string)) error {
	// Not an os.File: the runtime's own poll of that would take some of the signals, for each is given once per file.
	mounts, err := unix.Open("/proc/thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the mount table: %w", err)
	}
	defer unix.Close(mounts)
	ended, end, err := os.Pipe() // wakes the poll when the context ends
	if err != nil {
		return err
	}
	defer ended.Close()
	defer context.AfterFunc(ctx, func() { end.Close() })()
	fds := []unix.PollFd{{Fd: int32(mounts), Events: unix.POLLPRI}, {Fd: int32(ended.Fd()), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		for _, name := range n.heldNames() {
			if lost, err := n.lost(name); lost || err != nil {
				poke(name)
			}
		}
		names, err := n.List()
		if err != nil {
			return err
		}
		for _, name := range names {
			if h := n.inHand(name); h != nil {
				n.giveBack(h)
			} else {
				poke(name)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(mountsRest):
		}
	}
}

// mountsRest is how long the mount table is left alone after a look at it. A look takes time in proportion to the LANs,
// and while LANs come or go there is a change for each of them.
const mountsRest = 50 * time.Millisecond

// lost says whether a segment's name stands for its namespace no more.
func (n *Node) lost(name string) (bool, error) {
	h := n.inHand(name)
	if h == nil {
		return false, nil
	}
	defer n.giveBack(h)
	named, err := h.inode.IsAt(n.netnsPath(name))
	return !named, err
}
