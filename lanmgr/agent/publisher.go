package agent

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// writeInterval is the least time between two writes, so that a burst of attachments is few of them. The first change after a quiet time is
// written at once: other nodes wait for it.
const writeInterval = 200 * time.Millisecond

// publisher writes the node's LANNode: always the newest status, one write at a time, and only when something changed.
type publisher struct {
	name      string
	client    client.Client
	apiReader client.Reader
	log       *slog.Logger
	wake      chan struct{} // one slot

	mu    sync.Mutex
	owner *metav1.OwnerReference
	want  *v1beta1.LANNodeStatus // nil: nothing to say yet
	have  *v1beta1.LANNode       // newest that is known of; nil: look
}

func newPublisher(name string, c client.Client, live client.Reader, log *slog.Logger) *publisher {
	return &publisher{name: name, client: c, apiReader: live, log: log, wake: make(chan struct{}, 1)}
}

// setOwner says which Node the LANNode goes with.
func (p *publisher) setOwner(node *corev1.Node) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.owner != nil && p.owner.UID == node.UID {
		return
	}
	p.owner = &metav1.OwnerReference{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}
	signal(p.wake)
}

func (p *publisher) set(status v1beta1.LANNodeStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.want != nil && equality.Semantic.DeepEqual(*p.want, status) {
		return
	}
	p.want = &status
	signal(p.wake)
}

// observe takes note of what others did to the LANNode, and of the echo of our own writes.
func (p *publisher) observe(before, after any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.have == nil {
		return // run looks itself
	}
	if now, ok := after.(*v1beta1.LANNode); ok {
		if newer(now, p.have) {
			p.have = now.DeepCopy()
			signal(p.wake)
		}
		return
	}
	if gone, ok := before.(*v1beta1.LANNode); ok && gone.UID == p.have.UID {
		p.have = nil
		signal(p.wake)
	}
}

func newer(a, b *v1beta1.LANNode) bool {
	order, err := resourceversion.CompareResourceVersion(a.ResourceVersion, b.ResourceVersion)
	return err != nil || order > 0
}

// run writes until ctx ends. What fails is tried again for as long as it takes.
func (p *publisher) run(ctx context.Context) {
	retry := newRetry()
	defer retry.stop()
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
			if !p.rest(ctx, writeInterval-time.Since(last)) {
				return
			}
		case <-retry.timer.C:
		}
		last = time.Now()
		if err := p.write(ctx); err != nil && ctx.Err() == nil {
			retry.failed(p.log, "cannot write the node's LANNode, trying again", err)
			continue
		}
		retry.succeeded()
	}
}

// rest waits for so long, and is false if ctx ends first.
func (p *publisher) rest(ctx context.Context, so time.Duration) bool {
	timer := time.NewTimer(so)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// write brings the LANNode to what is wanted now. Where somebody else was faster, it looks again.
func (p *publisher) write(ctx context.Context) error {
	var err error
	for range 3 {
		err = p.writeOnce(ctx)
		if !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) && !apierrors.IsAlreadyExists(err) {
			return err
		}
		p.mu.Lock()
		p.have = nil
		p.mu.Unlock()
	}
	return err
}

func (p *publisher) writeOnce(ctx context.Context) error {
	p.mu.Lock()
	owner, want, known := p.owner, p.want, p.have
	p.mu.Unlock()
	if owner == nil || want == nil {
		return nil
	}
	have := known
	if have == nil {
		var err error
		if have, err = p.getOrCreate(ctx, *owner); err != nil {
			return err
		}
	}
	next := have.DeepCopy()
	if !slices.ContainsFunc(next.OwnerReferences, func(o metav1.OwnerReference) bool { return o.UID == owner.UID }) {
		next.OwnerReferences = []metav1.OwnerReference{*owner}
		if err := p.client.Update(ctx, next); err != nil {
			return fmt.Errorf("give LANNode %s its owner: %w", p.name, err)
		}
	}
	if !equality.Semantic.DeepEqual(next.Status, *want) {
		want.DeepCopyInto(&next.Status)
		if err := p.client.Status().Update(ctx, next); err != nil {
			return fmt.Errorf("write status of LANNode %s: %w", p.name, err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.have == known || p.have != nil && newer(next, p.have) {
		p.have = next // and not if it was deleted meanwhile
	}
	return nil
}

// ensureExists makes sure that the node has a LANNode.
func (p *publisher) ensureExists(ctx context.Context, node *corev1.Node) error {
	p.setOwner(node)
	p.mu.Lock()
	owner := *p.owner
	p.mu.Unlock()
	_, err := p.getOrCreate(ctx, owner)
	return err
}

// getOrCreate gets the LANNode or makes it.
func (p *publisher) getOrCreate(ctx context.Context, owner metav1.OwnerReference) (*v1beta1.LANNode, error) {
	lanNode := &v1beta1.LANNode{}
	err := p.apiReader.Get(ctx, client.ObjectKey{Name: p.name}, lanNode)
	if !apierrors.IsNotFound(err) {
		if err != nil {
			return nil, fmt.Errorf("get LANNode %s: %w", p.name, err)
		}
		return lanNode, nil
	}
	lanNode = &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: p.name, OwnerReferences: []metav1.OwnerReference{owner}}}
	if err := p.client.Create(ctx, lanNode); err != nil {
		return nil, fmt.Errorf("create LANNode %s: %w", p.name, err)
	}
	return lanNode, nil
}
