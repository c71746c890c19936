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
		Short: "Show which frames pass between pods on a LAN, and where the others are lost",
		Long: `Show which frames pass between two pods on a LAN, of which size and with how many VLAN tags, and where
the others are lost: at a port, the bridge, the VXLAN, the underlay, or on the other node. For a LAN it probes between
one pod on its first node and one pod on each other node.

The frames are sent from the LAN's bridge on one pod's node, and captured at each place on the way to the other pod's
port. Nothing runs in the pods, so the probe does not find what a pod itself drops. The pods receive the frames, but
ignore them: the frames have EtherType 88b5 (for experiments), or are datagrams between documentation addresses to a MAC
that no interface has.

` + rightsNote + `

Exit codes: 0: every frame passes. 1: a frame is lost. 2: the answer could not be determined.`,
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
			return c.probeAll(ctx, cmd.OutOrStdout(), pairs, system)
		},
	}
	cmd.Flags().StringVar(&lan, "lan", "", "`name` of the LAN, for two pods that are on several LANs")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "longest `time` for the whole command")
	addSystem(cmd, &system)
	return cmd
}

// probeAll probes between each pair of ends. It returns errNo if a frame is lost.
func (c cluster) probeAll(ctx context.Context, out io.Writer, pairs [][2]location, system string) error {
	lost := false
	for i, p := range pairs {
		ok, err := c.probe(ctx, out, p, system)
		if errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("--timeout ended after %d of %d pairs of pods", i, len(pairs))
		}
		if err != nil {
			return err
		}
		lost = lost || !ok
	}
	if lost {
		return errNo
	}
	return nil
}

// pairs returns the locations to probe between.
func (c cluster) pairs(ctx context.Context, args []string, lan string) ([][2]location, error) {
	var nodes v1beta1.LANNodeList
	if err := c.client.List(ctx, &nodes); err != nil {
		return nil, fmt.Errorf("list lannodes, to find the attached pods: %w", err)
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
	return [][2]location{pair}, err
}

// checkExists returns an error if there is no LAN with that name, or if it cannot be read.
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

// ends returns all attachments, sorted by node and spoke.
func ends(nodes []v1beta1.LANNode) (all []location) {
	for _, n := range nodes {
		for _, s := range n.Status.Segments {
			for _, a := range s.Attachments {
				all = append(all, location{lan: s.LAN, ns: s.NS, node: n.Name, spoke: a.Spoke, pod: a.Pod})
			}
		}
	}
	slices.SortFunc(all,
		func(x, y location) int { return cmp.Or(cmp.Compare(x.node, y.node), cmp.Compare(x.spoke, y.spoke)) })
	return all
}

// pairsAcrossNodes returns pairs of the LAN's first end with one location on each other node. If all ends are on one
// node, it returns the first two.
func pairsAcrossNodes(all []location, lan string) ([][2]location, error) {
	all = slices.DeleteFunc(slices.Clone(all), func(e location) bool { return e.lan != lan })
	switch len(all) {
	case 0:
		return nil, fmt.Errorf("no pod is attached to LAN %s, and a probe needs two; see kubectl k8slan status", lan)
	case 1:
		return nil, fmt.Errorf("only pod %s is attached to LAN %s, and a probe needs two: attach another",
			all[0].pod, lan)
	}
	var pairs [][2]location
	last := all[0].node
	for _, e := range all[1:] {
		if e.node != last {
			pairs, last = append(pairs, [2]location{all[0], e}), e.node
		}
	}
	if len(pairs) == 0 {
		pairs = [][2]location{{all[0], all[1]}}
	}
	return pairs, nil
}

// isNamed reports whether the location has that name, as its pod or as its spoke. Ports of a pool on several nodes have
// the same name.
func (e location) isNamed(namespace, name string) bool {
	return e.pod == qualified(namespace, name) || e.spoke == name
}

// findPair returns the locations of two pods or spokes on the one LAN that they are both attached to.
func findPair(all []location, namespace, one, two, lan string) (pair [2]location, err error) {
	var found [][2]location
	for _, a := range all {
		for _, b := range all {
			if a.isNamed(namespace, one) && b.isNamed(namespace, two) && a != b && a.lan == b.lan &&
				(lan == "" || a.lan == lan) {
				found = append(found, [2]location{a, b})
			}
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		var words []string
		for _, p := range found {
			words = append(words,
				fmt.Sprintf("%s (%s) and %s (%s) of LAN %s", p[0].pod, p[0].spoke, p[1].pod, p[1].spoke, p[0].lan))
		}
		return pair, fmt.Errorf("%s and %s meet more than once: %s; choose by pods, by spokes or with --lan, or "+
			"probe the LAN", one, two, strings.Join(words, ", "))
	}
	for _, name := range []string{one, two} {
		if !slices.ContainsFunc(all, func(e location) bool { return e.isNamed(namespace, name) }) {
			return pair, fmt.Errorf("%s is neither an attached pod in namespace %s nor an attached spoke; see "+
				"kubectl k8slan status", name, namespace)
		}
	}
	return pair, fmt.Errorf("%s and %s are on no LAN together; see kubectl k8slan status", one, two)
}

// probe probes between two ends and prints what it finds. It reports whether every frame passes.
func (c cluster) probe(ctx context.Context, out io.Writer, pair [2]location, system string) (ok bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	fmt.Fprintf(out, "LAN %s: %s (spoke %s) on %s, %s (spoke %s) on %s\n",
		pair[0].lan, pair[0].pod, pair[0].spoke, pair[0].node, pair[1].pod, pair[1].spoke, pair[1].node)
	var endpoints [2]probe.Endpoint
	for i, e := range pair {
		d, err := c.daemonOn(ctx, e.node, system)
		if err != nil {
			return false, err
		}
		var stop func()
		endpoints[i], stop = d.startEndpoint(ctx, e)
		defer stop()
	}
	there, back, err := probe.Run(ctx, endpoints[0], endpoints[1])
	if err != nil {
		return false, err
	}
	ok = true
	for _, path := range []probe.Path{there, back} {
		pathOK, sentences := path.Verdict()
		ok = ok && pathOK
		for _, s := range sentences {
			fmt.Fprintln(out, " ", s)
		}
	}
	if s := probe.Checksums(there, back); s != "" {
		fmt.Fprintln(out, " ", s)
	}
	return ok, nil
}

// startEndpoint starts an endpoint of a probe on a node.
func (d daemonPod) startEndpoint(ctx context.Context, e location) (endpoint probe.Endpoint, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	stdin, orders := io.Pipe()
	messages, stdout := io.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		var stderr bytes.Buffer
		err := d.run(ctx, stdin, stdout, &stderr, "probe", "endpoint", "--ns="+e.ns, "--spoke="+e.spoke)
		if text := strings.TrimSpace(stderr.String()); err != nil && text != "" {
			err = errors.New(text)
		}
		_, _ = stdin.CloseWithError(io.ErrClosedPipe), stdout.CloseWithError(err)
	}()
	return probe.Endpoint{Node: d.node, Orders: orders, Messages: messages}, func() {
		_ = orders.Close()
		cancel()
		_, _ = io.Copy(io.Discard, messages) // the rest of its output; without this, the client library logs an error
		<-ended
	}
}
