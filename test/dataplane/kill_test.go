package dataplane

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// killCase is a process that is killed at each of its steps in turn, and the node it runs on.
type killCase struct {
	node
	segment.Segment // as the node is to have it afterwards
	cmd             *exec.Cmd
	stdin           any          // as JSON
	earlier         []attachment // pods that were there before, or half so
	fails           bool         // a plugin's process that ends with an error by itself
	keepsLAN        bool         // the LAN: it is as a new one, and the next process may have it
}

// attachment is a sandbox with the network it is or was to be attached to.
type attachment struct {
	sandbox
	config keys
}

// Whatever the daemon or the plugin was about to change when it was killed: the daemon that comes next leads the node
// to where it should be, a pod can attach and speak, and once it has gone nothing is left of it all.
func TestKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	netlab.NeedDevices(t)
	for name, prepare := range map[string]func(*testing.T, node) killCase{
		"ADD of a pod":                         add(segment.Veth, nil, nil),
		"ADD of a VM":                          add(segment.Macvtap, nil, nil),
		"ADD of a pod with finished checksums": add(segment.Veth, []string{"srl"}, nil),
		"ADD of a pod with addresses":          addWithAddresses,
		"ADD of a pod that is refused":         addRefused(segment.Veth),
		"ADD of a VM that is refused":          addRefused(segment.Macvtap),
		"ADD where the standing pair is gone":  addWithoutPair,
		"take-over of a pod by a pod":          takeOver(segment.Veth, segment.Veth),
		"take-over of a pod by a VM":           takeOver(segment.Veth, segment.Macvtap),
		"take-over of a VM by a pod":           takeOver(segment.Macvtap, segment.Veth),
		"take-over of a VM by a VM":            takeOver(segment.Macvtap, segment.Macvtap),
		"DEL of a pod":                         del(segment.Veth),
		"DEL of a VM":                          del(segment.Macvtap),
		"LAN built":                            built,
		"LAN edited":                           edited,
		"LAN repaired":                         repaired,
		"LAN in unicast":                       inUnicast,
		"LAN back in multicast":                inMulticastAgain,
		"LAN of pods that are gone":            abandoned,
		"LAN in another's place":               replaced,
		"LAN removed":                          removed,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			killAtEveryStep(t, prepare)
		})
	}
}

func killAtEveryStep(t *testing.T, prepare func(*testing.T, node) killCase) {
	h := addNode(t, netlab.NewUnderlay(t, underlayMTU), "worker1")
	for at := 0; ; at++ {
		h.kernel = h.newKernel(t)
		d := prepare(t, h)
		h.kernel.Close() // what it has in hand is nothing a new process has
		d.kernel = h.newKernel(t)
		steps, killed := d.run(t, at)
		story := "lived"
		if killed {
			story = fmt.Sprintf("killed at step %d, %s", at, steps[len(steps)-1])
		}
		d.recovers(t, story, at)
		if t.Failed() {
			return
		}
		if !killed {
			// Every step it takes was one at which it was killed. It may take fewer than others did: on a busy machine the
			// manager looks once more.
			if len(steps) == 0 || len(steps) > at {
				t.Fatalf("killed %d times, but takes %d steps: %v", at, len(steps), steps)
			}
			t.Logf("killed at %d steps; takes %d", at, len(steps))
			return
		}
	}
}

// run is the life and death of the process.
func (d killCase) run(t *testing.T, killAt int) (steps []step, killed bool) {
	t.Helper()
	stdin, err := json.Marshal(d.stdin)
	must(t, err)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "stdin"), stdin, 0o600))
	in, err := os.Open(filepath.Join(dir, "stdin"))
	must(t, err)
	defer in.Close()
	out, err := os.Create(filepath.Join(dir, "out"))
	must(t, err)
	defer out.Close()
	d.cmd.Stdin, d.cmd.Stdout, d.cmd.Stderr = in, out, out
	err = d.Do(func() (err error) {
		steps, killed, err = walk(d.cmd, killAt)
		return err
	})
	if _, exited := errors.AsType[exitStatus](err); exited && d.fails {
		return steps, killed
	}
	if err != nil || !killed && d.fails {
		said, _ := os.ReadFile(out.Name())
		t.Fatalf("to be killed at step %d, after %v: %v\n%s", killAt, steps, err, said)
	}
	return steps, killed
}

// recovers is life after the process.
func (d killCase) recovers(t *testing.T, story string, number int) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Log(story)
		}
	}()
	m := d.manage(t)
	m.runs(t, d.Segment)
	if len(d.earlier) > 0 || number%5 == 0 {
		d.attachAndDetach(t, number)
		m.runs(t, d.Segment)
	} else { // frames are carried by the standing pairs, which is enough of a LAN alone, and sooner done
		inside := d.lanNetns(d.Segment)
		for _, spoke := range []string{"srl", "peer"} {
			inside.AwaitCarrier(t, segment.PortName(spoke))
			inside.AwaitCarrier(t, segment.PlugName(spoke))
		}
		here, there := inside.Open(t, segment.PlugName("srl")), inside.Open(t, segment.PlugName("peer"))
		reaches(t, here, there, frames.Stream(nil, segment.MAC(d.LAN, "srl"), 1, 1))
		reaches(t, there, here, frames.Stream(nil, segment.MAC(d.LAN, "peer"), 1, 2))
		here.Close()
		there.Close()
	}
	d.awaitState(t, d.Segment, "the segment to be as a new one", func(have segment.State) bool {
		return len(segment.Diff(d.Segment, have)) == 0 && len(have.Claims()) == 0 && len(have.Links) == 2+2*len(d.Spokes)
	})
	d.reconcilesWithoutEvents(t)
	d.expectFiles(t, "lan/"+d.Netns+".json", "lock/"+d.Netns, "netns/"+d.Netns)
	if d.keepsLAN {
		m.stop()
		d.kernel.Close()
		return
	}
	m.Set(nil)
	m.awaitReports(t, "nothing", func(reports []lanmgr.Report) bool { return len(reports) == 0 })
	m.stop()
	d.kernel.Close()
	d.expectFiles(t)
	expectNothing(t, d.node)
}

// attachAndDetach attaches a pod, which can speak, and detaches it and those that were there before.
func (d killCase) attachAndDetach(t *testing.T, number int) {
	t.Helper()
	inside := d.lanNetns(d.Segment)
	inside.AwaitCarrier(t, segment.PortName("peer"))
	inside.AwaitCarrier(t, segment.PlugName("peer"))
	there := inside.Open(t, segment.PlugName("peer"))
	// The old pod's DEL comes first or last, and a pod or a VM follows, by turns: which it is must not matter.
	if number/2%2 == 1 {
		for _, old := range d.earlier {
			old.mustCall(t, "DEL", old.config)
		}
		if left, err := os.ReadDir(d.CDI); len(left) != 0 {
			t.Errorf("after DEL there is %v (%v)", left, err)
		}
	}
	young := attachment{d.sandbox(t), network(d.Segment, "srl", []segment.Kind{segment.Veth, segment.Macvtap}[number%2], nil)}
	here, _ := young.add(t, d.Segment, young.config)
	for _, when := range []string{"before", "after"} {
		reaches(t, here, there, frames.Stream(nil, segment.MAC(d.LAN, "srl"), 1, 1))
		reaches(t, there, here, frames.Stream(nil, segment.MAC(d.LAN, "peer"), 1, 2))
		if when == "before" {
			for _, old := range d.earlier {
				old.mustCall(t, "DEL", old.config)
			}
		}
	}
	here.Close()
	there.Close()
	for _, gone := range append(d.earlier, young) {
		gone.mustCall(t, "DEL", gone.config)
		if links := gone.Links(t); len(links) != 0 {
			t.Errorf("after DEL the pod has %v", links)
		}
	}
}

// reaches sends a frame and waits for it at the other end, among whatever a pod that is going may have said.
func reaches(t *testing.T, from, to netlab.Wire, frame []byte) {
	t.Helper()
	must(t, from.Send(frame))
	_, err := netlab.Await(to, frameTimeout, func(got []byte) bool { return bytes.Equal(got, frame) })
	must(t, err)
}

// expectFiles wants these files below Run and none of CDI.
func (d killCase) expectFiles(t *testing.T, want ...string) {
	t.Helper()
	have := []string{}
	for _, dir := range []string{d.Run, d.CDI} {
		must(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && !e.IsDir() {
				have = append(have, strings.TrimPrefix(path, d.Run+"/"))
			}
			return err
		}))
	}
	if !slices.Equal(have, want) {
		t.Errorf("on the node are %q, want %q", have, want)
	}
}

// reconcilesWithoutEvents wants a look by a new process that finds nothing to do and of which rtnetlink says nothing.
// What earlier changes have left to say may come late (linkwatch, up to a second), so the look is repeated then.
func (d killCase) reconcilesWithoutEvents(t *testing.T) {
	t.Helper()
	for range 30 {
		ears := []*eventSocket{d.watchEvents(t, d.Namespace), d.watchEvents(t, d.lanNetns(d.Segment))}
		k := d.newKernel(t)
		ops := reconcileWith(t, k, d.Netns, func(have segment.State) []segment.Op { return segment.Diff(d.Segment, have) })
		k.Close()
		if len(ops) != 0 {
			t.Fatalf("to do once more: %v", ops)
		}
		heard := false
		for _, ear := range ears {
			heard = ear.sawEvents(t) || heard
		}
		if !heard {
			return
		}
	}
	t.Error("each time that nothing was to be done, rtnetlink had events")
}

// eventSocket hears all that rtnetlink tells of a namespace.
type eventSocket struct{ file *os.File }

func (n node) watchEvents(t *testing.T, ns netlab.Namespace) *eventSocket {
	t.Helper()
	var fd int
	must(t, ns.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: ^uint32(0)})
	}))
	return &eventSocket{os.NewFile(uintptr(fd), "rtnetlink")}
}

// sawEvents says whether there was anything, and is done.
func (e *eventSocket) sawEvents(t *testing.T) bool {
	t.Helper()
	defer e.file.Close()
	must(t, e.file.SetReadDeadline(time.Now().Add(2*time.Millisecond))) // what the look caused is there already
	n, err := e.file.Read(make([]byte, 1<<16))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return n > 0
}

// killable is the LAN of these tests.
func (n node) killable(t *testing.T) segment.Segment {
	t.Helper()
	return n.withUnderlay(t, lan("killed", 101, "peer", "srl"))
}

func (a attachment) killCase(t *testing.T, verb string, s segment.Segment, old ...attachment) killCase {
	t.Helper()
	cmd, err := a.command(verb)
	must(t, err)
	return killCase{node: a.node, Segment: s, cmd: cmd, stdin: a.config, earlier: append(old, a), keepsLAN: true}
}

func add(kind segment.Kind, txChecksumOff []string, extra keys) func(*testing.T, node) killCase {
	return func(t *testing.T, h node) killCase {
		s := h.killable(t)
		s.TxChecksumOff = txChecksumOff
		h.reconcile(t, s)
		return attachment{h.sandbox(t), network(s, "srl", kind, extra)}.killCase(t, "ADD", s)
	}
}

func addWithAddresses(t *testing.T, n node) killCase {
	d := add(segment.Veth, nil, n.installIPAM(t, "192.0.2.1/24", "2001:db8::1/64"))(t, n)
	d.earlier[0].Sysctl(t, "net/ipv6/conf/default/accept_dad", "0") // nobody else has it
	return d
}

// addRefused is an ADD that has to take everything back at its last step.
func addRefused(kind segment.Kind) func(*testing.T, node) killCase {
	return func(t *testing.T, h node) killCase {
		d := add(kind, nil, nil)(t, h)
		d.fails = true
		d.cmd.Env = append(d.cmd.Env, "K8SLAN_CDI_DIR=/dev/null/cdi")
		return d
	}
}

func addWithoutPair(t *testing.T, n node) killCase {
	d := add(segment.Veth, nil, nil)(t, n)
	inside := n.lanNetns(d.Segment).Netlink(t)
	for _, name := range []string{segment.PlugName("srl"), d.Bridge} {
		l, err := inside.LinkByName(name)
		must(t, err)
		must(t, inside.LinkDel(l))
	}
	return d
}

// attachByPlugin attaches a pod or VM to the LAN as it is.
func (n node) attachByPlugin(t *testing.T, s segment.Segment, spoke string, kind segment.Kind) attachment {
	t.Helper()
	a := attachment{n.sandbox(t), network(s, spoke, kind, nil)}
	a.mustCall(t, "ADD", a.config)
	return a
}

func takeOver(from, to segment.Kind) func(*testing.T, node) killCase {
	return func(t *testing.T, h node) killCase {
		s := h.killable(t)
		s.TxChecksumOff = []string{"srl"}
		h.reconcile(t, s)
		old := h.attachByPlugin(t, s, "srl", from)
		return attachment{h.sandbox(t), network(s, "srl", to, nil)}.killCase(t, "ADD", s, old)
	}
}

func del(kind segment.Kind) func(*testing.T, node) killCase {
	return func(t *testing.T, h node) killCase {
		s := h.killable(t)
		h.reconcile(t, s)
		return h.attachByPlugin(t, s, "srl", kind).killCase(t, "DEL", s)
	}
}

// Environment of a process that is the daemon: where it keeps its things.
const (
	daemonRun = "K8SLAN_TEST_RUN"
	daemonCDI = "K8SLAN_TEST_CDI"
)

// runDaemon is such a process. It has the manager make what standard input says, and ends when that is there.
func runDaemon() int {
	var wishes []wantedSegment
	if err := json.NewDecoder(os.Stdin).Decode(&wishes); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	var want []segment.Segment
	for _, w := range wishes {
		w.Segment.Remotes = w.Remotes
		want = append(want, w.Segment)
	}
	ctx, cancel := context.WithTimeout(context.Background(), daemonTimeout)
	defer cancel()
	k := kernel.New(kernel.Paths{Run: os.Getenv(daemonRun)})
	m := lanmgr.New(k, os.Getenv(daemonCDI), slog.New(slog.NewTextHandler(os.Stderr, nil)))
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	m.Set(want)
	for {
		select {
		case <-m.Changed():
			reports, left := m.Reports(), []string{}
			if len(want) == 0 {
				left, _ = k.List()
			}
			if len(left) == 0 && len(reports) == len(want) && !slices.ContainsFunc(reports, func(r lanmgr.Report) bool { return !r.Built || r.Leaving }) {
				cancel()
				if err := <-ended; err != nil {
					fmt.Fprintln(os.Stderr, err)
					return 1
				}
				return 0
			}
		case <-ctx.Done():
			fmt.Fprintf(os.Stderr, "after %v: %+v\n", daemonTimeout, m.Reports())
			return 1
		}
	}
}

// daemonProcess is the daemon's process on a node, which makes that LAN or, without one, takes away what is there.
func (n node) daemonProcess(want segment.Segment, made ...segment.Segment) killCase {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), daemonRun+"="+n.Run, daemonCDI+"="+n.CDI)
	wishes := []wantedSegment{}
	for _, s := range made {
		wishes = append(wishes, wantedSegment{s, s.Remotes})
	}
	return killCase{node: n, Segment: want, cmd: cmd, stdin: wishes}
}

// wantedSegment is a segment with what its record does not have.
type wantedSegment struct {
	segment.Segment
	Remotes []netip.Addr `json:"remotes"`
}

func built(t *testing.T, n node) killCase {
	s := n.killable(t)
	s.TxChecksumOff = []string{"peer"}
	return n.daemonProcess(s, s)
}

// edited changes all that can be changed, with a pod attached.
func edited(t *testing.T, n node) killCase {
	from := n.killable(t)
	from.Spokes = append(from.Spokes, "w-one", "w-two")
	from.TxChecksumOff = []string{"peer"}
	n.reconcile(t, from)
	pod := n.attachByPlugin(t, from, "srl", segment.Veth)
	to := n.killable(t)
	to.Generation, to.MTU = 2, lanMTU-100
	to.Spokes = append(to.Spokes, "x-new")
	to.TxChecksumOff = []string{"srl"}
	to.VXLAN.Port, to.VXLAN.Group = 4790, netip.MustParseAddr("ff02::15")
	d := n.daemonProcess(to, to)
	d.earlier = []attachment{pod}
	return d
}

// inUnicast takes a LAN in use from its group to remotes.
func inUnicast(t *testing.T, n node) killCase {
	from := n.killable(t)
	n.reconcile(t, from)
	pod := n.attachByPlugin(t, from, "srl", segment.Veth)
	to := unicast(from, netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("2001:db8::3"))
	d := n.daemonProcess(to, to)
	d.earlier = []attachment{pod}
	return d
}

// inMulticastAgain takes it back.
func inMulticastAgain(t *testing.T, n node) killCase {
	to := n.killable(t)
	n.reconcile(t, unicast(to, netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("2001:db8::3")))
	pod := n.attachByPlugin(t, to, "srl", segment.Veth)
	d := n.daemonProcess(to, to)
	d.earlier = []attachment{pod}
	return d
}

// repaired mends what somebody did to a LAN.
func repaired(t *testing.T, n node) killCase {
	s := n.killable(t)
	s.TxChecksumOff = []string{"peer"}
	n.reconcile(t, s)
	pod := n.attachByPlugin(t, s, "srl", segment.Veth)
	n.setFeature(t, s, segment.PlugName("peer"), "tx-checksum-ip-generic", true)
	inside := n.lanNetns(s)
	bridge := inside.Sysfs(t) + "/class/net/" + s.Bridge + "/bridge/"
	must(t, os.WriteFile(bridge+"stp_state", []byte("1"), 0))
	inside.Sysctl(t, "net/ipv6/conf/all/disable_ipv6", "0")
	links := inside.Netlink(t)
	change := func(name string, f func(netlink.Link) error) {
		l, err := links.LinkByName(name)
		must(t, err)
		must(t, f(l))
	}
	change(s.VXLAN.Name, links.LinkDel)
	change(segment.PortName("peer"), links.LinkSetNoMaster)
	change(segment.PortName("peer"), links.LinkSetDown)
	change(segment.PlugName("srl"), links.LinkDel)
	change("srl", func(l netlink.Link) error { return links.LinkDelAltName(l, "srl") })
	change(s.Bridge, func(l netlink.Link) error { return links.LinkAddAltName(l, "srl") })
	must(t, os.Remove(n.Run+"/lan/"+s.Netns+".json"))
	d := n.daemonProcess(s, s)
	d.earlier = []attachment{pod}
	return d
}

// abandoned clears up behind pods whose DEL never came.
func abandoned(t *testing.T, n node) killCase {
	s := n.killable(t)
	n.reconcile(t, s)
	for spoke, kind := range map[string]segment.Kind{"srl": segment.Macvtap, "peer": segment.Veth} {
		a := n.attachByPlugin(t, s, spoke, kind)
		links := a.Netlink(t)
		l, err := links.LinkByName(a.ifname)
		must(t, err)
		must(t, links.LinkDel(l))
	}
	return n.daemonProcess(s, s)
}

// replaced makes a LAN where another one has the name of its namespace.
func replaced(t *testing.T, n node) killCase {
	s := n.killable(t)
	other := s
	other.LAN.UID = "another"
	n.reconcile(t, other)
	return n.daemonProcess(s, s)
}

func removed(t *testing.T, n node) killCase {
	s := n.killable(t)
	n.reconcile(t, s)
	return n.daemonProcess(s)
}
