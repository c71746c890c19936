package soak

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

var (
	cycles = flag.Int("cycles", 200, "how `often` to attach and detach")
	seed   = flag.Uint64("seed", 1, "`number` that decides what is attached and what is killed when")
)

func TestMain(m *testing.M) {
	if dirs := os.Getenv(daemonRole); dirs != "" {
		if err := runDaemon(dirs, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "daemon:", err)
			os.Exit(1)
		}
		return
	}
	netlab.Main(m)
}

const (
	lans      = 4
	perWorker = 2 // spokes of each LAN
	workers   = 4
)

// site is a node with LANs, the daemon and the plugin.
type site struct {
	node   *netlab.Node
	daemon *daemon
	plugin netlab.Plugin
	leases string // directory of the IPAM plugin
	lans   []segment.Segment

	done, killedDaemon, killedADD, killedDEL, tookOver, noDEL, again atomic.Int64
}

func TestNothingIsLeftBehind(t *testing.T) {
	s := newSite(t)
	first := s.daemon.settled(t, s.lans)
	want := s.inventory(t)

	// In the first part the daemon is killed, too. One daemon runs through the last part, so that its growth shows.
	last := *cycles / 3
	s.run(t, true, *cycles-last)
	before := s.daemon.settled(t, s.lans)
	s.awaitInventory(t, want)
	s.run(t, false, last)
	after := s.daemon.settled(t, s.lans)
	s.awaitInventory(t, want)
	s.expectSameDaemon(t, before, after)
	s.expectFrames(t)
	fmt.Printf("soak: heap of the daemon %d KiB at the start, %d KiB and %d KiB before and after the last third\n",
		first.Heap>>10, before.Heap>>10, after.Heap>>10)

	s.daemon.settled(t, nil)
	s.expectNothing(t)
	if t.Failed() {
		t.Logf("to repeat it: make soak SEED=%d CYCLES=%d", *seed, *cycles)
	}
}

func newSite(t *testing.T) *site {
	t.Helper()
	fmt.Printf("soak: %d cycles, SEED=%d\n", *cycles, *seed)
	// The processes that a killed plugin leaves become children of this process.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	node := netlab.NewUnderlay(t, netlab.UnderlayMTU).Join(t, "worker1")
	plugin, err := netlab.BuildPlugin(t.Context(), filepath.Join(t.TempDir(), "k8slan"), node)
	if err != nil {
		t.Fatal(err)
	}
	if plugin.Dirs, err = netlab.Component(t.Context(), "cni"); err != nil { // for host-local
		t.Fatal(err)
	}
	device, err := node.Netlink(t).LinkByName(netlab.UnderlayDevice)
	if err != nil {
		t.Fatal(err)
	}
	s := &site{node: node, plugin: plugin, leases: filepath.Join(t.TempDir(), "leases")}
	for i := range lans {
		var spokes []string
		for j := range workers * perWorker {
			spokes = append(spokes, spoke(i, j))
		}
		s.lans = append(s.lans, netlab.LAN(uint32(1+i), device.Attrs().Index, spokes...))
	}
	s.daemon = &daemon{node: node, want: s.lans}
	if err := s.daemon.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.daemon.stop(); err != nil {
			t.Errorf("the daemon: %v\n%s", err, s.daemon.log)
		}
	})
	s.daemon.settled(t, s.lans)
	return s
}

func spoke(lan, number int) string { return fmt.Sprintf("s%d-%d", lan, number) }

// run runs that many cycles, in which the daemon may be killed or only the plugin. What happens in a cycle depends on
// the seed and the cycle's number only.
func (s *site) run(t *testing.T, daemonToo bool, number int) {
	t.Helper()
	began, from := time.Now(), int(s.done.Load())
	var group sync.WaitGroup
	for w := range workers {
		group.Go(func() {
			for i := w; i < number && !t.Failed(); i += workers {
				rng := rand.New(rand.NewPCG(*seed, uint64(from+i)))
				a := attempt{
					site: s, rng: rng, lan: rng.IntN(lans), spoke: w + workers*rng.IntN(perWorker),
					kind: rng.IntN(kinds),
				}
				if err := a.run(t.Context(), daemonToo); err != nil {
					t.Errorf("cycle %d: %v", from+i, err)
				}
				if done := s.done.Add(1); done%1000 == 0 {
					fmt.Printf("soak: %d cycles, %v\n", done, time.Since(began).Round(time.Second))
				}
			}
		})
	}
	group.Wait()
	fmt.Printf("soak: %d cycles so far: killed %d daemons, %d ADDs and %d DELs; "+
		"%d take-overs, %d without DEL, %d ADDs repeated\n",
		s.done.Load(), s.killedDaemon.Load(), s.killedADD.Load(), s.killedDEL.Load(),
		s.tookOver.Load(), s.noDEL.Load(), s.again.Load())
}

// These are the kinds of attachment.
const (
	plainVeth = iota
	macvtap
	addressedVeth
	kinds
)

// attempt is one cycle.
type attempt struct {
	*site
	rng        *rand.Rand
	lan, spoke int
	kind       int
}

func (a attempt) config() netlab.Config {
	lan, name := a.lans[a.lan], spoke(a.lan, a.spoke)
	switch a.kind {
	case macvtap:
		return netlab.Network(lan, name, segment.Macvtap)
	case addressedVeth:
		ipam := map[string]any{
			"type": "host-local", "dataDir": a.leases,
			"ranges": []any{[]any{map[string]any{"subnet": fmt.Sprintf("10.%d.0.0/16", a.lan)}}},
		}
		return netlab.Network(lan, name, segment.Veth).With("name", lan.Netns).With("ipam", ipam)
	default:
		return netlab.Network(lan, name, segment.Veth)
	}
}

// A plugin is killed at any time from its start until it has ended for a while: an ADD takes 3 ms, a DEL 20.
const (
	longADD = 6 * time.Millisecond
	longDEL = 30 * time.Millisecond
)

// run attaches and detaches as kubelet and its runtime do: a failed ADD is followed by DEL and another sandbox, and DEL
// is repeated until it succeeds.
func (a attempt) run(ctx context.Context, daemonToo bool) error {
	var killed sync.WaitGroup
	var daemonErr error
	if daemonToo && a.rng.IntN(20) == 0 {
		after := time.Duration(a.rng.Int64N(int64(longDEL)))
		a.killedDaemon.Add(1)
		killed.Go(func() {
			timer := time.NewTimer(after)
			defer timer.Stop()
			<-timer.C
			daemonErr = a.daemon.kill()
		})
	}
	err := a.attachments(ctx)
	killed.Wait()
	return errors.Join(err, daemonErr)
}

// attachments attaches and detaches one sandbox, and others in its place.
func (a attempt) attachments(ctx context.Context) error {
	box, err := netlab.NewSandbox()
	if err != nil {
		return err
	}
	if a.rng.IntN(4) == 0 {
		a.killedADD.Add(1)
		if err := a.callAndKill(ctx, "ADD", box, longADD); err != nil {
			return err
		}
		if a.kind != addressedVeth && a.rng.IntN(4) == 0 {
			// Multus calls no DEL when it has lost its cache and the pod. (The IPAM plugin would keep an address.)
			a.noDEL.Add(1)
			return box.Remove()
		}
		if err := a.detach(ctx, box); err != nil {
			return err
		}
		if box, err = netlab.NewSandbox(); err != nil {
			return err
		}
	}
	if box, err = a.attach(ctx, box); err != nil {
		return err
	}
	if a.rng.IntN(8) == 0 {
		a.tookOver.Add(1)
		next, err := netlab.NewSandbox()
		if err != nil {
			return err
		}
		if next, err = a.attach(ctx, next); err != nil {
			return err
		}
		if err := a.detach(ctx, box); err != nil { // the late DEL of the pod that had the spoke before
			return err
		}
		box = next
	}
	return a.detach(ctx, box)
}

// attach calls ADD until it succeeds, each time with another sandbox, and returns the sandbox of the last call.
func (a attempt) attach(ctx context.Context, box netlab.Sandbox) (netlab.Sandbox, error) {
	const tries = 5
	var failed []error
	for range tries {
		_, err := a.plugin.Call(ctx, "ADD", box, a.config())
		if err == nil {
			return box, nil
		}
		failed = append(failed, err)
		a.again.Add(1)
		fmt.Println("soak: repeated after", err)
		if err := a.detach(ctx, box); err != nil {
			return box, err
		}
		if box, err = netlab.NewSandbox(); err != nil {
			return box, err
		}
	}
	return box, fmt.Errorf("%d ADDs failed: %w", tries, errors.Join(failed...))
}

// detach calls DEL, before or after the sandbox is removed.
func (a attempt) detach(ctx context.Context, box netlab.Sandbox) error {
	early := a.rng.IntN(4) == 0
	if early {
		if err := box.Remove(); err != nil {
			return err
		}
	}
	if a.rng.IntN(4) == 0 {
		a.killedDEL.Add(1)
		if err := a.callAndKill(ctx, "DEL", box, longDEL); err != nil {
			return err
		}
	}
	if _, err := a.plugin.Call(ctx, "DEL", box, a.config()); err != nil {
		return fmt.Errorf("DEL: %w", err)
	}
	if early {
		return nil
	}
	return box.Remove()
}

// callAndKill calls the plugin and kills it within that time, unless it has ended. It returns when an IPAM plugin that
// it called has ended, too.
func (a attempt) callAndKill(ctx context.Context, verb string, box netlab.Sandbox, within time.Duration) error {
	cmd, err := a.plugin.Command(ctx, verb, box, a.config())
	if err != nil {
		return err
	}
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := a.node.Do(cmd.Start); err != nil {
		return err
	}
	after := time.Duration(a.rng.Int64N(int64(within)))
	kill := time.AfterFunc(after, func() { _ = cmd.Process.Kill() }) // it may have ended
	err = cmd.Wait()
	kill.Stop()
	if cmd.ProcessState == nil {
		return err
	}
	for {
		_, err := unix.Wait4(-cmd.Process.Pid, nil, 0, nil)
		if errors.Is(err, unix.ECHILD) {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// expectSameDaemon expects that a daemon has not grown.
func (s *site) expectSameDaemon(t *testing.T, before, after answer) {
	t.Helper()
	for _, file := range missing(after.Files, before.Files) {
		t.Errorf("leaked: open file of the daemon: %s", file)
	}
	if after.Goroutines > before.Goroutines {
		t.Errorf("leaked: the daemon has %d goroutines, had %d", after.Goroutines, before.Goroutines)
	}
	const slack = 1 << 20
	if after.Heap > before.Heap+slack {
		t.Errorf("leaked: the daemon's heap is %d bytes, was %d", after.Heap, before.Heap)
	}
}

// expectFrames expects that every LAN still carries frames.
func (s *site) expectFrames(t *testing.T) {
	t.Helper()
	for i, lan := range s.lans {
		var wires []netlab.Wire
		for j := range 2 {
			box, err := netlab.NewSandbox()
			if err != nil {
				t.Fatal(err)
			}
			config := netlab.Network(lan, spoke(i, j), segment.Veth)
			if _, err := s.plugin.Call(t.Context(), "ADD", box, config); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if _, err := s.plugin.Call(t.Context(), "DEL", box, config); err != nil {
					t.Error(err)
				}
				if err := box.Remove(); err != nil {
					t.Error(err)
				}
			}()
			box.AwaitCarrier(t, box.Interface)
			netlab.At(filepath.Join(s.node.Run, "netns", lan.Netns)).AwaitCarrier(t, spoke(i, j))
			wires = append(wires, box.Open(t, box.Interface))
		}
		frame := frames.Stream(nil, segment.MAC(lan.LAN, spoke(i, 0)), 1, 1)
		if err := wires[0].Send(frame); err != nil {
			t.Fatal(err)
		}
		sent := func(got []byte) bool { return bytes.Equal(got, frame) }
		if _, err := netlab.Await(wires[1], 3*time.Second, sent); err != nil {
			t.Errorf("LAN %s carries no frames any more: %v", lan.LAN, err)
		}
	}
}

// expectNothing expects that removed LANs leave nothing.
func (s *site) expectNothing(t *testing.T) {
	t.Helper()
	left, err := files(s.node.Run)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range left {
		t.Errorf("leaked by removed LANs: %s", file)
	}
	mounted, err := s.mounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, mount := range mounted {
		if strings.HasPrefix(mount, s.node.Run) {
			t.Errorf("leaked by removed LANs: mount %s", mount)
		}
	}
	if links := s.node.Links(t); !slices.Equal(links, []string{netlab.UnderlayDevice}) {
		t.Errorf("leaked by removed LANs: the node's links are %v", links)
	}
}
