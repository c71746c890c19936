// Package podresources ends the claims of pods that are no longer on this node, by kubelet's word, where nobody called
// the CNI plugin to do so.
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

// Socket is where kubelet tells of its pods; it makes the socket anew when it starts.
const Socket = "/var/lib/kubelet/pod-resources/kubelet.sock"

const (
	// lookEvery is how often kubelet is asked, and only while there are claims of pods.
	lookEvery = time.Minute
	// Grace is how long a pod must be unknown to kubelet until its claims end: from the first look that missed it to
	// the last, with none between that found it. A look that failed is none.
	Grace = 2 * time.Minute
	// answerTime is how long kubelet may take.
	answerTime = 10 * time.Second
)

// Pod names a pod; the zero value names none.
type Pod struct{ Namespace, Name string }

// LANs are the node's segments; *lanmgr.Manager is them.
type LANs interface {
	Reports() []lanmgr.Report
	// Release ends a claim as the CNI plugin's DEL does.
	Release(ctx context.Context, netns string, claim segment.Claim) error
}

// Collector compares claims with kubelet's pods.
type Collector struct {
	// Collected is told of every claim that was ended; nil: nobody is. It is set before Run.
	Collected func()

	socket string
	self   Pod
	lans   LANs
	log    *slog.Logger

	missed map[string]time.Time // by claim ID: the first look that did not find its pod
	failed bool                 // the last look; told once
}

// New returns a collector that does nothing until Run. self is the pod that this process is in: kubelet's list is
// believed only if it is in it, for after its own start kubelet lists no pod, or static ones alone, until the API server
// has told it of the others (GetPods in pkg/kubelet/pod/pod_manager.go), and they all come together.
func New(socket string, self Pod, lans LANs, log *slog.Logger) *Collector {
	return &Collector{socket: socket, self: self, lans: lans, log: log, missed: map[string]time.Time{}}
}

// Run looks until the context ends.
func (c *Collector) Run(ctx context.Context) error {
	if c.self == (Pod{}) {
		c.log.Warn("claims of pods that went without a CNI DEL are not collected: this process does not know which pod it is in (POD_NAMESPACE, POD_NAME)")
		return nil
	}
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-ticker.C:
			err := c.look(ctx, now)
			if err != nil && !c.failed && ctx.Err() == nil {
				c.log.Error("cannot tell whether claims have lost their pods; trying again each minute", "err", err)
			}
			c.failed = err != nil
		}
	}
}

// look asks kubelet once and ends the claims whose time is over.
func (c *Collector) look(ctx context.Context, now time.Time) error {
	type held struct {
		netns string
		segment.Claim
	}
	claims := map[string]held{}
	for _, r := range c.lans.Reports() {
		for _, claim := range r.Claims {
			if claim.Pod != "" && claim.PodNamespace != "" { // without a pod it was made by another than Kubernetes
				claims[claim.ID] = held{r.Segment.Netns, claim}
			}
		}
	}
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
		first, before := c.missed[id]
		switch {
		// A pod that is gone and was made again under its name counts: its ADD takes the spoke over.
		case slices.ContainsFunc(pods, func(p Pod) bool { return claim.IsOf(p.Namespace, p.Name) }):
			delete(c.missed, id)
		case !before:
			c.missed[id] = now
		case now.Sub(first) >= Grace:
			c.log.Warn("kubelet no longer has the pod of a claim, and nobody detached it: ending the claim",
				"netns", claim.netns, "spoke", claim.Spoke, "pod", claim.PodNamespace+"/"+claim.Pod, "since", claim.Since)
			if err := c.lans.Release(ctx, claim.netns, claim.Claim); err != nil {
				errs = append(errs, fmt.Errorf("end the claim of pod %s/%s on spoke %s: %w", claim.PodNamespace, claim.Pod, claim.Spoke, err))
			} else if c.Collected != nil {
				c.Collected()
			}
		}
	}
	return errors.Join(errs...)
}

// pods are kubelet's, if it knows them yet.
func (c *Collector) pods(ctx context.Context) ([]Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	pods, err := List(ctx, c.socket)
	if err == nil && !slices.Contains(pods, c.self) {
		err = fmt.Errorf("kubelet's list of %d pods lacks %s/%s, which is this one: it does not know its pods yet", len(pods), c.self.Namespace, c.self.Name)
	}
	return pods, err
}

// List asks kubelet for the pods that it deals with: from before their sandbox is made until after it was stopped,
// terminating ones too (GetActivePods in pkg/kubelet/kubelet_pods.go). Their devices are not looked at, because kubelet
// does not tell those of plain init containers.
func List(ctx context.Context, socket string) ([]Pod, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("reach kubelet at %s: %w", socket, err)
	}
	defer conn.Close()
	// A node's 500 pods with their devices and CPUs may be more than the 4 MiB that gRPC takes by itself.
	answer, err := api.NewPodResourcesListerClient(conn).List(ctx, &api.ListPodResourcesRequest{}, grpc.MaxCallRecvMsgSize(math.MaxInt32))
	if err != nil {
		return nil, fmt.Errorf("ask kubelet for its pods at %s: %w", socket, err)
	}
	var pods []Pod
	for _, p := range answer.GetPodResources() {
		pods = append(pods, Pod{p.GetNamespace(), p.GetName()})
	}
	return pods, nil
}
