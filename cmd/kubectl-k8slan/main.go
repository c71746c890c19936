// Command kubectl-k8slan is kubectl's plugin for people who run LANs: kubectl k8slan.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
)

// version is that of k8slan, set at build time.
var version = "development"

// Exit codes. What was asked and is not so is told by 1, what could not be found out by 2.
const (
	exitNo      = 1
	exitUnknown = 2
)

// errNo says by the exit code alone that the answer is no: the text says it already.
var errNo = errors.New("no")

func main() {
	ctrllog.SetLogger(logr.Discard()) // the client's library wants to be told
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	err := rootCommand().ExecuteContext(ctx)
	if errors.Is(err, errNo) {
		os.Exit(exitNo)
	}
	if err != nil && ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kubectl k8slan:", err)
		os.Exit(exitUnknown)
	}
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "kubectl-k8slan",
		Short: "Look at LANs and at what they carry",
		Annotations: map[string]string{
			cobra.CommandDisplayNameAnnotation: "kubectl k8slan",
		},
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())
	})
	var f clusterFlags
	f.add(root.PersistentFlags())
	root.AddCommand(statusCommand(&f), macsCommand(&f), captureCommand(&f), probeCommand(&f), versionCommand())
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "kubectl-k8slan %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}
