package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/overview"
	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// maxQueries is how many nodes are asked at the same time.
const maxQueries = 16

func macsCommand(f *clusterFlags) *cobra.Command {
	var system string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "macs <lan> [mac…]",
		Short: "Show which MAC is where on a LAN, and where nodes do not agree",
		Long: `Show which MAC is where on a LAN: on which node and spoke, since when its pod is attached, how long ago it spoke last, and behind which
VTEP the other nodes look for it. Sentences say where a node does not know that, or has it somewhere else. A MAC without a node is behind a VTEP
outside of the cluster.

The nodes with a pod on the LAN are asked for their kernels' forwarding tables, one after the other or a few at once, so what moves meanwhile
may be in two places. Bridges forget who is silent for five minutes.

It runs in k8slan's pods on the nodes, which takes the rights to list pods and to create and get pods/exec in k8slan's namespace: as much as
root on the nodes.

Exit code: 0 when the nodes agree, 1 when they do not or a MAC that was given is nowhere, 2 when that could not be found out.`,
		Example: `  kubectl k8slan macs lab
  kubectl k8slan macs lab 02:6b:5c:10:00:01`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var only []string
			for _, arg := range args[1:] {
				mac, err := net.ParseMAC(arg)
				if err != nil || len(mac) != 6 {
					return fmt.Errorf("%s is no MAC address such as 02:6b:5c:10:00:01", arg)
				}
				only = append(only, mac.String())
			}
			c, err := f.open()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return c.macs(ctx, cmd.OutOrStdout(), args[0], only, system)
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "longest `time` for all of it")
	addSystem(cmd, &system)
	return cmd
}

func (c cluster) macs(ctx context.Context, out io.Writer, lan string, only []string, system string) (err error) {
	m := overview.MACs{Only: only}
	var nodes v1beta1.LANNodeList
	if err := c.client.List(ctx, &nodes); err != nil {
		return fmt.Errorf("list lannodes, to find the LAN's nodes: %w", err)
	}
	m.LANNodes = nodes.Items
	onDemand := overview.Objects{LANNodes: m.LANNodes}.OnDemand("")
	if i := slices.IndexFunc(onDemand, func(l v1beta1.LAN) bool { return l.Name == lan }); i >= 0 {
		m.LAN = onDemand[i]
	} else if m.LAN, err = c.get(ctx, qualified(c.namespace, lan)); err != nil {
		return err
	}
	all, err := c.daemons(ctx, system)
	if err != nil {
		return err
	}
	var unasked error
	if m.Tables, unasked = all.tables(ctx, m.LANNodes, &m.LAN); len(m.Tables) == 0 && unasked != nil {
		return unasked
	}
	text, agree := screenOf(out).MACs(m)
	fmt.Fprint(out, text)
	if unasked == nil && !agree {
		return errNo
	}
	return unasked
}

// get reads a LAN.
func (c cluster) get(ctx context.Context, lan string) (l v1beta1.LAN, err error) {
	namespace, name, _ := strings.Cut(lan, "/")
	err = c.client.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &l)
	switch {
	case apierrors.IsNotFound(err):
		return l, noLAN(namespace, name)
	case err != nil:
		return l, fmt.Errorf("get LAN %s: %w", lan, err)
	}
	return l, nil
}

// tables asks the nodes that have pods on the LAN, and says which could not be asked.
func (d daemons) tables(ctx context.Context, nodes []v1beta1.LANNode, lan *v1beta1.LAN) ([]overview.NodeTable, error) {
	var mu sync.Mutex
	var tables []overview.NodeTable
	var errs []error
	var tasks errgroup.Group
	tasks.SetLimit(maxQueries)
	for _, n := range nodes {
		for _, s := range n.Status.Segments {
			if !overview.IsSegmentOf(lan, s) || len(s.Attachments) == 0 {
				continue
			}
			tasks.Go(func() error {
				places, err := d.macTable(ctx, n.Name, s.NS)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					errs = append(errs, err)
				} else {
					tables = append(tables, overview.NodeTable{Node: n.Name, Entries: places})
				}
				return nil
			})
		}
	}
	_ = tasks.Wait() // errs has them
	return tables, errors.Join(errs...)
}

// macTable asks one node.
func (d daemons) macTable(ctx context.Context, node, ns string) ([]overview.MACEntry, error) {
	pod, err := d.on(node)
	if err != nil {
		return nil, err
	}
	var stdout, stderr bytes.Buffer
	if err := pod.run(ctx, strings.NewReader(""), &stdout, &stderr, "macs", "--ns="+ns); err != nil {
		if said := strings.TrimSpace(stderr.String()); said != "" {
			err = fmt.Errorf("%w: %s", err, said)
		}
		return nil, err
	}
	return readMACTable(node, stdout.Bytes())
}

func readMACTable(node string, answer []byte) ([]overview.MACEntry, error) {
	var have []segment.MACEntry
	if err := json.Unmarshal(answer, &have); err != nil {
		return nil, fmt.Errorf("read what node %s answers: %w", node, err)
	}
	var places []overview.MACEntry
	for _, p := range have {
		place := overview.MACEntry{MAC: p.MAC, Spoke: p.Spoke, LastSeen: p.LastSeen}
		if p.VTEP.IsValid() {
			place.VTEP = p.VTEP.String()
		}
		places = append(places, place)
	}
	return places, nil
}
