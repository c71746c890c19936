// Command kubectl-k8slan is the plugin of kubectl for users of LANs: kubectl k8slan.
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

// version is k8slan's version, set at build time.
var version = "development"

// Exit codes; 0 means that the answer is yes.
const (
	exitNo      = 1 // the answer is no
	exitUnknown = 2 // the answer could not be determined
)

// errNo ends the program with exitNo and prints nothing: the output already has the answer.
var errNo = errors.New("no")

func main() {
	ctrllog.SetLogger(logr.Discard()) // the client library prints a warning without a logger
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
		Short: "Inspect LANs and their traffic",
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
			_, err := fmt.Fprintf(cmd.OutOrStdout(),
				"kubectl-k8slan %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}
