package controller

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

var epoch = metav1.NewTime(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))

// lan returns the LAN default/<name> with UID uid-<name>, created that many seconds after the epoch.
func lan(name string, second int, vni int32, spokes ...string) v1beta1.LAN {
	return v1beta1.LAN{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: name, UID: types.UID("uid-" + name), Generation: 1,
			CreationTimestamp: metav1.NewTime(epoch.Add(time.Duration(second) * time.Second)),
		},
		Spec: v1beta1.LANSpec{VNI: vni, Spokes: spokes},
	}
}

// with returns a changed copy of a LAN.
func with(l v1beta1.LAN, changes ...func(*v1beta1.LAN)) v1beta1.LAN {
	l = *l.DeepCopy()
	for _, change := range changes {
		change(&l)
	}
	return l
}

func ns(name string) func(*v1beta1.LAN)    { return func(l *v1beta1.LAN) { l.Spec.NS = name } }
func port(port int32) func(*v1beta1.LAN)   { return func(l *v1beta1.LAN) { l.Spec.VXLANPort = port } }
func uid(uid types.UID) func(*v1beta1.LAN) { return func(l *v1beta1.LAN) { l.UID = uid } }

// withPools adds pools of three ports to the spec.
func withPools(names ...string) func(*v1beta1.LAN) {
	return func(l *v1beta1.LAN) {
		for _, name := range names {
			l.Spec.SpokePools = append(l.Spec.SpokePools, v1beta1.SpokePool{Name: name, Size: 3})
		}
	}
}

// holding makes the LAN hold what its spec asks for, with these spokes.
func holding(spokes ...string) func(*v1beta1.LAN) {
	return func(l *v1beta1.LAN) {
		e := l.Effective()
		l.Status.Holds = &v1beta1.Holding{NS: e.NS, VNI: e.VNI, Port: e.VXLANPort, Spokes: spokes}
	}
}

// deleting marks the LAN as being deleted.
func deleting(l *v1beta1.LAN) {
	l.DeletionTimestamp, l.Finalizers = &epoch, []string{v1beta1.Finalizer}
}

// leavingSegment returns a segment on worker1 that is leaving. Its ns is the default for the LAN's name.
func leavingSegment(uid types.UID, lan string, vni int32, pods ...v1beta1.Attachment) nodeSegment {
	return nodeSegment{"worker1", v1beta1.SegmentStatus{
		LAN: lan, UID: uid, NS: strings.Replace(lan, "/", ".", 1), VNI: vni, Port: 4789, State: v1beta1.SegmentLeaving,
		Attachments: pods,
	}}
}

// readySegment returns a Ready segment of default/<name> on worker1.
func readySegment(name string, vni, port int32) nodeSegment {
	return nodeSegment{"worker1", v1beta1.SegmentStatus{
		LAN: "default/" + name, UID: types.UID("uid-" + name), NS: "default." + name, VNI: vni, Port: port,
		State: v1beta1.SegmentReady,
	}}
}

// summary is a verdict in one line.
func summary(d decision) string {
	if d.Holds == nil {
		return d.Conflict
	}
	words := []string{"holds " + strings.Join(d.Holds.Spokes, ",")}
	for _, spoke := range slices.Sorted(maps.Keys(d.Refused)) {
		words = append(words, d.Refused[spoke])
	}
	return strings.Join(words, "; ")
}

func TestHolderKeepsAndOldestLANGetsWhatIsFree(t *testing.T) {
	for _, test := range []struct {
		name string
		lans []v1beta1.LAN
		left []nodeSegment
		want map[string]string
	}{
		{
			"two LANs that share nothing hold all they ask for",
			[]v1beta1.LAN{lan("a", 0, 1, "srl", "vm"), lan("b", 1, 2, "x")},
			nil,
			map[string]string{"a": "holds srl,vm", "b": "holds x"},
		},
		{
			"pools and spokes share their names",
			[]v1beta1.LAN{
				with(lan("a", 0, 1), withPools("web", "db")),
				with(lan("b", 1, 2, "web", "x"), withPools("db", "y")),
			},
			nil,
			map[string]string{
				"a": "holds db,web",
				"b": "holds x,y; spoke db is held by default/a; spoke web is held by default/a",
			},
		},
		{
			"a pool is not free while a pod has a port of that name",
			[]v1beta1.LAN{with(lan("a", 0, 1, "x"), withPools("web"))},
			[]nodeSegment{leavingSegment("uid-gone", "default/gone", 7,
				v1beta1.Attachment{Spoke: "web_3", Pool: "web", Pod: "default/web-1"})},
			map[string]string{"a": "holds x; spoke web is still in use by default/web-1 on worker1 (spoke web_3 of " +
				"LAN default/gone)"},
		},
		{
			"the older of two new LANs gets their VNI",
			[]v1beta1.LAN{lan("young", 1, 222, "x"), lan("lab", 0, 222, "y")},
			nil,
			map[string]string{"lab": "holds y", "young": "vni 222 is held by default/lab"},
		},
		{
			"the smaller UID of two LANs created in the same second gets their VNI",
			[]v1beta1.LAN{lan("b", 0, 222, "x"), lan("a", 0, 222, "y")},
			nil,
			map[string]string{"a": "holds y", "b": "vni 222 is held by default/a"},
		},
		{
			"a holder keeps its VNI when an older LAN asks for it",
			[]v1beta1.LAN{lan("old", 0, 222, "x"), with(lan("holder", 9, 222, "y"), holding("y"))},
			nil,
			map[string]string{"holder": "holds y", "old": "vni 222 is held by default/holder"},
		},
		{
			"one VNI can be held on two ports",
			[]v1beta1.LAN{lan("a", 0, 222, "x"), with(lan("b", 1, 222, "y"), port(4790))},
			nil,
			map[string]string{"a": "holds x", "b": "holds y"},
		},
		{
			"a port that is not the default is in the message",
			[]v1beta1.LAN{with(lan("a", 0, 222, "x"), port(4790)), with(lan("b", 1, 222, "y"), port(4790))},
			nil,
			map[string]string{"a": "holds x", "b": "vni 222 on port 4790 is held by default/a"},
		},
		{
			"the default port conflicts with the same port in a spec",
			[]v1beta1.LAN{lan("a", 0, 222, "x"), with(lan("b", 1, 222, "y"), port(4789))},
			nil,
			map[string]string{"a": "holds x", "b": "vni 222 is held by default/a"},
		},
		{
			"an ns in a spec conflicts with a default ns",
			[]v1beta1.LAN{lan("a", 0, 1, "x"), with(lan("b", 1, 2, "y"), ns("default.a"))},
			nil,
			map[string]string{"a": "holds x", "b": "ns default.a is held by default/a"},
		},
		{
			"a conflict over a spoke refuses only that spoke",
			[]v1beta1.LAN{lan("a", 0, 1, "srl", "vm"), lan("b", 1, 2, "srl", "host")},
			nil,
			map[string]string{"a": "holds srl,vm", "b": "holds host; spoke srl is held by default/a"},
		},
		{
			"a refused LAN holds no spoke",
			[]v1beta1.LAN{lan("a", 0, 1, "x"), lan("b", 1, 1, "srl"), lan("c", 2, 3, "srl")},
			nil,
			map[string]string{"a": "holds x", "b": "vni 1 is held by default/a", "c": "holds srl"},
		},
		{
			"a spoke that the holder no longer asks for is free",
			[]v1beta1.LAN{with(lan("a", 0, 1, "x"), holding("srl", "x")), lan("b", 1, 2, "srl")},
			nil,
			map[string]string{"a": "holds x", "b": "holds srl"},
		},
		{
			"a holder keeps its spoke when an older LAN adds it",
			[]v1beta1.LAN{
				with(lan("old", 0, 1, "x", "srl"), holding("x")),
				with(lan("b", 1, 2, "srl"), holding("srl")),
			},
			nil,
			map[string]string{"old": "holds x; spoke srl is held by default/b", "b": "holds srl"},
		},
		{
			"a holder that changes to a port on which its VNI is held is refused",
			[]v1beta1.LAN{
				with(lan("a", 0, 1, "x"), holding("x"), port(4790)),
				with(lan("b", 1, 1, "y"), port(4790), holding("y")),
			},
			nil,
			map[string]string{"a": "vni 1 on port 4790 is held by default/b", "b": "holds y"},
		},
		{
			"a holder that changes to a free port keeps its ns when an older LAN asks for it",
			[]v1beta1.LAN{
				with(lan("a", 1, 1, "x"), holding("x"), port(4790)),
				with(lan("old", 0, 2, "y"), ns("default.a")),
			},
			nil,
			map[string]string{"a": "holds x", "old": "ns default.a is held by default/a"},
		},
		{
			"an ns with pods of a deleted LAN is not free",
			[]v1beta1.LAN{with(lan("lab", 5, 1, "srl"), uid("new"))},
			[]nodeSegment{leavingSegment("old", "default/lab", 1, pod("srl", "srl-1"))},
			map[string]string{"lab": "vni 1 is still in use by default/lab (leaving) on node worker1"},
		},
		{
			"an ns that a node has not removed yet is not free",
			[]v1beta1.LAN{with(lan("lab", 5, 2, "srl"), uid("new"))},
			[]nodeSegment{leavingSegment("old", "default/lab", 1)},
			map[string]string{"lab": "ns default.lab is still in use by default/lab (leaving) on node worker1"},
		},
		{
			"an ns on a node is not free even if its LAN is unknown",
			[]v1beta1.LAN{lan("lab", 5, 2, "srl")},
			[]nodeSegment{leavingSegment("", "default/lab", 0)},
			map[string]string{"lab": "ns default.lab is still in use by default/lab (leaving) on node worker1"},
		},
		{
			"a VNI that a node still has after its LAN is gone is not free",
			[]v1beta1.LAN{lan("b", 0, 1, "srl"), lan("c", 1, 1, "x")},
			[]nodeSegment{leavingSegment("old", "default/a", 1), leavingSegment("old", "default/a", 1)},
			map[string]string{
				"b": "vni 1 is still in use by default/a (leaving) on node worker1 and 1 more",
				"c": "vni 1 is still in use by default/a (leaving) on node worker1 and 1 more",
			},
		},
		{
			"a VNI of a segment without a LAN object is not free",
			[]v1beta1.LAN{lan("lab", 5, 1, "srl")},
			[]nodeSegment{{"worker1", v1beta1.SegmentStatus{
				LAN: "megalos:1", NS: "megalos-1", VNI: 1, Port: 4789,
				State: v1beta1.SegmentReady,
			}}},
			map[string]string{"lab": "vni 1 is still in use by megalos:1 (created by its pods) on node worker1"},
		},
		{
			"a VNI that a node still has is free on another port",
			[]v1beta1.LAN{with(lan("b", 0, 1, "srl"), port(4790))},
			[]nodeSegment{leavingSegment("old", "default/a", 1)},
			map[string]string{"b": "holds srl"},
		},
		{
			"a holder keeps its VNI when a node with an old segment comes back",
			[]v1beta1.LAN{with(lan("b", 0, 1, "srl"), holding("srl"))},
			[]nodeSegment{leavingSegment("old", "default/b", 1, pod("srl", "srl-1"))},
			map[string]string{"b": "holds srl"},
		},
		{
			"a LAN that is being deleted keeps what it holds, whatever its spec says",
			[]v1beta1.LAN{
				with(lan("a", 0, 1, "srl", "vm"), holding("srl", "vm"), port(4790),
					func(l *v1beta1.LAN) { l.Spec.Spokes = []string{"x"} }, deleting),
				lan("b", 1, 1, "y"), lan("c", 2, 2, "srl", "x"),
			},
			nil,
			map[string]string{
				"a": "holds srl,vm", "b": "vni 1 is still in use by default/a (being deleted)",
				"c": "holds x; spoke srl is still in use by default/a (being deleted)",
			},
		},
		{
			"a LAN that is being deleted gets nothing",
			[]v1beta1.LAN{with(lan("a", 0, 1, "srl"), deleting), lan("b", 1, 1, "srl")},
			nil,
			map[string]string{"a": "", "b": "holds srl"},
		},
		{
			"two LANs can swap their ports",
			[]v1beta1.LAN{
				with(lan("a", 0, 1, "x"), holding("x"), port(4790)),
				with(lan("b", 1, 1, "y"), port(4790), holding("y"), port(4789)),
			},
			[]nodeSegment{readySegment("a", 1, 4789), readySegment("b", 1, 4790)},
			map[string]string{"a": "holds x", "b": "holds y"},
		},
		{
			"a VNI that another LAN has just stopped using is free, unless a pod keeps it on a node",
			[]v1beta1.LAN{
				with(lan("a", 0, 1, "x"), holding("x"), port(4790)), lan("b", 1, 1, "y"),
				with(lan("c", 0, 2, "z"), holding("z"), port(4790)), lan("d", 1, 2, "w"),
			},
			[]nodeSegment{readySegment("a", 1, 4789), leavingSegment("uid-c", "default/c", 2, pod("z", "pod-z"))},
			map[string]string{
				"a": "holds x", "b": "holds y", "c": "holds z",
				"d": "vni 2 is still in use by default/c (leaving) on node worker1",
			},
		},
		{
			"a spoke with a pod of another LAN is not free",
			[]v1beta1.LAN{with(lan("a", 0, 1, "x"), holding("x")), lan("b", 1, 2, "srl", "y")},
			[]nodeSegment{leavingSegment("uid-a", "default/a", 1, pod("srl", "srl-1"))},
			map[string]string{
				"a": "holds x",
				"b": "holds y; spoke srl is still in use by default/srl-1 on worker1 (spoke srl of LAN default/a)",
			},
		},
		{
			"a LAN gets a spoke with its own pods",
			[]v1beta1.LAN{lan("a", 0, 1, "srl")},
			[]nodeSegment{leavingSegment("uid-a", "default/a", 1, pod("srl", "srl-1"))},
			map[string]string{"a": "holds srl"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			have := map[string]string{}
			for uid, d := range admit(test.lans, test.left) {
				for _, l := range test.lans {
					if l.UID == uid {
						have[l.Name] = summary(d)
					}
				}
			}
			if !maps.Equal(have, test.want) {
				t.Errorf("\nhave %v\nwant %v", have, test.want)
			}
		})
	}
}

// randomLANs returns a few LANs with many conflicts. Some hold what they ask for, some what they once asked for, and
// some nothing.
func randomLANs(r *rand.Rand) []v1beta1.LAN {
	pick := func() string { return string(rune('a' + r.IntN(5))) }
	lans := make([]v1beta1.LAN, 1+r.IntN(7))
	for i := range lans {
		spokes := map[string]bool{}
		for range 1 + r.IntN(4) {
			spokes[pick()] = true
		}
		lans[i] = with(lan(fmt.Sprintf("lan%d", i), r.IntN(3), int32(1+r.IntN(4)), slices.Sorted(maps.Keys(spokes))...),
			uid(types.UID(fmt.Sprint(r.Uint64()))), port(int32(4789+r.IntN(2))))
		if r.IntN(2) == 0 {
			lans[i].Spec.NS = "ns-" + pick()
		}
		if r.IntN(2) == 0 {
			holding(pick(), pick())(&lans[i])
		}
		if r.IntN(4) == 0 {
			lans[i].Spec.VXLANPort = 4791
		}
	}
	return lans
}

func failIfHeldTwice(t *testing.T, lans []v1beta1.LAN, holds func(*v1beta1.LAN) *v1beta1.Holding) {
	t.Helper()
	held := map[string]string{}
	hold := func(l *v1beta1.LAN, what string) {
		if held[what] != "" {
			t.Fatalf("%s is held by %s and by %s", what, held[what], l.Name)
		}
		held[what] = l.Name
	}
	for i := range lans {
		h := holds(&lans[i])
		if h == nil {
			continue
		}
		hold(&lans[i], "ns "+h.NS)
		hold(&lans[i], fmt.Sprintf("vni %d port %d", h.VNI, h.Port))
		for _, spoke := range h.Spokes {
			hold(&lans[i], "spoke "+spoke)
		}
	}
}

func TestAdmissionHasOneHolderAndIsStable(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		lans := randomLANs(r)
		decisions := admit(lans, nil)
		failIfHeldTwice(t, lans, func(l *v1beta1.LAN) *v1beta1.Holding { return decisions[l.UID].Holds })

		shuffled := slices.Clone(lans)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if again := admit(shuffled, nil); !equality.Semantic.DeepEqual(decisions, again) {
			t.Fatalf("the result depends on the order of the LANs:\n%v\n%v", decisions, again)
		}

		for i := range lans {
			lans[i].Status.Holds = decisions[lans[i].UID].Holds
		}
		if again := admit(lans, nil); !equality.Semantic.DeepEqual(decisions, again) {
			t.Fatalf("a second run has another result:\n%v\n%v", decisions, again)
		}
	}
}

func TestNothingIsRefusedThatNoLANHolds(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 5000 {
		lans := randomLANs(r)
		decisions := admit(lans, nil)
		held := map[string]bool{}
		for _, d := range decisions {
			if d.Holds != nil {
				held["ns "+d.Holds.NS], held["vni "+vniKey{d.Holds.VNI, d.Holds.Port}.String()] = true, true
				for _, spoke := range d.Holds.Spokes {
					held["spoke "+spoke] = true
				}
			}
		}
		for i := range lans {
			d, e := decisions[lans[i].UID], lans[i].Effective()
			if d.Holds == nil && !held["ns "+e.NS] && !held["vni "+vniKey{e.VNI, e.VXLANPort}.String()] {
				t.Fatalf("%s is refused (%s), but no LAN holds its ns and VNI", lans[i].Name, d.Conflict)
			}
			for spoke := range d.Refused {
				if !held["spoke "+spoke] {
					t.Fatalf("spoke %s is refused, but no LAN holds it", spoke)
				}
			}
		}
	}
}

// Statuses are written one after the other. At no moment may two of them hold the same thing.
func TestWritesInOrderNeverHaveTwoHolders(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 5000 {
		lans := randomLANs(r)
		for i := range lans { // a valid state: what admit decides before the specs change
			lans[i].Status.Holds = nil
		}
		for uid, d := range admit(lans, nil) {
			for i := range lans {
				if lans[i].UID == uid {
					lans[i].Status.Holds = d.Holds
				}
			}
		}
		changed := randomLANs(r)
		for i := range min(len(lans), len(changed)) {
			lans[i].Spec.VXLANPort, lans[i].Spec.Spokes = changed[i].Spec.VXLANPort, changed[i].Spec.Spokes
			if r.IntN(4) == 0 {
				deleting(&lans[i])
			}
		}
		want := admit(lans, nil)
		now := func(l *v1beta1.LAN) *v1beta1.Holding { return l.Status.Holds }
		held := heldVNIs(lans)
		for i := range lans {
			lans[i].Status.Holds = heldThroughout(lans[i].Status.Holds, want[lans[i].UID].Holds, held)
			failIfHeldTwice(t, lans, now)
		}
		for i := range lans {
			lans[i].Status.Holds = want[lans[i].UID].Holds
			failIfHeldTwice(t, lans, now)
		}
	}
}

// Nodes remove a LAN that holds nothing, and kubelet would then see its spokes disappear for a moment.
func TestLANHoldsTheRestWhileItsPortChanges(t *testing.T) {
	before := &v1beta1.Holding{NS: "default.lab", VNI: 222, Port: 4789, Spokes: []string{"srl", "vm"}}
	after := &v1beta1.Holding{NS: "default.lab", VNI: 222, Port: 4790, Spokes: []string{"new", "srl"}}
	want := &v1beta1.Holding{NS: "default.lab", VNI: 222, Port: 4790, Spokes: []string{"srl"}}
	if h := heldThroughout(before, after, map[vniKey]bool{{222, 4789}: true}); !equality.Semantic.DeepEqual(h, want) {
		t.Errorf("meanwhile it holds %+v, want %+v", h, want)
	}
	if h := heldThroughout(before, after, map[vniKey]bool{{222, 4789}: true, {222, 4790}: true}); h != nil {
		t.Errorf("it holds a VNI that another LAN still holds: %+v", h)
	}
}
