package cni_test

import (
	"testing"

	"github.com/k8slan/k8slan/cni"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// FuzzConfig calls the plugin with arbitrary input while another pod is attached. Each verb either succeeds, or
// returns a CNI error with a code and a sentence and changes nothing.
func FuzzConfig(f *testing.F) {
	const kubernetes = "K8S_POD_NAMESPACE=default;K8S_POD_NAME=a"
	for _, seed := range []string{
		config(nil),
		config(keys{"kind": "macvtap", "owner": 0, "promiscMode": true}),
		config(keys{
			"cniVersion":                "1.1.0",
			"cni.dev/valid-attachments": []keys{{"containerID": "other", "ifname": "net1"}},
		}),
		config(keys{"cniVersion": "1.1.0", "cni.dev/valid-attachments": []any{nil, 1, "x"}}),
		config(keys{"cniVersion": ""}),
		config(keys{"cniVersion": "0.2.0"}),
		config(keys{"ns": "../../etc"}),
		config(keys{"ns": "a\x00b", "lan": "default/", "spoke": "-"}),
		config(keys{"spoke": "srl", "deviceID": []string{"srl"}}),
		config(keys{"ipam": keys{"type": "host-local"}}),
		config(keys{"ipam": keys{"type": nil}, "dns": []int{1}}),
		config(keys{
			"runtimeConfig": keys{"mac": "02:00:00:00:00:01"},
			"args":          keys{"cni": keys{"mac": 3, "mtu": 1e9}},
		}),
		config(keys{"prevResult": keys{
			"cniVersion": "0.4.0",
			"interfaces": []any{nil}, "ips": []any{nil}, "routes": []any{nil},
		}}),
		config(keys{"prevResult": keys{
			"cniVersion": "1.0.0",
			"interfaces": []keys{{"name": "net1", "sandbox": "/netns/1", "mac": "ff:ff:ff:ff:ff:ff"}},
		}}),
		config(keys{"prevResult": keys{
			"interfaces": []keys{{"name": "net1", "sandbox": "/netns/1"}},
			"ips":        []keys{{"address": "::ffff:10.0.0.1/120"}},
		}}),
		config(keys{"prevResult": "text"}),
		`{"name":"a","cniVersion":"1.1.0","KIND":"veth","kind":"macvtap","ns":null,"spoke":{},"lan":[]}`,
		`{"name":"a","prevResult":{"IPs":[null],"ips":[{}]}}`,
		`{"name":"a","cniVersion":{}}`,
		`{"name":1}`, `{}`, `[]`, `null`, `"`, ``, "\xff\xfe",
	} {
		for verb := range 5 {
			f.Add(uint8(verb), seed, "c1", "net1", kubernetes)
		}
	}
	for _, args := range []string{
		"", ";;;", "=", "MAC", "MAC=",
		"MAC=x", "MAC=02:00:00:00:00:01;MAC=02:00:00:00:00:02", "K8S_POD_NAMESPACE=../x", "K8S_POD_NAME=a b=c",
	} {
		f.Add(uint8(0), config(nil), "c1", "net1", args)
	}
	for _, ifname := range []string{"", ".", "..", "a/b", "a b", "sixteen-letters-", "net1\n", "\xff"} {
		f.Add(uint8(0), config(nil), "c1", ifname, kubernetes)
		f.Add(uint8(0), config(nil), ifname, "net1", kubernetes)
	}
	verbs := []string{"ADD", "DEL", "CHECK", "GC", "STATUS"}
	f.Fuzz(func(t *testing.T, verb uint8, network, container, ifname, args string) {
		for _, env := range []string{container, ifname, args} {
			if !isEnvironment(env) {
				return // the kernel would not start a plugin with it
			}
		}
		h := newHost(t)
		h.mustRun(call{"ADD", "other", "/netns/2", "net1", kubernetes, config(keys{"spoke": "vm", "deviceID": "vm"})})
		before := h.String()
		c := call{verbs[int(verb)%len(verbs)], container, "/netns/1", ifname, args, network}
		_, err := h.run(c)
		switch {
		case err != nil && (err.Msg == "" || err.Code == 0):
			t.Errorf("%+v: an error without code and sentence: %+v", c, err)
		case (err == nil || err.Code == cni.CodeIPAM) && (c.verb == "ADD" || c.verb == "DEL" || c.verb == "GC"):
			// DEL and GC release what they can, even if the IPAM plugin is missing.
		case h.String() != before:
			t.Errorf("%+v: %v, but it changed\n%s\ninto\n%s", c, err, before, h)
		}
		if other, ok := h.node.claims["knlvrf/vm"]; c.verb != "GC" && c.verb != "ADD" &&
			(!ok || other.ID != segment.ClaimID("other", "net1")) {
			t.Errorf("%+v: another pod lost its spoke", c)
		}
	})
}

func isEnvironment(s string) bool {
	for _, b := range []byte(s) {
		if b == 0 {
			return false
		}
	}
	return true
}
