package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/cni/report/receiver"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/netlab"
)

// node is a node that k8slan reconciles.
type node struct {
	*netlab.Node
	kernel *kernel.Node
	device int // ifindex of the underlay device
}

func addNode(t *testing.T, u *netlab.Underlay, name string) node {
	t.Helper()
	n := u.Join(t, name)
	device, err := n.Netlink(t).LinkByName(netlab.UnderlayDevice)
	must(t, err)
	k := kernel.New(kernel.Paths{Run: n.Run, HostNetns: n.Path})
	t.Cleanup(k.Close)
	return node{Node: n, kernel: k, device: device.Attrs().Index}
}

// reconcile builds LANs as the daemon does.
func (n node) reconcile(t *testing.T, lans ...segment.Segment) {
	t.Helper()
	for _, s := range lans {
		diff := func(have segment.State) []segment.Op { return segment.Diff(s, have) }
		_, err := n.kernel.Reconcile(t.Context(), s.Netns, diff)
		must(t, err)
	}
}

func sandbox(t *testing.T) netlab.Sandbox {
	t.Helper()
	s, err := netlab.NewSandbox()
	must(t, err)
	t.Cleanup(func() {
		if err := s.Remove(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// claimRequest is the claim of a pod on a spoke.
func claimRequest(netns, spoke string, pod netlab.Sandbox) kernel.ClaimRequest {
	return kernel.ClaimRequest{
		Netns: netns, Spoke: spoke, Kind: segment.Veth,
		Sandbox: pod.ID, Interface: pod.Interface, PodNetns: pod.Path,
		PodNamespace: "default", Pod: pod.ID, PodUID: pod.ID,
	}
}

// addTime measures B1 and B2: how long an ADD takes from the start to the end of its process, of k8slan and of others.
func addTime(t *testing.T, b *bench) {
	n := addNode(t, netlab.NewUnderlay(t, netlab.UnderlayMTU), "worker1")
	lan := netlab.LAN(1, n.device, "pod", "vm", "other")
	n.reconcile(t, lan)
	listenForReports(t, n.Run)
	k8slan, err := netlab.BuildPlugin(t.Context(), filepath.Join(t.TempDir(), "k8slan-cni"), n.Node)
	must(t, err)
	peers, err := netlab.Component(t.Context(), "cni")
	must(t, err)
	peer := func(name string) netlab.Plugin {
		return netlab.Plugin{Path: filepath.Join(peers, name), Dirs: peers, Node: n.Namespace}
	}
	peerConfig := func(name string) netlab.Config {
		return netlab.Config{"cniVersion": "1.1.0", "name": name, "type": name}
	}
	// The LAN is in use, so that its VXLAN is up, as it is for all pods but a LAN's first.
	_, err = k8slan.Call(t.Context(), "ADD", sandbox(t), netlab.Network(lan, "other", segment.Veth))
	must(t, err)

	spare := netlink.NewLinkAttrs() // for the plugin that moves a link, and moves it back at DEL
	spare.Name = "spare"
	must(t, n.Netlink(t).LinkAdd(&netlink.Veth{LinkAttrs: spare, PeerName: "spare-peer"}))

	adds := func(p netlab.Plugin, c netlab.Config) func() (float64, error) {
		s := sandbox(t)
		return func() (float64, error) { return attachOnce(t.Context(), p, s, c) }
	}
	nowhere := netlab.Network(lan, "pod", segment.Veth).With("ns", "nowhere")
	parse := sandbox(t)
	got := race(t, times(200, 2),
		contender{"parse", func() (float64, error) { return refusedOnce(t.Context(), k8slan, parse, nowhere) }},
		contender{"pod", adds(k8slan, netlab.Network(lan, "pod", segment.Veth))},
		contender{"vm", adds(k8slan, netlab.Network(lan, "vm", segment.Macvtap))},
		contender{"bridge", adds(peer("bridge"), peerConfig("bridge").With("bridge", "cni0"))},
		contender{"macvlan", adds(peer("macvlan"), peerConfig("macvlan").With("master", netlab.UnderlayDevice))},
		contender{"host-device", adds(peer("host-device"), peerConfig("host-device").With("device", "spare"))},
	)
	ratio := func(id, what, ours, theirs string, target float64) {
		b.atMost(id, what, got[ours].over(got[theirs]).median(), target, figures("ms", got[ours], got[theirs]))
	}
	ratio("B1", "CNI ADD of a pod / the plugin only parsing", "pod", "parse", 1.6)
	ratio("B1-vm", "CNI ADD of a VM / the plugin only parsing", "vm", "parse", 1.8)
	ratio("B2", "CNI ADD of a pod / reference plugin bridge", "pod", "bridge", 0.6)
	ratio("B2-macvlan", "CNI ADD of a VM / reference plugin macvlan", "vm", "macvlan", 0.7)
	ratio("B2-host-device", "CNI ADD of a pod / reference plugin host-device", "pod", "host-device", 0.1)
}

// listenForReports receives the plugin's reports, as the daemon does.
func listenForReports(t *testing.T, run string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		receiver.Run(ctx, run, slog.New(slog.NewTextHandler(t.Output(), nil)), func(report.Outcome) {})
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
}

// attachOnce attaches and detaches, and returns how many milliseconds the ADD took.
func attachOnce(ctx context.Context, p netlab.Plugin, s netlab.Sandbox, c netlab.Config) (float64, error) {
	took, err := callTime(ctx, p, "ADD", s, c)
	if err != nil {
		return 0, err
	}
	_, err = p.Call(ctx, "DEL", s, c)
	return took, err
}

// refusedOnce runs an ADD that ends when its configuration is parsed, because the node has no such LAN.
func refusedOnce(ctx context.Context, p netlab.Plugin, s netlab.Sandbox, c netlab.Config) (float64, error) {
	took, err := callTime(ctx, p, "ADD", s, c)
	if words, ok := errors.AsType[*types.Error](err); !ok || words.Code != types.ErrTryAgainLater {
		return 0, fmt.Errorf("an ADD to an absent LAN: %w", err)
	}
	return took, nil
}

// callTime calls a plugin and returns how many milliseconds its process took.
func callTime(ctx context.Context, p netlab.Plugin, verb string, s netlab.Sandbox, c netlab.Config) (float64, error) {
	cmd, err := p.Command(ctx, verb, s, c)
	if err != nil {
		return 0, err
	}
	var took time.Duration
	var out []byte
	err = p.Node.Do(func() (err error) {
		began := time.Now()
		out, err = cmd.Output()
		took = time.Since(began)
		return err
	})
	if err != nil {
		return milliseconds(took), netlab.PluginError(err, out, nil)
	}
	return milliseconds(took), nil
}

func milliseconds(d time.Duration) float64 { return d.Seconds() * 1000 }

// attachRate measures B3: how fast pods are attached that start at one time.
func attachRate(t *testing.T, b *bench) {
	const pods, workers, perLAN = 64, 8, 8
	n := addNode(t, netlab.NewUnderlay(t, netlab.UnderlayMTU), "worker1")
	var requests []kernel.ClaimRequest
	var bare []bareAttach
	for i := range pods / perLAN {
		var spokes []string
		for j := range perLAN {
			spokes = append(spokes, fmt.Sprintf("s%d-%d", i, j))
		}
		lan := netlab.LAN(uint32(1+i), n.device, spokes...)
		n.reconcile(t, lan)
		for _, spoke := range spokes {
			pod := sandbox(t)
			r := claimRequest(lan.Netns, spoke, pod)
			requests = append(requests, r)
			bare = append(bare, newBareAttach(t, n, lan, r))
		}
	}
	release := func() error {
		var errs []error
		for _, r := range requests {
			errs = append(errs, n.kernel.Release(t.Context(), r.Netns, r.Spoke, r.ID()))
		}
		return errors.Join(errs...)
	}
	got := race(t, times(20, 1),
		contender{"k8slan", func() (float64, error) {
			began := time.Now()
			err := atOnce(workers, requests, func(r kernel.ClaimRequest) error {
				_, err := n.kernel.Claim(t.Context(), r)
				return err
			})
			took := time.Since(began)
			return pods / took.Seconds(), errors.Join(err, release())
		}},
		contender{"bare", func() (float64, error) {
			began := time.Now()
			for _, a := range bare {
				if err := a.attach(); err != nil {
					return 0, err
				}
			}
			took := time.Since(began)
			return pods / took.Seconds(), release()
		}},
	)
	b.atLeast("B3", "64 pods attached by 8 workers / a loop of the bare netlink messages",
		got["k8slan"].over(got["bare"]).median(), 0.7,
		figures("per s", got["k8slan"], got["bare"]))
}

// atOnce calls do for each item, several at a time.
func atOnce[T any](workers int, items []T, do func(T) error) error {
	todo := make(chan T)
	errs := make(chan error, len(items))
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for item := range todo {
				errs <- do(item)
			}
		})
	}
	for _, item := range items {
		todo <- item
	}
	close(todo)
	group.Wait()
	close(errs)
	var failed []error
	for err := range errs {
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}
