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

// cleanFlags is the flags of k8slan clean.
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
		Short: "Take all of k8slan off one node, and its pods off their LANs",
		Long: `Take all of k8slan off one node: every LAN with its links, the links in pods and VMs that are attached, the CNI plugin, CDI files,
device plugin sockets, the filter of strangers in nftables and /run/k8slan. helm uninstall does this on every node that answers. Where one did not, or for a single node:

  kubectl debug node/<node> --profile=sysadmin --image=<k8slan's image> -- /k8slan clean --host

The daemon must not run on the node: it would build its LANs again. To repeat it does no harm.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.host {
				return execInHost(withoutHost(os.Args))
			}
			return c.clean(cmd.Context(), cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&c.host, "host", false, "enter the node's mounts and network first, through its process 1 (hostPID, privileged)")
	cmd.Flags().StringVar(&c.run, "run-dir", kernel.DefaultRun, "`directory` of the LANs' network namespaces, records and locks")
	cmd.Flags().StringVar(&c.cdi, "cdi-dir", cdi.DefaultDir, "`directory` of the container runtime's CDI files")
	cmd.Flags().StringVar(&c.pluginsDir, "device-plugin-dir", deviceplugin.Dir, "kubelet's `directory` of device plugins")
	cmd.Flags().StringVar(&c.cniDir, "cni-dir", "/opt/cni/bin", "the container runtime's `directory` of CNI plugins")
	cmd.Flags().BoolVar(&c.nftables, "nftables", true, "also remove the filter of strangers from the nftables of the network namespace")
	return cmd
}

// clean goes on where something fails, so that as little as possible stays, and says on out what it did.
func (c cleanFlags) clean(ctx context.Context, out io.Writer) error {
	errs := []error{
		// Who would attach goes first.
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
			errs = append(errs, fmt.Errorf("take LAN %s off the node: %w", lan, err))
			continue
		}
		_, err = fmt.Fprintf(out, "LAN %s is off the node, %d steps\n", lan, len(done))
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
		return fmt.Errorf("clean the node; what is named here is left: %w", err)
	}
	_, err = fmt.Fprintln(out, "nothing of k8slan is left on the node")
	return err
}

// lockTimeout is longer than a CNI plugin keeps the lock of a LAN, which ends after a minute.
const lockTimeout = 90 * time.Second

func tearDown(ctx context.Context, host *kernel.Node, lan string) ([]segment.Op, error) {
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	return host.Reconcile(ctx, lan, segment.Teardown)
}

// removeAll removes the files of a directory that one of the patterns fits.
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

// execInHost starts this program again, in its place, with the node's own mounts and network: those of process 1.
func execInHost(args []string) error {
	return fmt.Errorf("start again on the node (needs hostPID and privileged): %w", netns.Exec(1, args))
}

// withoutHost is the command line for the second start.
func withoutHost(args []string) []string {
	var rest []string
	for _, a := range args {
		if a != "--host" && a != "--host=true" {
			rest = append(rest, a)
		}
	}
	return rest
}
