// Package bench measures how fast k8slan is: against what the kernel alone needs for the same, against other plugins,
// and against the same network made by hand, each time in turn and in one run, because machines differ and drift.
package bench
