package macvrf

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// MarshalText is for logs.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

func (m MAC) compare(o MAC) int { return bytes.Compare(m[:], o[:]) }

// RD is a route distinguisher in wire format.
type RD [8]byte

// routerRD returns the RD with that number of a router: type 1, an IPv4 address and 16 bits (RFC 4364, 4.2).
func routerRD(router netip.Addr, number uint16) RD {
	rd := RD{1: 1}
	id := router.As4()
	copy(rd[2:], id[:])
	binary.BigEndian.PutUint16(rd[6:], number)
	return rd
}

// Of reports whether the RD is one that this router gives its routes.
func (rd RD) Of(router netip.Addr) bool {
	return rd == routerRD(router, binary.BigEndian.Uint16(rd[6:]))
}

// Target is a route target, an extended community in wire format.
type Target [8]byte

// NewTarget returns the target that FRR derives from a VNI. It has two octets for the AS, so it keeps the lower half of
// a longer one (form_auto_rt in bgpd/bgp_evpn.c).
func NewTarget(as, vni uint32) Target {
	t := Target{1: routeTarget}
	binary.BigEndian.PutUint16(t[2:], uint16(as))
	binary.BigEndian.PutUint32(t[4:], vni)
	return t
}

// routeTarget is the subtype of extended communities that are route targets (RFC 4360).
const routeTarget = 2

// ParseTarget reads AS:number. One of the two may have four octets (65000:222, 4200000000:222).
func ParseTarget(s string) (t Target, err error) {
	first, second, ok := strings.Cut(s, ":")
	as, asErr := strconv.ParseUint(first, 10, 32)
	number, numberErr := strconv.ParseUint(second, 10, 32)
	if !ok || asErr != nil || numberErr != nil || as > 0xffff && number > 0xffff {
		return t, fmt.Errorf("route target %q is not AS:number with at most one of them above 65535", s)
	}
	if as <= 0xffff {
		return NewTarget(uint32(as), uint32(number)), nil
	}
	t = Target{0: 2, 1: routeTarget} // four octets for the AS (RFC 5668)
	binary.BigEndian.PutUint32(t[2:], uint32(as))
	binary.BigEndian.PutUint16(t[6:], uint16(number))
	return t, nil
}

// number returns the number after the AS. ok is false unless the target has two octets for the AS.
func (t Target) number() (number uint32, ok bool) {
	return binary.BigEndian.Uint32(t[4:]), t[0] == 0 && t[1] == routeTarget
}

// RouteType is an EVPN route type.
type RouteType uint8

// The route types that LANs use.
const (
	MACIP     RouteType = 2 // MAC/IP Advertisement: behind which VTEP a MAC is
	Multicast RouteType = 3 // Inclusive Multicast Ethernet Tag: which VTEP gets flooded frames
)

// Key identifies a route: a later one with the same key replaces it (RFC 7432, 7.2 and 7.3).
type Key struct {
	Type RouteType
	RD   RD
	Tag  uint32     // Ethernet tag
	MAC  MAC        // of a MACIP
	IP   netip.Addr // of a MACIP that of the host, or the zero Addr; of a Multicast that of the router
}

func (k Key) compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Type, o.Type), bytes.Compare(k.RD[:], o.RD[:]), cmp.Compare(k.Tag, o.Tag),
		bytes.Compare(k.MAC[:], o.MAC[:]), k.IP.Compare(o.IP))
}

// Route is an EVPN route.
type Route struct {
	Key
	VTEP        netip.Addr // the next hop, of a Multicast the end of the tunnel
	VNI         uint32     // the first label, not shifted
	Targets     []Target
	Unsupported bool   // it is not for VXLAN, or not for ingress replication
	Sequence    uint32 // of MAC mobility; 0 if the route has none
	Sticky      bool   // the MAC must not move
}

// Equal reports whether two routes are the same.
func (r Route) Equal(o Route) bool {
	return r.Key == o.Key && r.VTEP == o.VTEP && r.VNI == o.VNI && slices.Equal(r.Targets, o.Targets) &&
		r.Unsupported == o.Unsupported && r.Sequence == o.Sequence && r.Sticky == o.Sticky
}
