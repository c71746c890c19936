package v1beta1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// AttachmentKind is what the pod got: its end of a veth, or a macvtap.
type AttachmentKind string

// The kinds of attachment.
const (
	KindVeth    AttachmentKind = "veth"
	KindMacvtap AttachmentKind = "macvtap"
)

// Attachment is one pod or VM on a spoke, as the node's kernel has it.
type Attachment struct {
	// Spoke that is taken; of a pool the port, such as web_3.
	Spoke string `json:"spoke"`
	// Pool that the spoke is a port of; empty for a single spoke.
	// +optional
	Pool string `json:"pool,omitempty"`
	// Pod is namespace/name.
	Pod string `json:"pod"`
	// Interface is the link's name in the pod.
	Interface string `json:"interface"`
	// MAC of that link.
	MAC string `json:"mac"`
	// Kind is veth or macvtap.
	Kind AttachmentKind `json:"kind"`
	// Since when the pod is attached.
	Since metav1.Time `json:"since"`
}

// SegmentState is the health of a LAN on one node.
type SegmentState string

// The states of a segment.
const (
	SegmentReady    SegmentState = "Ready"    // built and offered
	SegmentDegraded SegmentState = "Degraded" // built and offered, but frames to other nodes are in doubt (underlay without carrier)
	SegmentNotReady SegmentState = "NotReady" // not offered: pods wait
	SegmentLeaving  SegmentState = "Leaving"  // no longer wanted here; stays until its last pod is gone
)

// Reasons of a segment that is not Ready.
const (
	ReasonUnderlayMissing    = "UnderlayMissing"    // the node has no such device, or no default route
	ReasonUnderlayNoAddress  = "UnderlayNoAddress"  // the device has no address of the group's family
	ReasonUnderlayDown       = "UnderlayDown"       // the device is down or has no carrier
	ReasonMTUTooLarge        = "MTUTooLarge"        // spec.mtu does not fit the underlay
	ReasonVNITaken           = "VNITaken"           // something else on the node uses the VNI on that port
	ReasonBuildFailed        = "BuildFailed"        // the kernel refused; the message has its words
	ReasonBGPDown            = "BGPDown"            // discovery evpn: no session is up
	ReasonMACTwice           = "MACTwice"           // discovery evpn: a MAC is on this node and on another
	ReasonRoutesWithheld     = "RoutesWithheld"     // discovery evpn: a peer takes no routes with an IPv6 VTEP
	ReasonRoutesRefused      = "RoutesRefused"      // discovery evpn: another router tells what cannot be used
	ReasonNonMembersAccepted = "NonMembersAccepted" // the kernel does not filter what is no member's; the message has its words
)

// SegmentStatus is one LAN on this node.
type SegmentStatus struct {
	// LAN is namespace/name, or megalos:<vni> of one that pods made by naming its VNI.
	LAN string `json:"lan"`
	// UID of the LAN that this node has built; another one than the LAN's of that name if that was deleted and made anew, none where no LAN object wants it.
	UID types.UID `json:"uid"`
	// Generation of the LAN that this node has built.
	// +optional
	Generation int64 `json:"generation,omitempty"`
	// State is Ready, Degraded, NotReady or Leaving.
	State SegmentState `json:"state"`
	// Reason is one word for a state that is not Ready.
	// +optional
	Reason string `json:"reason,omitempty"`
	// Message says what is wrong on this node and the way out.
	// +optional
	Message string `json:"message,omitempty"`
	// VNI and port that the segment occupies on this node, also while it is leaving.
	// +optional
	VNI int32 `json:"vni,omitempty"`
	// Port is the VXLAN's UDP port.
	// +optional
	Port int32 `json:"vxlanPort,omitempty"`
	// NS is the name of the network namespace, a file under /run/k8slan/netns.
	NS string `json:"ns"`
	// Underlay is the device that carries the VXLAN; empty if none was found.
	// +optional
	Underlay string `json:"underlay,omitempty"`
	// VTEP is this node's address on the underlay.
	// +optional
	VTEP string `json:"vtep,omitempty"`
	// MTU that the LAN has on this node, in bytes.
	// +optional
	MTU int32 `json:"mtu,omitempty"`
	// Offered is the number of spokes, and ports of pools, that this node offers to kubelet, taken ones included.
	// +optional
	Offered int32 `json:"offered,omitempty"`
	// Attachments on this node, sorted by spoke.
	// +optional
	// +listType=atomic
	Attachments []Attachment `json:"attachments,omitempty"`
}

// NodeUnderlay is a device of the node that carries LANs.
type NodeUnderlay struct {
	// Name of the device.
	Name string `json:"name"`
	// Addresses that packets from there may bear, sorted: all that the device has. Other nodes take no other for this node's where a LAN
	// says strictPeers.
	// +optional
	// +listType=atomic
	Addresses []string `json:"addresses,omitempty"`
}

// GoneLAN is a LAN that is being deleted and of which a node has nothing left.
type GoneLAN struct {
	// LAN is namespace/name.
	LAN string `json:"lan"`
	// UID of the LAN.
	UID types.UID `json:"uid"`
	// Generation of the LAN that the node has seen deleted.
	Generation int64 `json:"generation"`
}

// SessionState is whether a BGP session is there.
type SessionState string

// The states of a session.
const (
	SessionUp   SessionState = "Up"
	SessionDown SessionState = "Down"
)

// BGPSession is how it stands with a router from which this node hears of LANs with discovery evpn, and which it tells of them.
type BGPSession struct {
	// Peer is the router's address and port.
	Peer string `json:"peer"`
	// AS that the router is to be of.
	AS int64 `json:"as"`
	// State is Up or Down.
	State SessionState `json:"state"`
	// Since when the session is in that state; of one that is being connected, when that began.
	Since metav1.Time `json:"since"`
	// Message says why the session is down, as far as that is known.
	// +optional
	Message string `json:"message,omitempty"`
}

// LANNodeStatus is written by the node of that name alone.
type LANNodeStatus struct {
	// Segments are the LANs on this node, those that are leaving included; of each namespace (ns) there is one.
	// +optional
	// +listType=atomic
	Segments []SegmentStatus `json:"segments,omitempty"`
	// Underlays are the devices that the segments use.
	// +optional
	// +listType=map
	// +listMapKey=name
	Underlays []NodeUnderlay `json:"underlays,omitempty"`
	// Sessions are the BGP sessions of this node, by the peers' addresses; none where EVPN is not set up.
	// +optional
	// +listType=map
	// +listMapKey=peer
	Sessions []BGPSession `json:"sessions,omitempty"`
	// Gone are LANs that are being deleted and of which this node has nothing left, no link, no offer and no pod: its word that it
	// will not build them again. A LAN object goes when every node has given it; it leaves this list after that.
	// +optional
	// +listType=map
	// +listMapKey=uid
	Gone []GoneLAN `json:"gone,omitempty"`
	// Version of k8slan on the node.
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

// LANNode is what one node has of each LAN. It bears the node's name and goes with the Node.
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
