// Package images builds the images of the test cluster: pods, VMs and the sandboxes of pods.
package images

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path"

	"github.com/k8slan/k8slan/build/image"
)

// The names of the test cluster's images.
const (
	PauseName   = "localhost/k8slan/pause:1"
	ToolboxName = "localhost/k8slan/toolbox:1"
	VMName      = "localhost/k8slan/vm:1"
)

// Pause returns the archive of the image that holds pods' sandboxes. It builds
// it unless cacheDir has it, made from the same inputs.
func Pause(ctx context.Context, cacheDir string) (archivePath string, err error) {
	return withPrograms(ctx, cacheDir, func(bin programs) (image.Image, error) {
		return image.Image{
			Name:       PauseName,
			Files:      []image.File{image.Copy("/pause", bin["pause"], 0o755)},
			Entrypoint: []string{"/pause"},
		}, nil
	}, "test/images/pause")
}

// Toolbox returns the archive of the image that plain test pods run: busybox
// under all its names, and the program frames. It builds it unless cacheDir
// has it, made from the same inputs.
func Toolbox(ctx context.Context, cacheDir string) (archivePath string, err error) {
	return withPrograms(ctx, cacheDir, func(bin programs) (image.Image, error) {
		files, err := image.Busybox(ctx)
		if err != nil {
			return image.Image{}, err
		}
		return image.Image{
			Name: ToolboxName,
			Files: append(files,
				image.Copy("/bin/frames", bin["frames"], 0o755),
				image.Copy("/bin/pause", bin["pause"], 0o755),
				image.Dir("/tmp", fs.ModeSticky|0o777),
				image.Text("/etc/passwd", "root:x:0:0:root:/:/bin/sh\n"),
				image.Text("/etc/group", "root:x:0:\n"),
			),
			Entrypoint: []string{"/bin/pause"}, // unlike sleep as pid 1, it ends on SIGTERM
		}, nil
	}, "test/images/frames", "test/images/pause")
}

// programs are paths of built programs by name.
type programs map[string]string

// withPrograms builds the programs in folders, lets describe make an image of
// them, and returns its archive in cacheDir, written unless it is there.
func withPrograms(
	ctx context.Context,
	cacheDir string,
	describe func(programs) (image.Image, error),
	folders ...string,
) (string, error) {
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return "", fmt.Errorf("make the image cache: %w", err)
	}
	dir, err := os.MkdirTemp(cacheDir, ".build-*")
	if err != nil {
		return "", fmt.Errorf("make a directory to build in: %w", err)
	}
	defer os.RemoveAll(dir)
	bin := programs{}
	for _, folder := range folders {
		if bin[path.Base(folder)], err = image.Build(ctx, dir, folder); err != nil {
			return "", err
		}
	}
	img, err := describe(bin)
	if err != nil {
		return "", err
	}
	return img.Cached(ctx, cacheDir)
}
