package image

import (
	"cmp"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"

	"golang.org/x/sys/unix"
)

// File is one file, directory or symbolic link in an image. Directories above
// it need not be given: they are root's, with mode 0755.
type File struct {
	Path     string      // in the image, absolute
	Mode     fs.FileMode // type and permissions
	UID, GID int
	From     string // the file on this machine that a regular file copies; or:
	Data     []byte // what a regular file holds
	Link     string // what a symbolic link names
}

// Copy is root's copy, with the given permissions, of a file on this machine.
func Copy(path, from string, perm fs.FileMode) File {
	return File{Path: path, Mode: perm, From: from}
}

// Text is root's file, with mode 0644, that holds data.
func Text(path, data string) File {
	return File{Path: path, Mode: 0o644, Data: []byte(data)}
}

// Dir is root's directory.
func Dir(path string, perm fs.FileMode) File {
	return File{Path: path, Mode: fs.ModeDir | perm}
}

// Symlink is a symbolic link to target.
func Symlink(path, target string) File {
	return File{Path: path, Mode: fs.ModeSymlink | 0o777, Link: target}
}

// Tree returns files with the directories above them, parents first, in an
// order that depends on the paths alone.
func Tree(files []File) ([]File, error) {
	all := map[string]File{}
	for _, f := range files {
		if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" {
			return nil, fmt.Errorf("path %q in an image is not absolute and clean", f.Path)
		}
		if _, twice := all[f.Path]; twice {
			return nil, fmt.Errorf("path %s is in the image twice", f.Path)
		}
		all[f.Path] = f
	}
	for _, f := range files {
		for dir := path.Dir(f.Path); dir != "/"; dir = path.Dir(dir) {
			parent, known := all[dir]
			if !known {
				all[dir] = Dir(dir, 0o755)
			} else if !parent.Mode.IsDir() {
				return nil, fmt.Errorf("path %s is in an image below %s, which is no directory", f.Path, dir)
			}
		}
	}
	return slices.SortedFunc(maps.Values(all), func(a, b File) int {
		return cmp.Compare(a.Path, b.Path)
	}), nil
}

// Read returns what a regular file holds, and nothing for anything else.
func (f File) Read() ([]byte, error) {
	if !f.Mode.IsRegular() || f.From == "" {
		return f.Data, nil
	}
	data, err := os.ReadFile(f.From)
	if err != nil {
		return nil, fmt.Errorf("copy to %s in an image: %w", f.Path, err)
	}
	return data, nil
}

// UnixMode returns f's permissions with the bits above them as in st_mode.
func (f File) UnixMode() int64 {
	mode := int64(f.Mode.Perm())
	if f.Mode&fs.ModeSticky != 0 {
		mode |= unix.S_ISVTX
	}
	if f.Mode&fs.ModeSetuid != 0 {
		mode |= unix.S_ISUID
	}
	return mode
}
