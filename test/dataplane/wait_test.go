package dataplane

import (
	"testing"
	"time"
)

// eventually polls until so returns true, where no event says when.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	eventuallyWithin(t, daemonTimeout, what, so)
}

// eventuallyWithin polls for at most that time, first often and then less often.
func eventuallyWithin(t *testing.T, timeout time.Duration, what string, so func() bool) {
	t.Helper()
	const first, last = 2 * time.Millisecond, 50 * time.Millisecond
	deadline := time.Now().Add(timeout)
	for pause := first; !so(); pause = min(pause*3/2, last) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting for %s", what)
		}
		<-time.After(pause)
	}
}
