// Package v1beta1 has the types of the API lan.k8slan.io/v1beta1: LAN, which users write, and LANNode, which the daemon
// on each node writes.
//
// +kubebuilder:object:generate=true
// +groupName=lan.k8slan.io
package v1beta1

//go:generate go run sigs.k8s.io/controller-tools/cmd/controller-gen@v0.23.0 object crd paths=. output:crd:dir=../manifests
//go:generate sh -c "cp ../manifests/*.yaml ../../charts/k8slan/crds/"
