package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/k8slan/k8slan/crd/controller"
	"github.com/k8slan/k8slan/test/cluster"
	"github.com/k8slan/k8slan/test/cluster/install"
)

// bed is where the tests run; TestMain sets it before the first of them and nothing changes it.
var bed testbed

// testbed is a cluster with k8slan installed.
type testbed struct {
	*install.Bed
	missing string // why there is none; empty if there is

	config *rest.Config
	core   kubernetes.Interface
	client client.WithWatch
}

// TestMain brings the cluster up, unless one is, and installs k8slan as it is in this checkout. A cluster that it
// brought up it takes down again, unless K8SLAN_E2E_KEEP is set.
func TestMain(m *testing.M) {
	flag.Func("underlay", "what LANs go `over`: multicast, subnet4, subnet6, routed4 or routed6, or by EVPN evpn4, evpn6, evpn4r or evpn6r", setUsual)
	flag.Parse()
	ctrllog.SetLogger(logr.Discard())                      // the clients' library wants to be told
	if err := flag.Set("test.parallel", "4"); err != nil { // tests wait more than they work
		panic(err)
	}
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	if flag.Lookup("test.list").Value.String() != "" {
		return m.Run()
	}
	if bed.missing = whyNot(); bed.missing != "" {
		return m.Run() // every test says so
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	name, err := cluster.Name(os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	cfg := cluster.Config{Name: name, CacheDir: cluster.CacheDir(os.Getenv), Log: log}
	_, err = cluster.Open(cfg.Name)
	if errors.Is(err, cluster.ErrNotUp) && os.Getenv("K8SLAN_E2E_KEEP") == "" {
		defer func() { code = max(code, takeDown(cfg, code != 0)) }()
	}
	begin := time.Now()
	if bed, err = set(ctx, cfg); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	log.Info("k8slan is installed", "seconds", int(time.Since(begin).Seconds()))
	stop() // from here on an interrupt ends the tests at once, and the cluster stays to be looked at
	return m.Run()
}

// whyNot says why the tests cannot run here.
func whyNot() string {
	switch {
	case testing.Short():
		return "the end-to-end tests are not short"
	case os.Geteuid() != 0:
		return "the end-to-end tests bring up a cluster, which only root can"
	}
	return ""
}

// takeDown returns the exit code of a test run whose last step it is.
func takeDown(cfg cluster.Config, failed bool) int {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if failed {
		logs := "../../dist/e2e-logs"
		err := errors.Join(os.RemoveAll(logs), cluster.SaveLogs(cfg.Name, logs))
		cfg.Log.Info("the cluster's logs are kept", "dir", logs, "err", err)
	}
	if err := cluster.Down(ctx, cfg); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	return 0
}

// set makes the testbed.
func set(ctx context.Context, cfg cluster.Config) (b testbed, err error) {
	if b.Bed, err = install.New(ctx, cfg); err != nil {
		return b, err
	}
	steps := []func(context.Context) error{b.Programs, b.Images, b.Up, b.connect, b.sweep, b.Build, b.Definitions, b.chart}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return b, err
		}
	}
	return b, nil
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
