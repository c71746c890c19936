package node

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// peers are the other nodes that have a pod on a LAN, as their LANNodes tell. They are read once a LAN wants them: where none does,
// nodes know nothing of each other.
type peers struct {
	self   string
	wanted chan struct{} // closed when they are
	want   func()        // closes it

	mu    sync.Mutex
	known bool
	nodes map[string]map[types.UID]netip.Addr // VTEPs, by the node's name and the LAN
	lists map[types.UID]list                  // of LANs that have not changed since
}

// list is what a node with that VTEP has as remotes; nobody changes it.
type list struct {
	vtep    netip.Addr
	remotes []netip.Addr
}

func newPeers(self string) *peers {
	wanted := make(chan struct{})
	return &peers{
		self: self, wanted: wanted, want: sync.OnceFunc(func() { close(wanted) }),
		nodes: map[string]map[types.UID]netip.Addr{},
		lists: map[types.UID]list{},
	}
}

// remotes are the VTEPs of the other nodes that have a pod on the LAN and an address of that family: sorted, each once; nil
// where that is not known yet.
func (p *peers) remotes(lan types.UID, vtep netip.Addr) []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.known {
		return nil
	}
	if l, ok := p.lists[lan]; ok && l.vtep == vtep {
		return l.remotes
	}
	remotes := []netip.Addr{}
	for _, vteps := range p.nodes {
		if r := vteps[lan]; r.BitLen() == vtep.BitLen() && r != vtep {
			remotes = append(remotes, r)
		}
	}
	slices.SortFunc(remotes, netip.Addr.Compare)
	remotes = slices.Compact(remotes)
	p.lists[lan] = list{vtep, remotes}
	return remotes
}

// seen takes note of a LANNode and says whether it changed what is known.
func (p *peers) seen(before, after any) bool {
	was, _ := before.(*v1beta1.LANNode)
	is, _ := after.(*v1beta1.LANNode)
	p.mu.Lock()
	defer p.mu.Unlock()
	if is == nil {
		if was == nil || p.nodes[was.Name] == nil {
			return false
		}
		p.replace(was.Name, nil)
		return p.known
	}
	vteps := vtepsOf(is)
	if is.Name == p.self || maps.Equal(p.nodes[is.Name], vteps) {
		return false
	}
	p.replace(is.Name, vteps)
	return p.known
}

// replace notes what a node has now, nil if it is gone; p.mu is held.
func (p *peers) replace(node string, vteps map[types.UID]netip.Addr) {
	before := p.nodes[node]
	for _, some := range []map[types.UID]netip.Addr{before, vteps} {
		for lan := range some {
			if before[lan] != vteps[lan] {
				delete(p.lists, lan)
			}
		}
	}
	if p.nodes[node] = vteps; vteps == nil {
		delete(p.nodes, node)
	}
}

// vtepsOf are the VTEPs that a node has in LANs that a pod there is attached to.
func vtepsOf(n *v1beta1.LANNode) map[types.UID]netip.Addr {
	vteps := make(map[types.UID]netip.Addr)
	for _, s := range n.Status.Segments {
		a, err := netip.ParseAddr(s.VTEP)
		if err == nil && s.UID != "" && len(s.Attachments) > 0 && !a.IsLinkLocalUnicast() {
			vteps[s.UID] = a.Unmap()
		}
	}
	return vteps
}

// PeerOf strips a LANNode of what other nodes do not need of it, before a cache keeps it.
func PeerOf(obj any) (any, error) {
	n, ok := obj.(*v1beta1.LANNode)
	if !ok {
		return obj, nil
	}
	peer := &v1beta1.LANNode{}
	peer.Name, peer.UID, peer.ResourceVersion = n.Name, n.UID, n.ResourceVersion
	for _, s := range n.Status.Segments {
		if s.VTEP != "" && len(s.Attachments) > 0 {
			peer.Status.Segments = append(peer.Status.Segments, v1beta1.SegmentStatus{
				UID: s.UID, NS: s.NS, VTEP: s.VTEP, Attachments: make([]v1beta1.Attachment, 1),
			})
		}
	}
	return peer, nil
}

// watchPeers watches the other nodes' LANNodes from when a LAN wants them until ctx ends. While the API server is away, what was
// last read of them holds.
func (a *Agent) watchPeers(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-a.peers.wanted:
	}
	retry := newRetry()
	defer retry.stop()
	for {
		err := a.readPeers(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		retry.failed(a.Log, "cannot watch the other nodes' LANNodes, remotes stay as they are", err)
		select {
		case <-ctx.Done():
			return
		case <-retry.timer.C:
		}
	}
}

func (a *Agent) readPeers(ctx context.Context) error {
	informer, err := a.Peers.GetInformer(ctx, &v1beta1.LANNode{}) // waits until it has synced
	if err != nil {
		return fmt.Errorf("watch LANNodes: %w", err)
	}
	reg, err := informer.AddEventHandler(onChange(func(before, after any) {
		if a.peers.seen(before, after) {
			signal(a.inputs)
		}
	}))
	if err != nil {
		return fmt.Errorf("watch LANNodes: %w", err)
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-reg.HasSyncedChecker().Done(): // every LANNode there is was told
	}
	a.peers.mu.Lock()
	a.peers.known = true
	a.peers.mu.Unlock()
	signal(a.inputs)
	return nil
}
