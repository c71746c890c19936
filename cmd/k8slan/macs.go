package main

import (
	"encoding/json"

	"github.com/spf13/cobra"

	"github.com/k8slan/k8slan/lanmgr/kernel"
)

// macsCommand returns the command that kubectl k8slan macs runs in the daemon's pod.
func macsCommand() *cobra.Command {
	var ns, run string
	cmd := &cobra.Command{
		Use:    "macs",
		Short:  "Write the MACs that the LAN's bridge knows, as JSON to standard output",
		Hidden: true,
		Args:   noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			host := kernel.New(kernel.Paths{Run: run})
			defer host.Close()
			entries, err := host.MACs(cmd.Context(), ns)
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(entries)
		},
	}
	cmd.Flags().StringVar(&ns, "ns", "", "`name` of the LAN's network namespace")
	addRunDir(cmd.Flags(), &run)
	return cmd
}
