package main

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/bgp"
)

func TestPeersAreRead(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(secret, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]bgp.Peer{
		"address=192.0.2.1": {Address: netip.MustParseAddr("192.0.2.1"), AS: 65000},
		"address=2001:db8::1,port=1790,as=4200000000,hold-time=30s,multihop=2,ipv6-vteps,password-file=" + secret: {
			Address: netip.MustParseAddr("2001:db8::1"), Port: 1790, AS: 4200000000, HoldTime: 30 * time.Second, Multihop: 2, IPv6VTEPs: true, Password: "secret",
		},
	} {
		if got, err := parsePeer(text, 65000); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"":                                 "none of",
		"port=179":                         "address= is missing",
		"address=tor1":                     "tor1",
		"address=192.0.2.1,port=70000":     "70000",
		"address=192.0.2.1,hold-time=1s":   "3s at least",
		"address=192.0.2.1,asn=65000":      "asn",
		"address=192.0.2.1,password-file=": "read the password",
	} {
		if got, err := parsePeer(text, 65000); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is read as %+v, %v", text, got, err)
		}
	}
}

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

func TestRouterIDsDiffer(t *testing.T) {
	if got := routerID("192.0.2.1", "worker1"); got != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("by its address: %s", got)
	}
	one, two := routerID("2001:db8::1", "worker1"), routerID("", "worker2")
	if !one.Is4() || one.IsUnspecified() || one == two {
		t.Errorf("by their names: %s and %s", one, two)
	}
}
