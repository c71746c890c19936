package segment

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// Op is one change to a node. Its text is the ip command, or the like, that a person would type in the LAN's netns.
type Op interface{ String() string }

type (
	// CreateNetns creates the network namespace and gives it its name.
	CreateNetns struct{ Netns string }
	// RestoreNetns gives a namespace that the daemon holds open its name again.
	RestoreNetns struct{ Netns string }
	// RemoveNetns removes the name; the kernel then removes the namespace.
	RemoveNetns struct{ Netns string }
	// Silence switches IPv6 and bridge netfilter off in the namespace, and has a present bridge forget what it learned.
	Silence struct{ Bridge string }
	// WriteRecord writes the record of the segment.
	WriteRecord struct{ Segment Segment }
	// RemoveRecord removes it.
	RemoveRecord struct{ Netns string }
	// AddBridge creates the bridge, up, without multicast snooping; STP and VLAN filtering are off by default.
	AddBridge struct {
		Name string
		MTU  int
	}
	// SetBridge switches off those of STP, VLAN filtering and multicast snooping that are on.
	SetBridge struct {
		Name string
		Off  BridgeState
	}
	// AddVXLAN creates the VXLAN, down, as a port of the bridge if there is one.
	AddVXLAN struct {
		VXLAN
		MTU    int
		Bridge string
	}
	// SetVXLAN gives a VXLAN another group or source of the same family, or none.
	SetVXLAN struct{ VXLAN }
	// AddRemotes adds remotes to a VXLAN.
	AddRemotes struct {
		Name    string
		Remotes []netip.Addr
	}
	// DelRemotes deletes remotes of a VXLAN and, if Learned, the MACs that it learned behind them.
	DelRemotes struct {
		Name    string
		Remotes []netip.Addr
		Learned bool
	}
	// SetFDB sets entries of a VXLAN and its bridge.
	SetFDB struct {
		Name    string
		Entries []FDBEntry
	}
	// DelFDB deletes entries, each half that the kernel has.
	DelFDB struct {
		Name    string
		Entries []FDBState
	}
	// SetLearning sets whether the bridge learns MACs from a port's frames.
	SetLearning struct {
		Name string
		On   bool
	}
	// SetSuppress sets whether the bridge answers ARP and neighbor discovery, if it can, instead of sending it out by a
	// port.
	SetSuppress struct {
		Name string
		On   bool
	}
	// SetNeighborDiscovery switches a bridge's IPv6 on, without an address, so that it can have IPv6 neighbors, or off.
	SetNeighborDiscovery struct {
		Name string
		On   bool
	}
	// AddNeighbors adds neighbors of a bridge, or gives them another MAC.
	AddNeighbors struct {
		Name      string
		Neighbors []Neighbor
	}
	// DelNeighbors deletes neighbors of a bridge.
	DelNeighbors struct {
		Name      string
		Neighbors []Neighbor
	}
	// AddPair creates a spoke's standing pair: the port up in the bridge, the plug up beside it.
	AddPair struct {
		Spoke  string
		MAC    net.HardwareAddr // of the plug
		MTU    int              // of the LAN; the port has PortMTU
		Bridge string
	}
	// DelLink deletes a link, and with one end of a veth the other.
	DelLink struct{ Name string }
	// DelLinks deletes several links at once, which takes hardly longer than one.
	DelLinks struct{ Names []string }
	// DelPairs deletes every link that attaches spokes, in one message.
	DelPairs struct{}
	// SetMTU sets a link's MTU in bytes.
	SetMTU struct {
		Name string
		MTU  int
	}
	// SetMaster makes a link a port of the bridge.
	SetMaster struct{ Name, Bridge string }
	// SetForwardMask has a port forward every link-local frame but PAUSE.
	SetForwardMask struct{ Name string }
	// SetUp sets a link up.
	SetUp struct{ Name string }
	// SetDown sets a link down.
	SetDown struct{ Name string }
	// SetTxChecksum leaves checksums and segmentation of frames that leave by a link to hardware or, if not On, to this
	// kernel.
	SetTxChecksum struct {
		Name string
		On   bool
	}
	// AddAltName gives a link a spoke's name as altname.
	AddAltName struct{ Name, AltName string }
	// DelAltName removes an altname of a link.
	DelAltName struct{ Name, AltName string }
	// VerifyClaim finds out whether the macvtap of a claim still exists, and ends the claim if not.
	VerifyClaim struct{ Spoke, ClaimID string }
)

func (o CreateNetns) String() string  { return "ip netns add " + o.Netns }
func (o RestoreNetns) String() string { return "ip netns attach " + o.Netns }
func (o RemoveNetns) String() string  { return "ip netns del " + o.Netns }
func (o Silence) String() string {
	return "sysctl net.ipv6.conf.all.disable_ipv6=1 net.bridge.bridge-nf-call-{iptables,ip6tables,arptables}=0"
}
func (o WriteRecord) String() string  { return "record " + o.Segment.Netns }
func (o RemoveRecord) String() string { return "record del " + o.Netns }
func (o AddBridge) String() string {
	return fmt.Sprintf("ip link add %s mtu %d up type bridge mcast_snooping 0", o.Name, o.MTU)
}

func (o SetBridge) String() string {
	s := fmt.Sprintf("ip link set %s type bridge", o.Name)
	if o.Off.STP {
		s += " stp_state 0"
	}
	if o.Off.VLANFiltering {
		s += " vlan_filtering 0"
	}
	if o.Off.MulticastSnooping {
		s += " mcast_snooping 0"
	}
	return s
}

func (o AddVXLAN) String() string {
	master, device := "", ""
	if o.Bridge != "" {
		master = " master " + o.Bridge
	}
	if o.Underlay != "" {
		device = " dev " + o.Underlay
	}
	return fmt.Sprintf("ip link add %s mtu %d%s type vxlan id %d dstport %d%s%s%s",
		o.Name, o.MTU, master, o.VNI, o.Port, o.ends(), device, o.learning())
}

// ends returns group and source as arguments of ip.
func (v VXLAN) ends() (s string) {
	if v.Group.IsValid() {
		s += " group " + v.Group.String()
	}
	if v.Local.IsValid() {
		s += " local " + v.Local.String()
	}
	return s
}

func (o SetVXLAN) String() string {
	return fmt.Sprintf("ip link set %s type vxlan id %d%s%s", o.Name, o.VNI, o.ends(), o.learning())
}

func (v VXLAN) learning() string {
	if v.NoLearning {
		return " nolearning"
	}
	return ""
}

func (o AddRemotes) String() string { return flood("append", o.Name, o.Remotes) }

func (o DelRemotes) String() string {
	s := flood("del", o.Name, o.Remotes)
	if o.Learned {
		for _, r := range o.Remotes {
			s += fmt.Sprintf(" && bridge fdb flush dev %s dst %s", o.Name, r)
		}
	}
	return s
}

func flood(verb, vxlan string, remotes []netip.Addr) string {
	s := fmt.Sprintf("bridge fdb %s 00:00:00:00:00:00 dev %s", verb, vxlan)
	for _, r := range remotes {
		s += " dst " + r.String()
	}
	return s
}

// shown is the number of entries in the text of an operation, which may have very many.
const shown = 3

func (o SetFDB) String() string {
	var lines []string
	for _, e := range o.Entries[:min(shown, len(o.Entries))] {
		lines = append(lines, fmt.Sprintf("bridge fdb replace %s dev %s dst %s self master extern_learn",
			net.HardwareAddr(e.MAC[:]), o.Name, e.VTEP))
	}
	return strings.Join(lines, "; ") + more(len(o.Entries))
}

func (o DelFDB) String() string {
	var lines []string
	for _, e := range o.Entries[:min(shown, len(o.Entries))] {
		if e.VTEP.IsValid() {
			lines = append(lines, fmt.Sprintf("bridge fdb del %s dev %s dst %s self",
				net.HardwareAddr(e.MAC[:]), o.Name, e.VTEP))
		}
		if e.Bridge {
			lines = append(lines, fmt.Sprintf("bridge fdb del %s dev %s master", net.HardwareAddr(e.MAC[:]), o.Name))
		}
	}
	return strings.Join(lines, "; ") + more(len(o.Entries))
}

func more(n int) string {
	if n <= shown {
		return ""
	}
	return fmt.Sprintf("; and %d more", n-shown)
}

func (o SetLearning) String() string {
	return fmt.Sprintf("bridge link set dev %s learning %s", o.Name, onOff(o.On))
}

func (o SetSuppress) String() string {
	return fmt.Sprintf("bridge link set dev %s neigh_suppress %s", o.Name, onOff(o.On))
}

func (o SetNeighborDiscovery) String() string {
	if !o.On {
		return fmt.Sprintf("sysctl net.ipv6.conf.%s.disable_ipv6=1", o.Name)
	}
	return fmt.Sprintf("sysctl net.ipv6.conf.%[1]s.addr_gen_mode=1 net.ipv6.conf.%[1]s.accept_ra=0"+
		" net.ipv6.conf.%[1]s.disable_ipv6=0", o.Name)
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func (o AddNeighbors) String() string {
	var lines []string
	for _, n := range o.Neighbors[:min(shown, len(o.Neighbors))] {
		lines = append(lines, fmt.Sprintf("ip neigh replace %s lladdr %s dev %s nud permanent extern_learn",
			n.IP, net.HardwareAddr(n.MAC[:]), o.Name))
	}
	return strings.Join(lines, "; ") + more(len(o.Neighbors))
}

func (o DelNeighbors) String() string {
	var lines []string
	for _, n := range o.Neighbors[:min(shown, len(o.Neighbors))] {
		lines = append(lines, fmt.Sprintf("ip neigh del %s dev %s", n.IP, o.Name))
	}
	return strings.Join(lines, "; ") + more(len(o.Neighbors))
}

func (o AddPair) String() string {
	return fmt.Sprintf("ip link add %s mtu %d master %s up type veth peer name %s mtu %d address %s up",
		PortName(o.Spoke), PortMTU(o.MTU), o.Bridge, PlugName(o.Spoke), o.MTU, o.MAC)
}
func (o DelLink) String() string   { return "ip link del " + o.Name }
func (o DelLinks) String() string  { return "ip link del " + strings.Join(o.Names, " ") }
func (o DelPairs) String() string  { return fmt.Sprintf("ip link del group %d", LinkGroup) }
func (o SetMTU) String() string    { return fmt.Sprintf("ip link set %s mtu %d", o.Name, o.MTU) }
func (o SetMaster) String() string { return fmt.Sprintf("ip link set %s master %s", o.Name, o.Bridge) }

func (o SetForwardMask) String() string {
	return fmt.Sprintf("ip link set %s type bridge_slave group_fwd_mask %#x", o.Name, ForwardMask)
}
func (o SetUp) String() string   { return fmt.Sprintf("ip link set %s up", o.Name) }
func (o SetDown) String() string { return fmt.Sprintf("ip link set %s down", o.Name) }
func (o SetTxChecksum) String() string {
	return fmt.Sprintf("ethtool -K %s tx %[2]s tso %[2]s tx-udp-segmentation %[2]s tx-sctp-segmentation %[2]s",
		o.Name, onOff(o.On))
}

func (o AddAltName) String() string {
	return fmt.Sprintf("ip link property add %s altname %s", o.Name, o.AltName)
}

func (o DelAltName) String() string {
	return fmt.Sprintf("ip link property del %s altname %s", o.Name, o.AltName)
}

func (o VerifyClaim) String() string { return fmt.Sprintf("verify claim %s on %s", o.ClaimID, o.Spoke) }

// LinkGroup is the link group of all links that attach spokes. One message deletes them all, in 0.15 ms a link instead
// of the 16 ms of a deletion by itself.
const LinkGroup = 0x6b38

// sameVXLAN reports whether a present VXLAN is as wanted, as far as the kernel cannot change it.
func sameVXLAN(want VXLAN, have Link) bool {
	v := have.VXLAN
	return have.Type == "vxlan" && v.VNI == want.VNI && v.Port == want.Port &&
		family(v.Group, v.Local) == family(want.Group, want.Local) && v.UnderlayIndex == want.UnderlayIndex
}

// family returns the length in bits of a VXLAN's addresses, 0 if it has none: its socket stays of that family
// (vxlan_nl2conf in drivers/net/vxlan/vxlan_core.c).
func family(group, local netip.Addr) int {
	if group.IsValid() {
		return unmapped(group).BitLen()
	}
	return unmapped(local).BitLen()
}

// sameEnds reports whether a present VXLAN has the wanted group and source, and learns as wanted.
func sameEnds(want VXLAN, have VXLANState) bool {
	return want.NoLearning == have.NoLearning &&
		unmapped(want.Group) == unmapped(have.Group) && unmapped(want.Local) == unmapped(have.Local)
}

func unmapped(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }
