package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/overview"
	"github.com/k8slan/k8slan/crd/v1beta1"
)

// fullLimit is the number of LANs that status shows in full without names. Of more LANs, those that are Ready have one
// line.
const fullLimit = 5

func statusCommand(f *clusterFlags) *cobra.Command {
	var everywhere bool
	cmd := &cobra.Command{
		Use:   "status [lan…]",
		Short: "Show the nodes and pods of LANs, and what is wrong",
		Long: fmt.Sprintf(`Show the nodes and pods of LANs, what is wrong with them, and how to fix it.

Without names it shows all LANs of the namespace. It also shows LANs without a LAN object, to which pods of the
namespace are attached by VNI; they are called megalos:<vni>. If there are more than %d LANs, those that are Ready have
one line.

Exit codes: 0: every LAN shown is Ready. 1: a LAN is not Ready, or does not exist. 2: the answer could not be
determined.`, fullLimit),
		Example: `  kubectl k8slan status -A
  kubectl k8slan status lab`,
		RunE: func(cmd *cobra.Command, names []string) error {
			c, err := f.open()
			if err != nil {
				return err
			}
			if everywhere {
				c.namespace = ""
			}
			return c.status(cmd.Context(), cmd.OutOrStdout(), names)
		},
	}
	cmd.Flags().BoolVarP(&everywhere, "all-namespaces", "A", false, "show the LANs of all namespaces")
	return cmd
}

func (c cluster) status(ctx context.Context, out io.Writer, names []string) error {
	objects, err := c.objects(ctx)
	if err != nil {
		return err
	}
	objects.LANs = append(objects.LANs, objects.OnDemand(c.namespace)...)
	lans, missing := named(objects.LANs, names)
	objects.LANs = lans
	s := screenOf(out)
	s.Brief = len(names) == 0 && len(lans) > fullLimit
	fmt.Fprint(out, s.Status(objects))
	where := "in namespace " + c.namespace
	if c.namespace == "" {
		where = "in any namespace"
	}
	for _, name := range missing {
		fmt.Fprintf(out, "there is no LAN %s %s\n", name, where)
	}
	if len(lans) == 0 && len(names) == 0 {
		fmt.Fprintf(out, "there is no LAN %s\n", where)
	}
	if len(missing) > 0 || !overview.AllReady(lans) {
		return errNo
	}
	return nil
}

// objects reads the objects. A user who may not list LANNodes or Nodes gets only what the LANs' own status says.
func (c cluster) objects(ctx context.Context) (o overview.Objects, err error) {
	var lans v1beta1.LANList
	if err := c.client.List(ctx, &lans, client.InNamespace(c.namespace)); err != nil {
		return o, fmt.Errorf("list LANs: %w", err)
	}
	var lanNodes v1beta1.LANNodeList
	var nodes corev1.NodeList
	for kind, list := range map[string]client.ObjectList{"lannodes": &lanNodes, "nodes": &nodes} {
		err := c.client.List(ctx, list)
		switch {
		case apierrors.IsForbidden(err):
			o.Unreadable = append(o.Unreadable,
				"You may not list "+kind+" in this cluster, so some of what they say is missing here.")
		case err != nil:
			return o, fmt.Errorf("list %s: %w", kind, err)
		}
	}
	slices.Sort(o.Unreadable)
	o.LANs, o.LANNodes, o.Nodes = lans.Items, lanNodes.Items, nodes.Items
	return o, nil
}

// named returns the LANs with these names, or all LANs if there are no names, and the names that no LAN has.
func named(all []v1beta1.LAN, names []string) (lans []v1beta1.LAN, missing []string) {
	if len(names) == 0 {
		return all, nil
	}
	found := map[string]bool{}
	for _, l := range all {
		if slices.Contains(names, l.Name) {
			lans, found[l.Name] = append(lans, l), true
		}
	}
	for _, name := range names {
		if !found[name] {
			missing = append(missing, name)
		}
	}
	return lans, missing
}

// screenOf returns how to print: on a terminal with its width, and with colours unless they are disabled
// (no-color.org).
func screenOf(out io.Writer) overview.Screen {
	s := overview.Screen{Now: time.Now()}
	file, ok := out.(*os.File)
	if !ok || !term.IsTerminal(int(file.Fd())) {
		return s
	}
	if width, _, err := term.GetSize(int(file.Fd())); err == nil {
		s.Width = width
	}
	s.Colour = os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	return s
}
