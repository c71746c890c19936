package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/k8slan/k8slan/crd/controller"
	"github.com/k8slan/k8slan/crd/v1beta1"
)

// controllerFlags are the flags of k8slan controller.
type controllerFlags struct {
	daemonFlags
	elect     bool
	namespace string
	discovery v1beta1.Discovery
}

func controllerCommand() *cobra.Command {
	var f controllerFlags
	cmd := &cobra.Command{
		Use:   "controller",
		Short: "Run the controller: it accepts LANs, writes their NADs and summarizes their status",
		Long: `Run the controller. One at a time is active in a cluster: several replicas elect a leader.

It decides which LAN holds which network namespace, VNI and spokes, and writes two NetworkAttachmentDefinitions for each
spoke that is held: k8slan-veth-<spoke> and k8slan-mac-<spoke>. It summarizes the nodes' reports in each LAN's status.

/healthz answers with 200 while the controller runs. /readyz answers with 200 when it has read the cluster's objects,
whether or not it is the leader.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.runController(cmd.Context()) },
	}
	f.add(cmd.Flags())
	f.discovery = v1beta1.Multicast
	cmd.Flags().Var(&f.discovery, "discovery",
		"discovery of LANs that set none: multicast, unicast or evpn")
	cmd.Flags().BoolVar(&f.elect, "leader-elect", true,
		"elect a leader; false only if there can be no second controller")
	cmd.Flags().StringVar(&f.namespace, "lease-namespace", os.Getenv("POD_NAMESPACE"),
		"`namespace` of the leader's lease (environment: POD_NAMESPACE); empty: that of the pod")
	return cmd
}

func (f *controllerFlags) runController(ctx context.Context) error {
	log, err := f.logger()
	if err != nil {
		return err
	}
	config, err := f.rest("controller")
	if err != nil {
		return err
	}
	stop := shutdownTimeout
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:                        controller.NewScheme(),
		Cache:                         cache.Options{DefaultTransform: cache.TransformStripManagedFields()},
		Metrics:                       metricsserver.Options{BindAddress: f.metricsAddress},
		GracefulShutdownTimeout:       &stop,
		LeaderElection:                f.elect,
		LeaderElectionID:              "k8slan-controller",
		LeaderElectionNamespace:       f.namespace,
		LeaderElectionReleaseOnCancel: true, // the process ends immediately after it
	})
	if err != nil {
		return fmt.Errorf("set up the controller: %w", err)
	}
	m := controller.NewMetrics()
	if err := register(m); err != nil {
		return err
	}
	if err := controller.Setup(mgr, f.discovery, m); err != nil {
		return err
	}
	err = f.serveHealth(mgr, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if !mgr.GetCache().WaitForCacheSync(ctx) {
			return errors.New("the cluster's objects are not read yet")
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("set up the controller: %w", err)
	}
	log.Info("k8slan controller starts", "version", version)
	return start(ctx, mgr, log)
}
