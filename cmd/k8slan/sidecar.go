package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"

	"github.com/k8slan/k8slan/lanmgr/sidecar"
)

// kubelanProgram is the name of kubelan's program, in whose place this one may be started.
const kubelanProgram = "kubelan"

// configFiles are where kubelan looks for its configuration; the first that is there counts.
var configFiles = []string{"/run/config/kubelan.yaml", "kubelan.yaml"}

// serviceAccountNamespace is the pod's namespace, as kubelet mounts it.
const serviceAccountNamespace = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

// sidecarFlags are the flags of k8slan sidecar.
type sidecarFlags struct {
	daemonFlags
	config   string
	logLevel string
}

func sidecarCommand() *cobra.Command {
	var f sidecarFlags
	cmd := &cobra.Command{
		Use:   "sidecar",
		Short: "Give the pod it runs in a LAN with the pods of Services",
		Long: `Give the pod it runs in a LAN with the pods of Services, by a VXLAN in the pod's own network namespace. Nothing has to be installed on nodes;
it needs the capability NET_ADMIN, and list and watch of EndpointSlices in the Services' namespaces.

It takes kubelan's configuration: kubelan.yaml in /run/config or the working directory, and environment variables KL_..., such as KL_VXLAN_VNI for
vxlan.vni. A file that changes is read again.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd.Context()) },
	}
	flags := cmd.Flags()
	flags.StringVarP(&f.logLevel, "log_level", "l", "", "`level` to log: trace, debug, info, warn or error; counts more than log_level elsewhere")
	flags.StringVar(&f.config, "config", "", "configuration `file`; empty: "+strings.Join(configFiles, ", else "))
	flags.StringVar(&f.kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"), "kubeconfig `file` (environment: KUBECONFIG); empty: the service account of the pod")
	flags.StringVar(&f.logFormat, "log-format", "text", "`form` of a log line: json or text")
	return cmd
}

func (f *sidecarFlags) run(ctx context.Context) error {
	level := &slog.LevelVar{}
	log, err := f.sidecarLogger(level)
	if err != nil {
		return err
	}
	file := configFile{path: f.config, level: f.logLevel}
	config, err := file.read()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	log.Info("k8slan sidecar starts", "version", version, "config", file.found)
	configs := make(chan sidecar.Config)
	var follow sync.WaitGroup
	follow.Go(func() { file.follow(ctx, log, config, configs) })
	defer follow.Wait()
	defer cancel()
	s := sidecar.Sidecar{
		Log: log, Level: level, Environment: os.Environ(),
		API: func() (*rest.Config, error) { return f.rest("sidecar") },
	}
	return s.Run(ctx, config, configs)
}

// sidecarLogger is the one logger of the process, whose level the configuration changes.
func (f *sidecarFlags) sidecarLogger(level *slog.LevelVar) (*slog.Logger, error) {
	handler, err := f.handler(level)
	if err != nil {
		return nil, err
	}
	// What the libraries log of watches that end, the sidecar tells in its own words.
	quiet := logr.FromSlogHandler(slog.DiscardHandler)
	klog.SetLogger(quiet)
	ctrl.SetLogger(quiet)
	return slog.New(handler), nil
}

// configFile is where a sidecar's configuration is.
type configFile struct {
	path  string // empty: the first of configFiles
	level string // from the command line

	found string // what was read last; empty: there was none
}

func (f *configFile) paths() []string {
	if f.path != "" {
		return []string{f.path}
	}
	return slices.Clone(configFiles)
}

// read reads the configuration as it is now.
func (f *configFile) read() (c sidecar.Config, err error) {
	f.found = ""
	var text []byte
	for _, path := range f.paths() {
		text, err = os.ReadFile(path)
		if err == nil {
			f.found = path
			break
		}
		if !errors.Is(err, fs.ErrNotExist) || f.path != "" {
			return c, fmt.Errorf("read the configuration: %w", err)
		}
	}
	sources := sidecar.Sources{File: text, Env: map[string]string{}, Flags: map[string]string{"log_level": f.level}}
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		sources.Env[name] = value
	}
	if sources.Hostname, err = os.Hostname(); err != nil {
		return c, fmt.Errorf("ask for the pod's name: %w", err)
	}
	if b, err := os.ReadFile(serviceAccountNamespace); err == nil { // a pod may have none
		sources.Namespace = string(bytes.TrimSpace(b))
	}
	if c, err = sidecar.Read(sources); err != nil {
		return c, fmt.Errorf("configuration (%s): %w", cmp.Or(f.found, "environment"), err)
	}
	return c, nil
}

// follow passes the configuration on whenever its file has made another of it, until ctx ends.
func (f *configFile) follow(ctx context.Context, log *slog.Logger, config sidecar.Config, configs chan<- sidecar.Config) {
	files := slices.DeleteFunc(f.paths(), func(path string) bool {
		_, err := os.Stat(filepath.Dir(path))
		return err != nil
	})
	followFiles(ctx, append(files, config.PasswordFiles()...), log, func() error {
		next, err := f.read()
		if err != nil || reflect.DeepEqual(next, config) {
			return err
		}
		log.Info("configuration changed", "config", f.found)
		config = next
		select {
		case configs <- config:
		case <-ctx.Done():
		}
		return nil
	})
}
