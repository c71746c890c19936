// Package soak attaches and detaches many times, kills the daemon and the CNI plugin at random points, and then counts
// everything that they could have left behind on the node.
package soak
