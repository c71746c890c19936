package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/test/cluster/internal/process"
)

// inotifyInstances is what the two nodes of a cluster need; the kernel's default is 128.
const inotifyInstances = 1024

// machineSysctls are those that the cluster changes for the whole machine: the
// first itself, the others through the kubelets (setupKernelTunables in
// pkg/kubelet/cm/container_manager_linux.go).
func machineSysctls() []string {
	return []string{
		"fs/inotify/max_user_instances",
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	}
}

// sysctlUse says which of the machine's clusters use the changed sysctls, and
// what to restore when the last of them goes down.
type sysctlUse struct {
	Boot     string            `json:"boot"`     // of the machine, in which the values were read
	Clusters []state           `json:"clusters"` // that came up in it
	Values   map[string]string `json:"values"`   // before the first of them
}

// sysctlFile keeps the machine's sysctlUse, for all its clusters.
const sysctlFile = stateParent + "/k8slan-cluster-sysctls.json"

// changeSysctls remembers the machine's sysctls, unless another cluster has,
// and sets what the machine's clusters need.
func (s state) changeSysctls() error {
	return changeSysctlUse(func(use sysctlUse) (sysctlUse, error) {
		if len(use.Clusters) == 0 {
			values, err := readSysctls()
			if err != nil {
				return use, err
			}
			use.Values = values
		}
		use.Clusters = append(slices.DeleteFunc(use.Clusters, s.is), s)
		inotify := machineSysctls()[0]
		want := inotifyInstances * len(use.Clusters)
		if have, err := strconv.Atoi(use.Values[inotify]); err != nil || have >= want {
			return use, err
		}
		return use, writeSysctl(inotify, strconv.Itoa(want))
	})
}

// restoreSysctls undoes what was changed since the first changeSysctls, once no
// cluster uses it any more.
func (s state) restoreSysctls() error {
	return changeSysctlUse(func(use sysctlUse) (sysctlUse, error) {
		if !slices.ContainsFunc(use.Clusters, s.is) {
			return use, nil
		}
		use.Clusters = slices.DeleteFunc(use.Clusters, s.is)
		if len(use.Clusters) > 0 {
			return use, nil
		}
		for name, value := range use.Values {
			if err := writeSysctl(name, value); err != nil {
				return use, err
			}
		}
		return use, nil
	})
}

func (s state) is(other state) bool { return s == other }

// changeSysctlUse lets f change what sysctlFile says, which is nothing after
// the machine has booted, and keeps other programs from it meanwhile.
func changeSysctlUse(f func(sysctlUse) (sysctlUse, error)) (err error) {
	// The directory, because the file comes and goes.
	lock, err := os.Open(filepath.Dir(sysctlFile))
	if err != nil {
		return fmt.Errorf("lock the machine's sysctls: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock the machine's sysctls, %s: %w", lock.Name(), err)
	}
	boot, err := process.BootID()
	if err != nil {
		return err
	}
	use, err := readSysctlUse()
	if err != nil {
		return err
	}
	if use.Boot != boot {
		use = sysctlUse{Boot: boot}
	}
	if use, err = f(use); err != nil {
		return err
	}
	if len(use.Clusters) > 0 {
		return writeJSON(sysctlFile, use)
	}
	if err := os.Remove(sysctlFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the machine's sysctls: %w", err)
	}
	return nil
}

// readSysctlUse returns what sysctlFile says, nothing if there is none.
func readSysctlUse() (sysctlUse, error) {
	content, err := os.ReadFile(sysctlFile)
	if errors.Is(err, fs.ErrNotExist) {
		return sysctlUse{}, nil
	}
	if err != nil {
		return sysctlUse{}, fmt.Errorf("read the sysctls to restore: %w", err)
	}
	var use sysctlUse
	if err := json.Unmarshal(content, &use); err != nil {
		return sysctlUse{}, fmt.Errorf("read the sysctls to restore, %s: %w", sysctlFile, err)
	}
	return use, nil
}

func readSysctls() (map[string]string, error) {
	values := map[string]string{}
	for _, name := range machineSysctls() {
		value, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			return nil, fmt.Errorf("read sysctl %s: %w", name, err)
		}
		values[name] = strings.TrimSpace(string(value))
	}
	return values, nil
}

func writeSysctl(name, value string) error {
	if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0); err != nil {
		return fmt.Errorf("set sysctl %s to %s: %w", name, value, err)
	}
	return nil
}

func writeJSON(path string, value any) error {
	content, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.WriteFile(path, append(content, '\n'), 0o644)
}
