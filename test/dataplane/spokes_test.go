package dataplane

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
)

const (
	rate         = 1000 // frames per second
	streamLength = 3 * rate
)

// stream sends numbered frames at the rate, and returns what of them arrived when all have, or the last was sent long ago.
type stream struct {
	from, to *host
	counter  frames.Counter
	err      error
	done     sync.WaitGroup
}

// untilDone is a context that ends with the last of the streams.
func untilDone(streams ...*stream) context.Context {
	over, ended := context.WithCancel(context.Background())
	go func() {
		for _, s := range streams {
			s.done.Wait()
		}
		ended()
	}()
	return over
}

// startStream starts a stream of so many frames.
func startStream(t *testing.T, id uint32, length uint64, from, to *host) *stream {
	s := &stream{from: from, to: to, counter: frames.Counter{ID: id, Total: length}}
	ctx, cancel := context.WithCancel(context.Background())
	s.done.Go(func() {
		if err := s.send(); err != nil {
			t.Errorf("stream %d: %v", id, err)
		}
		time.AfterFunc(frameTimeout, cancel)
	})
	s.done.Go(func() { s.receive(ctx) })
	return s
}

func (s *stream) send() error {
	tick := time.NewTicker(time.Second / rate)
	defer tick.Stop()
	began := time.Now()
	for seq := uint64(0); seq < s.counter.Total; {
		<-tick.C
		// What a late tick missed is made up for, so that the rate holds on a busy machine.
		due := min(s.counter.Total, 1+uint64(time.Since(began)*rate/time.Second))
		for ; seq < due; seq++ {
			if err := s.from.Send(frames.Stream(s.to.MAC, s.from.MAC, s.counter.ID, seq)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *stream) receive(ctx context.Context) {
	for !s.counter.Complete() {
		frame, err := s.to.Receive(ctx)
		if err != nil {
			s.err = err
			return
		}
		s.counter.Add(frame, time.Now())
	}
}

// expectAll waits for the end of the stream and wants every frame of it.
func (s *stream) expectAll(t *testing.T) {
	t.Helper()
	s.done.Wait()
	if tally := s.counter.Tally(); tally.Lost != 0 || tally.Duplicates != 0 {
		t.Errorf("stream %d: %+v, %v; want every frame once", s.counter.ID, tally, s.err)
	}
}

func TestEditingSpokesLosesNoFrameOfTheOthers(t *testing.T) {
	a, b := twoNodes(t)
	ma, mb := a.manage(t), b.manage(t)
	base := lan("edited", 61, "left", "right", "near")
	ma.runs(t, a.withUnderlay(t, base))
	mb.runs(t, b.withUnderlay(t, base))
	left, near := a.attach(t, base, "left", segment.Veth), a.attach(t, base, "near", segment.Veth)
	right := b.attach(t, base, "right", segment.Veth)
	// Both ends are known before, so that no frame is told to more than one port.
	crosses(t, left, right, frames.Stream(nil, left.MAC, 9, 0))
	if _, err := next(near, frameTimeout); err != nil {
		t.Fatal(err)
	}
	streams := []*stream{
		startStream(t, 1, streamLength, left, right),
		startStream(t, 2, streamLength, right, near),
		startStream(t, 3, streamLength, near, left),
	}
	over := untilDone(streams...)
	rounds := 0
	for ; over.Err() == nil; rounds++ {
		s := base
		s.Generation = int64(rounds + 2)
		s.AllowedNamespaces = []string{fmt.Sprintf("namespace-%d", rounds)}
		for i := range 1 + rounds%8 {
			s.Spokes = append(s.Spokes, fmt.Sprintf("new%d", (rounds+i)%10))
		}
		ma.runs(t, a.withUnderlay(t, s))
		mb.runs(t, b.withUnderlay(t, s))
		pod := a.attach(t, s, s.Spokes[len(s.Spokes)-1], segment.Veth)
		a.release(t, pod)
	}
	for _, s := range streams {
		s.expectAll(t)
	}
	if rounds < 3 {
		t.Errorf("spokes were edited %d times while frames were sent, want more", rounds)
	}
	t.Logf("spokes were edited %d times on each node during %d frames each way", rounds, streamLength)
}

func TestRestartingTheDaemonLosesNoFrame(t *testing.T) {
	a, b := twoNodes(t)
	m := a.manage(t)
	s := a.withUnderlay(t, lan("restarted", 63, "left", "right"))
	m.runs(t, s)
	b.reconcile(t, b.withUnderlay(t, s))
	left, right := a.attach(t, s, "left", segment.Veth), b.attach(t, s, "right", segment.Veth)
	bothWays(t, left, right)
	there, back := startStream(t, 1, rate, left, right), startStream(t, 2, rate, right, left)
	for range 3 {
		m.stop()
		m = a.manage(t)
		m.runs(t, s)
	}
	there.expectAll(t)
	back.expectAll(t)
}

func TestWithdrawnSpokeStaysUntilItsPodIsGone(t *testing.T) {
	a, _ := twoNodes(t)
	m := a.manage(t)
	s := a.withUnderlay(t, lan("withdrawn", 62, "stays", "goes"))
	m.runs(t, s)
	stays, goes := a.attach(t, s, "stays", segment.Veth), a.attach(t, s, "goes", segment.Veth)
	s.Spokes = s.Spokes[:1]
	s.Generation++
	m.runs(t, s)
	crosses(t, stays, goes, frames.Stream(nil, stays.MAC, 1, 0))
	crosses(t, goes, stays, frames.Stream(nil, goes.MAC, 1, 1))
	a.release(t, goes)
	a.awaitState(t, s, "the withdrawn spoke to go", func(have segment.State) bool {
		_, ok := have.Link(segment.PortName("goes"))
		return !ok
	})
}
