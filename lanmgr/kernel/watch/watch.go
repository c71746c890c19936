// Package watch reports changes in a node's kernel. Only the daemon and the sidecar need it.
package watch

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/rtnl"
	"github.com/k8slan/k8slan/lanmgr/sockfilter"
)

// Node is a node's kernel that also reports changes.
type Node struct{ *kernel.Node }

// New adds the reports of changes to a node's kernel.
func New(n *kernel.Node) Node { return Node{n} }

// Watch calls poke with what may have changed, until the context ends: the name of a segment, or "" for the links,
// addresses and default routes of the node's own netns. These are hints to observe. A segment is watched from when it
// was first observed. Watch pokes all once at the start, when no change can be missed any more.
func (n Node) Watch(ctx context.Context, poke func(netnsName string)) error {
	// An IPv6 address in a LAN's namespace is the only sign that IPv6 was switched on there.
	links := subscription{allNetns: true, groups: []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV6_IFADDR}}
	remotes := subscription{allNetns: true, groups: []int{unix.RTNLGRP_NEIGH}, filter: sockfilter.Remotes()}
	host := subscription{groups: []int{
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	}}
	pokeAll := func() {
		for _, name := range n.OpenSegments() {
			poke(name)
		}
	}
	pokeSegment := func(_ []byte, netnsID int) {
		if name, ok := n.SegmentByNetnsID(netnsID); ok {
			poke(name)
		}
	}
	pokeHost := func(datagram []byte, _ int) {
		if matters(datagram) {
			poke("")
		}
	}
	sources := []source{
		{"the links of LANs", n.rtnetlink(links, pokeSegment, pokeAll)},
		{"the remotes of LANs", n.rtnetlink(remotes, pokeSegment, pokeAll)},
		{"the node's links", n.rtnetlink(host, pokeHost, func() { poke("") })},
		{"kernel modules", func() (runFunc, error) { return openModules(pokeAll) }},
		{"the records of LANs", func() (runFunc, error) { return openRecords(n.RecordsDir(), poke) }},
		{"mounts", func() (runFunc, error) { return n.openMounts(poke) }},
	}
	return run(ctx, sources, func() {
		poke("")
		pokeAll()
	})
}

// rtnetlink opens a subscription in the node's own netns.
func (n Node) rtnetlink(s subscription, handle func(datagram []byte, netnsID int), overflow func()) openFunc {
	return func() (run runFunc, err error) {
		err = n.InHostNetns(func() error {
			run, err = s.open(handle, overflow)
			return err
		})
		return run, err
	}
}

// matters reports whether a datagram has more than routes which are no default routes. A node may have very many of
// those.
func matters(datagram []byte) bool {
	for len(datagram) > 0 {
		m, rest, ok := rtnl.NextMessage(datagram)
		if !ok || m.Type != unix.RTM_NEWROUTE && m.Type != unix.RTM_DELROUTE {
			return true
		}
		const dstLen = 1 // rtm_dst_len
		if len(m.Payload) > dstLen && m.Payload[dstLen] == 0 {
			return true
		}
		datagram = rest
	}
	return false
}

// PodNetns calls poke whenever a link, an address or a remote of the program's own network namespace may have changed,
// until the context ends, and once at the start, when no change can be missed any more.
func PodNetns(ctx context.Context, poke func()) error {
	links := subscription{groups: []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR}}
	remotes := subscription{groups: []int{unix.RTNLGRP_NEIGH}, filter: sockfilter.Remotes()}
	handle := func([]byte, int) { poke() }
	return run(ctx, []source{
		{"the pod's links", func() (runFunc, error) { return links.open(handle, poke) }},
		{"the remotes", func() (runFunc, error) { return remotes.open(handle, poke) }},
	}, poke)
}

// source is one kind of changes.
type source struct {
	name string
	open openFunc
}

// openFunc begins to collect changes.
type openFunc func() (runFunc, error)

// runFunc reports the collected changes until the context ends, and then closes what openFunc opened.
type runFunc func(ctx context.Context) error

// run opens all sources, calls begun, and reports changes until the context ends or one source fails.
func run(ctx context.Context, sources []source, begun func()) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var group sync.WaitGroup
	for _, s := range sources {
		run, err := s.open()
		if err != nil {
			stop(fmt.Errorf("watch %s: %w", s.name, err))
			break
		}
		group.Go(func() {
			if err := run(ctx); err != nil {
				stop(fmt.Errorf("watch %s: %w", s.name, err))
			}
		})
	}
	if ctx.Err() == nil {
		begun()
	}
	group.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
