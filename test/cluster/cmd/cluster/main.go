// Command cluster brings a two-node Kubernetes up on this machine, breaks
// parts of it on demand, and takes it down.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/k8slan/k8slan/test/cluster"
	"github.com/k8slan/k8slan/test/cluster/internal/nodeinit"
	"github.com/k8slan/k8slan/test/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root, err := root()
	if err == nil {
		err = root.ExecuteContext(ctx)
	}
	var code exitCode
	switch {
	case errors.As(err, &code):
		os.Exit(int(code))
	case err != nil:
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

// exitCode is that of a command run in a node.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

// options are the flags of all commands.
type options struct{ cluster.Config }

func root() (*cobra.Command, error) {
	name, err := cluster.Name(os.Getenv)
	if err != nil {
		return nil, err
	}
	o := &options{cluster.Config{
		CacheDir: cluster.CacheDir(os.Getenv),
		Log:      slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}}
	root := &cobra.Command{
		Use:           "cluster",
		Short:         "A two-node Kubernetes on this machine, without Docker",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&o.Name, "name", name,
		"a letter, a digit or both for a cluster beside the usual one ($K8SLAN_CLUSTER)")
	root.AddCommand(up(o), down(o), status(o), kubeconfig(o), build(o), load(o), execute(o),
		kubelet(o), kill(o), mend(o), power(o), underlay(o), spawn(o), spawnNode(o), nodeInit(), proxy(o))
	return root, nil
}

func up(o *options) *cobra.Command {
	c := &cobra.Command{
		Use:   "up",
		Short: "Bring the cluster up (the first time builds Kubernetes: ten minutes)",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			for _, own := range []func(context.Context, string) (string, error){images.Pause, images.Toolbox} {
				archive, err := own(c.Context(), o.CacheDir)
				if err != nil {
					return err
				}
				o.Images = append(o.Images, archive)
			}
			up, err := cluster.Up(c.Context(), o.Config)
			if err != nil {
				return err
			}
			return show(up)
		},
	}
	c.Flags().StringSliceVar(&o.Images, "image", nil,
		"OCI archive to load into both nodes, beside pause and toolbox (repeatable)")
	return c
}

// show says how to use the cluster.
func show(c *cluster.Cluster) error {
	_, err := fmt.Printf("export KUBECONFIG=%s\nalias kubectl=%s\n", c.Kubeconfig(), c.Kubectl())
	return err
}

func down(o *options) *cobra.Command {
	var logs string
	c := &cobra.Command{
		Use:   "down",
		Short: "Take the cluster down and remove everything of it",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if logs != "" {
				if err := cluster.SaveLogs(o.Name, logs); err != nil {
					return err
				}
			}
			return cluster.Down(c.Context(), o.Config)
		},
	}
	c.Flags().StringVar(&logs, "logs", "", "directory to save the logs in first")
	return c
}

func status(o *options) *cobra.Command {
	return opened(o, "status", "Show the cluster's processes", 0,
		func(_ context.Context, c *cluster.Cluster, _ []string) error {
			return c.Status(os.Stdout)
		})
}

func kubeconfig(o *options) *cobra.Command {
	return opened(o, "kubeconfig", "Print how to use the cluster", 0,
		func(_ context.Context, c *cluster.Cluster, _ []string) error {
			return show(c)
		})
}

func build(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "build component…",
		Short: "Build components (" + strings.Join(cluster.Components(), ", ") +
			") into the cache and print where they are",
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, names []string) error {
			for _, name := range names {
				dir, err := cluster.Build(c.Context(), o.Config, name)
				if err != nil {
					return err
				}
				fmt.Println(dir)
			}
			return nil
		},
	}
}

func load(o *options) *cobra.Command {
	return opened(o, "load archive", "Load an OCI archive into both nodes", 1,
		func(ctx context.Context, c *cluster.Cluster, args []string) error {
			return c.LoadImage(ctx, args[0])
		})
}

func execute(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "exec node -- command…",
		Short: "Run a command in a node",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			code, err := cluster.ExecHere(o.Name, args[0], args[1:])
			if err != nil || code == 0 {
				return err
			}
			return exitCode(code)
		},
	}
}

func kubelet(o *options) *cobra.Command {
	c := &cobra.Command{Use: "kubelet", Short: "Restart, stop or start the kubelet of a node"}
	c.AddCommand(
		onNode(o, "restart node", "Stop and start the kubelet", 1,
			func(ctx context.Context, n *cluster.Node, _ []string) error { return n.RestartKubelet(ctx) }),
		onNode(o, "stop node", "Stop the kubelet; pods continue to run", 1,
			func(ctx context.Context, n *cluster.Node, _ []string) error { return n.StopKubelet(ctx) }),
		onNode(o, "start node", "Start the kubelet", 1, func(ctx context.Context, n *cluster.Node, _ []string) error {
			return n.StartKubelet(ctx)
		}),
	)
	return c
}

func kill(o *options) *cobra.Command {
	return onNode(o, "kill node process", "Kill the processes of that name in a node, its pods included", 2,
		func(ctx context.Context, n *cluster.Node, args []string) error { return n.KillProcess(ctx, args[0]) })
}

func power(o *options) *cobra.Command {
	c := &cobra.Command{Use: "power", Short: "Switch a node off or on"}
	c.AddCommand(
		onNode(o, "off node", "End everything in the node at once; its disk stays", 1,
			func(ctx context.Context, n *cluster.Node, _ []string) error { return n.PowerOff(ctx) }),
		onNode(o, "on node", "Boot the node and wait until it is Ready", 1,
			func(ctx context.Context, n *cluster.Node, _ []string) error { return n.PowerOn(ctx) }),
	)
	return c
}

func mend(o *options) *cobra.Command {
	return onNode(o, "mend node", "Start those of containerd, kubelet and kube-proxy that do not run", 1,
		func(ctx context.Context, n *cluster.Node, _ []string) error { return n.Mend(ctx) })
}

func underlay(o *options) *cobra.Command {
	c := &cobra.Command{Use: "underlay", Short: "Cut, remove or restore a network device (eth0 to eth4) of a node"}
	c.AddCommand(
		onNode(o, "cut node device", "Pull the cable: the device loses its carrier", 2,
			func(_ context.Context, n *cluster.Node, args []string) error { return n.CutUnderlay(args[0]) }),
		onNode(o, "remove node device", "Pull the card: the device vanishes", 2,
			func(_ context.Context, n *cluster.Node, args []string) error { return n.RemoveUnderlay(args[0]) }),
		onNode(o, "restore node device", "Put cable and card back", 2,
			func(_ context.Context, n *cluster.Node, args []string) error { return n.RestoreUnderlay(args[0]) }),
	)
	return c
}

// opened makes a command that works on a cluster that is up.
func opened(o *options, use, short string, args int,
	run func(context.Context, *cluster.Cluster, []string) error,
) *cobra.Command {
	return &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.ExactArgs(args),
		RunE: func(c *cobra.Command, args []string) error {
			opened, err := cluster.Open(o.Name)
			if err != nil {
				return err
			}
			return run(c.Context(), opened, args)
		},
	}
}

// onNode makes a command whose first argument is a node.
func onNode(o *options, use, short string, args int,
	run func(context.Context, *cluster.Node, []string) error,
) *cobra.Command {
	return opened(o, use, short, args, func(ctx context.Context, c *cluster.Cluster, args []string) error {
		node := c.Node(args[0])
		if node == nil {
			return fmt.Errorf("there is no node %q, only %v", args[0], c.Nodes())
		}
		return run(ctx, node, args[1:])
	})
}

// The commands below are those by which the cluster starts its processes.

func spawn(o *options) *cobra.Command {
	return &cobra.Command{
		Use:    "spawn place -- command…",
		Short:  "Start a command in a place and print its process number",
		Hidden: true,
		Args:   cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			return cluster.Spawn(o.Name, args[0], args[1:], os.Stdout)
		},
	}
}

func spawnNode(o *options) *cobra.Command {
	return &cobra.Command{
		Use:    "spawn-node node",
		Short:  "Start the first process of a node and print its number",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return cluster.SpawnNode(o.Name, args[0], os.Stdout)
		},
	}
}

func nodeInit() *cobra.Command {
	return &cobra.Command{
		Use:    "node-init",
		Short:  "Be the first process of a node",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(*cobra.Command, []string) error { return nodeinit.Run() },
	}
}

func proxy(o *options) *cobra.Command {
	return &cobra.Command{
		Use:    "proxy",
		Short:  "Forward the API server's port to this machine",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return cluster.Forward(slog.New(slog.NewTextHandler(os.Stderr, nil)), o.Name)
		},
	}
}
