// Package bench measures how fast k8slan is: against what the kernel itself needs for the same, against other plugins,
// and against the same network made by hand. It measures them in turn and in one run, because machines differ and
// drift.
package bench
