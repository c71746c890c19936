package lanmgr_test

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// node is a kernel in memory: it keeps, for each segment, what the operations that it understands would make.
type node struct {
	mu     sync.Mutex
	states map[string]segment.State
	refuse error // of every change
	blind  error // of every look
	writes int
	looks  int

	unlocked func(segment.State) segment.State // what a look without the lock sees of a segment
	after    func(segment.Op)                  // is told of every change
	watch    func(lanmgr.Observation)          // is told of every look
}

func (n *node) List() ([]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var names []string
	for name := range n.states {
		names = append(names, name)
	}
	return names, nil
}

func (n *node) Observe(_ context.Context, name string) (segment.State, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.looks++
	s := n.state(name)
	if n.unlocked != nil {
		s = n.unlocked(s)
	}
	return s, n.blind
}

func (n *node) Apply(_ context.Context, name string, ops []segment.Op) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.refuse != nil {
		return n.refuse
	}
	have := n.state(name)
	for _, op := range ops {
		n.writes++
		have = apply(have, op)
	}
	n.states[name] = have
	return nil
}

func (n *node) Release(context.Context, string, string, string) error {
	return errors.New("no test of the manager alone ends a claim")
}

func (n *node) state(name string) segment.State {
	s := n.states[name]
	s.Netns, s.Links = name, slices.Clone(s.Links)
	return s
}

func (n *node) Reconcile(_ context.Context, name string, decide func(segment.State) []segment.Op) ([]segment.Op, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.blind != nil {
		return nil, n.blind
	}
	have := n.state(name)
	var done []segment.Op
	for _, op := range decide(have) {
		if n.refuse != nil {
			return done, n.refuse
		}
		n.writes++
		have = apply(have, op)
		done = append(done, op)
		if n.after != nil {
			n.after(op)
		}
	}
	if have.Exists {
		n.states[name] = have
	} else {
		delete(n.states, name)
	}
	return done, nil
}

func apply(s segment.State, op segment.Op) segment.State {
	port := segment.Link{Type: "veth", Master: 1, Up: true, ForwardMask: segment.ForwardMask}
	switch o := op.(type) {
	case segment.CreateNetns:
		s.Exists, s.Silent = true, true
	case segment.RemoveNetns:
		s = segment.State{}
	case segment.WriteRecord:
		s.Record = &o.Segment
	case segment.RemoveRecord:
		s.Record = nil
	case segment.VerifyClaim: // there is no macvtap here
		for i := range s.Links {
			if s.Links[i].Name == segment.PlugName(o.Spoke) {
				s.Links[i].AltNames = nil
			}
		}
	case segment.AddBridge:
		s.Links = append(s.Links, segment.Link{Index: 1, Name: o.Name, Type: "bridge", MTU: o.MTU, Up: true})
	case segment.AddVXLAN:
		s.Links = append(s.Links, segment.Link{
			Index: 2, Name: o.Name, Type: "vxlan", MTU: o.MTU, Master: 1, ForwardMask: segment.ForwardMask, NoLearning: o.NoLearning,
			VXLAN: segment.VXLANState{VNI: o.VNI, Port: o.Port, Group: o.Group, Local: o.Local, NoLearning: o.NoLearning, UnderlayIndex: o.UnderlayIndex},
		})
	case segment.AddRemotes, segment.DelRemotes, segment.SetFDB, segment.DelFDB, segment.SetUp, segment.SetDown:
		s = tell(s, op)
	case segment.AddPair:
		port.Name, port.MTU = segment.PortName(o.Spoke), segment.PortMTU(o.MTU)
		s.Links = append(s.Links, port, segment.Link{Name: segment.PlugName(o.Spoke), Type: "veth", MTU: o.MTU, Up: true})
	case segment.AddAltName:
		for i := range s.Links {
			if s.Links[i].Name == o.Name {
				s.Links[i].AltNames, s.Links[i].Up = []string{o.AltName}, true
			}
		}
	case segment.DelPairs:
		s.Links = slices.DeleteFunc(s.Links, func(l segment.Link) bool { return l.Type == "veth" })
	case segment.DelLinks:
		for _, link := range o.Names {
			s = apply(s, segment.DelLink{Name: link})
		}
	case segment.DelLink:
		s.Links = slices.DeleteFunc(s.Links, func(l segment.Link) bool {
			return l.Name == o.Name || segment.PortName(l.Name[:max(0, len(l.Name)-2)]) == o.Name
		})
	}
	return s
}

// tell does what changes the VXLAN alone.
func tell(s segment.State, op segment.Op) segment.State {
	i := slices.IndexFunc(s.Links, func(l segment.Link) bool { return l.Type == "vxlan" })
	if i < 0 {
		return s
	}
	v := &s.Links[i].VXLAN
	switch o := op.(type) {
	case segment.AddRemotes:
		v.Remotes = append(slices.Clone(v.Remotes), o.Remotes...)
		slices.SortFunc(v.Remotes, netip.Addr.Compare)
	case segment.DelRemotes:
		v.Remotes = slices.DeleteFunc(slices.Clone(v.Remotes), func(a netip.Addr) bool { return slices.Contains(o.Remotes, a) })
	case segment.SetFDB:
		v.FDB = slices.Clone(v.FDB)
		for _, e := range o.Entries {
			v.FDB = append(v.FDB, segment.FDBState{FDBEntry: e, Bridge: true})
		}
		slices.SortFunc(v.FDB, func(a, b segment.FDBState) int { return slices.Compare(a.MAC[:], b.MAC[:]) })
	case segment.DelFDB:
		v.FDB = slices.DeleteFunc(slices.Clone(v.FDB), func(e segment.FDBState) bool { return slices.Contains(o.Entries, e) })
	case segment.SetUp:
		s.Links[i].Up = s.Links[i].Up || o.Name == s.Links[i].Name
	case segment.SetDown:
		s.Links[i].Up = s.Links[i].Up && o.Name != s.Links[i].Name
	}
	return s
}

func (n *node) change(name string, f func(*segment.State)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.states[name]
	f(&s)
	n.states[name] = s
}

func lan(name, uid string, spokes ...string) segment.Segment {
	return segment.Segment{
		LAN: segment.LAN{Namespace: "default", Name: name, UID: uid}, Netns: "default." + name, Bridge: "br1", MTU: 1422,
		VXLAN: segment.VXLAN{Name: "vx1", VNI: 1, Port: 4789, Group: netip.MustParseAddr("ff02::14")}, Spokes: spokes,
	}
}

// start runs a manager until the test ends.
func start(t *testing.T, n *node) (m *lanmgr.Manager, cdiDir string) {
	t.Helper()
	cdiDir = t.TempDir()
	m = lanmgr.New(n, cdiDir, slog.New(slog.DiscardHandler))
	m.OnObserve = n.watch
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

// await waits until the reports are as wanted.
func await(t *testing.T, m *lanmgr.Manager, what string, fits func([]lanmgr.Report) bool) []lanmgr.Report {
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
			t.Fatalf("%s: not so in the end: %+v", what, reports)
		}
	}
}

func allBuilt(count int) func([]lanmgr.Report) bool {
	return func(rs []lanmgr.Report) bool {
		return len(rs) == count && !slices.ContainsFunc(rs, func(r lanmgr.Report) bool { return !r.Built || r.Leaving })
	}
}

// attach puts a pod on a spoke, as the CNI plugin does.
func (n *node) attach(name, spoke string) segment.Claim {
	c := segment.Claim{ID: segment.ClaimID("c1", "net1"), Spoke: spoke, Kind: segment.Veth, Pod: "p", PodNamespace: "default", Interface: "net1", Sandbox: "c1"}
	n.change(name, func(s *segment.State) {
		s.Links = slices.Clone(s.Links)
		for i := range s.Links {
			if s.Links[i].Name == segment.PortName(spoke) {
				s.Links[i].AltNames, s.Links[i].Up = nil, false
			}
		}
		s.Links = append(s.Links, segment.Link{
			Name: c.ID, Type: "veth", AltNames: []string{spoke}, Alias: c.Alias(), Master: 1, MTU: 1422, Up: true, ForwardMask: segment.ForwardMask,
		})
	})
	return c
}

func (n *node) detach(name, claimID string) {
	n.change(name, func(s *segment.State) {
		s.Links = slices.DeleteFunc(slices.Clone(s.Links), func(l segment.Link) bool { return l.Name == claimID })
	})
}

func TestSegmentsComeAndGo(t *testing.T) {
	n := &node{states: map[string]segment.State{}}
	m, _ := start(t, n)
	m.Set([]segment.Segment{lan("a", "1", "x"), lan("b", "1", "y")})
	await(t, m, "two built", allBuilt(2))
	m.Set([]segment.Segment{lan("b", "1", "y")})
	await(t, m, "one left", allBuilt(1))
	if names, _ := n.List(); !slices.Equal(names, []string{"default.b"}) {
		t.Errorf("the node has %v", names)
	}
}

func TestNothingIsDoneBeforeTheFirstWish(t *testing.T) {
	n := &node{states: map[string]segment.State{"default.old": {Exists: true}}}
	m, _ := start(t, n)
	m.Enqueue("default.old")
	m.Set(nil)
	await(t, m, "what an earlier run left is gone", func([]lanmgr.Report) bool { names, _ := n.List(); return len(names) == 0 })
}

func TestAttachedSegmentStaysUntilItsPodIsGone(t *testing.T) {
	n := &node{states: map[string]segment.State{}}
	m, cdiDir := start(t, n)
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "built", allBuilt(1))
	c := n.attach("default.a", "x")
	if err := cdi.Write(cdiDir, cdi.Device{Netns: "default.a", Spoke: "x", ClaimID: c.ID, Env: []string{"A=1"}}); err != nil {
		t.Fatal(err)
	}
	m.Enqueue("default.a")
	await(t, m, "attached", func(rs []lanmgr.Report) bool { return len(rs) == 1 && len(rs[0].Claims) == 1 })

	m.Set(nil)
	rs := await(t, m, "leaving", func(rs []lanmgr.Report) bool { return len(rs) == 1 && rs[0].Leaving })
	if !slices.Equal(rs[0].Unwanted, []string{"x"}) || !rs[0].Built {
		t.Errorf("report of a leaving segment: %+v", rs[0])
	}
	leaving := func() bool {
		s, err := n.Observe(t.Context(), "default.a")
		return err == nil && s.Record != nil && s.Record.Leaving
	}
	if !leaving() {
		t.Error("its record does not tell")
	}
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "wanted again", allBuilt(1))
	if leaving() {
		t.Error("its record tells that it is leaving")
	}
	m.Set(nil)
	// Another LAN of the same network namespace waits for its turn.
	m.Set([]segment.Segment{lan("a", "2", "x")})
	await(t, m, "still leaving", func(rs []lanmgr.Report) bool { return rs[0].Leaving && rs[0].Segment.LAN.UID == "1" })

	n.detach("default.a", c.ID)
	m.Enqueue("default.a")
	await(t, m, "the new LAN's", func(rs []lanmgr.Report) bool {
		return allBuilt(1)(rs) && rs[0].Segment.LAN.UID == "2"
	})
	if left, err := cdi.List(cdiDir); err != nil || len(left) > 0 {
		t.Errorf("CDI devices left: %v, %v", left, err)
	}
}

// The API server lets a LAN go when every node says that it is gone.
func TestALANIsGoneOnlyOnceItWasLookedForAndNothingIsThere(t *testing.T) {
	old := lan("old", "1", "x")
	n := &node{states: map[string]segment.State{"default.old": {Exists: true, Record: &old}}, blind: errors.New("no buffer space available")}
	m, _ := start(t, n)
	if m.Removed(old.LAN, old.Netns) || m.Observed() {
		t.Error("gone before anybody looked")
	}
	m.Set([]segment.Segment{lan("a", "1", "y")})
	await(t, m, "what cannot be seen is told of", func(rs []lanmgr.Report) bool {
		return m.Observed() && len(rs) == 2 && rs[1].Segment.Netns == "default.old" && rs[1].Leaving && rs[1].Err != nil
	})
	if m.Removed(old.LAN, old.Netns) {
		t.Error("gone, though it cannot be seen")
	}
	n.mu.Lock()
	n.blind = nil
	n.mu.Unlock()
	await(t, m, "gone", func([]lanmgr.Report) bool { return m.Removed(old.LAN, old.Netns) })
	if names, _ := n.List(); slices.Contains(names, "default.old") {
		t.Errorf("said to be gone, but the node has %v", names)
	}
	a := lan("a", "1", "y")
	await(t, m, "built", allBuilt(1))
	if m.Removed(a.LAN, a.Netns) {
		t.Error("a LAN that is wanted is gone")
	}
	if never := lan("a", "0", "y"); !m.Removed(never.LAN, never.Netns) {
		t.Error("a LAN that never had the netns, which is another's, is not gone")
	}
	n.attach("default.a", "y")
	m.Set(nil)
	if m.Removed(a.LAN, a.Netns) {
		t.Error("gone before anybody looked again")
	}
	await(t, m, "leaving", func(rs []lanmgr.Report) bool { return len(rs) == 1 && rs[0].Leaving && len(rs[0].Claims) == 1 })
	if m.Removed(a.LAN, a.Netns) {
		t.Error("gone with a pod attached")
	}
}

func TestFailureIsReportedAndTriedAgain(t *testing.T) {
	n := &node{states: map[string]segment.State{}, refuse: errors.New("no buffer space available")}
	m, _ := start(t, n)
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "reported", func(rs []lanmgr.Report) bool { return len(rs) == 1 && errors.Is(rs[0].Err, n.refuse) && !rs[0].Built })
	n.mu.Lock()
	n.refuse = nil
	n.mu.Unlock()
	await(t, m, "built by itself", allBuilt(1))
}

// What k8slan itself had reason to change is no repair: a wish, and pods that come and go without its doing.
func TestARepairIsWhatSomebodyElseMadeNecessary(t *testing.T) {
	looks := make(chan lanmgr.Observation, 1000)
	n := &node{states: map[string]segment.State{}, watch: func(l lanmgr.Observation) { looks <- l }}
	m, _ := start(t, n)
	repairs := func() (count int) {
		for {
			select {
			case l := <-looks:
				if l.Took <= 0 || l.Repair && len(l.Done) == 0 {
					t.Errorf("look %+v", l)
				}
				if l.Repair {
					count++
				}
			default:
				return count
			}
		}
	}
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "built", allBuilt(1))
	m.Set([]segment.Segment{lan("a", "1", "x", "y")})
	await(t, m, "edited", func(rs []lanmgr.Report) bool { return allBuilt(1)(rs) && len(rs[0].Segment.Spokes) == 2 })
	claim := n.attach("default.a", "x")
	m.Enqueue("default.a")
	await(t, m, "attached", func(rs []lanmgr.Report) bool { return allBuilt(1)(rs) && len(rs[0].Claims) == 1 })
	n.detach("default.a", claim.ID)
	m.Enqueue("default.a")
	await(t, m, "detached", func(rs []lanmgr.Report) bool { return allBuilt(1)(rs) && len(rs[0].Claims) == 0 })
	if count := repairs(); count != 0 {
		t.Errorf("%d repairs where nobody else changed anything", count)
	}
	n.change("default.a", func(s *segment.State) { *s = apply(*s, segment.DelLink{Name: segment.PortName("y")}) })
	m.Enqueue("default.a")
	deadline := time.After(20 * time.Second)
	for {
		select {
		case l := <-looks:
			if !l.Repair {
				continue
			}
			if !slices.ContainsFunc(l.Done, func(op segment.Op) bool { p, ok := op.(segment.AddPair); return ok && p.Spoke == "y" }) {
				t.Errorf("repaired %v", l.Done)
			}
			return
		case <-deadline:
			t.Fatal("a port that somebody deleted is no repair")
		}
	}
}

func TestLookingWithoutACauseChangesNothing(t *testing.T) {
	n := &node{states: map[string]segment.State{}}
	m, _ := start(t, n)
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "built", allBuilt(1))
	n.mu.Lock()
	n.writes = 0
	n.mu.Unlock()
	m.Enqueue("default.a")
	<-m.Changed()
	m.Enqueue("default.a")
	<-m.Changed()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.writes != 0 {
		t.Errorf("%d changes where all was as it should be", n.writes)
	}
}

// A LAN may be deleted and created again faster than its segment is torn down.
func TestALANThatComesBackWhileItIsTornDownIsBuilt(t *testing.T) {
	n := &node{states: map[string]segment.State{}}
	m, _ := start(t, n)
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "built", allBuilt(1))
	n.mu.Lock()
	n.after = func(op segment.Op) {
		if _, removed := op.(segment.RemoveNetns); removed {
			m.Set([]segment.Segment{lan("a", "2", "x")})
		}
	}
	n.mu.Unlock()
	m.Set(nil)
	await(t, m, "the new LAN's", func(rs []lanmgr.Report) bool { return allBuilt(1)(rs) && rs[0].Segment.LAN.UID == "2" })
}

// Without the lock, the daemon may see a segment in the middle of an attach. If it took that for damage, kubelet would be told that
// no spoke of the LAN can be had, and would reject the pods that come at that moment.
func TestHalfOfAnAttachIsNoDamage(t *testing.T) {
	n := &node{states: map[string]segment.State{}}
	m, _ := start(t, n)
	m.Set([]segment.Segment{lan("a", "1", "x", "y")})
	await(t, m, "built", allBuilt(1))
	n.mu.Lock()
	n.unlocked = func(s segment.State) segment.State {
		for i := range s.Links {
			s.Links[i].AltNames = nil
		}
		return s
	}
	n.mu.Unlock()
	for range 5 {
		m.Enqueue("default.a")
		<-m.Changed()
		if rs := m.Reports(); !allBuilt(1)(rs) {
			t.Fatalf("reports are %+v", rs)
		}
	}
}

// What cannot be seen is not gone: the controller would give the ns of an attached LAN to the next one.
func TestAttachmentsAreReportedWhileTheKernelCannotBeRead(t *testing.T) {
	n := &node{states: map[string]segment.State{}}
	m, _ := start(t, n)
	m.Set([]segment.Segment{lan("a", "1", "x")})
	await(t, m, "built", allBuilt(1))
	n.attach("default.a", "x")
	m.Enqueue("default.a")
	await(t, m, "attached", func(rs []lanmgr.Report) bool { return len(rs) == 1 && len(rs[0].Claims) == 1 })
	n.mu.Lock()
	n.blind = errors.New("no buffer space available")
	n.mu.Unlock()
	m.Set(nil)
	rs := await(t, m, "the error", func(rs []lanmgr.Report) bool { return len(rs) == 1 && rs[0].Err != nil })
	if r := rs[0]; len(r.Claims) != 1 || !r.Leaving || r.Segment.LAN.UID != "1" {
		t.Errorf("report %+v", r)
	}
	n.mu.Lock()
	n.blind = nil
	n.mu.Unlock()
	await(t, m, "leaving", func(rs []lanmgr.Report) bool { return len(rs) == 1 && rs[0].Err == nil && rs[0].Leaving })
}

// The record may be lost while a VM is attached to a LAN that nobody wants any more: it goes with the VM all the same.
func TestASegmentOfNobodyGoesWithItsLastVM(t *testing.T) {
	n := &node{states: map[string]segment.State{"default.old": {Exists: true, Links: []segment.Link{
		{Name: segment.PlugName("vm"), Type: "veth", AltNames: []string{segment.ClaimID("c1", "net1")}, Promisc: 1},
		{Name: "vx7", Type: "vxlan", VXLAN: segment.VXLANState{VNI: 7, Port: 4789}},
	}}}}
	m, _ := start(t, n)
	m.Set(nil)
	rs := await(t, m, "attached", func(rs []lanmgr.Report) bool { return len(rs) == 1 && len(rs[0].Claims) == 1 })
	if s := rs[0].Segment; s.Netns != "default.old" || s.VXLAN.VNI != 7 || s.VXLAN.Port != 4789 {
		t.Errorf("what it occupies is reported as %+v", s)
	}
	if perhaps := lan("old", "1", "vm"); m.Removed(perhaps.LAN, perhaps.Netns) {
		t.Error("nobody knows whose it is, but it is said not to be this LAN's")
	}
	n.change("default.old", func(s *segment.State) { s.Links[0].Promisc = 0 })
	m.Enqueue("default.old")
	await(t, m, "gone", func([]lanmgr.Report) bool { names, _ := n.List(); return len(names) == 0 })
}

// What a VXLAN is told changes without a look at the segment, until one is due for another reason, or the write fails.
func TestWhatAVXLANIsToldIsWrittenWithoutALook(t *testing.T) {
	n := &node{states: map[string]segment.State{}}
	m, _ := start(t, n)
	told := func(remotes, macs int) segment.Segment {
		s := lan("a", "1", "x")
		s.VXLAN.Group, s.VXLAN.Local, s.VXLAN.NoLearning, s.VXLAN.UnderlayIndex = netip.Addr{}, netip.MustParseAddr("192.0.2.1"), true, 7
		s.Remotes, s.FDB = []netip.Addr{}, []segment.FDBEntry{}
		for i := range byte(remotes) {
			s.Remotes = append(s.Remotes, netip.AddrFrom4([4]byte{192, 0, 2, 2 + i}))
		}
		for i := range byte(macs) {
			s.FDB = append(s.FDB, segment.FDBEntry{MAC: [6]byte{2, i}, VTEP: netip.MustParseAddr("192.0.2.2")})
		}
		return s
	}
	is := func(remotes, macs int) bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		l, ok := n.state("default.a").Link("vx1")
		return ok && len(l.VXLAN.Remotes) == remotes && len(l.VXLAN.FDB) == macs
	}
	looks := func() int {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.looks
	}
	done := func(s segment.Segment) func([]lanmgr.Report) bool {
		return func(rs []lanmgr.Report) bool {
			return allBuilt(1)(rs) && rs[0].Segment.Equal(s) && rs[0].Err == nil && rs[0].Remotes == len(s.Remotes)
		}
	}
	m.Set([]segment.Segment{told(1, 0)})
	await(t, m, "built", done(told(1, 0)))
	n.attach("default.a", "x")
	m.Enqueue("default.a")
	await(t, m, "attached", func(rs []lanmgr.Report) bool { return len(rs[0].Claims) == 1 && rs[0].Built })

	before := looks()
	for _, step := range [][2]int{{2, 3}, {2, 1}, {1, 4}, {0, 0}, {3, 3}} {
		m.Set([]segment.Segment{told(step[0], step[1])})
		await(t, m, "told", done(told(step[0], step[1])))
		if !is(step[0], step[1]) {
			t.Errorf("is not told %v", step)
		}
	}
	if after := looks(); after != before {
		t.Errorf("looked %d times", after-before)
	}

	partial := told(1, 1)
	partial.Partial = true
	m.Set([]segment.Segment{partial})
	await(t, m, "nothing deleted", func(rs []lanmgr.Report) bool { return allBuilt(1)(rs) && rs[0].Segment.Equal(partial) })
	if !is(3, 3) {
		t.Error("something went that may be there")
	}
	m.Set([]segment.Segment{told(1, 1)})
	await(t, m, "deleted", done(told(1, 1)))
	if !is(1, 1) || looks() == before {
		t.Error("what was there from before is not looked for")
	}

	n.mu.Lock()
	n.refuse = errors.New("no room")
	n.mu.Unlock()
	m.Set([]segment.Segment{told(2, 2)})
	await(t, m, "refused", func(rs []lanmgr.Report) bool { return rs[0].Err != nil })
	n.mu.Lock()
	n.refuse = nil
	n.mu.Unlock()
	await(t, m, "told in the end", done(told(2, 2)))
	if !is(2, 2) {
		t.Error("is not told")
	}
}
