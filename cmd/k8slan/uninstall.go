package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/controller"
	"github.com/k8slan/k8slan/crd/uninstall"
)

// hookFlags are those of what Helm runs, once, in a pod.
type hookFlags struct {
	daemonFlags
	namespace string
	timeout   time.Duration
}

func (f *hookFlags) add(cmd *cobra.Command, timeout time.Duration) {
	flags := cmd.Flags()
	flags.StringVar(&f.kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"),
		"kubeconfig `file` (environment: KUBECONFIG); empty: the service account of the pod")
	flags.StringVar(&f.namespace, "namespace", os.Getenv("POD_NAMESPACE"), "`namespace` of the installation (environment: POD_NAMESPACE)")
	flags.DurationVar(&f.timeout, "timeout", timeout, "longest `time` to wait")
	f.logFormat = "text"
}

// client is the way to the API server.
func (f *hookFlags) client() (client.WithWatch, error) {
	config, err := f.rest("hook")
	if err != nil {
		return nil, err
	}
	scheme := controller.NewScheme()
	if err := apiextensionsv1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	c, err := client.NewWithWatch(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("make a client: %w", err)
	}
	return c, nil
}

func (f *hookFlags) uninstaller() (uninstall.Uninstaller, error) {
	log, err := f.logger()
	if err != nil {
		return uninstall.Uninstaller{}, err
	}
	c, err := f.client()
	return uninstall.Uninstaller{Client: c, Namespace: f.namespace, Log: log}, err
}

func uninstallCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take k8slan out of the cluster: the steps that helm uninstall runs",
		Args:  noArguments,
	}
	cmd.AddCommand(stopCommand(), finishCommand(), residueCommand())
	return cmd
}

func stopCommand() *cobra.Command {
	var f hookFlags
	cmd := &cobra.Command{
		Use:   "stop",
		Short: "End the daemon and the controller, and wait until they have ended on every node that answers",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			u, err := f.uninstaller()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), f.timeout)
			defer cancel()
			return u.Stop(ctx)
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
		Short: "Wait until every node that answers is clean, then remove k8slan's objects; LANs stay",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			u, err := f.uninstaller()
			if err != nil {
				return err
			}
			wait, cancel := context.WithTimeout(cmd.Context(), f.timeout)
			defer cancel()
			if err := u.AwaitClean(wait); err != nil {
				return err
			}
			if err := u.Objects(cmd.Context()); err != nil || !lans {
				return err
			}
			return removeCRDs(cmd.Context(), u)
		},
	}
	f.add(cmd, 4*time.Minute)
	cmd.Flags().BoolVar(&lans, "remove-lans", false, "remove the CRDs, too, and with them every LAN")
	return cmd
}

func removeCRDs(ctx context.Context, u uninstall.Uninstaller) error {
	for _, name := range []string{"lans.lan.k8slan.io", "lannodes.lan.k8slan.io"} {
		crd := &apiextensionsv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if err := u.Client.Delete(ctx, crd); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("delete CRD %s: %w", name, err)
		}
	}
	u.Log.Info("CRDs are deleted, and all LANs with them")
	return nil
}

func residueCommand() *cobra.Command {
	var f hookFlags
	cmd := &cobra.Command{
		Use:   "residue",
		Short: "Remove the resources that kubelets still list when their plugins are gone, and then this step itself",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			u, err := f.uninstaller()
			if err != nil {
				return err
			}
			if err := u.Adopt(ctx); err != nil {
				return err
			}
			wait, cancel := context.WithTimeout(ctx, f.timeout)
			defer cancel()
			u.AwaitResidue(wait)
			if ctx.Err() != nil {
				return nil // the pod moves: another takes over
			}
			if err := u.Vanish(ctx); err != nil {
				return err
			}
			<-ctx.Done()
			return nil
		},
	}
	f.add(cmd, 15*time.Minute)
	return cmd
}
