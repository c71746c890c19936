// Package manifests holds the CustomResourceDefinitions of lan.k8slan.io, generated from crd/v1beta1.
package manifests

import "embed"

// Files has one YAML file for each definition.
//
//go:embed *.yaml
var Files embed.FS
