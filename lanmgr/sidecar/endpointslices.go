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
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/lanmgr/notify"
	"github.com/k8slan/k8slan/lanmgr/retry"
)

// sliceWatch watches the EndpointSlices of Services, and no others in their namespaces.
type sliceWatch struct {
	api      *rest.Config
	services []Service
	changed  func([]discoveryv1.EndpointSlice) // called with all, first when all are known
	report   func(error)                       // called with why the API server does not send them; nil: it does again
}

// errForbidden says that the API server refuses the watch.
var errForbidden = errors.New("forbidden")

// forbiddenRetry waits at most 5 s after a refusal. Informers would wait up to a minute when the right was given long
// ago.
var forbiddenRetry = wait.Backoff{Duration: 50 * time.Millisecond, Factor: 2, Steps: 64, Cap: 5 * time.Second}

// run watches until ctx ends. Informers try again after most failures; run does after a refusal.
func (w sliceWatch) run(ctx context.Context) error {
	timer := retry.NewTimer(forbiddenRetry)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		err := w.once(ctx)
		if !errors.Is(err, errForbidden) {
			return err
		}
		timer.Failed(err)
	}
}

// once watches until ctx ends, or the API server refuses before all EndpointSlices are known.
func (w sliceWatch) once(ctx context.Context) error {
	var synced atomic.Bool
	syncing, forbidden := context.WithCancel(ctx)
	defer forbidden()
	c, err := w.newCache(&synced, forbidden)
	if err != nil {
		return fmt.Errorf("watch the EndpointSlices: %w", err)
	}
	informer, err := c.GetInformer(ctx, &discoveryv1.EndpointSlice{}, cache.BlockUntilSynced(false))
	if err != nil {
		return fmt.Errorf("watch the EndpointSlices: %w", err)
	}
	changed := notify.New()
	if _, err := informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { changed.Set() },
		UpdateFunc: func(any, any) { changed.Set() },
		DeleteFunc: func(any) { changed.Set() },
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
	if !c.WaitForCacheSync(syncing) {
		if ctx.Err() != nil {
			return nil
		}
		return errForbidden
	}
	synced.Store(true)
	w.report(nil)
	changed.Set()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			var parts discoveryv1.EndpointSliceList
			if err := c.List(ctx, &parts); err != nil {
				return fmt.Errorf("list the EndpointSlices: %w", err)
			}
			w.changed(parts.Items)
		}
	}
}

// newCache returns a cache of the EndpointSlices. It calls forbidden when the API server refuses to list or watch them.
func (w sliceWatch) newCache(synced *atomic.Bool, forbidden func()) (cache.Cache, error) {
	scheme := runtime.NewScheme()
	if err := discoveryv1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	// A fixed mapper saves asking the API server which kinds it has. The cache looks up the list's kind, too.
	mapper := meta.NewDefaultRESTMapper(nil)
	for _, kind := range []string{"EndpointSlice", "EndpointSliceList"} {
		mapper.Add(discoveryv1.SchemeGroupVersion.WithKind(kind), meta.RESTScopeNamespace)
	}
	namespaces, err := selectors(w.services)
	if err != nil {
		return nil, err
	}
	api := rest.CopyConfig(w.api)
	api.Wrap(func(next http.RoundTripper) http.RoundTripper { return reportingTransport{next, synced, w.report} })
	return cache.New(api, cache.Options{
		Scheme: scheme, Mapper: mapper, DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{&discoveryv1.EndpointSlice{}: {Namespaces: namespaces}},
		DefaultWatchErrorHandler: func(_ context.Context, _ *toolscache.Reflector, err error) {
			var answer apierrors.APIStatus
			watchEnded := apierrors.IsResourceExpired(err) || apierrors.IsGone(err) // in the normal course of things
			if errors.As(err, &answer) && !watchEnded {
				w.report(explain(err, w.services))
			}
			if apierrors.IsForbidden(err) {
				forbidden() // without effect once all are known
			}
		},
	})
}

// reportingTransport reports whether the API server answers. Informers try again without reporting that it does not.
type reportingTransport struct {
	http.RoundTripper
	synced *atomic.Bool
	report func(error)
}

func (t reportingTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := t.RoundTripper.RoundTrip(r)
	switch {
	case err != nil && r.Context().Err() == nil:
		t.report(fmt.Errorf("watch the EndpointSlices, trying again: the API server at %s does not answer: %w",
			r.URL.Host, withoutPorts(err)))
	case err == nil && answer.StatusCode < http.StatusMultipleChoices && t.synced.Load():
		t.report(nil)
	}
	return answer, err
}

// withoutPorts removes the ports of a connection from an error, because they differ at each attempt.
func withoutPorts(err error) error {
	if e, ok := errors.AsType[*net.OpError](err); ok {
		return e.Err
	}
	return err
}

// selectors returns the namespaces of the Services, and for each namespace a selector of their EndpointSlices.
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

// explain adds to an error of the API server what to do about it.
func explain(err error, services []Service) error {
	if !apierrors.IsForbidden(err) {
		return fmt.Errorf("watch the EndpointSlices, trying again: %w", err)
	}
	var namespaces []string
	for _, s := range services {
		namespaces = append(namespaces, s.Namespace)
	}
	slices.Sort(namespaces)
	return fmt.Errorf("watch the EndpointSlices, trying again: the pod's service account may not; it needs a Role "+
		"with list and watch of endpointslices (discovery.k8s.io) in the namespaces %v: %w",
		slices.Compact(namespaces), err)
}
