// Command image writes the OCI image archives of the product and of the test
// cluster.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/k8slan/k8slan/test/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "image",
		Short:         "Write OCI image archives without Docker",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(product(), test())
	return root
}

func product() *cobra.Command {
	var archive string
	var p images.Product
	cmd := &cobra.Command{
		Use:   "k8slan",
		Short: "Write the product's image from its two static programs",
		Long: "Write the product's image, " + images.Repository + ":<version>, from its two static programs.\n" +
			"Import it with: ctr -n k8s.io images import <archive>",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if p.Tools, err = images.Busybox(cmd.Context()); err != nil {
				return err
			}
			if err := images.K8slan(cmd.Context(), archive, p); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s  %s:%s\n", archive, images.Repository, p.Version)
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&archive, "output", "o", "dist/k8slan.tar", "the archive to write")
	flags.StringVar(&p.Version, "version", "", "the image's tag")
	flags.StringVar(&p.K8slan, "k8slan", "bin/k8slan", "the program k8slan, the image's entrypoint")
	flags.StringVar(&p.CNI, "cni", "bin/k8slan-cni", "the program k8slan-cni")
	if err := cmd.MarkFlagRequired("version"); err != nil {
		panic(err) // no such flag: a mistake in this function
	}
	return cmd
}

func test() *cobra.Command {
	var cacheDir string
	cmd := &cobra.Command{
		Use:   "test",
		Short: "Write the test cluster's images, those that are not in the cache",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, write := range []func(context.Context, string) (string, error){images.Pause, images.Toolbox, images.VM} {
				archive, err := write(cmd.Context(), cacheDir)
				if err != nil {
					return err
				}
				fmt.Fprintln(cmd.OutOrStdout(), archive)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&cacheDir, "cache", "", "the directory that keeps the archives")
	if err := cmd.MarkFlagRequired("cache"); err != nil {
		panic(err) // no such flag: a mistake in this function
	}
	return cmd
}
