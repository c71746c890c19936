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

// fullLimit is up to how many LANs are shown in full where none is named; of more, those that are Ready have one line.
const fullLimit = 5

func statusCommand(f *clusterFlags) *cobra.Command {
	var everywhere bool
	cmd := &cobra.Command{
		Use:   "status [lan…]",
		Short: "Show where LANs are, who is on them, and what is wrong",
		Long: fmt.Sprintf(`Show where LANs are, who is on them, and what is wrong and the way out.

Without names it shows all LANs of the namespace, and those without a LAN object that pods of the namespace made by naming a VNI, called
megalos:<vni>; of more than %d, those that are Ready have one line.

Exit code: 0 when every LAN shown is Ready, 1 when one is not or is not there, 2 when that could not be found out.`, fullLimit),
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
	cmd.Flags().BoolVarP(&everywhere, "all-namespaces", "A", false, "of all namespaces")
	return cmd
}

func (c cluster) status(ctx context.Context, out io.Writer, names []string) error {
	facts, err := c.facts(ctx)
	if err != nil {
		return err
	}
	facts.LANs = append(facts.LANs, facts.OnDemand(c.namespace)...)
	lans, missing := named(facts.LANs, names)
	facts.LANs = lans
	s := screenOf(out)
	s.Brief = len(names) == 0 && len(lans) > fullLimit
	fmt.Fprint(out, s.Status(facts))
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

// facts reads what there is. Who may not read nodes is shown what the LANs themselves say.
func (c cluster) facts(ctx context.Context) (f overview.Objects, err error) {
	var lans v1beta1.LANList
	if err := c.client.List(ctx, &lans, client.InNamespace(c.namespace)); err != nil {
		return f, fmt.Errorf("list LANs: %w", err)
	}
	var lanNodes v1beta1.LANNodeList
	var nodes corev1.NodeList
	for kind, list := range map[string]client.ObjectList{"lannodes": &lanNodes, "nodes": &nodes} {
		err := c.client.List(ctx, list)
		switch {
		case apierrors.IsForbidden(err):
			f.Unreadable = append(f.Unreadable, "You may not list "+kind+" in this cluster, so some of what they say is missing here.")
		case err != nil:
			return f, fmt.Errorf("list %s: %w", kind, err)
		}
	}
	slices.Sort(f.Unreadable)
	f.LANs, f.LANNodes, f.Nodes = lans.Items, lanNodes.Items, nodes.Items
	return f, nil
}

// named are the LANs of these names, or all, and the names that no LAN has.
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

// screenOf is what there is room for: on a terminal its width, and colours unless they are not wanted (no-color.org).
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
