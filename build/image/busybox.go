package image

import (
	"context"
	"fmt"
	"log/slog"
	"os/exec"
	"strings"

	"github.com/k8slan/k8slan/build/debian"
)

// busybox is where Debian's busybox-static puts its program.
const busybox = "/bin/busybox"

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
