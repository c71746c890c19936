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

const header = 14 // of an Ethernet frame, in bytes

// endpoint is one end of a probe from node to node: it sends from the LAN's bridge and hears what passes the spoke's port, the VXLAN
// and the underlay.
type endpoint struct {
	facts    probe.Facts
	bridge   *packet.Socket
	captures map[string]*packet.Socket // by where they are
	accepts  func(netip.Addr) bool     // whether the node takes the LAN's packets from there

	mu  sync.Mutex // keeps messages apart
	out *json.Encoder
}

// Run sends what orders say, and says what comes by, until orders end.
func Run(ctx context.Context, host *kernel.Node, ns, spoke string, orders io.Reader, out io.Writer) error {
	s := endpoint{out: json.NewEncoder(out), captures: map[string]*packet.Socket{}}
	defer s.close()
	if err := s.open(ctx, host, ns, spoke); err != nil {
		return err
	}
	if err := s.write(probe.Message{Facts: &s.facts}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	for where, ear := range s.captures {
		g.Go(func() error { return s.capture(ctx, where, ear) })
	}
	ended := make(chan error, 1)
	go func() { ended <- s.sendFrames(host, ns, orders) }() // ends with its orders: a read cannot be broken off
	select {
	case err := <-ended:
		cancel()
		return errors.Join(err, g.Wait())
	case <-ctx.Done():
		return g.Wait()
	}
}

func (s *endpoint) close() {
	for _, ear := range s.captures {
		ear.Close()
	}
	if s.bridge != nil {
		s.bridge.Close()
	}
}

// open finds out what is there, and opens it.
func (s *endpoint) open(ctx context.Context, host *kernel.Node, ns, spoke string) error {
	state, err := host.Observe(ctx, ns)
	if err != nil {
		return err
	}
	port, ok := state.Carrier(spoke)
	if state.Record == nil || !ok {
		return fmt.Errorf("spoke %s is not on this node (no link of that name in network namespace %s)", spoke, ns)
	}
	want := *state.Record
	i := slices.IndexFunc(state.Claims(), func(c segment.Claim) bool { return c.Spoke == spoke })
	if i < 0 {
		return fmt.Errorf("spoke %s is attached to no pod on this node any more", spoke)
	}
	claim := state.Claims()[i]
	s.facts = probe.Facts{
		Spoke: spoke, SpokeOrPool: spoke, Pod: claim.PodNamespace + "/" + claim.Pod, Interface: claim.Interface, MAC: claim.MAC,
		MTU: want.MTU, VNI: want.VXLAN.VNI, UDPPort: want.VXLAN.Port,
	}
	if pool, _, ok := segment.PoolOf(spoke); ok {
		s.facts.SpokeOrPool = pool
	}
	// What the kernel has counts before what is wanted.
	vxlan, ok := state.Link(want.VXLAN.Name)
	if ok {
		s.facts.VNI, s.facts.UDPPort = vxlan.VXLAN.VNI, vxlan.VXLAN.Port
		s.facts.Group, s.facts.VTEP, s.facts.Remotes = vxlan.VXLAN.Group, vxlan.VXLAN.Local, vxlan.VXLAN.Remotes
	}
	ofProbe := sockfilter.Source(packet.Largest, [4]byte(probe.Source))
	err = host.InLANNetns(ns, func() (err error) {
		if s.bridge, err = packet.Open(want.Bridge, sockfilter.None()...); err != nil {
			return err
		}
		s.facts.Bridge = linkOf(s.bridge.Link)
		if s.captures[probe.AtPort], err = packet.Open(port.Name, ofProbe...); err != nil {
			return err
		}
		s.facts.Port = linkOf(s.captures[probe.AtPort].Link)
		if vxlan.Name == "" {
			return nil
		}
		if s.captures[probe.AtVXLAN], err = packet.Open(vxlan.Name, ofProbe...); err != nil {
			return err
		}
		s.facts.VXLAN = linkOf(s.captures[probe.AtVXLAN].Link)
		return nil
	})
	if err != nil || want.VXLAN.UnderlayIndex == 0 {
		return err
	}
	return host.InHostNetns(func() (err error) {
		if s.accepts, err = firewall.Accepts(s.facts.UDPPort, s.facts.VNI); err != nil {
			return err
		}
		ear, err := packet.Open(want.VXLAN.Underlay, sockfilter.UDPPort(packet.Largest, s.facts.UDPPort)...)
		if err != nil {
			return err
		}
		if len(ear.Link.HardwareAddr) != 6 { // a tunnel, whose packets look different
			return ear.Close()
		}
		s.captures[probe.AtUnderlay], s.facts.Underlay = ear, linkOf(ear.Link)
		return nil
	})
}

func linkOf(l net.Interface) probe.Link {
	return probe.Link{Name: l.Name, Up: l.Flags&net.FlagUp != 0, Carrier: l.Flags&net.FlagRunning != 0, MTU: l.MTU}
}

func (s *endpoint) write(m probe.Message) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.out.Encode(m); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}

// sendFrames carries out orders until they end.
func (s *endpoint) sendFrames(host *kernel.Node, ns string, orders io.Reader) error {
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
			err = host.InLANNetns(ns, func() error { return s.bridge.SendUnfinished(o.Bytes, o.Start, o.Offset) })
		} else {
			err = s.bridge.Send(o.Bytes)
		}
		sent := probe.Sent{ID: o.ID}
		if err != nil {
			sent.Error = err.Error()
		}
		if err := s.write(probe.Message{Sent: &sent}); err != nil {
			return err
		}
	}
}

// capture tells of the probe's frames that pass a link. One that goes down falls silent.
func (s *endpoint) capture(ctx context.Context, where string, ear *packet.Socket) error {
	for ctx.Err() == nil {
		f, err := ear.Receive(ctx)
		if err == nil {
			err = s.report(where, f)
		}
		if err != nil && ctx.Err() == nil && !errors.Is(err, unix.ENETDOWN) {
			return err
		}
	}
	return nil
}

// report tells of a frame, if it is the probe's.
func (s *endpoint) report(where string, f packet.Frame) error {
	id, ok := probe.Recognize(f.Bytes)
	if !ok {
		return nil
	}
	heard := probe.Sighting{ID: id, Where: where, Outgoing: f.Outgoing, Unfinished: f.Unfinished}
	if where == probe.AtUnderlay {
		heard.Length = len(f.Bytes) - header
		heard.VNI, heard.WrongChecksum = probe.Outer(f.Bytes)
		heard.WrongChecksum = heard.WrongChecksum && !f.Unfinished
		if from := probe.OuterSource(f.Bytes); !f.Outgoing && from.IsValid() && !s.accepts(from) {
			heard.NonMember = from
		}
	}
	return s.write(probe.Message{Sighting: &heard})
}
