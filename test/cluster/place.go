package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/k8slan/k8slan/test/cluster/internal/cgroup"
	"github.com/k8slan/k8slan/test/cluster/internal/forward"
	"github.com/k8slan/k8slan/test/cluster/internal/nodeinit"
	"github.com/k8slan/k8slan/test/cluster/internal/process"
)

// The places where the cluster's processes run, beside the nodes.
const (
	placeMachine      = "machine"       // the machine's own namespaces
	placeControlPlane = "control-plane" // with the network namespace of the bridges
)

// Every process of the cluster is started by the helper, a copy of the cluster
// command: joining control groups and namespaces moves a whole program, which
// the one that uses this package should not be. What the helper starts belongs
// to no terminal, and is reaped by the machine or the node.

// helper prepares a run of the helper.
func (s state) helper(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.bin("cluster"), append([]string{"--name", string(s)}, args...)...)
	cmd.WaitDelay = waitDelay
	return cmd
}

// spawn starts a process that continues to run, and records it by name.
func (s state) spawn(ctx context.Context, place, name string, argv ...string) (process.Record, error) {
	r, err := s.spawned(ctx, name, append([]string{"spawn", place, "--"}, argv...)...)
	if err != nil {
		return process.Record{}, fmt.Errorf("start %s: %w%s", name, err, s.tail(name))
	}
	return r, nil
}

// spawned runs the helper, which prints the ID of the process it started,
// with the log of the process as standard error.
func (s state) spawned(ctx context.Context, name string, args ...string) (process.Record, error) {
	log, err := os.OpenFile(s.log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return process.Record{}, err
	}
	defer log.Close()
	cmd := s.helper(ctx, args...)
	cmd.Stderr = log
	out, err := cmd.Output()
	if err != nil {
		return process.Record{}, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		return process.Record{}, err
	}
	r, err := process.Identify(pid)
	if err != nil {
		return process.Record{}, err
	}
	return r, r.Save(s.process(name))
}

// running returns the record of the process of that name; false if it does
// not run.
func (s state) running(name string) (process.Record, bool, error) {
	r, err := process.Load(s.process(name))
	if errors.Is(err, fs.ErrNotExist) {
		return r, false, nil
	}
	if err != nil {
		return r, false, err
	}
	alive, err := r.Alive()
	return r, alive, err
}

// tail is the end of a process's log, for errors.
func (s state) tail(name string) string {
	content, err := os.ReadFile(s.log(name))
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(content)), "\n")
	return fmt.Sprintf("\n%s ends with:\n  %s", s.log(name), strings.Join(lines[max(0, len(lines)-12):], "\n  "))
}

// Spawn starts argv in a place, a node or one of the two beside them, with its
// output on standard error, prints its process ID on out and does not wait for
// it. It moves the calling program there: it is what the helper does.
func Spawn(name, place string, argv []string, out io.Writer) error {
	s := state(name)
	if err := s.enter(place); err != nil {
		return err
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = s.environment()
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	_, err := fmt.Fprintln(out, cmd.Process.Pid)
	return err
}

// SpawnNode starts the first process of a node and prints its process ID; like
// Spawn it is what the helper does.
func SpawnNode(cluster, name string, out io.Writer) error {
	s := state(cluster)
	node, err := s.spec(name)
	if err != nil {
		return err
	}
	if err := s.nodeGroup(node.Name).Create(); err != nil {
		return err
	}
	if err := s.nodeGroup(node.Name).Join(""); err != nil {
		return err
	}
	kubelet, err := filepath.EvalSymlinks(s.bin("kubelet"))
	if err != nil {
		return err
	}
	hierarchies, err := cgroup.Hierarchies()
	if err != nil {
		return err
	}
	pid, err := nodeinit.Start(nodeinit.Config{
		Name:        name,
		Disk:        s.disk(name, ""),
		Root:        s.path("nodes", name, "root"),
		Shared:      []string{s.path("bin"), filepath.Dir(filepath.Dir(kubelet))},
		Hierarchies: hierarchies,
		CgroupLeaf:  nodeLeaf,
	}, os.Stderr, s.bin("cluster"), "node-init")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(out, pid)
	return err
}

// ExecHere runs argv in a node with the calling program's standard streams,
// and returns its exit code. It moves the calling program there; if that is
// killed, so is argv.
func ExecHere(name, node string, argv []string) (code int, err error) {
	s := state(name)
	if err := s.enter(node); err != nil {
		return 0, err
	}
	// Not SysProcAttr.Pdeathsig: package syscall looks for the parent's number, which is 0 from another PID namespace.
	cmd := exec.Command("setpriv", append([]string{"--pdeathsig", "KILL", "--"}, argv...)...)
	cmd.Env = s.environment()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return 128 + int(status.Signal()), nil // as shells have it
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}

// Forward carries connections from the machine to the API server of the cluster
// of that name; it returns when it can accept no more.
func Forward(log *slog.Logger, name string) error {
	s := state(name)
	listener, err := net.Listen("tcp", s.address())
	if err != nil {
		return fmt.Errorf("forward the API server's port: %w", err)
	}
	defer listener.Close()
	return forward.Serve(log, listener, s.underlayPath(), apiServer)
}

// enter moves the calling program to a place for good.
func (s state) enter(place string) error {
	// The program searches the directories of that place.
	if err := os.Setenv("PATH", s.searchPath()); err != nil {
		return err
	}
	switch place {
	case placeMachine, placeControlPlane:
		if err := s.controlGroup().Join(""); err != nil {
			return err
		}
		if place == placeMachine {
			return nil
		}
		return process.EnterNetns(s.underlayPath())
	}
	node, err := s.spec(place)
	if err != nil {
		return err
	}
	first, alive, err := s.running(place)
	if err != nil {
		return err
	}
	if !alive {
		return fmt.Errorf("%s has no power: cluster power on %s", place, place)
	}
	if err := s.nodeGroup(node.Name).Join(nodeLeaf); err != nil {
		return err
	}
	return first.Enter()
}

func (s state) spec(name string) (spec, error) {
	for _, node := range specs() {
		if node.Name == name {
			return node, nil
		}
	}
	return spec{}, fmt.Errorf("there is no node %q", name)
}

func (s state) searchPath() string {
	return s.path("bin") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

// environment is that of the cluster's processes: nothing of the caller's but
// its terminal.
func (s state) environment() []string {
	return []string{
		"PATH=" + s.searchPath(), "HOME=/root", "LANG=C.UTF-8", "TERM=" + os.Getenv("TERM"),
		"CONTAINERD_NAMESPACE=k8s.io", // ctr shows what Kubernetes runs
	}
}

// output runs a command to its end; the error carries what it said on
// standard error.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.Bytes(), fmt.Errorf("%w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}
