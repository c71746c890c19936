package deviceplugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/notify"
)

// stopTimeout is how long a stopped server waits for kubelet to close its connections.
const stopTimeout = 5 * time.Second

// advertisement is the current state of an advertised spoke.
type advertisement struct {
	mu      sync.Mutex
	spoke   Spoke
	changed chan struct{} // closed when the spoke changes
}

func newAdvertisement(s Spoke) *advertisement {
	return &advertisement{spoke: s, changed: make(chan struct{})}
}

func (a *advertisement) set(s Spoke) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.spoke == s {
		return
	}
	a.spoke = s
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *advertisement) get() (s Spoke, changed <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.spoke, a.changed
}

// server is the gRPC server of one plugin on one socket, from serve to stop.
type server struct {
	pluginapi.UnimplementedDevicePluginServer
	advertised  *advertisement
	grpc        *grpc.Server
	listener    *listener
	socket      socketID
	stopping    chan struct{} // closed when streams have to end
	stopped     chan struct{} // closed when the server accepts no more connections
	streamEnded notify.Flag   // kubelet ended a ListAndWatch
}

// serve listens on path, where it replaces a socket of an earlier server, and serves the advertised devices.
func serve(path string, advertised *advertisement) (*server, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove old device plugin socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for kubelet: %w", err)
	}
	socket, err := statSocket(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("device plugin socket was removed as soon as it was made: %w", err),
			l.Close())
	}
	s := &server{
		advertised:  advertised,
		listener:    &listener{Listener: l},
		socket:      socket,
		stopping:    make(chan struct{}),
		stopped:     make(chan struct{}),
		streamEnded: notify.New(),
		grpc: grpc.NewServer(
			// A spoke exchanges a few small messages; the default buffers of 32 KiB would be most of its memory.
			grpc.ReadBufferSize(0),
			grpc.WriteBufferSize(1<<10),
			// The kernel always reports the end of a unix socket, so keepalive probes are not needed.
			grpc.KeepaliveParams(keepalive.ServerParameters{Time: math.MaxInt64}),
		),
	}
	pluginapi.RegisterDevicePluginServer(s.grpc, s)
	go func() {
		defer close(s.stopped)
		_ = s.grpc.Serve(s.listener) // it returns an error when stop closes the listener
	}()
	return s, nil
}

// stop ends the streams, waits until kubelet has closed its connections, and stops the server. The resource must not
// be registered again before that: when a stream ends, kubelet looks up its client by resource name, and would drop a
// client that registered in between (runClient in pkg/kubelet/cm/devicemanager/plugin/v1beta1/server.go, 1.36).
// Kubelet closes the connection as the last step but one of forgetting the client.
func (s *server) stop() {
	_ = s.listener.Close() // it also removes the socket; an error means that it is closed already
	<-s.stopped
	close(s.stopping)
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.listener.open.Wait()
	}()
	timeout := time.NewTimer(stopTimeout)
	defer timeout.Stop()
	select {
	case <-closed:
	case <-timeout.C:
	}
	s.grpc.Stop()
}

// GetDevicePluginOptions makes kubelet call GetPreferredAllocation. It does so for a single spoke as well, because
// that can become a pool and kubelet reads the options only when it connects (PluginConnected in
// pkg/kubelet/cm/devicemanager/manager.go).
func (s *server) GetDevicePluginOptions(context.Context, *pluginapi.Empty) (*pluginapi.DevicePluginOptions, error) {
	return &pluginapi.DevicePluginOptions{GetPreferredAllocationAvailable: true}, nil
}

// GetPreferredAllocation chooses the ports with the lowest numbers. The ports that a pool loses when it is made
// smaller are then most likely free.
func (s *server) GetPreferredAllocation(
	_ context.Context, request *pluginapi.PreferredAllocationRequest,
) (*pluginapi.PreferredAllocationResponse, error) {
	spoke, _ := s.advertised.get()
	response := &pluginapi.PreferredAllocationResponse{}
	for _, container := range request.GetContainerRequests() {
		response.ContainerResponses = append(response.ContainerResponses,
			&pluginapi.ContainerPreferredAllocationResponse{DeviceIDs: preferred(spoke, container)})
	}
	return response, nil
}

func preferred(spoke Spoke, container *pluginapi.ContainerPreferredAllocationRequest) []string {
	ids := slices.Clone(container.GetMustIncludeDeviceIDs())
	for _, id := range spoke.devices() {
		if len(ids) >= int(container.GetAllocationSize()) {
			break
		}
		if slices.Contains(container.GetAvailableDeviceIDs(), id) && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// ListAndWatch sends the devices at first, and again only when they or their health change: kubelet rewrites its
// whole checkpoint for each message (writeCheckpoint in pkg/kubelet/cm/devicemanager/manager.go). A spoke has one
// device, with its name; a pool has one for each port.
func (s *server) ListAndWatch(
	_ *pluginapi.Empty, stream grpc.ServerStreamingServer[pluginapi.ListAndWatchResponse],
) error {
	var sent Spoke
	for {
		spoke, changed := s.advertised.get()
		if spoke != sent {
			if err := stream.Send(&pluginapi.ListAndWatchResponse{Devices: listDevices(spoke)}); err != nil {
				return err
			}
			sent = spoke
		}
		select {
		case <-changed:
		case <-s.stopping:
			return nil
		case <-stream.Context().Done():
			s.streamEnded.Set()
			return nil
		}
	}
}

func listDevices(spoke Spoke) []*pluginapi.Device {
	health := pluginapi.Unhealthy
	if spoke.Healthy {
		health = pluginapi.Healthy
	}
	var devices []*pluginapi.Device
	for _, id := range spoke.devices() {
		devices = append(devices, &pluginapi.Device{ID: id, Health: health})
	}
	return devices
}

// Allocate confirms healthy devices, and returns their CDI names. The CNI plugin writes the CDI files when it
// attaches the pod: they have a tap, or only environment variables. Allocate builds nothing and waits for nothing,
// because kubelet calls it with its allocation lock held.
func (s *server) Allocate(_ context.Context, request *pluginapi.AllocateRequest) (*pluginapi.AllocateResponse, error) {
	spoke, _ := s.advertised.get()
	devices := spoke.devices()
	response := &pluginapi.AllocateResponse{}
	for _, container := range request.GetContainerRequests() {
		allocated := &pluginapi.ContainerAllocateResponse{}
		for _, id := range container.GetDevicesIds() {
			switch {
			case !slices.Contains(devices, id) && spoke.Ports > 0:
				return nil, status.Errorf(codes.NotFound, "pool %q has the ports %s to %s; kubelet asked for %q: "+
					"was the pool made smaller? Create the pod again",
					spoke.Name, devices[0], devices[len(devices)-1], id)
			case !slices.Contains(devices, id):
				return nil, status.Errorf(codes.NotFound,
					"spoke %q has one device, with the name of the spoke; kubelet asked for %q", spoke.Name, id)
			case !spoke.Healthy:
				return nil, status.Errorf(codes.Unavailable,
					"spoke %q is not ready on this node; see kubectl get lannodes "+
						"-o yaml for the cause, and create the pod again when the spoke is ready", id)
			}
			allocated.CdiDevices = append(allocated.CdiDevices, &pluginapi.CDIDevice{Name: cdi.Name(id)})
		}
		response.ContainerResponses = append(response.ContainerResponses, allocated)
	}
	return response, nil
}

// listener counts the open connections.
type listener struct {
	net.Listener
	open sync.WaitGroup
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.open.Add(1)
	return &conn{Conn: c, closed: sync.OnceFunc(l.open.Done)}, nil
}

type conn struct {
	net.Conn
	closed func()
}

func (c *conn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}
