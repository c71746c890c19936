// Package segment describes a LAN as one node must build it, without touching the node.
package segment

import (
	"net/netip"
	"slices"
)

// LAN identifies a LAN object.
type LAN struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
}

// String returns namespace/name, or only the name if the segment has no LAN object.
func (l LAN) String() string {
	if l.Namespace == "" {
		return l.Name
	}
	return l.Namespace + "/" + l.Name
}

// Segment is the desired state of a LAN on one node.
type Segment struct {
	LAN        LAN   `json:"lan"`
	Generation int64 `json:"generation"` // of the LAN object

	Netns  string `json:"netns"`  // file name of the network namespace
	Bridge string `json:"bridge"` // link name
	MTU    int    `json:"mtu"`    // bytes, of every link in the segment
	VXLAN  VXLAN  `json:"vxlan"`

	Spokes            []string `json:"spokes"`                  // with the ports of pools
	TxChecksumOff     []string `json:"txChecksumOff,omitempty"` // sorted: spokes whose frames have complete checksums
	MACByOrdinal      []string `json:"macByOrdinal,omitempty"`  // sorted: pools whose pods have MACs by their ordinals
	Node              string   `json:"node,omitempty"`          // its name, for the MACs of ports; empty without a pool
	AllowedNamespaces []string `json:"allowedNamespaces,omitempty"`
	OnDemand          bool     `json:"onDemand,omitempty"` // it has no LAN object, and exists while it has claims
	Leaving           bool     `json:"leaving,omitempty"`  // not wanted; it stays until its last claim ends

	Routes Routes `json:"routes,omitzero"`

	// The fields below are not in the record: only the daemon, which watches other nodes, knows them.

	// Remotes are the other nodes of the LAN, sorted, if the VXLAN has no group; nil: not known, the present ones stay.
	Remotes []netip.Addr `json:"-"`
	// FDB has the remotes of MACs, sorted by MAC, if the VXLAN does not learn; nil: not known, the present entries
	// stay.
	FDB []FDBEntry `json:"-"`
	// Neighbors has the MACs of IP addresses on other nodes, sorted by address, if VXLAN.SuppressNeighbors; nil: not
	// known, the present ones stay.
	Neighbors []Neighbor `json:"-"`
	// Partial is set if Remotes, FDB and Neighbors may lack entries: no present one is deleted.
	Partial bool `json:"-"`
}

// VXLAN is the link that carries the LAN to other nodes.
type VXLAN struct {
	Name string `json:"name"`
	VNI  uint32 `json:"vni"`
	Port uint16 `json:"port"` // UDP
	// Group is a multicast address, IPv4 or IPv6; the zero Addr if flooded frames go to each remote.
	Group netip.Addr `json:"group"`
	// Local is the source of its packets; with the zero Addr the node's routes choose it.
	Local    netip.Addr `json:"local,omitzero"`
	Underlay string     `json:"underlay"`
	// NoLearning switches data-plane learning off: the FDB is set from outside.
	NoLearning bool `json:"noLearning,omitempty"`
	// SuppressNeighbors has the bridge answer ARP and neighbor discovery for the hosts in Neighbors.
	SuppressNeighbors bool `json:"suppressNeighbors,omitempty"`
	// UnderlayIndex is the ifindex of the underlay in the node's own netns. If it is 0, the node has no such device,
	// and no VXLAN is created.
	UnderlayIndex int `json:"underlayIndex"`
}

// Routes sets how a LAN's EVPN routes are identified, where that is not the default.
type Routes struct {
	Import []string `json:"import,omitempty"` // route targets, as AS:number
	Export []string `json:"export,omitempty"`
	RD     uint16   `json:"rd,omitempty"` // the number in the route distinguisher; 0: any
}

// Equal reports whether two are the same.
func (r Routes) Equal(o Routes) bool {
	return slices.Equal(r.Import, o.Import) && slices.Equal(r.Export, o.Export) && r.RD == o.RD
}

// Equal reports whether two segments are the same desired state. An unknown table is not the same as an empty one.
func (s Segment) Equal(o Segment) bool {
	return s.LAN == o.LAN && s.Generation == o.Generation &&
		s.Netns == o.Netns && s.Bridge == o.Bridge && s.MTU == o.MTU && s.VXLAN == o.VXLAN &&
		slices.Equal(s.Spokes, o.Spokes) && slices.Equal(s.TxChecksumOff, o.TxChecksumOff) &&
		slices.Equal(s.MACByOrdinal, o.MACByOrdinal) && s.Node == o.Node &&
		slices.Equal(s.AllowedNamespaces, o.AllowedNamespaces) &&
		s.OnDemand == o.OnDemand && s.Leaving == o.Leaving && s.Routes.Equal(o.Routes) &&
		sameTable(s.Remotes, o.Remotes) && sameTable(s.FDB, o.FDB) && sameTable(s.Neighbors, o.Neighbors) &&
		s.Partial == o.Partial
}

func sameTable[E comparable](a, b []E) bool {
	return (a == nil) == (b == nil) && slices.Equal(a, b)
}

// Recorded returns what the record has of a segment.
func (s Segment) Recorded() Segment {
	s.Remotes, s.FDB, s.Neighbors, s.Partial = nil, nil, nil, false
	return s
}

// Unicast reports whether the VXLAN sends flooded frames to each remote.
func (v VXLAN) Unicast() bool { return !v.Group.IsValid() && v.Local.IsValid() }

// Allows reports whether pods of the namespace may attach.
func (s Segment) Allows(namespace string) bool {
	return namespace == s.LAN.Namespace ||
		slices.Contains(s.AllowedNamespaces, namespace) ||
		slices.Contains(s.AllowedNamespaces, "*")
}

// Overhead4 and Overhead6 are the bytes that a VXLAN over IPv4 and IPv6 adds to a packet of the LAN: inner Ethernet
// with two VLAN tags, VXLAN, UDP and IP.
const (
	Overhead4 = 58
	Overhead6 = 78
)
