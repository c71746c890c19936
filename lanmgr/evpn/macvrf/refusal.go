package macvrf

import "fmt"

// Refusal is a route of a LAN that cannot be used.
type Refusal struct {
	Route  Route
	Reason Reason
}

// Reason says why a route cannot be used.
type Reason string

// The reasons.
const (
	OwnVTEP       Reason = "its VTEP is this node's own"
	InvalidVTEP   Reason = "its VTEP is not an address that packets can be sent to"
	OtherFamily   Reason = "its VTEP is of the other IP version"
	OtherVNI      Reason = "its VNI is not that of the LAN"
	Encapsulation Reason = "it is not for VXLAN with ingress replication"
	VLANAware     Reason = "it has an Ethernet tag: it is of a VLAN-aware bundle"
	InvalidMAC    Reason = "its MAC is not one that a host can have"
)

func (r Refusal) String() string {
	what := fmt.Sprintf("the route of type %d from VTEP %s", r.Route.Type, r.Route.VTEP)
	if r.Route.Type == MACIP {
		what += " for " + r.Route.MAC.String()
	}
	return fmt.Sprintf("%s is not used: %s", what, r.Reason)
}

// refusalReason returns why a route cannot be used, or the empty string if it can.
func (l *lan) refusalReason(r Route) Reason {
	v := r.VTEP
	switch {
	case !v.IsValid(), v.IsUnspecified(), v.IsMulticast(), v.IsLoopback(), v.IsLinkLocalUnicast(), v.Zone() != "":
		return InvalidVTEP
	case v == l.VTEP:
		return OwnVTEP
	case v.BitLen() != l.VTEP.BitLen() || v.Is4In6():
		return OtherFamily
	case r.Unsupported:
		return Encapsulation
	case r.VNI != l.VNI:
		return OtherVNI
	case r.Tag != 0:
		return VLANAware
	case r.Type == MACIP && (r.MAC == MAC{} || r.MAC[0]&1 != 0):
		return InvalidMAC
	}
	return ""
}
