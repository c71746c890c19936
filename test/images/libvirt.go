package images

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"

	"github.com/k8slan/k8slan/build/debian"
	"github.com/k8slan/k8slan/build/image"
)

// LibvirtName is the name of the image that runs a VM through libvirt.
const LibvirtName = "localhost/k8slan/libvirt:1"

// libvirtPrograms are the daemon, its log daemon, its driver for QEMU, and the
// client.
var libvirtPrograms = []string{
	"/usr/sbin/libvirtd", "/usr/sbin/virtlogd", "/usr/bin/virsh",
	"/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so",
}

// Where libvirt of QEMUUser's session has its files in virt-launcher's
// container, by the XDG variables that virt-controller sets there
// (xdgEnvironmentVariables in pkg/virt-controller/services/rendercontainer.go of
// KubeVirt 1.6).
const (
	varRun     = "/var/run"
	privateDir = varRun + "/kubevirt-private"
)

// qemuConf is what virt-launcher ships as qemu.conf, less what concerns displays.
// That container has no label to confine QEMU with, hence no security driver.
const qemuConf = `stdio_handler = "logd"
security_driver = "none"
namespaces = [ ]
cgroup_controllers = [ ]
remember_owner = 0
`

// Libvirt returns the archive of the image that runs the same VM as VM's image,
// through Debian's libvirt in the session of a user without privileges, as
// KubeVirt's virt-launcher does. It builds it unless cacheDir has it, made from
// the same inputs.
func Libvirt(ctx context.Context, cacheDir string) (archivePath string, err error) {
	return withPrograms(ctx, cacheDir, func(bin programs) (image.Image, error) {
		if err := debian.Install(
			ctx,
			slog.Default(),
			"qemu-system-x86",
			"seabios",
			"libvirt-daemon",
			"libvirt-clients",
		); err != nil {
			return image.Image{}, err
		}
		files, err := machineFiles(ctx, cacheDir, bin, libvirtPrograms...)
		if err != nil {
			return image.Image{}, err
		}
		cpus, err := filepath.Glob("/usr/share/libvirt/cpu_map/*.xml")
		if err != nil || len(cpus) == 0 {
			return image.Image{}, fmt.Errorf("libvirt's CPU descriptions are not in /usr/share/libvirt (%v)", err)
		}
		for _, path := range cpus {
			files = append(files, image.Copy(path, path, 0o644))
		}
		own := func(path string) image.File {
			return image.File{Path: path, Mode: fs.ModeDir | 0o755, UID: QEMUUser, GID: QEMUUser}
		}
		return image.Image{
			Name: LibvirtName,
			Files: append(
				files,
				own(varRun),
				own(privateDir),
				own(privateDir+"/libvirt"),
				image.Text(privateDir+"/libvirt/qemu.conf", qemuConf),
			),
			Entrypoint: []string{"/vm", "launch"},
			User:       fmt.Sprintf("%d:%d", QEMUUser, QEMUUser),
			Env: []string{
				"XDG_RUNTIME_DIR=" + varRun, "XDG_CONFIG_HOME=" + privateDir, "XDG_CACHE_HOME=" + privateDir,
				"LIBVIRT_DEFAULT_URI=qemu+unix:///session?socket=" + varRun + "/libvirt/libvirt-sock",
			},
		}, nil
	}, machinePrograms...)
}
