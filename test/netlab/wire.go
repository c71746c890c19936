package netlab

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/k8slan/k8slan/test/frames"
)

// A Wire sends frames to a LAN and receives them from it: it is a link of a pod, or the tap that a VM opens. One
// goroutine may send while another receives.
type Wire interface {
	// Send sends one frame, without its checksum.
	Send(frame []byte) error
	// Receive returns the next frame from another host; frames are queued from the opening on. It returns the context's
	// error when the context ends first.
	Receive(ctx context.Context) ([]byte, error)
	// Drain drops the frames that have come in so far.
	Drain() error
	// Close closes the wire before its test ends.
	Close() error
}

// Open opens a link of the namespace.
func (n Namespace) Open(t testing.TB, link string) Wire {
	t.Helper()
	var w packets
	err := n.Do(func() (err error) {
		if w.Sender, err = frames.NewSender(link); err != nil {
			return err
		}
		w.Receiver, err = frames.NewReceiver(link)
		return err
	})
	if err != nil {
		t.Fatalf("open %s in %s: %v", link, n.Path, err)
	}
	t.Cleanup(func() { _ = w.Close() }) // the test may have closed it
	return w
}

// packets is a link's pair of packet sockets.
type packets struct {
	*frames.Sender
	*frames.Receiver
}

// Close closes both sockets.
func (p packets) Close() error { return errors.Join(p.Sender.Close(), p.Receiver.Close()) }

// Await receives frames from a wire until one fits, drops the others, and fails if none fits within the time.
func Await(w Wire, within time.Duration, fits func(frame []byte) bool) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	for others := 0; ; others++ {
		frame, err := w.Receive(ctx)
		if err != nil {
			return nil, fmt.Errorf("after %d other frames: %w", others, err)
		}
		if fits(frame) {
			return frame, nil
		}
	}
}
