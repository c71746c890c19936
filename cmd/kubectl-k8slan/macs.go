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

// maxQueries is how many nodes are queried at the same time.
const maxQueries = 16

func macsCommand(f *clusterFlags) *cobra.Command {
	var system string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "macs <lan> [mac…]",
		Short: "Show where the MACs of a LAN are, and where nodes disagree",
		Long: `Show where the MACs of a LAN are: on which node and spoke, since when the pod is attached, when its last
frame came in, and behind which VTEP the other nodes have it. Sentences name the nodes that do not have a MAC, or have
it in another place. A MAC without a node is behind a VTEP outside of the cluster.

The forwarding tables are read from the kernels of all nodes with a pod on the LAN, a few nodes at a time, so a MAC that
moves meanwhile may be in two places. Bridges forget a MAC five minutes after its last frame.

` + rightsNote + `

Exit codes: 0: the nodes agree. 1: they disagree, or no node has a given MAC. 2: the answer could not be determined.`,
		Example: `  kubectl k8slan macs lab
  kubectl k8slan macs lab 02:6b:5c:10:00:01`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var only []string
			for _, arg := range args[1:] {
				mac, err := net.ParseMAC(arg)
				if err != nil || len(mac) != 6 {
					return fmt.Errorf("%s is not a MAC address such as 02:6b:5c:10:00:01", arg)
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
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "longest `time` for the whole command")
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
	var failed error
	if m.Tables, failed = all.tables(ctx, m.LANNodes, &m.LAN); len(m.Tables) == 0 && failed != nil {
		return failed
	}
	text, agree := screenOf(out).MACs(m)
	fmt.Fprint(out, text)
	if failed == nil && !agree {
		return errNo
	}
	return failed
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

// tables returns the tables of the nodes that have pods on the LAN. Its error names the nodes that did not answer; the
// tables of the others are returned all the same.
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
				entries, err := d.macTable(ctx, n.Name, s.NS)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					errs = append(errs, err)
				} else {
					tables = append(tables, overview.NodeTable{Node: n.Name, Entries: entries})
				}
				return nil
			})
		}
	}
	_ = tasks.Wait() // errs has them
	return tables, errors.Join(errs...)
}

// macTable returns the table of one node.
func (d daemons) macTable(ctx context.Context, node, ns string) ([]overview.MACEntry, error) {
	pod, err := d.on(node)
	if err != nil {
		return nil, err
	}
	var stdout, stderr bytes.Buffer
	if err := pod.run(ctx, strings.NewReader(""), &stdout, &stderr, "macs", "--ns="+ns); err != nil {
		if text := strings.TrimSpace(stderr.String()); text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		return nil, err
	}
	return readMACTable(node, stdout.Bytes())
}

func readMACTable(node string, answer []byte) ([]overview.MACEntry, error) {
	var have []segment.MACEntry
	if err := json.Unmarshal(answer, &have); err != nil {
		return nil, fmt.Errorf("read the answer of node %s: %w", node, err)
	}
	var entries []overview.MACEntry
	for _, h := range have {
		entry := overview.MACEntry{MAC: h.MAC, Spoke: h.Spoke, LastSeen: h.LastSeen}
		if h.VTEP.IsValid() {
			entry.VTEP = h.VTEP.String()
		}
		entries = append(entries, entry)
	}
	return entries, nil
}
