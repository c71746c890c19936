package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/k8slan/k8slan/test/cluster/internal/component"
	"github.com/k8slan/k8slan/test/cluster/internal/process"
)

// Config says where a cluster keeps what, and what it starts with.
type Config struct {
	Name     string       // empty for the usual cluster; another one beside it has a letter, see Name
	CacheDir string       // what is built once, see CacheDir
	Images   []string     // OCI archives to load into every node; one has the sandbox image, localhost/k8slan/pause:1
	Log      *slog.Logger // progress; slog.Default() if nil
	// Progress is called while a component is built, with how many of its packages are compiled of how many: of 0 until
	// that is known, and of as many when it is built. If it is nil, the log has it once a minute.
	Progress func(component string, done, total int)
}

func (cfg Config) withDefaults() Config {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Progress == nil {
		cfg.Progress = logProgress(cfg.Log)
	}
	return cfg
}

// Cluster is a cluster that is up.
type Cluster struct {
	state state
	log   *slog.Logger
	nodes []*Node
}

func newCluster(cfg Config) *Cluster {
	c := &Cluster{state: state(cfg.Name), log: cfg.Log}
	for _, s := range specs() {
		c.nodes = append(c.nodes, &Node{spec: s, state: c.state})
	}
	return c
}

// record is written once a cluster is complete.
type record struct {
	Boot    string `json:"boot"`    // the machine's boot the cluster came up in
	Devices int    `json:"devices"` // that each of its nodes has
}

// ErrNotUp says that there is no complete cluster.
var ErrNotUp = errors.New("no cluster is up")

// Open finds the cluster of that name that is up; ErrNotUp if there is none.
func Open(name string) (*Cluster, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	c := newCluster(Config{Name: name}.withDefaults())
	r, err := c.state.readRecord()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s", ErrNotUp, c.state.dir())
	}
	if err != nil {
		return nil, err
	}
	boot, err := process.BootID()
	if err != nil {
		return nil, err
	}
	if boot != r.Boot {
		return nil, fmt.Errorf("%w in %s: the machine has booted since it was", ErrNotUp, c.state.dir())
	}
	if r.Devices != len(devices()) {
		return nil, fmt.Errorf("%w in %s but one of an earlier version, whose nodes have %d devices", ErrNotUp,
			c.state.dir(), r.Devices)
	}
	_, alive, err := c.state.running("kube-apiserver")
	if err != nil {
		return nil, err
	}
	if !alive {
		return nil, fmt.Errorf("%w in %s: its API server has ended%s", ErrNotUp, c.state.dir(),
			c.state.tail("kube-apiserver"))
	}
	return c, nil
}

func (s state) readRecord() (record, error) {
	content, err := os.ReadFile(s.record())
	if err != nil {
		return record{}, fmt.Errorf("read the cluster's record: %w", err)
	}
	var r record
	if err := json.Unmarshal(content, &r); err != nil {
		return record{}, fmt.Errorf("read the cluster's record %s: %w", s.record(), err)
	}
	return r, nil
}

// Kubeconfig is the path of the administrator's kubeconfig, for programs in
// the machine's own network namespace.
func (c *Cluster) Kubeconfig() string { return c.state.kubeconfig() }

// Kubectl is the path of the kubectl that belongs to the cluster.
func (c *Cluster) Kubectl() string { return c.state.bin("kubectl") }

// Logs is the directory with the logs of the cluster's processes.
func (c *Cluster) Logs() string { return c.state.path("log") }

// Nodes lists the nodes, those without power included.
func (c *Cluster) Nodes() []*Node { return slices.Clone(c.nodes) }

// Node returns the node of that name, nil if there is none.
func (c *Cluster) Node(name string) *Node {
	i := slices.IndexFunc(c.nodes, func(n *Node) bool { return n.Name == name })
	if i < 0 {
		return nil
	}
	return c.nodes[i]
}

// LoadImage imports the images of an OCI archive into every node.
func (c *Cluster) LoadImage(ctx context.Context, archive string) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, n := range c.nodes {
		group.Go(func() error { return n.loadImage(ctx, archive) })
	}
	return group.Wait()
}

func (n *Node) loadImage(ctx context.Context, archive string) error {
	file, err := os.Open(archive)
	if err != nil {
		return fmt.Errorf("load an image: %w", err)
	}
	defer file.Close()
	if _, err := n.exec(ctx, file, "ctr", "--namespace=k8s.io", "images", "import", "--local", "-"); err != nil {
		return fmt.Errorf("load image archive %s: %w", archive, err)
	}
	return nil
}

// Process is one of the cluster's processes.
type Process struct {
	Name string
	PID  int // in the machine; 0 if it does not run
	Log  string
}

// Processes lists what Up started, with the nodes' first processes under the
// nodes' names.
func (c *Cluster) Processes() ([]Process, error) {
	entries, err := os.ReadDir(c.state.path("pids"))
	if err != nil {
		return nil, fmt.Errorf("list the cluster's processes: %w", err)
	}
	var all []Process
	for _, entry := range entries {
		r, alive, err := c.state.running(entry.Name())
		if err != nil {
			return nil, err
		}
		p := Process{Name: entry.Name(), Log: c.state.log(entry.Name())}
		if alive {
			p.PID = r.PID
		}
		all = append(all, p)
	}
	return all, nil
}

// Build builds one of the components in test/cluster/components, unless the cache
// has it, and returns the directory with its programs. The working
// directory must be in k8slan's module.
func Build(ctx context.Context, cfg Config, name string) (binDir string, err error) {
	dirs, err := BuildAll(ctx, cfg, name)
	return dirs[name], err
}

// BuildAll builds several components side by side, and returns the directories
// with their programs by name.
func BuildAll(ctx context.Context, cfg Config, names ...string) (binDirs map[string]string, err error) {
	cfg = cfg.withDefaults()
	source, err := moduleDir(ctx)
	if err != nil {
		return nil, err
	}
	builder := component.Builder{
		Source: filepath.Join(source, "test/cluster/components"), Cache: filepath.Join(cfg.CacheDir, "components"),
		Log: cfg.Log, Progress: cfg.Progress,
	}
	var mu sync.Mutex
	binDirs = map[string]string{}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(sideBySide)
	for _, name := range names {
		g.Go(func() error {
			dir, err := builder.Build(ctx, name)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			binDirs[name] = dir
			return linkTool(cfg.ToolDir(), dir, tools[name])
		})
	}
	return binDirs, g.Wait()
}

// sideBySide is how many components are built at the same time: while one downloads or links, another compiles.
const sideBySide = 2

// tools are the programs for people, by their components.
var tools = map[string]string{"kubernetes": "kubectl", "helm": "helm"}

// ToolDir has the newest kubectl and helm that were built.
func (cfg Config) ToolDir() string { return filepath.Join(cfg.CacheDir, "bin") }

// linkTool keeps the newest version of a program at a path that does not change.
func linkTool(dir, programs, tool string) error {
	if tool == "" {
		return nil
	}
	link, target := filepath.Join(dir, tool), filepath.Join(programs, tool)
	if have, err := os.Readlink(link); err == nil && have == target {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("link %s: %w", tool, err)
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("link %s: %w", tool, err)
	}
	if err := os.Symlink(target, link); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("link %s: %w", tool, err)
	}
	return nil
}

// logProgress logs once a minute how much of a component is compiled.
func logProgress(log *slog.Logger) func(name string, done, total int) {
	var mu sync.Mutex
	last := map[string]time.Time{}
	return func(name string, done, total int) {
		mu.Lock()
		defer mu.Unlock()
		if last[name].IsZero() {
			last[name] = time.Now()
		}
		if time.Since(last[name]) >= time.Minute {
			last[name] = time.Now()
			log.Info("building", "component", name, "packages", done, "of", total)
		}
	}
}

// Components names what Build can build.
func Components() []string {
	var names []string
	for _, c := range component.All() {
		names = append(names, c.Name)
	}
	return names
}

const modulePath = "github.com/k8slan/k8slan"

// moduleDir finds k8slan's source by the working directory.
func moduleDir(ctx context.Context) (string, error) {
	out, err := output(exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", modulePath))
	if err != nil {
		return "", fmt.Errorf("find the source of %s (the working directory must be in it): %w", modulePath, err)
	}
	return strings.TrimSpace(string(out)), nil
}
