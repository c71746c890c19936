package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/k8slan/k8slan/test/cluster/internal/process"
)

// inotifyInstances is what two nodes need; the kernel's default is 128.
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

// savedSysctls are values to restore, in the boot they were read in.
type savedSysctls struct {
	Boot   string            `json:"boot"`
	Values map[string]string `json:"values"`
}

// changeSysctls remembers the machine's sysctls and sets what the cluster
// needs.
func (s state) changeSysctls() error {
	boot, err := process.BootID()
	if err != nil {
		return err
	}
	saved := savedSysctls{Boot: boot, Values: map[string]string{}}
	for _, name := range machineSysctls() {
		value, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			return fmt.Errorf("read sysctl %s: %w", name, err)
		}
		saved.Values[name] = strings.TrimSpace(string(value))
	}
	if err := writeJSON(s.sysctls(), saved); err != nil {
		return err
	}
	inotify := machineSysctls()[0]
	if have, err := strconv.Atoi(saved.Values[inotify]); err != nil || have >= inotifyInstances {
		return err
	}
	return writeSysctl(inotify, strconv.Itoa(inotifyInstances))
}

// restoreSysctls undoes what was changed since changeSysctls, unless the
// machine has booted meanwhile.
func (s state) restoreSysctls() error {
	content, err := os.ReadFile(s.sysctls())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the sysctls to restore: %w", err)
	}
	var saved savedSysctls
	if err := json.Unmarshal(content, &saved); err != nil {
		return fmt.Errorf("read the sysctls to restore, %s: %w", s.sysctls(), err)
	}
	boot, err := process.BootID()
	if err != nil || boot != saved.Boot {
		return err
	}
	for name, value := range saved.Values {
		if err := writeSysctl(name, value); err != nil {
			return err
		}
	}
	return nil
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
