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
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// location is the node and LAN of a spoke, and its pod if one is attached.
type location struct{ lan, ns, node, spoke, pod string }

func captureCommand(f *clusterFlags) *cobra.Command {
	var file, node, system string
	var count int
	cmd := &cobra.Command{
		Use:   "capture <spoke>",
		Short: "Write the frames of a spoke in both directions as pcap",
		Long: `Write the frames of a spoke in both directions as pcap, until the command is interrupted.

The frames are captured on the node, at the spoke's port in the LAN, whole and with their VLAN tags. The pod is not
affected. TCP and UDP checksums between pods are often unfinished there, as they are in the pod. For a pool, give the
port, such as web_0; the pool's name is enough if only one pod is attached to it.

` + rightsNote,
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
			to, err := openOutput(file, cmd.OutOrStdout())
			if err != nil {
				return err
			}
			stdin, stop := io.Pipe() // nothing is written to it; the program in the pod ends when it is closed
			defer stop.Close()
			err = d.run(cmd.Context(), stdin, to, cmd.ErrOrStderr(),
				"capture", "--ns="+where.ns, "--spoke="+where.spoke, "--count="+strconv.Itoa(count))
			return errors.Join(err, to.Close())
		},
	}
	cmd.Flags().StringVarP(&file, "write", "w", "-", "`file` to write; -: standard output")
	cmd.Flags().IntVar(&count, "count", 0, "`number` of frames after which to end; 0: no limit")
	cmd.Flags().StringVar(&node, "node", "", "`name` of the node, for a spoke that is attached on two nodes or on none")
	addSystem(cmd, &system)
	return cmd
}

// rightsNote says where the commands run that look into LANs, and which rights they need.
const rightsNote = `It runs in k8slan's pods on the nodes. You need the rights to list pods and to create and get
pods/exec in k8slan's namespace, which is as much as root on the nodes.`

// addSystem adds the flag --system-namespace.
func addSystem(cmd *cobra.Command, system *string) {
	cmd.Flags().StringVar(system, "system-namespace", "k8slan-system", "`namespace` that k8slan is installed in")
}

// openOutput opens the file, or standard output for "-".
func openOutput(file string, stdout io.Writer) (io.WriteCloser, error) {
	if file != "-" {
		return os.Create(file)
	}
	if f, ok := stdout.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return nil, errors.New("a capture is not text for a terminal: give -w file, or pipe it: | tcpdump -nr -")
	}
	return unclosable{stdout}, nil
}

// unclosable is a writer whose Close does nothing.
type unclosable struct{ io.Writer }

func (unclosable) Close() error { return nil }

// find returns the location where a spoke is attached. With a node it also finds a free spoke on that node.
func (c cluster) find(ctx context.Context, spoke, node string) (location, error) {
	var nodes v1beta1.LANNodeList
	if err := c.client.List(ctx, &nodes); err != nil {
		return location{}, fmt.Errorf("list lannodes, to find the spoke's node: %w", err)
	}
	var lans v1beta1.LANList
	if err := c.client.List(ctx, &lans); err != nil {
		return location{}, fmt.Errorf("list LANs, to find the spoke's LAN: %w", err)
	}
	return locate(nodes.Items, lans.Items, spoke, node)
}

func locate(nodes []v1beta1.LANNode, lans []v1beta1.LAN, spoke, node string) (location, error) {
	locations := attachedLocations(nodes, spoke, node)
	switch len(locations) {
	case 0:
		return freeLocation(lans, spoke, node)
	case 1:
		return locations[0], nil
	}
	var words []string
	for _, l := range locations {
		words = append(words, fmt.Sprintf("%s on %s (%s)", l.pod, l.node, l.spoke))
	}
	return location{}, fmt.Errorf("spoke %s is attached more than once: %s; "+
		"choose one with --node, or by the port of a pool", spoke, strings.Join(words, ", "))
}

// freeLocation returns the location of a spoke without a pod.
func freeLocation(lans []v1beta1.LAN, spoke, node string) (location, error) {
	name := spoke
	pool, number, isPort := segment.PoolOf(spoke)
	if isPort {
		name = pool
	}
	for _, l := range lans {
		if l.Status.Holds == nil || !slices.Contains(l.Status.Holds.Spokes, name) {
			continue
		}
		lan := l.Namespace + "/" + l.Name
		p, isPool := l.Spec.Pool(name)
		switch {
		case isPort && number >= int(p.Size):
			return location{}, fmt.Errorf("pool %s of LAN %s has %d ports on each node, %s to %s, "+
				"and no pod is attached to %s",
				pool, lan, p.Size, segment.Port(pool, 0), segment.Port(pool, int(p.Size)-1), spoke)
		case isPool && !isPort:
			return location{}, fmt.Errorf("no pod is attached to pool %s of LAN %s there; "+
				"to capture at a free port, give its name, such as %s, and --node",
				spoke, lan, segment.Port(spoke, 0))
		case node == "":
			return location{}, fmt.Errorf("no pod is attached to spoke %s of LAN %s; "+
				"give --node to capture at its port on a node", spoke, lan)
		}
		return location{lan: lan, ns: l.Status.Holds.NS, node: node, spoke: spoke}, nil
	}
	return location{}, fmt.Errorf("no LAN has a spoke %s; kubectl k8slan status -A lists them", spoke)
}

// attachedLocations returns where a spoke, or a port of the pool with that name, is attached: on the node, or on any if
// node is empty.
func attachedLocations(nodes []v1beta1.LANNode, spoke, node string) (locations []location) {
	for _, n := range nodes {
		for _, s := range n.Status.Segments {
			for _, a := range s.Attachments {
				if (a.Spoke == spoke || a.Pool == spoke) && (node == "" || node == n.Name) {
					locations = append(locations,
						location{lan: s.LAN, ns: s.NS, node: n.Name, spoke: a.Spoke, pod: a.Pod})
				}
			}
		}
	}
	return locations
}
