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

// peers knows the other nodes and what they have of each LAN, from their LANNodes. Reading starts when the first LAN
// needs it: where none does, nodes know nothing of each other.
type peers struct {
	self   string
	needed chan struct{} // closed by need
	need   func()

	mu        sync.Mutex
	known     bool
	nodes     map[string]map[types.UID]peer // by the node's name and the LAN
	remotesOf map[types.UID]remoteList      // cached until one of the LAN's peers changes
	membersOf map[types.UID][]netip.Addr    // cached likewise
}

// peer is a LAN on another node.
type peer struct {
	vtep    netip.Addr   // the zero Addr if no pod there is attached, or the node cannot be reached
	sources []netip.Addr // the addresses that its packets may come from, sorted
}

func (p peer) equal(o peer) bool { return p.vtep == o.vtep && slices.Equal(p.sources, o.sources) }

// remoteList is the remotes for a node with that VTEP. It is never modified.
type remoteList struct {
	vtep    netip.Addr
	remotes []netip.Addr
}

func newPeers(self string) *peers {
	needed := make(chan struct{})
	return &peers{
		self: self, needed: needed, need: sync.OnceFunc(func() { close(needed) }),
		nodes:     map[string]map[types.UID]peer{},
		remotesOf: map[types.UID]remoteList{},
		membersOf: map[types.UID][]netip.Addr{},
	}
}

// remotesFor returns the VTEPs of the other nodes that have a pod on the LAN and an address of vtep's family: sorted,
// each once; nil while that is not known.
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

// membersFor returns the addresses that packets of the LAN may come from: those of every other node that has it. A node
// without a pod on it is one of them, because a pod that attaches there has to be accepted at once. The list is sorted,
// has each address once, and is never modified; it is nil while that is not known.
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

// observe handles an event of a LANNode. It reports whether that changes remotes or members that the agent uses.
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

// replace sets what a node has now; nil removes the node. It reports whether that changes remotes or members that the
// agent uses. The caller holds p.mu.
func (p *peers) replace(node string, lans map[types.UID]peer) bool {
	cached := len(p.remotesOf) + len(p.membersOf)
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
	return len(p.remotesOf)+len(p.membersOf) < cached
}

// keepOnly drops cached lists of other LANs than these.
func (p *peers) keepOnly(lans map[types.UID]bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(p.remotesOf, func(lan types.UID, _ remoteList) bool { return !lans[lan] })
	maps.DeleteFunc(p.membersOf, func(lan types.UID, _ []netip.Addr) bool { return !lans[lan] })
}

// lansOn returns the LANs that a node has. Its VTEP is usually one of its underlay's addresses. It is not for an
// underlay that lost its link, and with that its IPv6 addresses, and for a version that does not report addresses.
func lansOn(n *v1beta1.LANNode) map[types.UID]peer {
	type endpoint struct{ underlay, vtep string }
	byEndpoint := map[endpoint]peer{} // LANs share them
	lans := make(map[types.UID]peer)
	for _, s := range n.Status.Segments {
		if s.UID == "" {
			continue
		}
		e := endpoint{s.Underlay, s.VTEP}
		p, ok := byEndpoint[e]
		if !ok {
			p = peerOf(n.Status.Underlays, s)
			byEndpoint[e] = p
		}
		if len(s.Attachments) == 0 || !p.vtep.IsGlobalUnicast() {
			p.vtep = netip.Addr{}
		}
		if other, ok := lans[s.UID]; ok { // a LAN can be leaving one network namespace and be in another
			sources := slices.Values(slices.Concat(p.sources, other.sources))
			p.sources = slices.Compact(slices.SortedFunc(sources, netip.Addr.Compare))
			p.vtep = cmp.Or(p.vtep, other.vtep)
		}
		lans[s.UID] = p
	}
	return lans
}

// peerOf parses the addresses of one segment of a LANNode, and ignores those that cannot be a node's.
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
			continue
		}
		if p.sources = append(p.sources, a.Unmap()); i == 0 {
			p.vtep = a.Unmap()
		}
	}
	slices.SortFunc(p.sources, netip.Addr.Compare)
	p.sources = slices.Compact(p.sources)
	return p
}

// StripPeer removes from a LANNode what other nodes do not need of it, before a cache keeps it.
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

// intern returns one copy of a text that many LANNodes have.
func intern(text string) string { return unique.Make(text).Value() }

// watchPeers watches the other nodes' LANNodes, from when a LAN needs them until ctx ends. While the API server is
// away, what was read last stays valid.
func (a *Agent) watchPeers(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-a.peers.needed:
	}
	message := "cannot watch the other nodes' LANNodes, remotes stay unchanged"
	a.untilDone(ctx, message, func() error { return a.readPeers(ctx) })
}

func (a *Agent) readPeers(ctx context.Context) error {
	slow := time.AfterFunc(slowSync, func() {
		message := "waiting for the API server to list the other nodes' LANNodes; remotes stay unchanged"
		a.Log.Warn(message, "node", a.Node)
	})
	defer slow.Stop()
	informer, err := a.Peers.GetInformer(ctx, &v1beta1.LANNode{}) // returns when it has synced
	if err != nil {
		return fmt.Errorf("watch LANNodes: %w", err)
	}
	reg, err := informer.AddEventHandler(a.inputHandler(a.peers.observe))
	if err != nil {
		return fmt.Errorf("watch LANNodes: %w", err)
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-reg.HasSyncedChecker().Done(): // the handler has seen every LANNode
	}
	a.peers.mu.Lock()
	a.peers.known = true
	a.peers.mu.Unlock()
	a.inputsChanged.Set()
	return nil
}
