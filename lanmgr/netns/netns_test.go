package netns_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/netns"
)

func TestOpenFailsWhereThereIsNoNamespace(t *testing.T) {
	file := filepath.Join(t.TempDir(), "knlvrf")
	for _, what := range []string{"a missing file", "a regular file"} {
		if ns, err := netns.Open(file); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("open %s: %v, %v; want that it does not exist", what, ns, err)
		}
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestInodeIsThatOfTheNamespace(t *testing.T) {
	ns, err := netns.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	inode, err := netns.InodeOf(ns)
	if err != nil {
		t.Fatal(err)
	}
	again, err := netns.Dup(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if other, err := netns.InodeOf(again); err != nil || other != inode {
		t.Errorf("the namespace opened again has inode %v, %v; want %v", other, err, inode)
	}
	mounts := map[string]bool{"/proc/self/ns/net": true, "/proc/self/ns/mnt": false, "/proc/self/ns/none": false}
	for path, want := range mounts {
		if is, err := inode.IsAt(path); err != nil || is != want {
			t.Errorf("the namespace is at %s: %t, %v; want %t", path, is, err, want)
		}
	}
}

func TestUnmountOfNothingIsNoError(t *testing.T) {
	if err := netns.Unmount(filepath.Join(t.TempDir(), "knlvrf")); err != nil {
		t.Error(err)
	}
}
