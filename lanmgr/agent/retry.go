package agent

import (
	"log/slog"
	"time"
)

const (
	firstDelay = 100 * time.Millisecond
	maxDelay   = 10 * time.Second
)

// retry says when a failed task is due again, and logs a failure when it is news.
type retry struct {
	timer *time.Timer // fires when the task is due
	delay time.Duration
	last  string
}

func newRetry() *retry {
	timer := time.NewTimer(0)
	timer.Stop()
	return &retry{timer: timer, delay: firstDelay}
}

func (r *retry) failed(log *slog.Logger, message string, err error) {
	if text := errorText(err); text != r.last {
		log.Error(message, "err", err)
		r.last = text
	}
	r.timer.Reset(r.delay)
	r.delay = min(2*r.delay, maxDelay)
}

func (r *retry) succeeded() {
	r.timer.Stop()
	r.delay, r.last = firstDelay, ""
}

func (r *retry) stop() { r.timer.Stop() }

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
