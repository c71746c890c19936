package v1beta1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// AttachmentKind is the kind of the pod's interface: its end of a veth pair, or a macvtap.
type AttachmentKind string

// The kinds of attachment.
const (
	KindVeth    AttachmentKind = "veth"
	KindMacvtap AttachmentKind = "macvtap"
)

// Attachment is one interface of one pod or VM on a spoke, as observed in the node's kernel.
type Attachment struct {
	// Spoke is the name of the spoke or of the pool's port, such as web_3.
	Spoke string `json:"spoke"`
	// Pool is the name of the pool to which the port belongs. It is empty for a spoke that is not in a pool.
	// +optional
	Pool string `json:"pool,omitempty"`
	// Pod is the pod's namespace/name.
	Pod string `json:"pod"`
	// Interface is the name of the interface in the pod.
	Interface string `json:"interface"`
	// MAC is the MAC of that interface.
	MAC string `json:"mac"`
	// Kind is veth or macvtap.
	Kind AttachmentKind `json:"kind"`
	// Since is the time at which the pod was attached.
	Since metav1.Time `json:"since"`
}

// SegmentState is the state of a LAN on one node.
type SegmentState string

// The states of a segment.
const (
	SegmentReady    SegmentState = "Ready"    // built, and its spokes are offered
	SegmentDegraded SegmentState = "Degraded" // as Ready, but frames to other nodes may be lost
	SegmentNotReady SegmentState = "NotReady" // its spokes are not offered: pods stay Pending
	SegmentLeaving  SegmentState = "Leaving"  // no longer wanted on the node; stays until its last pod is gone
)

// Reasons of a segment that is not Ready.
const (
	ReasonUnderlayMissing    = "UnderlayMissing"    // the node has no such device, or no default route
	ReasonUnderlayNoAddress  = "UnderlayNoAddress"  // the device has no address of the group's family
	ReasonUnderlayDown       = "UnderlayDown"       // the device is down or has no carrier
	ReasonMTUTooLarge        = "MTUTooLarge"        // spec.mtu does not fit the underlay
	ReasonVNITaken           = "VNITaken"           // something else on the node uses the VNI on that port
	ReasonBuildFailed        = "BuildFailed"        // the kernel returned an error; the message has it
	ReasonBGPDown            = "BGPDown"            // discovery evpn: no session is up
	ReasonMACTwice           = "MACTwice"           // discovery evpn: a MAC is on this node and on another
	ReasonRoutesWithheld     = "RoutesWithheld"     // discovery evpn: a peer accepts no routes with an IPv6 VTEP
	ReasonRoutesRefused      = "RoutesRefused"      // discovery evpn: a route of another router cannot be used
	ReasonNonMembersAccepted = "NonMembersAccepted" // packets of non-members are not dropped; the message has the error
)

// SegmentStatus is one LAN on this node.
type SegmentStatus struct {
	// LAN is the LAN's namespace/name, or megalos:<vni> for a segment without a LAN object.
	LAN string `json:"lan"`
	// UID is the UID of the LAN object for which the node built the segment. It differs from that of the present LAN of
	// this name if the LAN was deleted and created again. It is empty for a segment without a LAN object.
	UID types.UID `json:"uid"`
	// Generation is the generation of the LAN object that the node has built.
	// +optional
	Generation int64 `json:"generation,omitempty"`
	// State is Ready, Degraded, NotReady or Leaving.
	State SegmentState `json:"state"`
	// Reason is the reason of a state that is not Ready, in one word.
	// +optional
	Reason string `json:"reason,omitempty"`
	// Message says what is wrong on this node and what to do about it.
	// +optional
	Message string `json:"message,omitempty"`
	// VNI is the VXLAN network identifier that the segment uses on this node, also while it is leaving.
	// +optional
	VNI int32 `json:"vni,omitempty"`
	// Port is the VXLAN's UDP port.
	// +optional
	Port int32 `json:"vxlanPort,omitempty"`
	// NS is the name of the network namespace, which is a file in /run/k8slan/netns.
	NS string `json:"ns"`
	// Underlay is the device that carries the VXLAN packets. It is empty if the node has no such device.
	// +optional
	Underlay string `json:"underlay,omitempty"`
	// VTEP is the address at which this node sends and receives the LAN's VXLAN packets.
	// +optional
	VTEP string `json:"vtep,omitempty"`
	// MTU is the LAN's MTU on this node, in bytes.
	// +optional
	MTU int32 `json:"mtu,omitempty"`
	// Offered is the number of spokes and ports of pools that this node offers, which means that it advertises them to
	// kubelet as healthy. Attached ones are included.
	// +optional
	Offered int32 `json:"offered,omitempty"`
	// Attachments are the LAN's attachments on this node, sorted by spoke.
	// +optional
	// +listType=atomic
	Attachments []Attachment `json:"attachments,omitempty"`
}

// NodeUnderlay is a device of the node that carries VXLAN packets.
type NodeUnderlay struct {
	// Name is the name of the device.
	Name string `json:"name"`
	// Addresses are all addresses of the device, sorted. With strictPeers, other nodes accept packets of this node from
	// these addresses only.
	// +optional
	// +listType=atomic
	Addresses []string `json:"addresses,omitempty"`
}

// GoneLAN is a LAN that is being deleted and that the node has removed.
type GoneLAN struct {
	// LAN is the LAN's namespace/name.
	LAN string `json:"lan"`
	// UID is the LAN's UID.
	UID types.UID `json:"uid"`
	// Generation is the generation of the LAN object that the node observed as being deleted.
	Generation int64 `json:"generation"`
}

// SessionState says whether a BGP session is established.
type SessionState string

// The states of a session.
const (
	SessionUp   SessionState = "Up"
	SessionDown SessionState = "Down"
)

// BGPSession is the state of this node's BGP session with one router, for LANs with discovery evpn.
type BGPSession struct {
	// Peer is the router's address and port.
	Peer string `json:"peer"`
	// AS is the number of the autonomous system in which the router is expected to be.
	AS int64 `json:"as"`
	// State is Up or Down.
	State SessionState `json:"state"`
	// Since is the time at which the session came into this state, or at which the node began to connect.
	Since metav1.Time `json:"since"`
	// Message says why the session is down, if that is known.
	// +optional
	Message string `json:"message,omitempty"`
}

// LANNodeStatus is the observed state of LANs on a node. Only the daemon on that node writes it.
type LANNodeStatus struct {
	// Segments are the LANs on this node, including those that are leaving. There is one for each network namespace
	// (ns).
	// +optional
	// +listType=atomic
	Segments []SegmentStatus `json:"segments,omitempty"`
	// Underlays are the devices that carry the segments' VXLAN packets.
	// +optional
	// +listType=map
	// +listMapKey=name
	Underlays []NodeUnderlay `json:"underlays,omitempty"`
	// Sessions are the BGP sessions of this node, sorted by the peers' addresses. There are none without EVPN.
	// +optional
	// +listType=map
	// +listMapKey=peer
	Sessions []BGPSession `json:"sessions,omitempty"`
	// Gone are the LANs that are being deleted and that this node has removed: no link, resource or attachment is left,
	// and the node will not build them again. A LAN object is deleted when it is in this list of every node, and is
	// then removed from the list.
	// +optional
	// +listType=map
	// +listMapKey=uid
	Gone []GoneLAN `json:"gone,omitempty"`
	// Version is the version of k8slan on the node.
	// +optional
	Version string `json:"version,omitempty"`
	// LANs is the number of segments.
	// +optional
	LANs int32 `json:"lans"`
	// Ready is the number of segments in state Ready.
	// +optional
	Ready int32 `json:"ready"`
	// Attached is the number of attachments on this node.
	// +optional
	Attached int32 `json:"attached"`
}

// LANNode is what one node has of each LAN. It has the node's name and is deleted with the Node.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,path=lannodes,singular=lannode,shortName=lann,categories=k8slan
// +kubebuilder:printcolumn:name="LANs",type=integer,JSONPath=`.status.lans`
// +kubebuilder:printcolumn:name="Ready",type=integer,JSONPath=`.status.ready`
// +kubebuilder:printcolumn:name="Attached",type=integer,JSONPath=`.status.attached`
// +kubebuilder:printcolumn:name="Version",type=string,JSONPath=`.status.version`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type LANNode struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Status LANNodeStatus `json:"status,omitempty"`
}

// LANNodeList is a list of LANNodes.
//
// +kubebuilder:object:root=true
type LANNodeList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []LANNode `json:"items"`
}
