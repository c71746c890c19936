package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// pluginName is what the CNI plugin is called on a node: the type in the NADs.
const pluginName = "k8slan"

// megalosName is what it is called beside that for networks of type megalos.
const megalosName = "megalos"

// installPlugin puts the CNI plugin into its place, under the second name as well where that is wished for. Where it is not, a program of that name is
// somebody else's unless it is the plugin, which goes.
func installPlugin(source, dir string, withMegalos bool) (installed bool, err error) {
	megalos := filepath.Join(dir, megalosName)
	if !withMegalos {
		if err := removeOurs(dir); err != nil {
			return false, err
		}
		return installCNI(source, filepath.Join(dir, pluginName))
	}
	for _, target := range []string{megalos, filepath.Join(dir, pluginName)} {
		anew, err := installCNI(source, target)
		if err != nil {
			return installed, err
		}
		installed = installed || anew
	}
	return installed, nil
}

// removeOurs removes the program of the second name if it is the same as the plugin beside it.
func removeOurs(dir string) error {
	megalos := filepath.Join(dir, megalosName)
	program, err := os.ReadFile(filepath.Join(dir, pluginName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the CNI plugin that is there: %w", err)
	}
	if same, err := isInstalled(program, megalos); err != nil || !same {
		return err
	}
	if err := os.Remove(megalos); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the CNI plugin's second name: %w", err)
	}
	return nil
}

// installCNI copies the program source to target, whose directory must exist, in one step: whoever starts it meanwhile gets
// the old one or the new one, whole. Where the same is there already nothing is written.
func installCNI(source, target string) (installed bool, err error) {
	program, err := os.ReadFile(source)
	if err != nil {
		return false, fmt.Errorf("read the CNI plugin: %w", err)
	}
	same, err := isInstalled(program, target)
	if err != nil {
		return false, fmt.Errorf("look at the CNI plugin that is there: %w", err)
	}
	if same {
		return false, nil
	}
	if err := replace(target, program); err != nil {
		return false, fmt.Errorf("install the CNI plugin as %s: %w", target, err)
	}
	return true, nil
}

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
	there, err := os.ReadFile(target)
	return bytes.Equal(there, program), err
}

// replace writes a program beside target and renames it, so that target is never half written and never busy. What an
// installer that was killed left beside it goes.
func replace(target string, program []byte) (err error) {
	dir := filepath.Dir(target)
	prefix := "." + filepath.Base(target) + "-new-"
	left, err := filepath.Glob(filepath.Join(dir, prefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	file, err := os.CreateTemp(dir, prefix+"*")
	if err != nil {
		return err
	}
	if err := fill(file, program); err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	if err := os.Rename(file.Name(), target); err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	return syncDir(dir)
}

// fill writes the program to disk and closes the file.
func fill(file *os.File, program []byte) error {
	_, err := file.Write(program)
	return errors.Join(err, file.Chmod(0o755), file.Sync(), file.Close())
}

// syncDir has a rename survive a power loss.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
