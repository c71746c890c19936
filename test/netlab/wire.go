package netlab

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/k8slan/k8slan/test/frames"
)

// A Wire is where a test puts frames in and takes them out: a link of a pod, or the tap that a VM opens. One goroutine
// may send while another receives.
type Wire interface {
	// Send puts one frame in, without its checksum.
	Send(frame []byte) error
	// Receive takes out the next frame that came in from elsewhere; frames wait for it from the opening on. It returns
	// the context's error when that ends first.
	Receive(ctx context.Context) ([]byte, error)
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

// Close closes both.
func (p packets) Close() error { return errors.Join(p.Sender.Close(), p.Receiver.Close()) }

// Await takes frames out of a wire until one fits, drops the others, and says so if none came within the time.
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
