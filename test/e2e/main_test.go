package e2e

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/k8slan/k8slan/crd/controller"
	"github.com/k8slan/k8slan/test/cluster"
	"github.com/k8slan/k8slan/test/cluster/install"
)

var (
	clusters = 2                      // to run on; on each of them one test runs at a time
	free     = make(chan *testbed, 9) // the clusters on which no test runs
	missing  string                   // why there is no cluster; empty if there is
)

// testbed is a cluster with k8slan installed.
type testbed struct {
	*install.Bed
	config *rest.Config
	core   kubernetes.Interface
	client client.WithWatch
	usual  bool // k8slan is installed from this checkout with the usual values
}

// TestMain brings the clusters up, unless they are, and installs k8slan from this checkout. A cluster that it brought
// up it takes down again, unless K8SLAN_E2E_KEEP is set.
func TestMain(m *testing.M) {
	flag.Func("underlay", "what LANs go `over`: multicast, subnet4, subnet6, routed4 or routed6, or by EVPN evpn4, "+
		"evpn6, evpn4r or evpn6r", setUsual)
	flag.IntVar(&clusters, "clusters", clusters, "run on `n` clusters side by side, 9 at most")
	flag.Parse()
	ctrllog.SetLogger(logr.Discard()) // else the clients' library complains that it has no logger
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	if flag.Lookup("test.list").Value.String() != "" {
		return m.Run()
	}
	if missing = whyNot(); missing != "" {
		return m.Run() // each test says so
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	names, err := clusterNames(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	if err := flag.Set("test.parallel", strconv.Itoa(len(names))); err != nil {
		panic(err)
	}
	begin := time.Now()
	cfg := cluster.Config{Name: names[0], CacheDir: cluster.CacheDir(os.Getenv), Log: log}
	for _, name := range names {
		_, err := cluster.Open(name)
		if errors.Is(err, cluster.ErrNotUp) && os.Getenv("K8SLAN_E2E_KEEP") == "" {
			defer func() { code = max(code, takeDown(name, log, code != 0)) }()
		}
	}
	beds, err := setUp(ctx, cfg, names)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	log.Info("k8slan is installed", "clusters", len(beds), "seconds", int(time.Since(begin).Seconds()))
	for _, b := range beds {
		free <- b
	}
	stop() // from here on an interrupt ends the tests at once, and the clusters stay as they are
	return m.Run()
}

// clusterNames returns the names of the clusters to run on: one for each test, up to as many as clusters says.
func clusterNames(ctx context.Context) (names []string, err error) {
	first, err := cluster.Name(os.Getenv)
	if err != nil {
		return nil, err
	}
	tests, _, _ := strings.Cut(flag.Lookup("test.run").Value.String(), "/")
	out, err := exec.CommandContext(ctx, os.Args[0], "-test.list", cmp.Or(tests, ".")).Output()
	if err != nil {
		return nil, fmt.Errorf("list the tests to run: %w", err)
	}
	for n := range min(clusters, max(1, len(strings.Fields(string(out))))) {
		name, err := cluster.Beside(first, n)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, nil
}

// whyNot says why the tests cannot run here.
func whyNot() string {
	switch {
	case testing.Short():
		return "the end-to-end tests are not short"
	case os.Geteuid() != 0:
		return "the end-to-end tests bring up clusters, which only root can"
	}
	return ""
}

// takeDown takes a cluster down, and returns the exit code of the test run of which it is the last step.
func takeDown(name string, log *slog.Logger, failed bool) int {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if failed {
		logs := "../../dist/e2e-logs" + name
		err := errors.Join(os.RemoveAll(logs), cluster.SaveLogs(name, logs))
		log.Info("the cluster's logs are kept", "dir", logs, "err", err)
	}
	if err := cluster.Down(ctx, cluster.Config{Name: name, Log: log}); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	return 0
}

// setUp brings the clusters up and installs k8slan on them. What is built is built once, for all of them.
func setUp(ctx context.Context, cfg cluster.Config, names []string) (beds []*testbed, err error) {
	first, err := install.New(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := first.Components(ctx); err != nil {
		return nil, err
	}
	built := make(chan struct{})
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := first.Build(ctx); err != nil {
			return err
		}
		close(built)
		return nil
	})
	for _, name := range names {
		b := &testbed{Bed: first.Beside(name)}
		beds = append(beds, b)
		g.Go(func() error {
			if err := inOrder(ctx, b.Up, b.connect, b.sweep); err != nil {
				return err
			}
			select {
			case <-built:
			case <-ctx.Done():
				return ctx.Err()
			}
			return inOrder(ctx, b.Load, b.Definitions, func(ctx context.Context) error { return b.chart(ctx) })
		})
	}
	return beds, g.Wait()
}

// inOrder takes steps one after the other, until one fails.
func inOrder(ctx context.Context, steps ...func(context.Context) error) error {
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// connect makes the clients.
func (b *testbed) connect(context.Context) (err error) {
	b.config, err = clientcmd.BuildConfigFromFlags("", b.Cluster.Kubeconfig())
	if err != nil {
		return fmt.Errorf("read the cluster's kubeconfig: %w", err)
	}
	b.config.QPS, b.config.Burst = 200, 400
	if b.core, err = kubernetes.NewForConfig(b.config); err != nil {
		return fmt.Errorf("make a client: %w", err)
	}
	b.client, err = client.NewWithWatch(b.config, client.Options{Scheme: controller.NewScheme()})
	if err != nil {
		return fmt.Errorf("make a client: %w", err)
	}
	return nil
}
