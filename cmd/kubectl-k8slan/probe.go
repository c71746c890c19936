package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/diag/probe"
)

func probeCommand(f *clusterFlags) *cobra.Command {
	var lan, system string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "probe <lan> | <pod or spoke> <pod or spoke>",
		Short: "Say which frames pass between pods on a LAN, and where the others are lost",
		Long: `Say which frames pass between two pods on a LAN, of which size and with how many VLAN tags, and where the others are lost: at a port,
the bridge, the VXLAN, the underlay, or on the other node. With a LAN it probes between one pod of its first node and one of each other.

The frames are sent from the LAN's bridge on one pod's node, and heard at each place that they pass on the way to the other pod's
port. Nothing runs in the pods, and what a pod itself drops is not found. The pods get the frames, but nothing that they understand: EtherType 88b5
(for experiments) or datagrams between documentation addresses to a MAC address that nobody has.

It runs in k8slan's pods on the nodes, which takes the rights to list pods and to create and get pods/exec in k8slan's namespace: as much as
root on the nodes.

Exit code: 0 when everything passes, 1 when something is lost, 2 when that could not be found out.`,
		Example: `  kubectl k8slan probe lab
  kubectl k8slan probe srl-1 host-1`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 1 || len(args) > 2 {
				return fmt.Errorf("give a LAN or two pods, not %d names; see %s --help", len(args), cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := f.open()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			pairs, err := c.pairs(ctx, args, lan)
			if err != nil {
				return err
			}
			well := true
			for i, p := range pairs {
				ok, err := c.probe(ctx, cmd.OutOrStdout(), p, system)
				if errors.Is(err, context.DeadlineExceeded) {
					return fmt.Errorf("%d of %d pairs of pods were probed within the %s of --timeout", i, len(pairs), timeout)
				}
				if err != nil {
					return err
				}
				well = well && ok
			}
			if !well {
				return errNo
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&lan, "lan", "", "`name` of the LAN, for two pods that are on several")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "longest `time` for all of it")
	addSystem(cmd, &system)
	return cmd
}

// end is one end of a probe.
type end struct {
	location
	spoke string
}

// pairs are the ends to probe between.
func (c cluster) pairs(ctx context.Context, args []string, lan string) ([][2]end, error) {
	var nodes v1beta1.LANNodeList
	if err := c.client.List(ctx, &nodes); err != nil {
		return nil, fmt.Errorf("list lannodes, to find who is attached: %w", err)
	}
	all := ends(nodes.Items)
	if len(args) == 1 {
		name := qualified(c.namespace, args[0])
		pairs, err := pairsAcrossNodes(all, name)
		if err != nil {
			err = cmp.Or(c.checkExists(ctx, name), err)
		}
		return pairs, err
	}
	if lan != "" {
		lan = qualified(c.namespace, lan)
	}
	pair, err := findPair(all, c.namespace, args[0], args[1], lan)
	return [][2]end{pair}, err
}

// checkExists says that there is no LAN of that name, or that it cannot be found out; nil where there is one.
func (c cluster) checkExists(ctx context.Context, lan string) error {
	namespace, name, _ := strings.Cut(lan, "/")
	err := c.client.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &v1beta1.LAN{})
	switch {
	case apierrors.IsNotFound(err):
		return noLAN(namespace, name)
	case err != nil:
		return fmt.Errorf("get LAN %s: %w", lan, err)
	}
	return nil
}

func noLAN(namespace, name string) error {
	return fmt.Errorf("there is no LAN %s in namespace %s; kubectl k8slan status -A lists them", name, namespace)
}

func qualified(namespace, name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	return namespace + "/" + name
}

// ends are all attachments, by node and spoke.
func ends(nodes []v1beta1.LANNode) (all []end) {
	for _, n := range nodes {
		for _, s := range n.Status.Segments {
			for _, a := range s.Attachments {
				all = append(all, end{location{lan: s.LAN, ns: s.NS, node: n.Name, pod: a.Pod}, a.Spoke})
			}
		}
	}
	slices.SortFunc(all, func(x, y end) int { return cmp.Or(cmp.Compare(x.node, y.node), cmp.Compare(x.spoke, y.spoke)) })
	return all
}

// pairsAcrossNodes are pairs of the LAN's first end with one on each other node; where there is no other node, with the next on the same.
func pairsAcrossNodes(all []end, lan string) ([][2]end, error) {
	all = slices.DeleteFunc(slices.Clone(all), func(e end) bool { return e.lan != lan })
	switch len(all) {
	case 0:
		return nil, fmt.Errorf("no pod is attached to LAN %s, and a probe goes between two; see kubectl k8slan status", lan)
	case 1:
		return nil, fmt.Errorf("only pod %s is attached to LAN %s, and a probe goes between two: attach another", all[0].pod, lan)
	}
	var pairs [][2]end
	last := all[0].node
	for _, e := range all[1:] {
		if e.node != last {
			pairs, last = append(pairs, [2]end{all[0], e}), e.node
		}
	}
	if len(pairs) == 0 {
		pairs = [][2]end{{all[0], all[1]}}
	}
	return pairs, nil
}

// isNamed says whether the end is called so: by its pod's name, or by its spoke's, which only ports of a pool on several nodes share.
func (e end) isNamed(namespace, name string) bool {
	return e.pod == qualified(namespace, name) || e.spoke == name
}

// findPair are the ends of two pods or spokes on the one LAN that they are both on.
func findPair(all []end, namespace, one, two, lan string) (pair [2]end, err error) {
	var found [][2]end
	for _, a := range all {
		for _, b := range all {
			if a.isNamed(namespace, one) && b.isNamed(namespace, two) && a != b && a.lan == b.lan && (lan == "" || a.lan == lan) {
				found = append(found, [2]end{a, b})
			}
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		var words []string
		for _, p := range found {
			words = append(words, fmt.Sprintf("%s (%s) and %s (%s) of LAN %s", p[0].pod, p[0].spoke, p[1].pod, p[1].spoke, p[0].lan))
		}
		return pair, fmt.Errorf("%s and %s meet more than once: %s; say which by pods or spokes or with --lan, or probe the LAN", one, two, strings.Join(words, ", "))
	}
	for _, name := range []string{one, two} {
		if !slices.ContainsFunc(all, func(e end) bool { return e.isNamed(namespace, name) }) {
			return pair, fmt.Errorf("%s is no pod in namespace %s that is attached to a LAN, and no spoke that is; see kubectl k8slan status", name, namespace)
		}
	}
	return pair, fmt.Errorf("%s and %s are on no LAN together; see kubectl k8slan status", one, two)
}

// probe probes between two ends and says what it finds.
func (c cluster) probe(ctx context.Context, out io.Writer, pair [2]end, system string) (well bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	fmt.Fprintf(out, "LAN %s: %s (spoke %s) on %s, %s (spoke %s) on %s\n",
		pair[0].lan, pair[0].pod, pair[0].spoke, pair[0].node, pair[1].pod, pair[1].spoke, pair[1].node)
	var stations [2]probe.Endpoint
	for i, e := range pair {
		d, err := c.daemonOn(ctx, e.node, system)
		if err != nil {
			return false, err
		}
		var hangUp func()
		stations[i], hangUp = d.startEndpoint(ctx, e)
		defer hangUp()
	}
	there, back, err := probe.Run(ctx, stations[0], stations[1])
	if err != nil {
		return false, err
	}
	well = true
	for _, course := range []probe.Path{there, back} {
		ok, sentences := course.Verdict()
		well = well && ok
		for _, s := range sentences {
			fmt.Fprintln(out, " ", s)
		}
	}
	if s := probe.Checksums(there, back); s != "" {
		fmt.Fprintln(out, " ", s)
	}
	return well, nil
}

// startEndpoint starts a probe's station on a node.
func (d daemonPod) startEndpoint(ctx context.Context, e end) (s probe.Endpoint, end func()) {
	ctx, cancel := context.WithCancel(ctx)
	orders, order := io.Pipe()
	says, say := io.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		var stderr bytes.Buffer
		err := d.run(ctx, orders, say, &stderr, "probe", "station", "--ns="+e.ns, "--spoke="+e.spoke)
		if said := strings.TrimSpace(stderr.String()); err != nil && said != "" {
			err = errors.New(said)
		}
		_, _ = orders.CloseWithError(io.ErrClosedPipe), say.CloseWithError(err)
	}()
	return probe.Endpoint{Node: d.node, Orders: order, Messages: says}, func() {
		_ = order.Close()
		cancel()
		_, _ = io.Copy(io.Discard, says) // what it says at its end, or the client's library complains
		<-ended
	}
}
