// Package v1beta1 holds the API types of lan.k8slan.io/v1beta1: LAN, which users write, and LANNode, which each node writes.
//
// +kubebuilder:object:generate=true
// +groupName=lan.k8slan.io
package v1beta1
