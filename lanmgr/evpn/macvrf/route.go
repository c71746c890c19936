// Package evpn is what a node believes and tells of LANs by EVPN (RFC 7432, RFC 8365): others' routes and the MACs on its own ports
// in; remotes, the MACs behind them and its own routes out. It does no I/O.
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

// MarshalText is how a log shows it.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// RD is a route distinguisher as it is on the wire.
type RD [8]byte

// routerRD is the RD of a router's table of that number: type 1, an IPv4 address and 16 bits (RFC 4364, 4.2).
func routerRD(router netip.Addr, number uint16) RD {
	rd := RD{1: 1}
	id := router.As4()
	copy(rd[2:], id[:])
	binary.BigEndian.PutUint16(rd[6:], number)
	return rd
}

// Of says whether an RD is one that this router makes for its routes.
func (rd RD) Of(router netip.Addr) bool {
	return rd == routerRD(router, binary.BigEndian.Uint16(rd[6:]))
}

// Target is a route target, an extended community as it is on the wire.
type Target [8]byte

// NewTarget is the target that FRR gives a VNI by itself: of two octets for the AS, of which a longer one keeps the lower half
// (form_auto_rt in bgpd/bgp_evpn.c).
func NewTarget(as, vni uint32) Target {
	t := Target{1: routeTarget}
	binary.BigEndian.PutUint16(t[2:], uint16(as))
	binary.BigEndian.PutUint32(t[4:], vni)
	return t
}

// routeTarget is the subtype of extended communities that are route targets (RFC 4360).
const routeTarget = 2

// ParseTarget reads AS:number, of which one may have four octets (65000:222, 4200000000:222).
func ParseTarget(s string) (t Target, err error) {
	first, second, ok := strings.Cut(s, ":")
	as, asErr := strconv.ParseUint(first, 10, 32)
	number, numberErr := strconv.ParseUint(second, 10, 32)
	if !ok || asErr != nil || numberErr != nil || as > 0xffff && number > 0xffff {
		return t, fmt.Errorf("route target %q is not AS:number, of which one may be more than 65535", s)
	}
	if as <= 0xffff {
		return NewTarget(uint32(as), uint32(number)), nil
	}
	t = Target{0: 2, 1: routeTarget} // four octets for the AS (RFC 5668)
	binary.BigEndian.PutUint32(t[2:], uint32(as))
	binary.BigEndian.PutUint16(t[6:], uint16(number))
	return t, nil
}

// number is what stands behind the AS of a target of two octets for the AS.
func (t Target) number() (uint32, bool) {
	return binary.BigEndian.Uint32(t[4:]), t[0] == 0 && t[1] == routeTarget
}

// RouteType is an EVPN route type.
type RouteType uint8

// The kinds of route that matter to a LAN.
const (
	MACIP     RouteType = 2 // where a MAC is
	Multicast RouteType = 3 // who wants what is flooded
)

// Key tells a route from others: a later one with the same key takes its place (RFC 7432, 7.2 and 7.3).
type Key struct {
	Type RouteType
	RD   RD
	Tag  uint32     // Ethernet tag
	MAC  MAC        // of a MACIP
	IP   netip.Addr // of a MACIP the MAC's own, the zero Addr if it tells none; of a Multicast the originator's
}

func (k Key) compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Type, o.Type), bytes.Compare(k.RD[:], o.RD[:]), cmp.Compare(k.Tag, o.Tag),
		bytes.Compare(k.MAC[:], o.MAC[:]), k.IP.Compare(o.IP))
}

// Route is one route of EVPN.
type Route struct {
	Key
	VTEP        netip.Addr // where to send to: the next hop, of a Multicast the end of the tunnel
	VNI         uint32     // the first label, not shifted
	Targets     []Target
	Unsupported bool   // is for another encapsulation than VXLAN, or another way of flooding than one copy to each
	Sequence    uint32 // of MAC mobility; absent is 0
	Sticky      bool   // the MAC shall not move
}

// Equal says whether two routes tell the same.
func (r Route) Equal(o Route) bool {
	return r.Key == o.Key && r.VTEP == o.VTEP && r.VNI == o.VNI && slices.Equal(r.Targets, o.Targets) &&
		r.Unsupported == o.Unsupported && r.Sequence == o.Sequence && r.Sticky == o.Sticky
}
