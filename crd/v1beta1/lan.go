package v1beta1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Finalizer is the controller's on every LAN that holds something, or once did: the object stays until no node that counts has
// anything left of it.
const Finalizer = "lan.k8slan.io/deletion"

// Limits and defaults of LANSpec.
const (
	DefaultGroup = "ff02::14" // multicast group of the VXLAN
	DefaultPort  = 4789       // UDP port of the VXLAN

	// MaxSpokes is the largest number of spokes in one LAN. A Linux bridge has 1,023 ports
	// (BR_MAX_PORTS in net/bridge/br_private.h) and a spoke takes two of them while a pod is attached.
	// The ports of pools count as spokes.
	MaxSpokes = 500

	// MaxPoolNodes is how many nodes a pool's status lists: a LAN is sent to every node whenever its status changes.
	MaxPoolNodes = 100
)

// LANSpec says what a LAN is. Only vni is required, and spokes or spokePools.
//
// +kubebuilder:validation:XValidation:rule="has(self.ns) == has(oldSelf.ns) && (!has(self.ns) || self.ns == oldSelf.ns)",fieldPath=".ns",message="ns cannot be changed, added or removed: attached pods hang on the network namespace of that name; delete the LAN and create it anew"
// +kubebuilder:validation:XValidation:rule="has(self.bridge) == has(oldSelf.bridge) && (!has(self.bridge) || self.bridge == oldSelf.bridge)",fieldPath=".bridge",message="bridge cannot be changed, added or removed: attached pods hang on the bridge of that name; delete the LAN and create it anew"
// +kubebuilder:validation:XValidation:rule="has(self.vxlan) == has(oldSelf.vxlan) && (!has(self.vxlan) || self.vxlan == oldSelf.vxlan)",fieldPath=".vxlan",message="vxlan cannot be changed, added or removed: nodes would not all rename it at once; delete the LAN and create it anew"
// +kubebuilder:validation:XValidation:rule="!has(self.bridge) || !has(self.vxlan) || self.bridge != self.vxlan",fieldPath=".vxlan",message="bridge and vxlan must have different names: both are interfaces of the LAN's network namespace (left out, they are br<vni> and vx<vni>)"
// +kubebuilder:validation:XValidation:rule="!has(self.bridge) || has(self.vxlan) || !(self.bridge.matches('^vx[1-9][0-9]{0,7}$') && int(self.bridge.substring(2)) == self.vni)",fieldPath=".vxlan",message="bridge and vxlan must have different names: both are interfaces of the LAN's network namespace (left out, they are br<vni> and vx<vni>)"
// +kubebuilder:validation:XValidation:rule="has(self.bridge) || !has(self.vxlan) || !(self.vxlan.matches('^br[1-9][0-9]{0,7}$') && int(self.vxlan.substring(2)) == self.vni)",fieldPath=".vxlan",message="bridge and vxlan must have different names: both are interfaces of the LAN's network namespace (left out, they are br<vni> and vx<vni>)"
// +kubebuilder:validation:XValidation:rule="!has(self.spokes) || (has(self.bridge) ? !(self.bridge in self.spokes) : !self.spokes.exists(s, s.matches('^br[1-9][0-9]{0,7}$') && int(s.substring(2)) == self.vni))",fieldPath=".spokes",message="a spoke has the name of the bridge (br<vni> if spec.bridge is left out): in the LAN's network namespace a spoke's link answers to the spoke's name, so rename one of them"
// +kubebuilder:validation:XValidation:rule="!has(self.spokes) || (has(self.vxlan) ? !(self.vxlan in self.spokes) : !self.spokes.exists(s, s.matches('^vx[1-9][0-9]{0,7}$') && int(s.substring(2)) == self.vni))",fieldPath=".spokes",message="a spoke has the name of the VXLAN (vx<vni> if spec.vxlan is left out): in the LAN's network namespace a spoke's link answers to the spoke's name, so rename one of them"
// +kubebuilder:validation:XValidation:rule="has(self.spokes) || has(self.spokePools)",fieldPath=".spokes",reason=FieldValueRequired,message="a LAN has at least one spoke, in spokes, or a pool of them, in spokePools"
// +kubebuilder:validation:XValidation:rule="!has(self.spokes) || !has(self.spokePools) || !self.spokePools.exists(p, p.name in self.spokes)",fieldPath=".spokePools",message="a pool has the name of a spoke: both would be the same resource; rename one of them"
// +kubebuilder:validation:XValidation:rule="!has(self.spokePools) || (has(self.spokes) ? self.spokes.size() : 0) + self.spokePools.map(p, p.size).sum() <= 500",fieldPath=".spokePools",message="spokes and the sizes of all pools come to more than 500, the most that one LAN can have on a node"
// +kubebuilder:validation:XValidation:rule="!has(self.spokePools) || !has(self.bridge) || !self.spokePools.exists(p, self.bridge.startsWith(p.name + '_'))",fieldPath=".bridge",message="the bridge's name begins with that of a pool and '_', as the names of the pool's ports do; rename one of them"
// +kubebuilder:validation:XValidation:rule="!has(self.spokePools) || !has(self.vxlan) || !self.spokePools.exists(p, self.vxlan.startsWith(p.name + '_'))",fieldPath=".vxlan",message="the VXLAN's name begins with that of a pool and '_', as the names of the pool's ports do; rename one of them"
// +kubebuilder:validation:XValidation:rule="!has(self.spokeOptions) || self.spokeOptions.all(s, has(self.spokes) && s in self.spokes || has(self.spokePools) && self.spokePools.exists(p, p.name == s))",fieldPath=".spokeOptions",messageExpression="'spokeOptions names \"' + self.spokeOptions.filter(s, !(has(self.spokes) && s in self.spokes) && !(has(self.spokePools) && self.spokePools.exists(p, p.name == s)))[0] + '\", which is no spoke of this LAN; add it to spec.spokes, or take it out here'",message="spokeOptions names something that is no spoke of this LAN; add it to spec.spokes, or take it out here"
type LANSpec struct {
	// VNI is the VXLAN network identifier, 1 to 16777215. It must be unique in the cluster per vxlanPort: a LAN whose VNI is
	// another LAN's waits in state Conflict. It cannot change.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=16777215
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="vni cannot change: for a while some nodes would use the old one and some the new; delete the LAN and create it anew"
	VNI int32 `json:"vni"`

	// Spokes are the names of the LAN's ports; each takes one pod or VM. At most 13 characters each, lower-case letters, digits,
	// '-' and '.'; unique in the cluster, because a spoke's resource is: a spoke that is another LAN's is not offered.
	// A pod attaches with the annotation k8s.v1.cni.cncf.io/networks: k8slan-veth-<spoke> and the limit
	// macvtap.k8slan.io/k8slan-veth-<spoke>: 1; a KubeVirt VM with the network k8slan-mac-<spoke>.
	// Spokes can be added and removed while the LAN runs; one that is removed while a pod is attached goes when the pod goes.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=500
	// +kubebuilder:validation:items:MaxLength=63
	// +kubebuilder:validation:items:XValidation:rule="self.size() <= 13",message="a spoke has at most 13 characters, because Linux allows 15 for the interface and its partner's suffix"
	// +kubebuilder:validation:items:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="a spoke is made of lower-case letters, digits, '-' and '.', begins and ends with a letter or digit, also around each '.': the names of its NADs and its resource are made of it"
	// +kubebuilder:validation:items:XValidation:rule="self != 'lo'",message="\"lo\" is the loopback interface of every network namespace; choose another name for the spoke"
	Spokes []string `json:"spokes,omitempty"`

	// SpokePools are spokes in numbers, for pods that come in numbers: those of a Deployment or a StatefulSet. Each is one resource,
	// of which every node has as many as the pool's size; a pod attaches as to a spoke, with the pool's name in its place.
	// Pools can be added, removed and resized while the LAN runs; a port that is in use stays until its pod is gone. The sizes and
	// the number of spokes come to 500 at most.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=100
	SpokePools []SpokePool `json:"spokePools,omitempty"`

	// NS is the name of the LAN's network namespace on every node, a file under /run/k8slan/netns. It must be unique in the cluster.
	// It cannot change. Default: <namespace>.<name> of the LAN.
	// +optional
	// +kubebuilder:validation:MaxLength=200
	// +kubebuilder:validation:XValidation:rule="self.matches('^[A-Za-z0-9_][A-Za-z0-9_.-]*$')",message="ns is a file name under /run/k8slan/netns: letters, digits, '_', '-' and '.', beginning with a letter, a digit or '_'; leave it out for <namespace>.<name>"
	NS string `json:"ns,omitempty"`

	// Bridge is the name of the bridge inside that network namespace, at most 15 characters. It cannot change. Default: br<vni>.
	// +optional
	Bridge Link `json:"bridge,omitempty"`

	// VXLAN is the name of the VXLAN interface inside that network namespace, at most 15 characters. It cannot change. Default: vx<vni>.
	// +optional
	VXLAN Link `json:"vxlan,omitempty"`

	// Discovery is how nodes find each other. multicast: over the group vxlanGrp, which the network between the nodes must carry.
	// unicast: each node sends to the addresses of the others that have a pod of the LAN, as their LANNodes tell; for clouds and
	// routed networks. evpn: nodes tell each other by BGP (RFC 7432) who takes part and behind whom each MAC is, and learn nothing from
	// frames; for LANs that reach beyond the cluster, and for VMs that move. It can be changed while the LAN runs. Default: what the chart says, multicast if nothing.
	// +optional
	Discovery Discovery `json:"discovery,omitempty"`

	// EVPN says how the LAN's routes are told apart from those of others. With another discovery than evpn it means nothing. It can
	// be changed while the LAN runs.
	// +optional
	EVPN *EVPNOptions `json:"evpn,omitempty"`

	// StrictPeers has a node drop VXLAN packets with the LAN's VNI that come from an address of none of the other nodes of the LAN, before
	// they reach a pod. What a node sends bears an address of its underlay device; its LANNode tells which. It can be changed while the
	// LAN runs. Default: true with discovery unicast, false with multicast, where others than k8slan may take part.
	// +optional
	StrictPeers *bool `json:"strictPeers,omitempty"`

	// VXLANGroup is the multicast group, IPv6 or IPv4, over which nodes find each other. With a link-local IPv6 group, ff02::/16,
	// the underlay needs nothing but its link-local address. With discovery unicast nothing is sent to it, but where it is given,
	// nodes use their addresses of its family. Default: ff02::14.
	// +optional
	// +kubebuilder:validation:MaxLength=45
	// +kubebuilder:validation:XValidation:rule="isIP(self) && self.matches('^([fF][fF][0-9a-fA-F][2-9a-fA-F]:|22[4-9][.]|23[0-9][.])')",message="vxlanGrp is a multicast address that leaves the node: IPv6 within ff00::/8 from scope 2 (ff02::14), or IPv4 within 224.0.0.0/4 (239.1.1.1)"
	VXLANGroup string `json:"vxlanGrp,omitempty"`

	// VXLANPort is the UDP port of the VXLAN, 1 to 65535. Default: 4789.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	VXLANPort int32 `json:"vxlanPort,omitempty"`

	// DefaultVXLANDev is the underlay device, in the node's own network namespace, of nodes that vxlanDevMap does not name.
	// LANs may share it. Default: the node's own choice: the device with an address of the ranges in the chart's vtepCIDRs; if that has none, with
	// discovery unicast the device with the node's InternalIP; else the device of the default route.
	// +optional
	DefaultVXLANDev Device `json:"defaultVxlanDev,omitempty"`

	// VXLANDevMap gives nodes their own underlay device. A key is a node's name or, if that is not in the map, its label kubernetes.io/hostname.
	// +optional
	// +kubebuilder:validation:MaxProperties=5000
	VXLANDevMap map[string]Device `json:"vxlanDevMap,omitempty"`

	// MTU is the largest packet, in bytes, that the LAN carries for its pods and VMs, 68 to 65535.
	// Default: the underlay's MTU less 78 (over IPv6) or 58 (over IPv4), which leaves room for two VLAN tags.
	// +optional
	// +kubebuilder:validation:Minimum=68
	// +kubebuilder:validation:Maximum=65535
	MTU int32 `json:"mtu,omitempty"`

	// NodeSelector limits the LAN to nodes that bear all these labels. Default: every node.
	// +optional
	// +kubebuilder:validation:MaxProperties=50
	NodeSelector map[string]LabelValue `json:"nodeSelector,omitempty"`

	// AllowedNamespaces are the namespaces, beside the LAN's own, whose pods may attach; "*" opens the LAN to all.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=500
	// +kubebuilder:validation:items:MaxLength=63
	// +kubebuilder:validation:items:XValidation:rule="self == '*' || self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="an allowed namespace is the name of one, or \"*\" alone for all; patterns such as team-* are not known"
	AllowedNamespaces []string `json:"allowedNamespaces,omitempty"`

	// TxChecksum says who finishes TCP and UDP checksums. on leaves them to the hardware, as Linux does everywhere: frames between
	// pods and VMs then bear unfinished ones, and TCP is several times faster. off has each checksum written, and each frame cut
	// to the MTU, before it reaches a pod or VM, and in what one sends. It is needed for network functions that read frames raw (AF_PACKET
	// without PACKET_AUXDATA, DPDK's af_packet, many a VNF's data plane) and drop what has a wrong checksum; the sign is that ping
	// works, and BGP, SSH or any other TCP doesn't. It can be changed while the LAN runs. Default: on.
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:pruning:PreserveUnknownFields
	// +kubebuilder:validation:Enum=on;off;true;false
	TxChecksum OnOff `json:"txChecksum,omitempty"`

	// SpokeOptions are settings of single spokes, by the spoke's name, or of all ports of a pool, by the pool's; they override the LAN's.
	// +optional
	// +kubebuilder:validation:MaxProperties=500
	SpokeOptions map[string]SpokeOptions `json:"spokeOptions,omitempty"`

	// IPAM is a CNI IPAM section that is handed to the NADs of pods, such as {"type": "host-local", …}. VMs get no addresses from CNI.
	// +optional
	// +kubebuilder:pruning:PreserveUnknownFields
	IPAM *IPAM `json:"ipam,omitempty"`
}

// SpokePool is a number of ports on every node that are all alike.
type SpokePool struct {
	// Name of the pool, at most 9 lower-case letters, digits, '-' and '.'; unique in the cluster among spokes and pools. Its ports are
	// called <name>_0, <name>_1 and so on.
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:XValidation:rule="self.size() <= 9",message="a pool's name has at most 9 characters, because Linux allows 15 for an interface, and the port's number and a suffix come on top"
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="a pool's name is made of lower-case letters, digits, '-' and '.', begins and ends with a letter or digit, also around each '.': the names of its NADs and its resource are made of it"
	Name string `json:"name"`

	// Size is the number of ports on each node, 1 to 500. It can change while pods are attached: a port that is one too many goes when its
	// pod goes.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=500
	Size int32 `json:"size"`

	// MACBy says what a pod's MAC is derived from beside LAN and pool. port: node and port, so that no two pods have the same, and a
	// pod that is made anew may have another. ordinal: the number at the end of the pod's name, for one StatefulSet, whose pods keep
	// their MACs on whichever node; two pods of the same number have the same MAC, and a pod without one is refused. Default: port.
	// +optional
	// +kubebuilder:validation:Enum=port;ordinal
	MACBy MACBy `json:"macBy,omitempty"`
}

// MACBy is what the MAC of a pool's port is derived from.
type MACBy string

// What MACs can be derived from.
const (
	MACByPort    MACBy = "port"
	MACByOrdinal MACBy = "ordinal"
)

// Discovery is a way in which nodes find each other.
//
// +kubebuilder:validation:Enum=multicast;unicast;evpn
type Discovery string

// The ways of discovery.
const (
	Multicast Discovery = "multicast"
	Unicast   Discovery = "unicast"
	EVPN      Discovery = "evpn"
)

// EVPNOptions are how the routes of a LAN are told apart from those of others (RFC 7432). They can be changed while the LAN runs.
type EVPNOptions struct {
	// ImportTargets are the route targets by which others' routes are the LAN's, such as 65000:222: a route that bears one of them is.
	// What the LAN's own nodes tell is so in any case. Default: those whose number is the VNI, of any AS.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=32
	ImportTargets []RouteTarget `json:"importTargets,omitempty"`

	// ExportTargets are the route targets that the routes of the LAN's nodes bear. Nodes read of a change one after the other: to lose
	// nothing, name the old one beside the new until all have. Default: AS:VNI, with the AS of the cluster.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=32
	ExportTargets []RouteTarget `json:"exportTargets,omitempty"`

	// RD is the number in the nodes' route distinguishers for the LAN, 1 to 65535: each node's own are its router ID, ':' and this. Where two
	// LANs ask for the same, one has the next that is free. Default: the VNI, or else the next number that is free.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	RD int32 `json:"rd,omitempty"`

	// SuppressNeighbors has each node answer ARP requests and neighbour solicitations for stations on others, whose addresses it has been told, in
	// place of sending them there. Announcements without a question (gratuitous ARP, unsolicited advertisements) do not leave the node then: who
	// takes an address over is known as soon as the nodes have told each other. For LANs with very many stations. Default: false.
	// +optional
	SuppressNeighbors bool `json:"suppressNeighbors,omitempty"`
}

// RouteTarget is AS:number in decimal. On the wire one of both has four octets, the other two (RFC 4360, RFC 5668).
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:XValidation:rule="self.matches('^(0|[1-9][0-9]{0,9}):(0|[1-9][0-9]{0,9})$') && self.split(':').all(n, int(n) <= 4294967295) && self.split(':').exists(n, int(n) <= 65535)",message="a route target is AS:number, such as 65000:222; one of both can be up to 4294967295, the other up to 65535"
type RouteTarget string

// SpokeOptions are settings of one spoke, or of each port of a pool.
type SpokeOptions struct {
	// TxChecksum of what reaches the spoke's pod or VM and of what that sends, on or off, as spec.txChecksum is for the whole LAN.
	// Set it off on the spoke of the network function that drops unfinished checksums; the others keep their speed among
	// themselves. Default: the LAN's.
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:pruning:PreserveUnknownFields
	// +kubebuilder:validation:Enum=on;off;true;false
	TxChecksum OnOff `json:"txChecksum,omitempty"`
}

// Link is the name of an interface that k8slan makes: an interface name by the kernel's rules (dev_valid_name in net/core/dev.c,
// without '%', which asks the kernel to number it) that is not one of a spoke's own.
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:XValidation:rule="self.size() <= 15",message="an interface name has at most 15 characters, because Linux allows no more"
// +kubebuilder:validation:XValidation:rule="self.matches('^[A-Za-z0-9_][A-Za-z0-9_.-]*$')",message="an interface name is made of letters, digits, '_', '-' and '.', and begins with a letter, a digit or '_'"
// +kubebuilder:validation:XValidation:rule="!(self in ['lo', 'all', 'default'])",message="\"lo\", \"all\" and \"default\" are taken in every network namespace; choose another name"
// +kubebuilder:validation:XValidation:rule="!self.endsWith('_b') && !self.endsWith('_p')",message="names ending in _b and _p are those of the spokes' own links; choose another name"
type Link = string

// Device is the name of a device of the node, by the kernel's rules (dev_valid_name in net/core/dev.c).
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:XValidation:rule="self.matches('^[!-.0-9;-~]{1,15}$') && !(self in ['.', '..'])",message="a device is an interface name of the node: 1 to 15 characters without '/', ':' and blanks"
type Device string

// LabelValue is the value of a label.
//
// +kubebuilder:validation:MaxLength=63
type LabelValue string

// Condition types of a LAN.
const (
	// ConditionAccepted is False where something that the LAN asks for is held by another LAN: its ns or VNI, which refuses
	// the whole LAN, or a spoke, which refuses that spoke alone.
	ConditionAccepted = "Accepted"
	// ConditionReady is True when the LAN holds all that it asks for and every node that it spans offers its spokes and can
	// carry their frames to the others.
	ConditionReady = "Ready"
	// ConditionAttachedTwice is True while a spoke is attached on two nodes: right during a live migration, else a mistake,
	// since both bear the same MAC. It is absent otherwise.
	ConditionAttachedTwice = "AttachedTwice"
	// ConditionPoolExceeded is True while more pods are attached to a pool on a node than it has ports: it was made smaller
	// under them, and they stay. It is absent otherwise.
	ConditionPoolExceeded = "PoolExceeded"
)

// Reasons of a LAN's conditions, beside those of a segment (Reason… in lannode.go).
const (
	ReasonHeld          = "Held"          // Accepted: all is held
	ReasonConflict      = "Conflict"      // ns or VNI is another LAN's, or still in use
	ReasonSpokeConflict = "SpokeConflict" // a spoke is another LAN's, or still in use
	ReasonNADConflict   = "NADConflict"   // a NAD of that name is there that is not the LAN's
	ReasonOffered       = "Offered"       // Ready: offered on every node
	ReasonNoNodes       = "NoNodes"       // no node runs k8slan, or none matches spec.nodeSelector
	ReasonPending       = "Pending"       // a node has not yet reported, or not yet offered every spoke
	ReasonUnreachable   = "Unreachable"   // a node does not answer
	ReasonMixedFamilies = "MixedFamilies" // nodes have VTEPs of both IP versions, which do not reach each other
	ReasonTwoNodes      = "TwoNodes"      // AttachedTwice: a spoke is attached on more than one node
	ReasonOneNode       = "OneNode"       // an event: what TwoNodes told is over
	ReasonShrunk        = "Shrunk"        // PoolExceeded: a pool was made smaller than its use
	ReasonFits          = "Fits"          // an event: what Shrunk told is over
	ReasonDeleting      = "Deleting"      // Ready: the LAN is being deleted, and goes when the nodes have let it go
	ReasonInUse         = "InUse"         // Ready: the LAN is being deleted, and stays until its pods are gone
	ReasonNodeLost      = "NodeLost"      // an event: a LAN goes without the word of a node that is lost
)

// LANState sums up a LAN for people.
type LANState string

// The states of a LAN.
const (
	StatePending  LANState = "Pending"  // no node offers it yet
	StateReady    LANState = "Ready"    // offered on every node it spans
	StateDegraded LANState = "Degraded" // something is wrong on some nodes, or with one of its spokes
	StateConflict LANState = "Conflict" // refused: its ns or VNI is held by another LAN
	StateDeleting LANState = "Deleting" // deleted: offers nothing more, and goes when its pods are gone
)

// Holding is what a LAN holds in the cluster by its effective values; nodes build what is held and nothing else.
type Holding struct {
	// NS is the name of the network namespace, held alone in the cluster.
	NS string `json:"ns"`
	// VNI is held alone in the cluster on that UDP port.
	VNI int32 `json:"vni"`
	// Port is the VXLAN's UDP port.
	Port int32 `json:"vxlanPort"`
	// Spokes that are held, sorted, and pools among them; one that is another LAN's is missing here.
	// +listType=set
	// +optional
	Spokes []string `json:"spokes,omitempty"`
	// Discovery is how the LAN's nodes find each other where the spec does not say: the chart's default, which all nodes follow at once.
	// +optional
	Discovery Discovery `json:"discovery,omitempty"`
}

// SpokeStatus is one spoke that is attached or refused; a spoke that just waits is not listed.
type SpokeStatus struct {
	// Name of the spoke.
	Name string `json:"name"`
	// Refused says why the spoke is not offered; empty for a spoke that is.
	// +optional
	Refused string `json:"refused,omitempty"`
	// Attachments on all nodes: one, or two during a live migration.
	// +optional
	// +listType=atomic
	Attachments []SpokeAttachment `json:"attachments,omitempty"`
}

// PoolStatus is the use of one pool.
type PoolStatus struct {
	// Name of the pool.
	Name string `json:"name"`
	// Refused says why the pool is not offered; empty for one that is.
	// +optional
	Refused string `json:"refused,omitempty"`
	// Attached is the number of attachments on all nodes.
	Attached int32 `json:"attached"`
	// Ports is the number of ports on all nodes: the pool's size times the nodes that the LAN spans. 0 for a pool that is refused or
	// gone from the spec.
	Ports int32 `json:"ports"`
	// Nodes that have pods attached to the pool, the first 100 by name; which pods is in their LANNode.
	// +optional
	// +listType=atomic
	Nodes []PoolNode `json:"nodes,omitempty"`
}

// PoolNode is the use of a pool on one node.
type PoolNode struct {
	// Node that has the pods.
	Node string `json:"node"`
	// Attached is the number of attachments there.
	Attached int32 `json:"attached"`
}

// SpokeAttachment is an attachment with the node it is on.
type SpokeAttachment struct {
	// Node that has the pod.
	Node       string `json:"node"`
	Attachment `json:",inline"`
}

// LANStatus is written by the controller alone.
type LANStatus struct {
	// ObservedGeneration is the metadata.generation of the spec that this status answers.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Holds is what this LAN holds in the cluster; absent while it is refused. Nodes build what is held and nothing else.
	// +optional
	Holds *Holding `json:"holds,omitempty"`
	// State sums the LAN up: Pending, Ready, Degraded, Conflict or Deleting.
	// +optional
	State LANState `json:"state,omitempty"`
	// Reason is one word or short phrase for the state; the sentence is in the conditions.
	// +optional
	Reason string `json:"reason,omitempty"`
	// Discovery is how nodes find each other: spec.discovery, or the default of the chart.
	// +optional
	Discovery string `json:"discovery,omitempty"`
	// SpokeCount is the number of spokes the LAN holds, with the ports of its pools as each node has them.
	// +optional
	SpokeCount int32 `json:"spokeCount"`
	// Attached is the number of attachments on all nodes.
	// +optional
	Attached int32 `json:"attached"`
	// Nodes is "ready/spanned", such as 2/2. The LAN spans the nodes that run k8slan and match spec.nodeSelector.
	// +optional
	Nodes string `json:"nodes,omitempty"`
	// Spokes lists the spokes that are attached or refused.
	// +optional
	// +listType=map
	// +listMapKey=name
	Spokes []SpokeStatus `json:"spokes,omitempty"`
	// Pools are the LAN's pools, and those gone from its spec that still have pods attached.
	// +optional
	// +listType=map
	// +listMapKey=name
	Pools []PoolStatus `json:"pools,omitempty"`
	// Conditions are Accepted, Ready and, while a spoke is attached on two nodes, AttachedTwice, and while a pool has more pods on a node
	// than ports, PoolExceeded.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// LAN is a virtual Ethernet segment that spans the nodes of a cluster.
//
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 63",message="a LAN's name has at most 63 characters: its NADs are labelled with it and the name of its network namespace is made of it"
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=lan,path=lans,singular=lan,categories=k8slan
// +kubebuilder:printcolumn:name="VNI",type=integer,JSONPath=`.spec.vni`
// +kubebuilder:printcolumn:name="Discovery",type=string,JSONPath=`.status.discovery`
// +kubebuilder:printcolumn:name="Spokes",type=integer,JSONPath=`.status.spokeCount`
// +kubebuilder:printcolumn:name="Attached",type=integer,JSONPath=`.status.attached`
// +kubebuilder:printcolumn:name="Nodes",type=string,JSONPath=`.status.nodes`
// +kubebuilder:printcolumn:name="State",type=string,JSONPath=`.status.state`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.reason`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type LAN struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec LANSpec `json:"spec"`
	// +optional
	Status LANStatus `json:"status,omitempty"`
}

// LANList is a list of LANs.
//
// +kubebuilder:object:root=true
type LANList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []LAN `json:"items"`
}
