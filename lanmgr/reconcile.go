package lanmgr

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// task is what the reconciliation of one segment starts from.
type task struct {
	netns      string
	want       *segment.Segment // nil: not wanted
	last       *Report          // nil: none
	tablesOnly bool             // only remotes, FDB or neighbors changed
}

// result is what came of it.
type result struct {
	Report
	done  []segment.Op
	known bool // the segment could be observed
	gone  bool // it is not wanted, and nothing of it is left
	took  time.Duration
}

// process reconciles the segment that came out of the queue.
func (m *Manager) process(ctx context.Context, netns string) {
	t, ok := m.begin(netns)
	if !ok || t.tablesOnly && m.syncTables(ctx, t) {
		return
	}
	began := time.Now()
	devices, listErr := m.devicesToCheck(t)
	r := m.reconcile(ctx, t)
	if ctx.Err() != nil {
		return
	}
	if r.Err == nil {
		r.Err = listErr
	}
	if r.Err == nil {
		r.Err = m.removeDevices(devices, r.Claims)
	}
	r.took = time.Since(began)
	m.observed(Observation{Took: r.took, Done: r.done, Repair: isRepair(t, r), Err: r.Err})
	m.finish(t, r)
}

// finish records the result of a reconciliation and decides when the next one is due.
func (m *Manager) finish(t task, r result) {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer m.changed.Set()
	if r.Err != nil && (t.last == nil || t.last.Err == nil || t.last.Err.Error() != r.Err.Error()) {
		m.log.Error("segment is not as it should be; trying again",
			"lan", r.Segment.LAN, "netns", t.netns, "err", r.Err)
	}
	e := m.entry(t.netns)
	e.initial = false
	e.seen = r.known
	switch {
	case r.gone:
		m.forget(e, r.took)
		return
	case r.Err != nil || !r.Built: // not Built: another round is due, as after the teardown of another LAN's segment
		m.retryLater(e)
	default:
		m.restAfter(e, r.took)
	}
	report := r.Report // without r.done, which may be large
	e.report = &report
}

// forget drops what is known of a segment of which the node has nothing left. m.mu is held.
func (m *Manager) forget(e *entry, took time.Duration) {
	// The kernel takes the namespace down after it has lost its name (cleanup_net in net/core/net_namespace.c). That
	// takes about as long as its links took, and waits for RCU again and again. The deletion of another bridge would
	// wait for those waits while it holds the kernel's lock for all links (br_multicast_dev_del in
	// net/bridge/br_multicast.c).
	m.pause = time.Now().Add(2 * took)
	m.failures.Forget(e.netns)
	e.report = nil
	if e.want == nil {
		delete(m.segments, e.netns) // with what its own teardown queued
	}
}

func (m *Manager) observed(o Observation) {
	if m.OnObserve != nil {
		m.OnObserve(o)
	}
}

// isRepair reports whether something else on the node made operations necessary.
func isRepair(t task, r result) bool {
	sameClaim := func(a, b segment.Claim) bool { return a.ID == b.ID }
	return !complete(r.done) && t.want != nil && t.last != nil && t.last.Built && !t.last.Leaving &&
		t.last.Segment.Equal(*t.want) && slices.EqualFunc(t.last.Claims, r.Claims, sameClaim)
}

// reconcile changes one segment on the node into the desired state, as far as its claims allow.
func (m *Manager) reconcile(ctx context.Context, t task) result {
	have, done, known, err := m.observeAndApply(ctx, t.netns, func(have segment.State) []segment.Op {
		ops, _ := decide(t.want, have)
		return ops
	})
	if !known {
		return result{Report: unknown(t, err), done: done}
	}
	r := report(t.want, have)
	r.Err = err
	r.Built = r.Built && err == nil
	return result{Report: r, done: done, known: true, gone: !isWanted(t.want, have) && isAbsent(have)}
}

// unknown returns the report of a segment that cannot be observed. It keeps the claims of the last observation.
func unknown(t task, err error) Report {
	var last Report
	if t.last != nil {
		last = *t.last
	}
	r := Report{
		Segment: last.Segment, Leaving: t.want == nil || last.Leaving, Unwanted: last.Unwanted,
		Err: err, Claims: last.Claims, Learned: -1, Remotes: -1,
	}
	if !r.Leaving {
		r.Segment = *t.want
	}
	r.Segment.Netns = t.netns
	return r
}

// report describes a segment as it is after a reconciliation.
func report(want *segment.Segment, have segment.State) Report {
	left, leaving := decide(want, have)
	r := Report{Leaving: leaving, Built: complete(left), Claims: have.Claims(), Learned: -1, Remotes: -1}
	switch {
	case leaving && have.Record != nil:
		r.Segment = *have.Record
	case isWanted(want, have):
		r.Segment = *want
	default:
		r.Segment = withoutRecord(have)
	}
	for _, c := range r.Claims {
		if !slices.Contains(r.Segment.Spokes, c.Spoke) && !segment.IsOnDemand(c.Spoke) || leaving {
			r.Unwanted = append(r.Unwanted, c.Spoke)
		}
	}
	if bridge, ok := have.Link(r.Segment.Bridge); ok {
		r.Learned = bridge.Learned
	}
	if vxlan, ok := have.Link(r.Segment.VXLAN.Name); ok && !vxlan.VXLAN.Group.IsValid() {
		r.Remotes = len(vxlan.VXLAN.Remotes)
	}
	return r
}

// withoutRecord returns what a state shows of a segment whose record is lost.
func withoutRecord(have segment.State) segment.Segment {
	s := segment.Segment{Netns: have.Netns}
	for _, l := range have.Links {
		if l.Type == "vxlan" {
			s.VXLAN = segment.VXLAN{Name: l.Name, VNI: l.VXLAN.VNI, Port: l.VXLAN.Port, Group: l.VXLAN.Group}
		}
	}
	return s
}

// observeAndApply applies what plan returns for a segment, and returns the state after that; known is false if it could
// not be observed. The first observation needs no lock, because most of the time there is nothing to apply. If there
// is, the segment is observed again under its lock, before and after: without the lock, an
// attach in progress looks like damage.
func (m *Manager) observeAndApply(
	ctx context.Context, netns string, plan func(segment.State) []segment.Op,
) (have segment.State, done []segment.Op, known bool, err error) {
	have, err = m.kernel.Observe(ctx, netns)
	if err != nil || len(plan(have)) == 0 {
		return have, nil, err == nil, err
	}
	done, err = m.kernel.Reconcile(ctx, netns, func(s segment.State) []segment.Op {
		have, known = s, true
		return plan(s)
	})
	m.logOps(netns, done)
	if err == nil && len(done) == 0 {
		return have, nil, known, nil
	}
	known = false
	_, observeErr := m.kernel.Reconcile(ctx, netns, func(s segment.State) []segment.Op {
		have, known = s, true
		return nil
	})
	if err == nil {
		err = observeErr
	}
	return have, done, known, err
}

// decide returns the operations for a segment, and whether it is leaving. A segment with claims stays, and is kept
// complete, when it is no longer wanted or when another LAN wants its netns.
func decide(want *segment.Segment, have segment.State) (ops []segment.Op, leaving bool) {
	claimed := len(have.Claims()) > 0
	wanted := isWanted(want, have)
	foreign := wanted && have.Record != nil && have.Record.LAN != want.LAN
	switch {
	case wanted && !foreign:
		return segment.Diff(*want, have), false
	case claimed && have.Record != nil:
		recorded := *have.Record
		recorded.Leaving = !recorded.OnDemand // no LAN object wants one on demand, also before it is first observed
		return segment.Diff(recorded, have), true
	case claimed: // the record is lost, and with it whose segment it is: it is torn down after its last claim
		return segment.VerifyClaims(have), true
	default: // a foreign one is torn down first; the next reconciliation builds the wanted one
		return segment.Teardown(have), true
	}
}

// isWanted reports whether a segment is to be on the node: one on demand is wanted only while it has claims.
func isWanted(want *segment.Segment, have segment.State) bool {
	return want != nil && (!want.OnDemand || len(have.Claims()) > 0)
}

// isAbsent reports whether the node has nothing of a segment.
func isAbsent(have segment.State) bool {
	return !have.Exists && !have.LostName && !have.StaleName && have.Record == nil && len(have.Links) == 0
}

// complete reports whether a segment works with these operations still to do: VerifyClaim only
// reads, so it does not count as work.
func complete(left []segment.Op) bool {
	return !slices.ContainsFunc(left, func(op segment.Op) bool {
		_, question := op.(segment.VerifyClaim)
		return !question
	})
}

// onlyTablesDiffer reports whether a segment is as it was wanted, and is now wanted with other remotes, FDB entries or
// neighbors only.
func onlyTablesDiffer(r Report, want segment.Segment) bool {
	return r.Built && r.Err == nil && !r.Leaving && segment.OnlyTablesDiffer(r.Segment, want)
}

// syncTables writes changed table entries of a segment without observing it: with many MACs, an observation takes much
// longer than one write. It reports whether it succeeded. What something else changed in the meantime is found by the
// next observation.
func (m *Manager) syncTables(ctx context.Context, t task) bool {
	if t.want == nil || t.last == nil || !onlyTablesDiffer(*t.last, *t.want) {
		return false
	}
	began := time.Now()
	ops := segment.DiffTables(t.last.Segment, *t.want, len(t.last.Claims) > 0)
	if err := m.kernel.Apply(ctx, t.netns, ops); err != nil {
		m.log.Warn("cannot write table entries of a LAN; reconciling all of it", "netns", t.netns, "err", err)
		return false
	}
	m.logOps(t.netns, ops)
	m.observed(Observation{Took: time.Since(began), Done: ops})
	r := *t.last
	r.Segment, r.Remotes = *t.want, len(t.want.Remotes)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entry(t.netns).report = &r
	m.changed.Set()
	return true
}

func (m *Manager) logOps(netns string, ops []segment.Op) {
	if m.log.Enabled(context.Background(), slog.LevelDebug) { // the text of a thousand remotes is long
		for _, op := range ops {
			m.log.Debug("operation applied", "netns", netns, "op", op.String())
		}
	}
	if !complete(ops) {
		m.log.Info("segment changed", "netns", netns, "ops", len(ops))
	}
}

// devicesToCheck returns the CDI devices of a segment that its next observation may show to be without a claim: those
// of the claims last observed or, the first time and after an error, those on file. It is called before the
// observation, because the CNI plugin writes a device after its claim.
func (m *Manager) devicesToCheck(t task) ([]cdi.Device, error) {
	var devices []cdi.Device
	if t.last != nil && t.last.Err == nil {
		for _, c := range t.last.Claims {
			devices = append(devices, cdi.Device{Spoke: c.Spoke, ClaimID: c.ID})
		}
		return devices, nil
	}
	all, err := cdi.List(m.cdiDir)
	for _, d := range all {
		if d.Netns == t.netns {
			devices = append(devices, d)
		}
	}
	return devices, err
}

// removeDevices removes those devices that have no claim.
func (m *Manager) removeDevices(devices []cdi.Device, claims []segment.Claim) error {
	var errs []error
	for _, d := range devices {
		if !slices.ContainsFunc(claims, func(c segment.Claim) bool { return c.ID == d.ClaimID }) {
			errs = append(errs, cdi.Remove(m.cdiDir, d.Spoke, d.ClaimID))
		}
	}
	return errors.Join(errs...)
}
