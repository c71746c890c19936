package cni_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/k8slan/k8slan/cni"
	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

var lab = segment.Segment{
	LAN:   segment.LAN{Namespace: "default", Name: "lab"},
	Netns: "knlvrf", Bridge: "br2", MTU: 1422,
	VXLAN:  segment.VXLAN{Name: "vx2", VNI: 222, Underlay: "eth1", UnderlayIndex: 3},
	Spokes: []string{"db_0", "srl", "vm", "web_0", "web_1"}, MACByOrdinal: []string{"db"}, Node: "worker1",
}

// host is a node with the LAN lab, some pods and the plugin.
type host struct {
	t        *testing.T
	node     *memoryNode
	cdi      string
	bin      string // CNI_PATH
	runDir   string
	stdout   io.Writer
	outcomes []report.Outcome
}

func newHost(t *testing.T) *host {
	h := &host{
		t: t, node: newMemoryNode(lab),
		cdi: filepath.Join(t.TempDir(), "cdi"), bin: t.TempDir(), runDir: "/run/k8slan",
	}
	for _, pod := range []string{"/netns/1", "/netns/2"} {
		h.node.pods[pod] = map[string]string{}
	}
	return h
}

// call is one call of the plugin by a runtime.
type call struct {
	verb      string
	container string
	netns     string
	ifname    string
	args      string
	config    string
}

// pod1 returns the call that Multus makes for a pod in the LAN's own namespace.
func pod1(verb, config string) call {
	return call{
		verb, "c1", "/netns/1", "net1",
		"IgnoreUnknown=true;K8S_POD_NAMESPACE=default;K8S_POD_NAME=srl-1;K8S_POD_INFRA_CONTAINER_ID=c1;" +
			"K8S_POD_UID=1-2;K8S_POD_NAMESPACE=default;K8S_POD_NAME=srl-1", config,
	} // Multus repeats the runtime's keys
}

func pod2(verb, config string) call {
	return call{verb, "c2", "/netns/2", "net1", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=srl-2", config}
}

// run calls the plugin the way a runtime does: through skel, by environment and standard input.
func (h *host) run(c call) (string, *types.Error) {
	h.t.Helper()
	for name, value := range map[string]string{
		"CNI_COMMAND": c.verb, "CNI_CONTAINERID": c.container, "CNI_NETNS": c.netns, "CNI_IFNAME": c.ifname,
		"CNI_ARGS": c.args, "CNI_PATH": h.bin,
	} {
		h.t.Setenv(name, value)
	}
	stdin, err := os.Create(filepath.Join(h.t.TempDir(), "stdin"))
	if err != nil {
		h.t.Fatal(err)
	}
	defer stdin.Close()
	if _, err := stdin.WriteString(c.config); err != nil {
		h.t.Fatal(err)
	}
	if _, err := stdin.Seek(0, io.SeekStart); err != nil {
		h.t.Fatal(err)
	}
	old := os.Stdin
	os.Stdin = stdin
	defer func() { os.Stdin = old }()

	var out bytes.Buffer
	stdout := h.stdout
	if stdout == nil {
		stdout = &out
	}
	plugin := cni.New(h.node, cni.Host{
		Run: h.runDir, CDI: h.cdi, Stdout: stdout,
		Report: func(o report.Outcome) { h.outcomes = append(h.outcomes, o) },
	})
	e := skel.PluginMainFuncsWithError(plugin.Funcs(h.t.Context()), cniversion.All, "")
	return out.String(), e
}

func (h *host) mustRun(c call) string {
	h.t.Helper()
	out, err := h.run(c)
	if err != nil {
		h.t.Fatalf("%s: code %d: %v", c.verb, err.Code, err)
	}
	return out
}

// mustFail runs a call that must fail with that code and a message that contains want, and must change nothing.
func (h *host) mustFail(c call, code uint, want string) {
	h.t.Helper()
	before := h.String()
	_, err := h.run(c)
	switch {
	case err == nil:
		h.t.Fatalf("%s succeeded, want: %s", c.verb, want)
	case err.Code != code || !strings.Contains(err.Error(), want):
		h.t.Errorf("%s: code %d: %v\nwant code %d: %s", c.verb, err.Code, err, code, want)
	}
	if after := h.String(); after != before {
		h.t.Errorf("%s failed, but it changed\n%s\ninto\n%s", c.verb, before, after)
	}
}

// String prints everything that the plugin could change.
func (h *host) String() string {
	return h.node.String() + "\n" + strings.Join(h.devices(), "\n")
}

// devices returns the names and contents of the CDI files.
func (h *host) devices() []string {
	paths, err := filepath.Glob(filepath.Join(h.cdi, "*"))
	if err != nil {
		h.t.Fatal(err)
	}
	var files []string
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			h.t.Fatal(err)
		}
		files = append(files, filepath.Base(path)+" "+string(b))
	}
	return files
}

// config returns a network configuration as the controller writes it and Multus sends it, with keys set or (nil)
// removed.
func config(set map[string]any) string {
	c := map[string]any{
		"cniVersion": "1.0.0", "name": "k8slan-veth-srl", "type": "k8slan",
		"kind": "veth", "lan": "default/lab", "ns": "knlvrf", "spoke": "srl", "deviceID": "srl",
		"capabilities": map[string]bool{"mac": true},
	}
	for key, value := range set {
		c[key] = value
		if value == nil {
			delete(c, key)
		}
	}
	b, err := json.Marshal(c)
	if err != nil {
		panic(err)
	}
	return string(b)
}

type keys = map[string]any

// pooled returns the keys of a pool's configuration for which kubelet has allocated that port.
func pooled(pool string, port any) keys { return keys{"pool": pool, "spoke": nil, "deviceID": port} }

type result struct {
	CNIVersion string `json:"cniVersion"`
	Interfaces []struct {
		Name, Mac, Sandbox string
		MTU                int
	}
	IPs []struct {
		Interface        *int
		Address, Gateway string
	}
}

func parse(t *testing.T, out string) result {
	t.Helper()
	var r result
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("result %q: %v", out, err)
	}
	return r
}

func TestPodGetsItsSpoke(t *testing.T) {
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		h := newHost(t)
		r := parse(t, h.mustRun(pod1("ADD", config(keys{"cniVersion": version}))))
		mac := segment.MAC(lab.LAN, "srl").String()
		if r.CNIVersion != version || len(r.Interfaces) != 2 {
			t.Fatalf("result %+v", r)
		}
		link, pod := r.Interfaces[0], r.Interfaces[1]
		if link.Name != segment.ClaimID("c1", "net1") || link.Sandbox != "" {
			t.Errorf("%s: interface on the node %+v", version, link)
		}
		if pod.Name != "net1" || pod.Mac != mac || pod.Sandbox != "/netns/1" {
			t.Errorf("%s: interface in the pod %+v", version, pod)
		}
		if version >= "1" && pod.MTU != 1422 {
			t.Errorf("%s: MTU %d", version, pod.MTU)
		}
		want := fmt.Sprintf("claim knlvrf/srl %s veth default/srl-1 if=net1 mac=%s mtu=1422 promisc=false\n"+
			"pod /netns/1 net1 srl []", link.Name, mac)
		if h.node.String() != want {
			t.Errorf("node has\n%s\nwant\n%s", h.node, want)
		}
	}
}

// device is the part of a CDI file that changes a container.
type device struct {
	Name           string
	ContainerEdits struct {
		Env         []string
		DeviceNodes []struct {
			Path         string
			Major, Minor int64
			UID, GID     *uint32
		}
	}
}

func (h *host) device(file string) device {
	h.t.Helper()
	b, err := os.ReadFile(filepath.Join(h.cdi, file))
	if err != nil {
		h.t.Fatal(err)
	}
	var spec struct {
		Kind    string
		Devices []device
	}
	if err := json.Unmarshal(b, &spec); err != nil || len(spec.Devices) != 1 || spec.Kind != "macvtap.k8slan.io/spoke" {
		h.t.Fatalf("CDI file %s: %v", b, err)
	}
	return spec.Devices[0]
}

func TestCDIDeviceOfAPodIsEnvironmentOnly(t *testing.T) {
	h := newHost(t)
	h.mustRun(pod1("ADD", config(nil)))
	d := h.device("macvtap.k8slan.io-spoke_srl_" + segment.ClaimID("c1", "net1") + ".json")
	want := []string{
		"K8SLAN_SRL_LAN=default/lab", "K8SLAN_SRL_INTERFACE=net1",
		"K8SLAN_SRL_MAC=" + segment.MAC(lab.LAN, "srl").String(), "K8SLAN_SRL_MTU=1422",
	}
	if d.Name != "srl" || len(d.ContainerEdits.DeviceNodes) != 0 || !slices.Equal(d.ContainerEdits.Env, want) {
		t.Errorf("device %+v", d)
	}
}

func TestCDIDeviceOfAVMIsItsTap(t *testing.T) {
	for _, c := range []struct {
		set        keys
		owner, gid uint32
	}{
		{keys{}, 107, 107},
		{keys{"owner": 0, "group": 36}, 0, 36},
	} {
		h := newHost(t)
		c.set["kind"] = "macvtap"
		h.mustRun(pod1("ADD", config(c.set)))
		d := h.device("macvtap.k8slan.io-spoke_srl_" + segment.ClaimID("c1", "net1") + ".json")
		if len(d.ContainerEdits.DeviceNodes) != 1 ||
			!slices.Contains(d.ContainerEdits.Env, "K8SLAN_SRL_TAP=/dev/tap17") {
			t.Fatalf("device %+v", d)
		}
		tap := d.ContainerEdits.DeviceNodes[0]
		if tap.Path != "/dev/tap17" || tap.Major != 241 || tap.Minor != 3 || *tap.UID != c.owner || *tap.GID != c.gid {
			t.Errorf("tap %+v", tap)
		}
	}
}

func TestMostSpecificMACWins(t *testing.T) {
	const (
		env        = "02:00:00:00:00:01"
		runtime    = "02:00:00:00:00:02"
		annotation = "02:00:00:00:00:03"
		network    = "02:00:00:00:00:04"
	)
	all := keys{"mac": network, "args": keys{"cni": keys{"mac": annotation}}, "runtimeConfig": keys{"mac": runtime}}
	for _, c := range []struct {
		name, args string
		set        keys
		want       string
	}{
		{"CNI_ARGS", ";MAC=" + env, all, env},
		{"runtimeConfig", "", all, runtime},
		{"args.cni", "", keys{"mac": network, "args": all["args"]}, annotation},
		{"network", "", keys{"mac": network}, network},
		{"empty CNI_ARGS", ";MAC=", keys{"mac": network}, network},
		{"none", "", nil, segment.MAC(lab.LAN, "srl").String()},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			add := pod1("ADD", config(c.set))
			add.args += c.args
			if r := parse(t, h.mustRun(add)); r.Interfaces[1].Mac != c.want {
				t.Errorf("MAC %s, want %s", r.Interfaces[1].Mac, c.want)
			}
		})
	}
}

func TestMTUAndPromiscuousModeAreSet(t *testing.T) {
	for _, c := range []struct {
		set  keys
		want string
	}{
		{keys{"mtu": 1000, "args": keys{"cni": keys{"mtu": 1200}}}, "mtu=1200 promisc=false"},
		{keys{"mtu": 1000, "promiscMode": true}, "mtu=1000 promisc=true"},
		{keys{"mtu": 68}, "mtu=68 promisc=false"},
		{keys{"mtu": 1422}, "mtu=1422 promisc=false"},
	} {
		h := newHost(t)
		h.mustRun(pod1("ADD", config(c.set)))
		if !strings.Contains(h.node.String(), c.want) {
			t.Errorf("node has\n%s\nwant %s", h.node, c.want)
		}
	}
}

func TestBadRequestIsRefusedWithASentence(t *testing.T) {
	const (
		env     = types.ErrInvalidEnvironmentVariables
		network = types.ErrInvalidNetworkConfig
	)
	for _, c := range []struct {
		name string
		set  keys
		args string // added to CNI_ARGS
		code uint
		want string
	}{
		{name: "no kind", set: keys{"kind": nil}, code: network, want: `network configuration has no "kind"`},
		{
			name: "unknown kind", set: keys{"kind": "ipvlan"}, code: network,
			want: `kind: "ipvlan" is neither "veth" nor "macvtap"`,
		},
		{name: "no ns", set: keys{"ns": nil}, code: network, want: `has no "ns"`},
		{
			name: "ns leaves its folder", set: keys{"ns": "../../proc/1/ns/net"}, code: network,
			want: "is not the name of a network namespace",
		},
		{
			name: "ns is the folder above", set: keys{"ns": ".."}, code: network,
			want: "is not the name of a network namespace",
		},
		{name: "ns is a number", set: keys{"ns": 7}, code: network, want: `key "ns" cannot be a JSON number`},
		{name: "no spoke", set: keys{"spoke": nil}, code: network, want: `has no "spoke"`},
		{
			name: "spoke leaves its folder", set: keys{"spoke": "../x"}, code: network,
			want: "is not the name of a spoke",
		},
		{name: "spoke too long", set: keys{"spoke": "spine-router-01"}, code: network, want: "1 to 13 of"},
		{
			name: "LAN without a namespace", set: keys{"lan": "lab"}, code: network,
			want: "is not the namespace/name of a LAN",
		},
		{
			name: "group MAC", set: keys{"mac": "01:00:5e:00:00:01"}, code: network,
			want: "mac: \"01:00:5e:00:00:01\" is not the address of one Ethernet interface",
		},
		{name: "zero MAC", set: keys{"mac": "00:00:00:00:00:00"}, code: network, want: "is not the address of one"},
		{
			name: "EUI-64", set: keys{"runtimeConfig": keys{"mac": "02:00:00:00:00:00:00:01"}}, code: network,
			want: "runtimeConfig.mac",
		},
		{name: "MAC in CNI_ARGS", args: ";MAC=abc", code: env, want: `CNI_ARGS MAC: "abc"`},
		{name: "MTU too small", set: keys{"mtu": 67}, code: network, want: `mtu: "67" is not an MTU`},
		{
			name: "MTU negative", set: keys{"args": keys{"cni": keys{"mtu": -1}}}, code: network,
			want: `args.cni.mtu: "-1"`,
		},
		{
			name: "MTU beyond the LAN's", set: keys{"mtu": 1423}, code: network,
			want: "mtu 1423 is more than the LAN carries: 1422",
		},
		{name: "MTU as text", set: keys{"mtu": "1400"}, code: network, want: `key "mtu" cannot be a JSON string`},
		{name: "owner negative", set: keys{"owner": -1}, code: network, want: `key "owner" cannot be a JSON number -1`},
		{
			name: "IPAM without type", set: keys{"ipam": keys{"subnet": "10.0.0.0/8"}}, code: network,
			want: `has no "ipam.type"`,
		},
		{
			name: "IPAM by path", set: keys{"ipam": keys{"type": "../sh"}}, code: network,
			want: "is not the name of an IPAM plugin",
		},
		{name: "IPAM by itself", set: keys{"ipam": keys{"type": "k8slan"}}, code: network, want: "is this plugin"},
		{
			name: "IPAM for a VM", set: keys{"kind": "macvtap", "ipam": keys{"type": "host-local"}}, code: network,
			want: "set them inside the guest",
		},
		{
			name: "IPAM is text", set: keys{"ipam": "host-local"}, code: network,
			want: `key "ipam" cannot be a JSON string`,
		},
		{name: "CNI_ARGS no pair", args: ";oops", code: env, want: `"oops" is not key=value`},
		{
			name: "second namespace", args: ";K8S_POD_NAMESPACE=blue", code: env,
			want: "K8S_POD_NAMESPACE has two values",
		},
		{
			name: "version without interfaces", set: keys{"cniVersion": "0.2.0"}, code: types.ErrIncompatibleCNIVersion,
			want: "use 0.3.0 or later",
		},
		{
			name: "version of the future", set: keys{"cniVersion": "9.0.0"}, code: types.ErrIncompatibleCNIVersion,
			want: "incompatible CNI versions",
		},
		{
			name: "no device", set: keys{"deviceID": nil}, code: cni.CodeNoDevice,
			want: `spoke "srl" of LAN default/lab: kubelet allocated no macvtap.k8slan.io/k8slan-veth-srl to this ` +
				`pod. Either none of its containers has it in resources.limits: add it there; or the pod is bound ` +
				`to a node that did not advertise it: see kubectl get lan`,
		},
		{
			name: "another spoke's device", set: keys{"deviceID": "vm"}, code: cni.CodeWrongDevice,
			want: `allocated the device of spoke "vm"`,
		},
		{
			name: "LAN not on the node", set: keys{"ns": "other"}, code: types.ErrTryAgainLater,
			want: "LAN default/lab is not on this node (no /run/k8slan/netns/other): was it deleted, or is the " +
				"daemon still starting? See kubectl get lan -n default lab",
		},
		{
			name: "netns of another LAN", set: keys{"lan": "default/core"}, code: network,
			want: `"knlvrf" is the network namespace of LAN default/lab, not of default/core`,
		},
		{
			name: "a spoke and a pool", set: keys{"pool": "web"}, code: network,
			want: `pool: "web" is set beside a spoke`,
		},
		{
			name: "pool leaves its folder", set: keys{"pool": "../x", "spoke": nil}, code: network,
			want: "is not the name of a pool",
		},
		{name: "pool too long", set: keys{"pool": "abcdefghij", "spoke": nil}, code: network, want: "1 to 9 of"},
		{
			name: "a port for a spoke", set: keys{"spoke": "web_0", "deviceID": "web_0"}, code: network,
			want: "is not the name of a spoke",
		},
		{
			name: "unknown pool", set: pooled("edge", "edge_0"), code: cni.CodeNoSpoke,
			want: `LAN default/lab has no pool "edge"`,
		},
		{
			name: "no device of the pool", set: pooled("web", nil), code: cni.CodeNoDevice,
			want: `pool "web" of LAN default/lab: kubelet allocated no macvtap.k8slan.io/k8slan-veth-web to this pod`,
		},
		{
			name: "a device of another pool", set: pooled("web", "db_0"), code: cni.CodeWrongDevice,
			want: `allocated the device of spoke "db_0" to this pod; the annotation k8s.v1.cni.cncf.io/resourceName ` +
				`of this network must be macvtap.k8slan.io/k8slan-veth-web`,
		},
		{
			name: "a spoke's device for a pool", set: pooled("web", "srl"), code: cni.CodeWrongDevice,
			want: `allocated the device of spoke "srl"`,
		},
		{
			name: "a port beyond the pool's size", set: pooled("web", "web_2"), code: cni.CodeNoSpoke,
			want: `LAN default/lab has no pool "web" with a port "web_2" on this node: is it in spec.spokePools, not ` +
				`refused, and not made smaller?`,
		},
		{
			name: "no ordinal", set: pooled("db", "db_0"), code: cni.CodeNoOrdinal,
			want: `the pod has no ordinal: pool db derives MACs from it, and the pod is called "nameless"`,
		},
		{
			name: "unknown spoke", set: keys{"spoke": "edge", "deviceID": "edge"}, code: cni.CodeNoSpoke,
			want: `LAN default/lab has no spoke "edge" on this node`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			add := pod1("ADD", config(c.set))
			add.args += c.args
			if c.code == cni.CodeNoOrdinal {
				add.args = strings.ReplaceAll(add.args, "srl-1", "nameless")
			}
			h.mustFail(add, c.code, c.want)
		})
	}
}

func TestInvalidJSONIsRefused(t *testing.T) {
	for _, text := range []string{"", "{", "[]", "null", `"x"`, `{"name":"x"`, "\x00"} {
		for _, verb := range []string{"ADD", "DEL", "CHECK", "GC", "STATUS"} {
			_, err := newHost(t).run(pod1(verb, text))
			if err == nil || err.Msg == "" {
				t.Errorf("%s %q: %v", verb, text, err)
			}
		}
	}
}

func TestPodGetsThePortThatKubeletAllocated(t *testing.T) {
	h := newHost(t)
	r := parse(t, h.mustRun(pod1("ADD", config(pooled("web", "web_1")))))
	mac := lab.PlugMAC("web_1").String()
	if r.Interfaces[1].Mac != mac || !strings.Contains(h.node.String(), "claim knlvrf/web_1 ") {
		t.Errorf("result %+v, node has\n%s", r, h.node)
	}
	d := h.device("macvtap.k8slan.io-spoke_web_1_" + segment.ClaimID("c1", "net1") + ".json")
	want := []string{
		"K8SLAN_WEB_LAN=default/lab",
		"K8SLAN_WEB_INTERFACE=net1", "K8SLAN_WEB_MAC=" + mac, "K8SLAN_WEB_MTU=1422",
	}
	if d.Name != "web_1" || !slices.Equal(d.ContainerEdits.Env, want) {
		t.Errorf("device %+v", d)
	}
	h.mustRun(pod2("ADD", config(pooled("web", "web_0"))))
	if n := len(h.devices()); n != 2 {
		t.Errorf("two ports have %d CDI devices", n)
	}
}

func TestMACByOrdinalFollowsThePodsNumber(t *testing.T) {
	h := newHost(t)
	want, err := lab.PodMAC("db_0", "srl-1")
	if err != nil {
		t.Fatal(err)
	}
	if r := parse(t, h.mustRun(pod1("ADD", config(pooled("db", "db_0"))))); r.Interfaces[1].Mac != want.String() {
		t.Errorf("MAC %s, want %s", r.Interfaces[1].Mac, want)
	}
}

func TestDELFindsThePortWithoutItsDeviceID(t *testing.T) {
	for name, set := range map[string]keys{
		"with it": pooled("web", "web_1"), "without it": pooled("web", nil), "with another": pooled("web", "srl"),
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.mustRun(pod2("ADD", config(pooled("web", "web_0"))))
			before := h.String()
			h.mustRun(pod1("ADD", config(pooled("web", "web_1"))))
			for range 2 {
				h.mustRun(pod1("DEL", config(set)))
				if h.String() != before {
					t.Fatalf("remains:\n%s\nwant\n%s", h, before)
				}
			}
			delete(h.node.lans, "knlvrf")
			h.mustRun(pod1("DEL", config(set)))
		})
	}
}

func TestGCOfAPoolReleasesOnlyItsPorts(t *testing.T) {
	h := newHost(t)
	h.mustRun(pod2("ADD", config(nil)))
	before := h.String()
	h.mustRun(pod1("ADD", config(pooled("web", "web_1"))))
	attached := h.String()
	gc := func(pool string, valid ...types.GCAttachment) call {
		set := pooled(pool, nil)
		set["cniVersion"], set["cni.dev/valid-attachments"] = "1.1.0", append([]types.GCAttachment{}, valid...)
		return call{verb: "GC", config: config(set)}
	}
	for _, c := range []call{gc("web", types.GCAttachment{ContainerID: "c1", IfName: "net1"}), gc("db")} {
		if h.mustRun(c); h.String() != attached {
			t.Fatalf("GC %s released a valid attachment", c.config)
		}
	}
	if h.mustRun(gc("web")); h.String() != before {
		t.Errorf("remains:\n%s", h)
	}
	status := func(pool string) call {
		return call{
			verb: "STATUS", config: config(keys{"cniVersion": "1.1.0", "pool": pool, "spoke": nil, "deviceID": nil}),
		}
	}
	h.mustRun(status("web"))
	h.mustFail(status("edge"), types.ErrPluginNotAvailable, `has no pool "edge"`)
}

func TestExistingInterfaceIsNotReplaced(t *testing.T) {
	h := newHost(t)
	h.node.pods["/netns/1"]["net1"] = "another plugin's"
	h.mustFail(pod1("ADD", config(nil)), cni.CodeNameTaken, `the pod already has an interface "net1"`)
}

func TestOneSandboxGetsASpokeOnce(t *testing.T) {
	h := newHost(t)
	h.mustRun(pod1("ADD", config(nil)))
	again := pod1("ADD", config(nil))
	again.ifname = "net2"
	h.mustFail(again, cni.CodeSameSandbox, "is already attached to this pod")
}

func TestPodWithoutNetworkNamespaceIsRefused(t *testing.T) {
	add := pod1("ADD", config(nil))
	add.netns = "/netns/gone"
	newHost(t).mustFail(add, types.ErrInvalidNetNS, "the pod's network namespace")
}

func TestHostNetworkGetsNoInterface(t *testing.T) {
	h := newHost(t)
	add := pod1("ADD", config(nil))
	add.netns = "/proc/self/ns/net"
	h.node.pods[add.netns] = map[string]string{}
	h.mustFail(add, types.ErrInvalidNetNS, "is the node's own network namespace")
}

func TestOtherNamespaceNeedsAllowedNamespaces(t *testing.T) {
	from := func(namespace string) call {
		add := pod1("ADD", config(nil))
		add.args = "K8S_POD_NAME=spy;K8S_POD_NAMESPACE=" + namespace
		return add
	}
	open := func(to ...string) *host {
		h := newHost(t)
		s := lab
		s.AllowedNamespaces = to
		h.node.lans["knlvrf"] = s
		return h
	}
	open().mustFail(from("blue"), cni.CodeForbidden,
		"LAN default/lab is not open to namespace blue; its owner can add blue to spec.allowedNamespaces")
	open("green").mustFail(from("blue"), cni.CodeForbidden, "not open to namespace blue")
	open("green").mustFail(from(""), types.ErrInvalidEnvironmentVariables, "CNI_ARGS has no K8S_POD_NAMESPACE")
	open("blue").mustRun(from("blue"))
	open("*").mustRun(from("blue"))
	open("*").mustRun(from(""))
}

func TestNewPodTakesOverAndTheOldPodsDELLeavesItAttached(t *testing.T) {
	for _, old := range []string{"veth", "macvtap"} {
		for _, successor := range []string{"veth", "macvtap"} {
			t.Run(old+" to "+successor, func(t *testing.T) {
				h := newHost(t)
				h.mustRun(pod1("ADD", config(keys{"kind": old})))
				h.mustRun(pod2("ADD", config(keys{"kind": successor})))
				if n := len(h.devices()); n != 1 {
					t.Errorf("one spoke has %d CDI devices: the runtime would use none of them", n)
				}
				want := h.String()
				if !strings.Contains(want, "srl-2") {
					t.Fatalf("the spoke is not taken over:\n%s", want)
				}
				h.mustRun(pod1("DEL", config(keys{"kind": old})))
				if h.String() != want {
					t.Errorf("the old pod's DEL changed\n%s\ninto\n%s", want, h)
				}
			})
		}
	}
}

func TestDELCanBeRepeated(t *testing.T) {
	h := newHost(t)
	empty := h.String()
	h.mustRun(pod1("ADD", config(nil)))
	for range 3 {
		h.mustRun(pod1("DEL", config(nil)))
		if h.String() != empty {
			t.Fatalf("remains:\n%s", h)
		}
	}
}

func TestDELNeedsNeitherNetnsNorLANNorValidConfig(t *testing.T) {
	h := newHost(t)
	empty := h.String()
	h.mustRun(pod1("ADD", config(nil)))
	del := pod1("DEL", config(keys{"deviceID": nil, "mtu": "what?", "mac": "what?"}))
	del.netns, del.args = "", ""
	h.mustRun(del)
	if h.String() != empty {
		t.Errorf("remains:\n%s", h)
	}
	delete(h.node.lans, "knlvrf")
	h.mustRun(del)
	for _, set := range []keys{{"ns": "../x"}, {"spoke": 5}, {"kind": nil}, {"ipam": "x"}} {
		h.mustRun(pod1("DEL", config(set)))
	}
}

func TestFailedDELReturnsAnErrorAndCanBeRepeated(t *testing.T) {
	h := newHost(t)
	empty := h.String()
	h.mustRun(pod1("ADD", config(nil)))
	h.node.changeErr = errors.New("RTNETLINK: no buffer space")
	if _, err := h.run(pod1("DEL", config(nil))); err == nil || err.Code != cni.CodeAttach {
		t.Errorf("DEL: %v", err)
	}
	h.node.changeErr = nil
	h.mustRun(pod1("DEL", config(nil)))
	if h.String() != empty {
		t.Errorf("remains:\n%s", h)
	}
}

func TestFailedADDLeavesNothing(t *testing.T) {
	t.Run("kernel", func(t *testing.T) {
		h := newHost(t)
		h.node.changeErr = errors.New("RTNETLINK: no buffer space")
		h.mustFail(pod1("ADD", config(nil)), cni.CodeAttach, "no buffer space")
	})
	t.Run("CDI folder", func(t *testing.T) {
		h := newHost(t)
		h.cdi = "/dev/null/cdi"
		h.mustFail(pod1("ADD", config(nil)), cni.CodeCDI, "/dev/null")
	})
	t.Run("standard output", func(t *testing.T) {
		h := newHost(t)
		closed, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		closed.Close()
		h.stdout = closed
		h.mustFail(pod1("ADD", config(nil)), types.ErrIOFailure, "the result cannot be written")
	})
}

// checkConfig returns a configuration with the result of ADD.
func checkConfig(set keys, out string) string {
	whole := keys{"prevResult": json.RawMessage(out)}
	for key, value := range set {
		whole[key] = value
	}
	return config(whole)
}

func TestCHECKFindsWhatChanged(t *testing.T) {
	h := newHost(t)
	out := h.mustRun(pod1("ADD", config(nil)))
	h.mustRun(pod1("CHECK", checkConfig(nil, out)))
	h.mustRun(pod1("CHECK", checkConfig(keys{"deviceID": nil}, out)))

	mac := segment.MAC(lab.LAN, "srl").String()
	h.mustFail(pod1("CHECK", config(nil)), types.ErrInvalidNetworkConfig, `has no "prevResult"`)
	h.mustFail(pod1("CHECK", checkConfig(nil, strings.ReplaceAll(out, mac, "02:00:00:00:00:09"))),
		cni.CodeChanged, "not 02:00:00:00:00:09")
	h.mustFail(pod1("CHECK", checkConfig(nil, strings.ReplaceAll(out, "1422", "1400"))), cni.CodeChanged, "not 1400")
	h.mustFail(pod1("CHECK", checkConfig(nil, strings.ReplaceAll(out, `"net1"`, `"net2"`))),
		types.ErrInvalidNetworkConfig, `no interface "net1"`)
	h.mustFail(pod1("CHECK", checkConfig(nil, `{"cniVersion":"0.4.0","interfaces":[null]}`)),
		types.ErrInvalidNetworkConfig, "null")
	h.mustFail(pod1("CHECK", checkConfig(nil, `[]`)), types.ErrInvalidNetworkConfig, "prevResult cannot be read")

	h.mustRun(pod2("ADD", config(nil)))
	h.mustFail(pod1("CHECK", checkConfig(nil, out)), cni.CodeChanged, "no longer claimed by this pod")
	delete(h.node.lans, "knlvrf")
	h.mustFail(pod1("CHECK", checkConfig(nil, out)), types.ErrTryAgainLater, "is not on this node")
}

func TestGCReleasesClaimsThatAreNotValid(t *testing.T) {
	gc := func(set keys, valid ...types.GCAttachment) call {
		if valid == nil {
			valid = []types.GCAttachment{}
		}
		set["cniVersion"], set["cni.dev/valid-attachments"] = "1.1.0", valid
		return call{verb: "GC", config: config(set)}
	}
	h := newHost(t)
	empty := h.String()
	h.mustRun(pod1("ADD", config(nil)))
	attached := h.String()
	for _, c := range []call{
		gc(keys{}, types.GCAttachment{ContainerID: "c9", IfName: "net1"},
			types.GCAttachment{ContainerID: "c1", IfName: "net1"}),
		gc(keys{"spoke": "vm"}),     // another spoke's network
		gc(keys{"kind": "macvtap"}), // the spoke's other network
		gc(keys{"ns": "other"}),     // not on this node
	} {
		if h.mustRun(c); h.String() != attached {
			t.Fatalf("GC %s released a valid attachment", c.config)
		}
	}
	h.mustRun(gc(keys{}, types.GCAttachment{ContainerID: "c1", IfName: "net2"}))
	if h.String() != empty {
		t.Errorf("remains:\n%s", h)
	}
}

func TestSTATUSSaysWhetherThePodCouldAttach(t *testing.T) {
	status := call{verb: "STATUS", config: config(keys{"cniVersion": "1.1.0"})}
	h := newHost(t)
	h.mustRun(status)

	lonely := lab
	lonely.VXLAN.UnderlayIndex = 0
	h.node.lans["knlvrf"] = lonely
	h.mustFail(status, types.ErrLimitedConnectivity, `this node has no underlay device "eth1"`)

	lonely.Spokes = nil
	h.node.lans["knlvrf"] = lonely
	h.mustFail(status, types.ErrPluginNotAvailable, `has no spoke "srl"`)

	delete(h.node.lans, "knlvrf")
	h.mustFail(status, types.ErrPluginNotAvailable, "is not on this node")
}

func TestVERSIONIsAnswered(t *testing.T) {
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	old := os.Stdout
	os.Stdout = write
	_, cniErr := newHost(t).run(call{verb: "VERSION"})
	os.Stdout = old
	write.Close()
	out, err := io.ReadAll(read)
	if cniErr != nil || err != nil || !strings.Contains(string(out), `"1.1.0"`) {
		t.Errorf("VERSION: %s %v %v", out, cniErr, err)
	}
}

// installIPAM installs an IPAM plugin in the host's CNI_PATH. It answers ADD, and appends each call to a log that calls
// returns.
func (h *host) installIPAM(answer string) (calls func() string) {
	log := filepath.Join(h.bin, "log")
	script := fmt.Sprintf("#!/bin/sh\necho $CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME >>%s\n"+
		"case $CNI_COMMAND in ADD) %s;; esac\n", log, answer)
	if err := os.WriteFile(filepath.Join(h.bin, "test-ipam"), []byte(script), 0o755); err != nil {
		h.t.Fatal(err)
	}
	return func() string {
		b, err := os.ReadFile(log)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			h.t.Fatal(err)
		}
		return strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", ", ")
	}
}

const twoAddresses = `echo '{"cniVersion":"1.0.0",` +
	`"ips":[{"address":"10.1.2.3/24","gateway":"10.1.2.1"},{"address":"fd00::5/64"}],` +
	`"routes":[{"dst":"0.0.0.0/0"},{"dst":"fd01::/16","gw":"fd00::1","mtu":1300}]}'`

func TestIPAMAllocatesThePodsAddresses(t *testing.T) {
	h := newHost(t)
	calls := h.installIPAM(twoAddresses)
	network := keys{"ipam": keys{"type": "test-ipam"}}
	out := h.mustRun(pod1("ADD", config(network)))
	r := parse(t, out)
	if len(r.IPs) != 2 || r.IPs[0].Address != "10.1.2.3/24" || *r.IPs[0].Interface != 1 || *r.IPs[1].Interface != 1 {
		t.Errorf("result %s", out)
	}
	want := "[{Destination:0.0.0.0/0 Gateway:10.1.2.1 MTU:0 AdvMSS:0 Priority:0 Table:<nil> Scope:<nil>} " +
		"{Destination:fd01::/16 Gateway:fd00::1 MTU:1300 AdvMSS:0 Priority:0 Table:<nil> Scope:<nil>}]"
	if routes := fmt.Sprintf("%+v", h.node.routes["/netns/1/net1"]); routes != want {
		t.Errorf("routes %s", routes)
	}
	h.mustRun(pod1("CHECK", checkConfig(network, out)))
	addresses := h.node.addresses["/netns/1/net1"]
	h.node.addresses["/netns/1/net1"] = []netip.Prefix{addresses[1]}
	h.mustFail(pod1("CHECK", checkConfig(network, out)), cni.CodeChanged, "has lost its address 10.1.2.3/24")
	h.mustRun(pod1("DEL", config(network)))
	h.mustRun(pod1("DEL", config(network)))
	if got := calls(); got != "ADD c1 net1, CHECK c1 net1, CHECK c1 net1, DEL c1 net1, DEL c1 net1" {
		t.Errorf("calls of the IPAM plugin: %s", got)
	}
}

func TestIPAMReceivesGCAndSTATUS(t *testing.T) {
	h := newHost(t)
	calls := h.installIPAM("")
	network := config(keys{"cniVersion": "1.1.0", "ipam": keys{"type": "test-ipam"}})
	h.mustRun(call{verb: "STATUS", config: network})
	h.mustRun(call{verb: "GC", config: network})
	if got := calls(); got != "STATUS, GC" {
		t.Errorf("calls of the IPAM plugin: %s", got)
	}
}

func TestOldResultVersionsCarryAddresses(t *testing.T) {
	for _, version := range []string{"0.1.0", "0.2.0", "0.3.0", "0.4.0"} {
		h := newHost(t)
		h.installIPAM(twoAddresses)
		out := h.mustRun(pod1("ADD", config(keys{"cniVersion": version, "ipam": keys{"type": "test-ipam"}})))
		if !strings.Contains(out, "10.1.2.3/24") {
			t.Errorf("%s: %s", version, out)
		}
	}
}

func TestAddressesAreReleasedWhenADDFails(t *testing.T) {
	h := newHost(t)
	calls := h.installIPAM(twoAddresses)
	h.node.addressErr = kernel.ErrNameTaken
	h.mustFail(pod1("ADD", config(keys{"ipam": keys{"type": "test-ipam"}})), cni.CodeNameTaken, "")
	if got := calls(); got != "ADD c1 net1, DEL c1 net1" {
		t.Errorf("calls of the IPAM plugin: %s", got)
	}
}

func TestIPAMFailureIsPassedOn(t *testing.T) {
	for _, c := range []struct {
		name, answer string
		code         uint
		want         string
	}{
		{
			"its own error", `echo '{"code":110,"msg":"no address left"}'; exit 1`, 110,
			"IPAM plugin test-ipam: no address left",
		},
		{"a crash", "echo help >&2; exit 2", cni.CodeIPAM, "exit status 2 help"},
		{"no address", `echo '{"cniVersion":"1.0.0"}'`, cni.CodeIPAM, "gave no address"},
		{"nothing", "true", cni.CodeIPAM, "cannot be read"},
		{"null", "echo null", cni.CodeIPAM, "cannot be read"},
		{"a null address", `echo '{"ips":[null]}'`, cni.CodeIPAM, "null"},
		{"an odd mask", `echo '{"ips":[{"address":"10.0.0.1"}]}'`, cni.CodeIPAM, "cannot be read"},
		{"no version", `echo '{"ips":[{"address":"10.0.0.1/33"}]}'`, cni.CodeIPAM, "cannot be read"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.installIPAM(c.answer)
			h.mustFail(pod1("ADD", config(keys{"ipam": keys{"type": "test-ipam"}})), c.code, c.want)
		})
	}
	newHost(t).mustFail(pod1("ADD", config(keys{"ipam": keys{"type": "host-local"}})),
		cni.CodeIPAM, `no IPAM plugin "host-local" in`)
}

func TestIPAMResultWithoutVersionHasThatOfTheConfiguration(t *testing.T) {
	h := newHost(t)
	h.installIPAM(`echo ' { "ips":[{"address":"10.0.0.1/8"}] } '`)
	out := h.mustRun(pod1("ADD", config(keys{"ipam": keys{"type": "test-ipam"}})))
	if r := parse(t, out); len(r.IPs) != 1 || r.IPs[0].Address != "10.0.0.1/8" {
		t.Errorf("result %s", out)
	}
}

func TestOutcomeOfEachAttachmentIsReported(t *testing.T) {
	add, vm := config(nil), config(keys{"kind": "macvtap"})
	ipam := config(keys{"ipam": keys{"type": "test-ipam"}})
	for _, c := range []struct {
		name string
		do   func(h *host)
		want report.Outcome
	}{
		{"ADD", func(h *host) { h.mustRun(pod1("ADD", add)) }, report.Outcome{Verb: report.Add, Kind: segment.Veth}},
		{"take-over", func(h *host) {
			h.mustRun(pod1("ADD", add))
			h.mustRun(pod2("ADD", vm))
		}, report.Outcome{Verb: report.Add, Kind: segment.Macvtap, TookOver: true}},
		{"DEL", func(h *host) { h.mustRun(pod1("DEL", add)) }, report.Outcome{Verb: report.Del, Kind: segment.Veth}},
		{
			"no device", func(h *host) { h.mustFail(pod1("ADD", config(keys{"deviceID": ""})), cni.CodeNoDevice, "") },
			report.Outcome{Verb: report.Add, Kind: segment.Veth, Reason: report.NoDevice},
		},
		{
			"invalid configuration",
			func(h *host) { h.mustFail(pod1("ADD", config(keys{"kind": "x"})), types.ErrInvalidNetworkConfig, "") },
			report.Outcome{Verb: report.Add, Reason: report.Configuration},
		},
		{
			"no LAN", func(h *host) { h.mustFail(pod1("ADD", config(keys{"ns": "x"})), types.ErrTryAgainLater, "") },
			report.Outcome{Verb: report.Add, Kind: segment.Veth, Reason: report.Unavailable},
		},
		{"an IPAM plugin's code that is also one of k8slan's", func(h *host) {
			h.installIPAM(`echo '{"code":102,"msg":"no address left"}'; exit 1`)
			h.mustFail(pod1("ADD", ipam), 102, "")
		}, report.Outcome{Verb: report.Add, Kind: segment.Veth, Reason: report.IPAM}},
		{"DEL that the kernel refuses", func(h *host) {
			h.mustRun(pod1("ADD", add))
			h.node.changeErr = errors.New("RTNETLINK: no buffer space")
			if _, err := h.run(pod1("DEL", add)); err == nil {
				h.t.Error("DEL succeeded")
			}
		}, report.Outcome{Verb: report.Del, Kind: segment.Veth, Reason: report.Kernel}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			c.do(h)
			last := h.outcomes[len(h.outcomes)-1]
			if last.Took <= 0 {
				t.Errorf("Took is %v", last.Took)
			}
			if last.Took = 0; last != c.want {
				t.Errorf("reported %+v, want %+v", last, c.want)
			}
		})
	}
	h := newHost(t)
	h.mustRun(call{verb: "STATUS", config: config(keys{"cniVersion": "1.1.0"})})
	if len(h.outcomes) > 0 {
		t.Errorf("STATUS was reported: %+v", h.outcomes)
	}
}

// Each error code of the plugin is counted under a reason.
func TestEveryErrorCodeHasAReason(t *testing.T) {
	for code := cni.CodeNoDevice; code <= cni.CodeCDI; code++ {
		if code == cni.CodeChanged { // CHECK is not reported
			continue
		}
		if cni.Reason(types.NewError(code, "", "")) == report.Other {
			t.Errorf("code %d has no reason of its own", code)
		}
	}
}
