// Package segment describes a LAN as one node must build it, without touching the node.
package segment

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// LAN names a LAN object.
type LAN struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
}

// String is namespace/name, or the name alone of what is no LAN object.
func (l LAN) String() string {
	if l.Namespace == "" {
		return l.Name
	}
	return l.Namespace + "/" + l.Name
}

// Segment is a LAN as one node must build it.
type Segment struct {
	LAN        LAN   `json:"lan"`
	Generation int64 `json:"generation"` // of the LAN object

	Netns  string `json:"netns"`  // file name of the network namespace
	Bridge string `json:"bridge"` // link name
	MTU    int    `json:"mtu"`    // bytes, of every link in the segment
	VXLAN  VXLAN  `json:"vxlan"`

	Spokes            []string `json:"spokes"`                  // with the ports of pools
	TxChecksumOff     []string `json:"txChecksumOff,omitempty"` // sorted: spokes whose frames bear finished checksums
	MACByOrdinal      []string `json:"macByOrdinal,omitempty"`  // sorted: pools whose pods have MACs by their ordinals
	Node              string   `json:"node,omitempty"`          // its name, which the MACs of ports depend on; empty where there is no pool
	AllowedNamespaces []string `json:"allowedNamespaces,omitempty"`
	OnDemand          bool     `json:"onDemand,omitempty"` // no LAN object wants it: it is there for who is attached, and goes with the last
	Leaving           bool     `json:"leaving,omitempty"`  // nobody wants it any more, and it goes with the last of who is attached; the manager's to say

	Routes Routes `json:"routes,omitzero"`

	// Remotes are the other nodes that take part, sorted, where the VXLAN has no group; nil: not known, those that stand stay.
	// They are not in the record: only who watches the other nodes knows them.
	Remotes []netip.Addr `json:"-"`
	// FDB says behind which remotes MACs are, sorted by MAC, where the VXLAN does not learn; nil: not known. It is not in the record either.
	FDB []FDBEntry `json:"-"`
	// Neighbors are others' stations that the node answers for, sorted by address, where VXLAN.SuppressNeighbors; nil: not known. Nor are they.
	Neighbors []Neighbor `json:"-"`
	// Partial says that Remotes, FDB and Neighbors may lack some: none that stands is deleted.
	Partial bool `json:"-"`
}

// VXLAN is the link that carries the LAN to other nodes.
type VXLAN struct {
	Name       string     `json:"name"`
	VNI        uint32     `json:"vni"`
	Port       uint16     `json:"port"`           // UDP
	Group      netip.Addr `json:"group"`          // multicast, IPv4 or IPv6; the zero Addr where remotes are told one by one
	Local      netip.Addr `json:"local,omitzero"` // its packets' source; the zero Addr leaves it to the node's routes
	Underlay   string     `json:"underlay"`
	NoLearning bool       `json:"noLearning,omitempty"` // it is told behind which remotes MACs are: what arrives teaches it nothing
	// SuppressNeighbors has the bridge answer ARP and neighbour discovery itself for who is behind it and known.
	SuppressNeighbors bool `json:"suppressNeighbors,omitempty"`
	UnderlayIndex     int  `json:"underlayIndex"` // in the node's own netns; 0 where the node has no such device, and then no VXLAN is built
}

// Routes is how the LAN's routes of EVPN are told apart from others', where it is not as it would be by itself.
type Routes struct {
	Import []string `json:"import,omitempty"` // route targets, as AS:number
	Export []string `json:"export,omitempty"`
	RD     uint16   `json:"rd,omitempty"` // the number in the route distinguisher; 0: any
}

// Equal says whether two are the same.
func (r Routes) Equal(o Routes) bool {
	return slices.Equal(r.Import, o.Import) && slices.Equal(r.Export, o.Export) && r.RD == o.RD
}

// Equal says whether two segments are the same wish.
func (s Segment) Equal(o Segment) bool {
	return s.LAN == o.LAN && s.Generation == o.Generation && s.Netns == o.Netns && s.Bridge == o.Bridge &&
		s.MTU == o.MTU && s.VXLAN == o.VXLAN &&
		slices.Equal(s.Spokes, o.Spokes) && slices.Equal(s.TxChecksumOff, o.TxChecksumOff) &&
		slices.Equal(s.MACByOrdinal, o.MACByOrdinal) && s.Node == o.Node &&
		slices.Equal(s.AllowedNamespaces, o.AllowedNamespaces) && s.OnDemand == o.OnDemand && s.Leaving == o.Leaving && s.Routes.Equal(o.Routes) &&
		(s.Remotes == nil) == (o.Remotes == nil) && slices.Equal(s.Remotes, o.Remotes) &&
		(s.FDB == nil) == (o.FDB == nil) && slices.Equal(s.FDB, o.FDB) &&
		(s.Neighbors == nil) == (o.Neighbors == nil) && slices.Equal(s.Neighbors, o.Neighbors) && s.Partial == o.Partial
}

// Recorded is what of a segment its record has.
func (s Segment) Recorded() Segment {
	s.Remotes, s.FDB, s.Neighbors, s.Partial = nil, nil, nil, false
	return s
}

// Unicast says whether the VXLAN knows its remotes one by one.
func (v VXLAN) Unicast() bool { return !v.Group.IsValid() && v.Local.IsValid() }

// Allows says whether pods of the namespace may attach.
func (s Segment) Allows(namespace string) bool {
	return namespace == s.LAN.Namespace ||
		slices.Contains(s.AllowedNamespaces, namespace) ||
		slices.Contains(s.AllowedNamespaces, "*")
}

// Kind is what a pod gets: its end of a veth, or a macvtap.
type Kind string

// The kinds of attachment.
const (
	Veth    Kind = "veth"
	Macvtap Kind = "macvtap"
)

// Claim is one pod's hold on a spoke.
type Claim struct {
	ID           string
	Spoke        string
	Kind         Kind
	PodNamespace string
	Pod          string
	PodUID       string
	Interface    string // in the pod
	Sandbox      string // container ID, possibly cut short
	Network      string // mark of the CNI network, where a LAN has more than its spokes'; else empty
	MAC          net.HardwareAddr
	Since        time.Time
}

// claimPrefix starts every claim ID. The links of a segment bear no other name of this form:
// a spoke's links end in a suffix with an underscore.
const claimPrefix = "k"

// ClaimID names the claim of one interface of one sandbox: 15 characters, so that it fits a link's name.
func ClaimID(containerID, ifname string) string {
	sum := sha256.Sum256([]byte(containerID + "/" + ifname))
	return claimPrefix + hex.EncodeToString(sum[:7])
}

// IsClaimID says whether a link's name has the form of a claim ID.
func IsClaimID(name string) bool {
	if len(name) != 15 || !strings.HasPrefix(name, claimPrefix) {
		return false
	}
	_, err := hex.DecodeString(name[1:])
	return err == nil
}

// SpokeOnDemand is the spoke of a claim that takes none of the LAN's: it is made with the claim, without a standing pair, and goes with it.
// No LAN's own spoke has so long a name.
func SpokeOnDemand(claimID string) string { return strings.TrimPrefix(claimID, claimPrefix) }

// IsOnDemand says whether a spoke is made with its claim.
func IsOnDemand(spoke string) bool { return IsClaimID(claimPrefix + spoke) }

// NetworkMark tells the claims of one CNI network from those of others in the same LAN: a network's name is too long for an alias.
func NetworkMark(network string) string {
	sum := sha256.Sum256([]byte(network))
	return hex.EncodeToString(sum[:4])
}

// Reserve4 and Reserve6 are what a VXLAN over IPv4 and IPv6 adds to a packet of the LAN, in bytes: inner Ethernet with two VLAN tags,
// VXLAN, UDP and IP.
const (
	Overhead4 = 58
	Overhead6 = 78
)

// PortName is the bridge's end of a spoke's standing pair. This underscore cannot occur in a spoke's own name.
func PortName(spoke string) string { return spoke + "_b" }

// PortMTU is the MTU of a spoke's standing port in a LAN of that MTU, in bytes. A guest's frame arrives with all its
// VLAN tags in the data, and a veth takes no more than one of them beyond its MTU (is_skb_forwardable in net/core/dev.c):
// this is room for a second one.
func PortMTU(mtu int) int { return mtu + 4 }

// PlugName is the end of a spoke's standing pair that waits for a VM.
func PlugName(spoke string) string { return spoke + "_p" }

// Port is the name of a pool's port, counted from 0. The underscore cannot occur in the name of a spoke or pool.
func Port(pool string, number int) string { return pool + portMark + strconv.Itoa(number) }

const portMark = "_"

// PoolOf is the pool that a spoke is a port of, and its number there; ok is false for a single spoke.
func PoolOf(spoke string) (pool string, number int, ok bool) {
	number, ok = cutNumber(spoke, portMark)
	if !ok {
		return "", 0, false
	}
	return spoke[:strings.LastIndex(spoke, portMark)], number, true
}

// cutNumber is the number behind the last mark, as strconv.Itoa would write it.
func cutNumber(name, mark string) (int, bool) {
	at := strings.LastIndex(name, mark)
	if at < 1 {
		return 0, false
	}
	digits := name[at+len(mark):]
	number, err := strconv.Atoi(digits)
	return number, err == nil && number >= 0 && strconv.Itoa(number) == digits
}

// spokeOf is the spoke whose standing pair a link belongs to.
func spokeOf(link string) (spoke string, port, ok bool) {
	if s, ok := strings.CutSuffix(link, "_b"); ok && s != "" {
		return s, true, true
	}
	if s, ok := strings.CutSuffix(link, "_p"); ok && s != "" {
		return s, false, true
	}
	return "", false, false
}

// MAC is the address of a spoke's plug where none is requested. It depends on the LAN's name and the spoke alone,
// so that a pod has the same one after it was deleted and made again, on whichever node.
func MAC(lan LAN, spoke string) net.HardwareAddr { return derived(lan.String() + "/" + spoke) }

// PlugMAC is the address of a spoke's plug. Every node has a port of that name, so that a port's depends on the node, too.
func (s Segment) PlugMAC(spoke string) net.HardwareAddr {
	if _, _, port := PoolOf(spoke); port {
		return derived(s.LAN.String() + "/" + spoke + "@" + s.Node)
	}
	return MAC(s.LAN, spoke)
}

// PodMAC is the address of the pod that attaches to a spoke where none is requested: the plug's, or one by the pod's
// ordinal. A pod whose name ends in none is an error in a pool that goes by it.
func (s Segment) PodMAC(spoke, pod string) (net.HardwareAddr, error) {
	pool, _, port := PoolOf(spoke)
	if !port || !slices.Contains(s.MACByOrdinal, pool) {
		return s.PlugMAC(spoke), nil
	}
	ordinal, ok := Ordinal(pod)
	if !ok {
		return nil, fmt.Errorf("%w: pool %s derives MACs from it, and the pod is called %q", ErrNoOrdinal, pool, pod)
	}
	return derived(fmt.Sprintf("%s/%s#%d", s.LAN, pool, ordinal)), nil
}

// ErrNoOrdinal says that a pod's name does not end in a dash and a number, as those of a StatefulSet do.
var ErrNoOrdinal = errors.New("the pod has no ordinal")

func derived(from string) net.HardwareAddr {
	sum := sha256.Sum256([]byte(from))
	mac := net.HardwareAddr{0x02, 0, 0, 0, 0, 0} // locally administered, unicast
	copy(mac[1:], sum[:5])
	return mac
}

// maxAlias is the longest alias that Linux keeps for a link (IFALIASZ less the final NUL, include/uapi/linux/if.h).
const maxAlias = 255

// Alias is the claim in words, for the link's alias.
func (c Claim) Alias() string {
	sandbox := c.Sandbox
	if len(sandbox) > sandboxLen {
		sandbox = sandbox[:sandboxLen]
	}
	// The pod comes last: its name can be 253 characters long and is the one thing that may be cut.
	network := ""
	if c.Network != "" {
		network = " net=" + c.Network
	}
	s := fmt.Sprintf("%s spoke=%s if=%s mac=%s since=%s sandbox=%s%s uid=%s pod=%s/%s", c.Kind, c.Spoke, c.Interface, c.MAC,
		c.Since.UTC().Format(time.RFC3339), sandbox, network, c.PodUID, c.PodNamespace, c.Pod)
	if len(s) > maxAlias {
		s = s[:maxAlias]
	}
	return s
}

// sandboxLen is how much of a container ID an alias keeps: enough to tell two apart.
const sandboxLen = 20

// OfSandbox says whether the claim was made for that container ID.
func (c Claim) OfSandbox(containerID string) bool {
	if len(containerID) > sandboxLen {
		containerID = containerID[:sandboxLen]
	}
	return c.Sandbox == containerID && containerID != ""
}

// IsOf says whether the claim may have been made for that pod: of a long name an alias has the beginning alone.
func (c Claim) IsOf(namespace, pod string) bool {
	return c.PodNamespace == namespace && (c.Pod == pod || len(c.Alias()) == maxAlias && strings.HasPrefix(pod, c.Pod))
}

// ParseAlias reads what Alias wrote; ok is false where the text is not of that form.
func ParseAlias(id, alias string) (c Claim, ok bool) {
	kind, rest, _ := strings.Cut(alias, " ")
	c = Claim{ID: id, Kind: Kind(kind)}
	if c.Kind != Veth && c.Kind != Macvtap {
		return Claim{ID: id}, false
	}
	for field := range strings.FieldsSeq(rest) {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "spoke":
			c.Spoke = value
		case "if":
			c.Interface = value
		case "mac":
			c.MAC, _ = net.ParseMAC(value)
		case "since":
			c.Since, _ = time.Parse(time.RFC3339, value)
		case "sandbox":
			c.Sandbox = value
		case "net":
			c.Network = value
		case "uid":
			c.PodUID = value
		case "pod":
			c.PodNamespace, c.Pod, _ = strings.Cut(value, "/")
		}
	}
	return c, true
}
