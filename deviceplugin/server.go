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
)

// stopTimeout is how long an ended server waits for kubelet to close its connections.
const stopTimeout = 5 * time.Second

// advertisement is what is offered at the moment.
type advertisement struct {
	mu      sync.Mutex
	spoke   Spoke
	changed chan struct{} // closed when the spoke changes
}

func newAdvertisement(s Spoke) *advertisement {
	return &advertisement{spoke: s, changed: make(chan struct{})}
}

func (o *advertisement) set(s Spoke) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.spoke == s {
		return
	}
	o.spoke = s
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *advertisement) get() (s Spoke, changed <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.spoke, o.changed
}

// server is one gRPC server of an offer on one socket, from serve to end.
type server struct {
	pluginapi.UnimplementedDevicePluginServer
	advertised  *advertisement
	grpc        *grpc.Server
	listener    *listener
	socket      socketID
	stopping    chan struct{} // closed: streams end
	stopped     chan struct{} // closed when no connection is accepted any more
	streamEnded chan struct{} // one slot: the other side ended a ListAndWatch
}

// serve listens on path, in place of any socket an earlier server left there, and serves the offer.
func serve(path string, o *advertisement) (*server, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove old device plugin socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for kubelet: %w", err)
	}
	socket, err := statSocket(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("device plugin socket vanished while it was made: %w", err), l.Close())
	}
	s := &server{
		advertised:  o,
		listener:    &listener{Listener: l},
		socket:      socket,
		stopping:    make(chan struct{}),
		stopped:     make(chan struct{}),
		streamEnded: make(chan struct{}, 1),
		grpc: grpc.NewServer(
			// A spoke's whole traffic is a few small messages: buffers of the default 32 KiB would be most of its memory.
			grpc.ReadBufferSize(0),
			grpc.WriteBufferSize(1<<10),
			// The end of a unix socket is always seen: no probing in rest.
			grpc.KeepaliveParams(keepalive.ServerParameters{Time: math.MaxInt64}),
		),
	}
	pluginapi.RegisterDevicePluginServer(s.grpc, s)
	go func() {
		defer close(s.stopped)
		_ = s.grpc.Serve(s.listener) // it ends with an error when end closes the listener
	}()
	return s, nil
}

// stop ends the streams, waits until kubelet has closed its connections, and stops the server. Only then may the
// resource be registered again: kubelet looks a client up by resource name when a stream of it ends, so a new
// client registered before that would be dropped (runClient in pkg/kubelet/cm/devicemanager/plugin/v1beta1/server.go, 1.36).
// Kubelet closes the connection as the last step but one of forgetting the client.
func (s *server) stop() {
	_ = s.listener.Close() // removes the socket, too; an error means that it is closed already
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

// GetDevicePluginOptions says that kubelet shall ask which of a pool's ports to take. It says so for a single spoke as well, which may
// become a pool: kubelet asks for options only as it connects (PluginConnected in pkg/kubelet/cm/devicemanager/manager.go).
func (s *server) GetDevicePluginOptions(context.Context, *pluginapi.Empty) (*pluginapi.DevicePluginOptions, error) {
	return &pluginapi.DevicePluginOptions{GetPreferredAllocationAvailable: true}, nil
}

// GetPreferredAllocation takes the ports of the lowest numbers: a pool that is made smaller then loses those first that
// nobody has.
func (s *server) GetPreferredAllocation(_ context.Context, request *pluginapi.PreferredAllocationRequest) (*pluginapi.PreferredAllocationResponse, error) {
	offered, _ := s.advertised.get()
	response := &pluginapi.PreferredAllocationResponse{}
	for _, container := range request.GetContainerRequests() {
		take := slices.Clone(container.GetMustIncludeDeviceIDs())
		for _, id := range offered.devices() {
			if len(take) < int(container.GetAllocationSize()) && slices.Contains(container.GetAvailableDeviceIDs(), id) && !slices.Contains(take, id) {
				take = append(take, id)
			}
		}
		response.ContainerResponses = append(response.ContainerResponses, &pluginapi.ContainerPreferredAllocationResponse{DeviceIDs: take})
	}
	return response, nil
}

// ListAndWatch sends the devices now and whenever they or their health change, and never else: kubelet rewrites its whole
// checkpoint with each message (writeCheckpoint in pkg/kubelet/cm/devicemanager/manager.go). A spoke has one device of its
// name, a pool one for each port.
func (s *server) ListAndWatch(_ *pluginapi.Empty, stream grpc.ServerStreamingServer[pluginapi.ListAndWatchResponse]) error {
	var sent Spoke
	for {
		offered, changed := s.advertised.get()
		if offered != sent {
			if err := stream.Send(&pluginapi.ListAndWatchResponse{Devices: listDevices(offered)}); err != nil {
				return err
			}
			sent = offered
		}
		select {
		case <-changed:
		case <-s.stopping:
			return nil
		case <-stream.Context().Done():
			select {
			case s.streamEnded <- struct{}{}:
			default:
			}
			return nil
		}
	}
}

func listDevices(offered Spoke) []*pluginapi.Device {
	health := pluginapi.Unhealthy
	if offered.Healthy {
		health = pluginapi.Healthy
	}
	var devices []*pluginapi.Device
	for _, id := range offered.devices() {
		devices = append(devices, &pluginapi.Device{ID: id, Health: health})
	}
	return devices
}

// Allocate confirms the devices if they are healthy, with their CDI names: what those mean for the container, a tap or
// nothing but a variable, is written when the pod is attached. It builds nothing and waits for nothing, because
// kubelet calls it with its allocation lock held.
func (s *server) Allocate(_ context.Context, request *pluginapi.AllocateRequest) (*pluginapi.AllocateResponse, error) {
	offered, _ := s.advertised.get()
	devices := offered.devices()
	response := &pluginapi.AllocateResponse{}
	for _, container := range request.GetContainerRequests() {
		answer := &pluginapi.ContainerAllocateResponse{}
		for _, id := range container.GetDevicesIds() {
			switch {
			case !slices.Contains(devices, id) && offered.Ports > 0:
				return nil, status.Errorf(codes.NotFound, "pool %q has the ports %s to %s; kubelet asked for %q: was the pool made smaller? Create the pod again",
					offered.Name, devices[0], devices[len(devices)-1], id)
			case !slices.Contains(devices, id):
				return nil, status.Errorf(codes.NotFound, "spoke %q has one device, named like the spoke; kubelet asked for %q", offered.Name, id)
			case !offered.Healthy:
				return nil, status.Errorf(codes.Unavailable,
					"spoke %q is not ready on this node; kubectl get lannodes -o yaml says why, create the pod again when it is", id)
			}
			answer.CdiDevices = append(answer.CdiDevices, &pluginapi.CDIDevice{Name: cdi.Name(id)})
		}
		response.ContainerResponses = append(response.ContainerResponses, answer)
	}
	return response, nil
}

// listener counts the connections that are open.
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
