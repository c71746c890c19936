package deviceplugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

const (
	kubeletSocket = "kubelet.sock"

	firstDelay = 50 * time.Millisecond // before trying again after a failure, doubled with each
	maxDelay   = 10 * time.Second
)

var errStreamEnded = errors.New("kubelet ended its connection to the device plugin")

// socketOf is the file name of a spoke's socket.
func socketOf(spoke string) string { return "k8slan-" + spoke + ".sock" }

// Sockets is the pattern of the names of all spokes' sockets.
const Sockets = "k8slan-*.sock"

// spokeOf is the inverse of socketOf.
func spokeOf(socket string) (string, bool) {
	rest, ours := strings.CutPrefix(socket, "k8slan-")
	spoke, ok := strings.CutSuffix(rest, ".sock")
	return spoke, ours && ok
}

// plugin is the device plugin of one spoke or pool. It has its own life: it serves and registers, for as long as it
// takes and as often as kubelet needs it, until its context ends.
type plugin struct {
	name       string
	socket     string // path of the plugin's own socket
	kubelet    *registrar
	advertised *advertisement
	log        *slog.Logger
	cancel     context.CancelFunc
	dirChanged chan struct{} // one slot: something happened in the plugin directory, look again
	registered atomic.Bool
}

func newPlugin(dir string, offered Spoke, kubelet *registrar, log *slog.Logger) *plugin {
	return &plugin{
		name:       offered.Name,
		socket:     filepath.Join(dir, socketOf(offered.Name)),
		kubelet:    kubelet,
		advertised: newAdvertisement(offered),
		log:        log,
		dirChanged: make(chan struct{}, 1),
	}
}

func (s *plugin) notify() {
	select {
	case s.dirChanged <- struct{}{}:
	default:
	}
}

// run repeats runOnce until ctx ends. A failure is logged when it is news.
func (s *plugin) run(ctx context.Context) {
	delay, last := firstDelay, ""
	for ctx.Err() == nil {
		kubelet, err := s.awaitKubelet(ctx)
		if err == nil {
			start := time.Now()
			err = s.runOnce(ctx, kubelet)
			if time.Since(start) > maxDelay {
				delay, last = firstDelay, "" // it went well for long: this is a new trouble
			}
		}
		if err == nil || ctx.Err() != nil {
			continue
		}
		if err.Error() != last {
			last = err.Error()
			s.log.Log(ctx, level(err), "spoke not registered with kubelet, trying again", "err", err)
		}
		s.backOff(ctx, kubelet, delay)
		delay = min(2*delay, maxDelay)
	}
}

// level: a kubelet that hangs up is most likely restarting, and dispatch says so once for all spokes.
func level(err error) slog.Level {
	if errors.Is(err, errStreamEnded) {
		return slog.LevelDebug
	}
	return slog.LevelWarn
}

// runOnce serves, registers with the kubelet that is there, and watches both sockets. It returns nil when all that
// is to be done again with another kubelet or another socket, or when ctx ends.
func (s *plugin) runOnce(ctx context.Context, kubelet socketID) error {
	// A kubelet that starts removes all sockets here before it makes its own (server.Start in
	// pkg/kubelet/cm/devicemanager/plugin/v1beta1/server.go). One that is made while the dead one's socket is still there could be removed
	// between its registration and kubelet's call, for which kubelet would wait 10 s.
	if err := s.kubelet.dial(); err != nil {
		return err
	}
	server, err := serve(s.socket, s.advertised)
	if err != nil {
		return err
	}
	defer server.stop()
	err = s.kubelet.register(ctx, &pluginapi.RegisterRequest{
		Version:      pluginapi.Version,
		Endpoint:     filepath.Base(s.socket),
		ResourceName: v1beta1.Resource(s.name),
	})
	if err != nil {
		return err
	}
	s.registered.Store(true)
	defer s.registered.Store(false)
	s.log.Info("spoke registered with kubelet")
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-server.streamEnded:
			return errStreamEnded
		case <-server.stopped:
			return fmt.Errorf("device plugin socket %s stopped accepting connections", s.socket)
		case <-s.dirChanged:
			if again, err := s.outdated(server, kubelet); again || err != nil {
				return err
			}
		}
	}
}

// outdated reports whether another kubelet is there than the one registered with, or kubelet could not reach the
// server any more. Without a kubelet nothing is outdated: what is connected stays connected.
func (s *plugin) outdated(server *server, registered socketID) (bool, error) {
	kubelet, err := statSocket(s.kubelet.socket)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	own, err := statSocket(s.socket)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return !kubelet.same(registered) || !own.same(server.socket), nil
}

// awaitKubelet waits until kubelet's registration socket exists.
func (s *plugin) awaitKubelet(ctx context.Context) (socketID, error) {
	for {
		kubelet, err := statSocket(s.kubelet.socket)
		if !errors.Is(err, fs.ErrNotExist) {
			return kubelet, err
		}
		select {
		case <-ctx.Done():
			return socketID{}, ctx.Err()
		case <-s.dirChanged:
		}
	}
}

// backOff waits for about delay, or until another kubelet is there.
func (s *plugin) backOff(ctx context.Context, failed socketID, delay time.Duration) {
	timer := time.NewTimer(delay/2 + rand.N(delay/2)) // a thousand spokes don't try in step
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			return
		case <-s.dirChanged:
			if kubelet, err := statSocket(s.kubelet.socket); err == nil && !kubelet.same(failed) {
				return
			}
		}
	}
}

// socketID tells a socket file from a later one of the same name. The zero value is no socket.
type socketID struct{ info os.FileInfo }

func statSocket(path string) (socketID, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return socketID{}, err
	}
	return socketID{info}, nil
}

// same compares the inode, and the time of creation because inodes are used again.
func (a socketID) same(b socketID) bool {
	if a.info == nil || b.info == nil {
		return a.info == b.info
	}
	return os.SameFile(a.info, b.info) && a.info.ModTime().Equal(b.info.ModTime())
}
