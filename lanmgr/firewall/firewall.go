// Package firewall keeps the node's nftables table, which drops VXLAN packets whose source is not a member of their
// LAN.
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

	"github.com/k8slan/k8slan/lanmgr/notify"
	"github.com/k8slan/k8slan/lanmgr/retry"
)

// Filter reconciles the table of one network namespace. The table stays when the filter ends.
type Filter struct {
	table   table
	log     *slog.Logger
	wake    notify.Flag
	changed notify.Flag

	mu   sync.Mutex
	lans []LAN
	set  bool // Set was called
	err  error
}

// New returns a filter that does nothing until its first Set and Run. hostNetns is the path of the network namespace
// that receives the VXLAN packets; empty: that of the calling thread, and of all other threads. name is the table's
// name, which no other program may use.
func New(hostNetns, name string, log *slog.Logger) *Filter {
	return &Filter{table: table{hostNetns, name}, log: log, wake: notify.New(), changed: notify.New()}
}

// Set sets which LANs accept packets from their members only. It replaces the LANs of the last call.
func (f *Filter) Set(lans []LAN) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.set && slices.EqualFunc(f.lans, lans, LAN.equal) {
		return
	}
	f.lans, f.set = slices.Clone(lans), true
	f.wake.Set()
}

// Err returns why packets of non-members may be accepted. It is nil while they are dropped.
func (f *Filter) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *Filter) setErr(err error) {
	f.mu.Lock()
	before := f.err
	f.err = err
	f.mu.Unlock()
	if (before == nil) != (err == nil) {
		f.changed.Set()
	}
}

// Changed has a value when Err may have changed since the last value was received.
func (f *Filter) Changed() <-chan struct{} { return f.changed }

// Dropped returns how many packets of non-members were dropped, by the LAN's name. The kernel counts them for as long
// as the LAN is in the table, whether the daemon runs or not. If the table cannot be read, the result is empty.
func (f *Filter) Dropped() map[string]uint64 {
	f.mu.Lock()
	some := len(f.lans) > 0
	f.mu.Unlock()
	if !some {
		return nil
	}
	s, err := f.table.observe(lansSet)
	if err != nil {
		f.log.Warn("cannot read how many packets of non-members were dropped", "err", err)
	}
	return s.dropped
}

// Remove deletes the table from a node. It is no error if there is none. hostNetns and name are as for New.
func Remove(hostNetns, name string) error { return table{hostNetns, name}.remove() }

// Accepts returns a function that reports whether packets of a LAN are accepted from an address. It reads the table in
// the namespace of the calling thread, once. A LAN that is not strict accepts packets from any address.
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

// The pause after a reconciliation is four times as long as that took, within these limits, and at least as long as
// that took. It is short, because packets of non-members have to be dropped soon after the node's ruleset was flushed.
const (
	minPause = 10 * time.Millisecond
	maxPause = 400 * time.Millisecond
)

// Run reconciles the table until ctx ends, and repeats what failed.
func (f *Filter) Run(ctx context.Context) error {
	var watch sync.WaitGroup
	defer watch.Wait()
	watching := false
	timer := retry.NewTimer(retry.Default)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.wake:
		case <-timer.C:
		}
		f.mu.Lock()
		lans, set := f.lans, f.set
		f.mu.Unlock()
		if !set {
			continue
		}
		if !watching && slices.ContainsFunc(lans, LAN.known) {
			watching = true
			watch.Go(func() { f.watch(ctx) })
		}
		began := time.Now()
		err := f.reconcile(lans)
		if err == nil {
			timer.Succeeded()
		} else if timer.Failed(err) {
			f.log.Error("cannot drop packets of non-members, trying again", "err", err)
		}
		f.setErr(err)
		took := time.Since(began)
		retry.Pause(ctx, max(minPause, took, min(4*took, maxPause)))
	}
}

// reconcile makes the table what these LANs need. If they need none, it deletes the table.
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
		f.log.Info("no LAN is strict, deleting the nftables table", "table", "inet "+f.table.name)
		return f.table.remove()
	}
	if !have.intact {
		if err := f.table.create(have.exists); err != nil {
			return err
		}
		f.log.Info("nftables table created", "table", "inet "+f.table.name, "replaced", have.exists)
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
		members := len(want[members4Set]) + len(want[members6Set])
		f.log.Info("nftables table changed", "lans", len(want[lansSet]), "members", members, "steps", len(all))
	}
	return nil
}

// watch wakes Run after each change of the table, until ctx ends.
func (f *Filter) watch(ctx context.Context) {
	retry.Loop(ctx, retry.Default, f.log, "cannot watch nftables, trying again", f.watchOnce)
}

// watchOnce wakes Run once when it is subscribed, and then after each change of the table, until it fails.
func (f *Filter) watchOnce(ctx context.Context, succeeded func()) error {
	c, err := f.table.subscribe()
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	succeeded()
	f.wake.Set()
	for {
		events, err := c.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS): // events were lost
			f.wake.Set()
		case err != nil:
			return err
		case slices.ContainsFunc(events, f.table.isOwnEvent):
			f.wake.Set()
		}
	}
}
