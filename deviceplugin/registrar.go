package deviceplugin

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const (
	// registrationsAtOnce keeps a thousand spokes from calling kubelet all at one time.
	registrationsAtOnce = 16
	// registerTimeout is longer than kubelet waits for the plugin that it dials while it registers it: 10 s
	// (dial in pkg/kubelet/cm/devicemanager/plugin/v1beta1/client.go).
	registerTimeout = 15 * time.Second
)

// registrar registers plugins with kubelet. Registrations at one time share a connection; none is kept at rest.
type registrar struct {
	onRegistration func(error) // hears how each registration ended; nil: nobody does
	socket         string      // path of kubelet's registration socket
	slots          chan struct{}

	mu     sync.Mutex
	shared *sharedConn // nil when nobody registers
}

// sharedConn is a connection to kubelet and how many registrations use it.
type sharedConn struct {
	conn  *grpc.ClientConn
	users int
}

func newRegistrar(socket string) *registrar {
	return &registrar{socket: socket, slots: make(chan struct{}, registrationsAtOnce)}
}

// register returns when kubelet has connected to the plugin's socket and accepted its resource.
func (r *registrar) register(ctx context.Context, request *pluginapi.RegisterRequest) error {
	select {
	case r.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-r.slots }()

	l, err := r.connect()
	if err != nil {
		return fmt.Errorf("connect to kubelet at %s: %w", r.socket, err)
	}
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	_, err = pluginapi.NewRegistrationClient(l.conn).Register(ctx, request)
	r.disconnect(l, err != nil)
	if r.onRegistration != nil {
		r.onRegistration(err)
	}
	if err != nil {
		return fmt.Errorf("register %s with kubelet at %s: %w", request.GetResourceName(), r.socket, err)
	}
	return nil
}

// dial is nil if a kubelet takes connections.
func (r *registrar) dial() error {
	conn, err := net.Dial("unix", r.socket)
	if err != nil {
		return fmt.Errorf("connect to kubelet: %w", err)
	}
	return conn.Close()
}

func (r *registrar) connect() (*sharedConn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.shared == nil {
		conn, err := grpc.NewClient("unix:"+r.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, err
		}
		r.shared = &sharedConn{conn: conn}
	}
	r.shared.users++
	return r.shared, nil
}

// disconnect closes the connection with its last user. A failed one is not given to new users.
func (r *registrar) disconnect(l *sharedConn, failed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l.users--
	if r.shared == l && (failed || l.users == 0) {
		r.shared = nil
	}
	if l.users == 0 {
		_ = l.conn.Close() // it only fails when closed before
	}
}
