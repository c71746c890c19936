// Package sidecar joins a pod to a LAN from within the pod: it makes a VXLAN in the pod's own network namespace, whose
// remotes are the endpoints of Services. It reads kubelan's configuration.
package sidecar

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"

	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/rest"

	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/notify"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Sidecar joins one pod to one LAN.
type Sidecar struct {
	Log         *slog.Logger
	Level       *slog.LevelVar               // of Log
	API         func() (*rest.Config, error) // of the API server; called only if Services are configured
	Environment []string                     // of hooks

	netns        *kernel.PodNetns
	filter       *firewall.Filter
	filterName   string
	changed      notify.Flag // the interface may differ from what it should be
	peersChanged notify.Flag // the change hook may have to run

	mu           sync.Mutex
	config       Config
	endpoints    endpoints        // of the Services; nil: not known yet
	want         segment.PodVXLAN // as last reconciled
	evpn         *evpnMember      // nil without discovery evpn
	evpnProblem  string           // as last logged
	built        bool             // the interface is as it should be
	remotes      int              // how many the interface has
	peers        endpoints        // those of endpoints that are remotes
	buildErr     error            // why the interface is not as it should be
	endpointsErr error            // why the API server does not send endpoints

	hookPeers endpoints // the peers that the change hook has been called with; belongs to runHooks
}

// configured are the tasks that depend on parts of the configuration. Each is replaced when its part changes.
type configured struct {
	server, evpn, watch task
}

// Run keeps the interface as configured until ctx ends, and then removes it. Each configuration from configs replaces
// the one before; what it does not change stays undisturbed. Run also ends when an up hook fails.
func (s *Sidecar) Run(ctx context.Context, config Config, configs <-chan Config) (err error) {
	if s.netns, err = kernel.OpenPodNetns(); err != nil {
		return err
	}
	defer s.netns.Close()
	s.changed, s.peersChanged = notify.New(), notify.New()
	s.filterName = "k8slan-" + config.VXLAN.Interface // another sidecar of the pod has another interface
	s.filter = firewall.New("", s.filterName, s.Log)
	s.setConfig(config)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var tasks sync.WaitGroup
	for _, run := range []func(context.Context) error{
		s.watchNetns, s.reconcileLoop, s.runChangeHooks, s.filter.Run, s.warnIfNothingArrives,
	} {
		tasks.Go(func() {
			if err := run(ctx); err != nil {
				cancel(err)
			}
		})
	}
	parts := configured{
		s.startServer(ctx, cancel, config), s.startEVPN(ctx, cancel, config), s.startWatch(ctx, cancel, config),
	}
	for {
		select {
		case <-ctx.Done():
			parts.server.stop()
			parts.watch.stop()
			parts.evpn.stop()
			tasks.Wait()
			if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
				err = cause
			}
			return errors.Join(err, s.removeInterface())
		case next := <-configs:
			s.reconfigure(ctx, cancel, &parts, config, next)
			config = next
		}
	}
}

// reconfigure replaces the configuration, and the tasks for which it has changed.
func (s *Sidecar) reconfigure(
	ctx context.Context, fail context.CancelCauseFunc, parts *configured, config, next Config,
) {
	s.setConfig(next)
	if next.HTTPAddress != config.HTTPAddress {
		parts.server.stop()
		parts.server = s.startServer(ctx, fail, next)
	}
	newInstance := next.needsNewInstance(config)
	if newInstance {
		parts.evpn.stop()
		parts.evpn = s.startEVPN(ctx, fail, next)
	} else {
		s.setBGPPeers(ctx, next)
	}
	watched := slices.Equal(next.watchedServices(), config.watchedServices()) && next.ReadyOnly == config.ReadyOnly
	if newInstance || !watched {
		parts.watch.stop()
		parts.watch = s.startWatch(ctx, fail, next)
	}
}

// setConfig stores another configuration and lets the interface be reconciled.
func (s *Sidecar) setConfig(c Config) {
	s.Level.Set(c.LogLevel.Slog())
	s.mu.Lock()
	defer s.mu.Unlock()
	s.config = c
	if len(c.Services) > 0 && len(s.endpoints) == 0 { // without Services they were known to be none
		s.endpoints = nil
	}
	s.changed.Set()
}

// watchNetns watches the pod's links, addresses and routes.
func (s *Sidecar) watchNetns(ctx context.Context) error { return watch.PodNetns(ctx, s.changed.Set) }

// task is a goroutine that can be stopped before ctx ends.
type task struct {
	cancel context.CancelFunc
	ended  chan struct{}
}

func startTask(ctx context.Context, run func(context.Context)) task {
	ctx, cancel := context.WithCancel(ctx)
	t := task{cancel, make(chan struct{})}
	go func() {
		defer close(t.ended)
		run(ctx)
	}()
	return t
}

// stop stops the goroutine and waits for its end.
func (t task) stop() {
	t.cancel()
	<-t.ended
}

func (s *Sidecar) startServer(ctx context.Context, fail context.CancelCauseFunc, c Config) task {
	return startTask(ctx, func(ctx context.Context) {
		if err := s.serve(ctx, c.HTTPAddress); err != nil {
			fail(err)
		}
	})
}

func (s *Sidecar) startWatch(ctx context.Context, fail context.CancelCauseFunc, c Config) task {
	return startTask(ctx, func(ctx context.Context) {
		if len(c.Services) == 0 {
			s.setEndpoints(endpoints{})
		}
		watched := c.watchedServices()
		if len(watched) == 0 {
			return
		}
		api, err := s.API()
		if err == nil {
			err = sliceWatch{
				api: api, services: watched, report: s.setEndpointsErr,
				changed: func(parts []discoveryv1.EndpointSlice) {
					s.setEndpoints(endpointsOf(c.Services, parts, c.ReadyOnly))
					s.setReflectors(ctx, c.EVPN.Reflectors, parts)
				},
			}.run(ctx)
		}
		if err != nil {
			fail(err)
		}
	})
}

// setEndpoints stores the endpoints of all Services.
func (s *Sidecar) setEndpoints(all endpoints) {
	s.locked(func() { s.endpoints = all })
	s.changed.Set()
}

// setEndpointsErr stores why the API server does not send endpoints; nil: it does.
func (s *Sidecar) setEndpointsErr(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil && s.endpointsErr != nil:
		s.Log.Info("the API server sends endpoints again")
	case err != nil && (s.endpointsErr == nil || s.endpointsErr.Error() != err.Error()):
		s.Log.Error("peers stay as they are", "err", err)
	}
	s.endpointsErr = err
}

// locked calls do with s.mu held.
func (s *Sidecar) locked(do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	do()
}
