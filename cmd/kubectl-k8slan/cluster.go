package main

import (
	"fmt"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// clusterFlags are kubectl's flags for the cluster, the user and the namespace.
type clusterFlags struct {
	kubeconfig string
	overrides  clientcmd.ConfigOverrides
}

func (f *clusterFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "kubeconfig `file`; empty: kubectl's default")
	flags.StringVar(&f.overrides.CurrentContext, "context", "", "`name` of the kubeconfig's context")
	flags.StringVarP(&f.overrides.Context.Namespace, "namespace", "n", "",
		"`namespace` of the LAN or pods; empty: that of the context")
	flags.StringVar(&f.overrides.AuthInfo.Impersonate, "as", "", "`user` to act as")
}

// cluster is a connection to a cluster.
type cluster struct {
	config    *rest.Config
	client    client.Client
	namespace string
}

func (f *clusterFlags) open() (cluster, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = f.kubeconfig
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &f.overrides)
	config, err := loader.ClientConfig()
	if err != nil {
		return cluster{}, fmt.Errorf("find the cluster: %w", err)
	}
	c := cluster{config: rest.AddUserAgent(config, "kubectl-k8slan/"+version)}
	c.config.QPS = -1 // no limit: there are only a few requests
	if c.namespace, _, err = loader.Namespace(); err != nil {
		return cluster{}, fmt.Errorf("find the namespace: %w", err)
	}
	scheme := runtime.NewScheme()
	for _, register := range []func(*runtime.Scheme) error{corev1.AddToScheme, v1beta1.AddToScheme} {
		if err := register(scheme); err != nil {
			return cluster{}, fmt.Errorf("register the API's kinds: %w", err)
		}
	}
	if c.client, err = client.New(c.config, client.Options{Scheme: scheme}); err != nil {
		return cluster{}, fmt.Errorf("make a client: %w", err)
	}
	return c, nil
}
