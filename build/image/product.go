package image

import (
	"context"
	"io/fs"
	"slices"
)

// Repository is where the product's image lives.
const Repository = "ghcr.io/k8slan/k8slan"

// Product says what goes into the product's image.
type Product struct {
	Version string // the image's tag
	K8slan  string // path of the static program k8slan: the entrypoint
	CNI     string // path of the static program k8slan-cni
	Tools   []File // that hooks of sidecars need: a shell and ip, Busybox
}

// K8slan writes the product's image to archive.
func K8slan(ctx context.Context, archive string, p Product) error {
	for _, program := range []string{p.K8slan, p.CNI} {
		if err := CheckStatic(program); err != nil {
			return err
		}
	}
	return Image{
		Name: Repository + ":" + p.Version,
		Files: append(slices.Clone(p.Tools),
			Copy("/k8slan", p.K8slan, 0o755),
			Copy("/k8slan-cni", p.CNI, 0o755),
			Symlink("/usr/local/bin/kubelan", "/k8slan"), // started by this name it is the sidecar
			Dir("/tmp", fs.ModeSticky|0o777),
		),
		Entrypoint: []string{"/k8slan"},
		Labels: map[string]string{
			"org.opencontainers.image.title":    "k8slan",
			"org.opencontainers.image.source":   "https://github.com/k8slan/k8slan",
			"org.opencontainers.image.version":  p.Version,
			"org.opencontainers.image.licenses": "Apache-2.0 AND GPL-2.0-only", // k8slan's, and busybox's
		},
		Gzip: true,
	}.Write(ctx, archive)
}
