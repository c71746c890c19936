// Package gc ends the claims of pods that kubelet no longer has and for which no CNI DEL came.
package gc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/podresources/v1"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Socket is where kubelet serves its list of pods; it creates the socket again whenever it starts.
const Socket = "/var/lib/kubelet/pod-resources/kubelet.sock"

const (
	// interval is the time between two collections. Without claims of pods, they do not ask kubelet.
	interval = time.Minute
	// Grace is how long kubelet must lack a pod until its claims end: from the first collection that missed the pod to
	// the last, with none between that found it. A collection that failed does not count.
	Grace = 2 * time.Minute
	// answerTime is how long kubelet may take to answer.
	answerTime = 10 * time.Second
)

// Pod names a pod; the zero value names none.
type Pod struct{ Namespace, Name string }

// LANs has the node's segments; *lanmgr.Manager is one.
type LANs interface {
	Reports() []lanmgr.Report
	// Release ends a claim as the CNI plugin's DEL does.
	Release(ctx context.Context, netns string, claim segment.Claim) error
}

// Collector compares claims with kubelet's pods.
type Collector struct {
	// Collected is called for every claim that was ended; it may be nil. Set it before Run.
	Collected func()

	socket string
	self   Pod
	lans   LANs
	log    *slog.Logger

	missed map[string]time.Time // by claim ID: the first collection that missed its pod
	failed bool                 // the last collection failed, which was logged
}

// New returns a collector that does nothing before Run. self is the pod of this process. A list of kubelet's counts
// only if it has that pod: after its start, kubelet lists no pods, or static ones only, until it receives the others
// from the API server (GetPods in pkg/kubelet/pod/pod_manager.go), all at once.
func New(socket string, self Pod, lans LANs, log *slog.Logger) *Collector {
	return &Collector{socket: socket, self: self, lans: lans, log: log, missed: map[string]time.Time{}}
}

// Run collects once a minute until ctx ends.
func (c *Collector) Run(ctx context.Context) error {
	if c.self == (Pod{}) {
		c.log.Warn("claims of pods without a CNI DEL are not collected:" +
			" this process does not know which pod it is in (POD_NAMESPACE, POD_NAME)")
		return nil
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-ticker.C:
			err := c.collect(ctx, now)
			if err != nil && !c.failed && ctx.Err() == nil {
				c.log.Error("cannot find out which claims have lost their pods; trying again each minute", "err", err)
			}
			c.failed = err != nil
		}
	}
}

// candidate is a claim of a pod.
type candidate struct {
	segment.Claim
	netns string
}

// collect asks kubelet once, and ends the claims whose pods it has lacked for long enough.
func (c *Collector) collect(ctx context.Context, now time.Time) error {
	claims := c.candidates()
	for id := range c.missed {
		if _, ok := claims[id]; !ok {
			delete(c.missed, id)
		}
	}
	if len(claims) == 0 {
		return nil
	}
	pods, err := c.pods(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for id, claim := range claims {
		first, missed := c.missed[id]
		switch {
		// Another pod of that name counts, too: its ADD takes the spoke over.
		case slices.ContainsFunc(pods, func(p Pod) bool { return claim.IsOf(p.Namespace, p.Name) }):
			delete(c.missed, id)
		case !missed:
			c.missed[id] = now
		case now.Sub(first) >= Grace:
			errs = append(errs, c.end(ctx, claim))
		}
	}
	return errors.Join(errs...)
}

// candidates returns the claims of pods by ID. A claim without a pod was not made by Kubernetes.
func (c *Collector) candidates() map[string]candidate {
	claims := map[string]candidate{}
	for _, r := range c.lans.Reports() {
		for _, claim := range r.Claims {
			if claim.Pod != "" && claim.PodNamespace != "" {
				claims[claim.ID] = candidate{claim, r.Segment.Netns}
			}
		}
	}
	return claims
}

// end ends a claim.
func (c *Collector) end(ctx context.Context, claim candidate) error {
	c.log.Warn("kubelet no longer has the pod of a claim, and no CNI DEL came: ending the claim",
		"netns", claim.netns, "spoke", claim.Spoke, "pod", claim.PodNamespace+"/"+claim.Pod, "since", claim.Since)
	if err := c.lans.Release(ctx, claim.netns, claim.Claim); err != nil {
		return fmt.Errorf("end the claim of pod %s/%s on spoke %s: %w", claim.PodNamespace, claim.Pod, claim.Spoke, err)
	}
	if c.Collected != nil {
		c.Collected()
	}
	return nil
}

// pods returns kubelet's pods; it is an error if kubelet does not know them yet.
func (c *Collector) pods(ctx context.Context) ([]Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	pods, err := List(ctx, c.socket)
	if err == nil && !slices.Contains(pods, c.self) {
		err = fmt.Errorf("kubelet's list of %d pods lacks %s/%s, which is this one: it does not know its pods yet",
			len(pods), c.self.Namespace, c.self.Name)
	}
	return pods, err
}

// List asks kubelet for its pods: each is listed from before its sandbox is created until after it was stopped, also
// while it terminates (GetActivePods in pkg/kubelet/kubelet_pods.go). Their devices are of no use here, because kubelet
// does not list those of plain init containers.
func List(ctx context.Context, socket string) ([]Pod, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("reach kubelet at %s: %w", socket, err)
	}
	defer conn.Close()
	client := api.NewPodResourcesListerClient(conn)
	// 500 pods with their devices and CPUs may exceed the 4 MiB that gRPC receives by default.
	answer, err := client.List(ctx, &api.ListPodResourcesRequest{}, grpc.MaxCallRecvMsgSize(math.MaxInt32))
	if err != nil {
		return nil, fmt.Errorf("ask kubelet for its pods at %s: %w", socket, err)
	}
	var pods []Pod
	for _, p := range answer.GetPodResources() {
		pods = append(pods, Pod{p.GetNamespace(), p.GetName()})
	}
	return pods, nil
}
