package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/diag/lantest"
	"github.com/k8slan/k8slan/lanmgr/diag/probe/endpoint"
	"github.com/k8slan/k8slan/lanmgr/kernel"
)

func probeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "probe",
		Short: "Send frames through a LAN and count the answers: the steps of helm test",
		Args:  noArguments,
	}
	cmd.AddCommand(answerCommand(), askCommand(), endpointCommand())
	return cmd
}

func answerCommand() *cobra.Command {
	var iface string
	cmd := &cobra.Command{
		Use:   "answer",
		Short: "Answer every frame from the other end",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			port, err := lantest.Open(iface, os.Getenv("NODE_NAME"))
			if err != nil {
				return err
			}
			defer port.Close()
			return port.Answer(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&iface, "interface", "net1", "`name` of the interface")
	return cmd
}

func askCommand() *cobra.Command {
	var f hookFlags
	var iface, lan string
	var count int
	cmd := &cobra.Command{
		Use:   "ask",
		Short: "Send a frame of every kind to the other end and print which pass; then send many and count the answers",
		Long: `Send a frame of every kind to the other end and print which pass. Then send many frames, half of them as
short and half of them as long as possible, and fail unless the other end answers each.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := cmd.OutOrStdout()
			port, err := lantest.Open(iface, os.Getenv("NODE_NAME"))
			if err != nil {
				return err
			}
			defer port.Close()
			ctx, cancel := context.WithTimeout(cmd.Context(), f.timeout)
			defer cancel()
			err = ask(ctx, out, port, count)
			if lan == "" {
				return err
			}
			return errors.Join(err, f.removeLAN(cmd.Context(), lan))
		},
	}
	f.add(cmd, 2*time.Minute)
	cmd.Flags().StringVar(&iface, "interface", "net1", "`name` of the interface")
	cmd.Flags().IntVar(&count, "count", 1000, "`number` of frames")
	cmd.Flags().StringVar(&lan, "remove-lan", "",
		"`name` of a LAN in --namespace to delete at the end; empty: none")
	return cmd
}

// ask prints which frames reach the other end. It returns an error if any does not.
func ask(ctx context.Context, out io.Writer, port *lantest.Port, count int) error {
	peer, err := port.Find(ctx)
	if err != nil {
		return err
	}
	path, err := port.ProbeKinds(ctx, peer)
	if err != nil {
		return fmt.Errorf("send every kind of frame to node %s: %w", peer.Owner, err)
	}
	ok, sentences := path.Verdict()
	if !ok {
		return errors.New(strings.Join(sentences, " "))
	}
	fmt.Fprintln(out, strings.Join(sentences, "\n"))
	r, err := port.Count(ctx, peer, count)
	if err != nil {
		return fmt.Errorf("send frames to node %s: %w", peer.Owner, err)
	}
	if r.Lost > 0 {
		return fmt.Errorf("%d of %d frames were lost on the way to node %s and back", r.Lost, r.Sent, peer.Owner)
	}
	_, err = fmt.Fprintf(out,
		"%d frames of %d and %d bytes went from node %s to node %s and back, none was lost; %s each, the slowest %s\n",
		r.Sent, r.Short, r.Long, port.Owner, peer.Owner,
		r.Mean.Round(time.Microsecond), r.Slowest.Round(time.Microsecond))
	return err
}

// endpointCommand returns the command that kubectl k8slan probe runs in the daemon's pod.
func endpointCommand() *cobra.Command {
	var ns, spoke, run string
	cmd := &cobra.Command{
		Use:    "endpoint",
		Short:  "Send the frames that standard input orders, and print which frames pass, until standard input ends",
		Hidden: true,
		Args:   noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			host := kernel.New(kernel.Paths{Run: run})
			defer host.Close()
			return endpoint.Run(cmd.Context(), host, ns, spoke, cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&ns, "ns", "", "`name` of the LAN's network namespace")
	cmd.Flags().StringVar(&spoke, "spoke", "", "`name` of the spoke")
	addRunDir(cmd.Flags(), &run)
	return cmd
}

// removeLAN deletes the LAN that was probed. The LAN is removed when its last pod is detached.
func (f *hookFlags) removeLAN(ctx context.Context, name string) error {
	if _, err := f.logger(); err != nil { // the client library prints a warning without a logger
		return err
	}
	c, err := f.client()
	if err != nil {
		return err
	}
	err = c.Delete(ctx, &v1beta1.LAN{ObjectMeta: metav1.ObjectMeta{Namespace: f.namespace, Name: name}})
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete LAN %s/%s: %w", f.namespace, name, err)
	}
	return nil
}
