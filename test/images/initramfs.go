package images

import (
	"bytes"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/build/image"
)

// initramfs returns files, with the directories above them, as a cpio archive
// in the "newc" format that Linux unpacks at its start
// (Documentation/driver-api/early-userspace/buffer-format.rst).
func initramfs(files []image.File) ([]byte, error) {
	files, err := image.Tree(files)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for i, f := range files {
		data, err := f.Read()
		if err != nil {
			return nil, err
		}
		kind := int64(unix.S_IFREG)
		switch {
		case f.Mode.IsDir():
			kind = unix.S_IFDIR
		case f.Mode&fs.ModeSymlink != 0:
			kind, data = unix.S_IFLNK, []byte(f.Link)
		}
		cpioEntry(&out, f.Path[1:], i+1, kind|f.UnixMode(), data)
	}
	cpioEntry(&out, "TRAILER!!!", 0, 0, nil)
	return out.Bytes(), nil
}

func cpioEntry(out *bytes.Buffer, name string, inode int, mode int64, data []byte) {
	const root, oneLink, noTime, noDevice, noSum = 0, 1, 0, 0, 0
	fmt.Fprintf(
		out,
		"070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		inode,
		mode,
		root,
		root,
		oneLink,
		noTime,
		len(data),
		noDevice,
		noDevice,
		noDevice,
		noDevice,
		len(name)+1,
		noSum,
		name,
	)
	pad(out)
	out.Write(data)
	pad(out)
}

// pad fills up to a multiple of four bytes.
func pad(out *bytes.Buffer) { out.Write(make([]byte, (4-out.Len()%4)%4)) }
