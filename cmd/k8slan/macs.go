package main

import (
	"encoding/json"

	"github.com/spf13/cobra"

	"github.com/k8slan/k8slan/lanmgr/kernel"
)

// macsCommand is what kubectl k8slan macs runs in the daemon's pod.
func macsCommand() *cobra.Command {
	var ns, run string
	cmd := &cobra.Command{
		Use:    "macs",
		Short:  "Write where the LAN's bridge has MACs, as JSON to standard output",
		Hidden: true,
		Args:   noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			host := kernel.New(kernel.Paths{Run: run})
			defer host.Close()
			places, err := host.MACs(cmd.Context(), ns)
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(places)
		},
	}
	cmd.Flags().StringVar(&ns, "ns", "", "`name` of the LAN's network namespace")
	cmd.Flags().StringVar(&run, "run-dir", kernel.DefaultRun, "`directory` of the LANs' network namespaces, records and locks")
	return cmd
}
