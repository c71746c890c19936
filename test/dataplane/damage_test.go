package dataplane

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/netlab"
)

// describe describes the segment as a new process observes it.
func (n node) describe(t *testing.T, s segment.Segment) string {
	t.Helper()
	k := n.newKernel(t)
	defer k.Close()
	have, err := k.Observe(t.Context(), s.Netns)
	must(t, err)
	return describe(have)
}

// killedAfter decides like decide and returns only the first steps.
func killedAfter(steps int, decide func(segment.State) []segment.Op) func(segment.State) []segment.Op {
	return func(have segment.State) []segment.Op {
		ops := decide(have)
		return ops[:min(steps, len(ops))]
	}
}

// expectNothing expects no trace of any LAN on the node.
func expectNothing(t *testing.T, n node) {
	t.Helper()
	must(t, filepath.WalkDir(n.Run, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			t.Errorf("left: %s", path)
		}
		return err
	}))
	if names, err := n.kernel.List(); err != nil || len(names) != 0 {
		t.Errorf("segments left: %v, %v", names, err)
	}
	if links := n.Links(t); !slices.Equal(links, []string{netlab.UnderlayDevice}) {
		t.Errorf("the node's links are %v, want its own", links)
	}
}

// walker goes from one damaged state of a LAN to the next.
type walker struct {
	node
	segment.Segment
	rng   *rand.Rand
	links *netlink.Handle
	lost  bool // the namespace has no name: only a process that has it open can restore it
}

const (
	walkSeed  = 20261121
	walkSteps = 80
)

// The difference from any state to the desired state leads to the desired state.
func TestEveryDamagedStateIsRepaired(t *testing.T) {
	t.Parallel()
	a, _ := twoNodes(t)
	s := a.withUnderlay(t, lan("walked", 102, "one", "two"))
	a.reconcile(t, s)
	whole := a.describe(t, s)
	w := &walker{node: a, Segment: s, rng: rand.New(rand.NewPCG(walkSeed, walkSeed)), links: a.lanNetns(s).Netlink(t)}
	for step := range walkSteps {
		var story []string
		w.lost = false
		for range 1 + w.rng.IntN(5) {
			story = append(story, w.damage())
		}
		k := a.kernel
		if !w.lost && w.rng.IntN(2) == 0 {
			story = append(story, "the daemon starts again")
			a.kernel.Close()
			k = a.newKernel(t)
			a.kernel = k
		}
		if !converges(t, k, s, w.rng) {
			t.Fatalf("step %d: %q does not lead to a stable state", step, story)
		}
		if got := a.describe(t, s); got != whole {
			t.Fatalf("step %d: %q leads to\n%s\nwant\n%s", step, story, got, whole)
		}
	}
	reconcileWith(t, a.kernel, s.Netns, segment.Teardown)
	expectNothing(t, a)
}

// converges reconciles, sometimes cut short, until nothing is left to do.
func converges(t *testing.T, k *kernel.Node, s segment.Segment, rng *rand.Rand) bool {
	t.Helper()
	want := diffTo(s)
	if rng.IntN(2) == 0 {
		reconcileWith(t, k, s.Netns, killedAfter(rng.IntN(6), want))
	}
	for range 4 {
		if len(reconcileWith(t, k, s.Netns, want)) == 0 {
			return true
		}
	}
	return false
}

// damage does one random thing to the LAN and describes it. It does nothing where the state does not allow it.
func (w *walker) damage() string {
	links, err := w.links.LinkList()
	if err != nil {
		return fmt.Sprintf("cannot list the links: %v", err)
	}
	links = slices.DeleteFunc(links, func(l netlink.Link) bool { return l.Attrs().Name == "lo" })
	var link netlink.Link = &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Name: "nothing"}}
	if len(links) > 0 {
		link = links[w.rng.IntN(len(links))]
	}
	name := link.Attrs().Name
	spoke := w.Spokes[w.rng.IntN(len(w.Spokes))]
	kinds := []func() (string, error){
		func() (string, error) { return "delete " + name, w.links.LinkDel(link) },
		func() (string, error) {
			mtu := 1000 + w.rng.IntN(400)
			return fmt.Sprintf("MTU of %s %d", name, mtu), w.links.LinkSetMTU(link, mtu)
		},
		func() (string, error) { return name + " down", w.links.LinkSetDown(link) },
		func() (string, error) { return name + " up", w.up(link) },
		func() (string, error) { return name + " out of the bridge", w.links.LinkSetNoMaster(link) },
		func() (string, error) {
			return "group_fwd_mask of " + name, w.links.LinkSetBRSlaveGroupFwdMask(link, uint16(w.rng.IntN(8)<<3))
		},
		func() (string, error) { return "name of " + spoke + " moved to " + name, w.moveName(spoke, link) },
		func() (string, error) { return "pair of a removed spoke", w.add("gone_b", "gone_p") },
		func() (string, error) { return "an attach that got as far as a link", w.add(w.claimID(), "pod-end") },
		func() (string, error) {
			id := w.claimID()
			c := segment.Claim{ID: id, Kind: segment.Veth, Spoke: spoke}
			return "an attach that got as far as a name", w.addNamed(id, "pod-end", c)
		},
		func() (string, error) {
			return "a VM's claim on " + spoke + " without a macvtap", w.claimPlug(spoke)
		},
		func() (string, error) { return "a veth in place of the bridge", w.replace(w.Bridge, w.add) },
		func() (string, error) {
			return "another VNI in place of the VXLAN", w.replace(w.VXLAN.Name, w.addVXLAN)
		},
		func() (string, error) { return "IPv6 on", w.sysctl("net/ipv6/conf/all/disable_ipv6", "0") },
		func() (string, error) {
			return "record removed", os.Remove(w.Run + "/lan/" + w.Netns + ".json")
		},
		func() (string, error) {
			return "record damaged", os.WriteFile(w.Run+"/lan/"+w.Netns+".json", []byte("not a record"), 0o600)
		},
		func() (string, error) { return "namespace's name unmounted", w.unmount() },
		func() (string, error) {
			return "namespace's name unmounted and removed", firstOf(w.unmount(), os.Remove(w.lanNetns(w.Segment).Path))
		},
		func() (string, error) { return "another namespace of that name", w.disguise() },
	}
	what, err := kinds[w.rng.IntN(len(kinds))]()
	if err != nil {
		return fmt.Sprintf("%s (not done: %v)", what, err)
	}
	return what
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *walker) claimID() string {
	return segment.ClaimID(fmt.Sprint("sandbox", w.rng.IntN(3)), ifname)
}

// up does not set up the link of an unfinished attach, because that would finish it.
func (w *walker) up(link netlink.Link) error {
	if segment.IsClaimID(link.Attrs().Name) {
		return errors.New("it is of an attach")
	}
	return w.links.LinkSetUp(link)
}

func (w *walker) moveName(spoke string, to netlink.Link) error {
	if from, err := w.links.LinkByAlias(spoke); err == nil {
		if err := w.links.LinkDelAltName(from, spoke); err != nil {
			return err
		}
	}
	return w.links.LinkAddAltName(to, spoke)
}

func (w *walker) add(name, peer string) error {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return w.links.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: peer})
}

func (w *walker) addNamed(name, peer string, c segment.Claim) error {
	if err := w.add(name, peer); err != nil {
		return err
	}
	l, err := w.links.LinkByName(name)
	if err != nil {
		return err
	}
	return w.links.LinkSetAlias(l, c.Alias())
}

func (w *walker) claimPlug(spoke string) error {
	plug, err := w.links.LinkByName(segment.PlugName(spoke))
	if err != nil {
		return err
	}
	id := w.claimID()
	if w.rng.IntN(2) == 0 {
		c := segment.Claim{ID: id, Kind: segment.Macvtap, Spoke: spoke}
		if err := w.links.LinkSetAlias(plug, c.Alias()); err != nil {
			return err
		}
	}
	return w.links.LinkAddAltName(plug, id)
}

func (w *walker) replace(name string, with func(name, peer string) error) error {
	l, err := w.links.LinkByName(name)
	if err != nil {
		return err
	}
	if err := w.links.LinkDel(l); err != nil {
		return err
	}
	return with(name, "pod-end")
}

func (w *walker) addVXLAN(name, _ string) error {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return w.links.LinkAdd(&netlink.Vxlan{LinkAttrs: a, VxlanId: 4711, Port: 4789})
}

func (w *walker) sysctl(name, value string) error {
	return w.lanNetns(w.Segment).Do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0) })
}

func (w *walker) unmount() error {
	w.lost = true
	return unix.Unmount(w.lanNetns(w.Segment).Path, unix.MNT_DETACH)
}

// disguise mounts the node's own namespace at the LAN's name.
func (w *walker) disguise() error {
	w.lost = true
	return unix.Mount(w.Namespace.Path, w.lanNetns(w.Segment).Path, "", unix.MS_BIND, "")
}
