// Package path finds out which frames pass between two spokes of a LAN, and where the others are lost.
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

// Link is a link as a node has it.
type Link struct {
	Name    string `json:"name"`
	Up      bool   `json:"up"`
	Carrier bool   `json:"carrier"` // the kernel says it works: for a pod's port, that the pod's end is up, too
	MTU     int    `json:"mtu"`     // in bytes
}

// Facts are what the node of a spoke has of it.
type Facts struct {
	Node        string `json:"node,omitempty"`
	Spoke       string `json:"spoke"`
	SpokeOrPool string `json:"offer"`     // its name under spec.spokeOptions: the spoke's, or that of the pool whose port it is
	Pod         string `json:"pod"`       // namespace/name
	Interface   string `json:"interface"` // in the pod
	MAC         []byte `json:"mac"`       // of that interface

	Port     Link `json:"port"`     // carries the spoke's frames
	Bridge   Link `json:"bridge"`   // without a name where only the ends are heard, in the pods
	VXLAN    Link `json:"vxlan"`    // without a name where the node has none
	Underlay Link `json:"underlay"` // without a name where nothing can be heard on it

	MTU     int    `json:"mtu"` // of the LAN here, in bytes
	VNI     uint32 `json:"vni"`
	UDPPort uint16 `json:"udpPort"`

	Group   netip.Addr   `json:"group,omitzero"`    // multicast, that the VXLAN floods to; the zero Addr where it floods to remotes
	VTEP    netip.Addr   `json:"vtep,omitzero"`     // that its packets come from; the zero Addr where the node's routes choose it
	Remotes []netip.Addr `json:"remotes,omitempty"` // that the VXLAN floods to where it has no group
}

// Order is a frame to send from the node's bridge.
type Order struct {
	ID    uint32 `json:"id"`
	Bytes []byte `json:"bytes"` // from the destination address on
	// Unfinished leaves the checksum to hardware, as a pod's kernel does: it is of all bytes from Start on, and belongs at Offset
	// from there.
	Unfinished bool   `json:"unfinished,omitempty"`
	Start      uint16 `json:"start,omitempty"`
	Offset     uint16 `json:"offset,omitempty"`
}

// Where a frame was heard.
const (
	AtPort     = "port"
	AtVXLAN    = "vxlan"
	AtUnderlay = "underlay"
)

// Sighting is a frame that came by.
type Sighting struct {
	ID            uint32 `json:"id"`
	Where         string `json:"where"`
	Outgoing      bool   `json:"outgoing"`
	Unfinished    bool   `json:"unfinished,omitempty"`
	VNI           uint32 `json:"vni,omitempty"`           // on the underlay
	Length        int    `json:"length,omitempty"`        // of the IP packet on the underlay, in bytes
	WrongChecksum bool   `json:"wrongChecksum,omitempty"` // of UDP, on the underlay

	// NonMember is where the packet comes from, if the node hears the LAN's members alone and that is none.
	NonMember netip.Addr `json:"stranger,omitzero"`
}

// Sent says that an order was carried out, or why not.
type Sent struct {
	ID    uint32 `json:"id"`
	Error string `json:"error,omitempty"`
}

// Message is a line of JSON from a station: its facts first, once it hears.
type Message struct {
	Facts    *Facts    `json:"facts,omitempty"`
	Sighting *Sighting `json:"heard,omitempty"`
	Sent     *Sent     `json:"sent,omitempty"`
}

// Endpoint is the way to the program that sends and hears on a spoke's node.
type Endpoint struct {
	Node     string
	Orders   io.Writer // an Order for each line of JSON
	Messages io.Reader // Messages
}

// Hop is how far a frame got.
type Hop int

// The hops of a frame from one node to another. On one node there are the first and the last.
const (
	NotSent        Hop = iota
	SentFromBridge     // from the bridge of its node
	LeftVXLAN          // taken by the VXLAN there
	LeftNode           // out of the underlay device
	ReachedNode        // into the other node's
	ReachedVXLAN       // out of that node's VXLAN
	Arrived            // sent to the pod
)

// FrameResult is a frame and what became of it.
type FrameResult struct {
	Kind          string
	Payload       int // bytes behind Ethernet header and tags
	Tags          int
	Reached       Hop
	Error         string // why it was not sent
	Unfinished    bool   // it arrived with its checksum unfinished
	VNI           uint32 // it bore on the underlay
	Length        int    // of its packet on the underlay, in bytes
	WrongChecksum bool   // its packet came to the other node with a UDP checksum that is wrong

	NonMember netip.Addr // its packet came to the other node from there, which takes it for a stranger's
}

// Path is what became of the frames of one direction.
type Path struct {
	From, To Facts
	Frames   []FrameResult
	// Largest is the longest payload without a tag that passed, in bytes; 0 where none did.
	Largest int
}

const (
	// replyTimeout is how long a frame may take.
	replyTimeout = time.Second
	// attempts is how often a frame is sent before it counts as lost.
	attempts = 2
)

// session is a probe that runs.
type session struct {
	messages chan incoming
	nextID   uint32
}

// incoming is a message of a station, or its end.
type incoming struct {
	from int
	Message
	err error
}

// Run sends every kind of frame from one spoke to the other and back. It ends the stations' readers by ctx only where these end with it.
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

// OneWay is Run without the way back: to needs no Orders.
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

// readFacts begins to read what the stations say, until ctx ends, and returns their facts.
func (s *session) readFacts(ctx context.Context, stations ...Endpoint) ([]Facts, error) {
	for i, st := range stations {
		go s.read(ctx, i, st.Messages)
	}
	facts := make([]Facts, len(stations))
	for heard := 0; heard < len(facts); {
		m, err := s.next(ctx, nil)
		if err != nil {
			return nil, err
		}
		if m.Facts != nil {
			facts[m.from] = *m.Facts
			facts[m.from].Node = stations[m.from].Node
			heard++
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

// errTimeout says that nothing more came in time.
var errTimeout = errors.New("nothing came in time")

func (s *session) next(ctx context.Context, late <-chan time.Time) (incoming, error) {
	select {
	case m := <-s.messages:
		if m.err != nil {
			return m, fmt.Errorf("the program on the node ended: %w", m.err)
		}
		return m, nil
	case <-late:
		return incoming{}, errTimeout
	case <-ctx.Done():
		return incoming{}, ctx.Err()
	}
}

// testPath sends the frames of one direction.
func (s *session) testPath(ctx context.Context, sender int, st Endpoint, from, to Facts) (Path, error) {
	c := Path{From: from, To: to}
	mtu := min(from.MTU, to.MTU)
	var err error
	if c.Frames, err = s.send(ctx, sender, st, catalog(sender, from.MTU, to.MAC)); err != nil {
		return c, err
	}
	if c.setLargest(); c.Largest == 0 || c.Largest >= mtu {
		return c, nil
	}
	// Where is the limit? In steps first, then byte by byte.
	const steps = 32
	low, high := c.Largest, from.MTU
	for high-low > 1 {
		step := max(1, (high-low)/steps)
		var sizes []testFrame
		for size := low + step; size < high; size += step {
			sizes = append(sizes, frameOfSize(sender, size))
		}
		shots, err := s.send(ctx, sender, st, sizes)
		if err != nil {
			return c, err
		}
		for _, shot := range shots {
			if shot.Reached < Arrived {
				high = shot.Payload
				break
			}
			low = shot.Payload
		}
	}
	c.Largest = low
	return c, nil
}

// setLargest finds the longest payload that passed, of what goes everywhere.
func (c *Path) setLargest() {
	for _, shot := range c.Frames {
		if shot.Reached == Arrived && shot.Tags == 0 && shot.Kind != knownUnicast {
			c.Largest = max(c.Largest, shot.Payload)
		}
	}
}

// send sends frames, those that are lost once more, and says what became of them.
func (s *session) send(ctx context.Context, sender int, st Endpoint, rounds []testFrame) ([]FrameResult, error) {
	shots := make([]FrameResult, len(rounds))
	for i, r := range rounds {
		shots[i] = r.FrameResult
	}
	for range attempts {
		if err := s.sendOnce(ctx, sender, st, rounds, shots); err != nil {
			return nil, err
		}
	}
	return shots, nil
}

// sendOnce sends the frames that have not arrived yet and waits for them.
func (s *session) sendOnce(ctx context.Context, sender int, st Endpoint, rounds []testFrame, shots []FrameResult) error {
	number := map[uint32]int{}
	var orders bytes.Buffer
	lines := json.NewEncoder(&orders)
	for i, r := range rounds {
		if shots[i].Reached == Arrived {
			continue
		}
		if err := lines.Encode(r.order(s.nextID)); err != nil {
			return err
		}
		number[s.nextID] = i
		s.nextID++
	}
	go func() { // the station speaks meanwhile
		if _, err := st.Orders.Write(orders.Bytes()); err != nil {
			select {
			case s.messages <- incoming{from: sender, err: err}:
			case <-ctx.Done():
			}
		}
	}()
	unsent, missing := len(number), len(number)
	var late <-chan time.Time
	for missing > 0 {
		m, err := s.next(ctx, late)
		if errors.Is(err, errTimeout) {
			return nil
		}
		if err != nil {
			return err
		}
		switch {
		case m.Sent != nil:
			i, ok := number[m.Sent.ID]
			if !ok {
				continue
			}
			if unsent--; unsent == 0 {
				late = time.After(replyTimeout)
			}
			shots[i].Error = m.Sent.Error
			if m.Sent.Error != "" {
				missing--
			} else {
				shots[i].Reached = max(shots[i].Reached, SentFromBridge)
			}
		case m.Sighting != nil:
			i, ok := number[m.Sighting.ID]
			if !ok {
				continue
			}
			if shots[i].record(m.from == sender, *m.Sighting) {
				missing--
			}
		}
	}
	return nil
}

// record notes that a frame came by, and says whether it has arrived with that.
func (s *FrameResult) record(bySender bool, h Sighting) (arrived bool) {
	hop := s.Reached
	switch {
	case bySender && h.Outgoing && h.Where == AtVXLAN:
		hop = LeftVXLAN
	case bySender && h.Outgoing && h.Where == AtUnderlay:
		hop = LeftNode
	case !bySender && !h.Outgoing && h.Where == AtUnderlay:
		hop, s.WrongChecksum, s.NonMember = ReachedNode, h.WrongChecksum, h.NonMember
	case !bySender && !h.Outgoing && h.Where == AtVXLAN:
		hop = ReachedVXLAN
	case !bySender && h.Outgoing && h.Where == AtPort:
		hop, s.Unfinished = Arrived, h.Unfinished
	}
	if h.Where == AtUnderlay {
		s.VNI, s.Length = h.VNI, max(s.Length, h.Length)
	}
	before := s.Reached
	s.Reached = max(s.Reached, hop)
	return before < Arrived && s.Reached == Arrived
}
