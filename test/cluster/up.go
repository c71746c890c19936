package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/build/debian"
	"github.com/k8slan/k8slan/test/cluster/internal/nodeinit"
	"github.com/k8slan/k8slan/test/cluster/internal/pki"
	"github.com/k8slan/k8slan/test/cluster/internal/process"
)

// packages are what the cluster's programs call.
func packages() []string {
	return []string{
		"runc", "busybox-static", "conntrack", "iptables", "nftables", "socat", "ethtool",
		"iproute2", "iputils-ping", "kmod", "mount", "util-linux", "procps",
	}
}

// machines is how many machines a cluster stands for: two nodes, and one for the
// control plane.
const machines = 3

// components are what a cluster runs.
func components() []string { return []string{"kubernetes", "etcd", "containerd", "cni", "multus"} }

// Up brings the cluster up and returns when both nodes are Ready and have the
// images. If one is up already, it returns that one unchanged. It first removes
// what an earlier cluster left. It needs root.
//
// If it fails, what has been started stays for inspection; Down removes it.
func Up(ctx context.Context, cfg Config) (*Cluster, error) {
	cfg = cfg.withDefaults()
	c, err := Open(cfg.Name)
	if err == nil {
		cfg.Log.Info("the cluster is up already; its images stay", "state", c.state.dir())
		return c, nil
	}
	if !errors.Is(err, ErrNotUp) {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("bring up the cluster: only root can")
	}
	if err := Down(ctx, cfg); err != nil {
		return nil, fmt.Errorf("remove what an earlier cluster left: %w", err)
	}
	c = newCluster(cfg)
	if err := c.up(ctx, cfg); err != nil {
		return nil, fmt.Errorf("bring up the cluster: %w\nlogs are in %s; `cluster down` removes what was started", err,
			c.Logs())
	}
	return c, nil
}

func (c *Cluster) up(ctx context.Context, cfg Config) error {
	programs, err := c.prepare(ctx, cfg)
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := c.write(programs); err != nil {
		return err
	}
	if err := c.state.changeSysctls(); err != nil {
		return err
	}
	if err := c.state.group().Create(); err != nil {
		return err
	}
	if err := c.state.group().SetWeight(machines); err != nil {
		return err
	}
	if err := c.state.createUnderlay(); err != nil {
		return err
	}
	if err := c.start(ctx, cfg.Images); err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.log.Info("the cluster is up", "seconds", int(time.Since(begin).Seconds()), "kubeconfig", c.Kubeconfig(),
		"tools", cfg.ToolDir())
	return nil
}

// prepare does what is needed once per machine, and returns the directories
// with the components' programs.
func (c *Cluster) prepare(ctx context.Context, cfg Config) (programs map[string]string, err error) {
	if err := debian.Install(ctx, cfg.Log, packages()...); err != nil {
		return nil, err
	}
	if programs, err = BuildAll(ctx, cfg, components()...); err != nil {
		return nil, err
	}
	source, err := moduleDir(ctx)
	if err != nil {
		return nil, err
	}
	build := exec.CommandContext(ctx, "go", "build", "-o", c.state.bin("cluster"), "./test/cluster/cmd/cluster")
	build.Dir, build.Env = source, append(os.Environ(), "CGO_ENABLED=0")
	if _, err := output(build); err != nil {
		return nil, fmt.Errorf("build the cluster command: %w", err)
	}
	return programs, loadModules(ctx)
}

// loadModules makes sure that nodes can filter bridged frames, which Services
// between pods of one node need; the other modules the kernel loads when they
// are used.
func loadModules(ctx context.Context) error {
	if _, err := os.Stat("/proc/sys/net/bridge"); err == nil {
		return nil
	}
	if _, err := output(exec.CommandContext(ctx, "modprobe", "br_netfilter")); err != nil {
		return fmt.Errorf("load kernel module br_netfilter: %w", err)
	}
	return nil
}

// write makes the state directory: links to the programs, certificates, and
// the nodes' disks.
func (c *Cluster) write(programs map[string]string) error {
	for _, dir := range []string{"log", "pids", "pki", "etcd"} {
		if err := os.MkdirAll(c.state.path(dir), 0o755); err != nil {
			return fmt.Errorf("make the state directory: %w", err)
		}
	}
	for _, name := range []string{"kubernetes", "etcd", "containerd"} {
		if err := linkPrograms(programs[name], c.state.path("bin")); err != nil {
			return err
		}
	}
	authority, err := c.writePKI()
	if err != nil {
		return fmt.Errorf("write the certificates: %w", err)
	}
	for _, n := range c.nodes {
		if err := n.writeDisk(authority); err != nil {
			return fmt.Errorf("write the disk of %s: %w", n.Name, err)
		}
		for _, name := range []string{"cni", "multus"} {
			if err := os.CopyFS(c.state.disk(n.Name, "opt/cni/bin"), os.DirFS(programs[name])); err != nil {
				return fmt.Errorf("write the CNI plugins of %s: %w", n.Name, err)
			}
		}
	}
	return nil
}

func linkPrograms(from, to string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return fmt.Errorf("list programs: %w", err)
	}
	for _, entry := range entries {
		if err := os.Symlink(filepath.Join(from, entry.Name()), filepath.Join(to, entry.Name())); err != nil {
			return fmt.Errorf("link a program: %w", err)
		}
	}
	return nil
}

// writePKI makes every certificate of the control plane.
func (c *Cluster) writePKI() (pki.Authority, error) {
	authority, err := pki.NewAuthority("k8slan-cluster")
	if err != nil {
		return authority, err
	}
	private, public, err := pki.SigningKey()
	if err != nil {
		return authority, err
	}
	err = errors.Join(
		c.writeFile("pki/ca.crt", authority.Cert), c.writeFile("pki/ca.key", authority.Key),
		c.writeFile("pki/service-accounts.key", private), c.writeFile("pki/service-accounts.pub", public),
	)
	if err != nil {
		return authority, err
	}
	service := "kubernetes.default.svc"
	for file, subject := range map[string]pki.Subject{
		"apiserver": {Name: "kube-apiserver", Hosts: []string{
			controlIPv4, controlIPv6, "127.0.0.1", kubernetesIP, "localhost",
			"kubernetes", "kubernetes.default", service, service + "." + clusterDomain,
		}},
		"kubelet-client":     {Name: "kube-apiserver-kubelet-client", Group: "system:masters"},
		"front-proxy":        {Name: "front-proxy"},
		"admin":              {Name: "admin", Group: "system:masters"},
		"controller-manager": {Name: "system:kube-controller-manager"},
		"scheduler":          {Name: "system:kube-scheduler"},
	} {
		pair, err := authority.Issue(subject)
		if err != nil {
			return authority, err
		}
		err = errors.Join(
			c.writeFile("pki/"+file+".crt", pair.Cert), c.writeFile("pki/"+file+".key", pair.Key),
			c.writeFile("pki/"+file+".kubeconfig", authority.Kubeconfig("https://"+apiServer, pair)),
		)
		if file == "admin" {
			err = errors.Join(err, c.writeFile("kubeconfig", authority.Kubeconfig("https://"+c.state.address(), pair)))
		}
		if err != nil {
			return authority, err
		}
	}
	return authority, nil
}

// writeFile writes a file of the state directory that only root may read.
func (c *Cluster) writeFile(name string, content []byte) error {
	path := c.state.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o600)
}

// writeDisk puts on the node's disk what an installer would.
func (n *Node) writeDisk(authority pki.Authority) error {
	for _, dir := range nodeinit.Kept() {
		if err := os.MkdirAll(n.state.disk(n.Name, dir), 0o755); err != nil {
			return err
		}
	}
	kubelet, err := authority.Issue(pki.Subject{
		Name: "system:node:" + n.Name, Group: "system:nodes", Hosts: []string{n.Name, n.IPv4},
	})
	if err != nil {
		return err
	}
	proxy, err := authority.Issue(pki.Subject{Name: "system:kube-proxy"})
	if err != nil {
		return err
	}
	multus, err := authority.Issue(pki.Subject{Name: "multus"})
	if err != nil {
		return err
	}
	files := map[string][]byte{
		"etc/kubernetes/ca.crt":                    authority.Cert,
		"etc/kubernetes/kubelet.crt":               kubelet.Cert,
		"etc/kubernetes/kubelet.key":               kubelet.Key,
		"etc/kubernetes/kubelet.kubeconfig":        authority.Kubeconfig("https://"+apiServer, kubelet),
		"etc/kubernetes/kube-proxy.kubeconfig":     authority.Kubeconfig("https://"+apiServer, proxy),
		"etc/cni/net.d/multus.d/multus.kubeconfig": authority.Kubeconfig("https://"+apiServer, multus),
	}
	for path, name := range map[string]string{
		"etc/kubernetes/kubelet.yaml":  "kubelet.yaml",
		"etc/containerd/config.toml":   "containerd.toml",
		"etc/cni/net.d/00-multus.conf": "00-multus.conf",
	} {
		if files[path], err = render(name, n.spec); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(n.state.disk(n.Name, "etc/kubernetes/manifests"), 0o755); err != nil {
		return err
	}
	for path, content := range files {
		file := n.state.disk(n.Name, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, content, 0o600); err != nil {
			return err
		}
	}
	return os.MkdirAll(n.state.path("nodes", n.Name, "root"), 0o755)
}

// start starts everything: the control plane beside the nodes' runtimes and
// images, then what needs both.
func (c *Cluster) start(ctx context.Context, images []string) error {
	if err := c.state.controlGroup().Create(); err != nil {
		return err
	}
	first, firstCtx := errgroup.WithContext(ctx)
	first.Go(func() error { return c.startAPI(firstCtx) })
	for _, n := range c.nodes {
		first.Go(func() error { return n.boot(firstCtx) })
	}
	if err := first.Wait(); err != nil {
		return err
	}
	then, thenCtx := errgroup.WithContext(ctx)
	then.Go(func() error { return c.startControllers(thenCtx) })
	then.Go(func() error { return c.applyManifests(thenCtx) })
	for _, n := range c.nodes {
		then.Go(func() error { return n.join(thenCtx) })
		then.Go(func() error {
			for _, archive := range images {
				if err := n.loadImage(thenCtx, archive); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return then.Wait()
}

// startAPI starts etcd, the API server and the forwarder to it, and returns
// when the API is ready.
func (c *Cluster) startAPI(ctx context.Context) error {
	_, err := c.state.spawn(ctx, placeControlPlane, "etcd", "etcd", "--name=k8slan", "--data-dir="+c.state.path("etcd"),
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
		"--initial-cluster=k8slan=http://127.0.0.1:2380",
		"--unsafe-no-fsync", // the data does not outlive the machine's boot anyway
		"--log-level=warn")
	if err != nil {
		return err
	}
	// The forwarder comes first: the check of the API server goes through it.
	if _, err := c.state.spawn(ctx, placeMachine, "proxy", c.state.bin("cluster"), "--name", string(c.state),
		"proxy"); err != nil {
		return err
	}
	return c.StartAPIServer(ctx)
}

// StartAPIServer starts the API server, if it does not run, and returns when
// it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	const name = "kube-apiserver"
	if _, alive, err := c.state.running(name); err != nil || alive {
		return err
	}
	server, err := c.state.spawn(ctx, placeControlPlane, name, append([]string{name}, c.apiServerFlags()...)...)
	if err != nil {
		return err
	}
	client, err := c.state.client()
	if err != nil {
		return err
	}
	return c.state.until(ctx, name, server, client.ready)
}

// StopAPIServer kills the API server; all else goes on without it.
func (c *Cluster) StopAPIServer(ctx context.Context) error {
	server, alive, err := c.state.running("kube-apiserver")
	if err != nil || !alive {
		return err
	}
	if err := server.Stop(ctx, unix.SIGKILL); err != nil {
		return fmt.Errorf("stop the API server: %w", err)
	}
	return nil
}

func (c *Cluster) apiServerFlags() []string {
	pki := c.state.pki
	return []string{
		"--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address=" + controlIPv4, "--bind-address=0.0.0.0", "--secure-port=6443",
		"--cert-dir=" + c.state.path("pki"),
		"--tls-cert-file=" + pki("apiserver.crt"), "--tls-private-key-file=" + pki("apiserver.key"),
		"--client-ca-file=" + pki("ca.crt"),
		"--kubelet-client-certificate=" + pki("kubelet-client.crt"), "--kubelet-client-key=" +
			pki("kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + pki("service-accounts.pub"),
		"--service-account-signing-key-file=" + pki("service-accounts.key"),
		"--service-cluster-ip-range=" + serviceCIDRs,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--requestheader-client-ca-file=" + pki("ca.crt"), "--requestheader-allowed-names=front-proxy",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + pki("front-proxy.crt"), "--proxy-client-key-file=" + pki("front-proxy.key"),
		// there is no kube-proxy beside the API server: it calls endpoints, not Services
		"--enable-aggregator-routing=true",
		// Pods leave a dead node within half a minute, not five.
		"--default-not-ready-toleration-seconds=20", "--default-unreachable-toleration-seconds=20",
	}
}

// startControllers starts the controller manager and the scheduler, and returns
// when the former has done what pods need.
func (c *Cluster) startControllers(ctx context.Context) error {
	flags := func(kubeconfig string, more ...string) []string {
		path := c.state.pki(kubeconfig + ".kubeconfig")
		return append(more, "--kubeconfig="+path, "--authentication-kubeconfig="+path,
			"--authorization-kubeconfig="+path,
			"--leader-elect=false", "--cert-dir="+c.state.path("pki"))
	}
	manager, err := c.state.spawn(ctx, placeControlPlane, "kube-controller-manager",
		flags("controller-manager", "kube-controller-manager",
			"--service-account-private-key-file="+c.state.pki("service-accounts.key"),
			"--root-ca-file="+c.state.pki("ca.crt"),
			"--use-service-account-credentials=true",
			"--kube-api-qps=500", "--kube-api-burst=500", // else it holds back for seconds when it starts
			"--cluster-signing-cert-file="+c.state.pki("ca.crt"), "--cluster-signing-key-file="+c.state.pki("ca.key"),
			// A dead node shows after eight seconds, not fifty; kubelets renew their leases every second.
			"--node-monitor-period=1s", "--node-monitor-grace-period=8s")...)
	if err != nil {
		return err
	}
	if _, err := c.state.spawn(ctx, placeControlPlane, "kube-scheduler",
		flags("scheduler", "kube-scheduler")...); err != nil {
		return err
	}
	client, err := c.state.client()
	if err != nil {
		return err
	}
	return c.state.until(ctx, "kube-controller-manager", manager, client.waitPodsAllowed)
}

// applyManifests creates the objects the cluster starts with.
func (c *Cluster) applyManifests(ctx context.Context) error {
	objects, err := manifests()
	if err != nil {
		return err
	}
	apply := exec.CommandContext(ctx, c.Kubectl(), "--kubeconfig="+c.Kubeconfig(),
		"--cache-dir="+c.state.path("kubectl-cache"),
		"apply", "--server-side", "-f", "-")
	apply.Stdin = strings.NewReader(objects)
	if _, err := output(apply); err != nil {
		return fmt.Errorf("create the cluster's first objects: %w", err)
	}
	return nil
}

// finish marks the cluster as complete.
func (c *Cluster) finish() error {
	boot, err := process.BootID()
	if err != nil {
		return err
	}
	return writeJSON(c.state.record(), record{Boot: boot, Devices: len(devices())})
}

// Status prints one line for each process of the cluster.
func (c *Cluster) Status(out io.Writer) error {
	processes, err := c.Processes()
	if err != nil {
		return err
	}
	for _, p := range processes {
		state := "ended"
		if p.PID != 0 {
			state = fmt.Sprintf("runs as %d", p.PID)
		}
		if _, err := fmt.Fprintf(out, "%-26s %-16s %s\n", p.Name, state, p.Log); err != nil {
			return err
		}
	}
	return nil
}
