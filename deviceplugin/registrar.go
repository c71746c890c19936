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
	// maxRegistrations limits the registrations at one time, so that a thousand spokes do not call kubelet all at once.
	maxRegistrations = 16
	// registerTimeout is longer than kubelet waits for a plugin to which it connects during registration: 10 s
	// (dial in pkg/kubelet/cm/devicemanager/plugin/v1beta1/client.go).
	registerTimeout = 15 * time.Second
)

// registrar registers plugins with kubelet. Registrations at one time share a connection; the last one closes it.
type registrar struct {
	onRegistration func(error) // receives the result of each registration; nil: none
	socket         string      // path of kubelet's registration socket
	slots          chan struct{}

	mu     sync.Mutex
	shared *sharedConn // nil while no registration runs
}

// sharedConn is a connection to kubelet and the number of registrations that use it.
type sharedConn struct {
	conn  *grpc.ClientConn
	users int
}

func newRegistrar(socket string) *registrar {
	return &registrar{socket: socket, slots: make(chan struct{}, maxRegistrations)}
}

// register returns when kubelet has connected to the plugin's socket and accepted its resource.
func (r *registrar) register(ctx context.Context, request *pluginapi.RegisterRequest) error {
	select {
	case r.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-r.slots }()

	shared, err := r.connect()
	if err != nil {
		return fmt.Errorf("connect to kubelet at %s: %w", r.socket, err)
	}
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	_, err = pluginapi.NewRegistrationClient(shared.conn).Register(ctx, request)
	r.disconnect(shared, err != nil)
	if r.onRegistration != nil {
		r.onRegistration(err)
	}
	if err != nil {
		return fmt.Errorf("register %s with kubelet at %s: %w", request.GetResourceName(), r.socket, err)
	}
	return nil
}

// dial returns an error if no kubelet accepts connections.
func (r *registrar) dial() error {
	conn, err := net.Dial("unix", r.socket)
	if err != nil {
		return fmt.Errorf("connect to kubelet: %w", err)
	}
	return conn.Close()
}

// connect returns the shared connection, and opens it for its first user.
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

// disconnect closes the connection after its last user. New users do not get a connection that failed.
func (r *registrar) disconnect(shared *sharedConn, failed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	shared.users--
	if r.shared == shared && (failed || shared.users == 0) {
		r.shared = nil
	}
	if shared.users == 0 {
		_ = shared.conn.Close() // it fails only if it is closed already
	}
}
