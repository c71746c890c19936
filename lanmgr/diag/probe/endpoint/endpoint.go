// Package endpoint is the program that sends and captures a probe's frames on a spoke's node.
package endpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/diag/packet"
	"github.com/k8slan/k8slan/lanmgr/diag/probe"
	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/lanmgr/sockfilter"
)

const header = 14 // length of an Ethernet header, in bytes

// endpoint is one end of a probe between nodes. It sends from the LAN's bridge, and captures what passes the spoke's
// port, the VXLAN and the underlay.
type endpoint struct {
	facts    probe.Facts
	bridge   *packet.Socket
	captures map[string]*packet.Socket // by where they are
	accepts  func(netip.Addr) bool     // whether the node accepts the LAN's packets from a source

	mu  sync.Mutex // keeps messages apart
	out *json.Encoder
}

// Run sends the frames that orders contain, and writes which frames it captures, until orders end.
func Run(ctx context.Context, host *kernel.Node, ns, spoke string, orders io.Reader, out io.Writer) error {
	e := endpoint{out: json.NewEncoder(out), captures: map[string]*packet.Socket{}}
	defer e.close()
	if err := e.open(ctx, host, ns, spoke); err != nil {
		return err
	}
	if err := e.write(probe.Message{Facts: &e.facts}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	for where, socket := range e.captures {
		g.Go(func() error { return e.capture(ctx, where, socket) })
	}
	ended := make(chan error, 1)
	go func() { ended <- e.sendFrames(host, ns, orders) }() // it ends when orders end: a read cannot be interrupted
	select {
	case err := <-ended:
		cancel()
		return errors.Join(err, g.Wait())
	case <-ctx.Done():
		return g.Wait()
	}
}

func (e *endpoint) close() {
	for _, socket := range e.captures {
		socket.Close()
	}
	if e.bridge != nil {
		e.bridge.Close()
	}
}

// open observes the LAN, sets the facts and opens the sockets.
func (e *endpoint) open(ctx context.Context, host *kernel.Node, ns, spoke string) error {
	state, err := host.Observe(ctx, ns)
	if err != nil {
		return err
	}
	port, ok := state.Carrier(spoke)
	if state.Record == nil || !ok {
		return fmt.Errorf("spoke %s is not on this node (no link of that name in network namespace %s)", spoke, ns)
	}
	want := *state.Record
	claims := state.Claims()
	i := slices.IndexFunc(claims, func(c segment.Claim) bool { return c.Spoke == spoke })
	if i < 0 {
		return fmt.Errorf("spoke %s is attached to no pod on this node any more", spoke)
	}
	vxlan, _ := state.Link(want.VXLAN.Name)
	e.facts = factsOf(want, claims[i], vxlan)
	if err := host.InLANNetns(ns, func() error { return e.openLAN(want.Bridge, port.Name, vxlan.Name) }); err != nil {
		return err
	}
	if want.VXLAN.UnderlayIndex == 0 {
		return nil
	}
	return host.InHostNetns(func() error { return e.openUnderlay(want.VXLAN.Underlay) })
}

// factsOf returns the facts without links. What the kernel's VXLAN has overrides the desired state.
func factsOf(want segment.Segment, claim segment.Claim, vxlan segment.Link) probe.Facts {
	facts := probe.Facts{
		Spoke: claim.Spoke, SpokeOrPool: claim.Spoke, Pod: claim.PodNamespace + "/" + claim.Pod,
		Interface: claim.Interface, MAC: claim.MAC,
		MTU: want.MTU, VNI: want.VXLAN.VNI, UDPPort: want.VXLAN.Port,
	}
	if pool, _, ok := segment.PoolOf(claim.Spoke); ok {
		facts.SpokeOrPool = pool
	}
	if vxlan.Name != "" {
		facts.VNI, facts.UDPPort = vxlan.VXLAN.VNI, vxlan.VXLAN.Port
		facts.Group, facts.VTEP, facts.Remotes = vxlan.VXLAN.Group, vxlan.VXLAN.Local, vxlan.VXLAN.Remotes
	}
	return facts
}

// openLAN opens the sockets in the LAN's network namespace. vxlan is empty if there is none.
func (e *endpoint) openLAN(bridge, port, vxlan string) (err error) {
	if e.bridge, err = packet.Open(bridge, sockfilter.None()...); err != nil {
		return err
	}
	e.facts.Bridge = linkOf(e.bridge.Link)
	if e.facts.Port, err = e.openCapture(probe.AtPort, port); err != nil || vxlan == "" {
		return err
	}
	e.facts.VXLAN, err = e.openCapture(probe.AtVXLAN, vxlan)
	return err
}

// openCapture opens a socket that receives the probe's frames on a link.
func (e *endpoint) openCapture(where, link string) (probe.Link, error) {
	socket, err := packet.Open(link, sockfilter.Source(packet.Largest, [4]byte(probe.Source))...)
	if err != nil {
		return probe.Link{}, err
	}
	e.captures[where] = socket
	return linkOf(socket.Link), nil
}

// openUnderlay opens the socket on the underlay device, in the node's own network namespace.
func (e *endpoint) openUnderlay(device string) (err error) {
	if e.accepts, err = firewall.Accepts(e.facts.UDPPort, e.facts.VNI); err != nil {
		return err
	}
	socket, err := packet.Open(device, sockfilter.UDPPort(packet.Largest, e.facts.UDPPort)...)
	if err != nil {
		return err
	}
	if len(socket.Link.HardwareAddr) != 6 { // a tunnel, whose packets have no Ethernet header
		return socket.Close()
	}
	e.captures[probe.AtUnderlay], e.facts.Underlay = socket, linkOf(socket.Link)
	return nil
}

func linkOf(l net.Interface) probe.Link {
	return probe.Link{Name: l.Name, Up: l.Flags&net.FlagUp != 0, Carrier: l.Flags&net.FlagRunning != 0, MTU: l.MTU}
}

func (e *endpoint) write(m probe.Message) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.out.Encode(m); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}

// sendFrames carries out orders until they end.
func (e *endpoint) sendFrames(host *kernel.Node, ns string, orders io.Reader) error {
	lines := json.NewDecoder(orders)
	for {
		var o probe.Order
		err := lines.Decode(&o)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read an order: %w", err)
		}
		if o.Unfinished {
			err = host.InLANNetns(ns, func() error { return e.bridge.SendUnfinished(o.Bytes, o.Start, o.Offset) })
		} else {
			err = e.bridge.Send(o.Bytes)
		}
		sent := probe.Sent{ID: o.ID}
		if err != nil {
			sent.Error = err.Error()
		}
		if err := e.write(probe.Message{Sent: &sent}); err != nil {
			return err
		}
	}
}

// capture reports the probe's frames that pass a link, until ctx ends. A link that is set down is not an error.
func (e *endpoint) capture(ctx context.Context, where string, socket *packet.Socket) error {
	for ctx.Err() == nil {
		f, err := socket.Receive(ctx)
		if err == nil {
			err = e.report(where, f)
		}
		if err != nil && ctx.Err() == nil && !errors.Is(err, unix.ENETDOWN) {
			return err
		}
	}
	return nil
}

// report writes a message if the frame belongs to a probe.
func (e *endpoint) report(where string, f packet.Frame) error {
	id, ok := probe.Recognize(f.Bytes)
	if !ok {
		return nil
	}
	s := probe.Sighting{ID: id, Where: where, Outgoing: f.Outgoing, Unfinished: f.Unfinished}
	if where == probe.AtUnderlay {
		s.Length = len(f.Bytes) - header
		s.VNI, s.WrongChecksum = probe.Outer(f.Bytes)
		s.WrongChecksum = s.WrongChecksum && !f.Unfinished
		if from := probe.OuterSource(f.Bytes); !f.Outgoing && from.IsValid() && !e.accepts(from) {
			s.NonMember = from
		}
	}
	return e.write(probe.Message{Sighting: &s})
}
