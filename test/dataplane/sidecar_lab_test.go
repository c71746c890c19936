package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kuberuntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/test/cluster/apiserver"
	"github.com/k8slan/k8slan/test/netlab"
)

// sidecars is what the pods with sidecars of all tests share.
type sidecars struct {
	binary string            // the program as it is released
	server *apiserver.Server // a real one, on the loopback device of the tests
	api    client.Client
}

// sharedSidecars is made by the first test that needs it, and stopped after the last test.
var sharedSidecars struct {
	once sync.Once
	sidecars
	err error
}

// startSidecars returns what the sidecars of all tests share. The sidecars run with NET_ADMIN as their only capability.
func startSidecars(t *testing.T) *sidecars {
	t.Helper()
	netlab.NeedRoot(t, "only root can leave a process NET_ADMIN alone")
	s := &sharedSidecars
	s.once.Do(func() { s.err = s.start(context.Background()) })
	must(t, s.err)
	return &s.sidecars
}

func stopSidecars() {
	if server := sharedSidecars.server; server != nil {
		server.Stop()
	}
}

func (s *sidecars) start(ctx context.Context) error {
	s.binary = "/run/k8slan" // in the tests' own /run
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w",
		"-o", s.binary, "github.com/k8slan/k8slan/cmd/k8slan")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build k8slan: %w\n%s", err, out)
	}
	kubernetes, err := netlab.Component(ctx, "kubernetes")
	if err != nil {
		return err
	}
	etcd, err := netlab.Component(ctx, "etcd")
	if err != nil {
		return err
	}
	if s.server, err = apiserver.Start(ctx, apiserver.Config{Kubernetes: kubernetes, Etcd: etcd}); err != nil {
		return err
	}
	scheme := kuberuntime.NewScheme()
	err = errors.Join(corev1.AddToScheme(scheme), discoveryv1.AddToScheme(scheme),
		rbacv1.AddToScheme(scheme), authenticationv1.AddToScheme(scheme))
	if err != nil {
		return err
	}
	s.api, err = client.New(s.server.Client, client.Options{Scheme: scheme})
	return err
}

// team is pods on one network, and a namespace of the API server with a service account that has the rights from the
// docs.
type team struct {
	*sidecars
	underlay   *netlab.Underlay
	namespace  string
	kubeconfig string
	pods       []*pod
}

// pod is a pod whose test speaks for the container beside the sidecar.
type pod struct {
	*netlab.Node
	team       *team
	ipv4, ipv6 netip.Addr
	dir        string // for its configuration and logs
	relay      *relay // its connection to the API server
}

// podAddresses returns the addresses of pod n of a team, from 1 on. No frame of the catalog asks for them.
func podAddresses(n int) (ipv4, ipv6 netip.Addr) {
	return netip.AddrFrom4([4]byte{198, 51, 100, byte(n)}), netip.MustParseAddr(fmt.Sprintf("2001:db8:1::%x", n))
}

// pods makes a team of that many pods.
func (s *sidecars) pods(t *testing.T, count int) *team {
	t.Helper()
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "sidecar-"}}
	must(t, s.api.Create(t.Context(), namespace))
	tm := &team{sidecars: s, underlay: netlab.NewUnderlay(t, underlayMTU), namespace: namespace.Name}
	tm.kubeconfig = tm.account(t, "lan", rbacv1.PolicyRule{
		APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"},
		Verbs: []string{"list", "watch"},
	})
	for n := range count {
		tm.pods = append(tm.pods, tm.pod(t, n+1))
	}
	return tm
}

// pod makes pod n, from 1 on; its name ends in n-1 like that of a StatefulSet's pod.
func (tm *team) pod(t *testing.T, n int) *pod {
	t.Helper()
	p := &pod{Node: tm.underlay.Join(t, fmt.Sprintf("lan-%d", n-1)), team: tm, dir: t.TempDir()}
	p.ipv4, p.ipv6 = podAddresses(n)
	h := node{Node: p.Node}
	h.addUnderlayAddress(t, netip.PrefixFrom(p.ipv4, 24))
	h.addUnderlayAddress(t, netip.PrefixFrom(p.ipv6, 64))
	p.Sysctl(t, "net/ipv6/conf/default/disable_ipv6", "1") // the test's frames are the only ones in the LAN
	p.relay = p.relayTo(t, tm.serverAddress(), tm.serverAddress(), netip.Addr{})
	return p
}

// account makes a service account with these rights in the namespace, and returns its kubeconfig.
func (tm *team) account(t *testing.T, name string, rules ...rbacv1.PolicyRule) string {
	t.Helper()
	meta := metav1.ObjectMeta{Namespace: tm.namespace, Name: name}
	account, token := &corev1.ServiceAccount{ObjectMeta: meta}, &authenticationv1.TokenRequest{}
	must(t, tm.api.Create(t.Context(), account))
	must(t, tm.api.SubResource("token").Create(t.Context(), account, token))
	tm.allow(t, name, rules...)
	config := clientcmdapi.NewConfig()
	config.Clusters["api"] = &clientcmdapi.Cluster{Server: tm.server.Client.Host, InsecureSkipTLSVerify: true}
	config.AuthInfos["pod"] = &clientcmdapi.AuthInfo{Token: token.Status.Token}
	config.Contexts["api"] = &clientcmdapi.Context{Cluster: "api", AuthInfo: "pod"}
	config.CurrentContext = "api"
	file := filepath.Join(t.TempDir(), name)
	must(t, clientcmd.WriteToFile(*config, file))
	return file
}

// allow gives a service account of the namespace these rights.
func (tm *team) allow(t *testing.T, account string, rules ...rbacv1.PolicyRule) {
	t.Helper()
	if len(rules) == 0 {
		return
	}
	meta := metav1.ObjectMeta{Namespace: tm.namespace, Name: account}
	must(t, tm.api.Create(t.Context(), &rbacv1.Role{ObjectMeta: meta, Rules: rules}))
	must(t, tm.api.Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: account},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: tm.namespace, Name: account}},
	}))
}

// relay connects a pod to a server on the loopback device of the tests, at an address in the pod's namespace. While it
// is closed the pod cannot reach the server.
type relay struct {
	from     netlab.Namespace
	at, to   string
	dialer   net.Dialer
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
	tasks    sync.WaitGroup
}

func (s *sidecars) serverAddress() string {
	return strings.TrimPrefix(s.server.Client.Host, "https://")
}

// relayTo makes a relay to a server, which sees connections from source.
func (p *pod) relayTo(t *testing.T, at, to string, source netip.Addr) *relay {
	t.Helper()
	r := &relay{from: p.Namespace, at: at, to: to}
	if source.IsValid() {
		r.dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
	}
	r.open(t)
	t.Cleanup(r.close)
	return r
}

func (r *relay) open(t *testing.T) {
	t.Helper()
	must(t, r.from.Do(func() (err error) {
		r.listener, err = net.Listen("tcp", r.at)
		return err
	}))
	l := r.listener
	r.tasks.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // the listener is closed
			}
			r.tasks.Go(func() { r.pass(conn) })
		}
	})
}

func (r *relay) pass(near net.Conn) {
	defer near.Close()
	far, err := r.dialer.Dial("tcp", r.to)
	if err != nil {
		return
	}
	defer far.Close()
	r.mu.Lock()
	r.conns = append(r.conns, near, far)
	r.mu.Unlock()
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(near, far) // until one of them ends
		near.Close()
	})
	_, _ = io.Copy(far, near)
	far.Close()
	back.Wait()
}

// close ends the connections, too.
func (r *relay) close() {
	r.listener.Close()
	r.mu.Lock()
	for _, c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	r.tasks.Wait()
}

// slice writes an EndpointSlice of a Service.
func (tm *team) slice(t *testing.T, name, service string, endpoints ...discoveryv1.Endpoint) {
	t.Helper()
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: tm.namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service},
		},
		AddressType: discoveryv1.AddressTypeIPv4, Endpoints: endpoints,
	}
	if len(endpoints) > 0 && netip.MustParseAddr(endpoints[0].Addresses[0]).Is6() {
		slice.AddressType = discoveryv1.AddressTypeIPv6
	}
	err := tm.api.Create(t.Context(), slice)
	if err != nil && client.IgnoreAlreadyExists(err) == nil {
		var old discoveryv1.EndpointSlice
		must(t, tm.api.Get(t.Context(), client.ObjectKeyFromObject(slice), &old))
		old.Endpoints = endpoints
		err = tm.api.Update(t.Context(), &old)
	}
	must(t, err)
}

// ready returns endpoints of pods that are ready.
func ready(all ...netip.Addr) (endpoints []discoveryv1.Endpoint) { return endpointsOf(true, all...) }

func endpointsOf(ready bool, all ...netip.Addr) (endpoints []discoveryv1.Endpoint) {
	for _, a := range all {
		endpoints = append(endpoints, discoveryv1.Endpoint{
			Addresses: []string{a.String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready},
		})
	}
	return endpoints
}

// service makes the team's pods the endpoints of a dual-stack Service, in one slice per family.
func (tm *team) service(t *testing.T, name string) {
	t.Helper()
	var ipv4, ipv6 []netip.Addr
	for _, p := range tm.pods {
		ipv4, ipv6 = append(ipv4, p.ipv4), append(ipv6, p.ipv6)
	}
	tm.slice(t, name+"-4", name, ready(ipv4...)...)
	tm.slice(t, name+"-6", name, ready(ipv6...)...)
}

// sidecar is a running sidecar.
type sidecar struct {
	pod     *pod
	process *os.Process
	log     string
	ended   chan struct{}
	err     error // set once it has ended
}

// settings is a configuration by environment variables.
type settings map[string]string

// with returns the settings with more.
func (s settings) with(more settings) settings {
	all := maps.Clone(s)
	maps.Copy(all, more)
	return all
}

// settings are the settings that a sidecar of the pod has by default.
func (p *pod) settings() settings {
	return settings{
		"KL_NAMESPACE": p.team.namespace, "KL_POD": p.Name, "KL_IP": p.ipv4.String() + "," + p.ipv6.String(),
		"KL_SERVICES":        "lan",
		"KL_VXLAN_ADDRESSES": "192.168.69.{ordinal+1}/24", "KUBECONFIG": p.team.kubeconfig,
	}
}

// configFile is the path of the pod's configuration file, which may be absent.
func (p *pod) configFile() string { return filepath.Join(p.dir, "config", "kubelan.yaml") }

// configure writes the configuration file as kubelet does: it replaces the file.
func (p *pod) configure(t *testing.T, text string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(p.configFile()), 0o755))
	next := filepath.Join(p.dir, "next")
	must(t, os.WriteFile(next, []byte(text), 0o644))
	must(t, os.Rename(next, p.configFile()))
}

// start starts a sidecar in the pod, with NET_ADMIN as its only capability.
func (p *pod) start(t *testing.T, s settings, args ...string) *sidecar {
	t.Helper()
	log, err := os.CreateTemp(p.dir, "log-")
	must(t, err)
	defer log.Close()
	privileges := []string{"--bounding-set=-all,+net_admin", "--inh-caps=-all,+net_admin", "--no-new-privs"}
	args = append(append(privileges, p.team.binary, "sidecar"), args...)
	if exists(p.configFile()) {
		args = append(args, "--config="+p.configFile())
	}
	cmd := exec.Command("setpriv", args...)
	cmd.Dir = p.dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for name, value := range s {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	sc := &sidecar{pod: p, log: log.Name(), ended: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		defer close(sc.ended)
		runtime.LockOSThread() // the program would end with the thread that started it
		defer runtime.UnlockOSThread()
		err := p.Do(func() error {
			if err := cmd.Start(); err != nil {
				return err
			}
			sc.process = cmd.Process
			started <- nil
			sc.err = cmd.Wait()
			return nil
		})
		if err != nil {
			started <- err
		}
	}()
	must(t, <-started)
	t.Cleanup(func() {
		sc.kill()
		if t.Failed() {
			t.Logf("the log of %s's sidecar:\n%s", p.Name, sc.logText(t))
		}
	})
	return sc
}

// kill ends the sidecar by SIGKILL; stop ends it by SIGTERM and expects it to succeed.
func (sc *sidecar) kill() {
	_ = sc.process.Kill() // it may have ended
	<-sc.ended
}

func (sc *sidecar) stop(t *testing.T) {
	t.Helper()
	_ = sc.process.Signal(unix.SIGTERM) // it may have ended
	sc.awaitEnd(t)
	if sc.err != nil {
		t.Errorf("the sidecar of %s: %v\n%s", sc.pod.Name, sc.err, sc.logText(t))
	}
}

func (sc *sidecar) awaitEnd(t *testing.T) {
	t.Helper()
	select {
	case <-sc.ended:
	case <-time.After(daemonTimeout):
		t.Fatalf("the sidecar of %s does not end:\n%s", sc.pod.Name, sc.logText(t))
	}
}

func (sc *sidecar) logText(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(sc.log)
	must(t, err)
	return string(b)
}

// awaitLog waits for a log line with these words, and returns it.
func (sc *sidecar) awaitLog(t *testing.T, words ...string) (line string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s to log %q", sc.pod.Name, words), func() bool {
		for l := range strings.Lines(sc.logText(t)) {
			if hasAll(l, words...) {
				line = l
				return true
			}
		}
		return false
	})
	return line
}

// countLog counts the log lines with these words.
func (sc *sidecar) countLog(t *testing.T, words ...string) (count int) {
	t.Helper()
	for l := range strings.Lines(sc.logText(t)) {
		if hasAll(l, words...) {
			count++
		}
	}
	return count
}

// expectFailure expects the sidecar to end with code 1 and a last line that has these words.
func (sc *sidecar) expectFailure(t *testing.T, words ...string) {
	t.Helper()
	sc.awaitEnd(t)
	var exit *exec.ExitError
	if !errors.As(sc.err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("it ended with %v, want code 1", sc.err)
	}
	said := strings.Split(strings.TrimSpace(sc.logText(t)), "\n")
	last := said[len(said)-1]
	if !strings.HasPrefix(last, "k8slan: ") || !hasAll(last, words...) ||
		strings.Count(sc.logText(t), "k8slan: ") != 1 {
		t.Errorf("it logged\n%s\nwant one line k8slan: … with %q", strings.Join(said, "\n"), words)
	}
}

// get sends a request to the sidecar's HTTP server.
func (p *pod) get(path string) (code int, body string, err error) {
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (conn net.Conn, err error) {
			err = p.Do(func() (err error) {
				conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
				return err
			})
			return conn, err
		},
	}}
	answer, err := c.Get("http://127.0.0.1:8181" + path)
	if err != nil {
		return 0, "", err
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	return answer.StatusCode, strings.TrimSpace(string(b)), err
}

// awaitHealth waits until /health answers with this code and these words.
func (p *pod) awaitHealth(t *testing.T, want int, words ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s to answer /health with %d, %q", p.Name, want, words), func() bool {
		code, body, err := p.get("/health")
		return err == nil && code == want && hasAll(body, words...)
	})
}

// staysHealthy expects /health to report no problem now.
func (p *pod) staysHealthy(t *testing.T) {
	t.Helper()
	if code, body, err := p.get("/health"); err != nil || code != http.StatusNoContent {
		t.Errorf("/health of %s answers %d %s, %v", p.Name, code, body, err)
	}
}

const kubelan = "kubelan"

// link returns the pod's interface of that name; nil if there is none.
func (p *pod) link(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := p.Netlink(t).LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	must(t, err)
	return l
}

// index returns the ifindex of the pod's LAN interface, which changes when the interface is recreated; 0 if there is
// none.
func (p *pod) index(t *testing.T) int {
	t.Helper()
	if l := p.link(t, kubelan); l != nil {
		return l.Attrs().Index
	}
	return 0
}

// remotes returns the remotes of the pod's LAN interface, sorted, with duplicates.
func (p *pod) remotes(t *testing.T) (remotes []netip.Addr) {
	t.Helper()
	l := p.link(t, kubelan)
	if l == nil {
		return nil
	}
	entries, err := p.Netlink(t).NeighList(l.Attrs().Index, unix.AF_BRIDGE)
	must(t, err)
	for _, e := range entries {
		if a, ok := netip.AddrFromSlice(e.IP); ok && slices.Equal(e.HardwareAddr, make([]byte, 6)) {
			remotes = append(remotes, a.Unmap())
		}
	}
	slices.SortFunc(remotes, netip.Addr.Compare)
	return remotes
}

// awaitRemotes waits until the pod floods to these remotes and no others.
func (p *pod) awaitRemotes(t *testing.T, want ...netip.Addr) {
	t.Helper()
	want = slices.SortedFunc(slices.Values(want), netip.Addr.Compare)
	eventually(t, fmt.Sprintf("%s to have the remotes %v", p.Name, want), func() bool {
		return slices.Equal(p.remotes(t), want)
	})
}

// host returns the pod as a host on the LAN.
func (p *pod) host(t *testing.T) *host {
	t.Helper()
	l := p.link(t, kubelan)
	at := kernel.Attachment{MAC: l.Attrs().HardwareAddr, MTU: l.Attrs().MTU}
	return &host{Namespace: p.Namespace, Wire: p.Open(t, kubelan), Attachment: at}
}

// ping expects an address to answer a ping from a namespace.
func ping(t *testing.T, from netlab.Namespace, address string) {
	t.Helper()
	var out []byte
	err := from.Do(func() (err error) {
		out, err = exec.Command("ping", "-c", "1", "-W", "3", address).CombinedOutput()
		return err
	})
	if err != nil {
		t.Errorf("%s does not reach %s: %v\n%s", from.Path, address, err, out)
	}
}

// startAll starts a sidecar in each pod, and returns when each has all others as remotes of that family.
func (tm *team) startAll(t *testing.T, more settings) (all []*sidecar) {
	t.Helper()
	for _, p := range tm.pods {
		all = append(all, p.start(t, p.settings().with(more)))
	}
	for _, p := range tm.pods {
		p.awaitRemotes(t, tm.others(p, more["KL_IP_FAMILY"] == "ipv6")...)
		p.awaitHealth(t, http.StatusNoContent)
	}
	return all
}

func (tm *team) others(p *pod, ipv6 bool) (others []netip.Addr) {
	for _, o := range tm.pods {
		switch {
		case o == p:
		case ipv6:
			others = append(others, o.ipv6)
		default:
			others = append(others, o.ipv4)
		}
	}
	return others
}
