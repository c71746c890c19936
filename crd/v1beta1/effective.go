package v1beta1

import (
	"cmp"
	"fmt"
	"slices"
)

// Resource is the extended resource that kubelet advertises for a spoke.
func Resource(spoke string) string { return "macvtap.k8slan.io/" + VethNAD(spoke) }

// VethNAD is the name of the NetworkAttachmentDefinition that gives a pod a veth on the spoke.
func VethNAD(spoke string) string { return "k8slan-veth-" + spoke }

// MacvtapNAD is the name of the NetworkAttachmentDefinition that gives a KubeVirt VM a macvtap on the spoke.
func MacvtapNAD(spoke string) string { return "k8slan-mac-" + spoke }

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
	return s
}

// TxChecksumOff are the spokes, sorted, whose txChecksum is off: their own word counts before the LAN's.
func (s *LANSpec) TxChecksumOff() []string {
	var off []string
	for _, spoke := range s.Spokes {
		if cmp.Or(s.SpokeOptions[spoke].TxChecksum, s.TxChecksum) == Off {
			off = append(off, spoke)
		}
	}
	slices.Sort(off)
	return off
}
