package soak

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/test/netlab"
)

// things are all that an attachment, a plugin or a daemon could leave behind on the node, one per line, in text that is
// the same for two nodes with the same things.
type things []string

// inventory lists these things. It may still list what the kernel removes a moment later.
func (s *site) inventory(t *testing.T) things {
	t.Helper()
	var have things
	add := func(what string, things []string, err error) {
		if err != nil {
			t.Fatalf("count %s: %v", what, err)
		}
		for _, thing := range things {
			have = append(have, what+" "+thing)
		}
	}
	things, err := files(s.node.Run)
	add("file of k8slan", things, err)
	things, err = files(s.node.CDI)
	add("CDI file", things, err)
	things, err = filepath.Glob(filepath.Join(s.leases, "*", "[0-9]*")) // without the IPAM plugin's lock and state
	add("IPAM lease", things, err)
	things, err = filepath.Glob(sandboxes)
	add("sandbox", things, err)
	things, err = s.mounts()
	add("mount", things, err)
	things, err = s.locks()
	add("lock held on", things, err)
	things, err = children()
	add("process", things, err)
	add("link of the node", s.node.Links(t), nil)
	things, err = namespaces(s.node.Path)
	add("number of a network namespace in the node's", things, err)
	observer := kernel.New(kernel.Paths{Run: s.node.Run, HostNetns: s.node.Path})
	defer observer.Close()
	lans, err := observer.List()
	add("LAN", lans, err)
	for _, lan := range lans {
		things, err = links(t, observer, lan)
		add("link of "+lan, things, err)
		path := filepath.Join(s.node.Run, "netns", lan)
		things, err = namespaces(path)
		add("number of a network namespace in that of "+lan, things, err)
		things, err = sockets(netlab.At(path))
		add("netlink socket in "+lan, things, err)
	}
	slices.Sort(have)
	return have
}

// awaitInventory takes inventories until one is as expected, and fails with the differences if none is for a while.
func (s *site) awaitInventory(t *testing.T, want things) {
	t.Helper()
	late := time.After(20 * time.Second) // the kernel removes namespaces and their links some time later
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		have := s.inventory(t)
		if slices.Equal(have, want) {
			return
		}
		select {
		case <-again.C:
		case <-late:
			for _, thing := range missing(have, want) {
				t.Errorf("leaked: %s", thing)
			}
			for _, thing := range missing(want, have) {
				t.Errorf("lost: %s", thing)
			}
			return
		}
	}
}

// missing returns what a has more often than b.
func missing(a, b []string) []string {
	count := map[string]int{}
	for _, thing := range b {
		count[thing]++
	}
	var more []string
	for _, thing := range a {
		if count[thing]--; count[thing] < 0 {
			more = append(more, thing)
		}
	}
	return more
}

// files lists the files below a directory.
func files(dir string) ([]string, error) {
	var found []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // the directory is made when it is needed, and may be removed meanwhile
		}
		if err == nil && !d.IsDir() {
			found = append(found, path)
		}
		return err
	})
	return found, err
}

// sandboxes are the directories that netlab.NewSandbox makes.
const sandboxes = "/run/pod-*"

// mounts lists the mounts below the node's directories and the sandboxes.
func (s *site) mounts() ([]string, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	var found []string
	for line := range strings.Lines(string(info)) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		sandbox, err := filepath.Match(sandboxes+"/*", f[4])
		if err != nil {
			return nil, err
		}
		if sandbox || strings.HasPrefix(f[4], filepath.Dir(s.node.Run)) {
			found = append(found, f[4])
		}
	}
	return found, err
}

// locks lists the locks on LANs that a process holds or waits for.
func (s *site) locks() ([]string, error) {
	table, err := os.ReadFile("/proc/locks")
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(s.node.Run, "lock")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var held []string
	for _, e := range entries {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, e.Name()), &st); err != nil {
			return nil, err
		}
		inode := fmt.Sprintf("%02x:%02x:%d ", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
		if strings.Contains(string(table), inode) {
			held = append(held, e.Name())
		}
	}
	return held, nil
}

// children names this process's child processes.
func children() ([]string, error) {
	lists, err := filepath.Glob("/proc/self/task/*/children")
	var found []string
	for _, list := range lists {
		pids, _ := os.ReadFile(list) // of a thread that may have ended
		for _, pid := range strings.Fields(string(pids)) {
			name, _ := os.ReadFile(filepath.Join("/proc", pid, "comm"))
			found = append(found, strings.TrimSpace(string(name)))
		}
	}
	return found, err
}

// links describes the links of a LAN with their names, owners and settings.
func links(t *testing.T, observer *kernel.Node, lan string) ([]string, error) {
	t.Helper()
	have, err := observer.Observe(t.Context(), lan)
	names := map[int]string{}
	for _, l := range have.Links {
		names[l.Index] = l.Name
	}
	var found []string
	for _, l := range have.Links {
		slices.Sort(l.AltNames)
		mac := l.MAC.String()
		if !strings.HasSuffix(l.Name, "_p") {
			mac = "random" // only a plug's MAC is not
		}
		found = append(found, fmt.Sprintf("%s %s %v %q mac=%s mtu=%d up=%t master=%s promisc=%d mask=%#x",
			l.Type, l.Name, l.AltNames, l.Alias, mac, l.MTU, l.Up, names[l.Master], l.Promisc, l.ForwardMask))
	}
	return found, err
}

// namespaces lists the other network namespaces that have a number in this one: those at the far ends of its links.
func namespaces(path string) ([]string, error) {
	ns, err := vnetns.GetFromPath(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	socket, err := nl.GetNetlinkSocketAt(ns, vnetns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	handle := &nl.SocketHandle{Socket: socket}
	defer handle.Close()
	r := nl.NewNetlinkRequest(unix.RTM_GETNSID, unix.NLM_F_DUMP)
	r.AddData(&nl.RtGenMsg{})
	r.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: handle}
	answers, err := r.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNSID)
	return slices.Repeat([]string{""}, len(answers)), err // the numbers are reused
}

// sockets lists the netlink sockets in a namespace that processes have open.
func sockets(ns netlab.Namespace) ([]string, error) {
	var found []string
	err := ns.Do(func() error {
		table, err := os.ReadFile("/proc/thread-self/net/netlink")
		for line := range strings.Lines(string(table)) {
			if f := strings.Fields(line); len(f) > 2 {
				if pid, err := strconv.Atoi(f[2]); err == nil && pid != 0 {
					found = append(found, "")
				}
			}
		}
		return err
	})
	return found, err
}
