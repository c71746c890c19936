package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"
)

// daemonFlags are the flags of long-running commands.
type daemonFlags struct {
	kubeconfig     string
	healthAddress  string
	metricsAddress string
	logLevel       slog.Level
	logFormat      string
}

func (f *daemonFlags) add(flags *pflag.FlagSet) {
	addKubeconfig(flags, &f.kubeconfig)
	f.addHealth(flags)
	f.addMetrics(flags)
	f.addLog(flags)
}

// addKubeconfig adds the flag --kubeconfig.
func addKubeconfig(flags *pflag.FlagSet, kubeconfig *string) {
	flags.StringVar(kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"),
		"kubeconfig `file` (environment: KUBECONFIG); empty: the service account of the pod")
}

func (f *daemonFlags) addHealth(flags *pflag.FlagSet) {
	flags.StringVar(&f.healthAddress, "health-address", ":8081",
		"`address` that answers /healthz and /readyz, host:port; 0: none")
}

func (f *daemonFlags) addMetrics(flags *pflag.FlagSet) {
	flags.StringVar(&f.metricsAddress, "metrics-address", "0",
		"`address` that answers /metrics without encryption, host:port; 0: none")
}

func (f *daemonFlags) addLog(flags *pflag.FlagSet) {
	flags.TextVar(&f.logLevel, "log-level", slog.LevelInfo, "lowest `level` to log: debug, info, warn or error")
	flags.StringVar(&f.logFormat, "log-format", "json", "`format` of a log line: json or text")
}

// register adds metrics to controller-runtime's registry, which /metrics shows.
func register(c prometheus.Collector) error {
	if err := ctrlmetrics.Registry.Register(c); err != nil {
		return fmt.Errorf("register the metrics: %w", err)
	}
	return nil
}

// logger returns the logger of the process, and makes the libraries use it.
func (f *daemonFlags) logger() (*slog.Logger, error) {
	handler, err := f.handler(f.logLevel)
	if err != nil {
		return nil, err
	}
	log := slog.New(handler)
	klog.SetSlogLogger(log)
	ctrl.SetLogger(logr.FromSlogHandler(handler))
	return log, nil
}

func (f *daemonFlags) handler(level slog.Leveler) (slog.Handler, error) {
	options := &slog.HandlerOptions{Level: level}
	switch f.logFormat {
	case "json":
		return slog.NewJSONHandler(os.Stderr, options), nil
	case "text":
		return slog.NewTextHandler(os.Stderr, options), nil
	}
	return nil, usageError{fmt.Errorf("--log-format is json or text, not %q", f.logFormat)}
}

// shutdownTimeout is less than the pod's terminationGracePeriodSeconds: 10 s in the chart.
const shutdownTimeout = 8 * time.Second

// start runs the manager until ctx ends, and then waits for its tasks, but at most for shutdownTimeout: informers end
// late while the API server is not reachable.
func start(ctx context.Context, mgr ctrl.Manager, log *slog.Logger) error {
	err := mgr.Start(ctx)
	if ctx.Err() != nil && errors.Is(err, context.DeadlineExceeded) {
		log.Warn("some tasks did not end in time", "err", err)
		return nil
	}
	return err
}

// rest returns the configuration of clients of the API server.
func (f *daemonFlags) rest(part string) (*rest.Config, error) {
	config, err := rest.InClusterConfig()
	if f.kubeconfig != "" {
		config, err = clientcmd.BuildConfigFromFlags("", f.kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("find the API server (give --kubeconfig outside of a pod): %w", err)
	}
	config.QPS = -1 // no limit here: the API server limits requests itself (API priority and fairness)
	return rest.AddUserAgent(config, "k8slan-"+part+"/"+version), nil
}
