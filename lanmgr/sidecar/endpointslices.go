package sidecar

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

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

// watchEndpointSlices tells the EndpointSlices of Services: once when all are known, and then at each change, until ctx ends. It asks for those
// of these Services in their namespaces alone. fail is told why they are not to be had, and nil when they are again.
func watchEndpointSlices(ctx context.Context, api *rest.Config, services []Service, tell func([]discoveryv1.EndpointSlice), fail func(error)) error {
	for {
		if err := watchOnce(ctx, api, services, tell, fail); !errors.Is(err, errForbidden) {
			return err
		}
	}
}

// errForbidden is told by what was refused, and has waited.
var errForbidden = errors.New("refused")

// forbiddenWait is how long to wait after that. Informers would wait longer and longer, up to a minute, when somebody has long given the right.
const forbiddenWait = 5 * time.Second

func watchOnce(ctx context.Context, api *rest.Config, services []Service, tell func([]discoveryv1.EndpointSlice), fail func(error)) error {
	scheme := runtime.NewScheme()
	if err := discoveryv1.AddToScheme(scheme); err != nil {
		return err
	}
	// One kind of object is not worth a question what the API server has; of it the cache wants to know its list, too.
	mapper := meta.NewDefaultRESTMapper(nil)
	for _, kind := range []string{"EndpointSlice", "EndpointSliceList"} {
		mapper.Add(discoveryv1.SchemeGroupVersion.WithKind(kind), meta.RESTScopeNamespace)
	}
	namespaces, err := selectors(services)
	if err != nil {
		return err
	}
	changed := make(chan struct{}, 1)
	var known atomic.Bool // all of them
	asking, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	api = rest.CopyConfig(api)
	api.Wrap(func(next http.RoundTripper) http.RoundTripper { return reportingTransport{next, &known, fail} })
	c, err := cache.New(api, cache.Options{
		Scheme: scheme, Mapper: mapper, DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{&discoveryv1.EndpointSlice{}: {Namespaces: namespaces}},
		DefaultWatchErrorHandler: func(_ context.Context, _ *toolscache.Reflector, err error) {
			var answer apierrors.APIStatus
			if errors.As(err, &answer) && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) { // those are the ends of every watch
				fail(explain(err, services))
			}
			if apierrors.IsForbidden(err) {
				time.AfterFunc(forbiddenWait, func() { stop(errForbidden) }) // without effect once all are known
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
	poke := func() { signal(changed) }
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
	if !c.WaitForCacheSync(asking) {
		if ctx.Err() != nil {
			return nil
		}
		return errForbidden
	}
	known.Store(true)
	fail(nil)
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
			tell(parts.Items)
		}
	}
}

// reportingTransport hears how the API server answers: that it does not, the informers keep to themselves and try again.
type reportingTransport struct {
	http.RoundTripper
	synced *atomic.Bool
	report func(error)
}

func (e reportingTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := e.RoundTripper.RoundTrip(r)
	switch {
	case err != nil && r.Context().Err() == nil:
		e.report(fmt.Errorf("watch the EndpointSlices, trying again: the API server at %s does not answer: %w", r.URL.Host, withoutPorts(err)))
	case err == nil && answer.StatusCode < http.StatusMultipleChoices && e.synced.Load():
		e.report(nil)
	}
	return answer, err
}

// withoutPorts is an error without the ports of a connection, which are others at each attempt.
func withoutPorts(err error) error {
	if e, ok := errors.AsType[*net.OpError](err); ok {
		return e.Err
	}
	return err
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
