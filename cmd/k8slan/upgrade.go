package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/controller"
	"github.com/k8slan/k8slan/crd/helmhooks"
	"github.com/k8slan/k8slan/crd/manifests"
)

// hookFlags are the flags of the commands that Helm runs in a pod.
type hookFlags struct {
	daemonFlags
	namespace string
	timeout   time.Duration
}

func (f *hookFlags) add(cmd *cobra.Command, timeout time.Duration) {
	flags := cmd.Flags()
	addKubeconfig(flags, &f.kubeconfig)
	flags.StringVar(&f.namespace, "namespace", os.Getenv("POD_NAMESPACE"),
		"`namespace` of the installation (environment: POD_NAMESPACE)")
	flags.DurationVar(&f.timeout, "timeout", timeout, "longest `time` to wait")
	f.logFormat = "text"
}

// client returns a client of the API server.
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

// release returns the Helm release.
func (f *hookFlags) release() (helmhooks.Release, error) {
	log, err := f.logger()
	if err != nil {
		return helmhooks.Release{}, err
	}
	c, err := f.client()
	return helmhooks.Release{Client: c, Namespace: f.namespace, Log: log}, err
}

// within runs a step of a hook, for at most --timeout.
func (f *hookFlags) within(
	ctx context.Context, r helmhooks.Release, step func(helmhooks.Release, context.Context) error,
) error {
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	return step(r, ctx)
}

func upgradeCommand() *cobra.Command {
	var f hookFlags
	cmd := &cobra.Command{
		Use:   "prepare-upgrade",
		Short: "Wait until every node that answers has this image, then update the CRDs: the start of helm upgrade",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := f.release()
			if err != nil {
				return err
			}
			if err := f.within(cmd.Context(), r, helmhooks.Release.WaitForImage); err != nil {
				return err
			}
			return r.ApplyCRDs(cmd.Context(), manifests.Files)
		},
	}
	f.add(cmd, 4*time.Minute)
	return cmd
}
