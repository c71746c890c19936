package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func sample(t *testing.T) Image {
	t.Helper()
	program := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("machine code"), 0o600); err != nil {
		t.Fatal(err)
	}
	return Image{
		Name: "registry.test:5000/some/thing:v1.2",
		Files: []File{
			Symlink("/bin/alias", "program"),
			{Path: "/home/user/notes", Mode: 0o640, UID: 107, GID: 108, Data: []byte("notes")},
			Copy("/bin/program", program, 0o755),
			Dir("/tmp", fs.ModeSticky|0o777),
		},
		Entrypoint: []string{"/bin/program", "run"},
		Env:        []string{"A=b"},
		User:       "107:107",
		Labels:     map[string]string{"k": "v"},
	}
}

// layout is an archive read back.
type layout struct {
	files    map[string][]byte
	entry    v1.Descriptor
	manifest v1.Manifest
	config   v1.Image
}

func readBack(t *testing.T, img Image) layout {
	t.Helper()
	archive := filepath.Join(t.TempDir(), "image.tar")
	if err := img.Write(context.Background(), archive); err != nil {
		t.Fatal(err)
	}
	return readArchive(t, archive)
}

func readArchive(t *testing.T, archive string) layout {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l := layout{files: map[string][]byte{}}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if l.files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	var index v1.Index
	decode(t, l.files["index.json"], &index)
	if len(index.Manifests) != 1 {
		t.Fatalf("index names %d manifests, want 1", len(index.Manifests))
	}
	l.entry = index.Manifests[0]
	decode(t, l.blob(t, l.entry), &l.manifest)
	decode(t, l.blob(t, l.manifest.Config), &l.config)
	return l
}

// blob returns what d describes, and checks that it does.
func (l layout) blob(t *testing.T, d v1.Descriptor) []byte {
	t.Helper()
	data, ok := l.files["blobs/sha256/"+d.Digest.Encoded()]
	if !ok {
		t.Fatalf("no blob %s", d.Digest)
	}
	if digest.FromBytes(data) != d.Digest || int64(len(data)) != d.Size {
		t.Fatalf("blob %s has digest %s and %d bytes, want %d", d.Digest, digest.FromBytes(data), len(data), d.Size)
	}
	return data
}

func decode(t *testing.T, data []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatalf("decode %.40q: %v", data, err)
	}
}

func TestArchiveNamesItsImage(t *testing.T) {
	l := readBack(t, sample(t))
	if got := l.entry.Annotations["io.containerd.image.name"]; got != "registry.test:5000/some/thing:v1.2" {
		t.Errorf("containerd would call it %q", got)
	}
	if got := l.entry.Annotations["org.opencontainers.image.ref.name"]; got != "v1.2" {
		t.Errorf("its reference is %q, want v1.2", got)
	}
}

func TestConfigSaysHowToRun(t *testing.T) {
	c := readBack(t, sample(t)).config.Config
	if want := []string{"/bin/program", "run"}; !slices.Equal(c.Entrypoint, want) {
		t.Errorf("entrypoint %q, want %q", c.Entrypoint, want)
	}
	if c.User != "107:107" || c.Labels["k"] != "v" || !slices.Contains(c.Env, "A=b") || !hasPath(c.Env) {
		t.Errorf("config is %+v", c)
	}
}

func TestLayerHoldsTheFiles(t *testing.T) {
	l := readBack(t, sample(t))
	layer := l.blob(t, l.manifest.Layers[0])
	if got := digest.FromBytes(layer); got != l.config.RootFS.DiffIDs[0] {
		t.Errorf("layer is %s, its config says %s", got, l.config.RootFS.DiffIDs[0])
	}
	type entry struct {
		name, link, data string
		kind             byte
		mode             int64
		uid, gid         int
	}
	var got []entry
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, entry{h.Name, h.Linkname, string(data), h.Typeflag, h.Mode, h.Uid, h.Gid})
	}
	want := []entry{
		{name: "bin/", kind: tar.TypeDir, mode: 0o755},
		{name: "bin/alias", kind: tar.TypeSymlink, mode: 0o777, link: "program"},
		{name: "bin/program", kind: tar.TypeReg, mode: 0o755, data: "machine code"},
		{name: "home/", kind: tar.TypeDir, mode: 0o755},
		{name: "home/user/", kind: tar.TypeDir, mode: 0o755},
		{name: "home/user/notes", kind: tar.TypeReg, mode: 0o640, uid: 107, gid: 108, data: "notes"},
		{name: "tmp/", kind: tar.TypeDir, mode: 0o1777},
	}
	if !slices.Equal(got, want) {
		t.Errorf("layer holds\n%+v, want\n%+v", got, want)
	}
}

func TestGzippedLayerKeepsThePlainDigestInItsConfig(t *testing.T) {
	img := sample(t)
	plain := readBack(t, img)
	img.Gzip = true
	packed := readBack(t, img)
	if got := packed.manifest.Layers[0].MediaType; got != v1.MediaTypeImageLayerGzip {
		t.Errorf("layer is called %s", got)
	}
	zip, err := gzip.NewReader(bytes.NewReader(packed.blob(t, packed.manifest.Layers[0])))
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(zip)
	if err != nil {
		t.Fatal(err)
	}
	if got := digest.FromBytes(data); got != plain.config.RootFS.DiffIDs[0] || got != packed.config.RootFS.DiffIDs[0] {
		t.Errorf("layer is %s, configs say %s and %s", got, plain.config.RootFS.DiffIDs, packed.config.RootFS.DiffIDs)
	}
}

func TestSameInputsMakeTheSameArchive(t *testing.T) {
	first, second := sample(t), sample(t)
	slices.Reverse(second.Files)
	if a, b := readBack(t, first).entry.Digest, readBack(t, second).entry.Digest; a != b {
		t.Errorf("digests %s and %s differ", a, b)
	}
}

func TestCacheKeepsAnArchiveUntilItsInputsChange(t *testing.T) {
	img, dir := sample(t), t.TempDir()
	first, err := img.Cached(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(first, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := img.Cached(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(again); err != nil || string(data) != "kept" {
		t.Errorf("the same inputs were written again: %.20q, %v", data, err)
	}
	if err := os.WriteFile(img.Files[2].From, []byte("new code"), 0o600); err != nil {
		t.Fatal(err)
	}
	changed, err := img.Cached(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if changed == first {
		t.Error("a changed file left the archive as it was")
	}
}

func TestImpossibleImagesAreRefused(t *testing.T) {
	for name, img := range map[string]Image{
		"no tag":           {Name: "registry.test:5000/thing"},
		"empty tag":        {Name: "thing:"},
		"relative path":    {Name: "thing:1", Files: []File{Text("etc/passwd", "")}},
		"path leads out":   {Name: "thing:1", Files: []File{Text("/../etc", "")}},
		"same path twice":  {Name: "thing:1", Files: []File{Text("/a", ""), Text("/a", "")}},
		"file as a parent": {Name: "thing:1", Files: []File{Text("/a", ""), Text("/a/b", "")}},
		"missing source":   {Name: "thing:1", Files: []File{Copy("/a", filepath.Join(t.TempDir(), "none"), 0o755)}},
	} {
		dir := t.TempDir()
		if err := img.Write(context.Background(), filepath.Join(dir, "x.tar")); err == nil {
			t.Errorf("%s: no error", name)
		}
		left, err := os.ReadDir(dir)
		if err != nil || len(left) != 0 {
			t.Errorf("%s: left %v behind (%v)", name, left, err)
		}
	}
}

func TestDynamicProgramIsRefusedForTheProduct(t *testing.T) {
	err := K8slan(
		context.Background(),
		filepath.Join(t.TempDir(), "x.tar"),
		Product{Version: "v1", K8slan: "/bin/ls", CNI: "/bin/ls"},
	)
	if err == nil || !strings.Contains(err.Error(), "not static") {
		t.Fatalf("error is %v, want one that says the program is not static", err)
	}
}

func TestProductHasItsProgramsAndRunsTheFirst(t *testing.T) {
	program, err := Build(context.Background(), t.TempDir(), "test/images/pause") // any static one
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "dist", "k8slan.tar")
	if err := K8slan(
		context.Background(),
		archive,
		Product{Version: "1.2.3", K8slan: program, CNI: program, Tools: []File{Copy("/bin/sh", program, 0o755)}},
	); err != nil {
		t.Fatal(err)
	}
	l := readArchive(t, archive)
	if got := l.entry.Annotations["io.containerd.image.name"]; got != "ghcr.io/k8slan/k8slan:1.2.3" {
		t.Errorf("it is called %q", got)
	}
	if c := l.config.Config; !slices.Equal(c.Entrypoint, []string{"/k8slan"}) || c.User != "0:0" {
		t.Errorf("it runs %q as %q", c.Entrypoint, c.User)
	}
	zip, err := gzip.NewReader(bytes.NewReader(l.blob(t, l.manifest.Layers[0])))
	if err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(zip)
	programs, kubelan := []string{}, ""
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg && h.Mode == 0o755 {
			programs = append(programs, h.Name)
		}
		if h.Name == "usr/local/bin/kubelan" {
			kubelan = h.Linkname
		}
	}
	if want := []string{"bin/sh", "k8slan", "k8slan-cni"}; !slices.Equal(programs, want) || kubelan != "/k8slan" {
		t.Errorf("it has %q, want %q; kubelan is %q", programs, want, kubelan)
	}
}
