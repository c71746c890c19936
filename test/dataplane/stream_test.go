package dataplane

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/k8slan/k8slan/test/frames"
)

// rate is how many frames a stream sends per second.
const rate = 1000

// stream sends numbered frames from one host to another from its start until finish, and counts what arrives.
type stream struct {
	from, to *host
	stop     func() // ends the sending
	tasks    sync.WaitGroup

	mu      sync.Mutex
	counter frames.Counter
	err     error // why receiving ended before the last frame
}

// startStream starts a stream. The test ends it with expectAll or finish.
func startStream(t *testing.T, id uint32, from, to *host) *stream {
	t.Helper()
	sending, stop := context.WithCancel(context.Background())
	receiving, cancel := context.WithCancel(context.Background())
	s := &stream{from: from, to: to, stop: stop, counter: frames.Counter{ID: id}}
	s.tasks.Go(func() {
		if err := s.send(sending); err != nil {
			t.Errorf("stream %d: %v", id, err)
		}
		if s.complete() {
			cancel()
		}
		time.AfterFunc(frameTimeout, cancel)
	})
	s.tasks.Go(func() { s.receive(receiving) })
	t.Cleanup(func() { s.finish() }) // of a test that failed
	return s
}

// send sends at the rate until the context ends, and one frame at least.
func (s *stream) send(ctx context.Context) error {
	tick := time.NewTicker(time.Second / rate)
	defer tick.Stop()
	began := time.Now()
	sent := uint64(0)
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.counter.Total = sent
	}()
	for {
		// A late tick sends what the ticks before it missed, so that the rate holds on a busy machine.
		for due := 1 + uint64(time.Since(began)*rate/time.Second); sent < due; sent++ {
			if err := s.from.Send(frames.Stream(s.to.MAC, s.from.MAC, s.counter.ID, sent)); err != nil {
				return err
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// complete reports whether all that was sent has arrived.
func (s *stream) complete() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counter.Complete()
}

func (s *stream) receive(ctx context.Context) {
	for !s.complete() {
		frame, err := s.to.Receive(ctx)
		if err != nil {
			s.err = err
			return
		}
		s.mu.Lock()
		s.counter.Add(frame, time.Now())
		s.mu.Unlock()
	}
}

// finish ends the sending, waits for the frames that are under way, and returns the count.
func (s *stream) finish() frames.Tally {
	s.stop()
	s.tasks.Wait()
	return s.counter.Tally()
}

// expectAll ends the stream and expects every frame of it once.
func (s *stream) expectAll(t *testing.T) {
	t.Helper()
	if tally := s.finish(); tally.Lost != 0 || tally.Duplicates != 0 {
		t.Errorf("stream %d: %+v, %v; want every frame once", s.counter.ID, tally, s.err)
	}
}
