// Package image builds OCI images without Docker, as archives that containerd imports: the product's, and with the same
// code the test cluster's.
//
// An archive is a tar of an OCI image layout with one layer. The standard library and OCI's own types do that in one
// file; a registry library would add a dozen modules.
package image

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// annotationName carries the full image name for containerd, which by OCI's
// own annotation would know the tag alone (containerd, core/images).
const annotationName = "io.containerd.image.name"

// epoch is the time of everything in an archive, so that the same files make
// the same digest. (At 0 some tools read "no time".)
var epoch = time.Unix(1, 0).UTC()

// Image describes an image for the architecture this program runs on.
type Image struct {
	Name       string // in full: registry/repository:tag
	Files      []File
	Entrypoint []string
	Env        []string // NAME=value; PATH is set if it is not here
	User       string   // uid[:gid]; root if empty
	Labels     map[string]string
	Gzip       bool // compress the layer, for images that travel
}

// Write writes img to the archive path, in place of what is there, and only
// when it is complete. ctx ends it between two files.
func (img Image) Write(ctx context.Context, path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make the directory for image %s: %w", img.Name, err)
	}
	out, err := os.CreateTemp(filepath.Dir(path), ".image-*")
	if err != nil {
		return fmt.Errorf("create the archive of image %s: %w", img.Name, err)
	}
	defer os.Remove(out.Name()) // finds nothing once it is renamed
	err = errors.Join(img.write(ctx, out), out.Chmod(0o644), out.Close())
	if err == nil {
		err = os.Rename(out.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write image %s to %s: %w", img.Name, path, err)
	}
	return nil
}

func (img Image) write(ctx context.Context, out io.Writer) error {
	tag := img.Name[strings.LastIndexAny(img.Name, ":/")+1:]
	if !strings.HasSuffix(img.Name, ":"+tag) || tag == "" {
		return fmt.Errorf("image name %q has no tag: want registry/repository:tag", img.Name)
	}
	layer, diffID, err := img.layer(ctx)
	if err != nil {
		return err
	}
	config, err := encode(img.config(diffID), v1.MediaTypeImageConfig)
	if err != nil {
		return err
	}
	manifest, err := encode(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageManifest,
		Config:    config.descriptor,
		Layers:    []v1.Descriptor{layer.descriptor},
	}, v1.MediaTypeImageManifest)
	if err != nil {
		return err
	}
	entry := manifest.descriptor
	entry.Platform = &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	entry.Annotations = map[string]string{annotationName: img.Name, v1.AnnotationRefName: tag}
	index, err := encode(v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageIndex,
		Manifests: []v1.Descriptor{entry},
	}, v1.MediaTypeImageIndex)
	if err != nil {
		return err
	}
	return writeLayout(out, index, manifest, config, layer)
}

func (img Image) config(diffID digest.Digest) v1.Image {
	env := img.Env
	if !hasPath(env) {
		env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, env...)
	}
	return v1.Image{
		Created:  &epoch,
		Platform: v1.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config: v1.ImageConfig{
			User:       cmp.Or(img.User, "0:0"),
			Env:        env,
			Entrypoint: img.Entrypoint,
			Labels:     img.Labels,
		},
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}},
	}
}

func hasPath(env []string) bool {
	for _, e := range env {
		if strings.HasPrefix(e, "PATH=") {
			return true
		}
	}
	return false
}

// blob is one part of the layout: its description and what it holds.
type blob struct {
	descriptor v1.Descriptor
	data       []byte
}

func encode(v any, mediaType string) (blob, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return blob{}, fmt.Errorf("encode %s: %w", mediaType, err)
	}
	return newBlob(data, mediaType), nil
}

func newBlob(data []byte, mediaType string) blob {
	return blob{v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}, data}
}

// layer returns the image's layer and the digest of its uncompressed form.
func (img Image) layer(ctx context.Context) (blob, digest.Digest, error) {
	var plain bytes.Buffer
	if err := writeTar(ctx, &plain, img.Files); err != nil {
		return blob{}, "", err
	}
	diffID := digest.FromBytes(plain.Bytes())
	if !img.Gzip {
		return newBlob(plain.Bytes(), v1.MediaTypeImageLayer), diffID, nil
	}
	var packed bytes.Buffer
	zip := gzip.NewWriter(&packed)
	if _, err := io.Copy(zip, &plain); err != nil {
		return blob{}, "", fmt.Errorf("compress the layer: %w", err)
	}
	if err := zip.Close(); err != nil {
		return blob{}, "", fmt.Errorf("compress the layer: %w", err)
	}
	return newBlob(packed.Bytes(), v1.MediaTypeImageLayerGzip), diffID, nil
}

// writeTar writes files, with the directories above them, as a tar.
func writeTar(ctx context.Context, out io.Writer, files []File) error {
	files, err := Tree(files)
	if err != nil {
		return err
	}
	w := tar.NewWriter(out)
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := f.Read()
		if err != nil {
			return err
		}
		if err := w.WriteHeader(header(f, len(data))); err != nil {
			return fmt.Errorf("add %s to the layer: %w", f.Path, err)
		}
		if _, err := w.Write(data); err != nil {
			return fmt.Errorf("add %s to the layer: %w", f.Path, err)
		}
	}
	return w.Close()
}

func header(f File, size int) *tar.Header {
	h := &tar.Header{
		Typeflag: tar.TypeReg,
		Name:     strings.TrimPrefix(f.Path, "/"),
		Mode:     f.UnixMode(),
		Uid:      f.UID,
		Gid:      f.GID,
		Size:     int64(size),
		Linkname: f.Link,
		ModTime:  epoch,
	}
	switch {
	case f.Mode.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
	case f.Mode&fs.ModeSymlink != 0:
		h.Typeflag = tar.TypeSymlink
	}
	return h
}

// writeLayout writes an OCI image layout as a tar.
func writeLayout(out io.Writer, index blob, blobs ...blob) error {
	w := tar.NewWriter(out)
	add := func(name string, data []byte) error {
		header := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: epoch, Typeflag: tar.TypeReg}
		if err := w.WriteHeader(header); err != nil {
			return err
		}
		_, err := w.Write(data)
		return err
	}
	layout, err := json.Marshal(v1.ImageLayout{Version: v1.ImageLayoutVersion})
	if err != nil {
		return err
	}
	if err := add(v1.ImageLayoutFile, layout); err != nil {
		return err
	}
	if err := add(v1.ImageIndexFile, index.data); err != nil {
		return err
	}
	for _, b := range blobs {
		d := b.descriptor.Digest
		if err := add(filepath.Join(v1.ImageBlobsDir, d.Algorithm().String(), d.Encoded()), b.data); err != nil {
			return err
		}
	}
	return w.Close()
}
