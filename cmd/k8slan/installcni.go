package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

// pluginName is what the CNI plugin is called on a node: the type in the NADs.
const pluginName = "k8slan"

func installCNICommand() *cobra.Command {
	var source, dir string
	cmd := &cobra.Command{
		Use:   "install-cni",
		Short: "Put the CNI plugin where the node's container runtime finds it",
		Long: `Copy the CNI plugin to <dir>/k8slan, in one step: whoever starts it meanwhile gets the old one or the new one, whole.
Nothing is written if the same plugin is there already.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return installCNI(cmd.OutOrStdout(), source, filepath.Join(dir, pluginName))
		},
	}
	cmd.Flags().StringVar(&source, "source", "/k8slan-cni", "the plugin's `file`")
	cmd.Flags().StringVar(&dir, "dir", "/opt/cni/bin", "the container runtime's `directory` of CNI plugins")
	return cmd
}

// installCNI copies the program source to target, whose directory must exist, and says on out what it did.
func installCNI(out io.Writer, source, target string) error {
	program, err := os.ReadFile(source)
	if err != nil {
		return fmt.Errorf("read the CNI plugin: %w", err)
	}
	same, err := isInstalled(program, target)
	if err != nil {
		return fmt.Errorf("look at the CNI plugin that is there: %w", err)
	}
	if same {
		_, err = fmt.Fprintf(out, "%s is the same already\n", target)
		return err
	}
	if err := replace(target, program); err != nil {
		return fmt.Errorf("install the CNI plugin as %s: %w", target, err)
	}
	_, err = fmt.Fprintf(out, "%s installed, %d bytes\n", target, len(program))
	return err
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
