package image

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
)

// module is the main module, whose programs go into the images.
const module = "github.com/k8slan/k8slan"

// Build builds a program of the main module, given by its folder, as a static
// binary in dir. The binary depends on nothing but its source and the Go
// version, so that its content can stand for them in the cache's key.
func Build(ctx context.Context, dir, folder string) (binary string, err error) {
	root, err := moduleRoot(ctx)
	if err != nil {
		return "", err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return "", fmt.Errorf("build %s: %w", folder, err)
	}
	binary = filepath.Join(dir, path.Base(folder))
	cmd := exec.CommandContext(
		ctx,
		"go",
		"build",
		"-trimpath",
		"-buildvcs=false",
		"-ldflags=-s -w -buildid=",
		"-o",
		binary,
		"./"+folder,
	)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build ./%s in %s: %w:\n%s", folder, root, err, bytes.TrimSpace(out))
	}
	return binary, nil
}

// moduleRoot finds the checkout, from the working directory of the test or
// program that runs: the main module's or that of one that requires it.
func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		return "", fmt.Errorf("go list -m %s: %w (run it inside the checkout)", module, err)
	}
	return string(bytes.TrimSpace(out)), nil
}

// CheckStatic reports an error if the program needs a dynamic linker or shared
// libraries, which an image with nothing but the program lacks.
func CheckStatic(program string) error {
	f, err := elf.Open(program)
	if err != nil {
		return fmt.Errorf("read program %s: %w", program, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			interp, err := io.ReadAll(p.Open())
			return errors.Join(
				err,
				fmt.Errorf(
					"program %s is not static, it needs %s: build it with CGO_ENABLED=0",
					program,
					bytes.TrimRight(interp, "\x00"),
				),
			)
		}
	}
	return nil
}
