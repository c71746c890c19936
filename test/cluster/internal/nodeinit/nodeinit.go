// Package nodeinit is the first process of a test node: it gives the node a
// root of its own and then reaps orphans until it is killed, which is how the
// node loses power.
package nodeinit

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/test/cluster/internal/cgroup"
)

// Config describes a node to its first process.
type Config struct {
	Name string
	// Disk holds what outlives the node's power: the directories that Kept
	// lists.
	Disk string
	// Root is an empty directory that the node's root is mounted on.
	Root string
	// Shared lists directories of the machine that the node sees at the same
	// path, beside the machine's root file system.
	Shared []string
	// Hierarchies are the machine's; the node mounts each of them afresh.
	Hierarchies []cgroup.Hierarchy
	// CgroupLeaf is the child of the node's own control group, in the unified
	// hierarchy, that holds the processes outside of any pod.
	CgroupLeaf string
}

// Kept lists the node's directories that are on its disk.
func Kept() []string {
	return []string{"/var", "/opt", "/etc/cni", "/etc/cdi", "/etc/kubernetes", "/etc/containerd"}
}

// namespaces are what separates a node from the machine.
const namespaces = unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET |
	unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP

// ready is what the first process says on its standard output once the node
// is complete; anything else is an error's text.
const ready = "ready"

// Start runs argv, a command that calls Run, as the first process of a node,
// in the caller's control groups, and returns its number when the node is
// complete. log receives what it has to say later.
func Start(config Config, log *os.File, argv ...string) (pid int, err error) {
	// The kernel makes a cgroup namespace from the groups of the caller's thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	encoded, err := json.Marshal(config)
	if err != nil {
		return 0, fmt.Errorf("describe node %s: %w", config.Name, err)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin = strings.NewReader(string(encoded))
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Setsid: true}
	answer, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start the first process of node %s: %w", config.Name, err)
	}
	said, err := io.ReadAll(answer)
	if err != nil {
		return 0, fmt.Errorf("wait for the first process of node %s: %w", config.Name, err)
	}
	if string(said) != ready {
		return 0, fmt.Errorf("set up node %s: %s", config.Name, said)
	}
	return cmd.Process.Pid, nil
}

// Run is the first process of the node that is described on standard input.
// It returns only if the node could not be set up.
func Run() error {
	if err := setUp(); err != nil {
		fmt.Print(err)
		return err
	}
	fmt.Print(ready)
	os.Stdout.Close()
	reap()
	return nil
}

func setUp() error {
	var config Config
	if err := json.NewDecoder(os.Stdin).Decode(&config); err != nil {
		return fmt.Errorf("read the node's description: %w", err)
	}
	if err := unix.Sethostname([]byte(config.Name)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	root, err := mountRoot(config)
	if err != nil {
		return err
	}
	if err := changeRoot(root); err != nil {
		return err
	}
	if err := writeIdentity(config.Name); err != nil {
		return err
	}
	if err := joinLeaf(config.CgroupLeaf); err != nil {
		return err
	}
	return setUpNetwork()
}

// mountRoot assembles the node's root: the machine's, with changes kept in
// memory, and the node's own disk, devices, control groups and /run.
func mountRoot(config Config) (string, error) {
	m := mounter{}
	m.mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	// On a tmpfs: overlayfs takes no upper directory that is inside its lower one.
	m.mount("tmpfs", config.Root, "tmpfs", 0, "size=1g")
	upper, work, root := config.Root+"/upper", config.Root+"/work", config.Root+"/root"
	m.mkdir(upper, work, root)
	m.mount("overlay", root, "overlay", 0, "lowerdir=/,upperdir="+upper+",workdir="+work)
	m.mount("proc", root+"/proc", "proc", 0, "")
	// A new sysfs: it shows the network namespace it was mounted in.
	m.mount("sysfs", root+"/sys", "sysfs", 0, "")
	m.cgroups(root+"/sys/fs/cgroup", config.Hierarchies)
	m.mount("/dev", root+"/dev", "", unix.MS_BIND, "")
	m.mount("devpts", root+"/dev/pts", "devpts", 0, "newinstance,ptmxmode=0666,mode=620,gid=5")
	m.mount(root+"/dev/pts/ptmx", root+"/dev/ptmx", "", unix.MS_BIND, "")
	m.mount("tmpfs", root+"/dev/shm", "tmpfs", 0, "")
	m.mount("tmpfs", root+"/run", "tmpfs", 0, "mode=755")
	m.mount("tmpfs", root+"/tmp", "tmpfs", 0, "mode=1777")
	for _, dir := range Kept() {
		m.mkdir(config.Disk+dir, root+dir)
		m.mount(config.Disk+dir, root+dir, "", unix.MS_BIND, "")
	}
	m.mkdir(root+"/run/lock", root+"/var/lib", root+"/var/log/pods", root+"/var/log/containers", root+"/var/tmp",
		root+"/opt/cni/bin", root+"/etc/cni/net.d")
	m.symlink("/run", root+"/var/run")
	for _, dir := range config.Shared {
		m.mkdir(root + dir)
		m.mount(dir, root+dir, "", unix.MS_BIND, "")
	}
	return root, m.err
}

// mounter does one thing after the other until the first fails.
type mounter struct{ err error }

func (m *mounter) mount(source, target, fstype string, flags uintptr, data string) {
	if m.err != nil {
		return
	}
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		m.err = fmt.Errorf("mount %s %s on %s (%s): %w", fstype, source, target, data, err)
	}
}

func (m *mounter) mkdir(dirs ...string) {
	for _, dir := range dirs {
		if m.err == nil {
			m.err = os.MkdirAll(dir, 0o755)
		}
	}
}

func (m *mounter) symlink(target, name string) {
	if m.err != nil {
		return
	}
	if err := os.Symlink(target, name); err != nil && !errors.Is(err, os.ErrExist) {
		m.err = err
	}
}

// cgroups mounts every hierarchy afresh, which shows the node's own group as
// the root.
func (m *mounter) cgroups(dir string, hierarchies []cgroup.Hierarchy) {
	if len(hierarchies) == 1 {
		m.mount("cgroup2", dir, "cgroup2", 0, "")
		return
	}
	m.mount("tmpfs", dir, "tmpfs", 0, "mode=755")
	for _, h := range hierarchies {
		fstype, name, data := "cgroup", strings.Join(h.Options, ","), strings.Join(h.Options, ",")
		if h.Unified() {
			fstype, name = "cgroup2", "unified"
		}
		if named, ok := strings.CutPrefix(data, "name="); ok {
			name, data = named, "none,"+data
		}
		m.mkdir(filepath.Join(dir, name))
		m.mount(fstype, filepath.Join(dir, name), fstype, 0, data)
		if len(h.Options) < 2 {
			continue
		}
		for _, controller := range h.Options {
			m.symlink(name, filepath.Join(dir, controller))
		}
	}
}

// changeRoot makes root the root and lets go of the machine's mounts.
func changeRoot(root string) error {
	old := filepath.Join(root, ".old")
	if err := os.Mkdir(old, 0o700); err != nil {
		return err
	}
	if err := unix.PivotRoot(root, old); err != nil {
		return fmt.Errorf("pivot_root to %s: %w", root, err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Unmount("/.old", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the machine's root: %w", err)
	}
	if err := os.Remove("/.old"); err != nil {
		return err
	}
	// Pods with Bidirectional mounts need a shared root.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make the node's mounts shared: %w", err)
	}
	return nil
}

// writeIdentity gives the node the IDs that distinguish one machine, and one boot of it,
// from another.
func writeIdentity(name string) error {
	files := map[string]string{
		"/etc/hostname":    name + "\n",
		"/etc/hosts":       "127.0.0.1 localhost " + name + "\n::1 localhost\n",
		"/etc/resolv.conf": "",
		"/run/boot_id":     uuid() + "\n",
	}
	for path, content := range files {
		// Not written through: it may be a link to somewhere else.
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	// kubelet recognizes a reboot by this (node.status.nodeInfo.bootID).
	if err := unix.Mount("/run/boot_id", "/proc/sys/kernel/random/boot_id", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount the node's boot ID: %w", err)
	}
	return nil
}

func uuid() string {
	var b [16]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// joinLeaf leaves the root of the node's unified hierarchy: kubelet can give
// controllers to the pods' groups only while no process is in it.
func joinLeaf(leaf string) error {
	hierarchies, err := cgroup.Hierarchies()
	if err != nil {
		return err
	}
	dir := filepath.Join(hierarchies[0].Mount, leaf)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("join the control group %s: %w", dir, err)
	}
	return nil
}

// setUpNetwork lets the node forward what belongs to its pods.
func setUpNetwork() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback device: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set the loopback device up: %w", err)
	}
	for _, sysctl := range []struct{ name, value string }{
		{"net/ipv4/ip_forward", "1"},
		{"net/ipv6/conf/all/forwarding", "1"},
		{"net/ipv4/conf/all/rp_filter", "0"},
	} {
		if err := os.WriteFile("/proc/sys/"+sysctl.name, []byte(sysctl.value), 0); err != nil {
			return fmt.Errorf("set sysctl %s: %w", sysctl.name, err)
		}
	}
	return nil
}

// reap waits for orphans, which the kernel gives to the first process.
func reap() {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err != nil && !errors.Is(err, unix.EINTR) || err == nil && pid == 0 {
				break
			}
		}
		<-children
	}
}
