package cni_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/k8slan/k8slan/cni"
	"github.com/k8slan/k8slan/lanmgr/kernel"
)

// megalos returns a network configuration as Kathará writes it, with keys set or (nil) removed.
func megalos(set keys) string {
	whole := keys{
		"cniVersion": "0.3.0", "name": "katlab-a", "type": "megalos",
		"suffix": "a1b2c3", "vxlanId": 5001, "master": "eth1",
		"kind": nil, "lan": nil, "ns": nil, "spoke": nil, "deviceID": nil, "capabilities": nil,
	}
	for key, value := range set {
		whole[key] = value
	}
	return config(whole)
}

// newVNIHost returns a host with underlay devices.
func newVNIHost(t *testing.T) *host {
	h := newHost(t)
	h.runDir = t.TempDir()
	ip4, ip6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	h.node.underlays = kernel.Underlays{Default: "eth0", Devices: map[string]kernel.Underlay{
		"eth0":  {Index: 2, MTU: 1500, Addresses: []netip.Addr{ip6}},
		"eth1":  {Index: 3, MTU: 9000, Addresses: []netip.Addr{ip6, ip4}},
		"bare":  {Index: 4, MTU: 1500},
		"small": {Index: 5, MTU: 100, Addresses: []netip.Addr{ip4}},
	}}
	return h
}

func TestVNIExistsWhileAPodIsAttached(t *testing.T) {
	h := newVNIHost(t)
	before := h.String()
	add := pod1("ADD", megalos(nil))
	add.args += ";MAC=02:aa:00:00:00:01"
	out := h.mustRun(add)
	if r := parse(t, out); r.Interfaces[1].Mac != "02:aa:00:00:00:01" ||
		!strings.Contains(out, `"cniVersion": "0.3.0"`) {
		t.Errorf("ADD printed %s", out)
	}
	s := h.node.lans["megalos-5001"]
	if !s.OnDemand || s.MTU != 9000-58 || s.VXLAN.Local != netip.MustParseAddr("192.0.2.1") ||
		s.VXLAN.UnderlayIndex != 3 || !s.VXLAN.NoLearning || s.LAN.String() != "megalos:5001" {
		t.Errorf("made %+v", s)
	}
	if d := h.devices(); len(d) != 0 {
		t.Errorf("CDI devices that kubelet did not allocate: %v", d)
	}
	h.mustRun(pod2("ADD", megalos(keys{"name": "katlab-b", "master": "eth0"})))
	h.mustRun(pod1("CHECK", megalos(keys{"cniVersion": "0.4.0", "prevResult": json.RawMessage(out)})))
	h.mustRun(pod1("DEL", megalos(nil)))
	h.mustFail(pod1("CHECK", megalos(keys{"cniVersion": "0.4.0", "prevResult": json.RawMessage(out)})),
		cni.CodeChanged, "VNI 5001")
	if _, there := h.node.lans["megalos-5001"]; !there {
		t.Error("the segment was removed while a pod was attached")
	}
	h.mustRun(pod2("DEL", megalos(nil)))
	if _, there := h.node.lans["megalos-5001"]; there || h.String() != before {
		t.Errorf("remains:\n%s", h)
	}
	h.mustFail(pod1("CHECK", megalos(keys{"cniVersion": "0.4.0", "prevResult": json.RawMessage(out)})),
		types.ErrTryAgainLater, "is not on this node any more")
}

// Without master, the underlay is the device of the default route. Without an IPv4 address, the VTEP is an IPv6
// address.
func TestVNIUsesTheDeviceOfTheDefaultRoute(t *testing.T) {
	h := newVNIHost(t)
	h.mustRun(pod1("ADD", megalos(keys{"master": nil})))
	if s := h.node.lans["megalos-5001"]; s.VXLAN.Underlay != "eth0" || s.MTU != 1500-78 ||
		s.VXLAN.Local != netip.MustParseAddr("2001:db8::1") {
		t.Errorf("made %+v", s)
	}
}

func TestInvalidVNINetworkIsRefusedWithASentence(t *testing.T) {
	const network = types.ErrInvalidNetworkConfig
	for _, c := range []struct {
		set  keys
		code uint
		want string
	}{
		{keys{"vxlanId": nil}, network, `has no "vxlanId"`},
		{keys{"vxlanId": 0}, network, "is not a VNI: 1 to 16777215"},
		{keys{"vxlanId": 16777216}, network, "is not a VNI"},
		{keys{"vxlanId": -1}, network, `key "vxlanId" cannot be`},
		{keys{"vxlanId": "5001"}, network, `key "vxlanId" cannot be a JSON string`},
		{keys{"master": "a/b"}, network, "is not the name of a network device"},
		{keys{"master": "eth0123456789012"}, network, "is not the name of a network device"},
		{keys{"master": "eth7"}, cni.CodeAttach, `VNI 5001: the node has no network device "eth7"`},
		{keys{"master": "bare"}, cni.CodeAttach, "has no address that other nodes could send to"},
		{keys{"master": "small"}, cni.CodeAttach, "too little for a VXLAN"},
		{keys{"mtu": 9000}, network, "more than the LAN carries: 8942"},
		{keys{"mac": "01:00:5e:00:00:01"}, network, "is not the address of one"},
	} {
		h := newVNIHost(t)
		h.mustFail(pod1("ADD", megalos(c.set)), c.code, c.want)
		h.mustRun(pod1("DEL", megalos(c.set)))
	}
	h := newVNIHost(t)
	h.node.underlays.Default = ""
	h.mustFail(pod1("ADD", megalos(keys{"master": nil})), cni.CodeAttach, "the node has no default route")
	h.mustFail(call{verb: "STATUS", config: megalos(keys{"cniVersion": "1.1.0", "master": "eth7"})},
		types.ErrPluginNotAvailable, `no network device "eth7"`)
	h.mustRun(call{verb: "STATUS", config: megalos(keys{"cniVersion": "1.1.0"})})
}

func TestVNIOfALANIsOpenOnlyToItsAllowedNamespaces(t *testing.T) {
	h := newVNIHost(t)
	ofLAN := keys{"vxlanId": 222}
	spy := pod2("ADD", megalos(ofLAN))
	spy.args = "K8S_POD_NAME=spy;K8S_POD_NAMESPACE=blue"
	h.mustFail(spy, cni.CodeForbidden, "VNI 222 belongs to LAN default/lab, which is not open to namespace \"blue\"")
	spy.args = "K8S_POD_NAME=spy"
	h.mustFail(spy, cni.CodeForbidden, `not open to namespace ""`)
	before := h.String()
	out := h.mustRun(pod1("ADD", megalos(ofLAN)))
	if _, made := h.node.lans["megalos-222"]; made ||
		parse(t, out).Interfaces[1].MTU != 0 && parse(t, out).Interfaces[1].MTU != lab.MTU {
		t.Errorf("the pod is not in the LAN: %s", out)
	}
	h.mustRun(pod2("ADD", config(nil))) // the LAN's spokes are still free
	h.mustRun(pod2("DEL", config(nil)))
	h.mustRun(pod1("DEL", megalos(ofLAN)))
	if h.String() != before {
		t.Errorf("remains:\n%s", h)
	}

	leaving := lab
	leaving.Leaving = true
	h.node.lans[lab.Netns] = leaving
	h.mustFail(pod1("ADD", megalos(ofLAN)),
		types.ErrTryAgainLater, "VNI 222 belongs to LAN default/lab, which is leaving this node")
	h.node.lans[lab.Netns] = lab

	taken := lab
	taken.Netns = "megalos-5001"
	h.node.lans["megalos-5001"] = taken
	h.mustFail(pod1("ADD", megalos(nil)),
		types.ErrTryAgainLater, "network namespace megalos-5001 belongs to LAN default/lab with VNI 222")
}

// Two networks may name one VNI. GC of each gets the attachments of that network only.
func TestGCOfAVNIReleasesOnlyItsNetwork(t *testing.T) {
	h := newVNIHost(t)
	before := h.String()
	h.mustRun(pod1("ADD", megalos(nil)))
	one := h.String()
	h.mustRun(pod2("ADD", megalos(keys{"name": "katlab-b"})))
	gc := func(name string, valid ...types.GCAttachment) call {
		return call{verb: "GC", config: megalos(keys{
			"name": name, "cniVersion": "1.1.0", "cni.dev/valid-attachments": append([]types.GCAttachment{}, valid...),
		})}
	}
	h.mustRun(gc("katlab-b"))
	if h.String() != one {
		t.Errorf("GC of the second network left\n%s", h)
	}
	h.mustRun(gc("katlab-a", types.GCAttachment{ContainerID: "c1", IfName: "net1"}))
	if h.String() != one {
		t.Errorf("GC ended a valid claim:\n%s", h)
	}
	h.mustRun(gc("katlab-a"))
	if h.String() != before {
		t.Errorf("remains:\n%s", h)
	}
}

// While networks of type megalos are disabled, no pod attaches, and attached pods can be detached.
func TestDisabledMegalosRefusesPodsAndDetachesThem(t *testing.T) {
	h := newVNIHost(t)
	before := h.String()
	h.mustRun(pod1("ADD", megalos(nil)))
	for _, enabled := range []bool{false, true} {
		if err := cni.EnableMegalos(h.runDir, enabled); err != nil {
			t.Fatal(err)
		}
		if enabled {
			h.mustRun(pod2("ADD", megalos(nil)))
			h.mustRun(pod2("DEL", megalos(nil)))
			break
		}
		h.mustFail(pod2("ADD", megalos(nil)),
			cni.CodeForbidden, "VNI 5001: networks of type megalos are disabled on this node")
		h.mustFail(call{verb: "STATUS", config: megalos(keys{"cniVersion": "1.1.0"})},
			types.ErrPluginNotAvailable, "are disabled on this node")
		h.mustRun(pod2("DEL", megalos(nil)))
	}
	h.mustRun(pod1("DEL", megalos(nil)))
	if after := h.String(); after != before {
		t.Errorf("remains %s, want %s", after, before)
	}
}
