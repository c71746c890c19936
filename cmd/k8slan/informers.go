package main

import (
	"errors"
	"fmt"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/agent"
)

// manager returns the manager with the informers of every LAN, this node's Node and LANNode, and the route reflectors'
// EndpointSlices.
func (f *nodeFlags) manager() (ctrl.Manager, error) {
	config, err := f.rest("node")
	if err != nil {
		return nil, err
	}
	scheme := runtime.NewScheme()
	err = errors.Join(corev1.AddToScheme(scheme), discoveryv1.AddToScheme(scheme), v1beta1.AddToScheme(scheme))
	if err != nil {
		return nil, fmt.Errorf("register the API's kinds: %w", err)
	}
	own := cache.ByObject{Field: fields.OneTermEqualSelector("metadata.name", f.node)}
	ofReflectors := labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: f.reflectors})
	stop := shutdownTimeout
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:         scheme,
		MapperProvider: func(*rest.Config, *http.Client) (meta.RESTMapper, error) { return restMapper(), nil },
		Cache: cache.Options{
			DefaultTransform: cache.TransformStripManagedFields(),
			ByObject: map[client.Object]cache.ByObject{
				&corev1.Node{}: own, &v1beta1.LANNode{}: own,
				&discoveryv1.EndpointSlice{}: {Namespaces: map[string]cache.Config{
					f.self.Namespace: {LabelSelector: ofReflectors},
				}},
			},
		},
		Metrics:                 metricsserver.Options{BindAddress: f.metricsAddress},
		GracefulShutdownTimeout: &stop,
	})
	if err != nil {
		return nil, fmt.Errorf("set up the daemon: %w", err)
	}
	return mgr, nil
}

// peers returns a cache with the informer of every node's LANNode. It is a second cache, because a cache has one
// informer for each kind. It starts to watch on the first request.
func (f *nodeFlags) peers(mgr ctrl.Manager) (cache.Cache, error) {
	peers, err := cache.New(mgr.GetConfig(), cache.Options{
		HTTPClient: mgr.GetHTTPClient(),
		Scheme:     mgr.GetScheme(),
		Mapper:     mgr.GetRESTMapper(),
		ByObject:   map[client.Object]cache.ByObject{&v1beta1.LANNode{}: {Transform: agent.StripPeer}},
	})
	if err != nil {
		return nil, fmt.Errorf("set up the daemon: %w", err)
	}
	return peers, nil
}

// restMapper returns the kinds that the daemon uses. They are fixed, so that the daemon starts while the API server is
// not running, for example after a power failure.
func restMapper() meta.RESTMapper {
	mapper := meta.NewDefaultRESTMapper([]schema.GroupVersion{
		corev1.SchemeGroupVersion, discoveryv1.SchemeGroupVersion, v1beta1.GroupVersion,
	})
	mapper.Add(corev1.SchemeGroupVersion.WithKind("Node"), meta.RESTScopeRoot)
	mapper.Add(v1beta1.GroupVersion.WithKind("LANNode"), meta.RESTScopeRoot)
	mapper.Add(v1beta1.GroupVersion.WithKind("LAN"), meta.RESTScopeNamespace)
	mapper.Add(discoveryv1.SchemeGroupVersion.WithKind("EndpointSlice"), meta.RESTScopeNamespace)
	// A cache of one namespace also looks up the scope of lists (multiNamespaceCache.List in controller-runtime's
	// pkg/cache).
	mapper.Add(discoveryv1.SchemeGroupVersion.WithKind("EndpointSliceList"), meta.RESTScopeNamespace)
	return mapper
}
