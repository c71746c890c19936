// Package install puts this checkout's k8slan on a test cluster, as a user would: image, CRDs and chart.
package install

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/k8slan/k8slan/build/image"
	"github.com/k8slan/k8slan/test/cluster"
	"github.com/k8slan/k8slan/test/images"
)

// Namespace and Release are what the README's install command names.
const (
	Namespace = "k8slan-system"
	Release   = "k8slan"
)

// Bed is a cluster with what is needed to install k8slan on it.
type Bed struct {
	cluster.Config
	Cluster *cluster.Cluster // set by Up

	root string // of the checkout
	work string // the directory with what is built from the checkout

	version  string // that the programs are built as; empty: test
	previous bool   // built by the make targets of its own checkout
	*product
}

// product is the image that Build makes, for all clusters of one checkout.
type product struct {
	tag     string
	archive string // its path
}

// New returns a bed for the checkout that the working directory is in.
func New(ctx context.Context, cfg cluster.Config) (*Bed, error) {
	gomod, err := run(ctx, "", "go", "env", "GOMOD")
	if err != nil {
		return nil, err
	}
	return &Bed{
		Config:  cfg,
		root:    filepath.Dir(strings.TrimSpace(gomod)),
		work:    filepath.Join(cfg.CacheDir, "checkout"+cfg.Name),
		product: &product{},
	}, nil
}

// Beside returns a bed for the same checkout on another cluster, which uses what this one has built.
func (b *Bed) Beside(name string) *Bed {
	other := *b
	other.Name, other.Cluster = name, nil
	return &other
}

// Components builds what the cluster runs, Helm, and the images that test pods run, or finds them built.
func (b *Bed) Components(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := cluster.BuildAll(gctx, b.Config, cluster.Components()...)
		return err
	})
	g.Go(func() error { return b.images(gctx) })
	return g.Wait()
}

// images builds the images that test pods run, or finds them built.
func (b *Bed) images(ctx context.Context) error {
	b.Config.Images = nil
	for _, build := range []func(context.Context, string) (string, error){images.Pause, images.Toolbox, images.VM} {
		archive, err := build(ctx, b.CacheDir)
		if err != nil {
			return err
		}
		b.Config.Images = append(b.Config.Images, archive)
	}
	return nil
}

// Up brings the cluster up, or uses the one that is up, and loads the images into both nodes.
func (b *Bed) Up(ctx context.Context) error {
	c, err := cluster.Open(b.Name)
	if errors.Is(err, cluster.ErrNotUp) {
		b.Cluster, err = cluster.Up(ctx, b.Config)
		return err
	}
	if err != nil {
		return err
	}
	b.Cluster = c
	for _, archive := range b.Config.Images {
		if err := c.LoadImage(ctx, archive); err != nil {
			return err
		}
	}
	return nil
}

// Previous returns a bed on the same cluster for the newest release, or for the release or commit that
// K8SLAN_UPGRADE_FROM names, and says which commit that is. It lies in dir from then on. Where the checkout's history
// does not have that commit, or no k8slan in it, the error is ErrNoHistory.
func (b *Bed) Previous(ctx context.Context, dir string) (previous *Bed, commit string, err error) {
	from := os.Getenv("K8SLAN_UPGRADE_FROM")
	list, err := os.ReadFile(filepath.Join(b.root, "test/releases"))
	if err != nil {
		return nil, "", fmt.Errorf("read the list of releases: %w", err)
	}
	commit, err = run(ctx, b.root, "git", "rev-parse", "--short", released(string(list), from))
	switch {
	case err != nil && from == "":
		return nil, "", fmt.Errorf("%w: %w", ErrNoHistory, err)
	case err != nil:
		return nil, "", err
	}
	commit = strings.TrimSpace(commit)
	archive := filepath.Join(dir, "source.tar")
	if _, err := run(ctx, b.root, "git", "archive", "--output", archive, commit); err != nil {
		return nil, "", err
	}
	root := filepath.Join(dir, "source")
	if err := os.Mkdir(root, 0o755); err != nil {
		return nil, "", err
	}
	if _, err := run(ctx, root, "tar", "-xf", archive); err != nil {
		return nil, "", err
	}
	if _, err := os.Stat(filepath.Join(root, "charts/k8slan/Chart.yaml")); err != nil {
		return nil, "", fmt.Errorf("%w that has a k8slan: %w", ErrNoHistory, err)
	}
	return &Bed{
		Config: b.Config, Cluster: b.Cluster, root: root, work: filepath.Join(root, "bin"), version: commit,
		previous: true, product: &product{},
	}, commit, nil
}

// released returns the commit of a release, of the newest where from is empty. The list has a version and a commit on
// each line, the newest last. What is no version in it is taken for a commit.
func released(list, from string) (commit string) {
	commit = from
	for line := range strings.Lines(list) {
		words := strings.Fields(line)
		if len(words) == 2 && words[0] != "#" && (from == "" || words[0] == from) {
			commit = words[1]
		}
	}
	return commit
}

// ErrNoHistory says that the checkout is not one of git's, or does not have the commit to upgrade from.
var ErrNoHistory = errors.New("the checkout does not have the commit to upgrade from")

// As returns a bed for the same checkout, built as another version.
func (b *Bed) As(version, dir string) *Bed {
	return &Bed{Config: b.Config, Cluster: b.Cluster, root: b.root, work: dir, version: version, product: &product{}}
}

// Version is what the installed programs call themselves.
func (b *Bed) Version() string { return cmp.Or(b.version, "test") }

// Image is the name of the image after Build.
func (b *Bed) Image() string { return "ghcr.io/k8slan/k8slan:" + b.tag }

// Built is the path of a program after Build.
func (b *Bed) Built(program string) string { return filepath.Join(b.work, program) }

// Definitions brings the CRDs to the state they have in the checkout: Helm never changes one that is there.
func (b *Bed) Definitions(ctx context.Context) error {
	_, err := b.Kubectl(ctx, "apply", "--server-side", "--force-conflicts", "-f",
		filepath.Join(b.root, "charts/k8slan/crds"))
	return err
}

// Build builds k8slan's programs and its image from the checkout.
// The image's tag is a hash of the programs, so that a changed image is rolled out.
func (b *Bed) Build(ctx context.Context) error {
	if b.previous {
		return b.makeImage(ctx)
	}
	if _, err := run(ctx, b.root, "go", "build", "-trimpath", "-ldflags", "-s -w -X main.version="+b.Version(), "-o",
		b.work+"/", "./cmd/..."); err != nil {
		return err
	}
	programs := image.Product{K8slan: filepath.Join(b.work, "k8slan"), CNI: filepath.Join(b.work, "k8slan-cni")}
	sum, err := digest(programs.K8slan, programs.CNI)
	if err != nil {
		return err
	}
	if programs.Tools, err = image.Busybox(ctx); err != nil {
		return err
	}
	b.tag, programs.Version = "test-"+sum, "test-"+sum
	b.archive = filepath.Join(b.work, "k8slan.tar")
	return image.K8slan(ctx, b.archive, programs)
}

// makeImage builds programs and image as the checkout's own Makefile does.
func (b *Bed) makeImage(ctx context.Context) error {
	b.tag, b.archive = b.version, filepath.Join(b.root, "dist/k8slan.tar")
	_, err := run(ctx, b.root, "make", "image", "VERSION="+b.version)
	return err
}

// Load loads the image that Build made into both nodes.
func (b *Bed) Load(ctx context.Context) error { return b.Cluster.LoadImage(ctx, b.archive) }

// Chart installs the chart with these values, or upgrades what is installed, and returns when daemon and controller are
// ready.
func (b *Bed) Chart(ctx context.Context, values ...string) error {
	args := []string{"--wait", "--timeout", "3m"}
	for _, v := range values {
		args = append(args, "--set", v)
	}
	return b.Install(ctx, args...)
}

// Install installs the chart with further arguments of helm upgrade, or upgrades what is installed.
func (b *Bed) Install(ctx context.Context, args ...string) error {
	_, err := b.Helm(ctx, append([]string{
		"upgrade", "--install", Release, filepath.Join(b.root, "charts/k8slan"), "--namespace", Namespace,
		"--create-namespace",
		"--set", "image.tag=" + b.tag, "--set", "image.pullPolicy=Never",
	}, args...)...)
	return err
}

// Helm runs the real Helm against the cluster and returns what it prints, without what hooks said.
func (b *Bed) Helm(ctx context.Context, args ...string) (string, error) {
	cmd, err := b.HelmCommand(ctx, args...)
	if err != nil {
		return "", err
	}
	return output(cmd)
}

// HelmCommand is Helm against the cluster, ready to be started; what hooks say goes to its standard error.
func (b *Bed) HelmCommand(ctx context.Context, args ...string) (*exec.Cmd, error) {
	dir, err := cluster.Build(ctx, b.Config, "helm")
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "helm"),
		append([]string{"--kubeconfig", b.Cluster.Kubeconfig()}, args...)...)
	cmd.Dir = b.root
	return cmd, nil
}

// Kubectl runs kubectl against the cluster.
func (b *Bed) Kubectl(ctx context.Context, args ...string) (string, error) {
	return output(b.KubectlCommand(ctx, args...))
}

// KubectlCommand is kubectl against the cluster, ready to be started.
func (b *Bed) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, b.Cluster.Kubectl(),
		append([]string{"--kubeconfig", b.Cluster.Kubeconfig()}, args...)...)
}

// Apply applies a manifest.
func (b *Bed) Apply(ctx context.Context, manifest string) error {
	cmd := b.KubectlCommand(ctx, "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifest)
	_, err := output(cmd)
	return err
}

func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	return output(cmd)
}

// output runs a command; its error has what the command said.
func output(cmd *exec.Cmd) (string, error) {
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err,
			strings.TrimSpace(stderr.String()+string(out)))
	}
	return string(out), nil
}
