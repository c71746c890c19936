package lanmgr_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// observation is one observation of a segment without the lock.
type observation struct {
	netns string
	after time.Duration // since the log was made
}

// recorded has each observation take d and returns a function that waits until time has passed and returns the
// observations that began since its last call.
func recorded(k *fakeKernel, d time.Duration) (during func(time.Duration) []observation) {
	var log []observation
	began := time.Now()
	k.takes = func(netns string) time.Duration {
		k.set(func() { log = append(log, observation{netns, time.Since(began)}) })
		return d
	}
	return func(d time.Duration) (observations []observation) {
		<-time.After(d)
		synctest.Wait()
		k.set(func() { observations, log = log, nil })
		return observations
	}
}

func netnsOf(observations []observation) (names []string) {
	for _, o := range observations {
		names = append(names, o.netns)
	}
	return names
}

// gaps returns the times from one observation to the next.
func gaps(observations []observation) (gaps []time.Duration) {
	for i := range observations[1:] {
		gaps = append(gaps, observations[i+1].after-observations[i].after)
	}
	return gaps
}

// A daemon that starts must not tear segments down before it knows which are wanted.
func TestNothingIsDoneBeforeTheFirstSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := lan("old", "1", "x")
		k := &fakeKernel{states: map[string]segment.State{"default.old": stateOf(old)}}
		during := recorded(k, 0)
		m, _ := start(t, k)
		m.Enqueue("default.old")
		if o := during(time.Hour); len(o) > 0 || k.lists > 0 || k.operations > 0 {
			t.Errorf("before the first Set: %d lists, the observations %v, %d operations", k.lists, o, k.operations)
		}
		if m.Removed(old.LAN, old.Netns) || m.Observed() {
			t.Error("before the first Set the LAN is removed, or all is observed")
		}
		m.Set(nil)
		during(time.Second)
		if names, _ := k.List(); len(names) > 0 || !m.Removed(old.LAN, old.Netns) || !m.Observed() {
			t.Errorf("after Set(nil) the node has %v", names)
		}
	})
}

func TestLeftoversAreListedAgainUntilThatSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &fakeKernel{states: map[string]segment.State{"default.old": stateOf(lan("old", "1", "x"))}}
		k.listErr = errors.New("permission denied")
		during := recorded(k, 0)
		m, _ := start(t, k)
		m.Set([]segment.Segment{lan("a", "1", "x")})
		during(time.Second) // at 0, 50, 150, 350 and 750 ms
		if k.lists != 5 || m.Observed() || !allBuilt(1)(m.Reports()) {
			t.Errorf("after %d failures, Observed is %t and the reports are %+v", k.lists, m.Observed(), m.Reports())
		}
		k.set(func() { k.listErr = nil })
		during(time.Second)
		if names, _ := k.List(); !m.Observed() || !slices.Equal(names, []string{"default.a"}) {
			t.Errorf("after a success, Observed is %t and the node has %v", m.Observed(), names)
		}
	})
}

func TestAllIsObservedOnceEverySegmentOfTheStartWas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &fakeKernel{states: map[string]segment.State{"default.old": stateOf(lan("old", "1", "x"))}}
		during := recorded(k, 100*time.Millisecond)
		m, _ := start(t, k)
		m.Set([]segment.Segment{lan("a", "1", "x")})
		if during(150 * time.Millisecond); m.Observed() {
			t.Error("all is observed after one observation of two segments")
		}
		if during(60 * time.Millisecond); !m.Observed() {
			t.Error("not all is observed after two observations of two segments")
		}
		m.Set([]segment.Segment{lan("a", "1", "x"), lan("b", "1", "x")})
		if !m.Observed() {
			t.Error("a segment that is wanted later ends what was observed")
		}
	})
}

// A burst of changes is one observation, the sooner the shorter an observation is.
func TestSegmentRestsAfterAnObservation(t *testing.T) {
	for took, rest := range map[time.Duration]time.Duration{
		time.Millisecond:       10 * time.Millisecond,
		20 * time.Millisecond:  80 * time.Millisecond,
		300 * time.Millisecond: 400 * time.Millisecond,
	} {
		synctest.Test(t, func(t *testing.T) {
			k := &fakeKernel{states: map[string]segment.State{}}
			during := recorded(k, took)
			m, _ := start(t, k)
			m.Set([]segment.Segment{lan("a", "1", "x")})
			during(time.Second)
			for range 2000 { // always in need of an observation
				m.Enqueue("default.a")
				<-time.After(time.Millisecond)
			}
			got := gaps(during(0))
			if len(got) < 2 || slices.ContainsFunc(got, func(g time.Duration) bool {
				return g < took+rest || g > took+rest+time.Millisecond
			}) {
				t.Errorf("after observations of %v it rests %v each, with them; want %v", took, got, took+rest)
			}
		})
	}
}

func TestSegmentThatAlwaysChangesDelaysNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &fakeKernel{states: map[string]segment.State{}}
		during := recorded(k, 50*time.Millisecond)
		m, _ := start(t, k)
		want := []segment.Segment{lan("a", "1", "x"), lan("b", "1", "x"), lan("c", "1", "x")}
		m.Set(want)
		during(time.Second)
		for i := range 10 { // new desired states, which it need not rest for
			want[0].MTU = 1000 + i
			m.Set(want)
			m.Enqueue("default.b")
			m.Enqueue("default.c")
			<-time.After(time.Millisecond)
		}
		names := netnsOf(during(100 * time.Millisecond))
		if !slices.Equal(names[:3], []string{"default.a", "default.b", "default.c"}) {
			t.Errorf("the segments are observed in the order %v", names)
		}
	})
}

func TestDelayGrowsWithEachFailureUntilTheDesiredStateChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &fakeKernel{states: map[string]segment.State{}, applyErr: errors.New("no room")}
		during := recorded(k, 0)
		m, _ := start(t, k)
		m.Set([]segment.Segment{lan("a", "1", "x")})
		for range 900 { // events, such as those of the failing operations, do not shorten the delay
			m.Enqueue("default.a")
			<-time.After(100 * time.Millisecond)
		}
		var want []time.Duration
		for d := 50 * time.Millisecond; d < 15*time.Second; d *= 2 {
			want = append(want, d)
		}
		want = append(want, 15*time.Second, 15*time.Second, 15*time.Second)
		if got := gaps(during(0)); !slices.Equal(got[:len(want)], want) {
			t.Errorf("the delays are %v, want %v", got, want)
		}
		m.Set([]segment.Segment{lan("a", "2", "x")})
		if got := during(60 * time.Millisecond); len(got) != 2 {
			t.Errorf("a new desired state is tried at %v, want at once and after 50 ms", got)
		}
		k.set(func() { k.applyErr = nil })
		during(time.Minute)
		k.set(func() { k.applyErr = errors.New("no room") })
		k.change("default.a", func(s *segment.State) { s.Record = nil })
		m.Enqueue("default.a")
		if got := gaps(during(110 * time.Millisecond)); !slices.Equal(got, []time.Duration{50 * time.Millisecond}) {
			t.Errorf("after a success, the delays are %v, want 50 ms", got)
		}
	})
}

// Each teardown leaves work to the kernel, during which others should have its lock for links.
func TestTeardownsPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &fakeKernel{states: map[string]segment.State{}}
		during := recorded(k, 30*time.Millisecond)
		m, _ := start(t, k)
		var lans []segment.Segment
		for i := range 4 {
			lans = append(lans, lan(fmt.Sprint(i), "1", "x"))
		}
		m.Set(lans)
		during(time.Second)
		m.Set(nil)
		during(10 * time.Millisecond)
		wanted := lan("wanted", "1", "x")
		m.Set([]segment.Segment{wanted})
		got := during(time.Second)
		if names := netnsOf(got); len(got) != 4 || names[0] != wanted.Netns {
			t.Errorf("during a pause, the order is %v; want the wanted segment and three teardowns", names)
		}
		for _, gap := range gaps(got[1:]) {
			if gap != 90*time.Millisecond {
				t.Errorf("a teardown of 30 ms is followed by the next after %v, want 90 ms", gap)
			}
		}
		if rs := m.Reports(); !allBuilt(1)(rs) {
			t.Errorf("in the end the reports are %+v", rs)
		}
	})
}

// The kernel reports no change of a sysctl.
func TestEverySegmentIsObservedOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &fakeKernel{states: map[string]segment.State{}}
		during := recorded(k, 0)
		m, _ := start(t, k)
		m.Set([]segment.Segment{lan("a", "1", "x"), lan("b", "1", "x")})
		during(59 * time.Second)
		for range 10 {
			names := netnsOf(during(time.Minute))
			if slices.Sort(names); !slices.Equal(names, []string{"default.a", "default.b"}) {
				t.Errorf("in a minute, %v are observed", names)
			}
		}
	})
}

// A new desired state cuts a rest short. What was queued for the end of that rest must not lead to another observation.
func TestSegmentIsNotObservedAgainWhenItsRestWasCutShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &fakeKernel{states: map[string]segment.State{}}
		during := recorded(k, 100*time.Millisecond)
		m, _ := start(t, k)
		m.Set([]segment.Segment{lan("a", "1", "x")})
		during(110 * time.Millisecond)
		m.Enqueue("default.a")
		m.Set([]segment.Segment{lan("a", "1", "x", "y")})
		if got := during(10 * time.Second); len(got) != 1 {
			t.Errorf("the segment is observed at %v, want once", got)
		}
	})
}

// Tables are written while the segment rests. They do not end its wait for an observation.
func TestTablesAreWrittenDuringARest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &fakeKernel{states: map[string]segment.State{}}
		during := recorded(k, 100*time.Millisecond)
		m, _ := start(t, k)
		m.Set([]segment.Segment{withTables(1, 0)})
		during(110 * time.Millisecond)
		m.Set([]segment.Segment{withTables(2, 0)})
		if o := during(0); len(o) > 0 || !k.hasTables(2, 0) {
			t.Errorf("the remotes are written at once: %t; with the observations %v", k.hasTables(2, 0), o)
		}
		m.Enqueue("default.a")
		m.Set([]segment.Segment{withTables(3, 0)})
		if o := during(200 * time.Millisecond); len(o) != 1 || !k.hasTables(3, 0) {
			t.Errorf("after an event and a change of tables there are the observations %v; want one", o)
		}
		during(time.Second)
		m.Set([]segment.Segment{withTables(3, 0), lan("b", "1", "x")})
		during(50 * time.Millisecond) // the manager is busy with the other
		m.Set([]segment.Segment{withTables(4, 0), lan("b", "1", "x")})
		m.Enqueue("default.a")
		if o := during(200 * time.Millisecond); len(o) != 1 || !k.hasTables(4, 0) {
			t.Errorf("after a change of tables and an event there are the observations %v; want one", o)
		}
	})
}

// While a segment is reconciled, its desired state may change in tables only.
func TestOtherLANsStayRemovedWhileTablesChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &fakeKernel{states: map[string]segment.State{}}
		during := recorded(k, 100*time.Millisecond)
		m, _ := start(t, k)
		m.Set([]segment.Segment{withTables(1, 0)})
		during(time.Second)
		m.Enqueue("default.a")
		during(50 * time.Millisecond)
		m.Set([]segment.Segment{withTables(2, 0)})
		during(time.Second)
		if other := lan("a", "2"); !m.Removed(other.LAN, other.Netns) {
			t.Error("the netns is this LAN's, but another is not removed from it")
		}
		if r := m.Reports(); !allBuilt(1)(r) || !r[0].Segment.Equal(withTables(2, 0)) {
			t.Errorf("the segment is reported as %+v", r)
		}
	})
}
