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
	"github.com/k8slan/k8slan/lanmgr/notify"
	"github.com/k8slan/k8slan/lanmgr/retry"
)

// writeInterval is the least time between two writes, so that a burst of attachments takes few. The first change after
// a quiet time is written at once: other nodes wait for it.
const writeInterval = 200 * time.Millisecond

// publisher writes the node's LANNode: always the newest status, one write at a time, and only when something changed.
type publisher struct {
	name      string
	client    client.Client
	apiReader client.Reader
	log       *slog.Logger
	wake      notify.Flag

	mu    sync.Mutex
	owner *metav1.OwnerReference
	want  *v1beta1.LANNodeStatus // nil: not known yet
	have  *v1beta1.LANNode       // the newest version that is known; nil: not known
}

func newPublisher(name string, c client.Client, apiReader client.Reader, log *slog.Logger) *publisher {
	return &publisher{name: name, client: c, apiReader: apiReader, log: log, wake: notify.New()}
}

// setOwner sets the Node that owns the LANNode.
func (p *publisher) setOwner(node *corev1.Node) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.owner != nil && p.owner.UID == node.UID {
		return
	}
	p.owner = &metav1.OwnerReference{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}
	p.wake.Set()
}

// set sets the status that the LANNode should have.
func (p *publisher) set(status v1beta1.LANNodeStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.want != nil && equality.Semantic.DeepEqual(*p.want, status) {
		return
	}
	p.want = &status
	p.wake.Set()
}

// observe handles an event of the LANNode: a change by another writer, or the echo of an own write.
func (p *publisher) observe(before, after any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.have == nil {
		return // run reads the LANNode itself
	}
	if current, ok := after.(*v1beta1.LANNode); ok {
		if newer(current, p.have) {
			p.have = current.DeepCopy()
			p.wake.Set()
		}
		return
	}
	if deleted, ok := before.(*v1beta1.LANNode); ok && deleted.UID == p.have.UID {
		p.have = nil
		p.wake.Set()
	}
}

func newer(a, b *v1beta1.LANNode) bool {
	order, err := resourceversion.CompareResourceVersion(a.ResourceVersion, b.ResourceVersion)
	return err != nil || order > 0
}

// run writes until ctx ends, and repeats what failed.
func (p *publisher) run(ctx context.Context) {
	timer := retry.NewTimer(retry.Default)
	defer timer.Stop()
	timer.Succeeded() // nothing is due before set
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
			if !retry.Pause(ctx, writeInterval-time.Since(last)) {
				return
			}
		case <-timer.C:
		}
		last = time.Now()
		if err := p.write(ctx); err != nil && ctx.Err() == nil {
			if timer.Failed(err) {
				p.log.Error("cannot write the node's LANNode, trying again", "err", err)
			}
			continue
		}
		timer.Succeeded()
	}
}

// write makes the LANNode what is wanted now. After a conflict with another writer it reads the LANNode again.
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
	isOwner := func(o metav1.OwnerReference) bool { return o.UID == owner.UID }
	if !slices.ContainsFunc(next.OwnerReferences, isOwner) {
		next.OwnerReferences = []metav1.OwnerReference{*owner}
		if err := p.client.Update(ctx, next); err != nil {
			return fmt.Errorf("set the owner of LANNode %s: %w", p.name, err)
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
		p.have = next // unless the LANNode was deleted meanwhile
	}
	return nil
}

// ensureExists creates the LANNode if the node has none.
func (p *publisher) ensureExists(ctx context.Context, node *corev1.Node) error {
	p.setOwner(node)
	p.mu.Lock()
	owner := *p.owner
	p.mu.Unlock()
	_, err := p.getOrCreate(ctx, owner)
	return err
}

func (p *publisher) getOrCreate(ctx context.Context, owner metav1.OwnerReference) (*v1beta1.LANNode, error) {
	lanNode := &v1beta1.LANNode{}
	err := p.apiReader.Get(ctx, client.ObjectKey{Name: p.name}, lanNode)
	if !apierrors.IsNotFound(err) {
		if err != nil {
			return nil, fmt.Errorf("get LANNode %s: %w", p.name, err)
		}
		return lanNode, nil
	}
	lanNode = &v1beta1.LANNode{
		ObjectMeta: metav1.ObjectMeta{Name: p.name, OwnerReferences: []metav1.OwnerReference{owner}},
	}
	if err := p.client.Create(ctx, lanNode); err != nil {
		return nil, fmt.Errorf("create LANNode %s: %w", p.name, err)
	}
	return lanNode, nil
}
