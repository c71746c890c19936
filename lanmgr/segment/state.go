package segment

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// State is a segment as the node's kernel has it.
type State struct {
	Netns     string
	Exists    bool     // its network namespace has its name
	LostName  bool     // the name is gone or means something else, but the namespace itself is still in hand
	StaleName bool     // the file of its name is there, but no namespace
	Silent    bool     // IPv6, but for single links', and bridge netfilter are off in it
	Record    *Segment // what the node last wanted here; nil where there is none that can be read
	Links     []Link   // everything in the namespace but lo
}

// Link is one link as the kernel has it, in the terms that matter to a LAN.
type Link struct {
	Index     int
	Name      string
	AltNames  []string
	Alias     string
	Type      string // "bridge", "vxlan", "veth", …
	MAC       net.HardwareAddr
	MTU       int
	Up        bool
	IPv6      bool // is on
	NoIPv6    bool // gives itself no IPv6 address where it is on, and so says nothing
	LacksIPv6 bool // has nothing that could be on: the kernel is without IPv6, or the MTU too small for it
	Master    int  // ifindex of its bridge; 0 for none
	Promisc   int  // how many ask it to be promiscuous; at least 1 while a macvtap on it is up

	ForwardMask uint16      // of a bridge port: which of 01-80-C2-00-00-0X pass
	Suppress    bool        // of a bridge port: ARP and neighbour discovery that the bridge can answer are not sent by it
	Neighbors   []Neighbor  // of a bridge, that it was told, sorted by address; read only where MayHaveNeighbors
	NoLearning  bool        // of a bridge port: what arrives by it teaches the bridge nothing
	Bridge      BridgeState // of a bridge
	VXLAN       VXLANState  // of a VXLAN
	Learned     int         // of a bridge: how many addresses it has learnt; -1 where the kernel does not count them
	TxChecksum  TxChecksum  // asked only where the record has the spoke in TxChecksumOff
}

// TxChecksum says whether frames may leave by a link with checksums, and the cutting into frames of the MTU, left to
// the hardware: a veth has none, so whoever reads the frame raw at the other end finds it unfinished.
type TxChecksum int

// The settings of a link. One that is neither wholly off nor wholly on is TxChecksumMixed.
const (
	TxChecksumUnknown TxChecksum = iota
	TxChecksumOn
	TxChecksumMixed
	TxChecksumOff
)

// BridgeState is what of a bridge's own settings could make a LAN less than transparent.
type BridgeState struct{ STP, VLANFiltering, MulticastSnooping bool }

// VXLANState is where a VXLAN sends to, and how.
type VXLANState struct {
	VNI           uint32
	Port          uint16
	Group         netip.Addr
	Local         netip.Addr
	Remotes       []netip.Addr // who gets what is flooded, sorted, the group aside; read only where MayHaveRemotes
	FDB           []FDBState   // which MACs it has been told, sorted; read where Remotes are
	NoLearning    bool
	UnderlayIndex int // as the node's own netns counts
}

// MACEntry is where a segment has a MAC: on a port of its own bridge, or behind a VTEP.
type MACEntry struct {
	MAC      string        // as text
	Spoke    string        // by whose port it speaks; empty behind a VTEP
	VTEP     netip.Addr    // behind which it is; the zero Addr on a port
	LastSeen time.Duration // on a port, how long ago it spoke last
}

// Neighbor says which MAC has an address.
type Neighbor struct {
	IP  netip.Addr
	MAC [6]byte
}

// MayHaveNeighbors says whether it has to be asked which neighbours its bridge was told. The port's setting and IPv6 are switched on before the first
// comes, and off after the last has gone.
func (s State) MayHaveNeighbors() bool {
	return s.Record != nil && s.Record.VXLAN.SuppressNeighbors || slices.ContainsFunc(s.Links, func(l Link) bool { return l.Suppress || l.Type == "bridge" && l.IPv6 })
}

// FDBEntry says behind which VTEP a MAC is.
type FDBEntry struct {
	MAC   [6]byte
	VTEP  netip.Addr
	Local bool // of a wish: the MAC was on a port here before, and what the bridge has of that gives way
}

// FDBState is an entry as the kernel has it: one half in the VXLAN's own table, one in the bridge's. A half may be missing: the
// bridge's is wherever the MAC was seen last.
type FDBState struct {
	FDBEntry      // the zero Addr: the VXLAN does not have it
	Bridge   bool // the bridge has it on the VXLAN's port
}

// MayHaveRemotes says whether it has to be asked which remotes a VXLAN has. With a group it has none, unless a change from
// remotes to a group was broken off: the record is written at the end of that.
func (s State) MayHaveRemotes(l Link) bool {
	return l.Type == "vxlan" && (!l.VXLAN.Group.IsValid() || s.Record == nil || !s.Record.VXLAN.Group.IsValid())
}

// ForwardMask lets every link-local frame pass a port but PAUSE (01-80-C2-00-00-01), which the kernel never
// lets a bridge forward (BR_GROUPFWD_MACPAUSE in net/bridge/br_private.h).
const ForwardMask = 0xFFFD

// Link finds a link by its name.
func (s State) Link(name string) (Link, bool) {
	i := slices.IndexFunc(s.Links, func(l Link) bool { return l.Name == name })
	if i < 0 {
		return Link{}, false
	}
	return s.Links[i], true
}

// Spoke is the spoke that a link attaches: one of its standing pair, or a pod's.
func (l Link) Spoke() (spoke string, ok bool) {
	if spoke, _, ok = spokeOf(l.Name); ok {
		return spoke, true
	}
	c, ok := l.claim()
	return c.Spoke, ok
}

// Carrier is the link that carries a spoke's frames now.
func (s State) Carrier(spoke string) (Link, bool) {
	i := slices.IndexFunc(s.Links, func(l Link) bool { return l.answersTo(spoke) })
	if i < 0 {
		return Link{}, false
	}
	return s.Links[i], true
}

// answersTo says whether the link has that name, or has it as an altname.
func (l Link) answersTo(name string) bool { return l.Name == name || slices.Contains(l.AltNames, name) }

// Claims are the pods' holds on spokes, in the order of the spokes' names.
// A claim link that neither answers to its spoke's name nor is up is left from an attach that never finished, and no
// claim: to set it up is an attach's last step. One that is up has had its altname taken away since.
func (s State) Claims() []Claim {
	var claims []Claim
	for _, l := range s.Links {
		if c, ok := l.claim(); ok && (c.Kind == Macvtap || l.answersTo(c.Spoke) || l.Up) {
			claims = append(claims, c)
		}
	}
	slices.SortFunc(claims, func(a, b Claim) int { return strings.Compare(a.Spoke+" "+a.ID, b.Spoke+" "+b.ID) })
	return claims
}

// claim reads the claim that a link stands for: a veth is named by it, a plug has it as an altname.
func (l Link) claim() (Claim, bool) {
	if IsClaimID(l.Name) && l.Type == "veth" {
		c, ok := ParseAlias(l.Name, l.Alias)
		return c, ok && c.Kind == Veth
	}
	spoke, port, ok := spokeOf(l.Name)
	if !ok || port {
		return Claim{}, false
	}
	i := slices.IndexFunc(l.AltNames, IsClaimID)
	if i < 0 {
		return Claim{}, false
	}
	c, ok := ParseAlias(l.AltNames[i], l.Alias)
	if !ok {
		c = Claim{ID: l.AltNames[i]} // killed between its two steps: a claim of nobody, until Settle finds out
	}
	c.Kind, c.Spoke = Macvtap, spoke
	return c, true
}
