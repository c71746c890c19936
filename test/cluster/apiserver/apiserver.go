// Package apiserver runs a real API server with its etcd for tests that need no nodes.
package apiserver

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"
)

// Config says what to run and where.
type Config struct {
	Kubernetes, Etcd string // directories of their programs

	// Do runs a function in the network namespace that the server is to be in, on a thread that lives for as long as
	// the function runs; nil: in this process's own.
	Do func(func() error) error
	// Address is what the API server listens on; empty: 127.0.0.1.
	Address string
}

// Server is an API server and what else was run beside it. Everybody may do everything with Kubeconfig.
type Server struct {
	Dir        string // state, logs, certificates
	Kubeconfig string
	Client     *rest.Config // as the cluster's administrator, from anywhere in this process
	APIServer  *os.Process  // the API server itself

	config  Config
	running []*program
}

// program is one that dies with this process, even if that is killed.
type program struct {
	process *os.Process
	ended   chan struct{}
}

const token = "tests-only" // the API server lives as long as the tests

// Start starts them and returns when the API server is ready. What it returns is to be stopped, even with an error.
func Start(ctx context.Context, c Config) (*Server, error) {
	if c.Do == nil {
		c.Do = func(f func() error) error { return f() }
	}
	if c.Address == "" {
		c.Address = "127.0.0.1"
	}
	dir, err := os.MkdirTemp("", "k8slan-api-")
	if err != nil {
		return nil, err
	}
	s := &Server{Dir: dir, Kubeconfig: filepath.Join(dir, "kubeconfig"), config: c}
	return s, s.start(ctx)
}

func (s *Server) start(ctx context.Context) error {
	ports, err := s.freePorts(3)
	if err != nil {
		return err
	}
	etcdURL, peerURL := "http://127.0.0.1:"+ports[0], "http://127.0.0.1:"+ports[1]
	if _, err := s.Run(filepath.Join(s.config.Etcd, "etcd"), "--unsafe-no-fsync",
		"--data-dir="+filepath.Join(s.Dir, "etcd"),
		"--listen-client-urls="+etcdURL, "--advertise-client-urls="+etcdURL,
		"--listen-peer-urls="+peerURL, "--initial-advertise-peer-urls="+peerURL,
		"--initial-cluster=default="+peerURL); err != nil {
		return err
	}
	if err := s.writeCredentials("https://" + net.JoinHostPort(s.config.Address, ports[2])); err != nil {
		return err
	}
	key := filepath.Join(s.Dir, "service-accounts.key")
	s.APIServer, err = s.Run(filepath.Join(s.config.Kubernetes, "kube-apiserver"), "--etcd-servers="+etcdURL,
		"--bind-address="+s.config.Address, "--advertise-address="+s.config.Address, "--secure-port="+ports[2],
		"--cert-dir="+filepath.Join(s.Dir, "certs"),
		"--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.96.0.0/16",
		"--authorization-mode=RBAC", "--token-auth-file="+filepath.Join(s.Dir, "tokens.csv"),
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+key,
		"--service-account-signing-key-file="+key,
		"--disable-admission-plugins=ServiceAccount", "--watch-cache=true")
	if err != nil {
		return err
	}
	return s.ready(ctx)
}

// writeCredentials makes the service accounts' key, a token of the cluster's administrator, and a kubeconfig with it.
func (s *Server) writeCredentials(url string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	if err := os.WriteFile(filepath.Join(s.Dir, "service-accounts.key"), block, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.Dir, "tokens.csv"), []byte(token+",admin,admin,system:masters\n"),
		0o600); err != nil {
		return err
	}
	s.Client = &rest.Config{
		Host: url, BearerToken: token, TLSClientConfig: rest.TLSClientConfig{Insecure: true}, QPS: 1000, Burst: 2000,
		Dial: s.dial,
	}
	kubeconfig := clientcmdapi.NewConfig()
	kubeconfig.Clusters["api"] = &clientcmdapi.Cluster{Server: url, InsecureSkipTLSVerify: true}
	kubeconfig.AuthInfos["admin"] = &clientcmdapi.AuthInfo{Token: token}
	kubeconfig.Contexts["api"] = &clientcmdapi.Context{Cluster: "api", AuthInfo: "admin"}
	kubeconfig.CurrentContext = "api"
	return clientcmd.WriteToFile(*kubeconfig, s.Kubeconfig)
}

// dial connects from the server's network namespace.
func (s *Server) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = s.config.Do(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Run starts a program beside the API server; what it says goes to a file of its name.
func (s *Server) Run(path string, args ...string) (*os.Process, error) {
	log, err := os.Create(filepath.Join(s.Dir, filepath.Base(path)+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(path, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.Dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // the program would die with the thread that started it
		defer runtime.UnlockOSThread()
		running := false
		err := s.config.Do(func() error {
			if err := cmd.Start(); err != nil {
				return err
			}
			running = true
			started <- nil
			_ = cmd.Wait() // it is killed
			return nil
		})
		if !running {
			started <- err
		}
	}()
	if err := <-started; err != nil {
		<-ended
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	s.running = append(s.running, &program{cmd.Process, ended})
	return cmd.Process, nil
}

// ready waits until the API server says so.
func (s *Server) ready(ctx context.Context) error {
	d, err := discovery.NewDiscoveryClientForConfig(s.Client)
	if err != nil {
		return err
	}
	var last error
	err = wait.PollUntilContextTimeout(ctx, 50*time.Millisecond, time.Minute, true,
		func(ctx context.Context) (bool, error) {
			last = d.RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
			return last == nil, nil
		})
	if err != nil {
		return fmt.Errorf("the API server is not ready after a minute: %w\n%s", errors.Join(last, err), s.logs())
	}
	return nil
}

// Stop ends everything and removes what it left.
func (s *Server) Stop() {
	for _, p := range s.running {
		_ = p.process.Kill() // it may have ended
		<-p.ended
	}
	_ = os.RemoveAll(s.Dir)
}

// logs are the last words of every program.
func (s *Server) logs() string {
	const last = 3000
	var words strings.Builder
	files, _ := filepath.Glob(filepath.Join(s.Dir, "*.log"))
	for _, file := range files {
		content, _ := os.ReadFile(file)
		fmt.Fprintf(&words, "--- %s\n%s\n", filepath.Base(file), content[max(0, len(content)-last):])
	}
	return words.String()
}

// freePorts asks the kernel for unused TCP ports.
func (s *Server) freePorts(n int) (ports []string, err error) {
	err = s.config.Do(func() error {
		for range n {
			l, err := net.Listen("tcp", net.JoinHostPort(s.config.Address, "0"))
			if err != nil {
				return err
			}
			defer l.Close()
			_, port, err := net.SplitHostPort(l.Addr().String())
			if err != nil {
				return err
			}
			ports = append(ports, port)
		}
		return nil
	})
	return ports, err
}

// Define creates a CRD and waits until the API server serves it; api knows apiextensions.k8s.io/v1.
func Define(ctx context.Context, api client.Client, definition []byte) error {
	var crd apiextensionsv1.CustomResourceDefinition
	if err := yaml.UnmarshalStrict(definition, &crd); err != nil {
		return fmt.Errorf("read a CRD: %w", err)
	}
	if err := api.Create(ctx, &crd); err != nil {
		return fmt.Errorf("create CRD %s: %w", crd.Name, err)
	}
	established := func(ctx context.Context) (bool, error) {
		if err := api.Get(ctx, client.ObjectKeyFromObject(&crd), &crd); err != nil {
			return false, err
		}
		for _, c := range crd.Status.Conditions {
			if c.Type == apiextensionsv1.Established && c.Status == apiextensionsv1.ConditionTrue {
				return true, nil
			}
		}
		return false, nil
	}
	if err := wait.PollUntilContextTimeout(ctx, 20*time.Millisecond, time.Minute, true, established); err != nil {
		return fmt.Errorf("CRD %s is not established: %w: %v", crd.Name, err, crd.Status.Conditions)
	}
	return nil
}
