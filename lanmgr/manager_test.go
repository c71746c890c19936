package lanmgr_test

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

func lan(name, uid string, spokes ...string) segment.Segment {
	return segment.Segment{
		LAN:   segment.LAN{Namespace: "default", Name: name, UID: uid},
		Netns: "default." + name, Bridge: "br1", MTU: 1422, Spokes: spokes,
		VXLAN: segment.VXLAN{Name: "vx1", VNI: 1, Port: 4789, Group: netip.MustParseAddr("ff02::14")},
	}
}

// stateOf is the state of a node that has only the namespace and the record of a segment.
func stateOf(s segment.Segment) segment.State {
	return segment.State{Exists: true, Record: &s}
}

// start runs a manager until the test ends.
func start(t *testing.T, k *fakeKernel) (m *lanmgr.Manager, cdiDir string) {
	t.Helper()
	cdiDir = t.TempDir()
	m = lanmgr.New(k, cdiDir, slog.New(slog.DiscardHandler))
	m.OnObserve = k.reconciled
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return m, cdiDir
}

// await returns the reports once they fit.
func await(
	t *testing.T, m *lanmgr.Manager, what string, fits func([]lanmgr.Report) bool,
) []lanmgr.Report {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		reports := m.Reports()
		if fits(reports) {
			return reports
		}
		select {
		case <-m.Changed():
		case <-deadline:
			t.Fatalf("waited too long for %s; reports are %+v", what, reports)
		}
	}
}

func allBuilt(count int) func([]lanmgr.Report) bool {
	return func(rs []lanmgr.Report) bool {
		return len(rs) == count && !slices.ContainsFunc(rs, func(r lanmgr.Report) bool { return !r.Built || r.Leaving })
	}
}

// only returns a condition on the one report that there is.
func only(fits func(lanmgr.Report) bool) func([]lanmgr.Report) bool {
	return func(rs []lanmgr.Report) bool { return len(rs) == 1 && fits(rs[0]) }
}

func claims(count int) func([]lanmgr.Report) bool {
	return only(func(r lanmgr.Report) bool { return len(r.Claims) == count })
}

func isLeaving(r lanmgr.Report) bool { return r.Leaving }

// builtFor returns a condition that the only segment is complete and belongs to the LAN with that UID.
func builtFor(uid string) func([]lanmgr.Report) bool {
	return func(rs []lanmgr.Report) bool { return allBuilt(1)(rs) && rs[0].Segment.LAN.UID == uid }
}

func TestSegmentsAreBuiltAndRemoved(t *testing.T) {
	k := &fakeKernel{states: map[string]segment.State{}}
	m, _ := start(t, k)
	m.Set([]segment.Segment{lan("a", "1", "x"), lan("b", "1", "y")})
	await(t, m, "two segments to be built", allBuilt(2))
	m.Set([]segment.Segment{lan("b", "1", "y")})
	await(t, m, "one segment to be left", allBuilt(1))
	if names, _ := k.List(); !slices.Equal(names, []string{"default.b"}) {
		t.Errorf("the node has %v", names)
	}
}

func TestClaimedSegmentStaysUntilItsLastClaimEnds(t *testing.T) {
	k := &fakeKernel{states: map[string]segment.State{}}
	m, cdiDir := start(t, k)
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "the segment to be built", allBuilt(1))
	c := k.attach("default.a", "x")
	device := cdi.Device{Netns: "default.a", Spoke: "x", ClaimID: c.ID, Env: []string{"A=1"}}
	if err := cdi.Write(cdiDir, device); err != nil {
		t.Fatal(err)
	}
	m.Enqueue("default.a")
	await(t, m, "a claim", claims(1))

	m.Set(nil)
	rs := await(t, m, "the segment to be leaving", only(isLeaving))
	if !slices.Equal(rs[0].Unwanted, []string{"x"}) || !rs[0].Built {
		t.Errorf("the leaving segment is reported as %+v", rs[0])
	}
	recordedAsLeaving := func() bool {
		s, err := k.Observe(t.Context(), "default.a")
		return err == nil && s.Record != nil && s.Record.Leaving
	}
	if !recordedAsLeaving() {
		t.Error("the record does not say that the segment is leaving")
	}
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "the segment to be wanted again", allBuilt(1))
	if recordedAsLeaving() {
		t.Error("the record says that a wanted segment is leaving")
	}
	m.Set(nil)
	// Another LAN wants the same netns and has to wait.
	m.Set([]segment.Segment{lan("a", "2", "x")})
	await(t, m, "the first LAN's segment to be leaving", only(func(r lanmgr.Report) bool {
		return r.Leaving && r.Segment.LAN.UID == "1"
	}))

	k.detach("default.a", c.ID)
	m.Enqueue("default.a")
	await(t, m, "the second LAN's segment", builtFor("2"))
	if left, err := cdi.List(cdiDir); err != nil || len(left) > 0 {
		t.Errorf("the CDI devices %v are left, %v", left, err)
	}
}

// The API server deletes a LAN when every node has reported its segment as removed.
func TestLANIsRemovedOnlyOnceAnObservationShowedIt(t *testing.T) {
	old := lan("old", "1", "x")
	k := &fakeKernel{
		states:     map[string]segment.State{"default.old": stateOf(old)},
		observeErr: errors.New("no buffer space available"),
	}
	m, _ := start(t, k)
	if m.Removed(old.LAN, old.Netns) || m.Observed() {
		t.Error("the LAN is removed before any observation")
	}
	a := lan("a", "1", "y")
	m.Set([]segment.Segment{a})
	await(t, m, "a report of the segment that cannot be observed", func(rs []lanmgr.Report) bool {
		return m.Observed() && len(rs) == 2 && rs[1].Segment.Netns == "default.old" && rs[1].Leaving && rs[1].Err != nil
	})
	if m.Removed(old.LAN, old.Netns) {
		t.Error("a LAN is removed though its segment cannot be observed")
	}
	k.set(func() { k.observeErr = nil })
	await(t, m, "the LAN to be removed", func([]lanmgr.Report) bool { return m.Removed(old.LAN, old.Netns) })
	if names, _ := k.List(); slices.Contains(names, "default.old") {
		t.Errorf("the LAN is removed, but the node has %v", names)
	}
	await(t, m, "the segment to be built", allBuilt(1))
	if m.Removed(a.LAN, a.Netns) {
		t.Error("a wanted LAN is removed")
	}
	if never := lan("a", "0", "y"); !m.Removed(never.LAN, never.Netns) {
		t.Error("a LAN that never had the netns is not removed")
	}
	k.attach("default.a", "y")
	m.Set(nil)
	if m.Removed(a.LAN, a.Netns) {
		t.Error("a LAN is removed before the next observation")
	}
	await(t, m, "the segment to be leaving", only(func(r lanmgr.Report) bool {
		return r.Leaving && len(r.Claims) == 1
	}))
	if m.Removed(a.LAN, a.Netns) {
		t.Error("a LAN with a claim is removed")
	}
}

// A LAN that is created again during the teardown of its segment, and deleted again while that is being built, has a
// record when there is no report yet.
func TestLANIsNotRemovedWhileItsSegmentIsBeingBuilt(t *testing.T) {
	for what, next := range map[string][]segment.Segment{"none": nil, "another": {lan("a", "3", "x")}} {
		k := &fakeKernel{states: map[string]segment.State{}}
		m, _ := start(t, k)
		m.Set([]segment.Segment{lan("a", "1", "x")})
		await(t, m, "the segment to be built", allBuilt(1))
		second := lan("a", "2", "x")
		var built bool
		k.set(func() {
			k.after = func(op segment.Op) {
				switch o := op.(type) {
				case segment.RemoveNetns:
					if !built {
						m.Set([]segment.Segment{second})
					}
				case segment.WriteRecord:
					if o.Segment.LAN == second.LAN {
						built = true
						m.Set(next)
					}
				}
				if built && m.Removed(second.LAN, second.Netns) {
					t.Errorf("with the next LAN %s, the second is removed after %s", what, op)
				}
			}
		})
		m.Set(nil)
		await(t, m, "the LAN to be removed", func([]lanmgr.Report) bool { return m.Removed(second.LAN, second.Netns) })
		k.set(func() {
			if r := k.states["default.a"].Record; !built || r != nil && r.LAN == second.LAN {
				t.Errorf("with the next LAN %s, the second was built: %t, and the record is %+v", what, built, r)
			}
		})
	}
}

func TestDevicesOfAnEarlierRunAreRemoved(t *testing.T) {
	k := &fakeKernel{states: map[string]segment.State{}}
	m, cdiDir := start(t, k)
	device := cdi.Device{Netns: "default.old", Spoke: "x", ClaimID: segment.ClaimID("c1", "net1"), Env: []string{"A=1"}}
	if err := cdi.Write(cdiDir, device); err != nil {
		t.Fatal(err)
	}
	m.Set(nil)
	await(t, m, "all to be observed", func([]lanmgr.Report) bool { return m.Observed() })
	if left, err := cdi.List(cdiDir); err != nil || len(left) > 0 {
		t.Errorf("the CDI devices %v are left, %v", left, err)
	}
}

// A segment on demand exists while it has claims, whether it is in the desired state or not yet.
func TestSegmentOnDemandStaysWhileItHasClaims(t *testing.T) {
	onDemand := lan("a", "")
	onDemand.OnDemand = true
	for what, want := range map[string][]segment.Segment{"wanted": {onDemand}, "not wanted": nil} {
		k := &fakeKernel{states: map[string]segment.State{"default.a": stateOf(onDemand)}}
		c := k.attach("default.a", "x")
		m, _ := start(t, k)
		m.Set(want)
		await(t, m, "a claim", claims(1))
		k.set(func() {
			if r := k.states["default.a"].Record; r == nil || r.Leaving {
				t.Errorf("%s: with a claim the record is %+v", what, r)
			}
		})
		k.detach("default.a", c.ID)
		m.Enqueue("default.a")
		await(t, m, "no report", func(rs []lanmgr.Report) bool { return len(rs) == 0 })
		if names, _ := k.List(); len(names) > 0 {
			t.Errorf("%s: without a claim the node has %v", what, names)
		}
	}
}

func TestFailureIsReportedAndRetried(t *testing.T) {
	failure := errors.New("no buffer space available")
	k := &fakeKernel{states: map[string]segment.State{}, applyErr: failure}
	m, _ := start(t, k)
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "the failure", only(func(r lanmgr.Report) bool { return errors.Is(r.Err, failure) && !r.Built }))
	k.set(func() { k.applyErr = nil })
	await(t, m, "the segment to be built", allBuilt(1))
}

// A new desired state, and pods that come and go, are k8slan's own reasons to change a segment.
func TestOnlyAChangeBySomethingElseIsARepair(t *testing.T) {
	observations := make(chan lanmgr.Observation, 1000)
	k := &fakeKernel{
		states:     map[string]segment.State{},
		reconciled: func(o lanmgr.Observation) { observations <- o },
	}
	m, _ := start(t, k)
	repairs := func() (count int) {
		for {
			select {
			case o := <-observations:
				if o.Took <= 0 || o.Repair && len(o.Done) == 0 {
					t.Errorf("an observation is %+v", o)
				}
				if o.Repair {
					count++
				}
			default:
				return count
			}
		}
	}
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "the segment to be built", allBuilt(1))
	m.Set([]segment.Segment{lan("a", "1", "x", "y")})
	await(t, m, "a second spoke", only(func(r lanmgr.Report) bool { return r.Built && len(r.Segment.Spokes) == 2 }))
	claim := k.attach("default.a", "x")
	m.Enqueue("default.a")
	await(t, m, "a claim", only(func(r lanmgr.Report) bool { return r.Built && len(r.Claims) == 1 }))
	k.detach("default.a", claim.ID)
	m.Enqueue("default.a")
	await(t, m, "no claim", only(func(r lanmgr.Report) bool { return r.Built && len(r.Claims) == 0 }))
	if count := repairs(); count != 0 {
		t.Errorf("there are %d repairs, though nothing else changed the segment", count)
	}
	k.change("default.a", func(s *segment.State) { *s = apply(*s, segment.DelLink{Name: segment.PortName("y")}) })
	m.Enqueue("default.a")
	addsPair := func(op segment.Op) bool { p, ok := op.(segment.AddPair); return ok && p.Spoke == "y" }
	deadline := time.After(20 * time.Second)
	for {
		select {
		case o := <-observations:
			if !o.Repair {
				continue
			}
			if !slices.ContainsFunc(o.Done, addsPair) {
				t.Errorf("the repair consists of %v", o.Done)
			}
			return
		case <-deadline:
			t.Fatal("the restored port does not count as a repair")
		}
	}
}

func TestObservationOfACompleteSegmentChangesNothing(t *testing.T) {
	k := &fakeKernel{states: map[string]segment.State{}}
	m, _ := start(t, k)
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "the segment to be built", allBuilt(1))
	k.set(func() { k.operations = 0 })
	m.Enqueue("default.a")
	<-m.Changed()
	m.Enqueue("default.a")
	<-m.Changed()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.operations != 0 {
		t.Errorf("%d operations were applied to a complete segment", k.operations)
	}
}

// A LAN may be deleted and created again faster than its segment is torn down.
func TestLANThatIsCreatedAgainDuringItsTeardownIsBuilt(t *testing.T) {
	k := &fakeKernel{states: map[string]segment.State{}}
	m, _ := start(t, k)
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "the segment to be built", allBuilt(1))
	k.mu.Lock()
	k.after = func(op segment.Op) {
		if _, removed := op.(segment.RemoveNetns); removed {
			m.Set([]segment.Segment{lan("a", "2", "x")})
		}
	}
	k.mu.Unlock()
	m.Set(nil)
	await(t, m, "the new LAN's segment", builtFor("2"))
}

// An observation without the lock may show a segment in the middle of an attach. If that counted as damage, the LAN's
// spokes would be unhealthy, and kubelet would reject the pods that come at that moment.
func TestUnfinishedAttachIsNotDamage(t *testing.T) {
	k := &fakeKernel{states: map[string]segment.State{}}
	m, _ := start(t, k)
	m.Set([]segment.Segment{lan("a", "1", "x", "y")})
	await(t, m, "the segment to be built", allBuilt(1))
	k.mu.Lock()
	k.unlocked = func(s segment.State) segment.State {
		for i := range s.Links {
			s.Links[i].AltNames = nil
		}
		return s
	}
	k.mu.Unlock()
	for range 5 {
		m.Enqueue("default.a")
		<-m.Changed()
		if rs := m.Reports(); !allBuilt(1)(rs) {
			t.Fatalf("the segment is reported as %+v", rs)
		}
	}
}

// If the claims of a segment that cannot be observed were not reported, the controller would give its ns to another
// LAN.
func TestClaimsAreReportedWhileTheSegmentCannotBeObserved(t *testing.T) {
	k := &fakeKernel{states: map[string]segment.State{}}
	m, _ := start(t, k)
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "the segment to be built", allBuilt(1))
	k.attach("default.a", "x")
	m.Enqueue("default.a")
	await(t, m, "a claim", claims(1))
	k.set(func() { k.observeErr = errors.New("no buffer space available") })
	m.Set(nil)
	rs := await(t, m, "the error", only(func(r lanmgr.Report) bool { return r.Err != nil }))
	if r := rs[0]; len(r.Claims) != 1 || !r.Leaving || r.Segment.LAN.UID != "1" {
		t.Errorf("the segment is reported as %+v", r)
	}
	k.set(func() { k.observeErr = nil })
	await(t, m, "the segment to be leaving", only(func(r lanmgr.Report) bool { return r.Err == nil && r.Leaving }))
}

// The record of a segment may be lost while it is leaving: its last claim, a VM's, still ends it.
func TestSegmentWithoutARecordIsRemovedWithItsLastClaim(t *testing.T) {
	k := &fakeKernel{states: map[string]segment.State{"default.old": {Exists: true, Links: []segment.Link{
		{Name: segment.PlugName("vm"), Type: "veth", AltNames: []string{segment.ClaimID("c1", "net1")}, Promisc: 1},
		{Name: "vx7", Type: "vxlan", VXLAN: segment.VXLANState{VNI: 7, Port: 4789}},
	}}}}
	m, _ := start(t, k)
	m.Set(nil)
	rs := await(t, m, "a claim", claims(1))
	if s := rs[0].Segment; s.Netns != "default.old" || s.VXLAN.VNI != 7 || s.VXLAN.Port != 4789 {
		t.Errorf("the segment is reported as %+v", s)
	}
	if perhaps := lan("old", "1", "vm"); m.Removed(perhaps.LAN, perhaps.Netns) {
		t.Error("a LAN is removed whose segment may be the one without a record")
	}
	k.change("default.old", func(s *segment.State) { s.Links[0].Promisc = 0 })
	m.Enqueue("default.old")
	await(t, m, "the segment to be removed", func([]lanmgr.Report) bool {
		names, _ := k.List()
		return len(names) == 0
	})
}

// withTables returns a segment whose VXLAN has so many remotes and MACs.
func withTables(remotes, macs int) segment.Segment {
	s := lan("a", "1", "x")
	s.VXLAN.Group, s.VXLAN.Local = netip.Addr{}, netip.MustParseAddr("192.0.2.1")
	s.VXLAN.NoLearning, s.VXLAN.UnderlayIndex = true, 7
	s.Remotes, s.FDB = []netip.Addr{}, []segment.FDBEntry{}
	for i := range byte(remotes) {
		s.Remotes = append(s.Remotes, netip.AddrFrom4([4]byte{192, 0, 2, 2 + i}))
	}
	for i := range byte(macs) {
		s.FDB = append(s.FDB, segment.FDBEntry{MAC: [6]byte{2, i}, VTEP: netip.MustParseAddr("192.0.2.2")})
	}
	return s
}

// hasTables reports whether the VXLAN of that segment has so many remotes and MACs.
func (k *fakeKernel) hasTables(remotes, macs int) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	l, ok := k.state("default.a").Link("vx1")
	return ok && len(l.VXLAN.Remotes) == remotes && len(l.VXLAN.FDB) == macs
}

func (k *fakeKernel) countObservations() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.observations
}

// Changed table entries are written without an observation, unless the segment needs one or the write fails.
func TestChangedTablesAreWrittenWithoutAnObservation(t *testing.T) {
	k := &fakeKernel{states: map[string]segment.State{}}
	m, _ := start(t, k)
	is := func(s segment.Segment) func([]lanmgr.Report) bool {
		return func(rs []lanmgr.Report) bool {
			return allBuilt(1)(rs) && rs[0].Segment.Equal(s) && rs[0].Err == nil && rs[0].Remotes == len(s.Remotes)
		}
	}
	m.Set([]segment.Segment{withTables(1, 0)})
	await(t, m, "the segment to be built", is(withTables(1, 0)))
	k.attach("default.a", "x")
	m.Enqueue("default.a")
	await(t, m, "a claim", only(func(r lanmgr.Report) bool { return len(r.Claims) == 1 && r.Built }))

	before := k.countObservations()
	for _, step := range [][2]int{{2, 3}, {2, 1}, {1, 4}, {0, 0}, {3, 3}} {
		want := withTables(step[0], step[1])
		m.Set([]segment.Segment{want})
		await(t, m, "the tables to change", is(want))
		if !k.hasTables(step[0], step[1]) {
			t.Errorf("the VXLAN does not have %d remotes and %d MACs", step[0], step[1])
		}
	}
	if after := k.countObservations(); after != before {
		t.Errorf("the changes took %d observations", after-before)
	}

	partial := withTables(1, 1)
	partial.Partial = true
	m.Set([]segment.Segment{partial})
	await(t, m, "the partial tables", only(func(r lanmgr.Report) bool { return r.Built && r.Segment.Equal(partial) }))
	if !k.hasTables(3, 3) {
		t.Error("entries were deleted that partial tables may lack")
	}
	m.Set([]segment.Segment{withTables(1, 1)})
	await(t, m, "the entries to be deleted", is(withTables(1, 1)))
	if !k.hasTables(1, 1) || k.countObservations() == before {
		t.Error("entries that the partial tables left were not found by an observation")
	}

	k.set(func() { k.applyErr = errors.New("no room") })
	m.Set([]segment.Segment{withTables(2, 2)})
	await(t, m, "the failure", only(func(r lanmgr.Report) bool { return r.Err != nil }))
	k.set(func() { k.applyErr = nil })
	await(t, m, "the tables to change in the end", is(withTables(2, 2)))
	if !k.hasTables(2, 2) {
		t.Error("the VXLAN does not have 2 remotes and 2 MACs")
	}
}
