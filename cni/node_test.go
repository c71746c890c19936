package cni_test

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// memoryNode is a Node that keeps everything in maps.
type memoryNode struct {
	lans       map[string]segment.Segment   // by netns
	pods       map[string]map[string]string // by netns path: interface → spoke
	claims     map[string]claimed           // by netns/spoke
	addresses  map[string][]netip.Prefix    // by netns path/interface
	routes     map[string][]kernel.Route    // by netns path/interface
	underlays  kernel.Underlays
	changeErr  error // if set, every change returns it
	addressErr error // if set, SetAddresses returns it
}

type claimed struct {
	segment.Claim
	request kernel.ClaimRequest
}

func newMemoryNode(lans ...segment.Segment) *memoryNode {
	n := &memoryNode{
		lans: map[string]segment.Segment{}, pods: map[string]map[string]string{},
		claims: map[string]claimed{}, addresses: map[string][]netip.Prefix{}, routes: map[string][]kernel.Route{},
	}
	for _, s := range lans {
		n.lans[s.Netns] = s
	}
	return n
}

// String prints everything that a call could change, sorted.
func (n *memoryNode) String() string {
	var lines []string
	for key, c := range n.claims {
		lines = append(lines, fmt.Sprintf("claim %s %s %s %s/%s if=%s mac=%s mtu=%d promisc=%t", key, c.ID, c.Kind,
			c.PodNamespace, c.Pod, c.Interface, c.MAC, c.request.MTU, c.request.Promiscuous))
	}
	for ns, links := range n.pods {
		for name, spoke := range links {
			lines = append(lines, fmt.Sprintf("pod %s %s %s %v", ns, name, spoke, n.addresses[ns+"/"+name]))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func (n *memoryNode) Record(netns string) (segment.Segment, error) {
	s, ok := n.lans[netns]
	if !ok {
		return s, fmt.Errorf("%w (no %s)", kernel.ErrNoLAN, netns)
	}
	return s, nil
}

func (n *memoryNode) Claim(ctx context.Context, r kernel.ClaimRequest) (kernel.Attachment, error) {
	lan, err := n.Record(r.Netns)
	if err != nil && r.Make != nil {
		if lan, err = r.Make(ctx); err == nil {
			n.lans[r.Netns] = lan
		}
	}
	if err != nil {
		return kernel.Attachment{}, err
	}
	if err := r.Admit(lan); err != nil {
		return kernel.Attachment{}, err
	}
	key := r.Netns + "/" + r.Spoke
	old, taken := n.claims[key]
	pod, ok := n.pods[r.PodNetns]
	_, nameTaken := pod[r.Interface]
	switch {
	case n.changeErr != nil:
		return kernel.Attachment{}, n.changeErr
	case !ok:
		return kernel.Attachment{}, fmt.Errorf("open the pod's network namespace: %w",
			&fs.PathError{Op: "open", Path: r.PodNetns, Err: fs.ErrNotExist})
	case !segment.IsOnDemand(r.Spoke) && !slices.Contains(lan.Spokes, r.Spoke):
		return kernel.Attachment{}, kernel.ErrNoSpoke
	case nameTaken:
		return kernel.Attachment{}, kernel.ErrNameTaken
	case taken && old.Sandbox == r.Sandbox:
		return kernel.Attachment{}, kernel.ErrSameSandbox
	case taken:
		n.end(key)
	}
	if r.MAC == nil {
		if r.MAC, err = lan.PodMAC(r.Spoke, r.Pod); err != nil {
			return kernel.Attachment{}, err
		}
	}
	if r.MTU == 0 {
		r.MTU = lan.MTU
	}
	n.claims[key] = claimed{request: r, Claim: segment.Claim{
		ID: r.ID(), Spoke: r.Spoke, Kind: r.Kind, Sandbox: r.Sandbox, Interface: r.Interface,
		PodNamespace: r.PodNamespace, Pod: r.Pod, PodUID: r.PodUID, Network: r.Network, MAC: r.MAC,
	}}
	pod[r.Interface] = r.Spoke
	a := kernel.Attachment{ClaimID: r.ID(), MAC: r.MAC, MTU: r.MTU, Index: 17, HostInterface: r.ID(), TookOver: taken}
	if r.Kind == segment.Macvtap {
		a.HostInterface, a.TapMajor, a.TapMinor = segment.PlugName(r.Spoke), 241, 3
	}
	return a, nil
}

func (n *memoryNode) end(key string) {
	r := n.claims[key].request
	delete(n.pods[r.PodNetns], r.Interface)
	delete(n.addresses, r.PodNetns+"/"+r.Interface)
	delete(n.claims, key)
}

func (n *memoryNode) Release(ctx context.Context, netns, spoke, claimID string) error {
	if n.changeErr != nil {
		return n.changeErr
	}
	if key := netns + "/" + spoke; n.claims[key].ID == claimID {
		n.end(key)
	}
	if claims, _ := n.Claims(ctx, netns); n.lans[netns].OnDemand && len(claims) == 0 {
		delete(n.lans, netns)
	}
	return nil
}

func (n *memoryNode) Claims(_ context.Context, netns string) ([]segment.Claim, error) {
	var claims []segment.Claim
	for _, key := range slices.Sorted(maps.Keys(n.claims)) {
		if strings.HasPrefix(key, netns+"/") {
			claims = append(claims, n.claims[key].Claim)
		}
	}
	return claims, nil
}

func (n *memoryNode) CheckClaim(_ context.Context, r kernel.ClaimRequest) error {
	have, ok := n.claims[r.Netns+"/"+r.Spoke]
	switch {
	case !ok || have.ID != r.ID():
		return fmt.Errorf("spoke %s is no longer claimed by this pod", r.Spoke)
	case r.MAC != nil && r.MAC.String() != have.MAC.String():
		return fmt.Errorf("%s has the address %s, not %s", r.Interface, have.MAC, r.MAC)
	case r.MTU != 0 && r.MTU != have.request.MTU:
		return fmt.Errorf("%s has the MTU %d, not %d", r.Interface, have.request.MTU, r.MTU)
	}
	return nil
}

func (n *memoryNode) SetAddresses(_ context.Context, podNetns, ifname string, want kernel.Addressing) error {
	if n.addressErr != nil {
		return n.addressErr
	}
	n.addresses[podNetns+"/"+ifname] = want.Addresses
	n.routes[podNetns+"/"+ifname] = want.Routes
	return nil
}

func (n *memoryNode) Addresses(_ context.Context, podNetns, ifname string) ([]netip.Prefix, error) {
	return n.addresses[podNetns+"/"+ifname], nil
}

func (n *memoryNode) Records() ([]segment.Segment, error) {
	return slices.Collect(maps.Values(n.lans)), nil
}

func (n *memoryNode) Underlays(context.Context) (kernel.Underlays, error) { return n.underlays, nil }
