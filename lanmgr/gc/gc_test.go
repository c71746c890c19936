package gc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	api "k8s.io/kubelet/pkg/apis/podresources/v1"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// kubelet answers List as kubelet does.
type kubelet struct {
	api.UnimplementedPodResourcesListerServer
	socket string

	mu    sync.Mutex
	pods  []Pod
	err   error
	asked int
}

func (k *kubelet) List(context.Context, *api.ListPodResourcesRequest) (*api.ListPodResourcesResponse, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked++
	answer := &api.ListPodResourcesResponse{}
	for _, p := range k.pods {
		answer.PodResources = append(answer.PodResources, &api.PodResources{Namespace: p.Namespace, Name: p.Name})
	}
	return answer, k.err
}

func (k *kubelet) has(pods ...Pod) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pods = pods
}

// start serves until stop is called.
func (k *kubelet) start(t *testing.T) (stop func()) {
	t.Helper()
	listener, err := net.Listen("unix", k.socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	api.RegisterPodResourcesListerServer(server, k)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener)
	}()
	stop = sync.OnceFunc(func() {
		server.Stop()
		<-served
	})
	t.Cleanup(stop)
	return stop
}

// lans is a node with one LAN.
type lans struct {
	claims     []segment.Claim
	releaseErr error // for the claim on spoke gone
}

func (l *lans) Reports() []lanmgr.Report {
	return []lanmgr.Report{{Segment: segment.Segment{Netns: "default.lab"}, Claims: slices.Clone(l.claims)}}
}

func (l *lans) Release(_ context.Context, netns string, claim segment.Claim) error {
	if l.releaseErr != nil && claim.Spoke == "gone" {
		return l.releaseErr
	}
	if netns == "default.lab" {
		l.claims = slices.DeleteFunc(l.claims, func(c segment.Claim) bool { return c.ID == claim.ID })
	}
	return nil
}

func (l *lans) spokes() string {
	var spokes []string
	for _, c := range l.claims {
		spokes = append(spokes, c.Spoke)
	}
	return strings.Join(spokes, " ")
}

func claim(spoke, namespace, pod string) segment.Claim {
	return segment.Claim{
		ID: segment.ClaimID(spoke, "net1"), Spoke: spoke, Kind: segment.Veth, PodNamespace: namespace, Pod: pod,
	}
}

var (
	self  = Pod{"k8slan-system", "k8slan-ds-x"}
	lives = Pod{"default", "lives"}
	gone  = Pod{"default", "gone"}
)

func setUp(t *testing.T) (*Collector, *kubelet, *lans) {
	t.Helper()
	k := &kubelet{socket: filepath.Join(t.TempDir(), "kubelet.sock"), pods: []Pod{self, lives, gone}}
	l := &lans{claims: []segment.Claim{
		claim("lives", "default", "lives"), claim("gone", "default", "gone"), claim("podless", "", ""),
	}}
	return New(k.socket, self, l, slog.New(slog.DiscardHandler)), k, l
}

// noon is the time of the first collection.
var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

// collect collects at a time after noon. The error must have the text why, or be nil if that is empty.
func collect(t *testing.T, c *Collector, after time.Duration, why string) {
	t.Helper()
	err := c.collect(t.Context(), noon.Add(after))
	if (err == nil) != (why == "") || err != nil && !strings.Contains(err.Error(), why) {
		t.Fatalf("the error of a collection is %v, want %q", err, why)
	}
}

func TestClaimWhosePodIsGoneEnds(t *testing.T) {
	c, k, l := setUp(t)
	collected := 0
	c.Collected = func() { collected++ }
	k.start(t)
	collect(t, c, 0, "")
	k.has(self, lives)
	collect(t, c, time.Minute, "")
	collect(t, c, 2*time.Minute, "")
	if l.spokes() != "lives gone podless" || collected != 0 {
		t.Fatalf("after a minute there are claims on %s, and %d were collected", l.spokes(), collected)
	}
	collect(t, c, 3*time.Minute, "")
	if l.spokes() != "lives podless" || collected != 1 {
		t.Errorf("after %v there are claims on %s, and %d were collected", Grace, l.spokes(), collected)
	}
}

func TestGraceStartsAgainWhenKubeletHasThePod(t *testing.T) {
	c, k, l := setUp(t)
	k.start(t)
	k.has(self, lives)
	collect(t, c, 0, "")
	k.has(self, gone)
	collect(t, c, time.Minute, "")
	k.has(self, lives)
	collect(t, c, 2*time.Minute, "")
	collect(t, c, 3*time.Minute, "")
	if l.spokes() != "lives gone podless" {
		t.Errorf("there are claims on %s", l.spokes())
	}
}

// While kubelet is away, fails, or has just started, no claim ends, however long that lasts.
func TestNoClaimEndsWithoutKubeletsAnswer(t *testing.T) {
	c, k, l := setUp(t)
	collect(t, c, 0, "ask kubelet for its pods")
	stop := k.start(t)
	k.has(self, lives)
	collect(t, c, time.Minute, "")
	k.has(Pod{"kube-system", "static-pod"})
	collect(t, c, time.Hour, "does not know its pods yet")
	k.err = errors.New("rejected by rate limit")
	collect(t, c, 2*time.Hour, "rejected by rate limit")
	stop()
	collect(t, c, 3*time.Hour, "ask kubelet for its pods")
	if l.spokes() != "lives gone podless" {
		t.Errorf("there are claims on %s", l.spokes())
	}
	k.err = nil
	k.start(t)
	k.has(self, lives)
	collect(t, c, 4*time.Hour, "") // the second collection that missed the pod
	if l.spokes() != "lives podless" {
		t.Errorf("there are claims on %s", l.spokes())
	}
}

func TestKubeletIsAskedOnlyIfThereAreClaimsOfPods(t *testing.T) {
	c, k, l := setUp(t)
	k.start(t)
	l.claims = l.claims[2:]
	collect(t, c, 0, "")
	if k.asked != 0 {
		t.Errorf("kubelet was asked %d times", k.asked)
	}
}

func TestClaimThatCannotBeEndedIsRetriedAndDelaysNoOther(t *testing.T) {
	c, k, l := setUp(t)
	for i := range 8 { // in whichever order claims are visited, some come after it
		l.claims = append(l.claims, claim(fmt.Sprintf("gone-%d", i), "default", "gone"))
	}
	k.start(t)
	k.has(self, lives)
	l.releaseErr = errors.New("no way")
	collect(t, c, 0, "")
	collect(t, c, 2*time.Minute, "no way")
	if l.spokes() != "lives gone podless" {
		t.Errorf("there are claims on %s", l.spokes())
	}
	l.releaseErr = nil
	collect(t, c, 3*time.Minute, "")
	if l.spokes() != "lives podless" {
		t.Errorf("there are claims on %s", l.spokes())
	}
}

func TestCollectorWithoutItsOwnPodCollectsNothing(t *testing.T) {
	_, k, l := setUp(t)
	if err := New(k.socket, Pod{}, l, slog.New(slog.DiscardHandler)).Run(t.Context()); err != nil {
		t.Error(err)
	}
}
