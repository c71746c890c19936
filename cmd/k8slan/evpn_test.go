package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A Secret's volume changes as kubelet changes it: the new password is there without a restart, and one that cannot be changes nothing.
func TestAPasswordThatChangesIsReadAgain(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "password")
	show := func(version, password string) {
		t.Helper()
		try(t, os.Mkdir(filepath.Join(dir, version), 0o700))
		try(t, os.WriteFile(filepath.Join(dir, version, "password"), []byte(password), 0o600))
		try(t, os.Symlink(version, filepath.Join(dir, "..data_tmp")))
		try(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	show("..1", "first\n")
	try(t, os.Symlink("..data/password", file))
	f := evpnFlags{as: 65000, peers: []string{"address=192.0.2.1,password-file=" + file}}
	heard := make(chan string)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		last := ""
		followFiles(ctx, f.passwordFiles(), slog.New(slog.DiscardHandler), func() error {
			e, err := f.evpn("worker1")
			said := ""
			if err != nil {
				said = err.Error()
			} else {
				said = e.Peers[0].Password
			}
			if said != last {
				last = said
				select {
				case heard <- said:
				case <-ctx.Done():
				}
			}
			return err
		})
	}()
	t.Cleanup(func() { cancel(); <-done })
	expect := func(want string) {
		t.Helper()
		select {
		case got := <-heard:
			if !strings.Contains(got, want) {
				t.Errorf("read %q, want %q", got, want)
			}
		case <-time.After(time.Minute):
			t.Fatalf("waited for %q in vain", want)
		}
	}
	expect("first")
	show("..2", "second")
	expect("second")
	show("..3", " ")
	expect("has 0 characters")
	show("..4", strings.Repeat("x", 81))
	expect("has 81 characters")
	show("..5", "third")
	expect("third")
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
