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

// settings keep a LAN silent and transparent. New links inherit "default"; "all" sets those that exist. Bridge
// netfilter starts switched on in every namespace (brnf_init_net in net/bridge/br_netfilter_hooks.c) and would pass a
// LAN's frames through IP validation. Its files are missing where the module is not loaded.
var settings = []setting{
	{"/proc/sys/net/ipv6/conf", "ipv6", "1", []string{"all/disable_ipv6", "default/disable_ipv6"}},
	{"/proc/sys/net/bridge", "br_netfilter", "0", []string{
		"bridge-nf-call-iptables", "bridge-nf-call-ip6tables", "bridge-nf-call-arptables",
	}},
}

// setting is a value that files in a folder of /proc/sys have.
type setting struct {
	dir, module, value string
	files              []string
}

// silence writes the settings in the thread's own namespace.
func silence() error {
	for _, s := range settings {
		for _, file := range s.files {
			err := os.WriteFile(filepath.Join(s.dir, file), []byte(s.value), 0)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("sysctl: %w", err)
			}
		}
	}
	return nil
}

// settingFiles are the open files of settings in one namespace. They stay open, because to open one takes a thread in
// the namespace and time in proportion to the LANs: the kernel's cache of names has the folders of all namespaces in
// one chain (proc_sys_compare in fs/proc/proc_sysctl.c).
type settingFiles struct {
	mu    sync.Mutex
	files [][]int // of each of settings; nil where its folder is missing
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

// areSet reports whether the namespace has the settings.
func (f *settingFiles) areSet(ns netns.Handle) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, s := range settings {
		if f.files[i] == nil && s.isLoaded() { // the module was loaded since
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

// isLoaded reports whether the kernel may have loaded the module that has the setting.
func (s setting) isLoaded() bool {
	_, err := os.Stat("/sys/module/" + s.module)
	return !errors.Is(err, fs.ErrNotExist)
}

// open opens the setting's files in the thread's own namespace. It returns none where their folder is missing.
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

// noIPv6 switches IPv6 off on one link in the thread's own namespace, so that it sends nothing by itself.
func noIPv6(link string) error {
	err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", link, "disable_ipv6"), []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("switch IPv6 off on %s: %w", link, err)
	}
	return nil
}

// allowIPv6 switches IPv6 on for a link in the thread's own namespace. Runtimes switch it off in a pod whose cluster
// has none. lo needs it too, so that the pod reaches its own address.
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

// readIPv6Off reads whether IPv6 is off for devices in the thread's own namespace. A kernel without IPv6 has it off.
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

// setNeighborDiscovery switches a bridge's IPv6 on, without which it accepts no neighbour (ndisc_allow_add in
// net/ipv6/ndisc.c), or off. The bridge gives itself no address, and so sends nothing: no duplicate address detection,
// no solicitation of routers, no report of groups.
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

// silence makes a namespace silent. It also flushes the bridge's FDB: links that sent frames before have entered their
// MACs, and a plug's is that of its pod or VM, which may be on another node.
func (c *conn) silence(bridge string) error {
	if err := netns.Do(c.ns, silence); err != nil || bridge == "" {
		return err
	}
	return c.request(bridge, func(r *rtnl.Conn, index int) error { return r.FlushFDB(index) })
}
