package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/netlab"
)

// managed is a node's manager, which counts what it does.
type managed struct {
	*lanmgr.Manager
	*counted
}

// counted is the manager's kernel.
type counted struct {
	*kernel.Node
	reconciled atomic.Int64
	observed   atomic.Int64
	until      atomic.Int64 // the number of observations after which enough gets a value
	enough     chan struct{}
}

func (c *counted) Observe(ctx context.Context, netns string) (segment.State, error) {
	s, err := c.Node.Observe(ctx, netns)
	if c.observed.Add(1) == c.until.Load() {
		c.enough <- struct{}{}
	}
	return s, err
}

func (c *counted) Reconcile(
	ctx context.Context, netns string, decide func(segment.State) []segment.Op,
) ([]segment.Op, error) {
	c.reconciled.Add(1)
	return c.Node.Reconcile(ctx, netns, decide)
}

// manage runs a manager on the node until stop.
func (n node) manage(t *testing.T) (m managed, stop func()) {
	t.Helper()
	k := kernel.New(kernel.Paths{Run: n.Run, HostNetns: n.Path})
	c := &counted{Node: k, enough: make(chan struct{}, 1)}
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	m = managed{lanmgr.New(c, n.CDI, log), c}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	for _, part := range []func() error{
		func() error { return m.Run(ctx) },
		func() error { return watch.New(k).Watch(ctx, m.Enqueue) },
	} {
		running.Go(func() {
			if err := part(); err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("the daemon of %s: %v", n.Name, err)
			}
		})
	}
	stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		k.Close()
	})
	t.Cleanup(stop)
	return m, stop
}

// runs sets the desired state, and returns when the node has it.
func (m managed) runs(t *testing.T, want []segment.Segment) {
	t.Helper()
	m.Set(want)
	late := time.After(10 * time.Minute)
	again := time.NewTicker(5 * time.Millisecond) // less often than there are events, because asking costs time, too
	defer again.Stop()
	for !m.settled(len(want)) {
		select {
		case <-again.C:
		case <-late:
			t.Fatalf("after 10 minutes the daemon has %d of %d LANs", len(m.Reports()), len(want))
		}
	}
}

func (m managed) settled(lans int) bool {
	reports := m.Reports()
	for _, r := range reports {
		if !r.Built || r.Leaving {
			return false
		}
	}
	return len(reports) == lans
}

// manyLANs returns LANs of two spokes, with VNIs from first on.
func (n node) manyLANs(first, number int) []segment.Segment {
	lans := make([]segment.Segment, number)
	for i := range lans {
		vni := first + i
		lans[i] = netlab.LAN(uint32(vni), n.device, fmt.Sprintf("a%d", vni), fmt.Sprintf("b%d", vni))
	}
	return lans
}

// removalStall measures B4: how long the removal of LANs blocks other writers of links, which share one lock.
func removalStall(t *testing.T, b *bench) {
	n := addNode(t, netlab.NewUnderlay(t, netlab.UnderlayMTU), "worker1")
	links := n.Netlink(t)
	one := contender{"one", func() (float64, error) {
		a := netlink.NewLinkAttrs()
		a.Name = "one"
		if err := links.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: "other"}); err != nil {
			return 0, err
		}
		began := time.Now()
		err := links.LinkDel(&netlink.Veth{LinkAttrs: a})
		return milliseconds(time.Since(began)), err
	}}
	m, _ := n.manage(t)
	for _, c := range []struct {
		id           string
		lans, rounds int
	}{
		{"B4-100", times(100, 2), 3},
		{"B4-500", times(500, 10), 1},
	} {
		singles := race(t, times(20, 2), one)["one"]
		var worst, idle samples
		var took time.Duration
		for range times(c.rounds, 1) {
			m.runs(t, n.manyLANs(1, c.lans))
			w := writeLinks(t, n)
			began := time.Now()
			m.runs(t, nil)
			took = time.Since(began)
			w.stop(t, time.Second) // the kernel removes some of them later
			worst = append(worst, w.worst)

			w = writeLinks(t, n)
			w.stop(t, took+time.Second)
			idle = append(idle, w.worst)
		}
		b.atMost(c.id, fmt.Sprintf("worst stall of a writer while %d LANs are removed / one link deletion", c.lans),
			worst.median()/singles.median(), 3,
			fmt.Sprintf("%v ms / %v ms (the longest of %d took %v ms), in %d rounds %v–%v ms, removal takes %v; "+
				"without removal the worst in the same time is %v ms",
				round(worst.median()), round(singles.median()), len(singles), round(singles.quantile(1)),
				len(worst), round(worst.quantile(0)), round(worst.quantile(1)), took.Round(10*time.Millisecond),
				round(idle.median())))
	}
}

// writer changes links while the daemon works.
type writer struct {
	worst   float64 // milliseconds of the slowest change
	ending  chan struct{}
	ended   chan struct{}
	failure error
}

// writeLinks changes a link of the node once a millisecond, or as often as it can.
func writeLinks(t *testing.T, n node) *writer {
	t.Helper()
	links := n.Netlink(t)
	a := netlink.NewLinkAttrs()
	a.Name = "written"
	must(t, links.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: "peer"}))
	link, err := links.LinkByName("written")
	must(t, err)
	w := &writer{ending: make(chan struct{}), ended: make(chan struct{})}
	go func() {
		defer close(w.ended)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for i := 0; w.failure == nil; i++ {
			select {
			case <-w.ending:
				w.failure = links.LinkDel(link)
				return
			case <-tick.C:
			}
			began := time.Now()
			w.failure = links.LinkSetAlias(link, fmt.Sprint(i))
			w.worst = max(w.worst, milliseconds(time.Since(began)))
		}
	}()
	return w
}

// stop ends the writer after that time.
func (w *writer) stop(t *testing.T, after time.Duration) {
	t.Helper()
	timer := time.NewTimer(after)
	<-timer.C
	close(w.ending)
	<-w.ended
	must(t, w.failure)
}

// coldAndIdle measures B5, the time to build LANs, and B6, the time to find that nothing is to be done.
func coldAndIdle(t *testing.T, b *bench) {
	lans := times(500, 10)
	n := addNode(t, netlab.NewUnderlay(t, netlab.UnderlayMTU), "worker1")
	host, ns, err := open(n.Path)
	must(t, err)
	defer ns.Close()
	defer host.close()
	run := filepath.Join(n.Run, "netns")
	vni := 1 // other VNIs each time: the kernel may not have removed the last LANs yet
	next := func() []segment.Segment {
		vni += lans
		return n.manyLANs(vni, lans)
	}
	got := race(t, times(3, 1),
		contender{"k8slan", func() (float64, error) {
			want := next()
			m, stop := n.manage(t)
			began := time.Now()
			m.runs(t, want)
			took := time.Since(began)
			stop()
			return milliseconds(took), n.removeAll(t)
		}},
		contender{"bare", func() (float64, error) {
			want := next()
			if err := os.MkdirAll(run, 0o755); err != nil {
				return 0, err
			}
			began := time.Now()
			for _, s := range want {
				if err := bareLAN(host, s, filepath.Join(run, s.Netns)); err != nil {
					return 0, fmt.Errorf("LAN %s: %w", s.Netns, err)
				}
			}
			took := time.Since(began)
			return milliseconds(took), n.removeAll(t)
		}},
	)
	b.atMost("B5", fmt.Sprintf("%d LANs of 2 spokes built / the bare netlink messages", lans),
		got["k8slan"].over(got["bare"]).median(), 1.3,
		figures("ms", got["k8slan"], got["bare"]))
	idle(t, b, n, next())
}

// removeAll removes all LANs of the node by unmounting their namespaces, and waits until the kernel has removed them.
// It does so in small groups, because no process on the machine can change a link while the kernel removes them.
func (n node) removeAll(t *testing.T) error {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(n.Run, "netns", "*"))
	if err != nil {
		return err
	}
	for few := range slices.Chunk(names, 10) {
		if err := n.unmount(t, few); err != nil {
			return err
		}
	}
	return os.RemoveAll(n.Run)
}

// unmount unmounts namespaces and returns when they are removed. The kernel removes namespaces one after the other, so
// unmount adds one with an end of a link, and waits for the other end to disappear.
func (n node) unmount(t *testing.T, names []string) error {
	t.Helper()
	last, err := netlab.NewSandbox()
	if err != nil {
		return err
	}
	fd, err := vnetns.GetFromPath(last.Path)
	if err != nil {
		return err
	}
	links := n.Netlink(t)
	a := netlink.NewLinkAttrs()
	a.Name = "last"
	err = links.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: "end", PeerNamespace: netlink.NsFd(int(fd))})
	fd.Close()
	for _, name := range names {
		err = errors.Join(err, unix.Unmount(name, unix.MNT_DETACH))
	}
	if err := errors.Join(err, last.Remove()); err != nil {
		return err
	}
	late := time.After(time.Minute)
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		_, err := links.LinkByName("last")
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		select {
		case <-again.C:
		case <-late:
			return errors.New("the kernel has not removed the namespaces of LANs after a minute")
		}
	}
}

// idle measures B6 on LANs that are built.
func idle(t *testing.T, b *bench, n node, lans []segment.Segment) {
	m, stop := n.manage(t)
	m.runs(t, lans)
	look := func() (float64, error) {
		m.until.Store(m.observed.Load() + int64(len(lans)))
		began := time.Now()
		for _, s := range lans {
			m.Enqueue(s.Netns)
		}
		<-m.enough
		return milliseconds(time.Since(began)), nil
	}
	_, err := look()
	must(t, err)
	events := watchAll(t, n)
	awaitQuiet(t, events)
	reconciled := m.reconciled.Load()
	got := race(t, times(30, 1), contender{"k8slan", look}, contender{"bare", func() (float64, error) {
		began := time.Now()
		for _, s := range lans {
			if err := dump(filepath.Join(n.Run, "netns", s.Netns)); err != nil {
				return 0, err
			}
		}
		return milliseconds(time.Since(began)), nil
	}})
	const what = "observing %d LANs where nothing is to be done / opening and dumping each namespace"
	b.atMost("B6", fmt.Sprintf(what, len(lans)),
		got["k8slan"].over(got["bare"]).median(), 2, figures("ms", got["k8slan"], got["bare"]))
	changes, locked := events(), m.reconciled.Load()-reconciled
	b.atMost("B6-writes", "what it changes meanwhile", float64(int64(changes)+locked), 0,
		fmt.Sprintf("%d netlink events, %d times that a LAN was locked to reconcile it, in %d observations",
			changes, locked, times(30, 1)+1))
	stop()
	must(t, n.removeAll(t))
}

// awaitQuiet waits until there is no event for a while: the kernel reports events of links after LANs are built. The
// last one comes 35 s later, when a bridge ends its topology change (br_topology_change_timer_expired in
// net/bridge/br_stp_timer.c).
func awaitQuiet(t *testing.T, events func() int) {
	t.Helper()
	late := time.After(5 * time.Minute)
	again := time.NewTicker(time.Duration(times(40, 1)) * time.Second)
	defer again.Stop()
	for {
		select {
		case <-again.C:
			if events() == 0 {
				return
			}
		case <-late:
			t.Fatal("links in LANs still change 5 minutes after they were built")
		}
	}
}

// dump opens a namespace and dumps its links.
func dump(path string) error {
	s, ns, err := open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	defer s.close()
	r := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	r.Sockets = s.handles
	_, err = r.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	return err
}

// watchAll subscribes to the events in the node's namespace and in those of LANs, and returns a function that counts
// them.
func watchAll(t *testing.T, n node) (count func() int) {
	t.Helper()
	fd := subscribe(t, n.Namespace)
	const listenAllNSID = 8 // NETLINK_LISTEN_ALL_NSID in include/uapi/linux/netlink.h
	must(t, unix.SetsockoptInt(fd, unix.SOL_NETLINK, listenAllNSID, 1))
	return func() int { return events(fd) }
}

// subscribe opens a socket that receives every change of links, neighbors, addresses and routes in a namespace.
func subscribe(t *testing.T, ns netlab.Namespace) (fd int) {
	t.Helper()
	must(t, ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		return err
	}))
	t.Cleanup(func() { unix.Close(fd) })
	must(t, unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	for _, group := range []int{
		unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_NSID,
	} {
		must(t, unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group))
	}
	return fd
}

// events counts the events that came to a socket since the last call.
func events(fd int) (count int) {
	for buf := make([]byte, 1<<16); ; count++ { // an overflow counts as one
		if _, _, err := unix.Recvfrom(fd, buf, 0); errors.Is(err, unix.EAGAIN) {
			return count
		}
	}
}
