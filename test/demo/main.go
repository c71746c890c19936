// Command demo shows k8slan at work: two pods and a VM on two real Kubernetes nodes talk through a LAN.
package main

import (
	"context"
	_ "embed"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/k8slan/k8slan/test/cluster"
	"github.com/k8slan/k8slan/test/cluster/install"
)

//go:embed lan.yaml
var lan string

//go:embed pods.yaml
var pods string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := demo(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		os.Exit(1)
	}
}

func demo(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("only root can make nodes of namespaces: sudo make demo")
	}
	cache := cluster.CacheDir(os.Getenv)
	name, err := cluster.Name(os.Getenv)
	if err != nil {
		return err
	}
	details, err := openLog(filepath.Join(cache, "demo"+name+".log"))
	if err != nil {
		return err
	}
	defer details.Close()
	p := &progress{out: os.Stdout, terminal: isTerminal(os.Stdout), began: time.Now()}
	bed, err := install.New(ctx, cluster.Config{
		Name: name, CacheDir: cache, Log: slog.New(slog.NewTextHandler(details, nil)), Progress: p.building,
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(p.out, "details: %s\nthe first time, to build all of it takes minutes\n", details.Name())
	if err := setUp(ctx, p, bed); err != nil {
		return fmt.Errorf("%w\ndetails are in %s and %s", err, details.Name(), cluster.LogDir(name))
	}
	if err := show(ctx, p.out, bed); err != nil {
		return err
	}
	fmt.Fprintf(p.out, "\nall in %.0fs. The cluster is up; try next:\n%s", time.Since(p.began).Seconds(), next(bed))
	return nil
}

// setUp goes from whatever the machine has to three attachments that are ready.
func setUp(ctx context.Context, p *progress, bed *install.Bed) error {
	for _, s := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"Kubernetes, Helm and k8slan, built from their Go modules", func(ctx context.Context) error {
			return buildAll(ctx, bed)
		}},
		{"a cluster: worker1 and worker2", bed.Up},
		{"k8slan, loaded into both nodes", bed.Load},
		{"k8slan, installed with Helm", func(ctx context.Context) error { return bed.Chart(ctx) }},
		{"LAN lan-example, with the spokes srl and vm", func(ctx context.Context) error { return applyLAN(ctx, bed) }},
		{"a third spoke, host, while it runs", func(ctx context.Context) error { return addSpoke(ctx, bed) }},
		{"pods srl-1 and host-1, and VM vm-1", func(ctx context.Context) error { return startPods(ctx, bed) }},
		{"the VM's Linux, booted in QEMU", func(ctx context.Context) error { return awaitGuest(ctx, bed) }},
	} {
		if err := p.step(ctx, s.what, s.do); err != nil {
			return err
		}
	}
	return nil
}

// buildAll builds everything that can be built without a cluster, side by side.
func buildAll(ctx context.Context, bed *install.Bed) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return bed.Components(ctx) })
	g.Go(func() error { return bed.Build(ctx) })
	return g.Wait()
}

func applyLAN(ctx context.Context, bed *install.Bed) error {
	if err := bed.Apply(ctx, lan); err != nil {
		return err
	}
	return awaitLAN(ctx, bed)
}

func awaitLAN(ctx context.Context, bed *install.Bed) error {
	_, err := bed.Kubectl(ctx, "wait", "--for=condition=Ready", "--timeout=60s", "lan/lan-example")
	return err
}

func addSpoke(ctx context.Context, bed *install.Bed) error {
	if _, err := bed.Kubectl(ctx, "patch", "lan", "lan-example", "--type=merge", "-p",
		`{"spec":{"spokes":["srl","vm","host"]}}`); err != nil {
		return err
	}
	return awaitLAN(ctx, bed)
}

func startPods(ctx context.Context, bed *install.Bed) error {
	if err := bed.Apply(ctx, pods); err != nil {
		return err
	}
	_, err := bed.Kubectl(ctx, "wait", "--for=condition=Ready", "--timeout=90s", "pod/srl-1", "pod/host-1", "pod/vm-1")
	return err
}

// awaitGuest returns when the guest runs commands.
func awaitGuest(ctx context.Context, bed *install.Bed) error {
	_, err := bed.Kubectl(ctx, "exec", "vm-1", "--", "/vm", "exec", "ip", "addr")
	return err
}

func openLog(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("open the demo's log: %w", err)
	}
	f, err := os.Create(path)
	if err != nil {
		return nil, fmt.Errorf("open the demo's log: %w", err)
	}
	return f, nil
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
