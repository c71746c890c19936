// Command vm plays virt-launcher's part in a test pod. Either it does what
// libvirt does under KubeVirt: it finds the pod's macvtap, opens
// /dev/tap<ifindex>, and becomes a QEMU whose NIC has the macvtap's address and
// MTU. Or it lets libvirt itself do that.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// exitStatus is the status of a guest's command that failed.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("the command's exit status is %d", int(s)) }

func main() {
	err := command().Execute()
	var status exitStatus
	if errors.As(err, &status) {
		os.Exit(int(status))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "vm",
		Short:         "Run a small Linux on a pod's macvtap",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(run(), launch(), start(), execute())
	return root
}

func run() *cobra.Command {
	var m machine
	var wait bool
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Open the macvtap's tap and become QEMU",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			link, err := findMacvtap(m.Interface)
			if err != nil {
				return err
			}
			t, err := openTap(link)
			if err != nil {
				return err
			}
			fmt.Fprintf(
				cmd.OutOrStdout(),
				"vm: macvtap %s, %s, mtu %d: opened %s\n",
				t.link.Name,
				t.link.HardwareAddr,
				t.link.MTU,
				t.path,
			)
			if wait {
				fmt.Fprintln(cmd.OutOrStdout(), "vm: waiting for: vm start")
				if err := awaitStart(); err != nil {
					return err
				}
			}
			return m.become(t)
		},
	}
	flags := cmd.Flags()
	m.flags(flags)
	flags.BoolVar(&m.Plain, "plain", os.Getenv("VM_PLAIN") != "", "the NIC offers no offloads; or a VM_PLAIN that "+
		"isn't empty")
	flags.BoolVar(&wait, "wait", os.Getenv("VM_WAIT") != "", "open the tap, but start QEMU only after: vm start; or "+
		"a VM_WAIT that isn't empty")
	return cmd
}

func launch() *cobra.Command {
	m := machine{Queues: 1}
	var monitored bool
	cmd := &cobra.Command{
		Use:   "launch",
		Short: "Let libvirt run QEMU on the macvtap",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !monitored {
				return reap(append(os.Args, "--monitored"))
			}
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			link, err := findMacvtap(m.Interface)
			if err != nil {
				return err
			}
			return m.launch(ctx, link, cmd.OutOrStdout())
		},
	}
	flags := cmd.Flags()
	m.flags(flags)
	flags.IntVar(&m.Queues, "queues", m.Queues, "how many queues the NIC has, and CPUs the VM")
	flags.BoolVar(&monitored, "monitored", false, "another process of this program reaps what this one orphans")
	return cmd
}

// flags are those of a machine, however it is run.
func (m *machine) flags(flags *pflag.FlagSet) {
	flags.StringVar(&m.Interface, "interface", os.Getenv("VM_INTERFACE"), "the macvtap, if there are several; or "+
		"VM_INTERFACE")
	flags.StringVar(&m.Addresses, "addresses", os.Getenv("VM_ADDRESSES"), "the guest's addresses with prefix "+
		"lengths, with commas; or VM_ADDRESSES")
}

func start() *cobra.Command {
	return &cobra.Command{
		Use:   "start",
		Short: "Start a VM that waits",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return giveStart() },
	}
}

func execute() *cobra.Command {
	var patience time.Duration
	cmd := &cobra.Command{
		Use:   "exec COMMAND...",
		Short: "Run a command in the guest, as soon as it is up",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			guest, err := dialGuest(ctx, patience)
			if err != nil {
				return err
			}
			exit, err := guest.Run(ctx, args, os.Stdout, os.Stderr)
			if err == nil && exit != 0 {
				return exitStatus(exit)
			}
			return err
		},
	}
	cmd.Flags().DurationVar(&patience, "patience", 60*time.Second, "how long to wait for the guest to be up")
	cmd.Flags().SetInterspersed(false) // what follows the command is the command's
	return cmd
}
