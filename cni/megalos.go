package cni

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// megalos is the type of networks that name a VNI instead of a LAN, with the keys of Megalos: vxlanId and master.
// Such a LAN is on a node while pods are attached to it there.
const megalos = "megalos"

const (
	maxVNI    = 1<<24 - 1
	maxDevice = 15   // characters (IFNAMSIZ less the final NUL, include/uapi/linux/if.h)
	vxlanPort = 4789 // UDP, assigned by IANA: EVPN routes carry no other
)

// disabledFile is a file in k8slan's run folder. While it exists, no more pods attach to networks of type megalos.
const disabledFile = "megalos-closed"

// EnableMegalos records in the run folder whether pods may attach to networks of type megalos. Pods that are attached
// stay attached, and can be detached.
func EnableMegalos(run string, enabled bool) error {
	path := filepath.Join(run, disabledFile)
	if enabled {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("enable networks of type megalos: %w", err)
		}
		return nil
	}
	if err := errors.Join(os.MkdirAll(run, 0o755), os.WriteFile(path, nil, 0o644)); err != nil {
		return fmt.Errorf("disable networks of type megalos: %w", err)
	}
	return nil
}

// checkMegalosEnabled returns an error with the code if this node takes no more pods on networks of type megalos.
func (p *Plugin) checkMegalosEnabled(a attachment, code uint) error {
	if _, err := os.Stat(filepath.Join(p.host.Run, disabledFile)); err != nil {
		return nil //nolint:nilerr // usually there is no such file
	}
	return fail(code, "%s: networks of type megalos are disabled on this node; set node.megalos in k8slan's chart", a)
}

// netnsOnDemand returns the name of a VNI's network namespace.
func netnsOnDemand(vni uint32) string { return fmt.Sprintf("megalos-%d", vni) }

// onDemandAttachment validates the keys of a network of type megalos and fills in the attachment.
func (a attachment) onDemandAttachment(w netConf, run string) (attachment, error) {
	switch {
	case w.VXLANID == nil:
		return a, invalid("vxlanId", "", "")
	case *w.VXLANID == 0 || *w.VXLANID > maxVNI:
		return a, invalid("vxlanId", fmt.Sprint(*w.VXLANID), "is not a VNI: 1 to %d", maxVNI)
	case w.Master != "" && (!isPathElement(w.Master) || len(w.Master) > maxDevice):
		return a, invalid("master", w.Master, "is not the name of a network device")
	}
	a.vni, a.master, a.kind, a.pool = *w.VXLANID, w.Master, segment.Veth, ""
	a.spoke = segment.SpokeOnDemand(a.claimID)
	a = a.withLAN(run, netnsOnDemand(a.vni), segment.LAN{Name: fmt.Sprintf("megalos:%d", a.vni)})
	var err error
	a.ipam, err = a.ipamType(w)
	return a, err
}

// withLAN returns the attachment in the given LAN.
func (a attachment) withLAN(run, netns string, lan segment.LAN) attachment {
	a.netns, a.netnsPath, a.lan = netns, filepath.Join(run, "netns", netns), lan
	return a
}

// networkMark returns the mark that a claim has of its network. Only networks of type megalos need one, because several
// of them can name one VNI.
func (a attachment) networkMark() string {
	if a.vni == 0 {
		return ""
	}
	return segment.NetworkMark(a.network)
}

// isOfNetwork reports whether a claim belongs to the attachment's network. The two networks of a spoke differ in kind.
func (a attachment) isOfNetwork(c segment.Claim) bool {
	if a.vni != 0 {
		return segment.IsOnDemand(c.Spoke) && c.Network == a.networkMark()
	}
	return a.matches(c.Spoke) && c.Kind == a.kind
}

// candidates returns one copy of the attachment for each LAN on this node that it may belong to. For a VNI these are
// the segment on demand and, after it, the LAN objects with that VNI.
func (p *Plugin) candidates(a attachment) ([]attachment, error) {
	candidates := []attachment{a}
	if a.vni == 0 {
		return candidates, nil
	}
	records, err := p.node.Records()
	if err != nil {
		return candidates, fail(types.ErrIOFailure, "%s: the node's records of LANs: %v", a, err)
	}
	for _, r := range records {
		if r.VXLAN.VNI == a.vni && !r.OnDemand && r.Netns != a.netns {
			candidates = append(candidates, a.withLAN(p.host.Run, r.Netns, r.LAN))
		}
	}
	return candidates, nil
}

// locate returns the attachment in the LAN that a pod joins: a LAN object with the VNI, else the segment on demand.
func (p *Plugin) locate(a attachment) (attachment, error) {
	candidates, err := p.candidates(a)
	return candidates[len(candidates)-1], err
}

// admitOnDemand returns an error if a pod may not join the LAN that has the VNI.
func (r request) admitOnDemand(record segment.Segment) error {
	switch {
	case record.VXLAN.VNI != r.vni || record.LAN.Namespace != r.lan.Namespace || record.LAN.Name != r.lan.Name:
		return fail(types.ErrTryAgainLater, "%s: network namespace %s belongs to LAN %s with VNI %d; "+
			"choose another spec.ns there, or wait until that LAN is removed", r, r.netns, record.LAN, record.VXLAN.VNI)
	case record.Leaving:
		return fail(types.ErrTryAgainLater, "%s belongs to LAN %s, which is leaving this node with its last pod; "+
			"wait until then, or choose another vxlanId", r, record.LAN)
	case !record.Allows(r.pod.namespace):
		return fail(CodeForbidden, "%s belongs to LAN %s, which is not open to namespace %q; "+
			"its owner can add that to spec.allowedNamespaces, or choose another vxlanId",
			r, record.LAN, r.pod.namespace)
	case r.mtu > record.MTU:
		return fail(types.ErrInvalidNetworkConfig, "%s: mtu %d is more than the LAN carries: %d", r, r.mtu, record.MTU)
	}
	return nil
}

// onDemandSegment returns the desired state of a VNI's segment on demand: with EVPN, and open to every namespace.
func (p *Plugin) onDemandSegment(ctx context.Context, a attachment) (segment.Segment, error) {
	underlays, err := p.node.Underlays(ctx)
	if err != nil {
		return segment.Segment{}, fail(CodeAttach, "%s: the node's network devices: %v", a, err)
	}
	name := cmp.Or(a.master, underlays.Default)
	device, found := underlays.Devices[name]
	vtep := vtepOf(device)
	switch {
	case name == "":
		return segment.Segment{}, fail(CodeAttach,
			"%s: the node has no default route; name its underlay device as master", a)
	case !found:
		return segment.Segment{}, fail(CodeAttach,
			"%s: the node has no network device %q; name another as master", a, name)
	case !vtep.IsValid():
		return segment.Segment{}, fail(CodeAttach, "%s: device %q has no address that other nodes could send to; "+
			"add one, or name another device as master", a, name)
	}
	reserve := segment.Overhead6
	if vtep.Is4() {
		reserve = segment.Overhead4
	}
	if device.MTU-reserve < minMTU {
		return segment.Segment{}, fail(CodeAttach,
			"%s: device %q has MTU %d, too little for a VXLAN", a, name, device.MTU)
	}
	return segment.Segment{
		LAN: a.lan, Netns: a.netns, Bridge: fmt.Sprintf("br%d", a.vni), MTU: device.MTU - reserve,
		VXLAN: segment.VXLAN{
			Name: fmt.Sprintf("vx%d", a.vni), VNI: a.vni, Port: vxlanPort, Local: vtep,
			Underlay: name, UnderlayIndex: device.Index, NoLearning: true,
		},
		AllowedNamespaces: []string{"*"}, OnDemand: true,
	}, nil
}

// vtepOf returns the device's first IPv4 address or, without one, its first IPv6 address, as Megalos does.
func vtepOf(device kernel.Underlay) netip.Addr {
	if i := slices.IndexFunc(device.Addresses, netip.Addr.Is4); i >= 0 {
		return device.Addresses[i]
	}
	if len(device.Addresses) > 0 {
		return device.Addresses[0]
	}
	return netip.Addr{}
}

// statusOnDemand answers STATUS for a network of type megalos: whether its segment could be built here.
func (p *Plugin) statusOnDemand(ctx context.Context, a attachment) error {
	if err := p.checkMegalosEnabled(a, types.ErrPluginNotAvailable); err != nil {
		return err
	}
	if _, err := p.onDemandSegment(ctx, a); err != nil {
		return fail(types.ErrPluginNotAvailable, "%v", err)
	}
	if a.ipam == "" {
		return nil
	}
	_, err := a.delegate(ctx, "STATUS")
	return err
}
