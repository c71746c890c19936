// Package api tests the API and its controller against a real API server: etcd and kube-apiserver on loopback, with the
// programs of the test cluster, which package cluster builds if they are missing. It needs no root.
package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/k8slan/k8slan/crd/controller"
	"github.com/k8slan/k8slan/crd/manifests"
	"github.com/k8slan/k8slan/test/cluster/apiserver"
)

var (
	kube *server          // started by TestMain
	api  client.WithWatch // with the rights of an administrator
)

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	log.SetLogger(logr.Discard())
	ctx, cancel := context.WithTimeout(context.Background(), 25*time.Minute) // long enough to build Kubernetes
	defer cancel()
	s, err := startServer(ctx)
	if s != nil {
		defer s.Stop()
	}
	if err == nil {
		kube = s
		err = prepare(ctx, s)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "start a real API server:", err)
		return 1
	}
	return m.Run()
}

// prepare installs the CRDs of k8slan and of NADs.
func prepare(ctx context.Context, s *server) error {
	scheme := controller.NewScheme()
	if err := apiextensionsv1.AddToScheme(scheme); err != nil {
		return err
	}
	var err error
	if api, err = client.NewWithWatch(s.Client, client.Options{Scheme: scheme}); err != nil {
		return err
	}
	nads, err := moduleFile("github.com/k8snetworkplumbingwg/network-attachment-definition-client",
		"artifacts/networks-crd.yaml")
	if err != nil {
		return err
	}
	definitions := [][]byte{nads}
	files, err := fs.Glob(manifests.Files, "*.yaml")
	if err != nil {
		return err
	}
	for _, file := range files {
		content, err := manifests.Files.ReadFile(file)
		if err != nil {
			return err
		}
		definitions = append(definitions, content)
	}
	for _, definition := range definitions {
		if err := apiserver.Define(ctx, api, definition); err != nil {
			return err
		}
	}
	if err := grant(ctx, s); err != nil {
		return err
	}
	return s.collectGarbage()
}

// controllerAccount is the controller's service account in the chart.
const (
	chartNamespace    = "k8slan-system"
	controllerAccount = "system:serviceaccount:" + chartNamespace + ":k8slan-controller"
)

// grant gives the controller exactly the rights that it has in the chart.
func grant(ctx context.Context, s *server) error {
	if _, err := s.kubectl(ctx, "", "create", "namespace", chartNamespace); err != nil {
		return err
	}
	helm := exec.CommandContext(ctx, filepath.Join(s.helm, "helm"), "template", "k8slan", "../../charts/k8slan",
		"--namespace", chartNamespace, "--kube-version", "1.36.3", "--show-only", "templates/rbac-controller.yaml")
	helm.Env = append(os.Environ(), "HOME="+s.Dir)
	rights, err := helm.Output()
	if err != nil {
		return fmt.Errorf("render the controller's rights: %w%s", err, stderr(err))
	}
	_, err = s.kubectl(ctx, string(rights), "apply", "-f", "-")
	return err
}

// stderr returns what a failed program wrote to its standard error.
func stderr(err error) string {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return ": " + string(exit.Stderr)
	}
	return ""
}

// moduleFile reads a file of a module in go.mod.
func moduleFile(module, file string) ([]byte, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		return nil, fmt.Errorf("find module %s: %w%s", module, err, stderr(err))
	}
	return os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), file))
}
