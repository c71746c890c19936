package deviceplugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"github.com/k8slan/k8slan/lanmgr/cdi"
)

// endTimeout is how long an ended server waits for kubelet to close its connections.
const endTimeout = 5 * time.Second

// device is the one device of a spoke's resource; its ID is the spoke's name.
type device struct {
	id string

	mu      sync.Mutex
	healthy bool
	changed chan struct{} // closed when healthy changes
}

func newDevice(id string, healthy bool) *device {
	return &device{id: id, healthy: healthy, changed: make(chan struct{})}
}

func (d *device) set(healthy bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.healthy == healthy {
		return
	}
	d.healthy = healthy
	close(d.changed)
	d.changed = make(chan struct{})
}

func (d *device) get() (healthy bool, changed <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.healthy, d.changed
}

// server is one gRPC server of a device on one socket, from serve to end.
type server struct {
	pluginapi.UnimplementedDevicePluginServer
	device   *device
	grpc     *grpc.Server
	listener *listener
	socket   socketID
	ending   chan struct{} // closed: streams end
	served   chan struct{} // closed when no connection is accepted any more
	hungUp   chan struct{} // one slot: the other side ended a ListAndWatch
}

// serve listens on path, in place of any socket an earlier server left there, and serves the device.
func serve(path string, d *device) (*server, error) {
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
		device:   d,
		listener: &listener{Listener: l},
		socket:   socket,
		ending:   make(chan struct{}),
		served:   make(chan struct{}),
		hungUp:   make(chan struct{}, 1),
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
		defer close(s.served)
		_ = s.grpc.Serve(s.listener) // it ends with an error when end closes the listener
	}()
	return s, nil
}

// end ends the streams, waits until kubelet has closed its connections, and stops the server. Only then may the
// resource be registered again: kubelet looks a client up by resource name when a stream of it ends, so a new
// client registered before that would be dropped (runClient in pkg/kubelet/cm/devicemanager/plugin/v1beta1/server.go, 1.36).
// Kubelet closes the connection as the last step but one of forgetting the client.
func (s *server) end() {
	_ = s.listener.Close() // removes the socket, too; an error means that it is closed already
	<-s.served
	close(s.ending)
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.listener.open.Wait()
	}()
	timeout := time.NewTimer(endTimeout)
	defer timeout.Stop()
	select {
	case <-closed:
	case <-timeout.C:
	}
	s.grpc.Stop()
}

// GetDevicePluginOptions says that none of the optional calls is needed.
func (s *server) GetDevicePluginOptions(context.Context, *pluginapi.Empty) (*pluginapi.DevicePluginOptions, error) {
	return &pluginapi.DevicePluginOptions{}, nil
}

// ListAndWatch sends the device now and whenever its health changes, and never else: kubelet rewrites its whole
// checkpoint with each message (writeCheckpoint in pkg/kubelet/cm/devicemanager/manager.go).
func (s *server) ListAndWatch(_ *pluginapi.Empty, stream grpc.ServerStreamingServer[pluginapi.ListAndWatchResponse]) error {
	sent := ""
	for {
		healthy, changed := s.device.get()
		health := pluginapi.Unhealthy
		if healthy {
			health = pluginapi.Healthy
		}
		if health != sent {
			devices := []*pluginapi.Device{{ID: s.device.id, Health: health}}
			if err := stream.Send(&pluginapi.ListAndWatchResponse{Devices: devices}); err != nil {
				return err
			}
			sent = health
		}
		select {
		case <-changed:
		case <-s.ending:
			return nil
		case <-stream.Context().Done():
			select {
			case s.hungUp <- struct{}{}:
			default:
			}
			return nil
		}
	}
}

// Allocate confirms the device if it is healthy, with its CDI name: what that means for the container, a tap or
// nothing but a variable, is written when the pod is attached. It builds nothing and waits for nothing, because
// kubelet calls it with its allocation lock held.
func (s *server) Allocate(_ context.Context, request *pluginapi.AllocateRequest) (*pluginapi.AllocateResponse, error) {
	healthy, _ := s.device.get()
	response := &pluginapi.AllocateResponse{}
	for _, container := range request.GetContainerRequests() {
		answer := &pluginapi.ContainerAllocateResponse{}
		for _, id := range container.GetDevicesIds() {
			if id != s.device.id {
				return nil, status.Errorf(codes.NotFound, "spoke %q has one device, named like the spoke; kubelet asked for %q", s.device.id, id)
			}
			if !healthy {
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
