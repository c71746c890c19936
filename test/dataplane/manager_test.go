package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// managed is a node on which the daemon's manager runs.
type managed struct {
	node
	*lanmgr.Manager
	daemon *kernel.Node // that of the daemon's process
	stop   func()
}

// manage starts the daemon's manager on the node as a new process would: with a kernel.Node of its own. It ends with
// the test, or earlier by stop.
func (n node) manage(t *testing.T) managed {
	t.Helper()
	k := kernel.New(kernel.Paths{Run: n.Run, HostNetns: n.Path})
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	m := managed{node: n, Manager: lanmgr.New(k, n.CDI, log), daemon: k}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	for what, run := range map[string]func() error{
		"manager": func() error { return m.Run(ctx) },
		"watch":   func() error { return watch.New(k).Watch(ctx, m.Enqueue) },
	} {
		running.Go(func() {
			if err := run(); err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("%s of %s: %v", what, n.Name, err)
			}
		})
	}
	m.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		k.Close()
	})
	t.Cleanup(m.stop)
	return m
}

// runs sets what the node should have and returns when the node has all of it.
func (m managed) runs(t *testing.T, want ...segment.Segment) {
	t.Helper()
	m.Set(want)
	m.awaitReports(t, "the desired segments", func(reports []lanmgr.Report) bool {
		return len(reports) == len(want) && !slices.ContainsFunc(reports, func(r lanmgr.Report) bool {
			return !r.Built || r.Leaving || !slices.ContainsFunc(want, r.Segment.Equal)
		})
	})
}

// awaitReports returns when the manager's reports are as described.
func (m managed) awaitReports(t *testing.T, what string, fit func([]lanmgr.Report) bool) {
	t.Helper()
	deadline := time.After(daemonTimeout)
	for !fit(m.Reports()) {
		select {
		case <-m.Changed():
		case <-deadline:
			t.Fatalf("timed out waiting for %s on %s; reports are %+v", what, m.Name, m.Reports())
		}
	}
}

// awaitState returns when the segment on the node is as described, and how long that took. Not every change has an
// event of its own, so it polls.
func (n node) awaitState(t *testing.T, s segment.Segment, what string, fits func(segment.State) bool) time.Duration {
	t.Helper()
	began := time.Now()
	again := time.NewTicker(2 * time.Millisecond)
	defer again.Stop()
	for {
		have, err := n.kernel.Observe(t.Context(), s.Netns)
		if err != nil {
			t.Fatal(err)
		}
		if fits(have) {
			return time.Since(began)
		}
		if time.Since(began) > daemonTimeout {
			t.Fatalf("timed out waiting for %s on %s; %s is\n%s", what, n.Name, s.Netns, describe(have))
		}
		<-again.C
	}
}

func (n node) observe(t *testing.T, s segment.Segment) segment.State {
	t.Helper()
	have, err := n.kernel.Observe(t.Context(), s.Netns)
	if err != nil {
		t.Fatal(err)
	}
	return have
}

// describe returns a segment's state as text that is the same for two segments that behave the same: it has names in
// place of ifindexes, and nothing that k8slan did not make.
func describe(s segment.State) string {
	names := map[int]string{}
	for _, l := range s.Links {
		names[l.Index] = l.Name
	}
	lines := []string{fmt.Sprintf("netns %s exists=%t silent=%t", s.Netns, s.Exists, s.Silent)}
	if s.Record != nil {
		lines = append(lines, fmt.Sprintf("record %s spokes=%v", s.Record.LAN, s.Record.Spokes))
	}
	for _, l := range s.Links {
		slices.Sort(l.AltNames)
		lines = append(lines, fmt.Sprintf("%s %s %v mac=%s mtu=%d up=%t master=%s mask=%#x %+v %+v",
			l.Type, l.Name, l.AltNames, mac(l), l.MTU, l.Up, names[l.Master], l.ForwardMask, l.Bridge, l.VXLAN))
	}
	for _, c := range s.Claims() {
		lines = append(lines, "claim "+c.ID+" "+c.Alias())
	}
	slices.Sort(lines[1:])
	return strings.Join(lines, "\n")
}

// mac is the MAC address of a link where others see it; those of bridges, ports and VXLANs are random.
func mac(l segment.Link) string {
	if strings.HasSuffix(l.Name, "_p") {
		return l.MAC.String()
	}
	return "any"
}
