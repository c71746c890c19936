package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/k8slan/k8slan/deviceplugin"
	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// cleanFlags are the flags of k8slan clean.
type cleanFlags struct {
	host       bool
	run        string
	cdi        string
	pluginsDir string
	cniDir     string
	nftables   bool
}

func cleanCommand() *cobra.Command {
	var c cleanFlags
	cmd := &cobra.Command{
		Use:   "clean",
		Short: "Remove all of k8slan from one node, and detach the node's pods from their LANs",
		Long: `Remove all of k8slan from one node: every LAN with its links, the links in attached pods and VMs, the CNI
plugin, CDI files, device plugin sockets, the filter of non-members in nftables, and /run/k8slan. helm uninstall does
this on every node that answers. For a node that did not answer, or for a single node, run:

  kubectl debug node/<node> --profile=sysadmin --image=<k8slan's image> -- /k8slan clean --host

The daemon must not run on the node, because it would build its LANs again. The command can be repeated.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.host {
				return execInHost(withoutHost(os.Args))
			}
			return c.clean(cmd.Context(), cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&c.host, "host", false,
		"first enter the mount and network namespaces of the node's process 1 (needs hostPID and privileged)")
	addRunDir(cmd.Flags(), &c.run)
	cmd.Flags().StringVar(&c.cdi, "cdi-dir", cdi.DefaultDir, "`directory` of the container runtime's CDI files")
	cmd.Flags().StringVar(&c.pluginsDir,
		"device-plugin-dir", deviceplugin.Dir, "kubelet's `directory` of device plugins")
	cmd.Flags().StringVar(&c.cniDir, "cni-dir", "/opt/cni/bin", "the container runtime's `directory` of CNI plugins")
	cmd.Flags().BoolVar(&c.nftables, "nftables", true,
		"also remove the filter of non-members from the nftables of the network namespace")
	return cmd
}

// clean removes everything, and writes to out what it removed. It continues after an error, so that as little as
// possible remains.
func (c cleanFlags) clean(ctx context.Context, out io.Writer) error {
	errs := []error{
		// The plugins go first, so that no more pods attach.
		removeMegalos(c.cniDir),
		removeAll(c.cniDir, pluginName, "."+pluginName+"-new-*", "."+megalosName+"-new-*"),
		removeAll(c.pluginsDir, deviceplugin.Sockets),
	}
	host := kernel.New(kernel.Paths{Run: c.run})
	defer host.Close()
	lans, err := host.List()
	errs = append(errs, err)
	for _, lan := range lans {
		done, err := tearDown(ctx, host, lan)
		if err != nil {
			errs = append(errs, fmt.Errorf("remove LAN %s from the node: %w", lan, err))
			continue
		}
		_, err = fmt.Fprintf(out, "LAN %s is removed from the node, %d steps\n", lan, len(done))
		errs = append(errs, err)
	}
	errs = append(errs, removeAll(c.cdi, cdi.Files))
	if c.nftables {
		errs = append(errs, firewall.Remove("", firewall.TableName))
	}
	if errors.Join(errs...) == nil {
		errs = append(errs, os.RemoveAll(c.run))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean the node; these remain: %w", err)
	}
	_, err = fmt.Fprintln(out, "nothing of k8slan is left on the node")
	return err
}

// lockTimeout is longer than a CNI plugin, which ends after a minute, keeps the lock of a LAN.
const lockTimeout = 90 * time.Second

func tearDown(ctx context.Context, host *kernel.Node, lan string) ([]segment.Op, error) {
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	return host.Reconcile(ctx, lan, segment.Teardown)
}

// removeAll removes the files of a directory that match one of the patterns.
func removeAll(dir string, patterns ...string) error {
	var errs []error
	for _, pattern := range patterns {
		paths, err := filepath.Glob(filepath.Join(dir, pattern))
		errs = append(errs, err)
		for _, path := range paths {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// execInHost replaces this process with one that has the mounts and the network of process 1, the node's own.
func execInHost(args []string) error {
	return fmt.Errorf("start again on the node (needs hostPID and privileged): %w", netns.Exec(1, args))
}

// withoutHost returns the command line for the second start, without --host.
func withoutHost(args []string) []string {
	var rest []string
	for _, a := range args {
		if a != "--host" && a != "--host=true" {
			rest = append(rest, a)
		}
	}
	return rest
}
