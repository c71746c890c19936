// Command image writes the product's image as an OCI archive, without Docker.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/k8slan/k8slan/build/image"
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
	var archive string
	var p image.Product
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Write the product's image from its two static programs",
		Long: "Write the product's image, " + image.Repository + ":<version>, from its two static programs.\n" +
			"Import it with: ctr -n k8s.io images import <archive>",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if p.Tools, err = image.Busybox(cmd.Context()); err != nil {
				return err
			}
			if err := image.K8slan(cmd.Context(), archive, p); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s  %s:%s\n", archive, image.Repository, p.Version)
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
