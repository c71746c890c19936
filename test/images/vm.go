package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/k8slan/k8slan/build/debian"
	"github.com/k8slan/k8slan/build/image"
)

// QEMUUser is the user and group that QEMU runs as under KubeVirt, and that the
// VM image runs as here.
const QEMUUser = 107

// qemuFiles are what QEMU needs beside its libraries for this one machine: the
// accelerator, the BIOS, and the ROM that loads the kernel.
var qemuFiles = []string{
	"/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so",
	"/usr/share/seabios/bios-256k.bin",
	"/usr/share/qemu/linuxboot_dma.bin",
	"/usr/share/qemu/kvmvapic.bin",
}

// guestModules are the guest's drivers in the order in which they need each
// other: the virtio NIC, then VLAN devices.
var guestModules = []string{
	"virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
	"failover", "net_failover", "virtio_net",
	"llc", "stp", "garp", "mrp", "8021q",
}

// VM returns the archive of the image that runs a small Linux in QEMU on the
// macvtap of its pod. It builds it unless cacheDir has it, made from the same
// inputs. The guest's kernel is Debian's, as it was when cacheDir first needed
// it.
func VM(ctx context.Context, cacheDir string) (archivePath string, err error) {
	return withPrograms(ctx, cacheDir, func(bin programs) (image.Image, error) {
		if err := debian.Install(ctx, slog.Default(), "qemu-system-x86", "seabios"); err != nil {
			return image.Image{}, err
		}
		files, err := machineFiles(ctx, cacheDir, bin)
		if err != nil {
			return image.Image{}, err
		}
		return image.Image{
			Name:       VMName,
			Files:      files,
			Entrypoint: []string{"/vm", "run"},
			User:       fmt.Sprintf("%d:%d", QEMUUser, QEMUUser),
		}, nil
	}, machinePrograms...)
}

// machinePrograms are the folders of the programs that machineFiles needs.
var machinePrograms = []string{"test/images/vm", "test/images/vm/guest", "test/images/frames"}

// machineFiles are QEMU, the guest, the program vm that brings them together,
// and what else the image has from Debian.
func machineFiles(ctx context.Context, cacheDir string, bin programs, more ...string) ([]image.File, error) {
	const qemu = "/usr/bin/qemu-system-x86_64"
	files, err := withLibraries(ctx, append([]string{qemu}, more...))
	if err != nil {
		return nil, err
	}
	for _, path := range qemuFiles {
		files = append(files, image.Copy(path, path, 0o644))
	}
	kernel, err := guestKernel(ctx, cacheDir)
	if err != nil {
		return nil, err
	}
	initramfs, err := guestFiles(ctx, kernel, bin)
	if err != nil {
		return nil, err
	}
	return append(files,
		image.Copy("/vm", bin["vm"], 0o755),
		image.Copy("/guest/vmlinuz", filepath.Join(kernel, "vmlinuz"), 0o644),
		image.File{Path: "/guest/initramfs", Mode: 0o644, Data: initramfs},
		image.File{Path: "/run/vm", Mode: fs.ModeDir | 0o755, UID: QEMUUser, GID: QEMUUser},
		image.Dir("/tmp", fs.ModeSticky|0o777),
		image.Text("/etc/passwd", fmt.Sprintf("root:x:0:0:root:/:\nqemu:x:%d:%d:qemu:/:\n", QEMUUser, QEMUUser)),
		image.Text("/etc/group", fmt.Sprintf("root:x:0:\nqemu:x:%d:\n", QEMUUser)),
	), nil
}

// withLibraries are programs and the libraries they need, where Debian has them.
func withLibraries(ctx context.Context, programs []string) ([]image.File, error) {
	out, err := exec.CommandContext(ctx, "ldd", programs...).Output()
	if err != nil {
		return nil, fmt.Errorf("ask ldd for the libraries of %q: %w", programs, err)
	}
	paths := slices.Clone(programs)
	for line := range strings.Lines(string(out)) {
		// "/usr/bin/program:" of several, "libz.so.1 => /lib/… (0x…)", "/lib64/ld-linux… (0x…)" or "linux-vdso… (0x…)"
		if strings.HasSuffix(strings.TrimSpace(line), ":") {
			continue
		}
		_, library, arrow := strings.Cut(line, "=>")
		if !arrow {
			library = line
		}
		if path := strings.Fields(library)[0]; filepath.IsAbs(path) && !slices.Contains(paths, path) {
			paths = append(paths, path)
		}
	}
	var files []image.File
	for _, path := range paths {
		files = append(files, image.Copy(path, path, 0o755))
	}
	return files, nil
}

// guestFiles is the guest's initial file system.
func guestFiles(ctx context.Context, kernel string, bin programs) ([]byte, error) {
	files, err := image.Busybox(ctx)
	if err != nil {
		return nil, err
	}
	files = append(files,
		image.Copy("/init", bin["guest"], 0o755),
		image.Copy("/bin/frames", bin["frames"], 0o755),
		image.Dir("/tmp", fs.ModeSticky|0o777),
	)
	for i, name := range guestModules {
		files = append(
			files,
			image.Copy(fmt.Sprintf("/lib/modules/%02d-%s.ko", i, name), filepath.Join(kernel, name+".ko"), 0o644),
		)
	}
	return initramfs(files)
}

// guestKernel returns the directory in cacheDir that has the guest's vmlinuz and
// modules. It fetches them from Debian if it isn't there, and installs nothing.
func guestKernel(ctx context.Context, cacheDir string) (string, error) {
	dir := filepath.Join(cacheDir, "guest-kernel")
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	unpacked, err := os.MkdirTemp(cacheDir, ".kernel-*")
	if err != nil {
		return "", fmt.Errorf("make a directory for the guest's kernel: %w", err)
	}
	defer os.RemoveAll(unpacked)
	if err := fetchKernel(ctx, unpacked); err != nil {
		return "", err
	}
	wanted := map[string]string{} // by name, where it is
	for _, m := range guestModules {
		wanted[m+".ko"] = ""
	}
	err = filepath.WalkDir(unpacked, func(path string, entry fs.DirEntry, err error) error {
		name := entry.Name()
		if strings.HasPrefix(name, "vmlinuz-") {
			name = "vmlinuz"
		}
		if _, ok := wanted[name]; ok || name == "vmlinuz" {
			wanted[name] = path
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("look through the guest's kernel package: %w", err)
	}
	return dir, keep(wanted, unpacked, dir)
}

// fetchKernel unpacks Debian's kernel for virtual machines into dir.
func fetchKernel(ctx context.Context, dir string) error {
	const newest = "linux-image-cloud-amd64" // depends on the kernel proper, no more
	deb, err := debian.Download(ctx, dir, newest)
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "dpkg-deb", "--field", deb, "Depends").Output()
	if err != nil {
		return fmt.Errorf("ask %s for its kernel: %w", deb, err)
	}
	kernel, _, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	if !strings.HasPrefix(kernel, "linux-image-") {
		return fmt.Errorf("package %s depends on %q, want a kernel", newest, out)
	}
	if deb, err = debian.Download(ctx, dir, kernel); err != nil {
		return err
	}
	return debian.Extract(ctx, deb, dir)
}

// keep moves the wanted files into dir, which appears when it is complete.
func keep(wanted map[string]string, work, dir string) error {
	kept := filepath.Join(work, "kept")
	if err := os.Mkdir(kept, 0o755); err != nil {
		return fmt.Errorf("keep the guest's kernel: %w", err)
	}
	for name, from := range wanted {
		if err := os.Rename(from, filepath.Join(kept, name)); err != nil {
			return fmt.Errorf("keep the guest's %s: %w", name, err)
		}
	}
	err := os.Rename(kept, dir)
	if err != nil && !errors.Is(err, fs.ErrExist) { // another one was faster
		return fmt.Errorf("keep the guest's kernel: %w", err)
	}
	return nil
}
