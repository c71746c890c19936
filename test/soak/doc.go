// Package soak attaches and detaches for long, kills the daemon and the CNI plugin at random points, and then counts
// everything on the node that could have been left behind.
package soak
