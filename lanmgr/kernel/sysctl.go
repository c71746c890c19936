package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/rtnl"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

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
func (f *settingFiles) areMade(ns netns.Handle) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, s := range settings {
		if f.files[i] == nil && s.isLoaded() { // meanwhile
			if err := netns.Do(ns, func() (err error) { f.files[i], err = s.open(); return err }); err != nil {
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

// allowIPv6 lets a link of the thread's own namespace have IPv6 addresses: runtimes switch IPv6 off in a pod that has
// none from its cluster. lo needs it too, for the pod to reach its own address.
func allowIPv6(link string) error {
	for _, name := range []string{"lo", link} {
		path := "/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6"
		value, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("IPv6 of the pod: %w", err)
		}
		if value[0] == '0' {
			continue
		}
		if err := os.WriteFile(path, []byte("0"), 0); err != nil {
			return fmt.Errorf("switch IPv6 on for %s in the pod: %w", name, err)
		}
	}
	return nil
}

// readIPv6Off reads the setting of each device in the thread's own namespace; a kernel without IPv6 has it off.
func readIPv6Off(devices map[string]Underlay) error {
	for name, d := range devices {
		b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("sysctl: %w", err)
		}
		d.IPv6Off = err != nil || strings.TrimSpace(string(b)) == "1"
		devices[name] = d
	}
	return nil
}

// setNeighborDiscovery switches a bridge's IPv6 on, without which it takes no neighbour (ndisc_allow_add in net/ipv6/ndisc.c), or off. It gives itself
// no address, and so has nothing to say: neither duplicate address detection, nor a solicitation of routers, nor a report of groups.
func (c *conn) setNeighborDiscovery(o segment.SetNeighborDiscovery) error {
	settings := [][2]string{{"disable_ipv6", "1"}}
	if o.On {
		settings = [][2]string{{"addr_gen_mode", "1"}, {"accept_ra", "0"}, {"disable_ipv6", "0"}}
	}
	return netns.Do(c.ns, func() error {
		for _, s := range settings {
			err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", o.Name, s[0]), []byte(s[1]), 0)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("sysctl: %w", err)
			}
		}
		return nil
	})
}

// silence makes a namespace silent. Links that spoke before have taught the bridge where their addresses are, and a plug
// has that of the pod or VM that it waits for, which may be elsewhere: it forgets what it learnt.
func (c *conn) silence(bridge string) error {
	if err := netns.Do(c.ns, silence); err != nil || bridge == "" {
		return err
	}
	return c.request(bridge, func(r *rtnl.Conn, index int) error { return r.FlushFDB(index) })
}
