package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/diag/packet"
	"github.com/k8slan/k8slan/lanmgr/kernel"
)

// captureCommand returns the command that kubectl k8slan capture runs in the daemon's pod.
func captureCommand() *cobra.Command {
	var ns, spoke, run string
	var count int
	cmd := &cobra.Command{
		Use:    "capture",
		Short:  "Write a spoke's frames as pcap to standard output, until standard input ends",
		Hidden: true,
		Args:   noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			host := kernel.New(kernel.Paths{Run: run})
			defer host.Close()
			socket, err := openSpoke(cmd.Context(), host, ns, spoke)
			if err != nil {
				return err
			}
			defer socket.Close()
			ctx, cancel := context.WithCancel(cmd.Context())
			defer cancel()
			go func() { // kubectl has no other way to stop this program than to close its standard input
				_, _ = io.Copy(io.Discard, cmd.InOrStdin())
				cancel()
			}()
			fmt.Fprintf(os.Stderr, "capturing spoke %s on link %s\n", spoke, socket.Link.Name)
			written, err := packet.Capture(ctx, socket, cmd.OutOrStdout(), count)
			if errors.Is(err, unix.ENETDOWN) {
				err = fmt.Errorf("link %s, which carried the spoke's frames, is down or deleted: "+
					"its pod has ended, or another pod has the spoke now", socket.Link.Name)
			}
			dropped, dropErr := socket.Dropped()
			fmt.Fprintf(os.Stderr,
				"%d frames, %d more were dropped because they could not be written fast enough\n", written, dropped)
			return errors.Join(err, dropErr)
		},
	}
	cmd.Flags().StringVar(&ns, "ns", "", "`name` of the LAN's network namespace")
	cmd.Flags().StringVar(&spoke, "spoke", "", "`name` of the spoke")
	addRunDir(cmd.Flags(), &run)
	cmd.Flags().IntVar(&count, "count", 0, "`number` of frames after which to end; 0: no limit")
	return cmd
}

// openSpoke opens the link that carries the spoke's frames.
func openSpoke(ctx context.Context, host *kernel.Node, ns, spoke string) (s *packet.Socket, err error) {
	state, err := host.Observe(ctx, ns)
	if err != nil {
		return nil, err
	}
	carrier, ok := state.Carrier(spoke)
	if !ok {
		return nil, fmt.Errorf("spoke %s is not on this node (no link of that name in /run/k8slan/netns/%s)", spoke, ns)
	}
	err = host.InLANNetns(ns, func() (err error) {
		s, err = packet.Open(carrier.Name)
		return err
	})
	return s, err
}
