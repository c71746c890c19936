package soak

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/netlab"
)

// daemonRole makes the test binary the node's daemon: k8slan node without the API server and kubelet, on the
// directories that the variable names. It follows the orders on its standard input, and ends with it.
const daemonRole = "K8SLAN_TEST_DAEMON"

// order is one line of the daemon's input.
type order struct {
	Want   []segment.Segment // what the node should have from now on
	Settle bool              // answer when it has that, no claim is left and no segment has a problem
}

// answer is one line of its output.
type answer struct {
	Unsettled  string // what was missing when the daemon gave up waiting
	Goroutines int
	Heap       uint64   // bytes in use after a garbage collection
	Files      []string // its open files
}

// settleTime is how long the daemon may take to reconcile everything: longer than it ever waits before it tries again.
const settleTime = 40 * time.Second

// runDaemon is the daemon's process.
func runDaemon(dirs string, in io.Reader, out io.Writer) error {
	run, cdi, _ := strings.Cut(dirs, ",")
	node := kernel.New(kernel.Paths{Run: run})
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	manager := lanmgr.New(node, cdi, log)
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	var running sync.WaitGroup
	for _, part := range []func() error{
		func() error { return manager.Run(ctx) },
		func() error { return watch.New(node).Watch(ctx, manager.Enqueue) },
	} {
		running.Go(func() { cancel(part()) })
	}
	orders, answers := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var o order
		err := orders.Decode(&o)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		manager.Set(o.Want)
		if !o.Settle {
			continue
		}
		if err := answers.Encode(settle(ctx, manager, o.Want)); err != nil {
			return err
		}
	}
	cancel(nil)
	running.Wait()
	node.Close()
	return nil
}

// settle waits until the node has the desired state and no claims, and describes the process.
func settle(ctx context.Context, m *lanmgr.Manager, want []segment.Segment) answer {
	late := time.After(settleTime)
	for {
		trouble := problem(m.Reports(), want)
		if trouble == "" {
			break
		}
		select {
		case <-m.Changed():
		case <-ctx.Done():
			return answer{Unsettled: fmt.Sprint("the daemon has ended: ", context.Cause(ctx))}
		case <-late:
			return answer{Unsettled: trouble}
		}
	}
	runtime.GC() // one collection leaves the content of sync.Pools
	debug.FreeOSMemory()
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	return answer{Goroutines: runtime.NumGoroutine(), Heap: memory.HeapAlloc, Files: openFiles(os.Getpid())}
}

func problem(reports []lanmgr.Report, want []segment.Segment) string {
	for _, r := range reports {
		if r.Err != nil || !r.Built || r.Leaving || len(r.Claims) > 0 {
			return fmt.Sprintf("%s: built=%t leaving=%t claims=%v: %v",
				r.Segment.LAN, r.Built, r.Leaving, r.Claims, r.Err)
		}
		if !slices.ContainsFunc(want, r.Segment.Equal) {
			return fmt.Sprintf("%s: the desired state is another", r.Segment.LAN)
		}
	}
	if len(reports) != len(want) {
		return fmt.Sprintf("%d segments instead of %d", len(reports), len(want))
	}
	return ""
}

// openFiles lists a process's open files, without the numbers that differ between files of a kind.
func openFiles(pid int) []string {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return []string{err.Error()}
	}
	var files []string
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && target != dir { // the open directory itself
			files = append(files, numbers.ReplaceAllString(target, ""))
		}
	}
	slices.Sort(files)
	return files
}

var numbers = regexp.MustCompile(`\[\d+\]|/\d+/`)

// daemon is the daemon's process.
type daemon struct {
	node *netlab.Node

	mu      sync.Mutex
	cmd     *exec.Cmd
	orders  io.WriteCloser
	answers *json.Decoder
	log     *bytes.Buffer
	want    []segment.Segment
}

// start starts the process.
func (d *daemon) start() error {
	d.cmd = exec.Command("/proc/self/exe")
	d.cmd.Env = append(os.Environ(), daemonRole+"="+d.node.Run+","+d.node.CDI)
	d.log = &bytes.Buffer{}
	d.cmd.Stderr = d.log
	var err error
	if d.orders, err = d.cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	d.answers = json.NewDecoder(out)
	if err := d.node.Do(d.cmd.Start); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	return json.NewEncoder(d.orders).Encode(order{Want: d.want})
}

// kill kills the process and starts the next one.
func (d *daemon) kill() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("kill the daemon: %w", err)
	}
	if err := d.cmd.Wait(); err == nil {
		return errors.New("the daemon ended before it was killed")
	}
	return d.start()
}

// settled returns the daemon's answer when the node has the desired state and no claims.
func (d *daemon) settled(t *testing.T, want []segment.Segment) answer {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.want = want
	if err := json.NewEncoder(d.orders).Encode(order{Want: want, Settle: true}); err != nil {
		t.Fatalf("the daemon accepts no orders: %v\n%s", err, d.log)
	}
	var a answer
	if err := d.answers.Decode(&a); err != nil {
		t.Fatalf("the daemon does not answer: %v\n%s", err, d.log)
	}
	if a.Unsettled != "" {
		t.Fatalf("the daemon has not reconciled everything: %s\n%s", a.Unsettled, d.log)
	}
	return a
}

// stop ends the process.
func (d *daemon) stop() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.orders.Close()
	return d.cmd.Wait()
}
