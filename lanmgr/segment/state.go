package segment

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// State is a segment as the kernel has it.
type State struct {
	Netns     string
	Exists    bool     // the network namespace exists under its name
	LostName  bool     // the daemon holds the namespace open, but its name is gone or means something else
	StaleName bool     // the file of the name exists, but no namespace
	Silent    bool     // IPv6, except on single links, and bridge netfilter are off in it
	Record    *Segment // the recorded desired state; nil: no record can be read
	Links     []Link   // everything in the namespace but lo
}

// Link is one link as the kernel has it, as far as it matters to a LAN.
type Link struct {
	Index     int
	Name      string
	AltNames  []string
	Alias     string
	Type      string // "bridge", "vxlan", "veth", …
	MAC       net.HardwareAddr
	MTU       int
	Up        bool
	IPv6      bool // IPv6 is on
	NoIPv6    bool // with IPv6 on it has no IPv6 address of its own, and so sends nothing
	LacksIPv6 bool // IPv6 cannot be on: the kernel is without it, or the MTU is too small
	Master    int  // ifindex of its bridge; 0 for none
	Promisc   int  // how many users need it promiscuous; at least 1 while a macvtap on it is up

	ForwardMask uint16      // of a bridge port: which of 01-80-C2-00-00-0X it forwards
	Suppress    bool        // of a bridge port: ARP and neighbor discovery that the bridge can answer do not go out
	Neighbors   []Neighbor  // of a bridge: those set from outside, sorted by address; read only if MayHaveNeighbors
	NoLearning  bool        // of a bridge port: the bridge learns no MACs from its frames
	Bridge      BridgeState // of a bridge
	VXLAN       VXLANState  // of a VXLAN
	Learned     int         // of a bridge: number of learned MACs; -1 if the kernel does not count them
	TxChecksum  TxChecksum  // read only for spokes in the record's TxChecksumOff
}

// TxChecksum says whether frames may leave by a link with incomplete checksums and longer than the MTU, for hardware to
// complete. A veth has no hardware, so a program that reads such a frame raw at the other end finds it incomplete.
type TxChecksum int

// The settings of a link. One that is neither wholly off nor wholly on is TxChecksumMixed.
const (
	TxChecksumUnknown TxChecksum = iota
	TxChecksumOn
	TxChecksumMixed
	TxChecksumOff
)

// BridgeState has the settings of a bridge that could keep a LAN from being transparent.
type BridgeState struct{ STP, VLANFiltering, MulticastSnooping bool }

// VXLANState says where a VXLAN sends packets, and how.
type VXLANState struct {
	VNI           uint32
	Port          uint16
	Group         netip.Addr
	Local         netip.Addr
	Remotes       []netip.Addr // which receive flooded frames, sorted, without the group; read only if MayHaveRemotes
	FDB           []FDBState   // entries set from outside, sorted by MAC; read if Remotes are
	NoLearning    bool
	UnderlayIndex int // ifindex in the node's own netns
}

// MACEntry says where a segment has a MAC: on a port of its own bridge, or behind a VTEP.
type MACEntry struct {
	MAC      string        // as text
	Spoke    string        // of the port; empty behind a VTEP
	VTEP     netip.Addr    // the zero Addr on a port
	LastSeen time.Duration // on a port: time since its last frame
}

// Neighbor says which MAC has an IP address.
type Neighbor struct {
	IP  netip.Addr
	MAC [6]byte
}

// MayHaveNeighbors reports whether the neighbors of the bridge have to be read. Neighbor suppression and IPv6 are
// switched on before the first neighbor is added, and off after the last one is deleted.
func (s State) MayHaveNeighbors() bool {
	return s.Record != nil && s.Record.VXLAN.SuppressNeighbors ||
		slices.ContainsFunc(s.Links, func(l Link) bool { return l.Suppress || l.Type == "bridge" && l.IPv6 })
}

// FDBEntry says behind which VTEP a MAC is.
type FDBEntry struct {
	MAC  [6]byte
	VTEP netip.Addr
	// Local is set in a desired state if the MAC was on a port of this node before: it replaces the bridge's entry
	// there.
	Local bool
}

// FDBState is an entry as the kernel has it: one half in the VXLAN's own table, one in the bridge's. One half may be
// missing: the bridge's follows the port on which the MAC was last seen.
type FDBState struct {
	FDBEntry      // with the zero Addr if the VXLAN lacks its half
	Bridge   bool // the bridge has its half, on the VXLAN's port
}

// MayHaveRemotes reports whether the remotes of a VXLAN have to be read. With a group it has none, unless a change from
// remotes to a group was interrupted: the record is written at the end of that change.
func (s State) MayHaveRemotes(l Link) bool {
	return l.Type == "vxlan" && (!l.VXLAN.Group.IsValid() || s.Record == nil || !s.Record.VXLAN.Group.IsValid())
}

// ForwardMask lets a port forward every link-local frame but PAUSE (01-80-C2-00-00-01), which the kernel never lets a
// bridge forward (BR_GROUPFWD_MACPAUSE in net/bridge/br_private.h).
const ForwardMask = 0xFFFD

// Link finds a link by its name.
func (s State) Link(name string) (Link, bool) {
	return s.find(func(l Link) bool { return l.Name == name })
}

// Carrier finds the link that carries a spoke's frames now.
func (s State) Carrier(spoke string) (Link, bool) {
	return s.find(func(l Link) bool { return l.hasName(spoke) })
}

func (s State) find(matches func(Link) bool) (Link, bool) {
	i := slices.IndexFunc(s.Links, matches)
	if i < 0 {
		return Link{}, false
	}
	return s.Links[i], true
}

// Spoke returns the spoke that a link attaches, as one end of its standing pair or as a pod's veth.
func (l Link) Spoke() (spoke string, ok bool) {
	if spoke, _, ok = spokeOf(l.Name); ok {
		return spoke, true
	}
	c, ok := l.claim()
	return c.Spoke, ok
}

// hasName reports whether a link has that name or altname.
func (l Link) hasName(name string) bool { return l.Name == name || slices.Contains(l.AltNames, name) }

// Claims returns the claims on spokes, sorted by spoke. A claim's veth that neither has its spoke's altname nor is up
// is left from an unfinished attach, and no claim: an attach sets it up last. One that is up lost its altname later.
func (s State) Claims() []Claim {
	var claims []Claim
	for _, l := range s.Links {
		if c, ok := l.claim(); ok && (c.Kind == Macvtap || l.hasName(c.Spoke) || l.Up) {
			claims = append(claims, c)
		}
	}
	slices.SortFunc(claims, func(a, b Claim) int { return strings.Compare(a.Spoke+" "+a.ID, b.Spoke+" "+b.ID) })
	return claims
}

// claim returns the claim that a link stands for: it is the name of a veth, or an altname of a plug.
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
	if !ok { // the plugin was killed between setting altname and alias: VerifyClaim decides
		c = Claim{ID: l.AltNames[i]}
	}
	c.Kind, c.Spoke = Macvtap, spoke
	return c, true
}
