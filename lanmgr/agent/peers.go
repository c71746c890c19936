package agent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"
	"unique"

	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// peers are the other nodes and what they have of each LAN, as their LANNodes tell. They are read once a LAN wants them: where none
// does, nodes know nothing of each other.
type peers struct {
	self   string
	needed chan struct{} // closed when they are
	need   func()        // closes it

	mu        sync.Mutex
	known     bool
	nodes     map[string]map[types.UID]peer // by the node's name and the LAN
	remotesOf map[types.UID]remoteList      // of LANs that have not changed since
	membersOf map[types.UID][]netip.Addr    // likewise
}

// peer is a LAN on another node.
type peer struct {
	vtep    netip.Addr   // where it hears; the zero Addr where no pod there is attached, or it cannot be reached
	sources []netip.Addr // what its packets may come from, sorted
}

func (p peer) equal(o peer) bool { return p.vtep == o.vtep && slices.Equal(p.sources, o.sources) }

// remoteList is what a node with that VTEP has as remotes; nobody changes it.
type remoteList struct {
	vtep    netip.Addr
	remotes []netip.Addr
}

func newPeers(self string) *peers {
	wanted := make(chan struct{})
	return &peers{
		self: self, needed: wanted, need: sync.OnceFunc(func() { close(wanted) }),
		nodes:     map[string]map[types.UID]peer{},
		remotesOf: map[types.UID]remoteList{},
		membersOf: map[types.UID][]netip.Addr{},
	}
}

// remotesFor are the VTEPs of the other nodes that have a pod on the LAN and an address of that family: sorted, each once; nil
// where that is not known yet.
func (p *peers) remotesFor(lan types.UID, vtep netip.Addr) []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.known {
		return nil
	}
	if l, ok := p.remotesOf[lan]; ok && l.vtep == vtep {
		return l.remotes
	}
	remotes := []netip.Addr{}
	for _, lans := range p.nodes {
		if r := lans[lan].vtep; r.BitLen() == vtep.BitLen() && r != vtep {
			remotes = append(remotes, r)
		}
	}
	slices.SortFunc(remotes, netip.Addr.Compare)
	remotes = slices.Compact(remotes)
	p.remotesOf[lan] = remoteList{vtep, remotes}
	return remotes
}

// membersFor are the addresses that packets of the LAN may come from: those of every other node that has it, with a pod or without, for
// a pod that attaches there is to be heard at once. Sorted, each once; nil where that is not known yet. Nobody changes the list.
func (p *peers) membersFor(lan types.UID) []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.known {
		return nil
	}
	if m, ok := p.membersOf[lan]; ok {
		return m
	}
	members := []netip.Addr{}
	for _, lans := range p.nodes {
		members = append(members, lans[lan].sources...)
	}
	slices.SortFunc(members, netip.Addr.Compare)
	members = slices.Compact(members)
	p.membersOf[lan] = members
	return members
}

// observe takes note of a LANNode and says whether that changed what somebody has asked for.
func (p *peers) observe(before, after any) bool {
	was, _ := before.(*v1beta1.LANNode)
	is, _ := after.(*v1beta1.LANNode)
	p.mu.Lock()
	defer p.mu.Unlock()
	if is == nil {
		if was == nil || p.nodes[was.Name] == nil {
			return false
		}
		return p.replace(was.Name, nil)
	}
	lans := lansOn(is)
	if is.Name == p.self || maps.EqualFunc(p.nodes[is.Name], lans, peer.equal) {
		return false
	}
	return p.replace(is.Name, lans)
}

// replace notes what a node has now, nil if it is gone, and says whether that changed what somebody has asked for; p.mu is held.
func (p *peers) replace(node string, lans map[types.UID]peer) bool {
	asked := len(p.remotesOf) + len(p.membersOf)
	before := p.nodes[node]
	for _, some := range []map[types.UID]peer{before, lans} {
		for lan := range some {
			if before[lan].vtep != lans[lan].vtep {
				delete(p.remotesOf, lan)
			}
			if !slices.Equal(before[lan].sources, lans[lan].sources) {
				delete(p.membersOf, lan)
			}
		}
	}
	if p.nodes[node] = lans; lans == nil {
		delete(p.nodes, node)
	}
	return len(p.remotesOf)+len(p.membersOf) < asked
}

// keepOnly forgets what was asked for of other LANs than these.
func (p *peers) keepOnly(lans map[types.UID]bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(p.remotesOf, func(lan types.UID, _ remoteList) bool { return !lans[lan] })
	maps.DeleteFunc(p.membersOf, func(lan types.UID, _ []netip.Addr) bool { return !lans[lan] })
}

// lansOn are the LANs that a node has. Its VTEP is among the addresses of an underlay, but for one that has lost its link and with
// that its IPv6 addresses, or a version that does not tell them.
func lansOn(n *v1beta1.LANNode) map[types.UID]peer {
	type way struct{ underlay, vtep string }
	ways := map[way]peer{} // LANs share them
	lans := make(map[types.UID]peer)
	for _, s := range n.Status.Segments {
		if s.UID == "" {
			continue
		}
		p, ok := ways[way{s.Underlay, s.VTEP}]
		if !ok {
			p = peerOf(n.Status.Underlays, s)
			ways[way{s.Underlay, s.VTEP}] = p
		}
		if len(s.Attachments) == 0 || !p.vtep.IsGlobalUnicast() {
			p.vtep = netip.Addr{}
		}
		if other, ok := lans[s.UID]; ok { // leaving one netns, it is in another
			p.sources = slices.Compact(slices.SortedFunc(slices.Values(slices.Concat(p.sources, other.sources)), netip.Addr.Compare))
			p.vtep = cmp.Or(p.vtep, other.vtep)
		}
		lans[s.UID] = p
	}
	return lans
}

func peerOf(underlays []v1beta1.NodeUnderlay, s v1beta1.SegmentStatus) (p peer) {
	texts := []string{s.VTEP}
	for _, u := range underlays {
		if u.Name == s.Underlay {
			texts = append(texts, u.Addresses...)
		}
	}
	for i, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" || !a.Unmap().IsGlobalUnicast() && !a.IsLinkLocalUnicast() {
			continue // no address of a node
		}
		if p.sources = append(p.sources, a.Unmap()); i == 0 {
			p.vtep = a.Unmap()
		}
	}
	slices.SortFunc(p.sources, netip.Addr.Compare)
	p.sources = slices.Compact(p.sources)
	return p
}

// StripPeer strips a LANNode of what other nodes do not need of it, before a cache keeps it.
func StripPeer(obj any) (any, error) {
	n, ok := obj.(*v1beta1.LANNode)
	if !ok {
		return obj, nil
	}
	peer := &v1beta1.LANNode{}
	peer.Name, peer.UID, peer.ResourceVersion = n.Name, n.UID, n.ResourceVersion
	peer.Status.Underlays = n.Status.Underlays
	peer.Status.Segments = make([]v1beta1.SegmentStatus, len(n.Status.Segments))
	for i, s := range n.Status.Segments {
		peer.Status.Segments[i] = v1beta1.SegmentStatus{
			UID: types.UID(intern(string(s.UID))), Underlay: intern(s.Underlay), VTEP: intern(s.VTEP),
		}
		if len(s.Attachments) > 0 {
			peer.Status.Segments[i].Attachments = make([]v1beta1.Attachment, 1)
		}
	}
	return peer, nil
}

// intern is the one copy of a text that many nodes tell.
func intern(text string) string { return unique.Make(text).Value() }

// watchPeers watches the other nodes' LANNodes from when a LAN wants them until ctx ends. While the API server is away, what was
// last read of them holds.
func (a *Agent) watchPeers(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-a.peers.needed:
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
	slow := time.AfterFunc(maxDelay, func() {
		a.Log.Warn("the API server has not yet told of the other nodes' LANNodes; remotes stay as they are", "node", a.Node)
	})
	defer slow.Stop()
	informer, err := a.Peers.GetInformer(ctx, &v1beta1.LANNode{}) // waits until it has synced
	if err != nil {
		return fmt.Errorf("watch LANNodes: %w", err)
	}
	reg, err := informer.AddEventHandler(onChange(func(before, after any) {
		if a.peers.observe(before, after) {
			signal(a.inputsChanged)
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
	signal(a.inputsChanged)
	return nil
}
