// Package deviceplugin offers each spoke and each pool to kubelet as a resource of its own, through one device plugin for each.
package deviceplugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/fsnotify/fsnotify"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Dir is kubelet's plugin directory where its root directory is the usual one.
const Dir = "/var/lib/kubelet/device-plugins"

// Spoke is one spoke, or one pool, as this node offers it.
type Spoke struct {
	Name    string
	Ports   int  // of a pool; 0 for a single spoke
	Healthy bool // a pod may have it now
}

// devices are the IDs of the devices that kubelet gets to choose from: the spokes' names.
func (s Spoke) devices() []string {
	if s.Ports == 0 {
		return []string{s.Name}
	}
	ids := make([]string, s.Ports)
	for number := range ids {
		ids[number] = segment.Port(s.Name, number)
	}
	return ids
}

// Plugins are the device plugins of one node, one for each spoke on offer.
type Plugins struct {
	dir     string
	log     *slog.Logger
	kubelet *registrar
	changed chan struct{} // one slot: the offer changed, or a plugin has ended

	mu         sync.Mutex
	advertised map[string]Spoke   // by name
	running    map[string]*plugin // those that have not ended, offered or not
}

// New makes the device plugins of the node whose kubelet has its plugin directory at dir, an absolute path.
// dir may not be there yet. Nothing is offered before Set and Run.
func New(dir string, log *slog.Logger) *Plugins {
	dir = filepath.Clean(dir)
	return &Plugins{
		dir:     dir,
		log:     log,
		kubelet: newRegistrar(filepath.Join(dir, kubeletSocket)),
		changed: make(chan struct{}, 1),
		running: make(map[string]*plugin),
	}
}

// OnRegistration has told hear how each registration with kubelet ended, nil for well. It is called before Run.
func (p *Plugins) OnRegistration(told func(error)) { p.kubelet.onRegistration = told }

// Registered is how many spokes, and ports of pools, on offer kubelet knows.
func (p *Plugins) Registered() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	registered := 0
	for name, offer := range p.advertised {
		if p.isRegistered(name) {
			registered += max(offer.Ports, 1)
		}
	}
	return registered
}

func (p *Plugins) isRegistered(name string) bool {
	s := p.running[name]
	return s != nil && s.registered.Load()
}

// Set says which spokes are on offer from now on; it replaces the last set and never blocks.
func (p *Plugins) Set(offered []Spoke) {
	set := make(map[string]Spoke, len(offered))
	for _, s := range offered {
		set[s.Name] = s
	}
	p.mu.Lock()
	p.advertised = set
	p.mu.Unlock()
	p.signal()
}

// Ready is nil when kubelet knows every spoke on offer.
func (p *Plugins) Ready() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	unknown := 0
	for name := range p.advertised {
		if !p.isRegistered(name) {
			unknown++
		}
	}
	if unknown > 0 {
		return fmt.Errorf("%d of %d spokes are not registered with kubelet yet", unknown, len(p.advertised))
	}
	return nil
}

// Run offers what is Set until ctx ends; then it ends every plugin and returns nil. An error means that the
// plugin directory cannot be watched.
func (p *Plugins) Run(ctx context.Context) error {
	watch, err := newDirWatch(p.dir)
	if err != nil {
		return fmt.Errorf("watch kubelet's plugin directory %s: %w", p.dir, err)
	}
	defer watch.close()
	if err := p.removeStaleSockets(); err != nil {
		return fmt.Errorf("remove sockets of an earlier run from %s: %w", p.dir, err)
	}

	var plugins sync.WaitGroup
	defer plugins.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		p.reconcile(ctx, &plugins)
		select {
		case <-ctx.Done():
			return nil
		case <-p.changed:
		case event := <-watch.events():
			if err := p.dispatch(watch, event); err != nil {
				return fmt.Errorf("watch kubelet's plugin directory %s: %w", p.dir, err)
			}
		case err := <-watch.errors():
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				return fmt.Errorf("watch kubelet's plugin directory %s: %w", p.dir, err)
			}
			p.notifyAll() // events were lost: everybody looks for himself
		}
	}
}

// reconcile starts the plugins that are offered and ends those that are not. One that is offered again before it
// has ended is started when it has: two servers of one resource must never overlap (see server.end).
func (p *Plugins) reconcile(ctx context.Context, plugins *sync.WaitGroup) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, s := range p.running {
		if _, ok := p.advertised[name]; !ok {
			s.cancel()
		}
	}
	for name, offer := range p.advertised {
		if s := p.running[name]; s != nil {
			s.advertised.set(offer)
			continue
		}
		pluginCtx, cancel := context.WithCancel(ctx)
		s := newPlugin(p.dir, offer, p.kubelet, p.log.With("spoke", name))
		s.cancel = cancel
		p.running[name] = s
		plugins.Go(func() {
			defer p.forget(s)
			s.run(pluginCtx)
		})
	}
}

func (p *Plugins) forget(s *plugin) {
	s.cancel()
	p.mu.Lock()
	delete(p.running, s.name)
	p.mu.Unlock()
	p.signal()
}

func (p *Plugins) signal() {
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// dispatch tells the plugins that an event concerns to look again; what they then do rests on what they see.
func (p *Plugins) dispatch(watch *dirWatch, event fsnotify.Event) error {
	followed, err := watch.follow(event)
	if err != nil {
		return err
	}
	name := filepath.Base(event.Name)
	switch {
	case followed, name == kubeletSocket && event.Has(fsnotify.Create):
		p.log.Info("kubelet's plugin directory or socket is new, registering what is offered")
		p.notifyAll()
	case event.Has(fsnotify.Remove), event.Has(fsnotify.Rename):
		p.mu.Lock()
		defer p.mu.Unlock()
		if spoke, ok := spokeOf(name); ok && p.running[spoke] != nil {
			p.running[spoke].notify()
		}
	}
	return nil
}

func (p *Plugins) notifyAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.running {
		s.notify()
	}
}

// removeStaleSockets removes the sockets that an earlier run left behind because it was killed.
func (p *Plugins) removeStaleSockets() error {
	entries, err := os.ReadDir(p.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if _, ours := spokeOf(entry.Name()); !ours || entry.Type() != fs.ModeSocket {
			continue
		}
		if err := os.Remove(filepath.Join(p.dir, entry.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
