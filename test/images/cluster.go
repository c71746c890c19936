package images

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/k8slan/k8slan/test/cluster/debian"
)

// The names of the test cluster's images.
const (
	PauseName   = "localhost/k8slan/pause:1"
	ToolboxName = "localhost/k8slan/toolbox:1"
	VMName      = "localhost/k8slan/vm:1"
)

// busybox is where Debian's busybox-static puts its program.
const busybox = "/bin/busybox"

// Pause returns the archive of the image that holds pods' sandboxes. It builds
// it unless cacheDir has it, made from the same inputs.
func Pause(ctx context.Context, cacheDir string) (archivePath string, err error) {
	return withPrograms(ctx, cacheDir, func(bin programs) (Image, error) {
		return Image{
			Name:       PauseName,
			Files:      []File{Copy("/pause", bin["pause"], 0o755)},
			Entrypoint: []string{"/pause"},
		}, nil
	}, "test/images/pause")
}

// Toolbox returns the archive of the image that plain test pods run: busybox
// under all its names, and the program frames. It builds it unless cacheDir
// has it, made from the same inputs.
func Toolbox(ctx context.Context, cacheDir string) (archivePath string, err error) {
	return withPrograms(ctx, cacheDir, func(bin programs) (Image, error) {
		files, err := Busybox(ctx)
		if err != nil {
			return Image{}, err
		}
		return Image{
			Name: ToolboxName,
			Files: append(files,
				Copy("/bin/frames", bin["frames"], 0o755),
				Copy("/bin/pause", bin["pause"], 0o755),
				Dir("/tmp", fs.ModeSticky|0o777),
				Text("/etc/passwd", "root:x:0:0:root:/:/bin/sh\n"),
				Text("/etc/group", "root:x:0:\n"),
			),
			Entrypoint: []string{"/bin/pause"}, // unlike sleep as pid 1, it ends on SIGTERM
		}, nil
	}, "test/images/frames", "test/images/pause")
}

// Busybox are busybox and a link to it for each of its names.
func Busybox(ctx context.Context) ([]File, error) {
	if err := debian.Install(ctx, slog.Default(), "busybox-static"); err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("ask %s for its names: %w", busybox, err)
	}
	files := []File{Copy("/bin/busybox", busybox, 0o755)}
	for _, name := range strings.Fields(string(out)) {
		if name != "busybox" {
			files = append(files, Symlink("/bin/"+name, "busybox"))
		}
	}
	return files, nil
}

// programs are paths of built programs by name.
type programs map[string]string

// withPrograms builds the programs in folders, lets describe make an image of
// them, and returns its archive in cacheDir, written unless it is there.
func withPrograms(ctx context.Context, cacheDir string, describe func(programs) (Image, error), folders ...string) (string, error) {
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
		if bin[path.Base(folder)], err = build(ctx, dir, folder); err != nil {
			return "", err
		}
	}
	img, err := describe(bin)
	if err != nil {
		return "", err
	}
	return img.cached(ctx, cacheDir)
}

// cached returns the path of img's archive in dir, and writes it if no archive
// made from the same inputs is there.
func (img Image) cached(ctx context.Context, dir string) (string, error) {
	key, err := img.key()
	if err != nil {
		return "", err
	}
	name, _, _ := strings.Cut(path.Base(img.Name), ":")
	archive := filepath.Join(dir, name+"-"+key+".tar")
	_, err = os.Stat(archive)
	if errors.Is(err, fs.ErrNotExist) {
		return archive, img.Write(ctx, archive)
	}
	if err != nil {
		return "", fmt.Errorf("look for the archive of image %s: %w", img.Name, err)
	}
	return archive, nil
}

// key is a hash of all that decides what img's archive holds.
func (img Image) key() (string, error) {
	files, err := tree(img.Files)
	if err != nil {
		return "", err
	}
	hash := sha256.New()
	for i := range files {
		data, err := files[i].read()
		if err != nil {
			return "", err
		}
		sum := sha256.Sum256(data)
		files[i].From, files[i].Data = "", sum[:]
	}
	img.Files = files
	if err := json.NewEncoder(hash).Encode(img); err != nil {
		return "", fmt.Errorf("hash image %s: %w", img.Name, err)
	}
	return fmt.Sprintf("%x", hash.Sum(nil)[:8]), nil
}
