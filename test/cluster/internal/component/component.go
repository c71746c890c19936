// Package component builds the programs that the test bed's Kubernetes
// consists of from source, each version once: what was built stays in a cache.
package component

import (
	"bytes"
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
	Packages string   // what go build is told: "." for the module itself, "tool" for its go.mod's tools
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

// Build builds the component called name from its folder below source, unless
// cache has it already, and returns the directory with its programs.
func Build(ctx context.Context, log *slog.Logger, source, cache, name string) (dir string, err error) {
	all := All()
	i := slices.IndexFunc(all, func(c Component) bool { return c.Name == name })
	if i < 0 {
		return "", fmt.Errorf("there is no component %q to build", name)
	}
	c := all[i]
	module := filepath.Join(source, name)
	key, err := c.key(os.DirFS(module))
	if err != nil {
		return "", fmt.Errorf("read component %s: %w", name, err)
	}
	dir = filepath.Join(cache, name+"-"+key)
	if _, err := os.Stat(dir); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	log.Info("building a component from source", "component", name, "hint", c.hint())
	begin := time.Now()
	if err := c.build(ctx, module, dir); err != nil {
		return "", err
	}
	log.Info("built", "component", name, "seconds", int(time.Since(begin).Seconds()))
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
func (c Component) build(ctx context.Context, module, dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("make the cache for component %s: %w", c.Name, err)
	}
	temporary, err := os.MkdirTemp(filepath.Dir(dir), ".building-")
	if err != nil {
		return fmt.Errorf("make the cache for component %s: %w", c.Name, err)
	}
	defer os.RemoveAll(temporary)
	cmd := exec.CommandContext(ctx, "go", c.args(temporary)...)
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build component %s in %s: %w:\n%s", c.Name, module, err, bytes.TrimSpace(out))
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
