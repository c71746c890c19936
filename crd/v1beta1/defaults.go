package v1beta1

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Resource is the extended resource that kubelet advertises for a spoke or a pool.
func Resource(spoke string) string { return "macvtap.k8slan.io/" + VethNAD(spoke) }

// VethNAD is the name of the NetworkAttachmentDefinition that gives a pod a veth on the spoke or pool.
func VethNAD(spoke string) string { return "k8slan-veth-" + spoke }

// MacvtapNAD is the name of the NetworkAttachmentDefinition that gives a KubeVirt VM a macvtap on the spoke or pool.
func MacvtapNAD(spoke string) string { return "k8slan-mac-" + spoke }

// DiscoveryOr is how the LAN's nodes find each other, where that is the default for LANs that do not say.
func (l *LAN) DiscoveryOr(byDefault Discovery) Discovery {
	return cmp.Or(l.Spec.Discovery, byDefault, Multicast)
}

// Strict says whether the LAN hears its own nodes alone, where that is how they find each other.
func (s *LANSpec) Strict(discovery Discovery) bool {
	if s.StrictPeers != nil {
		return *s.StrictPeers
	}
	return discovery == Unicast
}

// Set reads a way of discovery from a flag.
func (d *Discovery) Set(s string) error {
	switch Discovery(s) {
	case Multicast, Unicast, EVPN:
		*d = Discovery(s)
		return nil
	}
	return fmt.Errorf("discovery is %s, %s or %s, not %q", Multicast, Unicast, EVPN, s)
}

// String is the word in the spec.
func (d *Discovery) String() string { return string(*d) }

// Type names the kind of value in a command's help.
func (d *Discovery) Type() string { return "discovery" }

// Effective is the spec with every value that was left out filled in; it is never written back.
func (l *LAN) Effective() LANSpec {
	s := *l.Spec.DeepCopy()
	if s.NS == "" {
		// A namespace has no dots, so the first dot separates and no two LANs derive the same name.
		s.NS = l.Namespace + "." + l.Name
	}
	if s.Bridge == "" {
		s.Bridge = fmt.Sprintf("br%d", s.VNI)
	}
	if s.VXLAN == "" {
		s.VXLAN = fmt.Sprintf("vx%d", s.VNI)
	}
	if s.VXLANGroup == "" {
		s.VXLANGroup = DefaultGroup
	}
	if s.VXLANPort == 0 {
		s.VXLANPort = DefaultPort
	}
	if s.TxChecksum == "" {
		s.TxChecksum = On
	}
	for i := range s.SpokePools {
		s.SpokePools[i].MACBy = cmp.Or(s.SpokePools[i].MACBy, MACByPort)
	}
	return s
}

// SpokesAndPools are those of the LAN's spokes and pools: what must be unique in the cluster, and what has a resource and NADs.
func (s *LANSpec) SpokesAndPools() []string {
	names := slices.Clone(s.Spokes)
	for _, pool := range s.SpokePools {
		names = append(names, pool.Name)
	}
	return names
}

// Pool finds a pool by its name.
func (s *LANSpec) Pool(name string) (SpokePool, bool) {
	i := slices.IndexFunc(s.SpokePools, func(p SpokePool) bool { return p.Name == name })
	if i < 0 {
		return SpokePool{}, false
	}
	return s.SpokePools[i], true
}

// SpokeOrPool is the name of what kubelet gave to the pod: the spoke or, of a port, its pool.
func (a Attachment) SpokeOrPool() string { return cmp.Or(a.Pool, a.Spoke) }

// OnDemand says whether no LAN object wants the segment: pods made it by naming its VNI.
func (s *SegmentStatus) OnDemand() bool { return s.UID == "" && strings.HasPrefix(s.LAN, "megalos:") }

// TxChecksumOff are the spokes and pools, sorted, whose txChecksum is off: their own word counts before the LAN's.
func (s *LANSpec) TxChecksumOff() []string {
	var off []string
	for _, spoke := range s.SpokesAndPools() {
		if cmp.Or(s.SpokeOptions[spoke].TxChecksum, s.TxChecksum) == Off {
			off = append(off, spoke)
		}
	}
	slices.Sort(off)
	return off
}
