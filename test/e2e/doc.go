// Package e2e shows on a real cluster of two nodes what k8slan promises its users: it installs the chart, applies
// objects as users write them, and sends frames between pods and VMs.
package e2e
