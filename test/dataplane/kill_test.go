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

// killCase is a process that is killed at each of its steps in turn, and its node.
type killCase struct {
	node
	segment.Segment // what the node should have afterwards
	cmd             *exec.Cmd
	stdin           any          // is encoded as JSON
	earlier         []attachment // pods that were attached before, or half attached
	fails           bool         // the plugin's process ends with an error by itself
	keepsLAN        bool         // the LAN is like a new one afterwards, and the next process can use it
}

// attachment is a sandbox with the network that it is, or was to be, attached to.
type attachment struct {
	sandbox
	config keys
}

// Wherever the daemon or the plugin was killed: the next daemon brings the node to the desired state, a pod can attach
// and send, and after its DEL nothing is left of either.
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
		"ADD without a standing pair":          addWithoutPair,
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
		"LAN of pods without DEL":              abandoned,
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
		h.kernel.Close() // a new process has none of its open namespaces
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
			// It was killed at each step that it takes. It may take fewer steps than before: on a busy machine the
			// manager observes once more.
			if len(steps) == 0 || len(steps) > at {
				t.Fatalf("killed %d times, but takes %d steps: %v", at, len(steps), steps)
			}
			t.Logf("killed at %d steps; takes %d", at, len(steps))
			return
		}
	}
}

// run runs the process and kills it at that step.
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

// recovers runs the next daemon, and expects the node to be as if no process had been killed.
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
	} else { // the standing pairs carry frames, too; this is faster
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
		return len(segment.Diff(d.Segment, have)) == 0 && len(have.Claims()) == 0 &&
			len(have.Links) == 2+2*len(d.Spokes)
	})
	d.reconcilesWithoutEvents(t)
	d.expectFiles(t, "lan/"+d.Netns+".json", "lock/"+d.Netns, "netns/"+d.Netns)
	if d.keepsLAN {
		m.stop()
		d.kernel.Close()
		return
	}
	m.Set(nil)
	m.awaitReports(t, "no segment", func(reports []lanmgr.Report) bool { return len(reports) == 0 })
	m.stop()
	d.kernel.Close()
	d.expectFiles(t)
	expectNothing(t, d.node)
}

// attachAndDetach attaches a pod, expects it to send and receive, and detaches it and the earlier ones.
func (d killCase) attachAndDetach(t *testing.T, number int) {
	t.Helper()
	inside := d.lanNetns(d.Segment)
	inside.AwaitCarrier(t, segment.PortName("peer"))
	inside.AwaitCarrier(t, segment.PlugName("peer"))
	there := inside.Open(t, segment.PlugName("peer"))
	// By turns the DEL of the earlier pod comes first or last, and a pod or a VM follows.
	if number/2%2 == 1 {
		for _, old := range d.earlier {
			old.mustCall(t, "DEL", old.config)
		}
		if left, err := os.ReadDir(d.CDI); len(left) != 0 {
			t.Errorf("after DEL there is %v (%v)", left, err)
		}
	}
	kind := []segment.Kind{segment.Veth, segment.Macvtap}[number%2]
	young := attachment{d.sandbox(t), network(d.Segment, "srl", kind, nil)}
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
	for _, a := range append(d.earlier, young) {
		a.mustCall(t, "DEL", a.config)
		if links := a.Links(t); len(links) != 0 {
			t.Errorf("after DEL the pod has %v", links)
		}
	}
}

// reaches sends a frame and waits for it at the other end, where other frames may come before.
func reaches(t *testing.T, from, to netlab.Wire, frame []byte) {
	t.Helper()
	must(t, from.Send(frame))
	_, err := netlab.Await(to, frameTimeout, func(got []byte) bool { return bytes.Equal(got, frame) })
	must(t, err)
}

// expectFiles expects these files below Run, and no file of CDI.
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
		t.Errorf("the node has the files %q, want %q", have, want)
	}
}

// reconcilesWithoutEvents expects that a new process has nothing to do and that rtnetlink reports nothing meanwhile.
// Events of earlier changes may come up to a second late (linkwatch), so it tries again.
func (d killCase) reconcilesWithoutEvents(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(frameTimeout); time.Now().Before(deadline); {
		sockets := []*eventSocket{d.watchEvents(t, d.Namespace), d.watchEvents(t, d.lanNetns(d.Segment))}
		k := d.newKernel(t)
		ops := reconcileWith(t, k, d.Netns, diffTo(d.Segment))
		k.Close()
		if len(ops) != 0 {
			t.Fatalf("reconciling again did %v", ops)
		}
		events := false
		for _, socket := range sockets {
			events = socket.sawEvents(t) || events
		}
		if !events {
			return
		}
	}
	t.Error("rtnetlink reported events each time that a new process reconciled")
}

// eventSocket receives every event of rtnetlink in a namespace.
type eventSocket struct{ file *os.File }

func (n node) watchEvents(t *testing.T, ns netlab.Namespace) *eventSocket {
	t.Helper()
	var fd int
	must(t, ns.Do(func() (err error) {
		const kind = unix.SOCK_RAW | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
		if fd, err = unix.Socket(unix.AF_NETLINK, kind, unix.NETLINK_ROUTE); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: ^uint32(0)})
	}))
	return &eventSocket{os.NewFile(uintptr(fd), "rtnetlink")}
}

// sawEvents reports whether there was an event, and closes the socket.
func (e *eventSocket) sawEvents(t *testing.T) bool {
	t.Helper()
	defer e.file.Close()
	// The events of the reconciliation are there already.
	must(t, e.file.SetReadDeadline(time.Now().Add(2*time.Millisecond)))
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
	d.earlier[0].Sysctl(t, "net/ipv6/conf/default/accept_dad", "0") // no other pod has the address
	return d
}

// addRefused is an ADD that fails at its last step and has to undo all others.
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

// attachByPlugin attaches a pod or VM to a LAN that the node has.
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

// These environment variables make this program the daemon and name its directories.
const (
	daemonRun = "K8SLAN_TEST_RUN"
	daemonCDI = "K8SLAN_TEST_CDI"
)

// runDaemon is the daemon's process. Its manager reconciles the segments that standard input lists, and the process
// ends when the node has them.
func runDaemon() int {
	var input []wantedSegment
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	var want []segment.Segment
	for _, w := range input {
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
			unbuilt := func(r lanmgr.Report) bool { return !r.Built || r.Leaving }
			if len(left) == 0 && len(reports) == len(want) && !slices.ContainsFunc(reports, unbuilt) {
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

// daemonProcess is the daemon's process on a node. It builds these segments; without one it removes what the node has.
func (n node) daemonProcess(want segment.Segment, made ...segment.Segment) killCase {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), daemonRun+"="+n.Run, daemonCDI+"="+n.CDI)
	input := []wantedSegment{}
	for _, s := range made {
		input = append(input, wantedSegment{s, s.Remotes})
	}
	return killCase{node: n, Segment: want, cmd: cmd, stdin: input}
}

// wantedSegment is a segment with the fields that its record lacks.
type wantedSegment struct {
	segment.Segment
	Remotes []netip.Addr `json:"remotes"`
}

func built(t *testing.T, n node) killCase {
	s := n.killable(t)
	s.TxChecksumOff = []string{"peer"}
	return n.daemonProcess(s, s)
}

// edited changes every field that can change, while a pod is attached.
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

// killableVTEPs are the VTEPs of the LAN of these tests in unicast, its own first.
var killableVTEPs = []netip.Addr{
	netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("2001:db8::3"),
}

// inUnicast changes a LAN in use from its group to remotes.
func inUnicast(t *testing.T, n node) killCase {
	from := n.killable(t)
	n.reconcile(t, from)
	pod := n.attachByPlugin(t, from, "srl", segment.Veth)
	to := unicast(from, killableVTEPs[0], killableVTEPs[1:]...)
	d := n.daemonProcess(to, to)
	d.earlier = []attachment{pod}
	return d
}

// inMulticastAgain changes it back.
func inMulticastAgain(t *testing.T, n node) killCase {
	to := n.killable(t)
	n.reconcile(t, unicast(to, killableVTEPs[0], killableVTEPs[1:]...))
	pod := n.attachByPlugin(t, to, "srl", segment.Veth)
	d := n.daemonProcess(to, to)
	d.earlier = []attachment{pod}
	return d
}

// repaired repairs changes by hand.
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

// abandoned removes the claims of pods whose DEL never came.
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

// replaced builds a LAN where another LAN has the name of its namespace.
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
