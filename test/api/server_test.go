package api

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/k8slan/k8slan/test/cluster"
)

// server is an API server on loopback with its etcd, and a controller manager that does nothing but collect garbage.
type server struct {
	dir        string // state, logs, certificates
	kubernetes string // directory of the Kubernetes programs
	helm       string // directory of helm
	kubeconfig string
	config     *rest.Config
	running    []*exec.Cmd
}

const token = "loopback-only" // the API server listens on loopback and lives as long as the tests

// startServer must be called, and the calling thread live, as long as the server is wanted: the programs die with that thread.
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
	dir, err := os.MkdirTemp("", "k8slan-api-")
	if err != nil {
		return nil, err
	}
	s := &server{dir: dir, kubernetes: programs["kubernetes"], helm: programs["helm"], kubeconfig: filepath.Join(dir, "kubeconfig")}
	return s, s.start(ctx, filepath.Join(programs["etcd"], "etcd"))
}

func (s *server) start(ctx context.Context, etcd string) error {
	ports, err := freePorts(3)
	if err != nil {
		return err
	}
	etcdURL, peerURL := "http://127.0.0.1:"+ports[0], "http://127.0.0.1:"+ports[1]
	if err := s.run(etcd, "--unsafe-no-fsync", "--data-dir="+filepath.Join(s.dir, "etcd"),
		"--listen-client-urls="+etcdURL, "--advertise-client-urls="+etcdURL,
		"--listen-peer-urls="+peerURL, "--initial-advertise-peer-urls="+peerURL, "--initial-cluster=default="+peerURL); err != nil {
		return err
	}
	if err := s.writeCredentials("https://127.0.0.1:" + ports[2]); err != nil {
		return err
	}
	key := filepath.Join(s.dir, "service-accounts.key")
	if err := s.run(filepath.Join(s.kubernetes, "kube-apiserver"), "--etcd-servers="+etcdURL,
		"--bind-address=127.0.0.1", "--secure-port="+ports[2], "--cert-dir="+filepath.Join(s.dir, "certs"),
		"--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.96.0.0/16",
		"--authorization-mode=RBAC", "--token-auth-file="+filepath.Join(s.dir, "tokens.csv"),
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+key, "--service-account-signing-key-file="+key,
		"--disable-admission-plugins=ServiceAccount", "--watch-cache=true"); err != nil {
		return err
	}
	return s.ready(ctx)
}

// collectGarbage starts the garbage collector. It learns of new kinds only twice a minute, so the CRDs should be there before.
func (s *server) collectGarbage() error {
	return s.run(filepath.Join(s.kubernetes, "kube-controller-manager"), "--kubeconfig="+s.kubeconfig,
		"--controllers=garbage-collector-controller", "--leader-elect=false", "--secure-port=0")
}

// writeCredentials makes the service accounts' key, a token of the cluster's administrator, and a kubeconfig with it.
func (s *server) writeCredentials(url string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	if err := os.WriteFile(filepath.Join(s.dir, "service-accounts.key"), block, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.dir, "tokens.csv"), []byte(token+",admin,admin,system:masters\n"), 0o600); err != nil {
		return err
	}
	s.config = &rest.Config{Host: url, BearerToken: token, TLSClientConfig: rest.TLSClientConfig{Insecure: true}, QPS: 1000, Burst: 2000}
	kubeconfig := clientcmdapi.NewConfig()
	kubeconfig.Clusters["api"] = &clientcmdapi.Cluster{Server: url, InsecureSkipTLSVerify: true}
	kubeconfig.AuthInfos["admin"] = &clientcmdapi.AuthInfo{Token: token}
	kubeconfig.Contexts["api"] = &clientcmdapi.Context{Cluster: "api", AuthInfo: "admin"}
	kubeconfig.CurrentContext = "api"
	return clientcmd.WriteToFile(*kubeconfig, s.kubeconfig)
}

// run starts a program that dies with the tests, even if they are killed; what it says goes to a file.
func (s *server) run(program string, args ...string) error {
	log, err := os.Create(filepath.Join(s.dir, filepath.Base(program)+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", program, err)
	}
	s.running = append(s.running, cmd)
	return nil
}

// ready waits until the API server says so.
func (s *server) ready(ctx context.Context) error {
	d, err := discovery.NewDiscoveryClientForConfig(s.config)
	if err != nil {
		return err
	}
	var last error
	err = wait.PollUntilContextTimeout(ctx, 50*time.Millisecond, time.Minute, true, func(ctx context.Context) (bool, error) {
		last = d.RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
		return last == nil, nil
	})
	if err != nil {
		return fmt.Errorf("the API server is not ready after a minute: %w\n%s", errors.Join(last, err), s.logs())
	}
	return nil
}

func (s *server) stop() {
	for _, cmd := range s.running {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // always "killed"
	}
	_ = os.RemoveAll(s.dir)
}

// logs are the last words of every program.
func (s *server) logs() string {
	const last = 3000
	var words strings.Builder
	files, _ := filepath.Glob(filepath.Join(s.dir, "*.log"))
	for _, file := range files {
		content, _ := os.ReadFile(file)
		fmt.Fprintf(&words, "--- %s\n%s\n", filepath.Base(file), content[max(0, len(content)-last):])
	}
	return words.String()
}

// kubectl runs the real one.
func (s *server) kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.kubernetes, "kubectl"), append([]string{"--kubeconfig=" + s.kubeconfig}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+s.dir)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, errs.String())
	}
	return out.String(), nil
}

// freePorts asks the kernel for TCP ports that nobody uses.
func freePorts(n int) ([]string, error) {
	var ports []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		_, port, err := net.SplitHostPort(l.Addr().String())
		if err != nil {
			return nil, err
		}
		ports = append(ports, port)
	}
	return ports, nil
}
