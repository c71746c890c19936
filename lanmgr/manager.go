// Package lanmgr makes a node have the segments it is told to have, and keeps them so.
package lanmgr

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Kernel is what the manager needs of a node.
type Kernel interface {
	// List names the segments that are on the node in whole or in part.
	List() ([]string, error)
	// Observe reads a segment as it is.
	Observe(ctx context.Context, netns string) (segment.State, error)
	// Reconcile observes a segment while nobody else changes it, does what decide says, and returns what was done.
	Reconcile(ctx context.Context, netns string, decide func(segment.State) []segment.Op) ([]segment.Op, error)
	// Apply does operations on a segment while nobody else changes it, without a look at it before.
	Apply(ctx context.Context, netns string, ops []segment.Op) error
	// Release ends a claim; one that is not there is no error.
	Release(ctx context.Context, netns, spoke, claimID string) error
}

// Report is what became of one segment.
type Report struct {
	Segment   segment.Segment // as wanted or, of one that is leaving, as recorded
	Leaving   bool            // not wanted any more, or wanted by another LAN: stays until its last claim ends
	Withdrawn []string        // spokes that are not wanted any more but still claimed
	Built     bool            // all of it stands
	Err       error           // why it does not
	Claims    []segment.Claim
	Learned   int // addresses that the bridge has learnt; -1 where that is not known
	Remotes   int // to which the VXLAN sends what is flooded, one by one; -1 where it has a group, or none is known
}

// Observation is one look at a segment and what was done about it.
type Observation struct {
	Took   time.Duration
	Done   []segment.Op
	Repair bool // it stood, and neither what is wanted nor who is attached has changed since: somebody else changed it
	Err    error
}

// Manager is the one long-lived writer of LAN state on a node. It works on one segment at a time: the kernel has one
// lock for all of them (RTNL), so more hands would not be faster, and others are let in between.
type Manager struct {
	// OnObserve is told of every look; nil: nobody is. It is set before Run.
	OnObserve func(Observation)

	kernel  Kernel
	cdiDir  string
	log     *slog.Logger
	poked   chan struct{}
	changed chan struct{}

	mu      sync.Mutex
	want    map[string]segment.Segment // by netns
	started bool                       // Set was called
	listed  bool                       // what an earlier run has left was looked for
	first   map[string]bool            // what was wanted or here then and was not looked at yet
	dirty   map[string]bool
	told    map[string]bool // of those that are dirty: only what the VXLAN is told has changed
	unseen  map[string]bool // not looked at since it was said what is wanted there
	at      string          // is being looked at
	last    string          // was looked at last, or is
	retry   map[string]*backoff
	reports map[string]Report
	pause   time.Time // until then no further segment is taken away
}

// New returns a manager that does nothing until its first Set and Run. It removes the CDI devices in cdiDir of pods
// that have gone without a word.
func New(k Kernel, cdiDir string, log *slog.Logger) *Manager {
	return &Manager{
		kernel: k, cdiDir: cdiDir, log: log,
		poked: make(chan struct{}, 1), changed: make(chan struct{}, 1),
		want: map[string]segment.Segment{}, dirty: map[string]bool{}, told: map[string]bool{}, unseen: map[string]bool{}, retry: map[string]*backoff{}, reports: map[string]Report{},
	}
}

// Set says which segments the node should have; it replaces what was said before. The first Set also decides over
// what an earlier run has left.
func (m *Manager) Set(want []segment.Segment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := make(map[string]segment.Segment, len(want))
	for _, s := range want {
		next[s.Netns] = s
		if old, ok := m.want[s.Netns]; !ok || !old.Equal(s) {
			m.wish(s)
		}
	}
	for name := range m.want {
		if _, ok := next[name]; !ok {
			m.dirty[name], m.unseen[name] = true, true
		}
	}
	m.want = next
	if !m.started {
		m.started = true
		m.dirty[""] = true // look for what an earlier run has left
	}
	signal(m.poked)
}

// wish notes that something else is wanted of a segment; m.mu is held.
func (m *Manager) wish(s segment.Segment) {
	delete(m.retry, s.Netns) // what failed was the old wish
	r, had := m.reports[s.Netns]
	if had && canBeTold(r, s) && (!m.dirty[s.Netns] || m.told[s.Netns]) {
		m.dirty[s.Netns], m.told[s.Netns] = true, true
		return
	}
	m.dirty[s.Netns], m.unseen[s.Netns] = true, true
	delete(m.told, s.Netns)
}

// canBeTold says whether a segment stands as it was wished, and the next wish differs in nothing but what its VXLAN is told.
func canBeTold(r Report, want segment.Segment) bool {
	return r.Built && r.Err == nil && !r.Leaving && segment.OnlyTablesDiffer(r.Segment, want)
}

// Enqueue says that a segment may have changed.
func (m *Manager) Enqueue(netns string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if netns == "" {
		return
	}
	m.dirty[netns] = true
	delete(m.told, netns)
	signal(m.poked)
}

// Release ends the claim of a pod that is gone, in the order of the CNI plugin's DEL: the device's name first, so that it
// never means a device that is gone.
func (m *Manager) Release(ctx context.Context, netns string, claim segment.Claim) error {
	if err := cdi.Remove(m.cdiDir, claim.Spoke, claim.ID); err != nil {
		return err
	}
	defer m.Enqueue(netns)
	return m.kernel.Release(ctx, netns, claim.Spoke, claim.ID)
}

// Changed has a value whenever a report may have changed since the last one was taken from it.
func (m *Manager) Changed() <-chan struct{} { return m.changed }

// Reports are those of all segments that are wanted or here, sorted by netns.
func (m *Manager) Reports() []Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.SortedFunc(maps.Values(m.reports), func(a, b Report) int {
		if a.Segment.Netns < b.Segment.Netns {
			return -1
		}
		return 1
	})
}

// Observed says whether every segment that was wanted or here at the start was looked at once: before, no report says nothing.
func (m *Manager) Observed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.listed && len(m.first) == 0
}

// Removed says whether the node has nothing left of a LAN that it should not have: it was looked for under the name of its netns,
// with the segment's lock where there was anything, after the last Set; false where that is not known yet. Without a Set that
// wants it again it stays gone: an attachment needs the record, which went first.
func (m *Manager) Removed(lan segment.LAN, netns string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.listed || m.unseen[netns] || m.at == netns || m.want[netns].LAN == lan {
		return false
	}
	r, here := m.reports[netns]
	return !here || r.Segment.LAN.UID != "" && r.Segment.LAN != lan
}

// Run works until the context ends. Segments stay as they are then.
func (m *Manager) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.poked:
		case <-timer.C:
		case <-sweep.C:
			m.pokeAll()
		}
		for {
			name, wait, ok := m.next()
			if !ok {
				timer.Reset(wait)
				break
			}
			if ctx.Err() != nil {
				return nil
			}
			if name == "" {
				m.findOld()
				continue
			}
			m.work(ctx, name)
		}
	}
}

// sweepEvery is how often every segment is looked at without a cause: the kernel tells of no change to a sysctl.
const sweepEvery = time.Minute

func (m *Manager) pokeAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.reports {
		m.dirty[name] = true
		delete(m.told, name)
	}
}

// next takes a segment that needs a look, or says how long there is nothing to do.
func (m *Manager) next() (name string, wait time.Duration, ok bool) {
	const longest = time.Hour
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.started {
		return "", longest, false
	}
	now, wait := time.Now(), longest
	for n := range m.dirty {
		if b, resting := m.retry[n]; resting && b.rest.After(now) {
			wait = min(wait, b.rest.Sub(now))
		} else if _, wanted := m.want[n]; n != "" && !wanted && m.pause.After(now) {
			wait = min(wait, m.pause.Sub(now))
		} else if !ok || m.before(n, name) {
			name, ok = n, true
		}
	}
	if ok {
		delete(m.dirty, name)
		m.last = name
		return name, 0, true
	}
	return "", max(wait, time.Millisecond), false
}

// before says which of two segments that need a look has it first: one after the last one, for one that changes all the
// time must not keep the others waiting. What an earlier run has left comes before all.
func (m *Manager) before(a, b string) bool {
	switch {
	case a == "" || b == "":
		return a == ""
	case (a > m.last) != (b > m.last):
		return a > m.last
	default:
		return a < b
	}
}

// findOld marks what an earlier run has left.
func (m *Manager) findOld() {
	names, err := m.kernel.List()
	devices, cdiErr := cdi.List(m.cdiDir)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := errors.Join(err, cdiErr); err != nil {
		m.log.Error("cannot list what an earlier run left on this node; trying again", "err", err)
		m.again("", time.Now())
		return
	}
	m.listed = true
	for _, name := range names {
		m.dirty[name], m.unseen[name] = true, true
	}
	for _, d := range devices {
		if d.Netns != "" {
			m.dirty[d.Netns] = true
		}
	}
	m.first = maps.Clone(m.dirty)
	signal(m.changed)
}

// work brings one segment in order and reports.
func (m *Manager) work(ctx context.Context, name string) {
	m.mu.Lock()
	want, wanted := m.want[name]
	old, had := m.reports[name]
	told := m.told[name]
	delete(m.told, name)
	if told {
		m.mu.Unlock()
		if m.tell(ctx, name, want, old) {
			return
		}
		m.mu.Lock()
	}
	m.at = name
	delete(m.unseen, name)
	m.mu.Unlock()
	began := time.Now()
	stale, err := m.devicesBefore(name, old, had)
	report, done, known, gone := m.reconcile(ctx, name, want, wanted, old)
	if ctx.Err() != nil {
		return
	}
	if report.Err == nil {
		report.Err = err
	}
	if report.Err == nil {
		report.Err = m.removeDevices(stale, report.Claims)
	}
	if m.OnObserve != nil {
		stood := wanted && old.Built && !old.Leaving && old.Segment.Equal(want) && sameClaims(old.Claims, report.Claims)
		m.OnObserve(Observation{Took: time.Since(began), Done: done, Repair: stood && !built(done), Err: report.Err})
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at = ""
	delete(m.first, name)
	if !known {
		m.unseen[name] = true
	}
	switch {
	case report.Err != nil:
		if !had || old.Err == nil || old.Err.Error() != report.Err.Error() {
			m.log.Error("segment is not as it should be; trying again", "lan", report.Segment.LAN, "netns", name, "err", report.Err)
		}
		m.again(name, time.Now())
	case !report.Built && !gone:
		m.again(name, time.Now()) // one step was taken, such as another LAN's segment torn down; the next is due
	default:
		m.rest(name, began)
	}
	if gone {
		// The kernel takes the namespace down after it has lost its name (cleanup_net in net/core/net_namespace.c), in about the time
		// that its links took, and waits for RCU again and again. A bridge's deletion on top of that waits for those waits, with the
		// kernel's lock for all links in hand (br_multicast_dev_del in net/bridge/br_multicast.c).
		m.pause = time.Now().Add(2 * time.Since(began))
		delete(m.reports, name)
		delete(m.retry, name)
		if _, again := m.want[name]; !again {
			delete(m.dirty, name)
		}
	} else {
		m.reports[name] = report
	}
	signal(m.changed)
}

// tell has a segment that stands know of a change to what its VXLAN is told, without a look at it: with many MACs a look takes much longer
// than one write. What somebody else has changed meanwhile is found at the next look.
func (m *Manager) tell(ctx context.Context, name string, want segment.Segment, old Report) bool {
	began := time.Now()
	if !canBeTold(old, want) {
		return false
	}
	ops := segment.DiffTables(old.Segment, want, len(old.Claims) > 0)
	if err := m.kernel.Apply(ctx, name, ops); err != nil {
		m.log.Warn("cannot write what a LAN is told, looking at all of it", "netns", name, "err", err)
		return false
	}
	m.logOps(name, ops)
	if m.OnObserve != nil {
		m.OnObserve(Observation{Took: time.Since(began), Done: ops})
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	old.Segment, old.Remotes = want, len(want.Remotes)
	m.reports[name] = old
	signal(m.changed)
	return true
}

// devicesBefore are the CDI devices of a segment that may have to go: at the first look and after an error those on file, else
// those of the claims that were there at the last look. They are read before the claims are: a device is written after its claim.
func (m *Manager) devicesBefore(name string, old Report, had bool) ([]cdi.Device, error) {
	var devices []cdi.Device
	if had && old.Err == nil {
		for _, c := range old.Claims {
			devices = append(devices, cdi.Device{Spoke: c.Spoke, ClaimID: c.ID})
		}
		return devices, nil
	}
	all, err := cdi.List(m.cdiDir)
	for _, d := range all {
		if d.Netns == name {
			devices = append(devices, d)
		}
	}
	return devices, err
}

// removeDevices removes those that no claim is behind any more.
func (m *Manager) removeDevices(devices []cdi.Device, claims []segment.Claim) error {
	var errs []error
	for _, d := range devices {
		if !slices.ContainsFunc(claims, func(c segment.Claim) bool { return c.ID == d.ClaimID }) {
			errs = append(errs, cdi.Remove(m.cdiDir, d.Spoke, d.ClaimID))
		}
	}
	return errors.Join(errs...)
}

func sameClaims(a, b []segment.Claim) bool {
	return slices.EqualFunc(a, b, func(x, y segment.Claim) bool { return x.ID == y.ID })
}

// reconcile does the work for one segment. known is false where it cannot be seen how the segment is.
func (m *Manager) reconcile(ctx context.Context, name string, want segment.Segment, wanted bool, old Report) (r Report, done []segment.Op, known, gone bool) {
	r = Report{Segment: want, Leaving: !wanted, Learned: -1, Remotes: -1}
	have, done, known, err := m.bring(ctx, name, func(have segment.State) []segment.Op {
		ops, _ := decide(want, wanted, have)
		return ops
	})
	r.Err = err
	if !known { // what was there at the last look is not gone because it cannot be seen
		r.Claims, r.Withdrawn = old.Claims, old.Withdrawn
		if r.Leaving = r.Leaving || old.Leaving; r.Leaving {
			r.Segment = old.Segment
			r.Segment.Netns = name
		}
		return r, done, false, false
	}
	wanted = wanted && (len(have.Claims()) > 0 || !want.OnDemand)
	left, leaving := decide(want, wanted, have)
	r.Leaving = leaving
	switch {
	case leaving && have.Record != nil:
		r.Segment = *have.Record
	case !wanted:
		r.Segment = nobodys(have)
	}
	r.Claims = have.Claims()
	for _, c := range r.Claims {
		if !slices.Contains(r.Segment.Spokes, c.Spoke) && !segment.IsOnDemand(c.Spoke) || leaving {
			r.Withdrawn = append(r.Withdrawn, c.Spoke)
		}
	}
	r.Built = r.Err == nil && built(left)
	if bridge, ok := have.Link(r.Segment.Bridge); ok {
		r.Learned = bridge.Learned
	}
	if vxlan, ok := have.Link(r.Segment.VXLAN.Name); ok && !vxlan.VXLAN.Group.IsValid() {
		r.Remotes = len(vxlan.VXLAN.Remotes)
	}
	return r, done, true, !wanted && !have.Exists && !have.Lost && !have.Dead && have.Record == nil && len(have.Links) == 0
}

// nobodys is what can be said of a segment whose record is lost.
func nobodys(have segment.State) segment.Segment {
	s := segment.Segment{Netns: have.Netns}
	for _, l := range have.Links {
		if l.Type == "vxlan" {
			s.VXLAN = segment.VXLAN{Name: l.Name, VNI: l.VXLAN.VNI, Port: l.VXLAN.Port, Group: l.VXLAN.Group}
		}
	}
	return s
}

// bring brings a segment in order and says how it is then, if that is known. It looks first without the lock, because most of the time
// nothing is to be done. That something is, and how all is afterwards, is judged with the lock: half of somebody's attach looks like damage.
func (m *Manager) bring(
	ctx context.Context, name string, plan func(segment.State) []segment.Op,
) (have segment.State, done []segment.Op, known bool, err error) {
	have, err = m.kernel.Observe(ctx, name)
	if err != nil || len(plan(have)) == 0 {
		return have, nil, err == nil, err
	}
	done, err = m.kernel.Reconcile(ctx, name, func(s segment.State) []segment.Op {
		have, known = s, true
		return plan(s)
	})
	m.logOps(name, done)
	if err == nil && len(done) == 0 {
		return have, nil, known, nil
	}
	known = false
	_, lookErr := m.kernel.Reconcile(ctx, name, func(s segment.State) []segment.Op {
		have, known = s, true
		return nil
	})
	if err == nil {
		err = lookErr
	}
	return have, done, known, err
}

// built says whether operations are none that a segment cannot do its work without: Settle is a question, asked again at each look.
func built(left []segment.Op) bool {
	return !slices.ContainsFunc(left, func(op segment.Op) bool { _, question := op.(segment.VerifyClaim); return !question })
}

// decide is what to do about a segment, and whether it is leaving. One on demand is wanted while somebody is attached. One that is attached to stays, and stays whole,
// when it is not wanted any more or when another LAN wants its name.
func decide(want segment.Segment, wanted bool, have segment.State) (ops []segment.Op, leaving bool) {
	claimed := len(have.Claims()) > 0
	wanted = wanted && (claimed || !want.OnDemand)
	foreign := wanted && have.Record != nil && have.Record.LAN != want.LAN
	switch {
	case wanted && !foreign:
		return segment.Diff(want, have), false
	case claimed && have.Record != nil:
		left := *have.Record
		left.Leaving = !left.OnDemand // which nobody wants before it is found
		return segment.Diff(left, have), true
	case claimed:
		return segment.VerifyClaims(have), true // whose it was is lost; it goes with its last pod
	case foreign:
		return segment.Teardown(have), true // the new one is built at the next look
	default:
		return segment.Teardown(have), true
	}
}

func (m *Manager) logOps(name string, ops []segment.Op) {
	for _, op := range ops {
		if !m.log.Enabled(context.Background(), slog.LevelDebug) {
			break // a thousand remotes are a long text
		}
		m.log.Debug("done", "netns", name, "op", op.String())
	}
	if !built(ops) {
		m.log.Info("segment changed", "netns", name, "ops", len(ops))
	}
}

// backoff is how long a segment is left alone: longer and longer while it fails, and for a moment after every look,
// so that a burst of changes is one look.
type backoff struct {
	delay time.Duration
	rest  time.Time
}

const (
	firstDelay = 50 * time.Millisecond
	lastDelay  = 15 * time.Second
	// burst is how long a segment rests after a look, or four times as long as the look took if that is longer:
	// well below the second within which repairs are promised.
	burst = 10 * time.Millisecond
)

func (m *Manager) again(name string, now time.Time) {
	b := m.retry[name]
	if b == nil {
		b = &backoff{}
		m.retry[name] = b
	}
	b.delay = min(max(2*b.delay, firstDelay), lastDelay)
	b.rest = now.Add(b.delay)
	m.dirty[name] = true
}

func (m *Manager) rest(name string, began time.Time) {
	took := time.Since(began)
	m.retry[name] = &backoff{rest: time.Now().Add(min(max(burst, 4*took), 400*time.Millisecond))}
}

// signal puts a value into a one-place channel that may have one already.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
