// Package lantest sends frames through a LAN between two pods of helm test: one end asks, the other answers.
package lantest

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/k8slan/k8slan/lanmgr/diag/packet"
	"github.com/k8slan/k8slan/lanmgr/diag/probe"
)

const (
	etherType = 0x88b5 // IEEE 802, for local experiments
	header    = 14     // length of an Ethernet header
	minFrame  = 60     // length of an Ethernet frame without its checksum

	kindHello     = 1 // broadcast, to find the other end
	kindAsk       = 2
	kindAnswer    = 3
	kindArrived   = 4 // a test frame of package probe arrived, with that number
	kindTestFrame = 0 // a test frame itself

	// helloInterval is the pause between two hellos while there is no answer.
	helloInterval = 200 * time.Millisecond
	// answerTimeout is how long an answer may take before its frame counts as lost.
	answerTimeout = time.Second
	// maxLost is the number of lost frames after which no more are sent.
	maxLost = 10
)

var magic = []byte("k8slan probe")

// Port is an interface that sends and receives frames.
type Port struct {
	MAC   net.HardwareAddr
	MTU   int // in bytes
	Wire  Wire
	Owner string // name for the other end, such as that of the node
}

// Wire sends and receives the frames of a port.
type Wire interface {
	Send(frame []byte) error
	// Receive returns the next frame, or ctx's error when that ends.
	Receive(ctx context.Context) (packet.Frame, error)
	Close() error
}

// Open opens an interface of this network namespace. It needs CAP_NET_RAW.
func Open(iface, owner string) (*Port, error) {
	s, err := packet.Open(iface)
	if err != nil {
		return nil, err
	}
	return &Port{MAC: s.Link.HardwareAddr, MTU: s.Link.MTU, Wire: s, Owner: owner}, nil
}

// Close closes the port.
func (p *Port) Close() error { return p.Wire.Close() }

// message is a frame of this package.
type message struct {
	from   net.HardwareAddr
	kind   byte
	number uint32
	owner  string
}

// send sends a frame of that many bytes.
func (p *Port) send(to net.HardwareAddr, m message, size int) error {
	frame := make([]byte, 0, size)
	frame = append(append(frame, to...), p.MAC...)
	frame = binary.BigEndian.AppendUint16(frame, etherType)
	frame = append(frame, magic...)
	frame = append(frame, m.kind)
	frame = binary.BigEndian.AppendUint32(frame, m.number)
	owner := p.Owner[:min(len(p.Owner), minFrame-len(frame)-1)]
	frame = append(append(frame, byte(len(owner))), owner...)
	frame = append(frame, make([]byte, max(0, size-len(frame)))...)
	return p.Wire.Send(frame)
}

// receive returns the next message or test frame and its size, or ctx's error.
func (p *Port) receive(ctx context.Context) (message, int, error) {
	for {
		f, err := p.Wire.Receive(ctx)
		if err != nil {
			return message{}, 0, err
		}
		if f.Outgoing {
			continue
		}
		if id, ok := probe.Recognize(f.Bytes); ok {
			return message{kind: kindTestFrame, number: id}, len(f.Bytes), nil
		}
		if m, ok := parse(f.Bytes); ok {
			return m, len(f.Bytes), nil
		}
	}
}

func parse(frame []byte) (message, bool) {
	if len(frame) < minFrame || binary.BigEndian.Uint16(frame[12:]) != etherType ||
		!bytes.HasPrefix(frame[header:], magic) {
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

// Answer answers every hello and question with a frame of the same size. It also reports the test frames that arrive to
// the port that asked last. It ends with ctx.
func (p *Port) Answer(ctx context.Context) error {
	var asker net.HardwareAddr
	for ctx.Err() == nil {
		m, size, err := p.receive(ctx)
		switch {
		case err != nil:
		case m.kind == kindTestFrame && asker != nil:
			err = p.send(asker, message{kind: kindArrived, number: m.number}, minFrame)
		case m.kind == kindHello, m.kind == kindAsk:
			asker = m.from
			err = p.send(m.from, message{kind: kindAnswer, number: m.number}, size)
		}
		if err != nil && ctx.Err() == nil {
			return err
		}
	}
	return nil
}

// Peer is the other end.
type Peer struct {
	Owner string
	MAC   net.HardwareAddr
}

// Result counts frames and their answers.
type Result struct {
	Sent          int // half of them as short and half as long as possible
	Lost          int // without an answer of the same size
	Short, Long   int // bytes
	Slowest, Mean time.Duration
}

// Count sends count frames, one after the other, and counts the answers. It stops early if many are lost.
func (p *Port) Count(ctx context.Context, peer Peer, count int) (Result, error) {
	r := Result{Short: minFrame, Long: p.MTU + header}
	var total time.Duration
	for r.Sent < count && r.Lost < maxLost {
		size := r.Short
		if r.Sent%2 == 1 {
			size = r.Long
		}
		begin := time.Now()
		answered, err := p.ask(ctx, peer.MAC, uint32(r.Sent+1), size)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return r, fmt.Errorf("after %d of %d frames: %w", r.Sent, count, err)
		}
		if r.Sent++; !answered {
			r.Lost++
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

// Find broadcasts hellos until another port answers.
func (p *Port) Find(ctx context.Context) (Peer, error) {
	broadcast := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	for ctx.Err() == nil {
		if err := p.send(broadcast, message{kind: kindHello}, minFrame); err != nil {
			return Peer{}, err
		}
		m, err := p.awaitAnswer(ctx, helloInterval, 0)
		if err == nil || !errors.Is(err, context.DeadlineExceeded) {
			return Peer{m.owner, m.from}, err
		}
	}
	return Peer{}, errors.New("no answer: either the other pod does not run, or no frame passes between the nodes; " +
		"see kubectl get lans,lannodes, check whether the underlay carries multicast, " +
		"and run kubectl k8slan probe between two pods on a LAN of these nodes")
}

// ask sends a question and reports whether its answer came.
func (p *Port) ask(ctx context.Context, to net.HardwareAddr, number uint32, size int) (answered bool, err error) {
	if err := p.send(to, message{kind: kindAsk, number: number}, size); err != nil {
		return false, err
	}
	m, err := p.awaitAnswer(ctx, answerTimeout, number)
	if errors.Is(err, context.DeadlineExceeded) {
		return false, nil
	}
	return err == nil && m.size == size, err
}

// answered is an answer and the size of its frame.
type answered struct {
	message
	size int
}

// awaitAnswer waits for the answer with that number. It returns context.DeadlineExceeded if none comes in time.
func (p *Port) awaitAnswer(ctx context.Context, within time.Duration, number uint32) (answered, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		m, size, err := p.receive(ctx)
		if err != nil {
			return answered{}, err
		}
		if m.kind == kindAnswer && m.number == number {
			return answered{m, size}, nil
		}
	}
}

// ProbeKinds sends frames of every kind to the peer, and returns which arrive there.
func (p *Port) ProbeKinds(ctx context.Context, peer Peer) (probe.Path, error) {
	ctx, cancel := context.WithCancel(ctx)
	readOrders, orders := io.Pipe()
	sent, writeSent := io.Pipe()
	arrived, writeArrived := io.Pipe()
	var both sync.WaitGroup
	both.Go(func() { writeSent.CloseWithError(p.sendFrames(readOrders, writeSent)) })
	both.Go(func() { writeArrived.CloseWithError(p.writeArrivals(ctx, peer, writeArrived)) })
	defer both.Wait()
	defer func() { _, _, _ = orders.Close(), sent.Close(), arrived.Close() }()
	defer cancel()
	from := probe.Endpoint{Node: p.Owner, Orders: orders, Messages: sent}
	to := probe.Endpoint{Node: peer.Owner, Messages: arrived}
	return probe.OneWay(ctx, from, to)
}

// facts returns what is known about an end without observing its node.
func (p *Port) facts(owner string, mac net.HardwareAddr) *probe.Facts {
	return &probe.Facts{Pod: "pod on " + owner, MAC: mac, MTU: p.MTU, Port: probe.Link{Up: true, Carrier: true}}
}

// sendFrames carries out orders until they end.
func (p *Port) sendFrames(orders io.Reader, out io.Writer) error {
	lines, messages := json.NewDecoder(orders), json.NewEncoder(out)
	if err := messages.Encode(probe.Message{Facts: p.facts(p.Owner, p.MAC)}); err != nil {
		return err
	}
	for {
		var o probe.Order
		if err := lines.Decode(&o); err != nil {
			return err
		}
		sent := probe.Sent{ID: o.ID}
		if err := p.Wire.Send(o.Bytes); err != nil {
			sent.Error = err.Error()
		}
		if err := messages.Encode(probe.Message{Sent: &sent}); err != nil {
			return err
		}
	}
}

// writeArrivals writes which test frames the other end reports, until ctx ends.
func (p *Port) writeArrivals(ctx context.Context, peer Peer, out io.Writer) error {
	messages := json.NewEncoder(out)
	err := messages.Encode(probe.Message{Facts: p.facts(peer.Owner, peer.MAC)})
	for err == nil {
		var m message
		if m, _, err = p.receive(ctx); err == nil && m.kind == kindArrived {
			s := probe.Sighting{ID: m.number, Where: probe.AtPort, Outgoing: true}
			err = messages.Encode(probe.Message{Sighting: &s})
		}
	}
	return err
}
