package main_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/build/debian"
	"github.com/k8slan/k8slan/test/cluster"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/images"
	"github.com/k8slan/k8slan/test/netlab"
)

const (
	mtu     = 1422
	macvtap = "pod37a8eec1ce1" // as KubeVirt names it
	address = "02:6b:38:00:00:07"
	// archiveVariable hands the image, which is built where there is a
	// network, over to the tests in their namespaces.
	archiveVariable = "K8SLAN_TEST_VM_ARCHIVE"
)

func TestMain(m *testing.M) {
	if os.Getenv(archiveVariable) == "" && os.Geteuid() == 0 {
		if err := buildImage(); err != nil {
			fmt.Fprintln(os.Stderr, "FAIL:", err)
			os.Exit(1)
		}
	}
	netlab.Main(m)
}

func buildImage() error {
	ctx := context.Background()
	if err := debian.Install(ctx, slog.Default(), "iputils-ping"); err != nil {
		return err
	}
	archive, err := images.VM(ctx, cluster.CacheDir(os.Getenv))
	if err != nil {
		return err
	}
	return os.Setenv(archiveVariable, archive)
}

// pod is a namespace with a macvtap on one end of a veth pair, whose other end,
// peer, is the test's.
type pod struct {
	netlab.Namespace
	ifindex int // the macvtap's
}

func newPod(t *testing.T) pod {
	t.Helper()
	p := pod{Namespace: netlab.NewPod(t)}
	h := p.Netlink(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "plug", mtu
	// A veth delivers frames of its receiver's MTU and one tag (__is_skb_forwardable
	// in include/linux/netdevice.h); the guest sends two.
	plug := &netlink.Veth{LinkAttrs: attrs, PeerName: "peer", PeerMTU: mtu + 4}
	if err := h.LinkAdd(plug); err != nil {
		t.Fatal("make a veth pair: ", err)
	}
	attrs = netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.ParentIndex = macvtap, mtu, plug.Index
	if err := h.LinkAdd(
		&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_PASSTHRU}},
	); err != nil {
		t.Fatal("make a macvtap: ", err)
	}
	for _, name := range []string{"peer", "plug", macvtap} {
		link, err := h.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if name == macvtap {
			p.ifindex = link.Attrs().Index
			// A passthru macvtap is created with the lower link's address whatever one asks for.
			if err := h.LinkSetHardwareAddr(link, mustMAC(t, address)); err != nil {
				t.Fatal("set the macvtap's address: ", err)
			}
		}
		if err := errors.Join(h.LinkSetAllmulticastOn(link), h.LinkSetUp(link)); err != nil {
			t.Fatalf("set %s up: %v", name, err)
		}
	}
	p.AwaitCarrier(t, "peer")
	p.AwaitCarrier(t, "plug")
	return p
}

// addressPeer gives the test's end addresses to ping from.
func (p pod) addressPeer(t *testing.T, addresses ...string) {
	t.Helper()
	p.Sysctl(t, "net/ipv6/conf/peer/disable_ipv6", "0")
	h := p.Netlink(t)
	peer, err := h.LinkByName("peer")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := h.AddrAdd(peer, addr); err != nil {
			t.Fatalf("give peer the address %s: %v", a, err)
		}
	}
}

// container is the image's file system with what a runtime adds to it: /sys of
// the pod, and the macvtap's device as CDI describes it.
type container struct {
	pod  pod
	root string
}

func newContainer(t *testing.T, p pod) container {
	t.Helper()
	netlab.NeedDevices(t)
	c := container{pod: p, root: t.TempDir()}
	unpack(t, os.Getenv(archiveVariable), c.root)
	sys := filepath.Join(c.root, "sys")
	if err := os.Mkdir(sys, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := p.Do(func() error { return unix.Mount("sysfs", sys, "sysfs", unix.MS_RDONLY, "") }); err != nil {
		t.Fatal("mount the pod's sysfs: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(sys, 0); err != nil {
			t.Error("unmount the pod's sysfs: ", err)
		}
	})
	c.makeTap(t)
	return c
}

// makeTap makes /dev/tap<ifindex> for QEMU's user.
func (c container) makeTap(t *testing.T) {
	t.Helper()
	tap := fmt.Sprintf("tap%d", c.pod.ifindex)
	numbers, err := os.ReadFile(filepath.Join(c.root, "sys/class/net", macvtap, "macvtap", tap, "dev"))
	if err != nil {
		t.Fatal(err)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(numbers), "%d:%d", &major, &minor); err != nil {
		t.Fatalf("device numbers %q: %v", numbers, err)
	}
	path := filepath.Join(c.root, "dev", tap)
	if err := errors.Join(
		os.Mkdir(filepath.Dir(path), 0o755),
		unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))),
		os.Chown(path, images.QEMUUser, images.QEMUUser),
	); err != nil {
		t.Fatal("make the tap's device: ", err)
	}
}

// command is a command in the container, as the image's user.
func (c container) command(args ...string) *exec.Cmd {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Chroot:     c.root,
		Credential: &syscall.Credential{Uid: images.QEMUUser, Gid: images.QEMUUser},
	}
	return cmd
}

// start starts a command, in the pod, that ends with the test.
func (c container) start(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := c.pod.Do(cmd.Start); err != nil {
		t.Fatalf("start %q: %v", cmd.Args, err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
	})
}

// run starts the VM and returns what is on its console, line by line.
func (c container) run(t *testing.T, env ...string) <-chan string {
	t.Helper()
	cmd := c.command("/vm", "run")
	cmd.Env = append(cmd.Env, env...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	c.start(t, cmd)
	lines := make(chan string, 1000)
	go func() { // ends with the VM
		defer close(lines)
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			lines <- scanner.Text()
		}
	}()
	return lines
}

// exec runs a command in the guest and returns its standard output. When the
// command says that it is listening, it calls onListening.
func (c container) exec(t *testing.T, onListening func(), args ...string) string {
	t.Helper()
	cmd := c.command(append([]string{"/vm", "exec"}, args...)...)
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.start(t, cmd)
	for scanner := bufio.NewScanner(stderr); scanner.Scan(); {
		if scanner.Text() == "listening" && onListening != nil {
			onListening()
			continue
		}
		t.Logf("%q: %s", args, scanner.Text())
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%q in the guest: %v", args, err)
	}
	return stdout.String()
}

// awaitLine returns when a line of the console contains text.
func awaitLine(t *testing.T, lines <-chan string, text string) {
	t.Helper()
	deadline := time.After(60 * time.Second)
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				t.Fatalf("the VM ended before its console said %q", text)
			}
			t.Log("console: ", line)
			if strings.Contains(line, text) {
				return
			}
		case <-deadline:
			t.Fatalf("the VM's console didn't say %q", text)
		}
	}
}

func TestVM(t *testing.T) {
	p := newPod(t)
	c := newContainer(t, p)
	p.addressPeer(t, "192.168.99.1/24", "fd99::1/64")
	start := time.Now()
	awaitLine(t, c.run(t, "VM_ADDRESSES=192.168.99.2/24,fd99::2/64"), "guest: up")
	t.Logf("the guest was up %s after QEMU's start", time.Since(start).Round(100*time.Millisecond))
	t.Run("answers pings", func(t *testing.T) { testPings(t, p) })
	t.Run("has the macvtap's address and MTU", func(t *testing.T) { testNIC(t, c) })
	t.Run("receives every kind of frame", func(t *testing.T) { testReceives(t, p, c) })
	t.Run("sends every kind of frame", func(t *testing.T) { testSends(t, p, c) })
	t.Run("sends frames of full MTU with two tags", func(t *testing.T) { testTwoTags(t, p, c) })
}

func testPings(t *testing.T, p pod) {
	for _, to := range []string{"192.168.99.2", "fd99::2"} {
		var out []byte
		if err := p.Do(func() (err error) {
			// Until three answers came: the guest first makes sure that its IPv6 address is free.
			out, err = exec.Command("ping", "-n", "-i", "0.2", "-c", "3", "-w", "20", to).CombinedOutput()
			return err
		}); err != nil {
			t.Errorf("ping %s: %v\n%s", to, err, out)
		}
	}
}

func testNIC(t *testing.T, c container) {
	out := c.exec(t, nil, "ip", "link", "show", "eth0")
	if !strings.Contains(out, address) || !strings.Contains(out, fmt.Sprintf("mtu %d", mtu)) {
		t.Errorf("the guest's NIC is %s, want address %s and mtu %d", out, address, mtu)
	}
}

func testReceives(t *testing.T, p pod, c container) {
	peer := sender(t, p)
	want := passing(frames.Catalog(peer.Interface.HardwareAddr, mtu))
	out := c.exec(t, func() {
		for _, f := range want {
			if err := peer.Send(f.Bytes); err != nil {
				t.Errorf("send %s: %v", f.Name, err)
			}
		}
	}, "frames", "listen", "-i", "eth0", "--marker", frames.Marker, "-n", fmt.Sprint(len(want)))
	got := strings.Fields(out)
	for _, f := range want {
		if !slices.Contains(got, hex.EncodeToString(f.Bytes)) {
			t.Errorf("%s did not arrive as it was sent", f.Name)
		}
	}
}

func testSends(t *testing.T, p pod, c container) {
	peer := receiver(t, p)
	c.exec(t, nil, "frames", "catalog", "-i", "eth0")
	awaitAll(t, peer, passing(frames.Catalog(mustMAC(t, address), mtu)))
}

func testTwoTags(t *testing.T, p pod, c container) {
	c.exec(
		t,
		nil,
		"ip",
		"link",
		"add",
		"link",
		"eth0",
		"name",
		"provider",
		"type",
		"vlan",
		"proto",
		"802.1ad",
		"id",
		"20",
	)
	c.exec(t, nil, "ip", "link", "set", "provider", "up")
	peer := receiver(t, p)
	c.exec(t, nil, "frames", "catalog", "-i", "provider", "--name", "full-mtu-8021q")
	all := frames.Catalog(mustMAC(t, address), mtu)
	f := all[slices.Index(frames.Names(all), "full-mtu-8021q")]
	f.Bytes = frames.Tag(f.Bytes, frames.Dot1AD, 20)
	awaitAll(t, peer, []frames.Frame{f})
}

func TestWaitingVMIsAttachedAndSilent(t *testing.T) {
	p := newPod(t)
	c := newContainer(t, p)
	peer := receiver(t, p)
	console := c.run(t, "VM_WAIT=1")
	awaitLine(t, console, "waiting")
	starter := c.command("/vm", "start")
	c.start(t, starter)
	// Whatever the tap had sent before would come first.
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if err := starter.Wait(); err != nil {
		t.Fatal("vm start: ", err)
	}
	awaitLine(t, console, "guest: up")
	c.exec(t, nil, "frames", "catalog", "-i", "eth0", "--name", "broadcast")
	frame, err := peer.Receive(ctx)
	if err != nil {
		t.Fatal("the VM sent nothing after its start: ", err)
	}
	if !(frames.Filter{Src: mustMAC(t, address)}).Match(frame) {
		t.Errorf("the first frame is not the guest's: %x", frame)
	}
}

func sender(t *testing.T, p pod) *frames.Sender {
	t.Helper()
	var s *frames.Sender
	if err := p.Do(func() (err error) { s, err = frames.NewSender("peer"); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func receiver(t *testing.T, p pod) *frames.Receiver {
	t.Helper()
	var r *frames.Receiver
	if err := p.Do(func() (err error) { r, err = frames.NewReceiver("peer"); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func mustMAC(t *testing.T, text string) net.HardwareAddr {
	t.Helper()
	mac, err := net.ParseMAC(text)
	if err != nil {
		t.Fatal(err)
	}
	return mac
}

func passing(all []frames.Frame) []frames.Frame {
	return slices.DeleteFunc(all, func(f frames.Frame) bool { return !f.Passes })
}

// awaitAll returns when all frames came, in whatever order.
func awaitAll(t *testing.T, r *frames.Receiver, want []frames.Frame) {
	t.Helper()
	missing := map[string]string{}
	for _, f := range want {
		missing[string(f.Bytes)] = f.Name
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for len(missing) > 0 {
		frame, err := r.Receive(ctx)
		if err != nil {
			t.Fatalf("did not arrive: %q (%v)", slices.Sorted(maps.Values(missing)), err)
		}
		delete(missing, string(frame))
	}
}

// unpack unpacks the one layer of an image's archive.
func unpack(t *testing.T, archive, root string) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal("open the VM image: ", err)
	}
	defer f.Close()
	var manifest v1.Manifest
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err != nil {
			t.Fatalf("no layer in %s: %v", archive, err)
		}
		switch {
		case len(manifest.Layers) == 0 && strings.HasPrefix(h.Name, "blobs/"): // it is the first
			if err := json.NewDecoder(r).Decode(&manifest); err != nil {
				t.Fatal("read the manifest: ", err)
			}
		case len(manifest.Layers) > 0 && strings.HasSuffix(h.Name, manifest.Layers[0].Digest.Encoded()):
			unpackLayer(t, r, root)
			return
		}
	}
}

func unpackLayer(t *testing.T, layer io.Reader, root string) {
	t.Helper()
	for r := tar.NewReader(layer); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal("read the layer: ", err)
		}
		if err := unpackEntry(h, r, filepath.Join(root, h.Name)); err != nil {
			t.Fatal("unpack the layer: ", err)
		}
	}
}

func unpackEntry(h *tar.Header, r io.Reader, path string) error {
	mode := fs.FileMode(h.Mode).Perm()
	switch h.Typeflag {
	case tar.TypeDir:
		return errors.Join(os.Mkdir(path, mode), os.Chown(path, h.Uid, h.Gid))
	case tar.TypeSymlink:
		return os.Symlink(h.Linkname, path)
	default:
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, mode)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		return errors.Join(err, f.Close(), os.Chown(path, h.Uid, h.Gid))
	}
}
