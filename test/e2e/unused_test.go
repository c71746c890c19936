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

// A LAN without attachments sends nothing on its own bridge and nothing to the other nodes. With or without
// attachments, the nodes' own network namespaces have no link of it.
func TestUnusedLANIsSilentAndHidden(t *testing.T) {
	l := newLab(t)
	const port = 14789 // no other LAN has it
	before := map[string][]string{}
	frames := make(chan error, 16)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var listening sync.WaitGroup
	for _, m := range l.machines() {
		before[m.Name] = m.ownNetns().Links(t)
		cable := m.ownNetns().Open(t, l.underlay.device)
		listening.Go(func() {
			frames <- wantsSilence(ctx, cable, func(frame []byte) bool { return isVXLAN(frame, port) })
		})
	}
	l.lan("idle", 1060, []string{"idle-1", "idle-2"}, "vxlanPort: 14789")
	for _, m := range l.machines() {
		if added := m.addedLinks(before[m.Name]); len(added) > 0 {
			t.Errorf("%s has the new links %v of its own", m, added)
		}
		m.awaitLinks(l.namespace+".idle", "the whole segment, its VXLAN down", func(links linkList) bool {
			return links.up("br1060") && links.have("vx1060") && !links.up("vx1060") && links.up("idle-1_b") &&
				links.up("idle-1_p")
		})
		for _, link := range []string{"br1060", "idle-1_b", "idle-1_p", "idle-2_b", "idle-2_p"} {
			wire := m.lanNetns(l.namespace+".idle").Open(t, link)
			listening.Go(func() { frames <- wantsSilence(ctx, wire, func([]byte) bool { return true }) })
		}
	}
	// IPv6, bridges and VXLANs send their first frame within 8 s of their start, if ever.
	select {
	case err := <-frames:
		t.Errorf("an unused LAN sent a frame: %v", err)
	case <-time.After(9 * time.Second):
	}
	cancel()
	listening.Wait()

	// The cable carries frames once the LAN is used.
	cable := l.machine(worker1).ownNetns().Open(t, l.underlay.device)
	both := l.start(pod("idle-1", worker1, "idle-1"), pod("idle-2", worker2, "idle-2"))
	both[0].run("frames", "-i", both[0].link, "stream", "send", "--count", "1")
	if _, err := netlab.Await(cable, patience, func(frame []byte) bool { return isVXLAN(frame, port) }); err != nil {
		t.Errorf("a pod sent a frame, and no VXLAN packet left the node: %v", err)
	}
	for _, m := range l.machines() {
		if added := m.addedLinks(before[m.Name]); len(added) != 1 { // the other end of the pod's eth0
			t.Errorf("with a pod attached %s has the new links %v of its own, want only one, of the cluster's network",
				m, added)
		}
	}
}

// addedLinks returns the links that the node's own network namespace did not have before.
func (m machine) addedLinks(before []string) []string {
	m.Helper()
	return slices.DeleteFunc(m.ownNetns().Links(m.T), func(name string) bool { return slices.Contains(before, name) })
}

// wantsSilence listens until the context ends. Its error has the first frame that matters.
func wantsSilence(ctx context.Context, w netlab.Wire, matters func(frame []byte) bool) error {
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
