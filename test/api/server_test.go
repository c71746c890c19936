package api

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/k8slan/k8slan/test/cluster"
	"github.com/k8slan/k8slan/test/cluster/apiserver"
)

// server is an API server on loopback, with a controller manager that only collects garbage.
type server struct {
	*apiserver.Server
	kubernetes string // directory of the Kubernetes programs
	helm       string // directory of helm
}

func startServer(ctx context.Context) (*server, error) {
	build := cluster.Config{CacheDir: cluster.CacheDir(os.Getenv), Log: slog.Default()}
	programs := map[string]string{}
	for _, name := range []string{"kubernetes", "etcd", "helm"} {
		dir, err := cluster.Build(ctx, build, name)
		if err != nil {
			return nil, err
		}
		programs[name] = dir
	}
	started, err := apiserver.Start(ctx, apiserver.Config{Kubernetes: programs["kubernetes"], Etcd: programs["etcd"]})
	if started == nil {
		return nil, err
	}
	return &server{started, programs["kubernetes"], programs["helm"]}, err
}

// collectGarbage starts the garbage collector. It looks for new kinds only twice a minute, so create the CRDs before.
func (s *server) collectGarbage() error {
	_, err := s.Run(filepath.Join(s.kubernetes, "kube-controller-manager"), "--kubeconfig="+s.Kubeconfig,
		"--controllers=garbage-collector-controller", "--leader-elect=false", "--secure-port=0",
		"--kube-api-qps=1000", "--kube-api-burst=2000") // by default it deletes 20 objects a second
	return err
}

// kubectl runs kubectl and returns its standard output.
func (s *server) kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.kubernetes, "kubectl"),
		append([]string{"--kubeconfig=" + s.Kubeconfig}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+s.Dir)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, errs.String())
	}
	return out.String(), nil
}
