package bgp

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParsePeer(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(secret, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]Peer{
		"address=192.0.2.1": {Address: netip.MustParseAddr("192.0.2.1"), AS: 65000},
		"address=2001:db8::1,port=1790,as=4200000000,hold-time=30s,multihop=2,ipv6-vteps,password-file=" + secret: {
			Address: netip.MustParseAddr("2001:db8::1"), Port: 1790, AS: 4200000000, HoldTime: 30 * time.Second,
			Multihop: 2, IPv6VTEPs: true, Password: "secret",
		},
	} {
		if got, err := ParsePeer(text, 65000); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"":                                   "none of",
		"port=179":                           "address= is missing",
		"address=tor1":                       "tor1",
		"address=192.0.2.1,port=70000":       "70000",
		"address=192.0.2.1,hold-time=1s":     "must be from 3s",
		"address=192.0.2.1,asn=65000":        "asn",
		"address=192.0.2.1,as=0":             "must be at least 1",
		"address=192.0.2.1,hold-time=3500ms": "whole seconds",
		"address=192.0.2.1,hold-time=20h":    "to 65535s",
		"address=192.0.2.1,password-file=":   "read the password",
	} {
		if got, err := ParsePeer(text, 65000); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q becomes %+v, %v", text, got, err)
		}
	}
}

func TestPeersHaveDifferentAddresses(t *testing.T) {
	peers, err := ParsePeers([]string{"address=192.0.2.1", "address=192.0.2.2"}, 65000)
	if err != nil || len(peers) != 2 {
		t.Errorf("%v, %v", peers, err)
	}
	_, err = ParsePeers([]string{"address=192.0.2.1", "address=::ffff:192.0.2.1,port=1790"}, 65000)
	if err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("two peers with one address: %v", err)
	}
}

func TestRouterIDsDiffer(t *testing.T) {
	if got := RouterID("192.0.2.1", "worker1"); got != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("from its address: %s", got)
	}
	one, two := RouterID("2001:db8::1", "worker1"), RouterID("", "worker2")
	if !one.Is4() || one.IsUnspecified() || one == two {
		t.Errorf("from their names: %s and %s", one, two)
	}
}

// Each field of a peer counts but its password.
func TestEqualExceptPasswordComparesAllOtherFields(t *testing.T) {
	for _, field := range reflect.VisibleFields(reflect.TypeFor[Peer]()) {
		var changed Peer
		switch v := reflect.ValueOf(&changed).Elem().FieldByIndex(field.Index); v.Interface().(type) {
		case netip.Addr:
			v.Set(reflect.ValueOf(netip.MustParseAddr("192.0.2.1")))
		case bool:
			v.SetBool(true)
		case string:
			v.SetString("changed")
		case time.Duration:
			v.SetInt(1)
		default:
			v.SetUint(1)
		}
		if changed == (Peer{}) {
			t.Fatalf("field %s was not changed", field.Name)
		}
		want := field.Name == "Password"
		if changed.EqualExceptPassword(Peer{}) != want || (Peer{}).EqualExceptPassword(changed) != want {
			t.Errorf("two peers that differ in %s: equal is %t, want %t", field.Name, !want, want)
		}
	}
}
