package lanmgr

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// entry is what the manager knows of one segment. A segment that is neither wanted nor on the node has none.
type entry struct {
	netns  string
	want   *segment.Segment // nil: not wanted
	report *Report          // nil: the segment was not observed yet, or nothing of it was left

	seen       bool // report is newer than the last change of want; changes of tables alone do not count
	initial    bool // present or wanted at start-up, not yet observed
	dirty      bool // to be reconciled
	tablesOnly bool // of a dirty one: only remotes, FDB or neighbors changed

	notBefore time.Time // a rest after each observation, and a longer one after each failure
}

const (
	// sweepEvery is how often every segment is reconciled without a cause: the kernel reports no change of a sysctl.
	sweepEvery = time.Minute
	// minRest and maxRest limit how long a segment rests after it was reconciled, so that a burst of changes takes one
	// observation. Within the limits, it rests four times as long as that took. Repairs are promised within a second.
	minRest = 10 * time.Millisecond
	maxRest = 400 * time.Millisecond
	// leftovers is queued in place of a netns to list what an earlier run left.
	leftovers = ""
)

// Run works until ctx ends. The segments then stay on the node.
func (m *Manager) Run(ctx context.Context) error {
	context.AfterFunc(ctx, m.queue.ShutDown)
	// Before the first Set no segment is wanted, and every one would be torn down.
	select {
	case <-ctx.Done():
		return nil
	case <-m.started:
	}
	var sweeping sync.WaitGroup
	sweeping.Go(func() { m.sweep(ctx) })
	defer sweeping.Wait()
	m.listLeftovers()
	for {
		netns, ended := m.queue.Get()
		if ended || ctx.Err() != nil {
			return nil
		}
		if netns == leftovers {
			m.listLeftovers()
		} else {
			m.process(ctx, netns)
		}
		m.queue.Done(netns)
	}
}

// sweep queues every segment once a minute.
func (m *Manager) sweep(ctx context.Context) {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		m.mu.Lock()
		for _, e := range m.segments {
			m.enqueue(e)
		}
		m.mu.Unlock()
	}
}

// listLeftovers queues what an earlier run left on the node. Until it succeeds, it queues itself.
func (m *Manager) listLeftovers() {
	names, err := m.kernel.List()
	devices, cdiErr := cdi.List(m.cdiDir)
	if err := errors.Join(err, cdiErr); err != nil {
		m.log.Error("cannot list what an earlier run left on this node; trying again", "err", err)
		m.queue.AddAfter(leftovers, m.failures.When(leftovers))
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, netns := range names {
		m.enqueue(m.entry(netns))
	}
	for _, d := range devices {
		if d.Netns != "" {
			m.enqueue(m.entry(d.Netns))
		}
	}
	for _, e := range m.segments {
		e.initial = e.dirty
	}
	m.listed = true
	m.changed.Set()
}

// entry returns the entry of a netns, a new one if there is none. m.mu is held.
func (m *Manager) entry(netns string) *entry {
	e, ok := m.segments[netns]
	if !ok {
		e = &entry{netns: netns}
		m.segments[netns] = e
	}
	return e
}

// enqueue queues a segment, all of it, for when its rest is over. m.mu is held.
func (m *Manager) enqueue(e *entry) {
	e.dirty, e.tablesOnly = true, false
	m.queue.AddAfter(e.netns, m.rest(e))
}

// rest returns how long a segment has to wait; not more than 0 if it is due. m.mu is held.
func (m *Manager) rest(e *entry) time.Duration {
	due := e.notBefore
	if e.want == nil && m.pause.After(due) {
		due = m.pause
	}
	return time.Until(due)
}

// begin returns what to do for a segment that came out of the queue; ok is false if there is nothing to do now. The
// queue has no cancel, so a segment can come out when it is clean, or while it still rests.
func (m *Manager) begin(netns string) (t task, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.segments[netns]
	if !ok || !e.dirty {
		return task{}, false
	}
	if rest := m.rest(e); rest > 0 {
		m.queue.AddAfter(netns, rest)
		return task{}, false
	}
	t = task{netns: netns, want: e.want, last: e.report, tablesOnly: e.tablesOnly}
	e.dirty, e.tablesOnly = false, false
	return t, true
}

// retryLater queues a segment again, later with every failure. m.mu is held.
func (m *Manager) retryLater(e *entry) {
	e.notBefore = time.Now().Add(m.failures.When(e.netns))
	m.enqueue(e)
}

// restAfter has a segment rest that was reconciled. m.mu is held.
func (m *Manager) restAfter(e *entry, took time.Duration) {
	m.failures.Forget(e.netns)
	e.notBefore = time.Now().Add(min(max(minRest, 4*took), maxRest))
}
