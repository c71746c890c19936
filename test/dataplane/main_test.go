package dataplane

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

func TestMain(m *testing.M) {
	if os.Getenv(daemonRun) != "" {
		os.Exit(runDaemon())
	}
	if at := os.Getenv(reflectorAt); at != "" {
		os.Exit(runReflector(at))
	}
	if err := installRouters(); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		os.Exit(1)
	}
	if err := setParallel(); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		os.Exit(1)
	}
	netlab.Main(m, stopSidecars)
}

// parallel is how many parallel tests run at a time. They wait for the kernel and for timers more than they compute, so
// there are more of them than processors.
const parallel = 8

// setParallel sets that number, unless the command line has -parallel.
func setParallel() error {
	const name = "test.parallel"
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == name })
	if given {
		return nil
	}
	return flag.Set(name, strconv.Itoa(parallel))
}

const (
	// underlayMTU is the MTU of the network between the nodes, and lanMTU what is left of it for a LAN: 70 bytes of
	// Ethernet, IPv6, UDP and VXLAN headers, and 8 for two VLAN tags.
	underlayMTU = 1500
	lanMTU      = underlayMTU - 78

	// frameTimeout is how long a test waits for a frame or an event that should come at once.
	frameTimeout = 3 * time.Second

	// daemonTimeout is how long a test waits for what the daemon does. All namespaces of a machine share one lock,
	// which the removal of many namespaces holds for seconds.
	daemonTimeout = 30 * time.Second
)

// node is a node with k8slan on it.
type node struct {
	*netlab.Node
	kernel   *kernel.Node
	underlay *netlab.Underlay
}

// twoNodes makes an underlay with two nodes.
func twoNodes(t *testing.T) (a, b node) {
	t.Helper()
	underlay := netlab.NewUnderlay(t, underlayMTU)
	return addNode(t, underlay, "worker1"), addNode(t, underlay, "worker2")
}

func addNode(t *testing.T, underlay *netlab.Underlay, name string) node {
	t.Helper()
	h := node{Node: underlay.Join(t, name), underlay: underlay}
	h.kernel = h.newKernel(t)
	return h
}

// newKernel returns what a k8slan process has when it starts on the node: it knows only what it reads there.
func (n node) newKernel(t *testing.T) *kernel.Node {
	t.Helper()
	k := kernel.New(kernel.Paths{Run: n.Run, HostNetns: n.Path})
	t.Cleanup(k.Close)
	return k
}

// lan is a LAN without what differs between nodes.
func lan(name string, vni uint32, spokes ...string) segment.Segment {
	return segment.Segment{
		LAN:        segment.LAN{Namespace: "default", Name: name, UID: "uid-" + name},
		Generation: 1,
		Netns:      "lan-" + name,
		Bridge:     fmt.Sprintf("br%d", vni),
		MTU:        lanMTU,
		VXLAN: segment.VXLAN{
			Name: fmt.Sprintf("vx%d", vni), VNI: vni, Port: 4789, Group: netip.MustParseAddr("ff02::14"),
			Underlay: netlab.UnderlayDevice,
		},
		Spokes: spokes,
	}
}

// withUnderlay returns the LAN as this node should have it: with the ifindex of the node's underlay device.
func (n node) withUnderlay(t *testing.T, s segment.Segment) segment.Segment {
	t.Helper()
	device, err := n.Netlink(t).LinkByName(netlab.UnderlayDevice)
	if err != nil {
		t.Fatalf("underlay device of %s: %v", n.Name, err)
	}
	s.VXLAN.UnderlayIndex = device.Attrs().Index
	return s
}

// reconcile reconciles the LAN on the node once, as the manager does, and returns the operations it applied.
func (n node) reconcile(t *testing.T, s segment.Segment) []segment.Op {
	t.Helper()
	return reconcileWith(t, n.kernel, s.Netns, diffTo(s))
}

// diffTo decides on the operations that lead to the LAN's desired state.
func diffTo(want segment.Segment) func(segment.State) []segment.Op {
	return func(have segment.State) []segment.Op { return segment.Diff(want, have) }
}

func reconcileWith(t *testing.T, k *kernel.Node, name string, decide func(segment.State) []segment.Op) []segment.Op {
	t.Helper()
	ops, err := k.Reconcile(t.Context(), name, decide)
	if err != nil {
		t.Fatalf("after %v: %v", ops, err)
	}
	return ops
}

// lanNetns returns the LAN's network namespace on the node.
func (n node) lanNetns(s segment.Segment) netlab.Namespace {
	return netlab.At(n.Run + "/netns/" + s.Netns)
}

// host is a pod or a VM on a LAN, with the wire on which it sends and receives.
type host struct {
	netlab.Namespace
	netlab.Wire
	kernel.Attachment
	request kernel.ClaimRequest
}

// ifname is the name of the pods' interfaces.
const ifname = "net1"

// attach attaches a new pod or VM to a spoke, as the CNI plugin does, and opens its wire.
func (n node) attach(t *testing.T, s segment.Segment, spoke string, kind segment.Kind) *host {
	t.Helper()
	st := n.claim(t, s, spoke, kind)
	st.openWire(t, n.lanNetns(s))
	return st
}

// claim attaches a pod or VM whose wire is not open: a VM before its QEMU has started.
func (n node) claim(t *testing.T, s segment.Segment, spoke string, kind segment.Kind) *host {
	t.Helper()
	st := &host{Namespace: netlab.NewPod(t)}
	st.request = request(s, spoke, kind, st.Namespace)
	var err error
	if st.Attachment, err = n.kernel.Claim(t.Context(), st.request); err != nil {
		t.Fatalf("claim spoke %s of %s on %s: %v", spoke, s.LAN, n.Name, err)
	}
	return st
}

func request(s segment.Segment, spoke string, kind segment.Kind, pod netlab.Namespace) kernel.ClaimRequest {
	return kernel.ClaimRequest{
		Netns: s.Netns, Spoke: spoke, Kind: kind, Sandbox: path.Base(path.Dir(pod.Path)),
		Interface: ifname, PodNetns: pod.Path,
		PodNamespace: s.LAN.Namespace, Pod: spoke, PodUID: "uid-of-" + spoke,
	}
}

// openWire opens the pod's link, or the VM's tap, and waits until it carries frames.
func (h *host) openWire(t *testing.T, lan netlab.Namespace) {
	t.Helper()
	if h.request.Kind == segment.Macvtap {
		h.Wire = netlab.OpenTap(t, h.TapMajor, h.TapMinor)
	} else {
		h.AwaitCarrier(t, ifname)
		h.Wire = h.Open(t, ifname)
	}
	lan.AwaitCarrier(t, h.HostInterface)
}

// release detaches the host, as the CNI plugin does for a pod that ends.
func (n node) release(t *testing.T, h *host) {
	t.Helper()
	if err := n.kernel.Release(t.Context(), h.request.Netns, h.request.Spoke, h.ClaimID); err != nil {
		t.Fatalf("release spoke %s on %s: %v", h.request.Spoke, n.Name, err)
	}
}

// crosses sends a frame and expects exactly that frame, and no other before it, at the other end.
func crosses(t *testing.T, from, to netlab.Wire, frame []byte) {
	t.Helper()
	if err := from.Send(frame); err != nil {
		t.Fatal(err)
	}
	got, err := next(to, frameTimeout)
	if err != nil {
		t.Fatalf("frame of %d bytes: %v", len(frame), err)
	}
	if !bytes.Equal(got, frame) {
		t.Fatalf("received\n%x, want\n%x", got, frame)
	}
}

// isDropped sends a frame and expects only the frame that is sent after it at the other end.
func isDropped(t *testing.T, from, to netlab.Wire, frame []byte) {
	t.Helper()
	if err := from.Send(frame); err != nil {
		t.Fatal(err)
	}
	crosses(t, from, to, frames.Stream(nil, segment.MAC(segment.LAN{}, "after"), 1, 1))
}

// next receives the next frame, whatever it is.
func next(w netlab.Wire, within time.Duration) ([]byte, error) {
	return netlab.Await(w, within, func([]byte) bool { return true })
}

// expectSilence receives until the context ends and expects no frame that matters.
func expectSilence(ctx context.Context, w netlab.Wire, matters func(frame []byte) bool) error {
	for {
		frame, err := w.Receive(ctx)
		switch {
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
			return nil
		case err != nil:
			return err
		case matters(frame):
			return fmt.Errorf("received %x", frame)
		}
	}
}

func anything([]byte) bool { return true }

// read reads a file on a thread that is in the node's namespace.
func (n node) read(t *testing.T, file string) (content string) {
	t.Helper()
	if err := n.Do(func() error {
		b, err := os.ReadFile(file)
		content = string(b)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return content
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

// read reads a file of a pseudo file system.
func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}
