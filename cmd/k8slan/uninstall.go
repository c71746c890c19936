package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/helmhooks"
)

func uninstallCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove k8slan from the cluster: the steps of helm uninstall",
		Args:  noArguments,
	}
	cmd.AddCommand(stopCommand(), finishCommand(), residueCommand())
	return cmd
}

func stopCommand() *cobra.Command {
	var f hookFlags
	cmd := &cobra.Command{
		Use:   "stop",
		Short: "Stop the daemon and the controller, and wait until they have stopped on every node that answers",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := f.release()
			if err != nil {
				return err
			}
			return f.within(cmd.Context(), r, helmhooks.Release.Stop)
		},
	}
	f.add(cmd, time.Minute)
	return cmd
}

func finishCommand() *cobra.Command {
	var f hookFlags
	var lans bool
	cmd := &cobra.Command{
		Use:   "finish",
		Short: "Wait until every node that answers is clean, then delete k8slan's objects; LANs stay",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := f.release()
			if err != nil {
				return err
			}
			if err := f.within(cmd.Context(), r, helmhooks.Release.WaitForCleanNodes); err != nil {
				return err
			}
			if err := r.RemoveObjects(cmd.Context()); err != nil || !lans {
				return err
			}
			return removeCRDs(cmd.Context(), r)
		},
	}
	f.add(cmd, 4*time.Minute)
	cmd.Flags().BoolVar(&lans, "remove-lans", false, "also delete the CRDs, and with them every LAN")
	return cmd
}

func removeCRDs(ctx context.Context, r helmhooks.Release) error {
	for _, name := range []string{"lans.lan.k8slan.io", "lannodes.lan.k8slan.io"} {
		crd := &apiextensionsv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if err := r.Client.Delete(ctx, crd); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("delete CRD %s: %w", name, err)
		}
	}
	r.Log.Info("the CRDs and all LANs are deleted")
	return nil
}

func residueCommand() *cobra.Command {
	var f hookFlags
	cmd := &cobra.Command{
		Use:   "residue",
		Short: "Remove the resources that kubelets list after their plugins were removed, and then this step itself",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			r, err := f.release()
			if err != nil {
				return err
			}
			if err := r.OwnResidueObjects(ctx); err != nil {
				return err
			}
			err = f.within(ctx, r, helmhooks.Release.RemoveResidue)
			if ctx.Err() != nil {
				return nil //nolint:nilerr // this pod is deleted, and a new one continues
			}
			if err != nil {
				return err
			}
			if err := r.DeleteResidueObjects(ctx); err != nil {
				return err
			}
			<-ctx.Done()
			return nil
		},
	}
	f.add(cmd, 15*time.Minute)
	return cmd
}
