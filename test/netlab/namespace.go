package netlab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A Namespace is a network namespace that a test made, bound to a file.
type Namespace struct {
	// Path is the file to which the namespace is bound.
	Path string
}

// New makes a network namespace with loopback up, which is removed with the test.
func New(t testing.TB, name string) Namespace {
	t.Helper()
	ns, err := Make(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ns.Remove(); err != nil {
			t.Error(err)
		}
	})
	return ns
}

// Make makes a network namespace with loopback up, bound to a file in a directory of its own. Remove removes it.
func Make(name string) (Namespace, error) {
	dir, err := os.MkdirTemp("/run", name+"-")
	if err != nil {
		return Namespace{}, fmt.Errorf("directory of namespace %s: %w", name, err)
	}
	ns := Namespace{Path: filepath.Join(dir, "netns")}
	if err := os.WriteFile(ns.Path, nil, 0o444); err != nil {
		return ns, errors.Join(fmt.Errorf("file of namespace %s: %w", name, err), ns.Remove())
	}
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		if err := loopbackUp(); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", ns.Path, "", unix.MS_BIND, "")
	})
	if err != nil {
		return ns, errors.Join(fmt.Errorf("namespace %s: %w", name, err), ns.Remove())
	}
	return ns, nil
}

// Remove unmounts the namespace and everything else that is mounted in the directory from Make, and removes the
// directory.
func (n Namespace) Remove() error { return removeTree(filepath.Dir(n.Path)) }

// NewPod makes the namespace of a pod: it has loopback only and IPv6 off, so that no frames but the test's are sent.
func NewPod(t testing.TB) Namespace {
	t.Helper()
	pod := New(t, "pod")
	pod.Sysctl(t, "net/ipv6/conf/all/disable_ipv6", "1")
	pod.Sysctl(t, "net/ipv6/conf/default/disable_ipv6", "1")
	return pod
}

// At is a namespace that is already bound to a file: a LAN's.
func At(path string) Namespace { return Namespace{Path: path} }

// Do runs f on a thread that is in the namespace. The thread runs only f and ends with it. f must not fail a test
// itself, because it runs on another goroutine.
func (n Namespace) Do(f func() error) error {
	return onThread(func() error {
		fd, err := unix.Open(n.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open network namespace %s: %w", n.Path, err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", n.Path, err)
		}
		return f()
	})
}

// onThread runs f on a thread of its own. The thread is never unlocked, so the runtime ends it with its goroutine and
// no change that f made to the thread outlives f.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		finished := false
		defer func() {
			if !finished { // runtime.Goexit: f failed a test
				done <- errors.New("the function ended its goroutine: a test may not be failed from inside a namespace")
			}
		}()
		err := f()
		finished = true
		done <- err
	}()
	return <-done
}

// Netlink opens a netlink handle in the namespace, which is closed with the test.
func (n Namespace) Netlink(t testing.TB) *netlink.Handle {
	t.Helper()
	fd, err := vnetns.GetFromPath(n.Path)
	if err != nil {
		t.Fatalf("open network namespace %s: %v", n.Path, err)
	}
	defer fd.Close()
	h, err := netlink.NewHandleAt(fd)
	if err != nil {
		t.Fatalf("netlink in %s: %v", n.Path, err)
	}
	t.Cleanup(h.Close)
	return h
}

// carrierTimeout is long because all namespaces of a machine share one lock.
const carrierTimeout = 30 * time.Second

// AwaitCarrier returns when a link that is up carries frames in both directions: the kernel activates the end of a veth
// that was set up first a moment after the other one, and drops what is sent before (linkwatch_do_dev in
// net/core/link_watch.c).
func (n Namespace) AwaitCarrier(t testing.TB, link string) {
	t.Helper()
	n.await(t, link, true)
}

// AwaitNoCarrier returns when a link that is up has lost its carrier, which the kernel reports as late.
func (n Namespace) AwaitNoCarrier(t testing.TB, link string) {
	t.Helper()
	n.await(t, link, false)
}

func (n Namespace) await(t testing.TB, link string, carrier bool) {
	t.Helper()
	ns, err := vnetns.GetFromPath(n.Path)
	if err != nil {
		t.Fatalf("open network namespace %s: %v", n.Path, err)
	}
	defer ns.Close()
	updates, done := make(chan netlink.LinkUpdate, 64), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribeAt(ns, updates, done); err != nil {
		t.Fatalf("watch the links in %s: %v", n.Path, err)
	}
	h, deadline := n.Netlink(t), time.After(carrierTimeout)
	for {
		l, err := h.LinkByName(link)
		if err != nil {
			t.Fatalf("%s in %s: %v", link, n.Path, err)
		}
		if (l.Attrs().OperState == netlink.OperUp) == carrier {
			return
		}
		select {
		case <-updates:
		case <-deadline:
			t.Fatalf("%s in %s is %s after %v, want a carrier: %t",
				link, n.Path, l.Attrs().OperState, carrierTimeout, carrier)
		}
	}
}

// Links names every link in the namespace but loopback, in the order of their ifindexes.
func (n Namespace) Links(t testing.TB) []string {
	t.Helper()
	links, err := n.Netlink(t).LinkList()
	if err != nil {
		t.Fatalf("links in %s: %v", n.Path, err)
	}
	names := []string{}
	for _, l := range links {
		if l.Attrs().Name != "lo" {
			names = append(names, l.Attrs().Name)
		}
	}
	return names
}

// Sysctl sets a kernel setting of the namespace; name is its path below /proc/sys.
func (n Namespace) Sysctl(t testing.TB, name, value string) {
	t.Helper()
	if err := n.Do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0) }); err != nil {
		t.Fatalf("set %s=%s in %s: %v", name, value, n.Path, err)
	}
}

// ReadSysctl reads a kernel setting of the namespace; name is its path below /proc/sys.
func (n Namespace) ReadSysctl(t testing.TB, name string) string {
	t.Helper()
	var value []byte
	err := n.Do(func() (err error) {
		value, err = os.ReadFile("/proc/sys/" + name)
		return err
	})
	if err != nil {
		t.Fatalf("read %s in %s: %v", name, n.Path, err)
	}
	return strings.TrimSpace(string(value))
}

// Sysfs mounts a sysfs that shows the links of the namespace, and returns its directory. It is removed with the test.
func (n Namespace) Sysfs(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "sysfs-")
	if err != nil {
		t.Fatalf("directory of a sysfs: %v", err)
	}
	t.Cleanup(func() {
		if err := removeTree(dir); err != nil {
			t.Error(err)
		}
	})
	if err := n.Do(func() error {
		return unix.Mount("sysfs", dir, "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	}); err != nil {
		t.Fatalf("sysfs of %s: %v", n.Path, err)
	}
	return dir
}

// removeTree unmounts everything below a directory and removes it.
func removeTree(dir string) error {
	mounts, err := mountsUnder(dir)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}
