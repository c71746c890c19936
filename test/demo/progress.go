package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// progress prints a line for each step. On a terminal the line counts the seconds and shows how far the step is;
// elsewhere there is a line when a step begins, each minute, and when it ends.
type progress struct {
	out      io.Writer
	terminal bool
	began    time.Time

	mu     sync.Mutex
	builds []build
}

// build is a component that is being built.
type build struct {
	name        string
	done, total int // packages
}

// building notes how many packages of a component are compiled.
func (p *progress) building(name string, done, total int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.builds {
		if p.builds[i].name == name {
			p.builds[i] = build{name, done, total}
			return
		}
	}
	p.builds = append(p.builds, build{name, done, total})
}

// underWay lists the components that are being built.
func (p *progress) underWay() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []string
	for _, b := range p.builds {
		switch {
		case b.total == 0:
			list = append(list, b.name+" downloading")
		case b.done < b.total:
			list = append(list, fmt.Sprintf("%s %d/%d", b.name, b.done, b.total))
		}
	}
	if len(list) == 0 {
		return ""
	}
	return ": " + strings.Join(list, ", ")
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

// counting shows a step while it lasts; the function stop ends that.
func (p *progress) counting(what string, began time.Time) (stop func()) {
	every, format := time.Minute, "%s\n"
	if p.terminal {
		every, format = 200*time.Millisecond, "\r\x1b[K%s"
	}
	ended := make(chan struct{})
	var showing sync.WaitGroup
	showing.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			line := fmt.Sprintf("doing  %6.1fs  %s%s", time.Since(began).Seconds(), what, p.underWay())
			fmt.Fprintf(p.out, format, p.fit(line))
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

// fit cuts a line to the width of the terminal, on which a line that wraps could not be replaced.
func (p *progress) fit(line string) string {
	if !p.terminal {
		return line
	}
	size, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 || len(line) < int(size.Col) {
		return line
	}
	return line[:size.Col-1]
}
