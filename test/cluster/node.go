package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/test/cluster/internal/process"
)

// Node is one of the cluster's nodes.
type Node struct {
	spec
	state state
}

// String is the node's name, also in Kubernetes.
func (n *Node) String() string { return n.Name }

// Netns is the path of the node's network namespace; an error if it has no
// power.
func (n *Node) Netns() (path string, err error) {
	first, alive, err := n.state.running(n.Name)
	if err != nil {
		return "", err
	}
	if !alive {
		return "", fmt.Errorf("%s has no power", n.Name)
	}
	return filepath.Join("/proc", strconv.Itoa(first.PID), "ns/net"), nil
}

// Exec runs a command in the node, in all its namespaces and its control
// group, and returns its standard output; the error carries its standard
// error.
func (n *Node) Exec(ctx context.Context, cmd ...string) ([]byte, error) {
	return n.exec(ctx, nil, cmd...)
}

func (n *Node) exec(ctx context.Context, stdin io.Reader, argv ...string) ([]byte, error) {
	cmd := n.state.helper(ctx, append([]string{"exec", n.Name, "--"}, argv...)...)
	cmd.Stdin = stdin
	out, err := output(cmd)
	if err != nil {
		return out, fmt.Errorf("run %s in %s: %w", strings.Join(argv, " "), n.Name, err)
	}
	return out, nil
}

// KillProcess kills (SIGKILL) the processes of that name in the node, those in
// its pods included, and waits for their end. The name is the last part of
// what the process was called by. It is an error if there is none.
func (n *Node) KillProcess(ctx context.Context, name string) error {
	pids, err := n.state.nodeGroup(n.Name).Processes()
	if err != nil {
		return err
	}
	killed := 0
	for _, pid := range pids {
		r, err := named(pid, name)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // another one, or one that has ended meanwhile
		}
		if err != nil {
			return fmt.Errorf("identify process %d of %s: %w", pid, n.Name, err)
		}
		if err := r.Stop(ctx, unix.SIGKILL); err != nil {
			return fmt.Errorf("kill %s in %s: %w", name, n.Name, err)
		}
		killed++
	}
	if killed == 0 {
		return fmt.Errorf("kill %s in %s: no such process there", name, n.Name)
	}
	return nil
}

// named returns the record of a process if it goes by that name, else
// fs.ErrNotExist.
func named(pid int, name string) (process.Record, error) {
	r, err := process.Identify(pid)
	if err != nil {
		return r, err
	}
	if is, err := process.Name(pid); err != nil || is != name {
		return r, errors.Join(err, fs.ErrNotExist)
	}
	return r, nil
}

// StopKubelet stops the node's kubelet; its pods go on running.
func (n *Node) StopKubelet(ctx context.Context) error {
	kubelet, alive, err := n.state.running(n.Name + "-kubelet")
	if err != nil || !alive {
		return err
	}
	if err := kubelet.Stop(ctx, unix.SIGTERM); err != nil {
		return fmt.Errorf("stop the kubelet of %s: %w", n.Name, err)
	}
	return nil
}

// StartKubelet starts the node's kubelet if it does not run.
func (n *Node) StartKubelet(ctx context.Context) error {
	name := n.Name + "-kubelet"
	if _, alive, err := n.state.running(name); err != nil || alive {
		return err
	}
	_, err := n.state.spawn(ctx, n.Name, name, "kubelet",
		"--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=/etc/kubernetes/kubelet.kubeconfig",
		"--node-ip="+n.IPv4)
	return err
}

// RestartKubelet stops and starts the node's kubelet.
func (n *Node) RestartKubelet(ctx context.Context) error {
	if err := n.StopKubelet(ctx); err != nil {
		return err
	}
	return n.StartKubelet(ctx)
}

// PowerOff ends everything in the node at once. What it had in memory, /run
// above all, is lost; its disk (nodeinit.Kept) stays.
func (n *Node) PowerOff(ctx context.Context) error {
	for _, d := range devices() {
		// This comes first: the kernel closes the connections of a killed process, and without power nothing closes
		// them.
		if err := n.unplug(d); err != nil {
			return err
		}
	}
	if err := n.state.nodeGroup(n.Name).Kill(ctx); err != nil {
		return err
	}
	// A control group is empty a moment before its processes have ended.
	for _, name := range []string{n.Name, n.Name + "-containerd", n.Name + "-kubelet", n.Name + "-kube-proxy"} {
		r, alive, err := n.state.running(name)
		if err != nil {
			return err
		}
		if !alive {
			continue
		}
		if err := r.Wait(ctx); err != nil {
			return fmt.Errorf("wait for the end of %s: %w", name, err)
		}
	}
	return n.state.nodeGroup(n.Name).Remove()
}

// PowerOn starts a node that is off, and returns when it is Ready again.
func (n *Node) PowerOn(ctx context.Context) error {
	if _, alive, err := n.state.running(n.Name); err != nil || alive {
		return err
	}
	if err := n.boot(ctx); err != nil {
		return err
	}
	return n.join(ctx)
}

// boot brings the node up to its container runtime; it needs no API server.
func (n *Node) boot(ctx context.Context) error {
	if _, err := n.state.spawned(ctx, n.Name, "spawn-node", n.Name); err != nil {
		return fmt.Errorf("start %s: %w%s", n.Name, err, n.state.tail(n.Name))
	}
	if err := n.connect(); err != nil {
		return err
	}
	return n.startRuntime(ctx)
}

// startRuntime starts the node's container runtime, if it does not run, and
// returns when it listens.
func (n *Node) startRuntime(ctx context.Context) error {
	name := n.Name + "-containerd"
	if _, alive, err := n.state.running(name); err != nil || alive {
		return err
	}
	containerd, err := n.state.spawn(ctx, n.Name, name, "containerd", "--config=/etc/containerd/config.toml")
	if err != nil {
		return err
	}
	socket := n.path("/run/containerd/containerd.sock")
	return n.state.until(ctx, name, containerd, func(context.Context) error {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// path is a path in the node, as the machine sees it while the node has power.
func (n *Node) path(inNode string) string {
	first, err := process.Load(n.state.process(n.Name))
	if err != nil {
		return filepath.Join("/proc/none", inNode)
	}
	return filepath.Join("/proc", strconv.Itoa(first.PID), "root", inNode)
}

// join starts what makes the machine a node of the cluster, and returns when
// it is Ready.
func (n *Node) join(ctx context.Context) error {
	if err := n.StartKubelet(ctx); err != nil {
		return err
	}
	if err := n.startProxy(ctx); err != nil {
		return err
	}
	return n.waitReady(ctx)
}

// startProxy starts the node's kube-proxy if it does not run.
func (n *Node) startProxy(ctx context.Context) error {
	name := n.Name + "-kube-proxy"
	if _, alive, err := n.state.running(name); err != nil || alive {
		return err
	}
	_, err := n.state.spawn(ctx, n.Name, name, "kube-proxy",
		"--kubeconfig=/etc/kubernetes/kube-proxy.kubeconfig", "--proxy-mode=nftables",
		"--cluster-cidr="+podCIDR+","+podCIDR6, "--conntrack-max-per-core=0") // 0: leave it, it is the machine's
	return err
}

// Mend starts those of containerd, kubelet and kube-proxy that do not run in a
// node that has power, and returns when it is Ready.
func (n *Node) Mend(ctx context.Context) error {
	if err := n.startRuntime(ctx); err != nil {
		return err
	}
	return n.join(ctx)
}

// waitReady returns when the kubelet of this boot of the node says Ready.
func (n *Node) waitReady(ctx context.Context) error {
	boot, err := os.ReadFile(n.path("/run/boot_id"))
	if err != nil {
		return fmt.Errorf("read the boot ID of %s: %w", n.Name, err)
	}
	name := n.Name + "-kubelet"
	kubelet, _, err := n.state.running(name)
	if err != nil {
		return err
	}
	client, err := n.state.client()
	if err != nil {
		return err
	}
	return n.state.until(ctx, name, kubelet, func(ctx context.Context) error {
		return client.waitNodeReady(ctx, n.Name, strings.TrimSpace(string(boot)))
	})
}

const (
	startTimeout = 3 * time.Minute       // for any one process to become ready
	waitDelay    = 5 * time.Second       // for a helper's streams to close after its end
	tryInterval  = 20 * time.Millisecond // between checks of a process that is starting
)

// until calls ready until it returns nil, the process has ended or startTimeout
// is over. A starting program reports nowhere when its socket listens, so
// until tries.
func (s state) until(ctx context.Context, name string, r process.Record, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	go func() {
		if r.Wait(ctx) == nil {
			cancel() // it has ended
		}
	}()
	tick := time.NewTicker(tryInterval)
	defer tick.Stop()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			what := "has ended"
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				what = fmt.Sprintf("is not ready after %v", startTimeout)
			}
			return fmt.Errorf("%s %s: %w%s", name, what, err, s.tail(name))
		case <-tick.C:
		}
	}
}
