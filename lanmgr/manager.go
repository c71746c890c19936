// Package lanmgr gives a node the segments that it should have, and keeps them so.
package lanmgr

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/client-go/util/workqueue"

	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/notify"
	"github.com/k8slan/k8slan/lanmgr/retry"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Kernel is what the manager needs of a node's kernel.
type Kernel interface {
	// List returns the netns of each segment of which the node has any part.
	List() ([]string, error)
	// Observe reads the state of a segment.
	Observe(ctx context.Context, netns string) (segment.State, error)
	// Reconcile locks a segment, observes it and applies what decide returns. It returns the operations that it
	// applied.
	Reconcile(ctx context.Context, netns string, decide func(segment.State) []segment.Op) ([]segment.Op, error)
	// Apply locks a segment and applies operations to it without observing it.
	Apply(ctx context.Context, netns string, ops []segment.Op) error
	// Release ends a claim. It succeeds if there is no such claim.
	Release(ctx context.Context, netns, spoke, claimID string) error
}

// Report is the state of one segment after it was last reconciled.
type Report struct {
	Segment  segment.Segment // as wanted or, if it is leaving, as recorded
	Leaving  bool            // no longer wanted, or another LAN wants its netns: it stays until its last claim ends
	Unwanted []string        // spokes that are no longer wanted but still claimed
	Built    bool            // the node has all of it
	Err      error           // why not
	Claims   []segment.Claim
	Learned  int // number of MACs that the bridge has learned; -1: not known
	Remotes  int // number of remotes of the VXLAN; -1: it has a group, or the number is not known
}

// Observation is what came of reconciling one segment once.
type Observation struct {
	Took   time.Duration
	Done   []segment.Op
	Repair bool // the segment was complete, and neither its desired state nor its claims have changed since
	Err    error
}

// Manager writes the segments of a node. It works on one segment at a time: the kernel has one lock for the links of
// all namespaces (RTNL), so more goroutines would not be faster, and others can have the lock in between.
type Manager struct {
	// OnObserve receives every observation; it may be nil. Set it before Run.
	OnObserve func(Observation)

	kernel  Kernel
	cdiDir  string
	log     *slog.Logger
	changed notify.Flag

	started  chan struct{} // closed by the first Set
	start    func()        // closes started
	queue    workqueue.TypedDelayingInterface[string]
	failures workqueue.TypedRateLimiter[string]

	mu       sync.Mutex
	segments map[string]*entry // by netns
	listed   bool              // segments has what an earlier run left
	pause    time.Time         // no segment is torn down before
}

// New returns a manager that does nothing before its first Set and Run. It removes CDI devices in cdiDir that no claim
// needs any longer.
func New(k Kernel, cdiDir string, log *slog.Logger) *Manager {
	delays := retry.Default
	m := &Manager{
		kernel: k, cdiDir: cdiDir, log: log, changed: notify.New(),
		started:  make(chan struct{}),
		queue:    workqueue.NewTypedDelayingQueue[string](),
		failures: workqueue.NewTypedItemExponentialFailureRateLimiter[string](delays.Duration, delays.Cap),
		segments: map[string]*entry{},
	}
	m.start = sync.OnceFunc(func() { close(m.started) })
	return m
}

// Set replaces the desired state of the node. The first Set also decides which segments of an earlier run stay.
func (m *Manager) Set(want []segment.Segment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	wanted := make(map[string]bool, len(want))
	for _, s := range want {
		wanted[s.Netns] = true
		if e := m.entry(s.Netns); e.want == nil || !e.want.Equal(s) {
			m.setWant(e, s)
		}
	}
	for netns, e := range m.segments {
		if e.want != nil && !wanted[netns] {
			e.want, e.seen = nil, false
			m.enqueue(e)
		}
	}
	m.start()
}

// setWant records a new desired state of a segment and queues the segment without a rest: earlier failures were the old
// state's. m.mu is held.
func (m *Manager) setWant(e *entry, want segment.Segment) {
	tablesOnly := (e.tablesOnly || !e.dirty) && e.report != nil && onlyTablesDiffer(*e.report, want)
	e.want, e.notBefore = &want, time.Time{}
	m.failures.Forget(e.netns)
	m.enqueue(e)
	e.tablesOnly = tablesOnly
	if !tablesOnly {
		e.seen = false
	}
}

// Enqueue has a segment reconciled because it may have changed.
func (m *Manager) Enqueue(netns string) {
	if netns == "" {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.enqueue(m.entry(netns))
}

// Release ends the claim of a pod that kubelet no longer has. As the CNI plugin's DEL does, it removes the CDI device
// first, so that there is no device without a claim.
func (m *Manager) Release(ctx context.Context, netns string, claim segment.Claim) error {
	if err := cdi.Remove(m.cdiDir, claim.Spoke, claim.ID); err != nil {
		return err
	}
	defer m.Enqueue(netns)
	return m.kernel.Release(ctx, netns, claim.Spoke, claim.ID)
}

// Changed receives when reports may have changed since the last receive.
func (m *Manager) Changed() <-chan struct{} { return m.changed }

// Reports returns the reports of all segments that are wanted or on the node, sorted by netns.
func (m *Manager) Reports() []Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	var reports []Report
	for _, e := range m.segments {
		if e.report != nil {
			reports = append(reports, *e.report)
		}
	}
	slices.SortFunc(reports, func(a, b Report) int { return strings.Compare(a.Segment.Netns, b.Segment.Netns) })
	return reports
}

// Observed reports whether every segment that was wanted or on the node at start-up has been observed. Before that, a
// missing report means nothing.
func (m *Manager) Observed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.listed {
		return false
	}
	for _, e := range m.segments {
		if e.initial {
			return false
		}
	}
	return true
}

// Removed reports whether the node has no part left of a LAN that it should not have. It is false until the netns was
// observed after the last change of its desired state. A removed LAN stays removed until a Set wants it again: an
// attachment needs the record, which was removed first.
func (m *Manager) Removed(lan segment.LAN, netns string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.segments[netns]
	switch {
	case !m.listed:
		return false
	case !ok:
		return true
	case !e.seen || e.want != nil && e.want.LAN == lan:
		return false
	case e.report == nil:
		return true
	default:
		recorded := e.report.Segment.LAN // without a UID, the segment has no record and may be anyone's
		return recorded.UID != "" && recorded != lan
	}
}
