// Package cgroup makes one control group in every hierarchy of the machine,
// joins it, and kills and removes what is in it.
//
// It works with only the unified hierarchy (version 2) and with version 1
// hierarchies that have the unified one beside them.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Hierarchy is one mounted tree of control groups.
type Hierarchy struct {
	Mount   string   // where it is mounted
	Options []string // version 1: its controllers, or "name=…"; none for the unified hierarchy
}

// Unified says whether h is the version 2 hierarchy.
func (h Hierarchy) Unified() bool { return len(h.Options) == 0 }

// Hierarchies lists the machine's hierarchies, the unified one first.
func Hierarchies() ([]Hierarchy, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find the control group hierarchies: %w", err)
	}
	hierarchies := parseMounts(string(mounts))
	if len(hierarchies) == 0 || !hierarchies[0].Unified() {
		return nil, errors.New("no unified control group hierarchy is mounted: " +
			"mkdir /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")
	}
	return hierarchies, nil
}

// parseMounts reads /proc/self/mountinfo (proc_pid_mountinfo(5)): of each
// hierarchy the first mount of its root.
func parseMounts(mountinfo string) []Hierarchy {
	var found []Hierarchy
	seen := map[string]bool{}
	for line := range strings.Lines(mountinfo) {
		mount, super, ok := strings.Cut(strings.TrimSpace(line), " - ")
		left, right := strings.Fields(mount), strings.Fields(super)
		if !ok || len(left) < 6 || len(right) < 3 || left[3] != "/" {
			continue
		}
		h := Hierarchy{Mount: left[4]}
		switch right[0] {
		case "cgroup":
			h.Options = hierarchyOptions(right[2])
		case "cgroup2":
		default:
			continue
		}
		if key := strings.Join(h.Options, ","); !seen[key] {
			seen[key] = true
			found = append(found, h)
		}
	}
	slices.SortStableFunc(found, func(a, b Hierarchy) int { return min(len(a.Options), 1) - min(len(b.Options), 1) })
	return found
}

// hierarchyOptions keeps of a version 1 hierarchy's mount options those that
// say which hierarchy it is.
func hierarchyOptions(super string) []string {
	var options []string
	for _, option := range strings.Split(super, ",") {
		switch name, _, _ := strings.Cut(option, "="); name {
		case "rw", "ro", "xattr", "clone_children", "noprefix", "cpuset_v2_mode", "favordynmods", "release_agent":
		default:
			options = append(options, option)
		}
	}
	return options
}

// Group is a control group by its path below the root, the same in every
// hierarchy.
type Group string

func (g Group) in(h Hierarchy) string { return filepath.Join(h.Mount, string(g)) }

// Create makes the group and those above it where they are missing.
func (g Group) Create() error {
	hierarchies, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, h := range hierarchies {
		at := h.Mount
		for _, name := range strings.Split(string(g), "/") {
			parent := at
			at = filepath.Join(at, name)
			if err := create(h, parent, at); err != nil {
				return fmt.Errorf("make control group %s: %w", at, err)
			}
			// Beside version 1 hierarchies, those have the controllers that matter.
			if len(hierarchies) > 1 {
				continue
			}
			if err := delegateControllers(parent); err != nil {
				return fmt.Errorf("make control group %s: %w", at, err)
			}
		}
	}
	return nil
}

func create(h Hierarchy, parent, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if !slices.Contains(h.Options, "cpuset") {
		return nil
	}
	// A new version 1 cpuset is empty, and no process may join it until it is filled.
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		value, err := os.ReadFile(filepath.Join(parent, file))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, file), value, 0); err != nil {
			return err
		}
	}
	return nil
}

// delegateControllers lets the children of a unified group use every
// controller it has.
func delegateControllers(dir string) error {
	controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(controllers)) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+name), 0); err != nil {
			return fmt.Errorf("enable controller %s: %w", name, err)
		}
	}
	return nil
}

// SetWeight gives the group as much processor time, where it is scarce, as that
// many processes or groups of the usual weight beside it.
func (g Group) SetWeight(times int) error {
	hierarchies, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, h := range hierarchies {
		file, weight := "cpu.shares", 1024*times
		if h.Unified() {
			file, weight = "cpu.weight", 100*times
		}
		path := filepath.Join(g.in(h), file)
		err := os.WriteFile(path, []byte(strconv.Itoa(weight)), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("set the weight of control group %s: %w", path, err)
		}
	}
	return nil
}

// Join moves the calling process into the group; in the unified hierarchy into
// the child called leaf, if that is not empty, since there only a group
// without children may hold processes.
func (g Group) Join(leaf string) error {
	hierarchies, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, h := range hierarchies {
		dir := g.in(h)
		if h.Unified() {
			dir = filepath.Join(dir, leaf)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("join control group %s: %w", dir, err)
		}
	}
	return nil
}

// Processes lists the processes of the group and those below it.
func (g Group) Processes() ([]int, error) {
	unified, err := g.unified()
	if err != nil {
		return nil, err
	}
	var pids []int
	err = walk(unified, func(dir string) error {
		procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			return err
		}
		for _, field := range strings.Fields(string(procs)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return err
			}
			pids = append(pids, pid)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the processes of control group %s: %w", g, err)
	}
	return pids, nil
}

// Kill kills every process of the group and those below it, and waits until
// the last one has ended. A group that does not exist is empty.
func (g Group) Kill(ctx context.Context) error {
	unified, err := g.unified()
	if err != nil {
		return err
	}
	// Linux ≥ 5.14, cgroup-v2.rst: kills the whole subtree, concurrent forks included.
	err = os.WriteFile(filepath.Join(unified, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(unified); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("kill the processes of control group %s: %w", g, err)
	}
	if err := waitEmpty(ctx, unified); err != nil {
		return fmt.Errorf("wait for the processes of control group %s to end: %w", g, err)
	}
	return nil
}

// waitEmpty returns when "populated" in cgroup.events is 0; the kernel says
// with POLLPRI that the file has changed.
func waitEmpty(ctx context.Context, dir string) error {
	events, err := os.Open(filepath.Join(dir, "cgroup.events"))
	if err != nil {
		return err
	}
	defer events.Close()
	for {
		content := make([]byte, 256)
		n, err := events.ReadAt(content, 0)
		if n == 0 {
			return err
		}
		if strings.Contains(string(content[:n]), "populated 0") {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		// Bounded, so that an ended context is noticed.
		fds := []unix.PollFd{{Fd: int32(events.Fd()), Events: unix.POLLPRI}}
		if _, err := unix.Poll(fds, 200); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Remove removes the group and those below it, which must hold no process, in
// every hierarchy. It is no error if it is not there.
func (g Group) Remove() error {
	hierarchies, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, h := range hierarchies {
		if err := walk(g.in(h), os.Remove); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove control group %s: %w", g.in(h), err)
		}
	}
	return nil
}

func (g Group) unified() (string, error) {
	hierarchies, err := Hierarchies()
	if err != nil {
		return "", err
	}
	return g.in(hierarchies[0]), nil
}

// walk calls visit for the groups below dir and then for dir.
func walk(dir string, visit func(dir string) error) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if !entry.IsDir() {
			continue
		}
		if err := walk(filepath.Join(dir, entry.Name()), visit); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err // one that has been removed meanwhile holds nothing
		}
	}
	return visit(dir)
}
