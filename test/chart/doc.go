// Package chart tests charts/k8slan as Helm renders it.
package chart
