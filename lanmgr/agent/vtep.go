package agent

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

const hostnameLabel = "kubernetes.io/hostname"

// underlayChoice is a device, and the field of the spec that names it.
type underlayChoice struct {
	name   string
	field  string // empty if no field does
	device kernel.Underlay
	found  bool // the node has the device
}

// chooseUnderlay chooses the device that the LAN names for this node, else the LAN's default, else the one with the
// best VTEP, else that of the default route.
func (pl *planner) chooseUnderlay() {
	choice := underlayOf(&pl.spec, pl.node)
	if choice.field == "" {
		choice.name = pl.selector.bestDevice(pl.node.Underlays.Devices, pl.have.VXLAN)
		if choice.name == "" && !pl.selector.strict {
			choice.name = pl.node.Underlays.Default
		}
	}
	choice.device, choice.found = pl.node.Underlays.Devices[choice.name]
	pl.underlay = choice
	pl.plan.Segment.VXLAN.Underlay = choice.name
}

// underlayOf returns the device that the spec names for the node.
func underlayOf(spec *v1beta1.LANSpec, node Node) underlayChoice {
	for _, key := range []string{node.Name, node.Labels[hostnameLabel]} {
		if device, ok := spec.VXLANDevMap[key]; ok && key != "" {
			return underlayChoice{name: string(device), field: "spec.vxlanDevMap." + key}
		}
	}
	if spec.DefaultVXLANDev != "" {
		return underlayChoice{name: string(spec.DefaultVXLANDev), field: "spec.defaultVxlanDev"}
	}
	return underlayChoice{}
}

// setVTEP sets the VXLAN's group or source address, and the VTEP that results.
func (pl *planner) setVTEP() {
	device, vxlan := pl.underlay.device, &pl.plan.Segment.VXLAN
	switch {
	case !pl.usesGroup():
		pl.plan.VTEP = pl.selector.choose(device, pl.have.VXLAN)
		vxlan.Local = pl.plan.VTEP
	case pl.group.Is4():
		vxlan.Group, pl.plan.VTEP = pl.group, device.IPv4
	default:
		vxlan.Group, pl.plan.VTEP = pl.group, device.IPv6
		if source := keptSource(device, pl.have.VXLAN); source.IsValid() {
			vxlan.Local, pl.plan.VTEP = source, source
		}
	}
}

// keptSource returns the source address that a VXLAN over IPv6 had with discovery unicast. It keeps that when it gets a
// group. Without it, its source would be the device's link-local address, to which the other nodes could not send: they
// learn that a MAC has moved to another address, but not by which device a link-local address is reached (vxlan_snoop
// in drivers/net/vxlan/vxlan_core.c).
func keptSource(device kernel.Underlay, have segment.VXLAN) netip.Addr {
	sameDevice := have.UnderlayIndex == device.Index
	if have.Local.Is6() && sameDevice && slices.Contains(candidates(device, have), have.Local) {
		return have.Local
	}
	return netip.Addr{}
}

// candidates returns the addresses of a device that other nodes could send to. A link-local address is none: only the
// kernel knows by which device to send to it. A device without link has lost its IPv6 addresses, and checks whether
// they are duplicates when the link is back. So the node keeps the address that it had while the device has no other of
// that family.
func candidates(device kernel.Underlay, have segment.VXLAN) []netip.Addr {
	had := have.Local.IsValid() && device.Index != 0 && have.UnderlayIndex == device.Index
	sameFamily := func(a netip.Addr) bool { return a.Is4() == have.Local.Is4() }
	if had && !slices.ContainsFunc(device.Addresses, sameFamily) {
		return append(slices.Clone(device.Addresses), have.Local)
	}
	return device.Addresses
}

// vtepSelector chooses which address of a device other nodes send to.
type vtepSelector struct {
	family netip.Addr     // an address of the required family; the zero Addr: either family
	prefer []netip.Prefix // the most preferred range first
	strict bool           // addresses outside these ranges are not used
}

// selectVTEP sets the selector. It prefers the cluster's ranges of VTEPs, which decide the family, too; without them,
// and without a group, it prefers the node's InternalIPs. A default group requires no family from a LAN that does not
// use it.
func (pl *planner) selectVTEP(groupInSpec bool) {
	if len(pl.node.VTEPs) > 0 {
		pl.selector = vtepSelector{prefer: pl.node.VTEPs, strict: true}
		return
	}
	s := vtepSelector{family: pl.group}
	if !pl.usesGroup() {
		if !groupInSpec {
			s.family = netip.Addr{}
		}
		for _, a := range pl.node.Addresses {
			if s.fits(a) {
				s.prefer = append(s.prefer, netip.PrefixFrom(a, a.BitLen()))
			}
		}
	}
	pl.selector = s
}

func (s vtepSelector) fits(a netip.Addr) bool {
	return !s.family.IsValid() || s.family.Is4() == a.Is4()
}

// rank returns the index of the first range that has the address, or the number of ranges if none has.
func (s vtepSelector) rank(a netip.Addr) int {
	if i := slices.IndexFunc(s.prefer, func(p netip.Prefix) bool { return p.Contains(a) }); i >= 0 {
		return i
	}
	return len(s.prefer)
}

// choose returns the device's best address, or the zero Addr. Ranks decide first, then IPv4 is better than IPv6, then
// the address that the node had is better than the device's first: the kernel lists a new IPv6 address before the
// others.
func (s vtepSelector) choose(device kernel.Underlay, have segment.VXLAN) (best netip.Addr) {
	better := func(a, b netip.Addr) bool {
		switch {
		case !b.IsValid() || s.rank(a) != s.rank(b):
			return !b.IsValid() || s.rank(a) < s.rank(b)
		case a.Is4() != b.Is4():
			return a.Is4()
		}
		return a == have.Local
	}
	for _, a := range candidates(device, have) {
		if s.fits(a) && !(s.strict && s.rank(a) == len(s.prefer)) && better(a, best) {
			best = a
		}
	}
	return best
}

// bestDevice returns the device whose VTEP is in the best range, or "" if none is in a range.
func (s vtepSelector) bestDevice(devices map[string]kernel.Underlay, have segment.VXLAN) string {
	best, name := len(s.prefer), ""
	for _, device := range slices.Sorted(maps.Keys(devices)) {
		if rank := s.rank(s.choose(devices[device], have)); rank < best {
			best, name = rank, device
		}
	}
	return name
}

// String lists the ranges.
func (s vtepSelector) String() string {
	var ranges []string
	for _, p := range s.prefer {
		ranges = append(ranges, p.String())
	}
	return strings.Join(ranges, ", ")
}
