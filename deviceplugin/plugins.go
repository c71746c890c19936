// Package deviceplugin advertises each spoke and each pool to kubelet as a resource of its own, through one device
// plugin for each.
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

	"github.com/k8slan/k8slan/lanmgr/notify"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Dir is kubelet's plugin directory if kubelet has its default root directory.
const Dir = "/var/lib/kubelet/device-plugins"

// Spoke is one spoke, or one pool, as this node advertises it.
type Spoke struct {
	Name    string
	Ports   int  // of a pool; 0 for a single spoke
	Healthy bool // a pod can attach to it now
}

// devices returns the IDs of the devices from which kubelet chooses: the name of the spoke, or those of the ports.
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

// Plugins are the device plugins of one node, one for each advertised spoke.
type Plugins struct {
	dir     string
	log     *slog.Logger
	kubelet *registrar
	changed notify.Flag // the advertised spokes changed, or a plugin has ended

	mu         sync.Mutex
	advertised map[string]Spoke   // by name
	running    map[string]*plugin // all that have not ended, advertised or not
}

// New returns the device plugins of the node whose kubelet has its plugin directory at dir, an absolute path.
// dir need not exist yet. Nothing is advertised before Set and Run.
func New(dir string, log *slog.Logger) *Plugins {
	dir = filepath.Clean(dir)
	return &Plugins{
		dir:     dir,
		log:     log,
		kubelet: newRegistrar(filepath.Join(dir, kubeletSocket)),
		changed: notify.New(),
		running: make(map[string]*plugin),
	}
}

// OnRegistration sets a function that receives the result of each registration with kubelet. Call it before Run.
func (p *Plugins) OnRegistration(receive func(error)) { p.kubelet.onRegistration = receive }

// Registered returns how many advertised spokes, and ports of advertised pools, are registered with kubelet.
func (p *Plugins) Registered() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	registered := 0
	for name, spoke := range p.advertised {
		if p.isRegistered(name) {
			registered += max(spoke.Ports, 1)
		}
	}
	return registered
}

func (p *Plugins) isRegistered(name string) bool {
	plugin := p.running[name]
	return plugin != nil && plugin.registered.Load()
}

// Set replaces the advertised spokes. It never blocks.
func (p *Plugins) Set(spokes []Spoke) {
	set := make(map[string]Spoke, len(spokes))
	for _, s := range spokes {
		set[s.Name] = s
	}
	p.mu.Lock()
	p.advertised = set
	p.mu.Unlock()
	p.changed.Set()
}

// Ready returns nil if every advertised spoke is registered with kubelet.
func (p *Plugins) Ready() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	missing := 0
	for name := range p.advertised {
		if !p.isRegistered(name) {
			missing++
		}
	}
	if missing > 0 {
		return fmt.Errorf("%d of %d spokes are not registered with kubelet yet", missing, len(p.advertised))
	}
	return nil
}

// Run advertises the spokes of Set until ctx ends; then it stops every plugin and returns nil. It returns an error if
// the plugin directory cannot be watched.
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
			p.notifyAll() // events were lost, so every plugin checks its sockets
		}
	}
}

// reconcile starts the plugins of advertised spokes and stops the others. If a spoke is advertised again before its
// plugin has ended, the new plugin starts only after that: two servers of one resource must never overlap (see
// server.stop).
func (p *Plugins) reconcile(ctx context.Context, plugins *sync.WaitGroup) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, plugin := range p.running {
		if _, ok := p.advertised[name]; !ok {
			plugin.cancel()
		}
	}
	for name, spoke := range p.advertised {
		if plugin := p.running[name]; plugin != nil {
			plugin.advertised.set(spoke)
			continue
		}
		pluginCtx, cancel := context.WithCancel(ctx)
		plugin := newPlugin(p.dir, spoke, p.kubelet, p.log.With("spoke", name))
		plugin.cancel = cancel
		p.running[name] = plugin
		plugins.Go(func() {
			defer p.forget(plugin)
			plugin.run(pluginCtx)
		})
	}
}

// forget removes a plugin that has ended.
func (p *Plugins) forget(plugin *plugin) {
	plugin.cancel()
	p.mu.Lock()
	delete(p.running, plugin.name)
	p.mu.Unlock()
	p.changed.Set()
}

// dispatch notifies the plugins that an event concerns. Each plugin then checks the sockets itself.
func (p *Plugins) dispatch(watch *dirWatch, event fsnotify.Event) error {
	moved, err := watch.follow(event)
	if err != nil {
		return err
	}
	name := filepath.Base(event.Name)
	switch {
	case moved, name == kubeletSocket && event.Has(fsnotify.Create):
		p.log.Info("kubelet's plugin directory or socket is new, registering all spokes")
		p.notifyAll()
	case event.Has(fsnotify.Remove), event.Has(fsnotify.Rename):
		p.mu.Lock()
		defer p.mu.Unlock()
		if spoke, ok := spokeOf(name); ok && p.running[spoke] != nil {
			p.running[spoke].dirChanged.Set()
		}
	}
	return nil
}

func (p *Plugins) notifyAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, plugin := range p.running {
		plugin.dirChanged.Set()
	}
}

// removeStaleSockets removes the sockets of an earlier run that was killed.
func (p *Plugins) removeStaleSockets() error {
	entries, err := os.ReadDir(p.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if _, isSpoke := spokeOf(entry.Name()); !isSpoke || entry.Type() != fs.ModeSocket {
			continue
		}
		if err := os.Remove(filepath.Join(p.dir, entry.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
