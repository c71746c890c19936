package dataplane

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/k8slan/k8slan/cni"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/netlab"
)

// tries is how often a LAN is deleted while a pod attaches; make soak has 1000.
var tries = flag.Int("tries", 100, "how often a LAN is deleted while a pod attaches, of each kind half")

// A LAN is deleted at the moment in which a pod attaches, many times. Either the pod is attached and the LAN stays
// whole until the pod is detached, or the pod is refused and nothing is left. The manager never reports a LAN as
// removed while a pod has it. Each time the next LAN has the same ns, VNI and spokes.
func TestLANIsDeletedWhileAPodAttaches(t *testing.T) {
	t.Parallel()
	const lanes, seed = 2, 20261121
	each := *tries / 2 / lanes // of each kind in each lane
	for _, kind := range []segment.Kind{segment.Veth, segment.Macvtap} {
		t.Run(string(kind), func(t *testing.T) {
			if kind == segment.Macvtap {
				netlab.NeedDevices(t)
			}
			a, _ := twoNodes(t)
			w := &sharedWant{managed: a.manage(t), want: map[string]segment.Segment{}}
			var races [lanes]race
			var running sync.WaitGroup
			for i := range races {
				pod := netlab.NewPod(t)
				races[i] = race{
					sharedWant: w, kind: kind, pod: pod, links: pod.Netlink(t),
					rng: rand.New(rand.NewPCG(seed, uint64(i))), head: 50 * time.Millisecond,
					lan: a.withUnderlay(t, lan(fmt.Sprintf("raced%d", i), uint32(500+i),
						fmt.Sprintf("r%d", i), fmt.Sprintf("s%d", i))),
				}
				running.Go(func() { races[i].run(t, each) })
			}
			running.Wait()
			attached, refused := 0, 0
			for _, r := range races {
				attached, refused = attached+r.attached, refused+r.refused
			}
			t.Logf("%d attached, %d refused", attached, refused)
			if done := lanes * each; attached+refused != done || attached < done/10 || refused < done/10 {
				t.Errorf("%d attached and %d refused in %d tries: that is no race", attached, refused, done)
			}
			w.stop()
			expectNothing(t, a)
			if devices := a.devices(t); len(devices) != 0 {
				t.Errorf("CDI devices left: %v", devices)
			}
		})
	}
}

// sharedWant is a node's desired state, to which each race contributes its LAN.
type sharedWant struct {
	managed
	mu   sync.Mutex
	want map[string]segment.Segment // by netns
}

// add adds a LAN to the desired state.
func (w *sharedWant) add(s segment.Segment) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.want[s.Netns] = s
	w.Set(slices.Collect(maps.Values(w.want)))
}

// drop removes a LAN from the desired state.
func (w *sharedWant) drop(s segment.Segment) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.want, s.Netns)
	w.Set(slices.Collect(maps.Values(w.want)))
}

// race deletes one LAN while one pod attaches, again and again.
type race struct {
	*sharedWant
	lan   segment.Segment
	kind  segment.Kind
	pod   netlab.Namespace
	links *netlink.Handle // the pod's
	rng   *rand.Rand

	attached, refused int

	// head is the head start of the deletion. It grows with each pod that was attached and shrinks with each that was
	// refused, so that most tries are close to the moment in which the LAN is removed.
	head time.Duration
}

// run tries so many times, each time with a LAN of a new UID.
func (r *race) run(t *testing.T, tries int) {
	for number := range tries {
		s := r.lan
		s.LAN.UID += fmt.Sprintf("-%d", number)
		sandbox := fmt.Sprintf("sandbox-%s-%d", s.Netns, number)
		if err := r.once(t, s, sandbox); err != nil {
			t.Errorf("%s, try %d: %v", s.LAN, number, err)
			return
		}
	}
}

// once creates the LAN and deletes it while the pod attaches.
func (r *race) once(t *testing.T, s segment.Segment, sandbox string) error {
	r.add(s)
	if err := r.awaitReport(s, "the LAN to be built", func(report lanmgr.Report) bool {
		return report.Built && !report.Leaving && report.Segment.Equal(s)
	}); err != nil {
		return err
	}
	r.drop(s)
	<-time.After(time.Duration(r.rng.Int64N(int64(2*r.head) + 1)))
	refusal := r.call(t, "ADD", s, sandbox)
	var err error
	if refusal == nil {
		r.attached++
		r.head = r.head*5/4 + time.Millisecond
		err = r.expectAttached(t, s, sandbox)
	} else {
		r.refused++
		r.head = r.head * 4 / 5
		err = r.expectRefused(t, s, sandbox, refusal)
	}
	if err != nil {
		return err
	}
	removed := func(lanmgr.Report) bool { return r.Removed(s.LAN, s.Netns) }
	if err := r.awaitReport(s, "the LAN to be removed", removed); err != nil {
		return err
	}
	if have, err := r.observeAfresh(t, s); err != nil || have.Exists || have.Record != nil {
		return fmt.Errorf("reported as removed, but there is %s, %w", describe(have), err)
	}
	return r.expectPodLinks(0)
}

// expectAttached expects the LAN to stay whole until the pod is detached.
func (r *race) expectAttached(t *testing.T, s segment.Segment, sandbox string) error {
	if err := r.awaitReport(s, "the LAN to be leaving", func(report lanmgr.Report) bool {
		return report.Leaving && report.Segment.LAN == s.LAN &&
			len(report.Claims) == 1 && report.Claims[0].OfSandbox(sandbox)
	}); err != nil {
		return err
	}
	have, err := r.observeAfresh(t, s)
	if err != nil {
		return err
	}
	s.Leaving = true
	if left := segment.Diff(s, have); len(left) > 0 || len(have.Claims()) != 1 {
		return fmt.Errorf("a pod is attached, and the LAN lacks %v:\n%s", left, describe(have))
	}
	if err := r.expectPodLinks(1); err != nil {
		return err
	}
	if r.Removed(s.LAN, s.Netns) {
		return errors.New("reported as removed while a pod is attached")
	}
	return r.call(t, "DEL", s, sandbox)
}

// expectRefused expects a CNI error and no interface in the pod.
func (r *race) expectRefused(t *testing.T, s segment.Segment, sandbox string, refusal error) error {
	if said, ok := errors.AsType[*types.Error](refusal); !ok || said.Code != types.ErrTryAgainLater {
		return fmt.Errorf("refused with %w", refusal)
	}
	if err := r.expectPodLinks(0); err != nil {
		return err
	}
	if r.rng.IntN(2) == 0 {
		return nil // a runtime that calls no DEL
	}
	return r.call(t, "DEL", s, sandbox)
}

// expectPodLinks expects that many links in the pod, beside loopback.
func (r *race) expectPodLinks(count int) error {
	links, err := r.links.LinkList()
	if err != nil {
		return err
	}
	if have := len(links) - 1; have != count {
		return fmt.Errorf("the pod has %d interfaces, want %d: %v", have, count, links)
	}
	return nil
}

// awaitReport waits until the manager's report of the segment is as described; the zero Report stands for none.
func (r *race) awaitReport(s segment.Segment, what string, fits func(lanmgr.Report) bool) error {
	again, deadline := time.NewTicker(time.Millisecond), time.After(20*frameTimeout)
	defer again.Stop()
	for {
		var here lanmgr.Report
		for _, report := range r.Reports() {
			if report.Segment.Netns == s.Netns {
				here = report
			}
		}
		if fits(here) {
			return nil
		}
		select {
		case <-again.C:
		case <-deadline:
			return fmt.Errorf("timed out waiting for %s; the manager reports %+v", what, here)
		}
	}
}

// observeAfresh observes the segment as a new process does, which has no namespace of an earlier try open.
func (r *race) observeAfresh(t *testing.T, s segment.Segment) (segment.State, error) {
	k := kernel.New(kernel.Paths{Run: r.node.Run, HostNetns: r.Path})
	defer k.Close()
	return k.Observe(t.Context(), s.Netns)
}

// call runs the CNI plugin, which knows only what it reads on the node.
func (r *race) call(t *testing.T, verb string, s segment.Segment, sandbox string) error {
	k := kernel.New(kernel.Paths{Run: r.node.Run, HostNetns: r.Path})
	defer k.Close()
	config, err := json.Marshal(network(s, s.Spokes[0], r.kind, nil))
	if err != nil {
		return err
	}
	args := &skel.CmdArgs{
		ContainerID: sandbox, Netns: r.pod.Path, IfName: ifname, StdinData: config,
		Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + sandbox + ";K8S_POD_UID=1234",
	}
	plugin := cni.New(k, cni.Host{Run: r.node.Run, CDI: r.CDI, Stdout: io.Discard}).Funcs(t.Context())
	if verb == "DEL" {
		return plugin.Del(args)
	}
	return plugin.Add(args)
}
