// Package retry repeats work that failed, with growing delays, and logs each failure once.
package retry

import (
	"context"
	"log/slog"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
)

// Default doubles from 50 ms to at most 15 s.
var Default = wait.Backoff{Duration: 50 * time.Millisecond, Factor: 2, Steps: 64, Cap: 15 * time.Second}

// Timer says when work that failed is due again. It belongs to one goroutine.
type Timer struct {
	// C receives when the work is due.
	C <-chan time.Time

	timer *time.Timer
	start wait.Backoff
	next  wait.Backoff
	last  string // the text of the last failure that was logged
}

// NewTimer returns a timer that is due at once. Stop it when it is no longer needed.
func NewTimer(b wait.Backoff) *Timer {
	timer := time.NewTimer(0)
	return &Timer{C: timer.C, timer: timer, start: b, next: b}
}

// Failed sets the timer to the next delay. It reports whether the failure differs from the last one, and so is worth a
// log line.
func (t *Timer) Failed(err error) (isNew bool) {
	t.timer.Reset(t.next.Step())
	isNew = err.Error() != t.last
	t.last = err.Error()
	return isNew
}

// Succeeded stops the timer and begins with the first delay again.
func (t *Timer) Succeeded() {
	t.timer.Stop()
	t.next, t.last = t.start, ""
}

// Stop stops the timer.
func (t *Timer) Stop() { t.timer.Stop() }

// Loop calls work again and again until ctx ends. After an error it logs message and waits; after success it calls work
// at once. Work may call succeeded while it goes on, so that its next failure counts as the first.
func Loop(
	ctx context.Context, b wait.Backoff, log *slog.Logger, message string,
	work func(ctx context.Context, succeeded func()) error,
) {
	t := NewTimer(b)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		for {
			err := work(ctx, t.Succeeded)
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				t.Succeeded()
				continue
			}
			if t.Failed(err) {
				log.Error(message, "err", err)
			}
			break
		}
	}
}

// Pause waits for d, or until ctx ends, and reports whether it waited for all of d.
func Pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
