package v1beta1

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Resource returns the name of the extended resource of a spoke or pool.
func Resource(spoke string) string { return "macvtap.k8slan.io/" + VethNAD(spoke) }

// VethNAD returns the name of the NetworkAttachmentDefinition that attaches a pod to the spoke or pool by a veth.
func VethNAD(spoke string) string { return "k8slan-veth-" + spoke }

// MacvtapNAD returns the name of the NetworkAttachmentDefinition that attaches a KubeVirt VM to the spoke or pool by a
// macvtap.
func MacvtapNAD(spoke string) string { return "k8slan-mac-" + spoke }

// DiscoveryOr returns the spec's discovery or, without it, byDefault or, if that is empty too, multicast.
func (l *LAN) DiscoveryOr(byDefault Discovery) Discovery {
	return cmp.Or(l.Spec.Discovery, byDefault, Multicast)
}

// Strict says whether nodes drop the LAN's VXLAN packets from non-members, given the LAN's discovery.
func (s *LANSpec) Strict(discovery Discovery) bool {
	if s.StrictPeers != nil {
		return *s.StrictPeers
	}
	return discovery == Unicast
}

// Set parses the value of a flag. It is part of pflag.Value, as are String and Type.
func (d *Discovery) Set(s string) error {
	switch Discovery(s) {
	case Multicast, Unicast, EVPN:
		*d = Discovery(s)
		return nil
	}
	return fmt.Errorf("discovery must be %s, %s or %s, not %q", Multicast, Unicast, EVPN, s)
}

// String returns the value as it is in a spec.
func (d *Discovery) String() string { return string(*d) }

// Type returns the name of the flag's type in a command's help.
func (d *Discovery) Type() string { return "discovery" }

// Effective returns the spec with defaults in place of missing values. It is never written back to the LAN.
func (l *LAN) Effective() LANSpec {
	s := *l.Spec.DeepCopy()
	if s.NS == "" {
		// A namespace has no dots, so the first dot separates it from the name, and no two LANs get the same ns.
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

// SpokesAndPools returns the names of the LAN's spokes and pools. Each must be unique in the cluster, and has a
// resource and a pair of NADs.
func (s *LANSpec) SpokesAndPools() []string {
	names := slices.Clone(s.Spokes)
	for _, pool := range s.SpokePools {
		names = append(names, pool.Name)
	}
	return names
}

// Pool returns the pool of that name and whether there is one.
func (s *LANSpec) Pool(name string) (SpokePool, bool) {
	i := slices.IndexFunc(s.SpokePools, func(p SpokePool) bool { return p.Name == name })
	if i < 0 {
		return SpokePool{}, false
	}
	return s.SpokePools[i], true
}

// SpokeOrPool returns the spoke's name or, for a port of a pool, the pool's name. It names the resource that kubelet
// allocated.
func (a Attachment) SpokeOrPool() string { return cmp.Or(a.Pool, a.Spoke) }

// OnDemand says whether the segment has no LAN object and exists because pods named its VNI.
func (s *SegmentStatus) OnDemand() bool { return s.UID == "" && strings.HasPrefix(s.LAN, "megalos:") }

// TxChecksumOff returns the names of the spokes and pools whose txChecksum is off, sorted. Their own setting overrides
// that of the LAN.
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
