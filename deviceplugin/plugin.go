package deviceplugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/notify"
	"github.com/k8slan/k8slan/lanmgr/retry"
)

const kubeletSocket = "kubelet.sock"

// backoff is the delay between attempts: at first 25 to 50 ms, at most 5 to 10 s. The jitter keeps a thousand spokes
// from retrying at the same moment.
var backoff = wait.Backoff{Duration: 25 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 64, Cap: 5 * time.Second}

// stableAfter is how long a plugin has to run until its next failure counts as the first.
const stableAfter = 10 * time.Second

var errStreamEnded = errors.New("kubelet ended its connection to the device plugin")

// Sockets is the pattern of the file names of all spokes' sockets.
const Sockets = "k8slan-*.sock"

// socketOf returns the file name of a spoke's socket.
func socketOf(spoke string) string { return "k8slan-" + spoke + ".sock" }

// spokeOf is the inverse of socketOf.
func spokeOf(socket string) (string, bool) {
	rest, hasPrefix := strings.CutPrefix(socket, "k8slan-")
	spoke, hasSuffix := strings.CutSuffix(rest, ".sock")
	return spoke, hasPrefix && hasSuffix
}

// plugin is the device plugin of one spoke or pool. It serves its socket and registers with each kubelet until its
// context ends.
type plugin struct {
	name       string
	socket     string // path of the plugin's own socket
	kubelet    *registrar
	advertised *advertisement
	log        *slog.Logger
	cancel     context.CancelFunc
	dirChanged notify.Flag // the plugin directory changed: check the sockets
	registered atomic.Bool
}

func newPlugin(dir string, spoke Spoke, kubelet *registrar, log *slog.Logger) *plugin {
	return &plugin{
		name:       spoke.Name,
		socket:     filepath.Join(dir, socketOf(spoke.Name)),
		kubelet:    kubelet,
		advertised: newAdvertisement(spoke),
		log:        log,
		dirChanged: notify.New(),
	}
}

// run repeats runOnce until ctx ends. It logs a failure that differs from the last one.
func (p *plugin) run(ctx context.Context) {
	timer := retry.NewTimer(backoff)
	defer timer.Stop()
	for ctx.Err() == nil {
		kubelet, err := p.awaitKubelet(ctx)
		if err == nil {
			start := time.Now()
			err = p.runOnce(ctx, kubelet)
			if time.Since(start) > stableAfter {
				timer.Succeeded()
			}
		}
		if err == nil || ctx.Err() != nil {
			continue
		}
		if timer.Failed(err) {
			p.log.Log(ctx, level(err), "spoke not registered with kubelet, trying again", "err", err)
		}
		p.awaitRetry(ctx, timer.C, kubelet)
	}
}

// level returns the log level of a failure. A kubelet that ends its connections is probably restarting, which dispatch
// logs once for all spokes.
func level(err error) slog.Level {
	if errors.Is(err, errStreamEnded) {
		return slog.LevelDebug
	}
	return slog.LevelWarn
}

// runOnce serves the socket, registers with the given kubelet and watches both sockets. It returns nil if it has to be
// repeated with another kubelet or another socket, or if ctx ends.
func (p *plugin) runOnce(ctx context.Context, kubelet socketID) error {
	// A kubelet that starts removes all sockets here before it makes its own (server.Start in
	// pkg/kubelet/cm/devicemanager/plugin/v1beta1/server.go). If the plugin made its socket while that of the dead
	// kubelet is still here, the new kubelet could remove it between registration and its own call, and would then
	// wait 10 s.
	if err := p.kubelet.dial(); err != nil {
		return err
	}
	server, err := serve(p.socket, p.advertised)
	if err != nil {
		return err
	}
	defer server.stop()
	err = p.kubelet.register(ctx, &pluginapi.RegisterRequest{
		Version:      pluginapi.Version,
		Endpoint:     filepath.Base(p.socket),
		ResourceName: v1beta1.Resource(p.name),
	})
	if err != nil {
		return err
	}
	p.registered.Store(true)
	defer p.registered.Store(false)
	p.log.Info("spoke registered with kubelet")
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-server.streamEnded:
			return errStreamEnded
		case <-server.stopped:
			return fmt.Errorf("device plugin socket %s stopped accepting connections", p.socket)
		case <-p.dirChanged:
			if outdated, err := p.outdated(server, kubelet); outdated || err != nil {
				return err
			}
		}
	}
}

// outdated reports whether the kubelet differs from the registered one, or the plugin's own socket was removed or
// replaced. It returns false while there is no kubelet: open connections stay open.
func (p *plugin) outdated(server *server, registered socketID) (bool, error) {
	kubelet, err := statSocket(p.kubelet.socket)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	own, err := statSocket(p.socket)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return !kubelet.same(registered) || !own.same(server.socket), nil
}

// awaitKubelet waits until kubelet's registration socket exists.
func (p *plugin) awaitKubelet(ctx context.Context) (socketID, error) {
	for {
		kubelet, err := statSocket(p.kubelet.socket)
		if !errors.Is(err, fs.ErrNotExist) {
			return kubelet, err
		}
		select {
		case <-ctx.Done():
			return socketID{}, ctx.Err()
		case <-p.dirChanged:
		}
	}
}

// awaitRetry waits until the retry is due, or until there is another kubelet than the one that failed.
func (p *plugin) awaitRetry(ctx context.Context, due <-chan time.Time, failed socketID) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-due:
			return
		case <-p.dirChanged:
			if kubelet, err := statSocket(p.kubelet.socket); err == nil && !kubelet.same(failed) {
				return
			}
		}
	}
}

// socketID distinguishes a socket file from a later one of the same name. The zero value is no socket.
type socketID struct{ info os.FileInfo }

func statSocket(path string) (socketID, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return socketID{}, err
	}
	return socketID{info}, nil
}

// same compares the inodes and, because inodes are reused, the times of creation.
func (a socketID) same(b socketID) bool {
	if a.info == nil || b.info == nil {
		return a.info == b.info
	}
	return os.SameFile(a.info, b.info) && a.info.ModTime().Equal(b.info.ModTime())
}
