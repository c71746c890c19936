// Package dataplane proves with real frames what a LAN does: segments as the node's manager builds them, pods and VMs
// as the CNI plugin attaches them, on two nodes in namespaces of the test's own.
package dataplane
