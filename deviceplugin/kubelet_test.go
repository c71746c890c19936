package deviceplugin_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

// fakeKubelet imitates kubelet's device manager (pkg/kubelet/cm/devicemanager of Kubernetes 1.36): it removes all
// sockets when it starts, connects to a plugin during registration, and looks up a client by resource name when a
// stream ends. So it drops a new client if the stream of the old one ends late.
type fakeKubelet struct {
	pluginapi.UnimplementedRegistrationServer
	dir    string
	server *grpc.Server
	served chan struct{}

	mu      sync.Mutex
	changed chan struct{} // closed at each change
	refuse  error
	clients map[string]*kubeletClient
	seen    map[string]resource
}

// resource is the fake kubelet's state of one resource.
type resource struct {
	Registrations int
	Connected     bool
	Messages      int               // of ListAndWatch
	Devices       map[string]string // ID → health, of the last message
}

type kubeletClient struct {
	conn *grpc.ClientConn
	api  pluginapi.DevicePluginClient
}

// startKubelet starts a kubelet on dir, which must exist.
func startKubelet(t testing.TB, dir string) *fakeKubelet {
	t.Helper()
	k, err := newFakeKubelet(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.stop)
	return k
}

func newFakeKubelet(dir string) (*fakeKubelet, error) {
	k := &fakeKubelet{
		dir:     dir,
		served:  make(chan struct{}),
		changed: make(chan struct{}),
		clients: make(map[string]*kubeletClient),
		seen:    make(map[string]resource),
		server:  grpc.NewServer(),
	}
	if err := wipeSockets(dir); err != nil {
		return nil, err
	}
	listener, err := net.Listen("unix", filepath.Join(dir, "kubelet.sock"))
	if err != nil {
		return nil, err
	}
	pluginapi.RegisterRegistrationServer(k.server, k)
	go func() {
		defer close(k.served)
		_ = k.server.Serve(listener)
	}()
	return k, nil
}

func wipeSockets(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.Type() != fs.ModeSocket {
			continue
		}
		if err := os.Remove(filepath.Join(dir, entry.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// stop stops this kubelet; it may be called again.
func (k *fakeKubelet) stop() {
	k.server.Stop()
	<-k.served
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, client := range k.clients {
		_ = client.conn.Close()
	}
}

func (k *fakeKubelet) Register(_ context.Context, request *pluginapi.RegisterRequest) (*pluginapi.Empty, error) {
	k.mu.Lock()
	refuse := k.refuse
	k.mu.Unlock()
	if refuse != nil {
		k.update(request.ResourceName, func(r *resource) { r.Registrations++ })
		return nil, refuse
	}
	conn, err := grpc.NewClient("unix:"+filepath.Join(k.dir, request.Endpoint),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	client := &kubeletClient{conn: conn, api: pluginapi.NewDevicePluginClient(conn)}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := client.api.GetDevicePluginOptions(ctx, &pluginapi.Empty{}, grpc.WaitForReady(true)); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	k.mu.Lock()
	k.clients[request.ResourceName] = client
	k.mu.Unlock()
	k.update(request.ResourceName, func(r *resource) { r.Registrations++; r.Connected = true })
	go k.watch(request.ResourceName, client)
	return &pluginapi.Empty{}, nil
}

func (k *fakeKubelet) watch(name string, client *kubeletClient) {
	stream, err := client.api.ListAndWatch(context.Background(), &pluginapi.Empty{})
	for err == nil {
		var response *pluginapi.ListAndWatchResponse
		if response, err = stream.Recv(); err == nil {
			k.update(name, func(r *resource) {
				r.Messages++
				r.Devices = make(map[string]string)
				for _, device := range response.Devices {
					r.Devices[device.ID] = device.Health
				}
			})
		}
	}
	// Look up by name, as kubelet does: this may be a later client.
	k.mu.Lock()
	current := k.clients[name]
	delete(k.clients, name)
	k.mu.Unlock()
	if current != nil {
		_ = current.conn.Close()
		k.update(name, func(r *resource) { r.Connected = false })
	}
}

func (k *fakeKubelet) update(name string, change func(*resource)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.seen[name]
	change(&r)
	k.seen[name] = r
	close(k.changed)
	k.changed = make(chan struct{})
}

func (k *fakeKubelet) setRefuse(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.refuse = err
}

// patience is how long a test waits for something that usually takes milliseconds.
const patience = time.Minute

// await waits until want is true for the resource, and returns it.
func (k *fakeKubelet) await(t testing.TB, name string, want func(resource) bool) resource {
	t.Helper()
	return k.awaitAll(t, func(all map[string]resource) bool { return want(all[name]) })[name]
}

// awaitAll waits until want is true for all resources, and returns them.
func (k *fakeKubelet) awaitAll(t testing.TB, want func(map[string]resource) bool) map[string]resource {
	t.Helper()
	deadline := time.After(patience)
	for {
		k.mu.Lock()
		seen, changed := maps.Clone(k.seen), k.changed
		k.mu.Unlock()
		if want(seen) {
			return seen
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("timeout; kubelet has %d resources, %s", len(seen), sample(seen))
		}
	}
}

// sample prints a few resources, those first that list no devices.
func sample(seen map[string]resource) string {
	names := slices.SortedFunc(maps.Keys(seen), func(a, b string) int {
		return cmp.Or(cmp.Compare(len(seen[a].Devices), len(seen[b].Devices)), cmp.Compare(a, b))
	})
	var b strings.Builder
	for _, name := range names[:min(len(names), 5)] {
		fmt.Fprintf(&b, "%s: %+v; ", name, seen[name])
	}
	return b.String()
}

func (k *fakeKubelet) allocate(name string, ids ...string) (*pluginapi.AllocateResponse, error) {
	k.mu.Lock()
	client := k.clients[name]
	k.mu.Unlock()
	if client == nil {
		return nil, errors.New("kubelet has no client for " + name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return client.api.Allocate(ctx, &pluginapi.AllocateRequest{
		ContainerRequests: []*pluginapi.ContainerAllocateRequest{{DevicesIds: ids}},
	})
}

// prefer calls GetPreferredAllocation for the free devices, as kubelet does if the plugin's options say so.
func (k *fakeKubelet) prefer(name string, size int32, free, must []string) ([]string, error) {
	k.mu.Lock()
	client := k.clients[name]
	k.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	options, err := client.api.GetDevicePluginOptions(ctx, &pluginapi.Empty{})
	if err != nil {
		return nil, err
	}
	if !options.GetPreferredAllocationAvailable {
		return nil, errors.New("the plugin's options do not have GetPreferredAllocation")
	}
	response, err := client.api.GetPreferredAllocation(ctx, &pluginapi.PreferredAllocationRequest{
		ContainerRequests: []*pluginapi.ContainerPreferredAllocationRequest{
			{AvailableDeviceIDs: free, MustIncludeDeviceIDs: must, AllocationSize: size},
		},
	})
	if err != nil {
		return nil, err
	}
	return response.ContainerResponses[0].DeviceIDs, nil
}

// lists returns whether kubelet lists a spoke's one device with that health.
func lists(spoke, health string) func(resource) bool {
	return func(r resource) bool {
		return r.Connected && len(r.Devices) == 1 && r.Devices[spoke] == health
	}
}
