package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// spokePlace is where a spoke is.
type spokePlace struct{ lan, ns, node, pod string }

func captureCommand(f *clusterFlags) *cobra.Command {
	var file, node, system string
	var count int
	cmd := &cobra.Command{
		Use:   "capture <spoke>",
		Short: "Write the frames that a spoke carries, both ways, as pcap",
		Long: `Write the frames that a spoke carries, both ways, as pcap, until it is interrupted.

They are taken on the node, at the spoke's port in the LAN, whole and with their VLAN tags; the pod notices nothing. TCP and UDP
checksums between pods are often unfinished there, as they are in the pod.

It runs in k8slan's pod on that node, which takes the rights to list pods and to create and get pods/exec in k8slan's namespace: as much as
root on the nodes.`,
		Example: `  kubectl k8slan capture srl -w srl.pcap
  kubectl k8slan capture srl | tcpdump -nr -
  kubectl k8slan capture srl | wireshark -k -i -`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := f.open()
			if err != nil {
				return err
			}
			if count < 0 {
				return fmt.Errorf("--count is a number of frames, not %d", count)
			}
			where, err := c.find(cmd.Context(), args[0], node)
			if err != nil {
				return err
			}
			d, err := c.daemonOn(cmd.Context(), where.node, system)
			if err != nil {
				return err
			}
			to, err := create(file, cmd.OutOrStdout())
			if err != nil {
				return err
			}
			stdin, hold := io.Pipe() // nothing is said on it; its end is the end
			defer hold.Close()
			err = d.run(cmd.Context(), stdin, to, cmd.ErrOrStderr(),
				"capture", "--ns="+where.ns, "--spoke="+args[0], "--count="+strconv.Itoa(count))
			return errors.Join(err, to.Close())
		},
	}
	cmd.Flags().StringVarP(&file, "write", "w", "-", "`file` to write; -: standard output")
	cmd.Flags().IntVar(&count, "count", 0, "`number` of frames to end after; 0: no limit")
	cmd.Flags().StringVar(&node, "node", "", "`name` of the node, for a spoke that is attached on two or on none")
	addSystem(cmd, &system)
	return cmd
}

// addSystem adds the flag that says where k8slan is.
func addSystem(cmd *cobra.Command, system *string) {
	cmd.Flags().StringVar(system, "system-namespace", "k8slan-system", "`namespace` that k8slan is installed in")
}

// create opens the file to write to.
func create(file string, stdout io.Writer) (io.WriteCloser, error) {
	if file != "-" {
		return os.Create(file)
	}
	if f, ok := stdout.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return nil, errors.New("a capture is nothing to read on a terminal: give -w file, or pipe it: | tcpdump -nr -")
	}
	return open{stdout}, nil
}

// open is a writer that somebody else closes.
type open struct{ io.Writer }

func (open) Close() error { return nil }

// find finds where a spoke is attached, or, with a node, where it is offered there.
func (c cluster) find(ctx context.Context, spoke, node string) (spokePlace, error) {
	var nodes v1beta1.LANNodeList
	if err := c.client.List(ctx, &nodes); err != nil {
		return spokePlace{}, fmt.Errorf("list lannodes, to find the spoke's node: %w", err)
	}
	places := attachedAt(nodes.Items, spoke, node)
	switch {
	case len(places) == 1:
		return places[0], nil
	case len(places) > 1:
		var words []string
		for _, p := range places {
			words = append(words, p.pod+" on "+p.node)
		}
		return spokePlace{}, fmt.Errorf("spoke %s is attached more than once: %s; say which with --node", spoke, strings.Join(words, ", "))
	}
	var lans v1beta1.LANList
	if err := c.client.List(ctx, &lans); err != nil {
		return spokePlace{}, fmt.Errorf("list LANs, to find the spoke's: %w", err)
	}
	for _, l := range lans.Items {
		if _, ok := l.Spec.Pool(spoke); ok {
			return spokePlace{}, fmt.Errorf("%s is a pool of LAN %s/%s: give the port of one of its pods, such as %[1]s_0; kubectl k8slan status shows whose is which", spoke, l.Namespace, l.Name)
		}
		if l.Status.Holds == nil || !slices.Contains(l.Status.Holds.Spokes, spoke) {
			continue
		}
		if node == "" {
			return spokePlace{}, fmt.Errorf("spoke %s of LAN %s/%s is attached nowhere now; give --node to capture at its port on a node", spoke, l.Namespace, l.Name)
		}
		return spokePlace{lan: l.Namespace + "/" + l.Name, ns: l.Status.Holds.NS, node: node}, nil
	}
	return spokePlace{}, fmt.Errorf("no LAN has a spoke %s; kubectl k8slan status -A lists them", spoke)
}

// attachedAt are the places where a spoke is attached: on one node, or any.
func attachedAt(nodes []v1beta1.LANNode, spoke, node string) (places []spokePlace) {
	for _, n := range nodes {
		for _, s := range n.Status.Segments {
			for _, a := range s.Attachments {
				if a.Spoke == spoke && (node == "" || node == n.Name) {
					places = append(places, spokePlace{lan: s.LAN, ns: s.NS, node: n.Name, pod: a.Pod})
				}
			}
		}
	}
	return places
}
