package v1beta1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Finalizer is the controller's finalizer on every LAN that holds something or once did. The object stays until every
// node that is not lost has removed the LAN.
const Finalizer = "lan.k8slan.io/deletion"

// Limits and defaults of LANSpec.
const (
	DefaultGroup = "ff02::14" // multicast group of the VXLAN
	DefaultPort  = 4789       // UDP port of the VXLAN

	// MaxSpokes is the largest number of spokes in one LAN, ports of pools included. A Linux bridge has 1,023 ports
	// (BR_MAX_PORTS in net/bridge/br_private.h), and a spoke uses two of them while a pod is attached.
	MaxSpokes = 500

	// MaxPoolNodes is the largest number of nodes in a pool's status. It bounds the size of a LAN, because every change
	// of its status is sent to every node.
	MaxPoolNodes = 100
)

// LANSpec is the desired state of a LAN. The field vni is required, and one of spokes and spokePools.
//
// +kubebuilder:validation:XValidation:rule="has(self.ns) == has(oldSelf.ns) && (!has(self.ns) || self.ns == oldSelf.ns)",fieldPath=".ns",message="ns cannot be changed, added or removed, because attached pods depend on the network namespace of that name; delete the LAN and create it again"
// +kubebuilder:validation:XValidation:rule="has(self.bridge) == has(oldSelf.bridge) && (!has(self.bridge) || self.bridge == oldSelf.bridge)",fieldPath=".bridge",message="bridge cannot be changed, added or removed, because attached pods depend on the bridge of that name; delete the LAN and create it again"
// +kubebuilder:validation:XValidation:rule="has(self.vxlan) == has(oldSelf.vxlan) && (!has(self.vxlan) || self.vxlan == oldSelf.vxlan)",fieldPath=".vxlan",message="vxlan cannot be changed, added or removed, because nodes would not all rename the interface at once; delete the LAN and create it again"
// +kubebuilder:validation:XValidation:rule="!has(self.bridge) || !has(self.vxlan) || self.bridge != self.vxlan",fieldPath=".vxlan",message="bridge and vxlan must have different names, because both are interfaces in the LAN's network namespace (their defaults are br<vni> and vx<vni>)"
// +kubebuilder:validation:XValidation:rule="!has(self.bridge) || has(self.vxlan) || !(self.bridge.matches('^vx[1-9][0-9]{0,7}$') && int(self.bridge.substring(2)) == self.vni)",fieldPath=".vxlan",message="bridge and vxlan must have different names, because both are interfaces in the LAN's network namespace (their defaults are br<vni> and vx<vni>)"
// +kubebuilder:validation:XValidation:rule="has(self.bridge) || !has(self.vxlan) || !(self.vxlan.matches('^br[1-9][0-9]{0,7}$') && int(self.vxlan.substring(2)) == self.vni)",fieldPath=".vxlan",message="bridge and vxlan must have different names, because both are interfaces in the LAN's network namespace (their defaults are br<vni> and vx<vni>)"
// +kubebuilder:validation:XValidation:rule="!has(self.spokes) || (has(self.bridge) ? !(self.bridge in self.spokes) : !self.spokes.exists(s, s.matches('^br[1-9][0-9]{0,7}$') && int(s.substring(2)) == self.vni))",fieldPath=".spokes",message="a spoke has the name of the bridge (by default br<vni>); rename one of them, because the spoke's name is also an interface name in the LAN's network namespace"
// +kubebuilder:validation:XValidation:rule="!has(self.spokes) || (has(self.vxlan) ? !(self.vxlan in self.spokes) : !self.spokes.exists(s, s.matches('^vx[1-9][0-9]{0,7}$') && int(s.substring(2)) == self.vni))",fieldPath=".spokes",message="a spoke has the name of the VXLAN (by default vx<vni>); rename one of them, because the spoke's name is also an interface name in the LAN's network namespace"
// +kubebuilder:validation:XValidation:rule="has(self.spokes) || has(self.spokePools)",fieldPath=".spokes",reason=FieldValueRequired,message="a LAN needs at least one spoke in spokes or one pool in spokePools"
// +kubebuilder:validation:XValidation:rule="!has(self.spokes) || !has(self.spokePools) || !self.spokePools.exists(p, p.name in self.spokes)",fieldPath=".spokePools",message="a pool has the name of a spoke; rename one of them, because both would be the same resource"
// +kubebuilder:validation:XValidation:rule="!has(self.spokePools) || (has(self.spokes) ? self.spokes.size() : 0) + self.spokePools.map(p, p.size).sum() <= 500",fieldPath=".spokePools",message="the number of spokes and the sizes of all pools add up to more than 500, the most that one LAN can have on a node"
// +kubebuilder:validation:XValidation:rule="!has(self.spokePools) || !has(self.bridge) || !self.spokePools.exists(p, self.bridge.startsWith(p.name + '_'))",fieldPath=".bridge",message="the bridge's name begins with a pool's name and '_', as the names of the pool's ports do; rename one of them"
// +kubebuilder:validation:XValidation:rule="!has(self.spokePools) || !has(self.vxlan) || !self.spokePools.exists(p, self.vxlan.startsWith(p.name + '_'))",fieldPath=".vxlan",message="the VXLAN's name begins with a pool's name and '_', as the names of the pool's ports do; rename one of them"
// +kubebuilder:validation:XValidation:rule="!has(self.spokeOptions) || self.spokeOptions.all(s, has(self.spokes) && s in self.spokes || has(self.spokePools) && self.spokePools.exists(p, p.name == s))",fieldPath=".spokeOptions",messageExpression="'spokeOptions names \"' + self.spokeOptions.filter(s, !(has(self.spokes) && s in self.spokes) && !(has(self.spokePools) && self.spokePools.exists(p, p.name == s)))[0] + '\", which is not a spoke or pool of this LAN; add it to spec.spokes or spec.spokePools, or remove it from spokeOptions'",message="spokeOptions has a name that is not a spoke or pool of this LAN; add it to spec.spokes or spec.spokePools, or remove it from spokeOptions"
type LANSpec struct {
	// VNI is the VXLAN network identifier, 1 to 16777215. It must be unique in the cluster among LANs with the same
	// vxlanPort: a LAN whose VNI is held by another LAN waits in state Conflict. It cannot be changed.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=16777215
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="vni cannot be changed, because for a while some nodes would use the old one and others the new one; delete the LAN and create it again"
	VNI int32 `json:"vni"`

	// Spokes are the names of the LAN's spokes. A spoke takes one pod or VM. A name has at most 13 characters:
	// lower-case letters, digits, '-' and '.'. It must be unique in the cluster, because it names a resource: a spoke
	// that is held by another LAN is not offered. A pod attaches with the annotation k8s.v1.cni.cncf.io/networks:
	// k8slan-veth-<spoke> and the limit macvtap.k8slan.io/k8slan-veth-<spoke>: 1. A KubeVirt VM attaches with the
	// network k8slan-mac-<spoke>. Spokes can be added and removed while the LAN runs. A spoke that is removed while a
	// pod is attached stays until the pod is gone.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=500
	// +kubebuilder:validation:items:MaxLength=63
	// +kubebuilder:validation:items:XValidation:rule="self.size() <= 13",message="a spoke's name has at most 13 characters, because Linux allows 15 for an interface and k8slan adds a suffix of two"
	// +kubebuilder:validation:items:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="a spoke's name consists of lower-case letters, digits, '-' and '.', and begins and ends with a letter or digit, as does each part between dots, because the names of its NADs and its resource contain it"
	// +kubebuilder:validation:items:XValidation:rule="self != 'lo'",message="\"lo\" is the loopback interface of every network namespace; choose another name for the spoke"
	Spokes []string `json:"spokes,omitempty"`

	// SpokePools are pools of spokes, for the pods of a Deployment or StatefulSet. A pool is one resource, of which
	// every node has as many as the pool's size says. A pod attaches as to a spoke, with the pool's name in place of
	// the spoke's. Pools can be added, removed and resized while the LAN runs. A port that is in use stays until its
	// pod is gone. The sizes of all pools and the number of spokes add up to at most 500.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=100
	SpokePools []SpokePool `json:"spokePools,omitempty"`

	// NS is the name of the LAN's network namespace on every node, which is a file in /run/k8slan/netns. It must be
	// unique in the cluster. It cannot be changed. Default: <namespace>.<name> of the LAN.
	// +optional
	// +kubebuilder:validation:MaxLength=200
	// +kubebuilder:validation:XValidation:rule="self.matches('^[A-Za-z0-9_][A-Za-z0-9_.-]*$')",message="ns is the name of a file in /run/k8slan/netns: it consists of letters, digits, '_', '-' and '.', and begins with a letter, a digit or '_'; without it, the name is <namespace>.<name>"
	NS string `json:"ns,omitempty"`

	// Bridge is the name of the bridge in the LAN's network namespace, at most 15 characters. It cannot be changed.
	// Default: br<vni>.
	// +optional
	Bridge Link `json:"bridge,omitempty"`

	// VXLAN is the name of the VXLAN interface in the LAN's network namespace, at most 15 characters. It cannot be
	// changed. Default: vx<vni>.
	// +optional
	VXLAN Link `json:"vxlan,omitempty"`

	// Discovery is how nodes find each other. With multicast they use the group vxlanGrp, which the network between the
	// nodes must carry. With unicast each node sends to the other nodes that have a pod on the LAN, at the addresses in
	// their LANNodes; it is for clouds and routed networks. With evpn nodes advertise to each other by BGP (RFC 7432)
	// which nodes have pods on the LAN and which MACs each node has, and they learn no MAC from frames; it is for VMs
	// that move and for LANs that reach beyond the cluster. It can be changed while the LAN runs. Default: the value
	// discovery of the chart, which is multicast by default.
	// +optional
	Discovery Discovery `json:"discovery,omitempty"`

	// EVPN has the route targets and route distinguishers of the LAN's routes. It has no effect with other discoveries
	// than evpn. It can be changed while the LAN runs.
	// +optional
	EVPN *EVPNOptions `json:"evpn,omitempty"`

	// StrictPeers makes each node drop VXLAN packets with the LAN's VNI whose source is no member of the LAN, before
	// they reach a pod. Members are the nodes that the LAN spans, with the addresses of the underlay devices in their
	// LANNodes. It can be changed while the LAN runs. Default: true with discovery unicast; false with multicast and
	// evpn, where machines beyond the cluster may be on the LAN.
	// +optional
	StrictPeers *bool `json:"strictPeers,omitempty"`

	// VXLANGroup is the multicast group, IPv6 or IPv4, over which nodes find each other. For a link-local IPv6 group,
	// ff02::/16, the underlay device needs only its link-local address. With discovery unicast and evpn nothing is sent
	// to the group, but if it is given, nodes use addresses of its family. Default: ff02::14.
	// +optional
	// +kubebuilder:validation:MaxLength=45
	// +kubebuilder:validation:XValidation:rule="isIP(self) && self.matches('^([fF][fF][0-9a-fA-F][2-9a-fA-F]:|22[4-9][.]|23[0-9][.])')",message="vxlanGrp is a multicast address that leaves the node: IPv6 in ff00::/8 with a scope of 2 or more (such as ff02::14), or IPv4 in 224.0.0.0/4 (such as 239.1.1.1)"
	VXLANGroup string `json:"vxlanGrp,omitempty"`

	// VXLANPort is the UDP port of the VXLAN, 1 to 65535. Default: 4789.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	VXLANPort int32 `json:"vxlanPort,omitempty"`

	// DefaultVXLANDev is the underlay device, in the node's own network namespace, of nodes that vxlanDevMap does not
	// name. LANs may share it. Default: each node chooses. It uses the device that has an address in the chart's
	// vtepCIDRs. Without vtepCIDRs, it uses the device with the node's InternalIP if discovery is unicast or evpn, or
	// else the device of the default route.
	// +optional
	DefaultVXLANDev Device `json:"defaultVxlanDev,omitempty"`

	// VXLANDevMap has the underlay devices of single nodes. A key is a node's name or, if the name is not in the map,
	// the value of its label kubernetes.io/hostname.
	// +optional
	// +kubebuilder:validation:MaxProperties=5000
	VXLANDevMap map[string]Device `json:"vxlanDevMap,omitempty"`

	// MTU is the size in bytes of the largest packet that the LAN carries for its pods and VMs, 68 to 65535. Default:
	// the underlay's MTU less 78 (over IPv6) or 58 (over IPv4), which leaves room for two VLAN tags.
	// +optional
	// +kubebuilder:validation:Minimum=68
	// +kubebuilder:validation:Maximum=65535
	MTU int32 `json:"mtu,omitempty"`

	// NodeSelector limits the LAN to nodes that have all these labels. Default: every node.
	// +optional
	// +kubebuilder:validation:MaxProperties=50
	NodeSelector map[string]LabelValue `json:"nodeSelector,omitempty"`

	// AllowedNamespaces are the namespaces, besides the LAN's own, whose pods may attach; "*" allows all namespaces.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=500
	// +kubebuilder:validation:items:MaxLength=63
	// +kubebuilder:validation:items:XValidation:rule="self == '*' || self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="an allowed namespace is the name of a namespace, or \"*\" for all; patterns such as team-* are not supported"
	AllowedNamespaces []string `json:"allowedNamespaces,omitempty"`

	// TxChecksum says where TCP, UDP and SCTP checksums are computed. With on, they are left to the hardware, as Linux
	// does everywhere: frames between pods and VMs then have unfinished checksums, and TCP is several times faster.
	// With off, the kernel computes each checksum and cuts each frame to the MTU, in frames to a pod or VM and in
	// frames from it. Network functions need off if they read raw frames (AF_PACKET without PACKET_AUXDATA, DPDK's
	// af_packet, the data planes of many VNFs) and drop frames with a wrong checksum. The sign of it is that ping
	// works, and BGP, SSH or any other TCP does not. It can be changed while the LAN runs. Default: on.
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:pruning:PreserveUnknownFields
	// +kubebuilder:validation:Enum=on;off;true;false
	TxChecksum OnOff `json:"txChecksum,omitempty"`

	// SpokeOptions are settings of single spokes, by the spoke's name, or of all ports of a pool, by the pool's name.
	// They override those of the LAN.
	// +optional
	// +kubebuilder:validation:MaxProperties=500
	SpokeOptions map[string]SpokeOptions `json:"spokeOptions,omitempty"`

	// IPAM is a CNI IPAM section, such as {"type": "host-local", …}, which the NADs for pods contain. VMs get no
	// addresses from CNI.
	// +optional
	// +kubebuilder:pruning:PreserveUnknownFields
	IPAM *IPAM `json:"ipam,omitempty"`
}

// SpokePool is a number of spokes on every node that share one resource and one pair of NADs. They are the pool's
// ports.
type SpokePool struct {
	// Name is the name of the pool. It has at most 9 characters: lower-case letters, digits, '-' and '.'. It must be
	// unique in the cluster among spokes and pools. The pool's ports are called <name>_0, <name>_1 and so on.
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:XValidation:rule="self.size() <= 9",message="a pool's name has at most 9 characters, because Linux allows 15 for an interface and k8slan adds the port's number and a suffix"
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="a pool's name consists of lower-case letters, digits, '-' and '.', and begins and ends with a letter or digit, as does each part between dots, because the names of its NADs and its resource contain it"
	Name string `json:"name"`

	// Size is the number of ports on each node, 1 to 500. It can be changed while pods are attached: a port beyond the
	// new size stays until its pod is gone.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=500
	Size int32 `json:"size"`

	// MACBy says what a pod's MAC is derived from, besides LAN and pool. With port it is the node and the port: no two
	// pods have the same MAC, and a pod that is created again may have another MAC. With ordinal it is the number at
	// the end of the pod's name, for the pods of one StatefulSet, which keep their MACs on every node: two pods with
	// the same number have the same MAC, and a pod without a number is refused. Default: port.
	// +optional
	// +kubebuilder:validation:Enum=port;ordinal
	MACBy MACBy `json:"macBy,omitempty"`
}

// MACBy is what the MAC of a pool's port is derived from.
type MACBy string

// The values of MACBy.
const (
	MACByPort    MACBy = "port"
	MACByOrdinal MACBy = "ordinal"
)

// Discovery is how nodes find each other.
//
// +kubebuilder:validation:Enum=multicast;unicast;evpn
type Discovery string

// The values of Discovery.
const (
	Multicast Discovery = "multicast"
	Unicast   Discovery = "unicast"
	EVPN      Discovery = "evpn"
)

// EVPNOptions are the settings of a LAN's routes (RFC 7432). They can be changed while the LAN runs.
type EVPNOptions struct {
	// ImportTargets are route targets such as 65000:222. The LAN's nodes import routes that have one of them, and
	// always those that the LAN's own nodes advertise. Default: the targets whose number is the VNI, of any AS.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=32
	ImportTargets []RouteTarget `json:"importTargets,omitempty"`

	// ExportTargets are the route targets of the routes that the LAN's nodes advertise. Nodes apply a change at
	// different times: to lose no frame, keep the old target beside the new one until all nodes have it. Default:
	// AS:VNI, with the AS of the cluster.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=32
	ExportTargets []RouteTarget `json:"exportTargets,omitempty"`

	// RD is the number in the nodes' route distinguishers for the LAN, 1 to 65535. A route distinguisher is the node's
	// router ID, ':' and this number. If two LANs ask for the same number, one of them gets the next free one. Default:
	// the VNI or, if it is too large or taken, the next free number.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	RD int32 `json:"rd,omitempty"`

	// SuppressNeighbors makes each node answer ARP requests and neighbour solicitations for hosts on other nodes, whose
	// addresses it has received, instead of flooding them. Unsolicited announcements (gratuitous ARP, unsolicited
	// neighbour advertisements) then do not leave the node: other nodes know that an address has moved once they have
	// received its route. It is for LANs with very many hosts. Default: false.
	// +optional
	SuppressNeighbors bool `json:"suppressNeighbors,omitempty"`
}

// RouteTarget is AS:number in decimal. On the wire one of the two has four octets and the other has two (RFC 4360,
// RFC 5668).
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:XValidation:rule="self.matches('^(0|[1-9][0-9]{0,9}):(0|[1-9][0-9]{0,9})$') && self.split(':').all(n, int(n) <= 4294967295) && self.split(':').exists(n, int(n) <= 65535)",message="a route target is AS:number, such as 65000:222; one of the two is at most 4294967295, the other at most 65535"
type RouteTarget string

// SpokeOptions are settings of one spoke, or of each port of a pool.
type SpokeOptions struct {
	// TxChecksum is what spec.txChecksum is, on or off, for frames to and from the spoke's pod or VM. Set it to off on
	// the spoke of a network function that drops unfinished checksums; traffic between other spokes keeps its speed.
	// Default: the LAN's spec.txChecksum.
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:pruning:PreserveUnknownFields
	// +kubebuilder:validation:Enum=on;off;true;false
	TxChecksum OnOff `json:"txChecksum,omitempty"`
}

// Link is the name of an interface that k8slan creates. It is an interface name by the kernel's rules (dev_valid_name
// in net/core/dev.c), without '%', for which the kernel would put in a number, and not the name of a spoke's link.
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:XValidation:rule="self.size() <= 15",message="an interface name has at most 15 characters, because Linux allows no more"
// +kubebuilder:validation:XValidation:rule="self.matches('^[A-Za-z0-9_][A-Za-z0-9_.-]*$')",message="an interface name consists of letters, digits, '_', '-' and '.', and begins with a letter, a digit or '_'"
// +kubebuilder:validation:XValidation:rule="!(self in ['lo', 'all', 'default'])",message="\"lo\", \"all\" and \"default\" are already used in every network namespace; choose another name"
// +kubebuilder:validation:XValidation:rule="!self.endsWith('_b') && !self.endsWith('_p')",message="names that end in _b or _p belong to the links of spokes; choose another name"
type Link = string

// Device is the name of a device of the node, by the kernel's rules (dev_valid_name in net/core/dev.c).
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:XValidation:rule="self.matches('^[!-.0-9;-~]{1,15}$') && !(self in ['.', '..'])",message="a device is the name of an interface of the node: 1 to 15 characters without '/', ':' and blanks"
type Device string

// LabelValue is the value of a label.
//
// +kubebuilder:validation:MaxLength=63
type LabelValue string

// Condition types of a LAN.
const (
	// ConditionAccepted is False if another LAN holds something that this LAN asks for: its ns or VNI, then the whole
	// LAN is refused; or a spoke, then only that spoke is refused.
	ConditionAccepted = "Accepted"
	// ConditionReady is True if the LAN holds all that it asks for and every node that it spans offers its spokes and
	// can carry their frames to the other nodes.
	ConditionReady = "Ready"
	// ConditionAttachedTwice is True while a spoke is attached on two nodes. That is right during a live migration and
	// otherwise a mistake, because both have the same MAC. The condition is absent otherwise.
	ConditionAttachedTwice = "AttachedTwice"
	// ConditionPoolExceeded is True while more pods are attached to a pool on a node than it has ports, because the
	// pool was made smaller. The pods stay attached. The condition is absent otherwise.
	ConditionPoolExceeded = "PoolExceeded"
)

// Reasons of a LAN's conditions, besides those of a segment (Reason… in lannode.go).
const (
	ReasonHeld          = "Held"          // Accepted: the LAN holds all that it asks for
	ReasonConflict      = "Conflict"      // ns or VNI is held by another LAN, or still in use
	ReasonSpokeConflict = "SpokeConflict" // a spoke is held by another LAN, or still in use
	ReasonNADConflict   = "NADConflict"   // a NAD with the name of one of the LAN's does not belong to the LAN
	ReasonOffered       = "Offered"       // Ready: every node offers the spokes
	ReasonNoNodes       = "NoNodes"       // no node runs k8slan, or none matches spec.nodeSelector
	ReasonPending       = "Pending"       // a node has not reported yet, or does not offer every spoke yet
	ReasonUnreachable   = "Unreachable"   // a node does not answer
	ReasonMixedFamilies = "MixedFamilies" // nodes have VTEPs of both IP versions, which do not reach each other
	ReasonTwoNodes      = "TwoNodes"      // AttachedTwice: a spoke is attached on more than one node
	ReasonOneNode       = "OneNode"       // an event: AttachedTwice has ended
	ReasonShrunk        = "Shrunk"        // PoolExceeded: a pool was made smaller than its use
	ReasonFits          = "Fits"          // an event: PoolExceeded has ended
	ReasonDeleting      = "Deleting"      // Ready: the LAN is being deleted and stays until every node has removed it
	ReasonInUse         = "InUse"         // Ready: the LAN is being deleted and stays until its pods are gone
	ReasonNodeLost      = "NodeLost"      // an event: a LAN is deleted although a lost node has not removed it
)

// LANState is a LAN's status in one word.
type LANState string

// The states of a LAN.
const (
	StatePending  LANState = "Pending"  // not every node offers its spokes yet
	StateReady    LANState = "Ready"    // every node that it spans offers its spokes
	StateDegraded LANState = "Degraded" // something is wrong on some nodes, or with one of its spokes
	StateConflict LANState = "Conflict" // refused: another LAN holds its ns or VNI
	StateDeleting LANState = "Deleting" // being deleted: offers nothing, and stays until its pods are gone
)

// Holding is what a LAN holds in the cluster, with its effective values. Nodes build exactly this.
type Holding struct {
	// NS is the name of the network namespace. No other LAN has it.
	NS string `json:"ns"`
	// VNI is the VXLAN network identifier. No other LAN has it on this UDP port.
	VNI int32 `json:"vni"`
	// Port is the VXLAN's UDP port.
	Port int32 `json:"vxlanPort"`
	// Spokes are the names of the spokes and pools that the LAN holds, sorted. Those that another LAN holds are
	// missing.
	// +listType=set
	// +optional
	Spokes []string `json:"spokes,omitempty"`
	// Discovery is how the LAN's nodes find each other: spec.discovery or, without it, the chart's discovery. Nodes
	// read the chart's discovery here, so that all of them follow a change at the same time.
	// +optional
	Discovery Discovery `json:"discovery,omitempty"`
}

// SpokeStatus is the status of a spoke that has an attachment or is refused. Free spokes are not listed.
type SpokeStatus struct {
	// Name is the name of the spoke.
	Name string `json:"name"`
	// Refused says why the LAN does not hold the spoke. It is empty for a spoke that the LAN holds.
	// +optional
	Refused string `json:"refused,omitempty"`
	// Attachments are the spoke's attachments on all nodes: one, or two during a live migration.
	// +optional
	// +listType=atomic
	Attachments []SpokeAttachment `json:"attachments,omitempty"`
}

// PoolStatus is the use of one pool.
type PoolStatus struct {
	// Name is the name of the pool.
	Name string `json:"name"`
	// Refused says why the LAN does not hold the pool. It is empty for a pool that the LAN holds.
	// +optional
	Refused string `json:"refused,omitempty"`
	// Attached is the number of attachments on all nodes.
	Attached int32 `json:"attached"`
	// Ports is the number of ports on all nodes: the pool's size times the number of nodes that the LAN spans. It is 0
	// for a pool that is refused or no longer in the spec.
	Ports int32 `json:"ports"`
	// Nodes are the nodes that have pods attached to the pool, the first 100 by name. Their LANNodes list the pods.
	// +optional
	// +listType=atomic
	Nodes []PoolNode `json:"nodes,omitempty"`
}

// PoolNode is the use of a pool on one node.
type PoolNode struct {
	// Node is the name of the node.
	Node string `json:"node"`
	// Attached is the number of the pool's attachments on the node.
	Attached int32 `json:"attached"`
}

// SpokeAttachment is an attachment and its node.
type SpokeAttachment struct {
	// Node is the name of the node on which the pod runs.
	Node       string `json:"node"`
	Attachment `json:",inline"`
}

// LANStatus is the observed state of a LAN. Only the controller writes it.
type LANStatus struct {
	// ObservedGeneration is the metadata.generation of the spec that this status belongs to.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Holds is what the LAN holds in the cluster. It is absent while the LAN is refused. Nodes build exactly this.
	// +optional
	Holds *Holding `json:"holds,omitempty"`
	// State is the LAN's status in one word: Pending, Ready, Degraded, Conflict or Deleting.
	// +optional
	State LANState `json:"state,omitempty"`
	// Reason is the reason of the state, in one word or a short phrase. The conditions have it as a sentence.
	// +optional
	Reason string `json:"reason,omitempty"`
	// Discovery is how nodes find each other: spec.discovery or, without it, the chart's discovery.
	// +optional
	Discovery string `json:"discovery,omitempty"`
	// SpokeCount is the number of spokes that the LAN holds on each node, ports of pools included.
	// +optional
	SpokeCount int32 `json:"spokeCount"`
	// Attached is the number of attachments on all nodes.
	// +optional
	Attached int32 `json:"attached"`
	// Nodes is the number of nodes on which the LAN is ready, '/' and the number of nodes that the LAN spans, such as
	// 2/2. A LAN spans the nodes that run k8slan and match spec.nodeSelector.
	// +optional
	Nodes string `json:"nodes,omitempty"`
	// Spokes are the spokes that have attachments or are refused.
	// +optional
	// +listType=map
	// +listMapKey=name
	Spokes []SpokeStatus `json:"spokes,omitempty"`
	// Pools are the LAN's pools, and those that were removed from its spec and still have attachments.
	// +optional
	// +listType=map
	// +listMapKey=name
	Pools []PoolStatus `json:"pools,omitempty"`
	// Conditions are Accepted and Ready; AttachedTwice while a spoke is attached on two nodes; and PoolExceeded while a
	// pool has more attachments on a node than ports.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// LAN is a virtual Ethernet segment that spans the nodes of a cluster.
//
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 63",message="a LAN's name has at most 63 characters, because it is a label of its NADs and a part of its network namespace's name"
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
