package sidecar

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestReadOfKubelansFile(t *testing.T) {
	c, err := Read(Sources{
		File: []byte(`
log_level: Debug
HTTP_address: ':9999'
ip: '1.2.3.4'
namespace: default
services:
  - kube-system/some-svc
  - some-default-ns-svc
vxlan:
  interface: my-lan
  vni: 16777215
  port: 8472
  mtu: 1450
hooks:
  up: ['sh', '-c', 'echo "Hello, from up hook!"']
  change: [notify]
`),
		Env: map[string]string{
			"KL_VXLAN_PORT": "4790", "KL_IP": "10.244.1.7", "KL_LOG_LEVEL": "", "KL_SERVICE_HOST": "10.96.0.9",
		},
		Flags: map[string]string{"log_level": "warning"}, Hostname: "web-2",
	})
	want := Config{
		LogLevel: "WARNING", HTTPAddress: ":9999", IP: []netip.Addr{netip.MustParseAddr("10.244.1.7")},
		Namespace: "default", Pod: "web-2", Discovery: UnicastDiscovery,
		Services: []Service{{"kube-system", "some-svc"}, {"default", "some-default-ns-svc"}},
		VXLAN:    VXLAN{Interface: "my-lan", VNI: 16777215, Port: 4790, MTU: 1450},
		Hooks: Hooks{
			Up: []string{"sh", "-c", `echo "Hello, from up hook!"`}, Change: []string{"notify"},
			Timeout: Duration(30 * time.Second),
		},
	}
	if err != nil || !reflect.DeepEqual(c, want) {
		t.Errorf("%v\n%+v, want\n%+v", err, c, want)
	}
}

func TestReadOfEnvironmentOnly(t *testing.T) {
	c, err := Read(Sources{Env: map[string]string{
		"KL_SERVICES": "web, other/db,other/db", "KL_VXLAN_MTU": "-1", "KL_HOOKS_UP": `["sh", "-c", "echo a,b"]`,
		"KL_IP": "10.0.0.1,fd00::1", "KL_IP_FAMILY": "ipv6", "KL_READY_ONLY": "true", "KL_STRICT_PEERS": "1",
		"KL_PEERS": "10.1.0.9", "KL_VXLAN_ADDRESSES": "192.168.69.{ordinal+1}/24,fd69::{ordinal:x}/64",
		"KL_VXLAN_MAC": "02:00:00:00:01:{ordinal+200:x}",
	}, Hostname: "web-31", Namespace: "mine"})
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		LogLevel: "INFO", HTTPAddress: ":8181", IPFamily: "ipv6",
		IP:        []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
		Namespace: "mine", Pod: "web-31", Discovery: UnicastDiscovery,
		Services:  []Service{{"mine", "web"}, {"other", "db"}},
		Peers:     []netip.Addr{netip.MustParseAddr("10.1.0.9")},
		ReadyOnly: true, StrictPeers: true,
		VXLAN: VXLAN{
			Interface: "kubelan", VNI: 6969, Port: 4789, MTU: -1, MAC: "02:00:00:00:01:e7",
			Addresses: []netip.Prefix{
				netip.MustParsePrefix("192.168.69.32/24"), netip.MustParsePrefix("fd69::1f/64"),
			},
		},
		Hooks: Hooks{Up: []string{"sh", "-c", "echo a,b"}, Timeout: Duration(30 * time.Second)},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("%+v, want\n%+v", c, want)
	}
}

func TestReadOfEVPN(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(secret, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := "discovery: evpn\nevpn:\n  as: 4200000000\n" +
		"  peers: ['address=192.0.2.254,password-file=" + secret + "']\n" +
		"  reflectors: k8slan-system/k8slan-reflector\n"
	env := map[string]string{"KL_IP": "2001:db8::1,192.0.2.1", "KL_NAMESPACE": "default"}
	c, err := Read(Sources{File: []byte(file), Env: env, Hostname: "web-2"})
	if err != nil {
		t.Fatal(err)
	}
	reflectors := Service{"k8slan-system", "k8slan-reflector"}
	if c.EVPN.AS != 4200000000 || c.EVPN.Reflectors == nil || *c.EVPN.Reflectors != reflectors ||
		c.routerID() != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("%+v, router ID %s", c.EVPN, c.routerID())
	}
	if len(c.EVPN.peers) != 1 || c.EVPN.peers[0].AS != 4200000000 || c.EVPN.peers[0].Password != "secret" ||
		!slices.Equal(c.PasswordFiles(), []string{secret}) {
		t.Errorf("peers %+v, files %v", c.EVPN.peers, c.PasswordFiles())
	}
	if text, err := json.Marshal(c); err != nil || strings.Contains(string(text), `"secret`) {
		t.Errorf("/config shows %s, %v", text, err)
	}
	if watched := c.watchedServices(); !slices.Equal(watched, []Service{reflectors}) {
		t.Errorf("watches %v", watched)
	}
	env["KL_EVPN_PEERS"] = "address=192.0.2.7,port=1790 address=2001:db8::9,ipv6-vteps"
	env["KL_EVPN_ROUTER_ID"] = "10.0.0.9"
	if c, err = Read(Sources{File: []byte(file), Env: env, Hostname: "web-2"}); err != nil {
		t.Fatal(err)
	}
	if len(c.EVPN.peers) != 2 || c.EVPN.peers[0].Port != 1790 || !c.EVPN.peers[1].IPv6VTEPs ||
		c.routerID() != netip.MustParseAddr("10.0.0.9") {
		t.Errorf("peers %+v, router ID %s", c.EVPN.peers, c.routerID())
	}
}

func TestMistakesAreReportedInOneLineWithTheKey(t *testing.T) {
	for file, want := range map[string]string{
		"services: [a/b]\nvxlan: {vnii: 3}": "vxlan.vnii: unknown key",
		"services: [a/b]\nhook: ''":         "hook: unknown key",

		"services: [a/b]\nvxlan: {vni: 16777216}": `vxlan.vni: "16777216" is not a number from 1 to 16777215`,

		"services: [a/b]\nvxlan: {vni: 0}":                               "vxlan.vni: ",
		"services: [a/b]\nvxlan: {port: 65536}":                          "vxlan.port: ",
		"services: [a/b]\nvxlan: {mtu: 20}":                              "vxlan.mtu: ",
		"services: [a/b]\nvxlan: {interface: 'a/b'}":                     "vxlan.interface: ",
		"services: [a/b]\nvxlan: {interface: abcdefghijklmnop}":          "vxlan.interface: ",
		"services: [a/b]\nvxlan: {mac: '03:00:00:00:00:01'}":             "vxlan.mac: ",
		"services: [a/b]\nvxlan: {addresses: [10.0.0.1]}":                "vxlan.addresses: ",
		"services: [a/b]\nvxlan: {addresses: ['10.0.0.{number}/24']}":    "vxlan.addresses: ",
		"services: [a/b]\nvxlan: {addresses: ['10.0.0.{ordinal-1}/24']}": "vxlan.addresses: ",
		"services: [a/b]\nvxlan: {addresses: ['10.0.0.{ordinal}/24']}":   `the pod is called "web"`,
		"services: [a/b]\nip: 1.2.3":                                     `ip: "1.2.3" is not an IP address`,
		"services: [a/b]\nip: [1.2.3.4]\nip_family: ipv6":                "ip_family: ",
		"services: [a/b]\nlog_level: loud":                               "log_level: ",
		"services: [a/b]\nhttp_address: 8181":                            "http_address: ",
		"services: [a/b]\nready_only: perhaps":                           "ready_only: ",
		"services: [a/b]\nhooks: {timeout: 0s}":                          "hooks.timeout: ",
		"services: [a/b]\nlog_level: [info, debug]":                      "log_level: has 2 values",

		"services: [web]":                  `services: "web" has no namespace`,
		"services: [A/b/c]":                "services: ",
		"services: [{name: web}]":          "services: has something other than values",
		"services: []":                     "services: there are none, nor peers",
		"":                                 "services: there are none, nor peers",
		"- services":                       "is not a list of keys and values",
		"services: [a/b]\nservices: [a/c]": "is not YAML",
		"services: [a/b":                   "is not YAML",

		"services: [a/b]\ndiscovery: multicast": `discovery: "multicast" is neither unicast nor evpn`,

		"discovery: evpn\nevpn: {peers: [address=192.0.2.1]}":          "evpn.as: ",
		"discovery: evpn\nevpn: {as: 0}":                               "evpn.as: ",
		"discovery: evpn\nevpn: {as: 65000}":                           "evpn.peers: there are none",
		"discovery: evpn\nevpn: {as: 65000, peers: [port=179]}":        "evpn.peers: \"port=179\": address= is missing",
		"discovery: evpn\nevpn: {as: 65000, reflectors: a/b/c}":        "evpn.reflectors: ",
		"discovery: evpn\nevpn: {as: 65000, router_id: '2001:db8::1'}": "evpn.router_id: ",
		"discovery: evpn\nevpn: {reflectors_password_file: /no/such}":  "evpn.reflectors_password_file: ",
	} {
		_, err := Read(Sources{File: []byte(file), Hostname: "web"})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want one line with %q", file, err, want)
		}
	}
}
