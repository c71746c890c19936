// Package probe finds out which frames pass between two spokes of a LAN, and where the others are lost.
package probe

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"
)

// Link is the state of a link on a node.
type Link struct {
	Name    string `json:"name"`
	Up      bool   `json:"up"`
	Carrier bool   `json:"carrier"` // the link works; a pod's port has a carrier only if the pod's end is up, too
	MTU     int    `json:"mtu"`     // in bytes
}

// Facts are what the node of a spoke knows about it.
type Facts struct {
	Node        string `json:"node,omitempty"`
	Spoke       string `json:"spoke"`
	SpokeOrPool string `json:"spokeOrPool"` // its key in spec.spokeOptions: the spoke, or the pool of the port
	Pod         string `json:"pod"`         // namespace/name
	Interface   string `json:"interface"`   // in the pod
	MAC         []byte `json:"mac"`         // of that interface

	Port     Link `json:"port"`     // the link that carries the spoke's frames
	Bridge   Link `json:"bridge"`   // no name: frames are captured only in the pods
	VXLAN    Link `json:"vxlan"`    // no name: the node has no VXLAN
	Underlay Link `json:"underlay"` // no name: the node cannot capture on it

	MTU     int    `json:"mtu"` // of the LAN on this node, in bytes
	VNI     uint32 `json:"vni"`
	UDPPort uint16 `json:"udpPort"`

	Group   netip.Addr   `json:"group,omitzero"`    // to which the VXLAN floods; the zero Addr: it has remotes instead
	VTEP    netip.Addr   `json:"vtep,omitzero"`     // source of its packets; the zero Addr: the node's routes choose it
	Remotes []netip.Addr `json:"remotes,omitempty"` // to which the VXLAN floods if it has no group
}

// Order is a frame to send from the node's bridge.
type Order struct {
	ID    uint32 `json:"id"`
	Bytes []byte `json:"bytes"` // from the destination address on
	// Unfinished leaves the checksum to hardware, as a pod's kernel does. The checksum covers all bytes from Start on,
	// and belongs at Offset from there.
	Unfinished bool   `json:"unfinished,omitempty"`
	Start      uint16 `json:"start,omitempty"`
	Offset     uint16 `json:"offset,omitempty"`
}

// The places where frames are captured.
const (
	AtPort     = "port"
	AtVXLAN    = "vxlan"
	AtUnderlay = "underlay"
)

// Sighting is a frame that was captured.
type Sighting struct {
	ID            uint32 `json:"id"`
	Where         string `json:"where"`
	Outgoing      bool   `json:"outgoing"`
	Unfinished    bool   `json:"unfinished,omitempty"`
	VNI           uint32 `json:"vni,omitempty"`           // on the underlay
	Length        int    `json:"length,omitempty"`        // of the IP packet on the underlay, in bytes
	WrongChecksum bool   `json:"wrongChecksum,omitempty"` // of UDP, on the underlay

	// NonMember is the packet's source, if the node accepts packets only from members and that is none.
	NonMember netip.Addr `json:"nonMember,omitzero"`
}

// Sent is the result of an order.
type Sent struct {
	ID    uint32 `json:"id"`
	Error string `json:"error,omitempty"`
}

// Message is a line of JSON from an endpoint. The first has its facts, which it sends as soon as it captures frames.
type Message struct {
	Facts    *Facts    `json:"facts,omitempty"`
	Sighting *Sighting `json:"sighting,omitempty"`
	Sent     *Sent     `json:"sent,omitempty"`
}

// Endpoint is a connection to the program that sends and captures frames on a spoke's node.
type Endpoint struct {
	Node     string
	Orders   io.Writer // takes Orders as lines of JSON
	Messages io.Reader // returns Messages as lines of JSON
}

// Hop is how far a frame got.
type Hop int

// The hops of a frame from one node to another. A frame within one node has only the first, the second and the last.
const (
	NotSent        Hop = iota
	SentFromBridge     // from the bridge of the sender's node
	LeftVXLAN          // the VXLAN of that node sent it
	LeftNode           // the underlay device of that node sent it
	ReachedNode        // the underlay device of the other node received it
	ReachedVXLAN       // the VXLAN of the other node received it
	Arrived            // it was sent to the pod
)

// FrameResult is a frame and how far it got.
type FrameResult struct {
	Kind          string
	Payload       int // bytes after Ethernet header and tags
	Tags          int
	Reached       Hop
	Error         string // why it was not sent
	Unfinished    bool   // it arrived with its checksum unfinished
	VNI           uint32 // of its packet on the underlay
	Length        int    // of its packet on the underlay, in bytes
	WrongChecksum bool   // its packet reached the other node with a wrong UDP checksum

	NonMember netip.Addr // the source of its packet, if the other node does not accept that as a member
}

// Path is the result of the frames in one direction.
type Path struct {
	From, To Facts
	Frames   []FrameResult
	// Largest is the longest payload without a tag that passed, in bytes; 0: none passed.
	Largest int
}

const (
	// replyTimeout is how long a frame may take.
	replyTimeout = time.Second
	// attempts is how often a frame is sent before it counts as lost.
	attempts = 2
)

// session is a running probe.
type session struct {
	messages chan incoming
	nextID   uint32
}

// incoming is a message of an endpoint, or the error that ended its messages.
type incoming struct {
	from int
	Message
	err error
}

// Run sends every kind of frame from one spoke to the other and back. When it returns, its goroutines may still read
// from the endpoints until those end.
func Run(ctx context.Context, a, b Endpoint) (there, back Path, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &session{messages: make(chan incoming), nextID: 1}
	facts, err := s.readFacts(ctx, a, b)
	if err != nil {
		return there, back, err
	}
	if there, err = s.testPath(ctx, 0, a, facts[0], facts[1]); err == nil {
		back, err = s.testPath(ctx, 1, b, facts[1], facts[0])
	}
	return there, back, err
}

// OneWay is Run without the way back; to needs no Orders.
func OneWay(ctx context.Context, from, to Endpoint) (Path, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &session{messages: make(chan incoming), nextID: 1}
	facts, err := s.readFacts(ctx, from, to)
	if err != nil {
		return Path{}, err
	}
	return s.testPath(ctx, 0, from, facts[0], facts[1])
}

// readFacts starts to read the endpoints' messages, until ctx ends, and returns their facts.
func (s *session) readFacts(ctx context.Context, endpoints ...Endpoint) ([]Facts, error) {
	for i, e := range endpoints {
		go s.read(ctx, i, e.Messages)
	}
	facts := make([]Facts, len(endpoints))
	for known := 0; known < len(facts); {
		m, err := s.next(ctx, nil)
		if err != nil {
			return nil, err
		}
		if m.Facts != nil {
			facts[m.from] = *m.Facts
			facts[m.from].Node = endpoints[m.from].Node
			known++
		}
	}
	return facts, nil
}

func (s *session) read(ctx context.Context, from int, r io.Reader) {
	lines := json.NewDecoder(r)
	for {
		m := incoming{from: from}
		m.err = lines.Decode(&m.Message)
		select {
		case s.messages <- m:
		case <-ctx.Done():
			return
		}
		if m.err != nil {
			return
		}
	}
}

// errTimeout says that no message came in time.
var errTimeout = errors.New("no message came in time")

// next returns the next message of any endpoint, or errTimeout when timeout fires.
func (s *session) next(ctx context.Context, timeout <-chan time.Time) (incoming, error) {
	select {
	case m := <-s.messages:
		if m.err != nil {
			return m, fmt.Errorf("the program on the node ended: %w", m.err)
		}
		return m, nil
	case <-timeout:
		return incoming{}, errTimeout
	case <-ctx.Done():
		return incoming{}, ctx.Err()
	}
}

// testPath sends the frames of one direction.
func (s *session) testPath(ctx context.Context, sender int, e Endpoint, from, to Facts) (Path, error) {
	p := Path{From: from, To: to}
	var err error
	if p.Frames, err = s.send(ctx, sender, e, catalog(sender, from.MTU, to.MAC)); err != nil {
		return p, err
	}
	if p.setLargest(); p.Largest == 0 || p.Largest >= min(from.MTU, to.MTU) {
		return p, nil
	}
	p.Largest, err = s.searchLargest(ctx, sender, e, p.Largest, from.MTU)
	return p, err
}

// searchLargest returns the largest payload that passes. low passes, high does not. It searches in steps first, and
// then byte by byte.
func (s *session) searchLargest(ctx context.Context, sender int, e Endpoint, low, high int) (int, error) {
	const steps = 32
	for high-low > 1 {
		step := max(1, (high-low)/steps)
		var frames []testFrame
		for size := low + step; size < high; size += step {
			frames = append(frames, frameOfSize(sender, size))
		}
		results, err := s.send(ctx, sender, e, frames)
		if err != nil {
			return low, err
		}
		for _, r := range results {
			if r.Reached < Arrived {
				high = r.Payload
				break
			}
			low = r.Payload
		}
	}
	return low, nil
}

// setLargest sets Largest to the longest payload of the flooded frames that passed.
func (p *Path) setLargest() {
	for _, f := range p.Frames {
		if f.Reached == Arrived && f.Tags == 0 && f.Kind != knownUnicast {
			p.Largest = max(p.Largest, f.Payload)
		}
	}
}

// send sends frames, and sends those that are lost again. It returns their results.
func (s *session) send(ctx context.Context, sender int, e Endpoint, frames []testFrame) ([]FrameResult, error) {
	results := make([]FrameResult, len(frames))
	for i, f := range frames {
		results[i] = f.FrameResult
	}
	for range attempts {
		if err := s.sendOnce(ctx, sender, e, frames, results); err != nil {
			return nil, err
		}
	}
	return results, nil
}

// sendOnce sends the frames that have not arrived yet, and waits for them.
func (s *session) sendOnce(
	ctx context.Context, sender int, e Endpoint, frames []testFrame, results []FrameResult,
) error {
	index := map[uint32]int{} // by ID
	var orders bytes.Buffer
	lines := json.NewEncoder(&orders)
	for i, f := range frames {
		if results[i].Reached == Arrived {
			continue
		}
		if err := lines.Encode(f.order(s.nextID)); err != nil {
			return err
		}
		index[s.nextID] = i
		s.nextID++
	}
	go func() { // the endpoint sends messages while it reads orders
		if _, err := e.Orders.Write(orders.Bytes()); err != nil {
			select {
			case s.messages <- incoming{from: sender, err: err}:
			case <-ctx.Done():
			}
		}
	}()
	return s.awaitResults(ctx, sender, index, results)
}

// awaitResults enters messages into the results until each frame of index has arrived or was not sent, or until
// replyTimeout after the last one was sent.
func (s *session) awaitResults(ctx context.Context, sender int, index map[uint32]int, results []FrameResult) error {
	unsent, missing := len(index), len(index)
	var timeout <-chan time.Time
	for missing > 0 {
		m, err := s.next(ctx, timeout)
		if errors.Is(err, errTimeout) {
			return nil
		}
		if err != nil {
			return err
		}
		switch {
		case m.Sent != nil:
			i, ok := index[m.Sent.ID]
			if !ok {
				continue
			}
			if unsent--; unsent == 0 {
				timeout = time.After(replyTimeout)
			}
			results[i].Error = m.Sent.Error
			if m.Sent.Error != "" {
				missing--
			} else {
				results[i].Reached = max(results[i].Reached, SentFromBridge)
			}
		case m.Sighting != nil:
			i, ok := index[m.Sighting.ID]
			if !ok {
				continue
			}
			if results[i].record(m.from == sender, *m.Sighting) {
				missing--
			}
		}
	}
	return nil
}

// record enters a sighting, and reports whether the frame arrived by it.
func (f *FrameResult) record(bySender bool, s Sighting) (arrived bool) {
	hop := f.Reached
	switch {
	case bySender && s.Outgoing && s.Where == AtVXLAN:
		hop = LeftVXLAN
	case bySender && s.Outgoing && s.Where == AtUnderlay:
		hop = LeftNode
	case !bySender && !s.Outgoing && s.Where == AtUnderlay:
		hop, f.WrongChecksum, f.NonMember = ReachedNode, s.WrongChecksum, s.NonMember
	case !bySender && !s.Outgoing && s.Where == AtVXLAN:
		hop = ReachedVXLAN
	case !bySender && s.Outgoing && s.Where == AtPort:
		hop, f.Unfinished = Arrived, s.Unfinished
	}
	if s.Where == AtUnderlay {
		f.VNI, f.Length = s.VNI, max(f.Length, s.Length)
	}
	before := f.Reached
	f.Reached = max(f.Reached, hop)
	return before < Arrived && f.Reached == Arrived
}
