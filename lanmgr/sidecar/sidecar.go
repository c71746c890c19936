package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/rest"

	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Sidecar is a pod's part in a LAN.
type Sidecar struct {
	Log         *slog.Logger
	Level       *slog.LevelVar               // of Log
	API         func() (*rest.Config, error) // the way to the API server; asked only where there are Services
	Environment []string                     // that hooks get

	netns        *kernel.PodNetns
	filter       *firewall.Filter
	filterName   string
	changed      chan struct{}
	peersChanged chan struct{}

	mu           sync.Mutex
	config       Config
	endpoints    endpoints        // of the Services; nil: not known yet
	want         segment.PodVXLAN // last
	evpn         *evpnMember      // nil without discovery evpn
	evpnProblem  string           // that it last told
	built        bool             // it is as it shall be
	remotes      int              // to how many it sends
	peers        endpoints        // to whom, of the Services
	buildErr     error            // why it is not as it shall be
	endpointsErr error            // why the Services' endpoints are not to be had

	hookPeers endpoints // what the change hook knows of peers; runHooks alone has it
}

// Run has the pod's LAN be as configured until ctx ends, and then takes the interface away. Each configuration from configs takes the place of the one
// before; what it leaves as it was goes on undisturbed. An up hook that fails ends it.
func (s *Sidecar) Run(ctx context.Context, config Config, configs <-chan Config) (err error) {
	if s.netns, err = kernel.OpenPodNetns(); err != nil {
		return err
	}
	defer s.netns.Close()
	s.changed, s.peersChanged = make(chan struct{}, 1), make(chan struct{}, 1)
	s.filterName = "k8slan-" + config.VXLAN.Interface // another LAN of the pod has its own
	s.filter = firewall.New("", s.filterName, s.Log)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var tasks sync.WaitGroup
	task := func(run func(context.Context) error) {
		tasks.Go(func() {
			if err := run(ctx); err != nil {
				cancel(err)
			}
		})
	}
	task(func(ctx context.Context) error { return s.netns.Watch(ctx, func() { signal(s.changed) }) })
	s.setConfig(config)
	task(s.reconcileLoop)
	task(s.runHooks)
	task(s.filter.Run)
	task(s.warnIfNothingArrives)
	server, speaker, watch := s.startServer(ctx, cancel, config), s.startEVPN(ctx, cancel, config), s.startWatch(ctx, cancel, config)
	for {
		select {
		case <-ctx.Done():
			server.stop()
			watch.stop()
			speaker.stop()
			tasks.Wait()
			if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
				err = cause
			}
			return errors.Join(err, s.removeInterface())
		case next := <-configs:
			old := config
			config = next
			s.setConfig(config)
			if config.HTTPAddress != old.HTTPAddress {
				server.stop()
				server = s.startServer(ctx, cancel, config)
			}
			anew := config.needsNewInstance(old)
			if anew {
				speaker.stop()
				speaker = s.startEVPN(ctx, cancel, config)
			} else if joined := s.evpnMember(); joined != nil {
				if err := joined.SetPeers(ctx, config.EVPN.peers, config.EVPN.reflectorPassword); err != nil {
					s.Log.Error("cannot speak with every router", "err", err)
				}
			}
			if anew || !slices.Equal(config.watchedServices(), old.watchedServices()) || config.ReadyOnly != old.ReadyOnly {
				watch.stop()
				watch = s.startWatch(ctx, cancel, config)
			}
		}
	}
}

// task is what runs for as long as a part of the configuration stays.
type task struct {
	cancel context.CancelFunc
	ended  chan struct{}
}

func startTask(ctx context.Context, run func(context.Context)) task {
	ctx, cancel := context.WithCancel(ctx)
	p := task{cancel, make(chan struct{})}
	go func() {
		defer close(p.ended)
		run(ctx)
	}()
	return p
}

func (p task) stop() {
	p.cancel()
	<-p.ended
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
		asked := c.watchedServices()
		if len(asked) == 0 {
			return
		}
		api, err := s.API()
		if err == nil {
			err = watchEndpointSlices(ctx, api, asked, func(parts []discoveryv1.EndpointSlice) {
				s.setEndpoints(endpointsOf(c.Services, parts, c.ReadyOnly))
				s.setReflectors(ctx, c.EVPN.Reflectors, parts)
			}, s.setEndpointsErr)
		}
		if err != nil {
			fail(err)
		}
	})
}

// setConfig notes another configuration.
func (s *Sidecar) setConfig(c Config) {
	s.Level.Set(c.LogLevel.Slog())
	s.mu.Lock()
	defer s.mu.Unlock()
	s.config = c
	if len(c.Services) > 0 && len(s.endpoints) == 0 { // there were none to know
		s.endpoints = nil
	}
	signal(s.changed)
}

// setEndpoints takes in the endpoints of all Services.
func (s *Sidecar) setEndpoints(all endpoints) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endpoints = all
	signal(s.changed)
}

// setEndpointsErr takes in why they are not to be had, nil where they are again.
func (s *Sidecar) setEndpointsErr(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil && s.endpointsErr != nil:
		s.Log.Info("the API server tells of endpoints again")
	case err != nil && (s.endpointsErr == nil || s.endpointsErr.Error() != err.Error()):
		s.Log.Error("peers stay as they are", "err", err)
	}
	s.endpointsErr = err
}

const (
	firstDelay = 50 * time.Millisecond
	lastDelay  = 15 * time.Second
)

// reconcileLoop brings the interface in order whenever something may have changed.
func (s *Sidecar) reconcileLoop(ctx context.Context) error {
	retry := time.NewTimer(0)
	defer retry.Stop()
	delay := firstDelay
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.changed:
		case <-retry.C:
		}
		err := s.reconcile(ctx)
		var hook *hookError
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.As(err, &hook):
			return err
		case err != nil:
			retry.Reset(delay)
			delay = min(2*delay, lastDelay)
		default:
			delay = firstDelay
		}
		s.mu.Lock()
		if err != nil && (s.buildErr == nil || s.buildErr.Error() != err.Error()) {
			s.Log.Error("the interface is not as it should be, trying again", "err", err)
		}
		s.buildErr, s.built = err, err == nil
		s.mu.Unlock()
	}
}

// hookError is an up hook that failed.
type hookError struct{ error }

// reconcile brings the interface in order once.
func (s *Sidecar) reconcile(ctx context.Context) error {
	s.mu.Lock()
	config, all, joined, was := s.config, s.endpoints, s.evpn, s.want.VXLAN.Name
	s.mu.Unlock()
	address, mtu, err := s.addressAndMTU(config)
	if err != nil {
		return err
	}
	more := endpoints{Service{}: config.Peers}
	peers := all.peers(address, config.IP)
	want := segment.PodVXLAN{
		VXLAN: segment.VXLAN{Name: config.VXLAN.Interface, VNI: config.VXLAN.VNI, Port: config.VXLAN.Port, Local: address},
		MTU:   mtu, MAC: config.mac(), Addresses: config.VXLAN.Addresses,
		Remotes: sorted(append(peers.union(), more.peers(address, config.IP).union()...)), Partial: all == nil,
	}
	if config.Discovery == EVPNDiscovery {
		joined.fill(&want)
	}
	if was != "" && was != want.VXLAN.Name {
		if err := s.netns.Remove(was); err != nil {
			return fmt.Errorf("remove %s: %w", was, err)
		}
	}
	s.locked(func() { s.want = want })
	var have segment.PodVXLANState
	for {
		var anew bool
		if have, anew, err = s.apply(ctx, config, want); err != nil {
			return err
		}
		if !anew {
			break
		}
		if len(config.Hooks.Up) > 0 {
			if err := runHook(ctx, s.Log, "up", config.Hooks, config.Hooks.Up, s.Environment, "IFACE="+want.VXLAN.Name); err != nil {
				return &hookError{err}
			}
		}
		want.Prepared = true
	}
	if joined != nil && have.Link.Index != 0 {
		s.setEVPN(joined, want, have)
	}
	s.locked(func() {
		if all != nil {
			s.peers = peers
			signal(s.peersChanged)
		}
	})
	return nil
}

// apply does what is to be done about what there is, and says whether there is an interface now that is not prepared.
func (s *Sidecar) apply(ctx context.Context, config Config, want segment.PodVXLAN) (have segment.PodVXLANState, anew bool, err error) {
	if have, err = s.netns.Observe(want.VXLAN.Name); err != nil {
		return have, false, err
	}
	ops, err := segment.DiffPodVXLAN(want, have)
	if err != nil {
		return have, false, err
	}
	remotes := want.Remotes
	if want.Partial {
		remotes = sorted(append(slices.Clone(have.Link.VXLAN.Remotes), remotes...))
	}
	s.setFilter(config, want.VXLAN, remotes)
	anew = !want.Prepared && !have.Prepared()
	for _, op := range ops {
		if _, ok := op.(segment.AddVXLAN); ok && !want.Prepared {
			anew = true
		}
		s.Log.Debug("done", "op", op.String())
	}
	if err := s.netns.Apply(ctx, ops); err != nil {
		return have, false, err
	}
	if len(ops) > 0 {
		s.Log.Info("interface changed", "interface", want.VXLAN.Name, "ops", len(ops), "peers", len(want.Remotes))
	}
	s.locked(func() { s.remotes = len(remotes) })
	return have, anew, nil
}

func (s *Sidecar) locked(what func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	what()
}

// overhead4 and overhead6 are what a VXLAN adds to a frame's payload, in bytes: inner Ethernet, VXLAN, UDP and IP. It is what kubelan takes
// off, so that pods of both agree; frames with VLAN tags have so much less. With discovery evpn it is what nodes take off.
const (
	overhead4 = 50
	overhead6 = 70
)

// addressAndMTU is the pod's address that packets of the LAN bear, and the LAN's MTU.
func (s *Sidecar) addressAndMTU(c Config) (address netip.Addr, mtu int, err error) {
	if i := slices.IndexFunc(c.IP, c.isOfFamily); i >= 0 {
		address = c.IP[i]
	} else if address, err = s.netns.SourceAddress(c.IPFamily != "ipv6", c.IPFamily != "ipv4"); err != nil {
		return address, 0, err
	}
	if !address.IsValid() {
		return address, 0, errors.New("the pod has no default route whose address could be its own: set ip, from status.podIP")
	}
	link, mtu, err := s.netns.LinkByAddress(address)
	switch {
	case err != nil:
		return address, 0, err
	case link == "":
		return address, 0, fmt.Errorf("no interface of the pod has the address %s: set ip from status.podIP, or leave it out", address)
	case c.VXLAN.MTU > 0:
		return address, c.VXLAN.MTU, nil
	case c.Discovery == EVPNDiscovery && address.Is4():
		return address, mtu - segment.Overhead4, nil
	case c.Discovery == EVPNDiscovery:
		return address, mtu - segment.Overhead6, nil
	case address.Is4():
		return address, mtu - overhead4, nil
	}
	return address, mtu - overhead6, nil
}

// mac is the interface's: as requested, or one of the pod's name, or nil where that is not known.
func (c *Config) mac() net.HardwareAddr {
	if mac, err := net.ParseMAC(c.VXLAN.MAC); err == nil {
		return mac
	}
	if c.Namespace == "" || c.Pod == "" {
		return nil
	}
	return segment.PodVXLANMAC(c.Namespace, c.Pod, c.VXLAN.Interface)
}

// setFilter says whose packets are heard: of those to whom the pod sends, once there are any.
func (s *Sidecar) setFilter(c Config, v segment.VXLAN, remotes []netip.Addr) {
	var lans []firewall.LAN
	if c.StrictPeers {
		lans = []firewall.LAN{{Name: v.Name, Port: v.Port, VNI: v.VNI, Members: remotes}}
	}
	s.filter.Set(lans)
}

// runHooks tells the change hook what became of peers, one Service after the other; what changes meanwhile is told next.
func (s *Sidecar) runHooks(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.peersChanged:
		}
		for ctx.Err() == nil {
			s.mu.Lock()
			config, is := s.config, s.peers
			s.mu.Unlock()
			all := changes(s.hookPeers, is)
			if len(config.Hooks.Change) == 0 || len(all) == 0 {
				s.hookPeers = is
				break
			}
			next := all[0]
			if err := runHook(ctx, s.Log, "change", config.Hooks, config.Hooks.Change, s.Environment, changeVariables(config.VXLAN.Interface, next)...); err != nil && ctx.Err() == nil {
				s.Log.Error("the LAN goes on without it", "err", err)
			}
			s.hookPeers = s.hookPeers.apply(next)
		}
	}
}

// apply are the endpoints after a change.
func (e endpoints) apply(c change) endpoints {
	next := maps.Clone(e)
	if next == nil {
		next = endpoints{}
	}
	if c.deleted {
		next[c.service] = difference(next[c.service], c.ips)
	} else {
		next[c.service] = sorted(append(slices.Clone(next[c.service]), c.ips...))
	}
	return next
}

// removeInterface takes away what the pod has of the LAN.
func (s *Sidecar) removeInterface() error {
	name := s.want.VXLAN.Name
	if name == "" {
		return nil
	}
	err := s.netns.Remove(name)
	if s.config.StrictPeers {
		err = errors.Join(err, firewall.Remove("", s.filterName))
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	s.Log.Info("interface removed", "interface", name)
	return nil
}
