// Package cdi writes the CDI device of a spoke, by which the container runtime gives it to a pod, while the spoke has a
// claim.
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
	// Kind is the vendor and class of all k8slan devices.
	Kind = "macvtap.k8slan.io/spoke"
	// DefaultDir is that of the two standard directories that a reboot empties. It has precedence over the other.
	DefaultDir = "/var/run/cdi"

	// Files is a pattern for the names of our files, also of half-written ones.
	Files = filePrefix + "*"

	version     = "0.6.0" // the oldest that has annotations of a spec
	filePrefix  = "macvtap.k8slan.io-spoke_"
	netnsKey    = "lan.k8slan.io/netns"
	claimKey    = "lan.k8slan.io/claim"
	permissions = "rw"
)

// Name returns the fully qualified CDI name of a spoke's device, with which the device plugin answers kubelet.
func Name(spoke string) string { return Kind + "=" + spoke }

// Device is the device of a spoke while one claim has it.
type Device struct {
	Netns, Spoke, ClaimID string

	Path         string // of the device node in the container; empty: none, only environment variables
	Major, Minor uint32
	UID, GID     uint32 // of the device node

	Env []string // NAME=value
}

func file(dir, spoke, claimID string) string {
	return filepath.Join(dir, filePrefix+spoke+"_"+claimID+".json")
}

// halfWritten returns the path of a device's file until it is complete; runtimes read only *.json.
func halfWritten(path string) string { return strings.TrimSuffix(path, ".json") + ".tmp" }

// Write writes the device's file in one step, for the container runtime to read. It creates the directory if there is
// none. First it removes devices of the same spoke that an earlier claim left: of two with one name, a runtime accepts
// neither.
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
	left, err := filepath.Glob(prefix + "*.*") // also half-written ones
	if err != nil {
		return fmt.Errorf("list CDI devices %s: %w", Name(d.Spoke), err)
	}
	for _, earlier := range left {
		// A name with another underscore is a port's, of a pool that had the spoke's name before.
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
	if err != nil { // a full file system still creates the file
		return errors.Join(fmt.Errorf("write CDI device %s: %w", Name(d.Spoke), err), remove(tmp))
	}
	return nil
}

// Remove removes the device of one claim, complete or half-written; if there is none, it succeeds. The device of
// another claim on the same spoke stays.
func Remove(dir, spoke, claimID string) error {
	path := file(dir, spoke, claimID)
	for _, f := range []string{path, halfWritten(path)} {
		if err := remove(f); err != nil {
			return fmt.Errorf("remove CDI device %s: %w", Name(spoke), err)
		}
	}
	return nil
}

// remove removes a file; if there is none, it succeeds.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// List returns our devices, sorted by spoke: netns, spoke and claim only. It skips files that are not ours.
func List(dir string) ([]Device, error) {
	paths, err := filepath.Glob(filepath.Join(dir, filePrefix+"*.json"))
	if err != nil {
		return nil, fmt.Errorf("list CDI devices: %w", err)
	}
	var devices []Device
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed in the meantime
		}
		if err != nil {
			return nil, fmt.Errorf("list CDI devices: %w", err)
		}
		var s specs.Spec
		if json.Unmarshal(b, &s) != nil || len(s.Devices) != 1 {
			continue
		}
		devices = append(devices, Device{
			Netns: s.Annotations[netnsKey], Spoke: s.Devices[0].Name, ClaimID: s.Annotations[claimKey],
		})
	}
	slices.SortFunc(devices, func(a, b Device) int { return strings.Compare(a.Spoke+a.ClaimID, b.Spoke+b.ClaimID) })
	return devices, nil
}
