// Package strangers keeps VXLAN packets of strangers, who are no members of the LAN that they bear the VNI of, from its pods.
package firewall

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Filter makes a node's netfilter drop what strangers send, and keeps it so. What stands there stays when it ends.
type Filter struct {
	table   table
	log     *slog.Logger
	wake    chan struct{}
	changed chan struct{}

	mu   sync.Mutex
	lans []LAN
	set  bool // Set was called
	err  error
}

// New returns a filter that does nothing until its first Set and Run. hostNetns is the path of the node's own network namespace;
// empty: that of the calling thread, and of all others. name is that of the table, which nobody else has.
func New(hostNetns, name string, log *slog.Logger) *Filter {
	return &Filter{table: table{hostNetns, name}, log: log, wake: make(chan struct{}, 1), changed: make(chan struct{}, 1)}
}

// Set says which LANs hear their members alone; it replaces what was said before.
func (f *Filter) Set(lans []LAN) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.set && slices.EqualFunc(f.lans, lans, LAN.equal) {
		return
	}
	f.lans, f.set = slices.Clone(lans), true
	signal(f.wake)
}

// Err is why strangers are heard, nil where they are not.
func (f *Filter) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Changed has a value whenever Err may have changed since the last one was taken from it.
func (f *Filter) Changed() <-chan struct{} { return f.changed }

// Dropped are the packets of strangers that were dropped, by the LAN's name. The kernel counts them for as long as the LAN hears its
// members alone, whether the daemon runs or not. What cannot be read now is not told.
func (f *Filter) Dropped() map[string]uint64 {
	f.mu.Lock()
	some := len(f.lans) > 0
	f.mu.Unlock()
	if !some {
		return nil
	}
	s, err := f.table.observe(lansSet)
	if err != nil {
		f.log.Warn("cannot read how many packets of strangers were dropped", "err", err)
	}
	return s.dropped
}

// Remove takes all of it off a node; what is not there is no error. hostNetns and name are as for New.
func Remove(hostNetns, name string) error { return table{hostNetns, name}.remove() }

// Accepts says which addresses a LAN's packets are taken from, in the namespace of the calling thread, as the kernel has it now: any, where
// the LAN is not strict.
func Accepts(port uint16, vni uint32) (func(netip.Addr) bool, error) {
	s, err := table{name: TableName}.observe(lansSet, members4Set, members6Set)
	if err != nil && !unsupported(err) {
		return nil, err
	}
	lan := lanKey(port, vni)
	_, strict := s.elements[lansSet][lan]
	return func(from netip.Addr) bool {
		set, key := memberKey(lan, from)
		_, member := s.elements[set][key]
		return member || !strict
	}, nil
}

const (
	firstDelay = 50 * time.Millisecond
	lastDelay  = 15 * time.Second
	// minPause is how long the table rests after a look, or four times as long as the look took if that is longer, but then no longer
	// than longest, or as the look took: strangers are to be dropped again soon after somebody has flushed the node's ruleset.
	minPause = 10 * time.Millisecond
	maxPause = 400 * time.Millisecond
)

// Run works until ctx ends. What fails is tried again for as long as it takes.
func (f *Filter) Run(ctx context.Context) error {
	var watch sync.WaitGroup
	defer watch.Wait()
	watched := false
	retry := time.NewTimer(0)
	defer retry.Stop()
	delay := firstDelay
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.wake:
		case <-retry.C:
		}
		f.mu.Lock()
		lans, set, before := f.lans, f.set, f.err
		f.mu.Unlock()
		if !set {
			continue
		}
		if !watched && slices.ContainsFunc(lans, LAN.known) {
			watched = true
			watch.Go(func() { f.watch(ctx) })
		}
		began := time.Now()
		err := f.reconcile(lans)
		if err == nil {
			delay = firstDelay
		} else {
			if before == nil || before.Error() != err.Error() {
				f.log.Error("cannot filter strangers' packets, trying again", "err", err)
			}
			retry.Reset(delay)
			delay = min(2*delay, lastDelay)
		}
		f.mu.Lock()
		f.err = err
		f.mu.Unlock()
		if (before == nil) != (err == nil) {
			signal(f.changed)
		}
		took := time.Since(began)
		rest := time.NewTimer(max(minPause, took, min(4*took, maxPause)))
		select {
		case <-ctx.Done():
		case <-rest.C:
		}
		rest.Stop()
	}
}

// reconcile makes the table what is wanted. Where no LAN is, there is none.
func (f *Filter) reconcile(lans []LAN) error {
	have, err := f.table.observe(slices.Collect(maps.Keys(setKeys))...)
	if err != nil {
		if unsupported(err) && !slices.ContainsFunc(lans, LAN.known) {
			return nil
		}
		return err
	}
	want := desired(lans, have.elements)
	if len(want[lansSet]) == 0 {
		if !have.exists {
			return nil
		}
		f.log.Info("no LAN is strict, the filter of strangers goes", "table", "inet "+f.table.name)
		return f.table.remove()
	}
	if !have.intact {
		if err := f.table.create(have.exists); err != nil {
			return err
		}
		f.log.Info("filter of strangers made", "table", "inet "+f.table.name, "anew", have.exists)
		have.elements = newElements()
	}
	all := steps(want, have.elements)
	for _, s := range all {
		if err := f.table.apply(s); err != nil {
			return err
		}
		f.log.Debug("done", "op", s.nft(f.table.name))
	}
	if len(all) > 0 {
		f.log.Info("filter of strangers changed", "lans", len(want[lansSet]), "members", len(want[members4Set])+len(want[members6Set]), "steps", len(all))
	}
	return nil
}

// watch pokes whenever somebody changed the table, until ctx ends.
func (f *Filter) watch(ctx context.Context) {
	retry := time.NewTimer(0)
	defer retry.Stop()
	delay, last := firstDelay, ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-retry.C:
		}
		err := f.watchOnce(ctx, func() { delay, last = firstDelay, "" })
		if ctx.Err() != nil {
			return
		}
		if err.Error() != last {
			f.log.Error("cannot watch nftables, trying again", "err", err)
			last = err.Error()
		}
		retry.Reset(delay)
		delay = min(2*delay, lastDelay)
	}
}

// watchOnce pokes for each change of the table, and once when none can be missed any more, which it also tells.
func (f *Filter) watchOnce(ctx context.Context, hears func()) error {
	c, err := f.table.subscribe()
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	hears()
	signal(f.wake)
	for {
		events, err := c.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS): // some were lost
			signal(f.wake)
		case err != nil:
			return err
		case slices.ContainsFunc(events, f.table.isOwnEvent):
			signal(f.wake)
		}
	}
}

// signal puts a value into a one-place channel that may have one already.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
