// Package netlab builds nodes, pods and the network between them out of network namespaces. It writes LANs as the
// controller would, makes sandboxes, and calls CNI plugins as a container runtime does, each call in its own process.
//
// A package whose tests need it calls [Main] from its TestMain. The test binary then runs again in new network and
// mount namespaces, and in a new user namespace if it isn't root, so that no test changes the machine's own links,
// routes, mounts or /run. Everything that the tests make ends with that process.
package netlab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// inside is set in the test binary that runs in its own namespaces: "root", or "user" in a user namespace.
	inside = "K8SLAN_TEST_NETNS"
	// noSkip makes every skip a failure.
	noSkip = "K8SLAN_NO_SKIP"
)

// The main goroutine keeps the first thread, so that [Namespace.Do] never moves that thread to another namespace: files
// like /proc/self/ns/net show the namespace of the first thread.
func init() { runtime.LockOSThread() }

// Main runs a package's tests in namespaces of their own and exits with their result. If the kernel does not allow
// that, or lacks a kind of link that LANs consist of, Main prints why and runs no test; with K8SLAN_NO_SKIP=1 that is a
// failure. The functions run after the last test.
func Main(m *testing.M, after ...func()) {
	if os.Getenv(inside) == "" {
		os.Exit(reexec())
	}
	if err := errors.Join(prepare(), tryLinks()); err != nil {
		os.Exit(unsupported(err))
	}
	code := m.Run()
	for _, f := range after {
		f()
	}
	os.Exit(code)
}

// Inside reports whether this process runs in the namespaces that Main makes.
func Inside() bool { return os.Getenv(inside) != "" }

// NeedDevices skips a test that opens a device node, which a user namespace cannot.
func NeedDevices(t testing.TB) {
	t.Helper()
	NeedRoot(t, "a tap is opened by its device node, and making one needs root")
}

// NeedRoot skips a test that needs more rights than a user namespace has, for that reason.
func NeedRoot(t testing.TB, why string) {
	t.Helper()
	if os.Getenv(inside) == "root" {
		return
	}
	why += ": run this test as root"
	if os.Getenv(noSkip) == "1" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// reexec runs this test binary once more, in its own namespaces, and returns its exit code.
func reexec() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	kind := "root"
	if os.Geteuid() != 0 {
		kind = "user"
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	cmd.Env = append(os.Environ(), inside+"="+kind)
	if err := cmd.Start(); err != nil {
		return unsupported(fmt.Errorf("new %s namespaces: %w", kind, err))
	}
	var exit *exec.ExitError
	switch err := cmd.Wait(); {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode()
	default:
		fmt.Fprintln(os.Stderr, "netns: the tests ended by", err)
		return 2
	}
}

// unsupported prints why no test ran and returns the exit code for it.
func unsupported(err error) int {
	verdict, code := "SKIP", 0
	if os.Getenv(noSkip) == "1" {
		verdict, code = "FAIL", 1
	}
	fmt.Fprintf(os.Stderr, "--- %s: no test of this package ran, because this machine does not allow it: %v\n",
		verdict, err)
	return code
}

// prepare gives this process its own /run and /sys, separates its mounts from the machine's, and sets loopback up.
func prepare() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private: %w", err)
	}
	// A fresh /sys shows the links of this network namespace.
	if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("mount sysfs: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID, "mode=755"); err != nil {
		return fmt.Errorf("mount a tmpfs on /run: %w", err)
	}
	// As on a node, every mount namespace made later sees what is mounted under /run.
	if err := unix.Mount("", "/run", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share /run: %w", err)
	}
	if err := os.MkdirAll("/var/run/cdi", 0o755); err != nil { // /var/run is /run, or not writable
		return fmt.Errorf("make /var/run/cdi: %w", err)
	}
	return loopbackUp()
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// tryLinks makes one link of each kind that LANs consist of and removes them again.
func tryLinks() error {
	attrs := func(name string) netlink.LinkAttrs {
		a := netlink.NewLinkAttrs()
		a.Name = name
		return a
	}
	veth := &netlink.Veth{LinkAttrs: attrs("try-veth"), PeerName: "try-peer"}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("the kernel makes no veth: %w", err)
	}
	lower := attrs("try-macvtap")
	lower.ParentIndex = veth.Index
	var missing []error
	for _, link := range []netlink.Link{
		&netlink.Bridge{LinkAttrs: attrs("try-bridge")},
		&netlink.Vxlan{LinkAttrs: attrs("try-vxlan"), VxlanId: 1, Port: 4789},
		&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: lower, Mode: netlink.MACVLAN_MODE_PASSTHRU}},
	} {
		if err := netlink.LinkAdd(link); err != nil {
			missing = append(missing, fmt.Errorf("the kernel makes no %s: %w", link.Type(), err))
			continue
		}
		if err := netlink.LinkDel(link); err != nil {
			missing = append(missing, fmt.Errorf("remove %s: %w", link.Attrs().Name, err))
		}
	}
	if err := netlink.LinkDel(veth); err != nil {
		missing = append(missing, fmt.Errorf("remove try-veth: %w", err))
	}
	return errors.Join(missing...)
}

// mountsUnder lists the mounts at or below a directory, the latest first.
func mountsUnder(dir string) ([]string, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var found []string
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			found = append([]string{f[4]}, found...)
		}
	}
	return found, nil
}
