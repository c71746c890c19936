// Package debian installs packages from Debian's archive, and unpacks others without installing them.
package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// lockTimeout makes apt wait for another apt instead of failing.
const lockTimeout = "DPkg::Lock::Timeout=300"

// Install installs those of pkgs that are missing, and logs which. It needs
// root only if one is missing, and waits up to five minutes for another apt.
func Install(ctx context.Context, log *slog.Logger, pkgs ...string) error {
	missing, err := Missing(ctx, pkgs...)
	if err != nil || len(missing) == 0 {
		return err
	}
	log.Info("installing Debian packages", "packages", strings.Join(missing, " "))
	args := []string{"install", "--yes", "--no-install-recommends", "-o", lockTimeout}
	return aptGet(ctx, "", append(args, missing...)...)
}

// Missing returns those of pkgs that are not installed, in the given order.
func Missing(ctx context.Context, pkgs ...string) ([]string, error) {
	var missing []string
	for _, pkg := range pkgs {
		out, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${db:Status-Status}", pkg).Output()
		var exit *exec.ExitError
		switch {
		case err == nil && string(out) == "installed":
		case err == nil, errors.As(err, &exit) && exit.ExitCode() == 1: // 1: no package of that name
			missing = append(missing, pkg)
		default:
			return nil, fmt.Errorf("ask dpkg-query for package %s: %w", pkg, err)
		}
	}
	return missing, nil
}

// Download fetches the .deb of pkg in the archive's current version into dir,
// without installing it, and returns its path. A version that is already in
// dir is not fetched again.
func Download(ctx context.Context, dir, pkg string) (debPath string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make the directory for package %s: %w", pkg, err)
	}
	// apt-get download keeps a finished file and checks it against the lists.
	if err := aptGet(ctx, dir, "download", "-o", lockTimeout, "-o", "APT::Sandbox::User=root", pkg); err != nil {
		return "", err
	}
	version, err := candidate(ctx, pkg)
	if err != nil {
		return "", err
	}
	// apt writes the epoch's colon as %3a, and keeps the rest as it is.
	pattern := filepath.Join(dir, fmt.Sprintf("%s_%s_*.deb", pkg, strings.ReplaceAll(version, ":", "%3a")))
	debs, err := filepath.Glob(pattern)
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("apt-get download %s left %d files like %s, want one (%v)", pkg, len(debs), pattern, err)
	}
	return debs[0], nil
}

// Extract unpacks the files of a .deb into dir without running its scripts.
func Extract(ctx context.Context, debPath, dir string) error {
	if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", debPath, dir).CombinedOutput(); err != nil {
		return fmt.Errorf("unpack %s into %s: %w: %s", debPath, dir, err, bytes.TrimSpace(out))
	}
	return nil
}

// candidate returns the version of pkg that apt would install.
func candidate(ctx context.Context, pkg string) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-cache", "show", "--no-all-versions", pkg).Output()
	if err != nil {
		return "", fmt.Errorf("ask apt-cache for the version of package %s: %w", pkg, err)
	}
	for line := range strings.Lines(string(out)) {
		if version, ok := strings.CutPrefix(line, "Version: "); ok {
			return strings.TrimSpace(version), nil
		}
	}
	return "", fmt.Errorf("apt-cache knows no version of package %s: is it in /etc/apt/sources.list?", pkg)
}

// aptGet runs apt-get in dir. Debian's archive drops superseded versions, so
// what fails with the package lists at hand is tried again with fresh ones.
func aptGet(ctx context.Context, dir string, args ...string) error {
	if run(ctx, dir, args...) == nil {
		return nil
	}
	if err := run(ctx, "", "update", "-o", lockTimeout); err != nil {
		return err
	}
	return run(ctx, dir, args...)
}

func run(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"--quiet"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get %s: %w:\n%s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
