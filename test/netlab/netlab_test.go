package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/test/frames"
)

func TestMain(m *testing.M) { Main(m) }

func TestTestsHaveLinksAndRunOfTheirOwn(t *testing.T) {
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	if len(links) != 1 || links[0].Attrs().Name != "lo" {
		t.Errorf("links are %v, want only loopback", links)
	}
	entries, err := os.ReadDir("/sys/class/net")
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 {
		t.Errorf("/sys shows %v, want only loopback", entries)
	}
	mounts, err := mountsUnder("/run")
	if err != nil {
		t.Fatal(err)
	}
	if len(mounts) == 0 {
		t.Error("/run is not a mount of its own")
	}
}

func TestNamespaceEndsWithItsTest(t *testing.T) {
	var path string
	t.Run("one test", func(t *testing.T) {
		ns := New(t, "short")
		path = ns.Path
		// A mount that the test made below is removed as well.
		other := filepath.Join(filepath.Dir(path), "other")
		if err := os.WriteFile(other, nil, 0o444); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(path, other, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stat of its directory: %v, want that it does not exist", err)
	}
	if left, err := mountsUnder(filepath.Dir(path)); err != nil || len(left) > 0 {
		t.Errorf("mounts left: %v, %v", left, err)
	}
}

func TestDoRunsInTheNamespaceAndTheCallerStays(t *testing.T) {
	ns := New(t, "there")
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	var inside string
	if err := ns.Do(func() (err error) {
		inside, err = os.Readlink("/proc/thread-self/ns/net")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	process, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if inside == before || process != before {
		t.Errorf("inside %s, the process %s, want another one than %s and the same", inside, process, before)
	}
	if err := ns.Do(func() error { return os.ErrInvalid }); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("the function's error was returned as %v", err)
	}
	if err := At("/run/nowhere").Do(func() error { return nil }); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an absent namespace gives %v, want ErrNotExist", err)
	}
}

func TestNodesReachEachOtherOverTheUnderlay(t *testing.T) {
	underlay := NewUnderlay(t, 1600)
	a, b := underlay.Join(t, "worker1"), underlay.Join(t, "worker2")
	from, to := a.Open(t, UnderlayDevice), b.Open(t, UnderlayDevice)
	port := underlay.Open(t, a.Port())
	frame := testFrame(1600, 0)
	expectAcross(t, from, to, frame)
	if _, err := Await(port, time.Second, equal(frame)); err != nil {
		t.Errorf("capture on the underlay: %v", err)
	}
	if err := from.Send(testFrame(1601, 0)); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("a packet of more than the underlay's MTU: %v, want that it is refused", err)
	}

	a.PullOut(t)
	if links := a.Links(t); len(links) != 0 {
		t.Errorf("after PullOut %s has %v", a.Name, links)
	}
	a.PlugIn(t)
	expectAcross(t, to, a.Open(t, UnderlayDevice), frame)
}

func TestWireKeepsVLANTagsWhereTheyWere(t *testing.T) {
	one, other := New(t, "one"), New(t, "other")
	for _, ns := range []Namespace{one, other} {
		ns.Sysctl(t, "net/ipv6/conf/default/disable_ipv6", "1")
	}
	connect(t, one, other)
	from, to := one.Open(t, "cable"), other.Open(t, "cable")
	for name, frame := range map[string][]byte{
		"untagged":           testFrame(100, 0),
		"802.1Q":             frames.Tag(testFrame(100, 0), frames.Dot1Q, 5<<13|77),
		"priority tag":       frames.Tag(testFrame(100, 0), frames.Dot1Q, 3<<13),
		"802.1ad over .1Q":   frames.Tag(frames.Tag(testFrame(100, 0), frames.Dot1Q, 20), frames.Dot1AD, 10),
		"shortest there is":  testFrame(0, 0),
		"tagged at full MTU": frames.Tag(testFrame(1500, 0), frames.Dot1Q, 4000),
	} {
		t.Run(name, func(t *testing.T) { expectAcross(t, from, to, frame) })
	}
}

func TestWireDoesNotReceiveItsOwnFrames(t *testing.T) {
	one, other := NewPod(t), NewPod(t)
	connect(t, one, other)
	wire := one.Open(t, "cable")
	if err := wire.Send(testFrame(80, 1)); err != nil {
		t.Fatal(err)
	}
	theirs := testFrame(80, 2)
	if err := other.Open(t, "cable").Send(theirs); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if got, err := wire.Receive(ctx); err != nil || !bytes.Equal(got, theirs) {
		t.Errorf("received %x, %v; want %x first", got, err, theirs)
	}
	cancel()
	if _, err := wire.Receive(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("without a frame: %v, want that the context ended", err)
	}
}

func TestTapCarriesFramesBothWays(t *testing.T) {
	NeedDevices(t)
	vm, other := NewPod(t), NewPod(t)
	connect(t, vm, other)
	h := vm.Netlink(t)
	lower, err := h.LinkByName("cable")
	if err != nil {
		t.Fatal(err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex = "tap0", lower.Attrs().Index
	link := &netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_PASSTHRU}}
	if err := h.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	major, minor := tapNumbers(t, vm, "tap0")
	tap, wire := OpenTap(t, major, minor), other.Open(t, "cable")
	tagged := frames.Tag(testFrame(200, 0), frames.Dot1Q, 9)
	expectAcross(t, tap, wire, tagged)
	expectAcross(t, wire, tap, tagged)
	expectAcross(t, tap, wire, frames.Tag(frames.Tag(testFrame(1496, 0), frames.Dot1Q, 20), frames.Dot1AD, 10))
}

// tapNumbers reads a macvtap's device numbers from a sysfs of its namespace.
func tapNumbers(t *testing.T, ns Namespace, link string) (major, minor uint32) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(ns.Sysfs(t), "class/net", link, "macvtap/tap*/dev"))
	if err != nil || len(found) != 1 {
		t.Fatalf("want one tap in sysfs, found %v, %v", found, err)
	}
	dev, err := os.ReadFile(found[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(string(dev), "%d:%d", &major, &minor); err != nil {
		t.Fatalf("device numbers %q: %v", dev, err)
	}
	return major, minor
}

// connect connects two namespaces by a cable.
func connect(t *testing.T, one, other Namespace) {
	t.Helper()
	there, err := vnetns.GetFromPath(other.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "cable"
	h := one.Netlink(t)
	cable := &netlink.Veth{LinkAttrs: attrs, PeerName: "cable", PeerNamespace: netlink.NsFd(int(there))}
	if err := h.LinkAdd(cable); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*netlink.Handle{h, other.Netlink(t)} {
		l, err := h.LinkByName("cable")
		if err != nil {
			t.Fatal(err)
		}
		if err := h.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
	}
	one.AwaitCarrier(t, "cable")
	other.AwaitCarrier(t, "cable")
}

// testFrame is a broadcast frame with a payload of the given length that differs by mark.
func testFrame(payload int, mark byte) []byte {
	frame := slices.Concat(bytes.Repeat([]byte{0xff}, 6), []byte{2, 0, 0, 0, 0, mark}, []byte{0x88, 0xb5})
	for i := range payload {
		frame = append(frame, byte(i)^mark)
	}
	return frame
}

func equal(want []byte) func([]byte) bool {
	return func(frame []byte) bool { return bytes.Equal(frame, want) }
}

func expectAcross(t *testing.T, from, to Wire, frame []byte) {
	t.Helper()
	if err := from.Send(frame); err != nil {
		t.Fatal(err)
	}
	if _, err := Await(to, 2*time.Second, equal(frame)); err != nil {
		t.Fatalf("frame of %d bytes: %v", len(frame), err)
	}
}
