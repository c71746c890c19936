// Package cdi says what a spoke's CDI device means on this node, for as long as a pod is attached to the spoke.
package cdi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	specs "tags.cncf.io/container-device-interface/specs-go"
)

const (
	// Kind is the vendor and class of all our devices.
	Kind = "macvtap.k8slan.io/spoke"
	// DefaultDir is the one of the two standard folders that is emptied by a reboot, and that wins over the other.
	DefaultDir = "/var/run/cdi"

	// Files is the pattern of the names of our files, half-written ones too.
	Files = filePrefix + "*"

	version     = "0.6.0" // the oldest that knows annotations of a spec
	filePrefix  = "macvtap.k8slan.io-spoke_"
	netnsKey    = "lan.k8slan.io/netns"
	claimKey    = "lan.k8slan.io/claim"
	permissions = "rw"
)

// Name is the fully qualified CDI name of a spoke's device: what the device plugin answers to kubelet.
func Name(spoke string) string { return Kind + "=" + spoke }

// Device is what a spoke's name means while one claim holds it.
type Device struct {
	Netns, Spoke, ClaimID string

	Path         string // of the device node in the container; empty: none, only the environment
	Major, Minor uint32
	UID, GID     uint32 // of the device node

	Env []string // NAME=value
}

func file(dir, spoke, claimID string) string {
	return filepath.Join(dir, filePrefix+spoke+"_"+claimID+".json")
}

// halfWritten is a device's file until it is whole; runtimes read *.json alone.
func halfWritten(path string) string { return strings.TrimSuffix(path, ".json") + ".tmp" }

// Write makes the device known to the container runtime, in one step. The folder is made if it is missing. Devices of the
// same spoke that an earlier claim has left are removed first: of two with one name a runtime knows neither.
func Write(dir string, d Device) error {
	edits := specs.ContainerEdits{Env: d.Env}
	if d.Path != "" {
		mode := os.FileMode(0o600)
		edits.DeviceNodes = []*specs.DeviceNode{{
			Path: d.Path, Type: "c", Major: int64(d.Major), Minor: int64(d.Minor),
			FileMode: &mode, Permissions: permissions, UID: &d.UID, GID: &d.GID,
		}}
	}
	b, err := json.Marshal(specs.Spec{
		Version:     version,
		Kind:        Kind,
		Annotations: map[string]string{netnsKey: d.Netns, claimKey: d.ClaimID},
		Devices:     []specs.Device{{Name: d.Spoke, ContainerEdits: edits}},
	})
	if err != nil {
		return fmt.Errorf("encode CDI device %s: %w", Name(d.Spoke), err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write CDI device %s: %w", Name(d.Spoke), err)
	}
	path := file(dir, d.Spoke, d.ClaimID)
	prefix := strings.TrimSuffix(file(dir, d.Spoke, ""), ".json")
	left, err := filepath.Glob(prefix + "*.*") // half-written ones, too
	if err != nil {
		return fmt.Errorf("list CDI devices %s: %w", Name(d.Spoke), err)
	}
	for _, earlier := range left {
		// What has a further underscore is that of a port, of a pool that had the spoke's name before.
		if earlier == path || strings.Contains(strings.TrimPrefix(earlier, prefix), "_") {
			continue
		}
		if err := remove(earlier); err != nil {
			return fmt.Errorf("remove CDI device %s of an earlier claim: %w", Name(d.Spoke), err)
		}
	}
	tmp := halfWritten(path)
	err = os.WriteFile(tmp, b, 0o644)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil { // a full file system takes the file's name, but not its content
		return errors.Join(fmt.Errorf("write CDI device %s: %w", Name(d.Spoke), err), remove(tmp))
	}
	return nil
}

// Remove takes one claim's device away, whole or half-written; absent is success. Another claim's device of the same
// spoke stays.
func Remove(dir, spoke, claimID string) error {
	path := file(dir, spoke, claimID)
	for _, f := range []string{path, halfWritten(path)} {
		if err := remove(f); err != nil {
			return fmt.Errorf("remove CDI device %s: %w", Name(spoke), err)
		}
	}
	return nil
}

// remove removes a file; absent is success.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// List reads our devices back, sorted by spoke: whose they are, not what they contain. Files that are not ours are passed over.
func List(dir string) ([]Device, error) {
	paths, err := filepath.Glob(filepath.Join(dir, filePrefix+"*.json"))
	if err != nil {
		return nil, fmt.Errorf("list CDI devices: %w", err)
	}
	var devices []Device
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("list CDI devices: %w", err)
		}
		var s specs.Spec
		if json.Unmarshal(b, &s) != nil || len(s.Devices) != 1 {
			continue
		}
		devices = append(devices, Device{Netns: s.Annotations[netnsKey], Spoke: s.Devices[0].Name, ClaimID: s.Annotations[claimKey]})
	}
	slices.SortFunc(devices, func(a, b Device) int { return strings.Compare(a.Spoke+a.ClaimID, b.Spoke+b.ClaimID) })
	return devices, nil
}
