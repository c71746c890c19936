package deviceplugin_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"github.com/k8slan/k8slan/deviceplugin"
)

const (
	srl = "macvtap.k8slan.io/k8slan-veth-srl"
	vm  = "macvtap.k8slan.io/k8slan-veth-vm"
)

// run runs plugins on dir until the test ends or the returned function is called.
func run(t testing.TB, dir string, spokes ...deviceplugin.Spoke) (*deviceplugin.Plugins, func()) {
	t.Helper()
	return runWatched(t, dir, nil, spokes...)
}

// runWatched is run with a function that receives the result of each registration.
func runWatched(
	t testing.TB, dir string, onRegistration func(error), spokes ...deviceplugin.Spoke,
) (*deviceplugin.Plugins, func()) {
	t.Helper()
	plugins := deviceplugin.New(dir, slog.New(slog.NewTextHandler(&testLog{t: t}, nil)))
	plugins.OnRegistration(onRegistration)
	plugins.Set(spokes)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- plugins.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return plugins, stop
}

// testLog writes each line to the test's log.
type testLog struct{ t testing.TB }

func (l *testLog) Write(line []byte) (int, error) {
	l.t.Logf("%s", bytes.TrimSpace(line))
	return len(line), nil
}

// pluginDir returns a directory with a shorter path than t.TempDir: a socket's path has at most 107 bytes.
func pluginDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "dp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestASpokeIsOneDeviceWithItsName(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	run(t, dir, deviceplugin.Spoke{Name: "srl", Healthy: true}, deviceplugin.Spoke{Name: "vm"})

	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
	kubelet.await(t, vm, lists("vm", pluginapi.Unhealthy))
}

func TestKubeletReceivesOnlyChanges(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	plugins, _ := run(t, dir, deviceplugin.Spoke{Name: "srl"})
	kubelet.await(t, srl, lists("srl", pluginapi.Unhealthy))

	plugins.Set([]deviceplugin.Spoke{{Name: "srl"}, {Name: "vm"}})
	kubelet.await(t, vm, lists("vm", pluginapi.Unhealthy))
	plugins.Set([]deviceplugin.Spoke{{Name: "srl", Healthy: true}, {Name: "vm"}})
	r := kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
	if r.Messages != 2 || r.Registrations != 1 {
		t.Errorf("kubelet received %d messages and %d registrations for one change of health, want 2 and 1",
			r.Messages, r.Registrations)
	}
}

func TestAllocateNamesTheDeviceInCDI(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	run(t, dir, deviceplugin.Spoke{Name: "srl", Healthy: true})
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))

	response, err := kubelet.allocate(srl, "srl")
	if err != nil {
		t.Fatal(err)
	}
	if len(response.ContainerResponses) != 1 || len(response.ContainerResponses[0].CdiDevices) != 1 {
		t.Fatalf("response = %v, want one container with one CDI device", response)
	}
	if got := response.ContainerResponses[0].CdiDevices[0].Name; got != "macvtap.k8slan.io/spoke=srl" {
		t.Errorf("CDI device = %q", got)
	}
}

func TestAllocateRefusesUnhealthyAndUnknownDevices(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	run(t, dir, deviceplugin.Spoke{Name: "srl", Healthy: true}, deviceplugin.Spoke{Name: "vm"})
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
	kubelet.await(t, vm, lists("vm", pluginapi.Unhealthy))

	for _, c := range []struct {
		name, resource, id string
		code               codes.Code
		sentence           string
	}{
		{"unhealthy", vm, "vm", codes.Unavailable, `spoke "vm" is not ready on this node`},
		{"another spoke's device", srl, "vm", codes.NotFound, `kubelet asked for "vm"`},
	} {
		_, err := kubelet.allocate(c.resource, c.id)
		if status.Code(err) != c.code || !strings.Contains(err.Error(), c.sentence) {
			t.Errorf("%s: err = %v, want %v and %q", c.name, err, c.code, c.sentence)
		}
	}
}

func TestEverySpokeRegistersAgainWhenKubeletRestarts(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	plugins, _ := run(t, dir,
		deviceplugin.Spoke{Name: "srl", Healthy: true}, deviceplugin.Spoke{Name: "vm", Healthy: true})
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
	kubelet.await(t, vm, lists("vm", pluginapi.Healthy))

	for range 3 {
		kubelet.stop()
		plugins.Set([]deviceplugin.Spoke{{Name: "srl", Healthy: true}, {Name: "vm"}})
		kubelet = startKubelet(t, dir)
		kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
		kubelet.await(t, vm, lists("vm", pluginapi.Unhealthy))
	}
}

// A killed kubelet leaves its socket, which refuses connections.
func TestPluginsWaitForTheSuccessorOfAKilledKubelet(t *testing.T) {
	dir := pluginDir(t)
	listener, err := net.Listen("unix", filepath.Join(dir, "kubelet.sock"))
	if err != nil {
		t.Fatal(err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	run(t, dir, deviceplugin.Spoke{Name: "srl", Healthy: true})

	kubelet := startKubelet(t, dir)
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
}

func TestKubeletMayStartAfterThePlugins(t *testing.T) {
	dir := filepath.Join(pluginDir(t), "kubelet", "device-plugins")
	plugins, _ := run(t, dir, deviceplugin.Spoke{Name: "srl", Healthy: true})
	if plugins.Ready() == nil {
		t.Error("Ready returns nil although there is no kubelet")
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	kubelet := startKubelet(t, dir)
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
}

func TestARecreatedPluginDirectoryIsFound(t *testing.T) {
	dir := filepath.Join(pluginDir(t), "device-plugins")
	if err := os.Mkdir(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	kubelet := startKubelet(t, dir)
	run(t, dir, deviceplugin.Spoke{Name: "srl", Healthy: true})
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))

	kubelet.stop()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	kubelet = startKubelet(t, dir)
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
}

func TestARefusedRegistrationIsRepeated(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	kubelet.setRefuse(errors.New("not today"))
	var refused atomic.Int32
	accepted := make(chan struct{}, 8)
	plugins, stop := runWatched(t, dir, func(err error) {
		if err != nil {
			refused.Add(1)
		} else {
			accepted <- struct{}{}
		}
	}, deviceplugin.Spoke{Name: "srl", Healthy: true})
	kubelet.await(t, srl, func(r resource) bool { return r.Registrations >= 3 })
	if plugins.Ready() == nil {
		t.Error("Ready returns nil although kubelet refuses")
	}
	if n := plugins.Registered(); n != 0 {
		t.Errorf("%d are registered although kubelet refuses", n)
	}

	kubelet.setRefuse(nil)
	r := kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
	select {
	case <-accepted: // kubelet lists the devices before the plugin receives the result of its registration
	case <-time.After(patience):
		t.Fatal("the successful registration is not reported")
	}
	stop()
	if refused.Load() != int32(r.Registrations-1) || len(accepted) != 0 {
		t.Errorf("%d refusals and %d more registrations are reported; kubelet counts %d attempts",
			refused.Load(), len(accepted), r.Registrations)
	}
}

func TestADeletedSocketIsMadeAgain(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	run(t, dir, deviceplugin.Spoke{Name: "srl", Healthy: true})
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))

	for n := 2; n < 6; n++ {
		if err := os.Remove(filepath.Join(dir, "k8slan-srl.sock")); err != nil {
			t.Fatal(err)
		}
		kubelet.await(t, srl, func(r resource) bool {
			return r.Registrations >= n && lists("srl", pluginapi.Healthy)(r)
		})
		if _, err := os.Stat(filepath.Join(dir, "k8slan-srl.sock")); err != nil {
			t.Fatal(err)
		}
	}
}

func TestARemovedSpokeIsUnregistered(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	plugins, _ := run(t, dir,
		deviceplugin.Spoke{Name: "srl", Healthy: true}, deviceplugin.Spoke{Name: "vm", Healthy: true})
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
	kubelet.await(t, vm, lists("vm", pluginapi.Healthy))

	plugins.Set([]deviceplugin.Spoke{{Name: "srl", Healthy: true}})
	kubelet.await(t, vm, func(r resource) bool { return !r.Connected })
	if r := kubelet.await(t, srl, lists("srl", pluginapi.Healthy)); r.Registrations != 1 {
		t.Errorf("the other spoke was registered %d times", r.Registrations)
	}
	if _, err := os.Stat(filepath.Join(dir, "k8slan-vm.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket of the removed spoke: %v", err)
	}
}

// Kubelet drops the new client of a resource if the stream of the old client ends later. The plugins avoid that
// overlap.
func TestASpokeThatIsAdvertisedAgainAtOnceStaysRegistered(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	plugins, _ := run(t, dir, deviceplugin.Spoke{Name: "srl", Healthy: true})
	for n := 1; n <= 20; n++ {
		r := kubelet.await(t, srl, func(r resource) bool {
			return r.Registrations >= n && lists("srl", pluginapi.Healthy)(r)
		})
		if r.Registrations > n {
			t.Fatalf("%d registrations after %d removals: kubelet dropped a client", r.Registrations, n-1)
		}
		plugins.Set(nil)
		kubelet.await(t, srl, func(r resource) bool { return !r.Connected })
		plugins.Set([]deviceplugin.Spoke{{Name: "srl", Healthy: true}})
	}
}

func TestReadyWhenEverySpokeIsRegistered(t *testing.T) {
	dir := pluginDir(t)
	plugins, _ := run(t, dir)
	if err := plugins.Ready(); err != nil {
		t.Errorf("Ready = %v without spokes, want nil", err)
	}
	plugins.Set([]deviceplugin.Spoke{{Name: "srl", Healthy: true}, {Name: "vm"}})
	if err := plugins.Ready(); err == nil || !strings.Contains(err.Error(), "2 of 2") {
		t.Errorf("Ready = %v, want 2 of 2 unregistered", err)
	}
	kubelet := startKubelet(t, dir)
	kubelet.await(t, vm, lists("vm", pluginapi.Unhealthy))
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
}

func TestSocketsOfAnEarlierRunAreRemoved(t *testing.T) {
	dir := pluginDir(t)
	leave := func(name string) {
		listener, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		listener.(*net.UnixListener).SetUnlinkOnClose(false)
		if err := listener.Close(); err != nil {
			t.Fatal(err)
		}
	}
	kubelet := startKubelet(t, dir)
	leave("k8slan-old.sock")
	leave("other.sock")
	run(t, dir, deviceplugin.Spoke{Name: "srl", Healthy: true})
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))

	if _, err := os.Stat(filepath.Join(dir, "k8slan-old.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket of the earlier run: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "other.sock")); err != nil {
		t.Errorf("another plugin's socket: %v", err)
	}
}

func TestNoSocketRemainsWhenPluginsStop(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	_, stop := run(t, dir, deviceplugin.Spoke{Name: "srl", Healthy: true})
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
	stop()
	kubelet.await(t, srl, func(r resource) bool { return !r.Connected })
	left, err := filepath.Glob(filepath.Join(dir, "k8slan-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("remaining sockets: %v, %v", left, err)
	}
}

func TestAThousandSpokesSurviveAKubeletRestart(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	var spokes []deviceplugin.Spoke
	for n := range 1000 {
		spokes = append(spokes, deviceplugin.Spoke{Name: fmt.Sprint("s", n), Healthy: true})
	}
	_, stop := run(t, dir, spokes...)
	all := func(seen map[string]resource) bool {
		connected := 0
		for _, r := range seen {
			if r.Connected && len(r.Devices) == 1 {
				connected++
			}
		}
		return connected == len(spokes)
	}
	start := time.Now()
	kubelet.awaitAll(t, all)
	t.Logf("1,000 spokes registered and listed in %v", time.Since(start))
	kubelet.stop()
	kubelet = startKubelet(t, dir)
	start = time.Now()
	seen := kubelet.awaitAll(t, all)
	t.Logf("%v after a restart", time.Since(start))
	for name, r := range seen {
		if r.Messages != 1 {
			t.Errorf("%s: %d messages, want 1", name, r.Messages)
		}
	}
	stop()
}

const web = "macvtap.k8slan.io/k8slan-veth-web"

// pool returns whether kubelet lists that many ports of a pool, all with that health.
func pool(name string, ports int, health string) func(resource) bool {
	return func(r resource) bool {
		for number := range ports {
			if r.Devices[fmt.Sprintf("%s_%d", name, number)] != health {
				return false
			}
		}
		return r.Connected && len(r.Devices) == ports
	}
}

func TestAPoolIsOneResourceWithADevicePerPort(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	plugins, _ := run(t, dir, deviceplugin.Spoke{Name: "web", Ports: 11})
	kubelet.await(t, web, pool("web", 11, pluginapi.Unhealthy))
	messages := 1
	for _, ports := range []int{11, 500, 1} {
		spokes := []deviceplugin.Spoke{{Name: "web", Ports: ports, Healthy: true}}
		plugins.Set(spokes)
		plugins.Set(spokes)
		r := kubelet.await(t, web, pool("web", ports, pluginapi.Healthy))
		if messages++; r.Messages != messages || r.Registrations != 1 {
			t.Errorf("with %d ports kubelet received %d messages in %d registrations, want %d in 1",
				ports, r.Messages, r.Registrations, messages)
		}
	}
	plugins.Set([]deviceplugin.Spoke{{Name: "web", Healthy: true}})
	kubelet.await(t, web, lists("web", pluginapi.Healthy))
}

func TestPortsAreAllocatedByTheirCDINames(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	plugins, _ := run(t, dir, deviceplugin.Spoke{Name: "web", Ports: 11, Healthy: true})
	kubelet.await(t, web, pool("web", 11, pluginapi.Healthy))

	response, err := kubelet.allocate(web, "web_10", "web_2")
	if err != nil {
		t.Fatal(err)
	}
	devices := response.ContainerResponses[0].CdiDevices
	if len(devices) != 2 || devices[0].Name != "macvtap.k8slan.io/spoke=web_10" ||
		devices[1].Name != "macvtap.k8slan.io/spoke=web_2" {
		t.Errorf("CDI devices are %v", devices)
	}
	for _, id := range []string{"web_11", "web", "db_0"} {
		_, err := kubelet.allocate(web, id)
		if status.Code(err) != codes.NotFound ||
			!strings.Contains(err.Error(), `pool "web" has the ports web_0 to web_10`) {
			t.Errorf("%s: %v", id, err)
		}
	}
	plugins.Set([]deviceplugin.Spoke{{Name: "web", Ports: 11}})
	kubelet.await(t, web, pool("web", 11, pluginapi.Unhealthy))
	if _, err := kubelet.allocate(web, "web_0"); status.Code(err) != codes.Unavailable {
		t.Errorf("an unhealthy port: %v", err)
	}
}

// A pool that is made smaller loses its highest ports, so kubelet allocates the lowest ones first.
func TestTheLowestPortsArePreferred(t *testing.T) {
	dir := pluginDir(t)
	kubelet := startKubelet(t, dir)
	run(t, dir, deviceplugin.Spoke{Name: "web", Ports: 11, Healthy: true},
		deviceplugin.Spoke{Name: "srl", Healthy: true})
	kubelet.await(t, web, pool("web", 11, pluginapi.Healthy))
	kubelet.await(t, srl, lists("srl", pluginapi.Healthy))
	for _, c := range []struct {
		free, must []string
		size       int32
		want       string
	}{
		{[]string{"web_10", "web_9", "web_2"}, nil, 1, "web_2"},
		{[]string{"web_10", "web_9", "web_2"}, nil, 2, "web_2 web_9"},
		{[]string{"web_10", "web_9", "web_2"}, []string{"web_10"}, 2, "web_10 web_2"},
		{[]string{"web_3"}, nil, 2, "web_3"},
	} {
		got, err := kubelet.prefer(web, c.size, c.free, c.must)
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("%d of %v with %v: %v, %v; want %s", c.size, c.free, c.must, got, err, c.want)
		}
	}
	if got, err := kubelet.prefer(srl, 1, []string{"srl"}, nil); err != nil || !slices.Equal(got, []string{"srl"}) {
		t.Errorf("for a single spoke: %v, %v", got, err)
	}
}
