// Command k8slan contains the programs of k8slan that run in a cluster: each node's daemon, the controller, the route
// reflector, the sidecar, and the steps of helm upgrade, helm uninstall and helm test.
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

// version is k8slan's version, set at build time.
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
		Long: `k8slan gives the pods and VMs of a Kubernetes cluster virtual Ethernet LANs that span its nodes.

The Helm chart installs its programs in the cluster. Users work with kubectl:
  kubectl get lans,lannodes -A
  kubectl explain lan.spec`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
	})
	root.AddCommand(nodeCommand(), controllerCommand(), reflectorCommand(), sidecarCommand(), cleanCommand(),
		upgradeCommand(), uninstallCommand(), probeCommand(), captureCommand(), macsCommand(), pauseCommand(),
		versionCommand())
	return root
}

// noArguments refuses arguments after the flags.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s takes no arguments, but got %q; see %[1]s --help", cmd.CommandPath(), args)}
	}
	return nil
}

// pauseCommand returns the command of the main container of pods that do their work in init containers.
func pauseCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "pause",
		Short:  "Do nothing until it receives a signal",
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
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "k8slan %s %s %s/%s\n",
				version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}
