package retry_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/k8slan/k8slan/lanmgr/retry"
)

func TestDelaysDoubleUpToTheCapAndStartAgainAfterSuccess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		timer := retry.NewTimer(wait.Backoff{Duration: time.Second, Factor: 2, Steps: 64, Cap: 5 * time.Second})
		defer timer.Stop()
		<-timer.C // due at once
		delay := func() time.Duration {
			timer.Failed(errors.New("no"))
			began := time.Now()
			<-timer.C
			return time.Since(began)
		}
		for i, want := range []time.Duration{1, 2, 4, 5, 5, 5} {
			if got := delay(); got != want*time.Second {
				t.Errorf("delay %d is %v, want %v s", i, got, want)
			}
		}
		timer.Succeeded()
		if got := delay(); got != time.Second {
			t.Errorf("the first delay after success is %v, want 1s", got)
		}
	})
}

func TestJitterLengthensEveryDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const jitter = 1
		b := wait.Backoff{Duration: time.Second, Factor: 2, Jitter: jitter, Steps: 64, Cap: 2 * time.Second}
		timer := retry.NewTimer(b)
		defer timer.Stop()
		<-timer.C // due at once
		different := map[time.Duration]bool{}
		for i := range 20 {
			timer.Failed(errors.New("no"))
			start := time.Now()
			<-timer.C
			got, base := time.Since(start), time.Second*time.Duration(min(i+1, 2))
			if got < base || got > base*(1+jitter) {
				t.Errorf("delay %d is %v, want %v to %v", i, got, base, base*(1+jitter))
			}
			different[got] = true
		}
		if len(different) < 10 {
			t.Errorf("20 delays have only %d values", len(different))
		}
	})
}

func TestLoopLogsAFailureOnceAndGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var out bytes.Buffer
		calls := 0
		log := slog.New(slog.NewTextHandler(&out, nil))
		retry.Loop(ctx, retry.Default, log, "cannot work, trying again", func(context.Context, func()) error {
			calls++
			switch {
			case calls <= 3:
				return errors.New("first cause")
			case calls <= 5:
				return errors.New("second cause")
			case calls == 8:
				cancel()
			}
			return nil
		})
		if calls != 8 {
			t.Errorf("the work was called %d times, want 8", calls)
		}
		for text, want := range map[string]int{"first cause": 1, "second cause": 1} {
			if got := strings.Count(out.String(), text); got != want {
				t.Errorf("%q was logged %d times, want %d:\n%s", text, got, want, out.String())
			}
		}
	})
}
