package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// follow tells the endpoints of Services: once when all are known, and then at each change, until ctx ends. It asks for the EndpointSlices
// of these Services in their namespaces alone. fail is told why they are not to be had, and nil when they are again.
func follow(ctx context.Context, api *rest.Config, services []Service, readyOnly bool, tell func(endpoints), fail func(error)) error {
	scheme := runtime.NewScheme()
	if err := discoveryv1.AddToScheme(scheme); err != nil {
		return err
	}
	mapper := meta.NewDefaultRESTMapper(nil) // one kind of object is not worth a question what the API server has
	for _, kind := range []string{"EndpointSlice", "EndpointSliceList"} { // the cache asks for lists, too
		mapper.Add(discoveryv1.SchemeGroupVersion.WithKind(kind), meta.RESTScopeNamespace)
	}
	namespaces, err := selectors(services)
	if err != nil {
		return err
	}
	changed := make(chan struct{}, 1)
	c, err := cache.New(api, cache.Options{
		Scheme: scheme, Mapper: mapper, DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{&discoveryv1.EndpointSlice{}: {Namespaces: namespaces}},
		DefaultWatchErrorHandler: func(_ context.Context, _ *toolscache.Reflector, err error) {
			if !errors.Is(err, io.EOF) && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) { // the ends of every watch
				fail(explain(err, services))
			}
		},
	})
	if err != nil {
		return fmt.Errorf("watch the EndpointSlices: %w", err)
	}
	informer, err := c.GetInformer(ctx, &discoveryv1.EndpointSlice{}, cache.BlockUntilSynced(false))
	if err != nil {
		return fmt.Errorf("watch the EndpointSlices: %w", err)
	}
	poke := func() {
		fail(nil)
		signal(changed)
	}
	if _, err := informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { poke() }, UpdateFunc: func(any, any) { poke() }, DeleteFunc: func(any) { poke() },
	}); err != nil {
		return fmt.Errorf("watch the EndpointSlices: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- c.Start(ctx) }()
	defer func() {
		cancel()
		<-ended
	}()
	if !c.WaitForCacheSync(ctx) {
		return nil
	}
	poke()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			var parts discoveryv1.EndpointSliceList
			if err := c.List(ctx, &parts); err != nil {
				return fmt.Errorf("list the EndpointSlices: %w", err)
			}
			tell(join(services, parts.Items, readyOnly))
		}
	}
}

// selectors are the namespaces to ask, and in each for the parts of which Services.
func selectors(services []Service) (map[string]cache.Config, error) {
	names := map[string][]string{}
	for _, s := range services {
		names[s.Namespace] = append(names[s.Namespace], s.Name)
	}
	all := make(map[string]cache.Config, len(names))
	for namespace, names := range names {
		r, err := labels.NewRequirement(discoveryv1.LabelServiceName, selection.In, names)
		if err != nil {
			return nil, fmt.Errorf("services: %w", err)
		}
		all[namespace] = cache.Config{LabelSelector: labels.NewSelector().Add(*r)}
	}
	return all, nil
}

// explain says what to do about an error of the API server.
func explain(err error, services []Service) error {
	if !apierrors.IsForbidden(err) {
		return fmt.Errorf("watch the EndpointSlices, trying again: %w", err)
	}
	var namespaces []string
	for _, s := range services {
		namespaces = append(namespaces, s.Namespace)
	}
	slices.Sort(namespaces)
	return fmt.Errorf("watch the EndpointSlices, trying again: the pod's service account may not; it needs a Role with list and watch of endpointslices (discovery.k8s.io) in the namespaces %v: %w",
		slices.Compact(namespaces), err)
}

// signal puts a value into a one-place channel that may have one already.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
