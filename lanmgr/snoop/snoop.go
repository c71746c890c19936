// Package snoop reads bindings of IP addresses and MACs from the ARP and neighbour discovery of a LAN's hosts.
package snoop

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/k8slan/k8slan/lanmgr/sockfilter"
)

// How many frames a second are read of a LAN, and how many at once. A host may send more; most of them repeat a known
// binding.
const (
	frameRate  = 1000
	frameBurst = 1000
)

// longest is how much of a frame is read, in bytes: neighbour discovery with room for options.
const longest = 256

// Role is what a link is in a LAN.
type Role int

// The roles of links.
const (
	Unknown Role = iota // the link is gone, or it may become a port
	Port                // hosts send into the LAN by it
	Ignored             // frames that come in by it are not read: those of other nodes, or those sent to a host
)

// RoleFunc returns the role of a link.
type RoleFunc func(index int) (Role, error)

// Socket receives the ARP and neighbour discovery that comes in by any link of a network namespace.
type Socket struct{ conn *socket.Conn }

// Open opens a socket in the network namespace of the calling thread. It has to receive from all links, because
// frames reach it before they reach the bridge, which takes them (__netif_receive_skb_core in net/core/dev.c). The
// kernel runs the filter before it copies a frame, and ignores what links send.
func Open() (*Socket, error) {
	conn, err := socket.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0, "arp", nil)
	if err != nil {
		return nil, fmt.Errorf("open a packet socket (needs CAP_NET_RAW): %w", err)
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	err = errors.Join(
		conn.SetsockoptInt(unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		conn.SetBPF(sockfilter.Bindings(longest, nil)),
	)
	if err == nil {
		err = conn.Bind(&unix.SockaddrLinklayer{Protocol: all})
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("open a packet socket for ARP: %w", err)
	}
	return &Socket{conn}, nil
}

// Close closes the socket.
func (s *Socket) Close() error { return s.conn.Close() }

// Run calls bound with each binding that a host shows on a port, also with those that are known, until ctx ends.
// It calls role once for each link, and again only while that is Unknown.
func (s *Socket) Run(ctx context.Context, role RoleFunc, bound func(mac [6]byte, ip netip.Addr)) error {
	links := links{role: role, known: map[int]Role{}, socket: s}
	pace := rate.NewLimiter(frameRate, frameBurst)
	for buf := make([]byte, longest); ctx.Err() == nil; {
		size, from, err := s.conn.Recvfrom(ctx, buf, 0)
		if ctx.Err() != nil {
			continue // the loop ends
		}
		if err != nil {
			return fmt.Errorf("receive ARP: %w", err)
		}
		isPort, err := links.isPort(from)
		if err != nil {
			return err
		}
		if isPort {
			if mac, ip, ok := Parse(buf[:size]); ok {
				bound(mac, ip)
			}
		}
		_ = pace.Wait(ctx) // fails only once ctx ended, which ends the loop
	}
	return nil
}

// links remembers the roles of links. One that turns out to be ignored goes into the socket's filter.
type links struct {
	role   RoleFunc
	known  map[int]Role // by index; none is Unknown
	socket *Socket
}

// isPort reports whether a frame came in by a port.
func (l *links) isPort(from unix.Sockaddr) (bool, error) {
	link, ok := from.(*unix.SockaddrLinklayer)
	if !ok {
		return false, nil
	}
	role, known := l.known[link.Ifindex]
	if known {
		return role == Port, nil
	}
	role, err := l.role(link.Ifindex)
	if err != nil || role == Unknown {
		return false, err
	}
	l.known[link.Ifindex] = role
	if role == Ignored {
		err = l.socket.conn.SetBPF(sockfilter.Bindings(longest, l.ignored()))
	}
	return role == Port, err
}

// ignored returns the indexes of the links that are ignored, sorted.
func (l *links) ignored() (indexes []int) {
	for index, role := range l.known {
		if role == Ignored {
			indexes = append(indexes, index)
		}
	}
	slices.Sort(indexes)
	return indexes
}
