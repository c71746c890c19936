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

// megalos is the type of networks that name a VNI instead of a LAN, in Megalos' words: vxlanId and master. The LAN is on a node as long as a pod is.
const megalos = "megalos"

const (
	maxVNI    = 1<<24 - 1
	maxDevice = 15   // characters (IFNAMSIZ less the final NUL, include/uapi/linux/if.h)
	vxlanPort = 4789 // UDP, IANA's: EVPN tells no other
)

// disabledFile is the file, beside the LANs' folders, that says that no more pods attach to networks of type megalos.
const disabledFile = "megalos-closed"

// EnableMegalos says, in the folder of what lives as long as the node is up, whether pods may attach to networks of type megalos. Who is attached
// stays, and can be detached.
func EnableMegalos(run string, offered bool) error {
	path := filepath.Join(run, disabledFile)
	if offered {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("offer networks of type megalos: %w", err)
		}
		return nil
	}
	if err := errors.Join(os.MkdirAll(run, 0o755), os.WriteFile(path, nil, 0o644)); err != nil {
		return fmt.Errorf("offer no more networks of type megalos: %w", err)
	}
	return nil
}

// checkMegalosEnabled is an error with that code where the node does not.
func (p *Plugin) checkMegalosEnabled(a attachment, code uint) error {
	if _, err := os.Stat(filepath.Join(p.host.Run, disabledFile)); err != nil {
		return nil //nolint:nilerr // most often there is no such file
	}
	return fail(code, "%s: this node takes no more pods on networks of type megalos; set node.megalos in k8slan's chart", a)
}

// netnsOnDemand is the name of the network namespace of the LAN that is made for a VNI.
func netnsOnDemand(vni uint32) string { return fmt.Sprintf("megalos-%d", vni) }

// onDemandAttachment validates what names the attachment in a network of type megalos.
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

// withLAN is the attachment in that LAN.
func (a attachment) withLAN(run, netns string, lan segment.LAN) attachment {
	a.netns, a.netnsPath, a.lan = netns, filepath.Join(run, "netns", netns), lan
	return a
}

// networkMark is that of the network, where a LAN may have several: of type megalos.
func (a attachment) networkMark() string {
	if a.vni == 0 {
		return ""
	}
	return segment.NetworkMark(a.network)
}

// isClaimedBy says whether a claim is of the attachment's network. The two networks of a spoke differ in kind, and each is collected with the attachments
// of its own.
func (a attachment) isClaimedBy(c segment.Claim) bool {
	if a.vni != 0 {
		return segment.IsOnDemand(c.Spoke) && c.Network == a.networkMark()
	}
	return a.matches(c.Spoke) && c.Kind == a.kind
}

// candidates are the attachment in each LAN of the node that it may be in: of a VNI, that which is made for it, and those of objects that have it.
func (p *Plugin) candidates(a attachment) ([]attachment, error) {
	places := []attachment{a}
	if a.vni == 0 {
		return places, nil
	}
	records, err := p.node.Records()
	if err != nil {
		return places, fail(types.ErrIOFailure, "%s: the node's records of LANs: %v", a, err)
	}
	for _, r := range records {
		if r.VXLAN.VNI == a.vni && !r.OnDemand && r.Netns != a.netns {
			places = append(places, a.withLAN(p.host.Run, r.Netns, r.LAN))
		}
	}
	return places, nil
}

// locate is the attachment in the LAN that a pod is to join: an object's before one that is made for the VNI.
func (p *Plugin) locate(a attachment) (attachment, error) {
	places, err := p.candidates(a)
	return places[len(places)-1], err
}

// admitOnDemand says whether a pod may join the LAN that has the VNI.
func (r request) admitOnDemand(record segment.Segment) error {
	switch {
	case record.VXLAN.VNI != r.vni || record.LAN.Namespace != r.lan.Namespace || record.LAN.Name != r.lan.Name:
		return fail(types.ErrTryAgainLater, "%s: network namespace %s is that of LAN %s with VNI %d; choose another spec.ns there, or wait until it has gone",
			r, r.netns, record.LAN, record.VXLAN.VNI)
	case record.Leaving:
		return fail(types.ErrTryAgainLater, "%s is that of LAN %s, which is leaving this node and goes with its last pod; wait until then, or choose another vxlanId",
			r, record.LAN)
	case !record.Allows(r.pod.namespace):
		return fail(CodeForbidden, "%s is that of LAN %s, which is not open to namespace %q; its owner can add that to spec.allowedNamespaces, or choose another vxlanId",
			r, record.LAN, r.pod.namespace)
	case r.mtu > record.MTU:
		return fail(types.ErrInvalidNetworkConfig, "%s: mtu %d is more than the LAN carries: %d", r, r.mtu, record.MTU)
	}
	return nil
}

// onDemandSegment is the LAN that is made for a VNI: joined by EVPN, and open to every namespace.
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
		return segment.Segment{}, fail(CodeAttach, "%s: the node has no default route; name its underlay device as master", a)
	case !found:
		return segment.Segment{}, fail(CodeAttach, "%s: the node has no network device %q; name another as master", a, name)
	case !vtep.IsValid():
		return segment.Segment{}, fail(CodeAttach, "%s: device %q has no address that other nodes could send to; give it one, or name another as master", a, name)
	}
	reserve := segment.Overhead6
	if vtep.Is4() {
		reserve = segment.Overhead4
	}
	if device.MTU-reserve < minMTU {
		return segment.Segment{}, fail(CodeAttach, "%s: device %q has MTU %d, too little for a VXLAN", a, name, device.MTU)
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

// vtepOf is the address that other nodes send to: as with Megalos the first IPv4 address or, where there is none, the first of IPv6.
func vtepOf(device kernel.Underlay) netip.Addr {
	if i := slices.IndexFunc(device.Addresses, netip.Addr.Is4); i >= 0 {
		return device.Addresses[i]
	}
	if len(device.Addresses) > 0 {
		return device.Addresses[0]
	}
	return netip.Addr{}
}

// statusOnDemand says whether the LAN could be made here.
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
