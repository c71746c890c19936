package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// pluginName is the CNI plugin's file name on a node: the type in the NADs.
const pluginName = "k8slan"

// megalosName is its second file name, for networks of type megalos.
const megalosName = "megalos"

// installPlugin installs the CNI plugin, with its second name if withMegalos is set. Otherwise it removes the second
// name, unless that file is another program.
func installPlugin(source, dir string, withMegalos bool) (installed bool, err error) {
	megalos := filepath.Join(dir, megalosName)
	if !withMegalos {
		if err := removeMegalos(dir); err != nil {
			return false, err
		}
		return installCNI(source, filepath.Join(dir, pluginName))
	}
	for _, target := range []string{megalos, filepath.Join(dir, pluginName)} {
		changed, err := installCNI(source, target)
		if err != nil {
			return installed, err
		}
		installed = installed || changed
	}
	return installed, nil
}

// ownsMegalos reports whether the program with the second name is the CNI plugin.
func ownsMegalos(dir string) (bool, error) {
	program, err := os.ReadFile(filepath.Join(dir, pluginName))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read the installed CNI plugin: %w", err)
	}
	return isInstalled(program, filepath.Join(dir, megalosName))
}

// megalosInUse reports whether the CNI plugin must keep its second name because pods are attached by it: a runtime that
// does not find the plugin can never remove such a pod.
func megalosInUse(ctx context.Context, host *kernel.Node, dir string) (bool, error) {
	ours, err := ownsMegalos(dir)
	if err != nil || !ours {
		return false, err
	}
	lans, err := host.List()
	if err != nil {
		return false, err
	}
	for _, lan := range lans {
		claims, err := host.Claims(ctx, lan)
		if err != nil {
			return false, fmt.Errorf("find pods on networks of type megalos: %w", err)
		}
		if slices.ContainsFunc(claims, func(c segment.Claim) bool { return segment.IsOnDemand(c.Spoke) }) {
			return true, nil
		}
	}
	return false, nil
}

// removeMegalos removes the program with the second name if it is the CNI plugin.
func removeMegalos(dir string) error {
	megalos := filepath.Join(dir, megalosName)
	if ours, err := ownsMegalos(dir); err != nil || !ours {
		return err
	}
	if err := os.Remove(megalos); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the CNI plugin's second name: %w", err)
	}
	return nil
}

// installCNI copies the program source to target, whose directory must exist. It replaces target atomically: a runtime
// that starts it at the same time gets either the whole old program or the whole new one. If target is the same
// already, installCNI writes nothing.
func installCNI(source, target string) (installed bool, err error) {
	program, err := os.ReadFile(source)
	if err != nil {
		return false, fmt.Errorf("read the CNI plugin: %w", err)
	}
	same, err := isInstalled(program, target)
	if err != nil {
		return false, fmt.Errorf("read the installed CNI plugin: %w", err)
	}
	if same {
		return false, nil
	}
	if err := replace(target, program); err != nil {
		return false, fmt.Errorf("install the CNI plugin as %s: %w", target, err)
	}
	return true, nil
}

// isInstalled reports whether target is the program, with the right mode.
func isInstalled(program []byte, target string) (bool, error) {
	info, err := os.Lstat(target)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if info.Mode() != 0o755 || info.Size() != int64(len(program)) {
		return false, nil
	}
	installed, err := os.ReadFile(target)
	return bytes.Equal(installed, program), err
}

// replace writes a program beside target and renames it, so that target is never half written and never busy. It also
// removes the files that a killed installer left.
func replace(target string, program []byte) (err error) {
	dir := filepath.Dir(target)
	prefix := "." + filepath.Base(target) + "-new-"
	stale, err := filepath.Glob(filepath.Join(dir, prefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range stale {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	file, err := os.CreateTemp(dir, prefix+"*")
	if err != nil {
		return err
	}
	if err := writeAndClose(file, program); err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	if err := os.Rename(file.Name(), target); err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	return syncDir(dir)
}

// writeAndClose writes the program to disk, and closes the file.
func writeAndClose(file *os.File, program []byte) error {
	_, err := file.Write(program)
	return errors.Join(err, file.Chmod(0o755), file.Sync(), file.Close())
}

// syncDir makes a rename survive a power failure.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
