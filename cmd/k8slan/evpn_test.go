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

// The test changes a Secret's volume as kubelet does. A new password is used without a restart; an invalid one is not
// used.
func TestAChangedPasswordIsReadAgain(t *testing.T) {
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
	read := make(chan string)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		last := ""
		followFiles(ctx, f.passwordFiles(), slog.New(slog.DiscardHandler), func() error {
			e, err := f.evpn("worker1")
			text := ""
			if err != nil {
				text = err.Error()
			} else {
				text = e.Peers[0].Password
			}
			if text != last {
				last = text
				select {
				case read <- text:
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
		case got := <-read:
			if !strings.Contains(got, want) {
				t.Errorf("read %q, want %q", got, want)
			}
		case <-time.After(time.Minute):
			t.Fatalf("timeout; want %q", want)
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
