package v1beta1

import (
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Limits and defaults of LANSpec.
const (
	DefaultGroup = "ff02::14" // multicast group of the VXLAN
	DefaultPort  = 4789       // UDP port of the VXLAN

	// MaxSpokes is the largest number of spokes in one LAN. A Linux bridge has 1,023 ports
	// (BR_MAX_PORTS in net/bridge/br_private.h) and a spoke takes two of them while a pod is attached.
	MaxSpokes = 500
)

// LANSpec says what a LAN is. Only vni and spokes are required.
//
// +kubebuilder:validation:XValidation:rule="has(self.ns) == has(oldSelf.ns) && (!has(self.ns) || self.ns == oldSelf.ns)",message="ns cannot change: attached pods hang on the network namespace of that name; delete the LAN and create it anew"
// +kubebuilder:validation:XValidation:rule="has(self.bridge) == has(oldSelf.bridge) && (!has(self.bridge) || self.bridge == oldSelf.bridge)",message="bridge cannot change: attached pods hang on the bridge of that name; delete the LAN and create it anew"
// +kubebuilder:validation:XValidation:rule="has(self.vxlan) == has(oldSelf.vxlan) && (!has(self.vxlan) || self.vxlan == oldSelf.vxlan)",message="vxlan cannot change: nodes would not all rename it at once; delete the LAN and create it anew"
type LANSpec struct {
	// VNI is the VXLAN network identifier, 1 to 16777215. It must be unique in the cluster per vxlanPort.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=16777215
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="vni cannot change: for a while some nodes would use the old one and some the new; delete the LAN and create it anew"
	VNI int32 `json:"vni"`

	// Spokes are the names of the LAN's ports; each takes one pod or VM. At most 13 characters each, unique in the cluster.
	// Spokes can be added and removed while the LAN runs; one that is removed while a pod is attached goes when the pod goes.
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=500
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=13
	Spokes []string `json:"spokes"`

	// NS is the name of the LAN's network namespace on every node, a file under /run/k8slan/netns.
	// Default: <namespace>.<name> of the LAN.
	// +optional
	NS string `json:"ns,omitempty"`

	// Bridge is the name of the bridge inside that network namespace. Default: br<vni>.
	// +optional
	Bridge string `json:"bridge,omitempty"`

	// VXLAN is the name of the VXLAN interface inside that network namespace. Default: vx<vni>.
	// +optional
	VXLAN string `json:"vxlan,omitempty"`

	// VXLANGroup is the multicast group, IPv6 or IPv4, over which nodes find each other. Default: ff02::14.
	// +optional
	VXLANGroup string `json:"vxlanGrp,omitempty"`

	// VXLANPort is the UDP port of the VXLAN. Default: 4789.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	VXLANPort int32 `json:"vxlanPort,omitempty"`

	// DefaultVXLANDev is the underlay device of nodes that vxlanDevMap does not name. Default: the device of the default route.
	// +optional
	DefaultVXLANDev string `json:"defaultVxlanDev,omitempty"`

	// VXLANDevMap gives nodes their own underlay device. A key is a node's name or, if that is not in the map, its label kubernetes.io/hostname.
	// +optional
	VXLANDevMap map[string]string `json:"vxlanDevMap,omitempty"`

	// MTU is the largest packet, in bytes, that the LAN carries for its pods and VMs.
	// Default: the underlay's MTU less 78 (IPv6 group) or 58 (IPv4 group), which leaves room for two VLAN tags.
	// +optional
	// +kubebuilder:validation:Minimum=68
	// +kubebuilder:validation:Maximum=65535
	MTU int32 `json:"mtu,omitempty"`

	// NodeSelector limits the LAN to nodes that bear all these labels. Default: every node.
	// +optional
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`

	// AllowedNamespaces are the namespaces, beside the LAN's own, whose pods may attach; "*" opens the LAN to all.
	// +optional
	// +listType=set
	AllowedNamespaces []string `json:"allowedNamespaces,omitempty"`

	// IPAM is a CNI IPAM section that is handed to the NADs of pods, such as {"type": "host-local", …}. VMs get no addresses from CNI.
	// +optional
	// +kubebuilder:pruning:PreserveUnknownFields
	IPAM *apiextensionsv1.JSON `json:"ipam,omitempty"`
}

// Condition types and reasons of a LAN.
const (
	// ConditionAccepted is False where what the LAN asks for is held by another LAN.
	ConditionAccepted = "Accepted"
	// ConditionReady is True when every node that the LAN spans offers its spokes.
	ConditionReady = "Ready"
)

// LANState sums up a LAN for people.
type LANState string

// The states of a LAN.
const (
	StatePending  LANState = "Pending"  // no node has reported yet
	StateReady    LANState = "Ready"    // offered on every node it spans
	StateDegraded LANState = "Degraded" // not offered on some nodes, or one of its spokes is refused
	StateConflict LANState = "Conflict" // refused: its ns or VNI is held by another LAN
)

// Holding is what a LAN holds in the cluster by its effective values; nodes build what is held and nothing else.
type Holding struct {
	NS     string `json:"ns"`
	VNI    int32  `json:"vni"`
	Port   int32  `json:"vxlanPort"`
	// +listType=set
	// +optional
	Spokes []string `json:"spokes,omitempty"`
}

// SpokeStatus is one spoke that is attached or refused; a spoke that just waits is not listed.
type SpokeStatus struct {
	Name string `json:"name"`
	// Refused says why the spoke is not offered; empty for a spoke that is.
	// +optional
	Refused string `json:"refused,omitempty"`
	// +optional
	// +listType=atomic
	Attachments []SpokeAttachment `json:"attachments,omitempty"`
}

// SpokeAttachment is an attachment with the node it is on.
type SpokeAttachment struct {
	Node       string `json:"node"`
	Attachment `json:",inline"`
}

// LANStatus is written by the controller alone.
type LANStatus struct {
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Holds is what this LAN holds; absent while it is refused.
	// +optional
	Holds *Holding `json:"holds,omitempty"`
	// +optional
	State LANState `json:"state,omitempty"`
	// Reason is one word or short phrase for the state, for the printer columns.
	// +optional
	Reason string `json:"reason,omitempty"`
	// Discovery is how nodes find each other: multicast.
	// +optional
	Discovery string `json:"discovery,omitempty"`
	// SpokeCount is the number of spokes the LAN holds.
	// +optional
	SpokeCount int32 `json:"spokeCount,omitempty"`
	// Attached is the number of attachments on all nodes.
	// +optional
	Attached int32 `json:"attached"`
	// Nodes is "ready/spanned", such as 2/2.
	// +optional
	Nodes string `json:"nodes,omitempty"`
	// Spokes lists the spokes that are attached or refused.
	// +optional
	// +listType=map
	// +listMapKey=name
	Spokes []SpokeStatus `json:"spokes,omitempty"`
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// LAN is a virtual Ethernet segment that spans the nodes of a cluster.
//
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
