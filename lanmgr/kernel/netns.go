package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// All switching of threads between network namespaces is in this file.

// do runs f inside the network namespace.
func do(ns netns.NsHandle, f func() error) error {
	return elsewhere(func() error { return netns.Set(ns) }, f)
}

// InLANNetns runs f on a thread that is in a segment's network namespace; sockets that it opens stay there. ErrNoLAN where there
// is none.
func (n *Node) InLANNetns(netnsName string, f func() error) error {
	if err := checkName(netnsName); err != nil {
		return err
	}
	ns, err := openNetns(n.netnsPath(netnsName))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w (no %s)", ErrNoLAN, n.netnsPath(netnsName))
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	return do(ns, f)
}

// InHostNetns runs f on a thread that is in the node's own network namespace.
func (n *Node) InHostNetns(f func() error) error {
	ns, err := n.host()
	if err != nil {
		return err
	}
	defer ns.Close()
	return do(ns, f)
}

// createNetns makes a network namespace and mounts it at path. Its settings are made before it has its name,
// so that nobody can find it talkative.
func createNetns(path string) error {
	return elsewhere(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() error {
		if err := silence(); err != nil {
			return err
		}
		return mountNetns("/proc/thread-self/ns/net", path)
	})
}

// elsewhere runs f on a thread of its own after it has entered another network namespace. The thread is given back
// only after it returned to where it was; otherwise it ends with its goroutine.
func elsewhere(enter, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			result <- fmt.Errorf("open the thread's own network namespace: %w", err)
			return
		}
		defer home.Close()
		if err := enter(); err != nil {
			runtime.UnlockOSThread()
			result <- fmt.Errorf("enter a network namespace: %w", err)
			return
		}
		err = f()
		if backErr := netns.Set(home); backErr != nil {
			result <- errors.Join(err, fmt.Errorf("leave a network namespace: %w", backErr))
			return
		}
		runtime.UnlockOSThread()
		result <- err
	}()
	return <-result
}

// mountNetns gives the namespace that source stands for a name.
func mountNetns(source, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make the file for the network namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount(source, path, "none", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount the network namespace at %s: %w", path, err)
	}
	return nil
}

// unmountNetns takes the name away, whatever it stands for; absent is success.
func unmountNetns(path string) error {
	for {
		// Detached, because somebody may be looking at it; once more for each mount on top of another.
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the file of the network namespace: %w", err)
	}
	return nil
}

// openNetns opens a named namespace. A name without a namespace behind it is fs.ErrNotExist.
func openNetns(path string) (netns.NsHandle, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return netns.None(), fmt.Errorf("open network namespace %s: %w", path, err)
	}
	var st unix.Statfs_t // of what was opened: the name may be taken away meanwhile
	if err := unix.Fstatfs(int(ns), &st); err != nil {
		ns.Close()
		return netns.None(), &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	if st.Type != unix.NSFS_MAGIC {
		ns.Close()
		return netns.None(), &fs.PathError{Op: "open network namespace", Path: path, Err: fs.ErrNotExist}
	}
	return ns, nil
}

// inode is what tells a network namespace from others, as long as somebody has it open.
type inode struct{ dev, ino uint64 }

func inodeOf(ns netns.NsHandle) (inode, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(ns), &st); err != nil {
		return inode{}, fmt.Errorf("stat network namespace: %w", err)
	}
	return inode{st.Dev, st.Ino}, nil
}

// isAt says whether the namespace has that name.
func (i inode) isAt(path string) (bool, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return i == inode{st.Dev, st.Ino}, nil
}

// The settings that keep a LAN silent and transparent. New links inherit "default"; "all" is for those that are there.
// Bridge netfilter starts switched on in every namespace (brnf_init_net in net/bridge/br_netfilter_hooks.c) and would
// pass a LAN's frames through IP validation; its files are absent where the module is not loaded.
var settings = []setting{
	{"/proc/sys/net/ipv6/conf", "ipv6", "1", []string{"all/disable_ipv6", "default/disable_ipv6"}},
	{"/proc/sys/net/bridge", "br_netfilter", "0", []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables", "bridge-nf-call-arptables"}},
}

type setting struct {
	dir, module, value string
	files              []string
}

// silence makes the settings in the thread's own namespace.
func silence() error {
	for _, s := range settings {
		for _, file := range s.files {
			if err := os.WriteFile(filepath.Join(s.dir, file), []byte(s.value), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("sysctl: %w", err)
			}
		}
	}
	return nil
}

// settingFiles are the files of settings in one namespace, open: in the kernel's cache of names, the folders of all
// namespaces are in one chain, so that a look-up takes time in proportion to the LANs (proc_sys_compare in
// fs/proc/proc_sysctl.c), and needs a thread that is in the namespace.
type settingFiles struct {
	mu    sync.Mutex
	files [][]int // of each of settings; none where its folder is not there
}

// openSettings opens them in the thread's own namespace.
func openSettings() (*settingFiles, error) {
	f := &settingFiles{files: make([][]int, len(settings))}
	for i, s := range settings {
		var err error
		if f.files[i], err = s.open(); err != nil {
			f.close()
			return nil, err
		}
	}
	return f, nil
}

func (f *settingFiles) close() {
	for _, files := range f.files {
		closeAll(files)
	}
}

// areMade reads the settings of the namespace whose files they are.
func (f *settingFiles) areMade(ns netns.NsHandle) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, s := range settings {
		if f.files[i] == nil && s.isLoaded() { // meanwhile
			if err := do(ns, func() (err error) { f.files[i], err = s.open(); return err }); err != nil {
				return false, err
			}
		}
		for _, file := range f.files[i] {
			value, err := readLine(file)
			if errors.Is(err, fs.ErrNotExist) { // the module is not loaded any more
				closeAll(f.files[i])
				f.files[i] = nil
				break
			}
			if err != nil {
				return false, fmt.Errorf("sysctl: read in %s: %w", s.dir, err)
			}
			if value != s.value {
				return false, nil
			}
		}
	}
	return true, nil
}

// isLoaded says whether the kernel may have the module that the setting is of.
func (s setting) isLoaded() bool {
	_, err := os.Stat("/sys/module/" + s.module)
	return !errors.Is(err, fs.ErrNotExist)
}

// open opens the setting's files in the thread's own namespace; none where their folder is not there.
func (s setting) open() (files []int, err error) {
	dir, err := unix.Open(s.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("sysctl: open %s: %w", s.dir, err)
	}
	defer unix.Close(dir)
	for _, name := range s.files {
		file, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			closeAll(files)
			return nil, fmt.Errorf("sysctl: open %s in %s: %w", name, s.dir, err)
		}
		files = append(files, file)
	}
	return files, nil
}

func closeAll(files []int) {
	for _, file := range files {
		unix.Close(file)
	}
}

// readLine reads a short file of one line.
func readLine(file int) (string, error) {
	line := make([]byte, 32)
	n, err := unix.Pread(file, line, 0)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(line[:n])), nil
}

// noIPv6 keeps one link in the thread's own namespace from speaking IPv6 for itself.
func noIPv6(link string) error {
	err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", link, "disable_ipv6"), []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("switch IPv6 off on %s: %w", link, err)
	}
	return nil
}
