// Package probe sends frames through a LAN and tells what comes of them: from pod to pod, where one end asks and the other answers,
// and from node to node, where stations hear them on their way.
package probe

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	etherType = 0x88b5 // IEEE 802, for local experiments
	header    = 14
	shortest  = 60 // of an Ethernet frame, without its checksum

	kindHello  = 1 // to everyone: who is there?
	kindAsk    = 2
	kindAnswer = 3

	// helloEvery is the pause between two questions who is there, while nobody answers.
	helloEvery = 200 * time.Millisecond
	// patience is how long an answer may take before its frame counts as lost.
	patience = time.Second
)

var magic = []byte("k8slan probe")

// Port is an interface that frames go out of and come in at.
type Port struct {
	MAC   net.HardwareAddr
	MTU   int // in bytes
	Wire  *os.File
	Owner string // what the other end is told, such as the name of the node
}

// Open opens an interface of this network namespace, which takes CAP_NET_RAW.
func Open(iface, owner string) (*Port, error) {
	link, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, fmt.Errorf("find interface %s: %w", iface, err)
	}
	protocol := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, etherType))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(protocol))
	if err != nil {
		return nil, fmt.Errorf("open a packet socket (needs CAP_NET_RAW): %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: link.Index}); err != nil {
		return nil, errors.Join(fmt.Errorf("bind a packet socket to %s: %w", iface, err), unix.Close(fd))
	}
	return &Port{MAC: link.HardwareAddr, MTU: link.MTU, Wire: os.NewFile(uintptr(fd), iface), Owner: owner}, nil
}

// Close closes the port.
func (p *Port) Close() error { return p.Wire.Close() }

// message is a frame of the probe's.
type message struct {
	from   net.HardwareAddr
	kind   byte
	number uint32
	owner  string
}

// send sends a frame of so many bytes.
func (p *Port) send(to net.HardwareAddr, m message, size int) error {
	frame := make([]byte, 0, size)
	frame = append(append(frame, to...), p.MAC...)
	frame = binary.BigEndian.AppendUint16(frame, etherType)
	frame = append(frame, magic...)
	frame = append(frame, m.kind)
	frame = binary.BigEndian.AppendUint32(frame, m.number)
	owner := p.Owner[:min(len(p.Owner), shortest-len(frame)-1)]
	frame = append(append(frame, byte(len(owner))), owner...)
	frame = append(frame, make([]byte, max(0, size-len(frame)))...)
	if _, err := p.Wire.Write(frame); err != nil {
		return fmt.Errorf("send a frame of %d bytes: %w", len(frame), err)
	}
	return nil
}

// receive returns the probe's next frame and its size, or os.ErrDeadlineExceeded.
func (p *Port) receive(deadline time.Time) (message, int, error) {
	if err := p.Wire.SetReadDeadline(deadline); err != nil {
		return message{}, 0, err
	}
	buffer := make([]byte, 1<<16)
	for {
		n, err := p.Wire.Read(buffer)
		if err != nil {
			return message{}, 0, err
		}
		if m, ok := parse(buffer[:n]); ok && !bytes.Equal(m.from, p.MAC) {
			return m, n, nil
		}
	}
}

func parse(frame []byte) (message, bool) {
	if len(frame) < shortest || binary.BigEndian.Uint16(frame[12:]) != etherType || !bytes.HasPrefix(frame[header:], magic) {
		return message{}, false
	}
	m := message{from: net.HardwareAddr(bytes.Clone(frame[6:12]))}
	rest := frame[header+len(magic):]
	m.kind, m.number = rest[0], binary.BigEndian.Uint32(rest[1:])
	length := int(rest[5])
	if length > len(rest)-6 {
		return message{}, false
	}
	m.owner = string(rest[6 : 6+length])
	return m, true
}

// Answer answers every question with a frame of the same size, until ctx ends.
func (p *Port) Answer(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = p.Wire.Close() }) // which ends the reading below
	defer stop()
	for {
		m, size, err := p.receive(time.Time{})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		if m.kind == kindAnswer {
			continue
		}
		if err := p.send(m.from, message{kind: kindAnswer, number: m.number}, size); err != nil {
			return err
		}
	}
}

// Result is what a probe found.
type Result struct {
	Peer          string // whoever answered
	Sent          int    // frames, half of them as short and half as long as may be
	Lost          int    // those of them that had no answer of the same size
	Short, Long   int    // bytes
	Slowest, Mean time.Duration
}

// Ask waits until somebody answers, then sends count frames, one after the other, and counts the answers.
func (p *Port) Ask(ctx context.Context, count int) (Result, error) {
	peer, err := p.find(ctx)
	if err != nil {
		return Result{}, err
	}
	r := Result{Peer: peer.owner, Sent: count, Short: shortest, Long: p.MTU + header}
	var total time.Duration
	for i := range count {
		size := r.Short
		if i%2 == 1 {
			size = r.Long
		}
		begin := time.Now()
		answered, err := p.exchange(peer.from, uint32(i+1), size)
		if err != nil {
			return r, err
		}
		if !answered {
			r.Lost++
			if ctx.Err() != nil {
				return r, fmt.Errorf("after %d of %d frames: %w", i, count, ctx.Err())
			}
			continue
		}
		took := time.Since(begin)
		total += took
		r.Slowest = max(r.Slowest, took)
	}
	if answered := r.Sent - r.Lost; answered > 0 {
		r.Mean = total / time.Duration(answered)
	}
	return r, nil
}

// find asks everyone until one answers.
func (p *Port) find(ctx context.Context) (message, error) {
	everyone := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	for ctx.Err() == nil {
		if err := p.send(everyone, message{kind: kindHello}, shortest); err != nil {
			return message{}, err
		}
		m, _, err := p.receive(time.Now().Add(helloEvery))
		if err == nil && m.kind == kindAnswer {
			return m, nil
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return message{}, fmt.Errorf("receive: %w", err)
		}
	}
	return message{}, errors.New("nobody answered: either the other pod does not run, or no frame passes between the nodes; " +
		"see kubectl get lans,lannodes, and whether the underlay carries multicast")
}

func (p *Port) exchange(to net.HardwareAddr, number uint32, size int) (answered bool, err error) {
	if err := p.send(to, message{kind: kindAsk, number: number}, size); err != nil {
		return false, err
	}
	deadline := time.Now().Add(patience)
	for {
		m, got, err := p.receive(deadline)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("receive: %w", err)
		}
		if m.kind == kindAnswer && m.number == number {
			return got == size, nil
		}
	}
}
