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

// kubelanProgram is the name of kubelan's program. Under that name this program runs as a sidecar.
const kubelanProgram = "kubelan"

// configFiles are the paths of kubelan's configuration; the first file that exists is read.
var configFiles = []string{"/run/config/kubelan.yaml", "kubelan.yaml"}

// serviceAccountNamespace is the file with the pod's namespace that kubelet mounts.
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
		Short: "Connect the pod it runs in to a LAN with the pods of Services",
		Long: `Connect the pod it runs in to a LAN with the pods of Services, by a VXLAN in the pod's own network
namespace. Nothing has to be installed on nodes. It needs the capability NET_ADMIN, and the rights to list and watch
EndpointSlices in the Services' namespaces.

It reads kubelan's configuration: kubelan.yaml in /run/config or the working directory, and environment variables
KL_..., such as KL_VXLAN_VNI for vxlan.vni. It reads a file again when it changes.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd.Context()) },
	}
	flags := cmd.Flags()
	flags.StringVarP(&f.logLevel, "log_level", "l", "",
		"lowest `level` to log: trace, debug, info, warn or error; empty: log_level of the configuration")
	flags.StringVar(&f.config, "config", "", "configuration `file`; empty: "+strings.Join(configFiles, ", else "))
	addKubeconfig(flags, &f.kubeconfig)
	flags.StringVar(&f.logFormat, "log-format", "text", "`format` of a log line: json or text")
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

// sidecarLogger returns the logger of the process. The configuration changes its level.
func (f *sidecarFlags) sidecarLogger(level *slog.LevelVar) (*slog.Logger, error) {
	handler, err := f.handler(level)
	if err != nil {
		return nil, err
	}
	// The libraries log watches that end; the sidecar logs them itself.
	quiet := logr.FromSlogHandler(slog.DiscardHandler)
	klog.SetLogger(quiet)
	ctrl.SetLogger(quiet)
	return slog.New(handler), nil
}

// configFile is the source of a sidecar's configuration.
type configFile struct {
	path  string // empty: the first of configFiles
	level string // from the command line

	found string // the file that was read last; empty: there was none
}

func (f *configFile) paths() []string {
	if f.path != "" {
		return []string{f.path}
	}
	return slices.Clone(configFiles)
}

// read reads the current configuration.
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
		return c, fmt.Errorf("get the pod's name: %w", err)
	}
	if b, err := os.ReadFile(serviceAccountNamespace); err == nil { // a pod may have no service account
		sources.Namespace = string(bytes.TrimSpace(b))
	}
	if c, err = sidecar.Read(sources); err != nil {
		return c, fmt.Errorf("configuration (%s): %w", cmp.Or(f.found, "environment"), err)
	}
	return c, nil
}

// follow sends the configuration whenever a change of its file changes it, until ctx ends.
func (f *configFile) follow(
	ctx context.Context, log *slog.Logger, config sidecar.Config, configs chan<- sidecar.Config,
) {
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
