// Package cluster is a real two-node Kubernetes on one machine, without Docker,
// for people to try k8slan on and for tests to break.
//
// Each node, worker1 and worker2, is a set of namespaces and control groups
// with a root file system, containerd, kubelet and kube-proxy of its own. The
// control plane runs in a network namespace that also holds the bridges
// between the nodes: one carries the cluster, the other is the underlay that
// LANs run over. There is one such cluster per machine.
package cluster
