// Command k8slan is everything of k8slan that runs in a cluster: the daemon of each node, the controller, and the
// steps of an upgrade, an uninstallation and a test.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
)

// version is that of k8slan, set at build time.
var version = "development"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	root := rootCommand()
	if filepath.Base(os.Args[0]) == kubelanProgram {
		root.SetArgs(append([]string{"sidecar"}, os.Args[1:]...))
	}
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "k8slan:", err)
		os.Exit(exitCode(err))
	}
}

// usageError is a mistake in the command line.
type usageError struct{ error }

func exitCode(err error) int {
	if errors.As(err, &usageError{}) {
		return 2
	}
	return 1
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "k8slan",
		Short: "Ethernet LANs between the pods and VMs of a Kubernetes cluster",
		Long: `k8slan gives pods and VMs of a Kubernetes cluster real Ethernet LANs that span its nodes.

Its parts run in the cluster, installed by the Helm chart; people use kubectl:
  kubectl get lans,lannodes -A
  kubectl explain lan.spec`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
	})
	root.AddCommand(nodeCommand(), controllerCommand(), reflectorCommand(), sidecarCommand(), cleanCommand(), upgradeCommand(), uninstallCommand(), probeCommand(), captureCommand(), macsCommand(),
		pauseCommand(), versionCommand())
	return root
}

// noArguments refuses what is left on the command line after the flags.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s takes no arguments, but got %q; see %s --help", cmd.CommandPath(), args, cmd.CommandPath())}
	}
	return nil
}

// pauseCommand is the main container of pods whose work is done before it starts.
func pauseCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "pause",
		Short:  "Do nothing until told to end",
		Hidden: true,
		Args:   noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			<-cmd.Context().Done()
			return nil
		},
	}
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "k8slan %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}
