package watch

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/socket"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// receiveBuffer is large, in bytes, because an overflow means that everything is observed again.
const receiveBuffer = 8 << 20

// subscription says which rtnetlink events a socket receives.
type subscription struct {
	groups   []int
	filter   []bpf.RawInstruction // nil passes all
	allNetns bool                 // also of the namespaces that have an ID in the socket's own
}

// solNetlink and listenAllNSID are from include/linux/socket.h and include/uapi/linux/netlink.h. A socket with that
// option receives the events of every namespace that has an ID in its own, with that ID.
const (
	solNetlink    = 270
	listenAllNSID = 8
)

// open subscribes in the calling thread's network namespace. It hands each datagram to handle, with the ID of the
// namespace it is from (-1: the socket's own), and calls overflow where the kernel had to drop some.
func (s subscription) open(handle func(datagram []byte, netnsID int), overflow func()) (runFunc, error) {
	conn, err := socket.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE, "rtnetlink", nil)
	if err != nil {
		return nil, err
	}
	if err := s.subscribe(conn); err != nil {
		conn.Close()
		return nil, err
	}
	return func(ctx context.Context) error { return receive(ctx, conn, handle, overflow) }, nil
}

func (s subscription) subscribe(conn *socket.Conn) error {
	if err := conn.SetReadBuffer(receiveBuffer); err != nil {
		return err
	}
	if s.allNetns {
		if err := conn.SetsockoptInt(solNetlink, listenAllNSID, 1); err != nil {
			return err
		}
	}
	if err := conn.Bind(&unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	if s.filter != nil {
		if err := conn.SetBPF(s.filter); err != nil {
			return err
		}
	}
	for _, g := range s.groups { // after bind, which leaves all groups (netlink_bind in net/netlink/af_netlink.c)
		if err := conn.SetsockoptInt(solNetlink, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			return err
		}
	}
	return nil
}

// openModules subscribes to the kernel's own events, in the calling thread's network namespace. When br_netfilter is
// loaded, it switches itself on in every namespace.
func openModules(loaded func()) (runFunc, error) {
	conn, err := socket.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_KOBJECT_UEVENT, "uevent", nil)
	if err != nil {
		return nil, err
	}
	if err := conn.Bind(&unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		conn.Close()
		return nil, err
	}
	handle := func(datagram []byte, _ int) {
		if bytes.HasPrefix(datagram, []byte("add@/module/br_netfilter")) {
			loaded()
		}
	}
	return func(ctx context.Context) error { return receive(ctx, conn, handle, loaded) }, nil
}

// receive hands each datagram to handle, and calls overflow where some were dropped, until the context ends.
func receive(ctx context.Context, conn *socket.Conn, handle func(datagram []byte, netnsID int), overflow func()) error {
	defer conn.Close()
	buf, control := make([]byte, 1<<16), make([]byte, 256)
	for {
		size, controlSize, _, _, err := conn.Recvmsg(ctx, buf, control, 0)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			overflow()
		case err != nil:
			return fmt.Errorf("receive: %w", err)
		default:
			handle(buf[:size], netnsID(control[:controlSize]))
		}
	}
}

// netnsID reads the namespace's ID from the control message that comes with an event.
func netnsID(control []byte) int {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return -1
	}
	for _, m := range messages {
		if m.Header.Level == solNetlink && m.Header.Type == listenAllNSID && len(m.Data) >= 4 {
			return int(int32(binary.NativeEndian.Uint32(m.Data)))
		}
	}
	return -1
}
