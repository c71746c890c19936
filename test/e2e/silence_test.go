package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/k8slan/k8slan/test/netlab"
)

// A LAN that nobody is attached to sends nothing into itself and nothing to the other nodes, and the nodes' own network
// namespaces show no link of it, attached or not.
func TestUnusedLANIsSilentAndHidden(t *testing.T) {
	l := newLab(t)
	const port = 14789 // the VXLANs of other LANs don't count
	before := map[string][]string{}
	heard := make(chan error, 16)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var listening sync.WaitGroup
	for _, m := range l.machines() {
		before[m.Name] = m.host().Links(t)
		cable := m.host().Open(t, l.underlay.device)
		listening.Go(func() { heard <- hush(ctx, cable, func(frame []byte) bool { return isVXLAN(frame, port) }) })
	}
	l.lan("idle", 1060, []string{"idle-1", "idle-2"}, "vxlanPort: 14789")
	for _, m := range l.machines() {
		if added := m.added(before[m.Name]); len(added) > 0 {
			t.Errorf("%s has the new links %v of its own", m, added)
		}
		m.awaitLinks(l.namespace+".idle", "the whole segment, its VXLAN down", func(links linkList) bool {
			return links.up("br1060") && links.have("vx1060") && !links.up("vx1060") && links.up("idle-1_b") && links.up("idle-1_p")
		})
		for _, link := range []string{"br1060", "idle-1_b", "idle-1_p", "idle-2_b", "idle-2_p"} {
			ear := m.inside(l.namespace+".idle").Open(t, link)
			listening.Go(func() { heard <- hush(ctx, ear, func([]byte) bool { return true }) })
		}
	}
	// IPv6, bridges and VXLANs speak within 8 s of their start, if at all.
	select {
	case err := <-heard:
		t.Errorf("somebody spoke in or for an unused LAN: %v", err)
	case <-time.After(9 * time.Second):
	}
	cancel()
	listening.Wait()

	// The same ears hear what they should once the LAN is in use.
	cable := l.machine(worker1).host().Open(t, l.underlay.device)
	both := l.start(pod("idle-1", worker1, "idle-1"), pod("idle-2", worker2, "idle-2"))
	both[0].run("frames", "-i", both[0].link, "stream", "send", "--count", "1")
	if _, err := netlab.Await(cable, patience, func(frame []byte) bool { return isVXLAN(frame, port) }); err != nil {
		t.Errorf("a pod spoke, and no VXLAN packet left the node: %v", err)
	}
	for _, m := range l.machines() {
		if added := m.added(before[m.Name]); len(added) != 1 { // the pod's eth0, which is not ours
			t.Errorf("with a pod attached %s has the new links %v of its own, want one, the cluster network's", m, added)
		}
	}
}

// added are the links that the node's own network namespace has more than before.
func (m machine) added(before []string) []string {
	m.Helper()
	return slices.DeleteFunc(m.host().Links(m.T), func(name string) bool { return slices.Contains(before, name) })
}

// hush listens until the context ends and says what it heard that matters.
func hush(ctx context.Context, w netlab.Wire, matters func(frame []byte) bool) error {
	for {
		frame, err := w.Receive(ctx)
		switch {
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
			return nil
		case err != nil:
			return err
		case matters(frame):
			return errors.New(hexed(frame))
		}
	}
}

// isVXLAN says whether a frame on the underlay is a packet over IPv6 to that UDP port.
func isVXLAN(frame []byte, port uint16) bool {
	const network, transport = 14, 14 + 40
	return len(frame) > transport+8 && binary.BigEndian.Uint16(frame[12:]) == 0x86dd && frame[network+6] == 17 &&
		binary.BigEndian.Uint16(frame[transport+2:]) == port
}
