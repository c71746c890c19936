// Package rtnl has the rtnetlink messages that the netlink library lacks, or reads more slowly than a LAN can wait for.
package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Conn is a connection to rtnetlink in one network namespace. Many goroutines may use it.
type Conn struct{ sockets map[int]*nl.SocketHandle }

// Dial connects to the network namespace of the calling thread.
func Dial() (*Conn, error) {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	return &Conn{map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}}, nil
}

// Close ends the connection.
func (c *Conn) Close() {
	for _, s := range c.sockets {
		s.Close()
	}
}

// change sends a request for a change and waits for its acknowledgement.
func (c *Conn) change(req *nl.NetlinkRequest) error {
	req.Sockets = c.sockets
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// dumpTries is how often RetryDump repeats a dump. While links come and go, four in ten dumps are interrupted.
const dumpTries = 50

// RetryDump repeats a dump that a change interrupted.
func RetryDump[T any](dump func() ([]T, error)) (items []T, err error) {
	for range dumpTries {
		if items, err = dump(); !errors.Is(err, nl.ErrDumpInterrupted) {
			return items, err
		}
	}
	return nil, err
}

// dump sends the request that newRequest makes, again where the dump is interrupted, and parses each answer of a
// kind. It leaves out those that parse does not want.
func dump[T any](
	c *Conn, newRequest func() *nl.NetlinkRequest, kind uint16, parse func([]byte) (item T, want bool, err error),
) ([]T, error) {
	messages, err := RetryDump(func() ([][]byte, error) {
		req := newRequest()
		req.Sockets = c.sockets
		return req.Execute(unix.NETLINK_ROUTE, kind)
	})
	if err != nil {
		return nil, err
	}
	items := make([]T, 0, len(messages))
	for _, m := range messages {
		item, want, err := parse(m)
		if err != nil {
			return nil, err
		}
		if want {
			items = append(items, item)
		}
	}
	return items, nil
}

// attributes walks over the attributes of a message, as bufio.Scanner walks over lines.
type attributes struct {
	kind  uint16 // without the flags of its upper bits
	value []byte
	rest  []byte
	err   error
}

// next reads the next attribute. It returns false at the end, and where the message is damaged: err says so then.
func (a *attributes) next() bool {
	if a.err != nil || len(a.rest) < unix.SizeofRtAttr {
		return false
	}
	length := int(binary.NativeEndian.Uint16(a.rest))
	if length < unix.SizeofRtAttr || length > len(a.rest) {
		a.err = fmt.Errorf("attribute of %d bytes where %d are left: %w", length, len(a.rest), unix.EINVAL)
		return false
	}
	a.kind = binary.NativeEndian.Uint16(a.rest[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
	a.value = a.rest[unix.SizeofRtAttr:length]
	a.rest = a.rest[min(aligned(length), len(a.rest)):]
	return true
}

// aligned returns the length of a message or attribute with the padding before the next one.
func aligned(length int) int { return (length + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }

// number reads a value of one, two or four bytes, in the order of this machine; other lengths are 0.
func number(b []byte) uint32 {
	switch len(b) {
	case 1:
		return uint32(b[0])
	case 2:
		return uint32(binary.NativeEndian.Uint16(b))
	case 4:
		return binary.NativeEndian.Uint32(b)
	}
	return 0
}

// text reads a value that ends with a zero byte.
func text(b []byte) string { return unix.ByteSliceToString(b) }

// Message is one message of a datagram.
type Message struct {
	Type    uint16
	Payload []byte
}

// NextMessage reads the first message of a datagram and returns what follows it. It fails where the datagram is
// damaged.
func NextMessage(datagram []byte) (m Message, rest []byte, ok bool) {
	if len(datagram) < unix.SizeofNlMsghdr {
		return m, nil, false
	}
	length := binary.NativeEndian.Uint32(datagram)
	if length < unix.SizeofNlMsghdr || uint64(length) > uint64(len(datagram)) {
		return m, nil, false
	}
	m = Message{Type: binary.NativeEndian.Uint16(datagram[4:]), Payload: datagram[unix.SizeofNlMsghdr:length]}
	return m, datagram[min(aligned(int(length)), len(datagram)):], true
}
