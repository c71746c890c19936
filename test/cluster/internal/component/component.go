// Package component builds the programs that the test bed's Kubernetes
// consists of from source, each version once: what was built stays in a cache.
package component

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Component is a folder with a Go module of its own that pins one upstream
// release.
type Component struct {
	Name     string
	Packages string   // the arguments of go build: "." for the module itself, "tool" for its go.mod's tools
	Tags     string   // build tags
	LDFlags  string   // beside -s -w
	Links    []string // "name=program" pairs: further names of the programs built
}

// All lists the components.
func All() []Component {
	return []Component{
		{
			Name:     "kubernetes",
			Packages: ".",
			LDFlags:  kubernetesVersion("v1.36.3"),
			Links: []string{
				"kube-apiserver=kubernetes", "kube-controller-manager=kubernetes", "kube-scheduler=kubernetes",
				"kube-proxy=kubernetes", "kubelet=kubernetes", "kubectl=kubernetes",
			},
		},
		{Name: "etcd", Packages: "tool", Links: []string{"etcd=server"}},
		{Name: "containerd", Packages: "tool", Tags: "no_btrfs,no_devmapper,no_zfs,no_aufs"},
		{Name: "cni", Packages: "tool"},
		{Name: "multus", Packages: "tool"},
		{Name: "helm", Packages: "tool"},
	}
}

// kubernetesVersion makes the flags by which Kubernetes programs know their
// own version; without one the kubelet is refused as too old.
func kubernetesVersion(version string) string {
	numbers := strings.Split(strings.TrimPrefix(version, "v"), ".")
	values := []string{
		"gitVersion=" + version, "gitMajor=" + numbers[0], "gitMinor=" + numbers[1],
		"gitTreeState=clean", "gitCommit=unknown", "buildDate=1970-01-01T00:00:00Z",
	}
	var flags []string
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		for _, value := range values {
			flags = append(flags, "-X "+pkg+"."+value)
		}
	}
	return strings.Join(flags, " ")
}

// Builder builds components into a cache.
type Builder struct {
	Source string // the directory with the components' folders
	Cache  string
	Log    *slog.Logger
	// Progress is called while a component is built, with how many of its packages are compiled of how many: of 0 until
	// that is known, and of as many when it is built. It may be nil.
	Progress func(name string, done, total int)
}

// Build builds the component called name, unless the cache has it, and returns
// the directory with its programs.
func (b Builder) Build(ctx context.Context, name string) (dir string, err error) {
	all := All()
	i := slices.IndexFunc(all, func(c Component) bool { return c.Name == name })
	if i < 0 {
		return "", fmt.Errorf("there is no component %q to build", name)
	}
	c := all[i]
	module := filepath.Join(b.Source, name)
	key, err := c.key(os.DirFS(module))
	if err != nil {
		return "", fmt.Errorf("read component %s: %w", name, err)
	}
	dir = filepath.Join(b.Cache, name+"-"+key)
	if _, err := os.Stat(dir); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	b.Log.Info("building a component from source", "component", name, "hint", c.hint())
	begin := time.Now()
	if err := b.build(ctx, c, module, dir); err != nil {
		return "", err
	}
	b.Log.Info("built", "component", name, "seconds", int(time.Since(begin).Seconds()))
	return dir, nil
}

func (c Component) hint() string {
	if c.Name == "kubernetes" {
		return "takes about 7 minutes on 2 cores, the first time"
	}
	return "takes a minute or two on 2 cores, the first time"
}

// key is a hash over all that decides what is built, but the Go version.
func (c Component) key(module fs.FS) (string, error) {
	hash := sha256.New()
	fmt.Fprintf(hash, "%q\n%q\n", c.args(""), c.Links)
	files, err := fs.Glob(module, "*")
	if err != nil {
		return "", err
	}
	for _, name := range files { // sorted
		content, err := fs.ReadFile(module, name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(hash, "%s %d\n", name, len(content))
		hash.Write(content)
	}
	return fmt.Sprintf("%x", hash.Sum(nil)[:6]), nil
}

func (c Component) args(out string) []string {
	return []string{
		"build", "-trimpath", "-buildvcs=false", "-tags=" + c.Tags,
		"-ldflags=" + strings.TrimSpace("-s -w "+c.LDFlags), "-o", out + "/", c.Packages,
	}
}

// build builds beside dir and renames, so that dir is never half there.
func (b Builder) build(ctx context.Context, c Component, module, dir string) error {
	if err := os.MkdirAll(b.Cache, 0o755); err != nil {
		return fmt.Errorf("make the cache for component %s: %w", c.Name, err)
	}
	temporary, err := os.MkdirTemp(b.Cache, ".building-")
	if err != nil {
		return fmt.Errorf("make the cache for component %s: %w", c.Name, err)
	}
	defer os.RemoveAll(temporary)
	if err := b.compile(ctx, c, module, temporary); err != nil {
		return fmt.Errorf("build component %s in %s: %w", c.Name, module, err)
	}
	for _, link := range c.Links {
		name, program, _ := strings.Cut(link, "=")
		if err := os.Symlink(program, filepath.Join(temporary, name)); err != nil {
			return fmt.Errorf("link component %s: %w", c.Name, err)
		}
	}
	if err := os.Chmod(temporary, 0o755); err != nil {
		return fmt.Errorf("finish component %s: %w", c.Name, err)
	}
	// Another build of the same may have come first: as good as this one.
	if err := os.Rename(temporary, dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("finish component %s: %w", c.Name, err)
	}
	return nil
}

// compile runs go build, which names each package that it compiles, and reports the progress.
func (b Builder) compile(ctx context.Context, c Component, module, out string) error {
	report := b.Progress
	if report == nil {
		report = func(string, int, int) {}
	}
	list := func(args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = module
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
		return cmd
	}
	report(c.Name, 0, 0)
	total := 0
	if err := b.lines(list("list", "-tags="+c.Tags, "-deps", c.Packages), func(string) { total++ }); err != nil {
		return err
	}
	report(c.Name, 0, total)
	done := 0
	defer func() { report(c.Name, total, total) }()
	build := append([]string{"build", "-v"}, c.args(out)[1:]...) // -v has no part in the key
	return b.lines(list(build...), func(string) {
		done = min(done+1, total-1) // the programs are still to be linked
		report(c.Name, done, total)
	})
}

// lines runs go and calls each for the name of each package that it prints. Its other output goes to the log, such as
// the modules that it downloads, and to the error.
func (b Builder) lines(cmd *exec.Cmd, each func(name string)) error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	cmd.Stdout, cmd.Stderr = write, write
	err = cmd.Start()
	write.Close()
	if err != nil {
		return err
	}
	var other []string
	for output := bufio.NewScanner(read); output.Scan(); {
		line := output.Text()
		switch {
		case strings.HasPrefix(line, "go: downloading "):
			b.Log.Info(line)
		case isPackage(line):
			each(line)
		default:
			other = append(other, line)
		}
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%w:\n%s", err, strings.Join(other, "\n"))
	}
	return nil
}

// isPackage says whether a line is the path of a package, and no message.
func isPackage(line string) bool {
	return line != "" && !strings.ContainsAny(line, " :\t#")
}
