package main

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"
)

// progress says what is being done, with a line a step: on a terminal it counts the seconds meanwhile, elsewhere it
// says so when a step begins and when it has ended.
type progress struct {
	out      io.Writer
	terminal bool
	began    time.Time
}

// step does one step and reports it.
func (p *progress) step(ctx context.Context, what string, do func(context.Context) error) error {
	began := time.Now()
	stop := p.counting(what, began)
	err := do(ctx)
	stop()
	mark := "done  "
	if err != nil {
		mark = "FAILED"
	}
	start := ""
	if p.terminal {
		start = "\r\x1b[K"
	}
	fmt.Fprintf(p.out, "%s%s %6.1fs  %s\n", start, mark, time.Since(began).Seconds(), what)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// counting shows a step while it lasts; what it returns ends that.
func (p *progress) counting(what string, began time.Time) (stop func()) {
	if !p.terminal {
		fmt.Fprintf(p.out, "doing          %s\n", what)
		return func() {}
	}
	ended := make(chan struct{})
	var showing sync.WaitGroup
	showing.Go(func() {
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			fmt.Fprintf(p.out, "\r\x1b[Kdoing  %6.1fs  %s", time.Since(began).Seconds(), what)
			select {
			case <-ended:
				return
			case <-tick.C:
			}
		}
	})
	return func() {
		close(ended)
		showing.Wait()
	}
}
