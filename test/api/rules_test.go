package api

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// example is the manifest in the documentation of hujun-open/k8slan.
const example = `
apiVersion: lan.k8slan.io/v1beta1
kind: LAN
metadata:
  name: lan-example
spec:
  ns: knlvrf
  bridge: br2
  vxlan: vx2
  vni: 222
  defaultVxlanDev: eth0
  vxlanDevMap:
    worker1: eth1
    worker2: eth2
  spokes:
  - srl
  - vm
`

// parse reads a manifest into namespace default.
func parse(t *testing.T, manifest string) *unstructured.Unstructured {
	t.Helper()
	object := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(manifest), &object.Object); err != nil {
		t.Fatal(err)
	}
	object.SetNamespace("default")
	return object
}

// manifest returns the manifest of a LAN with the spec in YAML flow style.
func manifest(name, spec string) string {
	return fmt.Sprintf("{apiVersion: lan.k8slan.io/v1beta1, kind: LAN, metadata: {name: %s}, spec: %s}", name, spec)
}

// refusal returns the API server's error for a manifest, or "" if it would accept it.
func refusal(t *testing.T, manifest string) string {
	t.Helper()
	err := api.Create(t.Context(), parse(t, manifest), client.DryRunAll, client.FieldValidation("Strict"))
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestValidManifestsAreAccepted(t *testing.T) {
	t.Parallel()
	many := make([]string, v1beta1.MaxSpokes)
	for i := range many {
		many[i] = fmt.Sprintf("leaf-%d", i)
	}
	hundred := make([]string, 100)
	for i := range hundred {
		hundred[i] = fmt.Sprintf("{name: pool-%d, size: 1}", i)
	}
	for name, manifest := range map[string]string{
		"the example": example,
		"ten lines":   manifest("lab", "{vni: 222, spokes: [srl, vm]}"),
		"a group in long form": manifest("lab",
			`{vni: 222, spokes: [srl], vxlanGrp: "FF02:0:0:0:0:0:0:14"}`),
		"unicast":                manifest("lab", "{vni: 222, spokes: [srl], discovery: unicast}"),
		"a group of wider scope": manifest("lab", `{vni: 222, spokes: [srl], vxlanGrp: "ff05::1:3"}`),
		"an IPv4 group and another port": manifest("lab",
			"{vni: 222, spokes: [srl], vxlanGrp: 239.1.1.1, vxlanPort: 8472}"),
		"spokes of 13 and of 1 characters": manifest("lab",
			"{vni: 222, spokes: [abcdefghijklm, x, '1', a.b, a-b]}"),
		"the largest number of spokes": manifest("lab",
			"{vni: 222, spokes: ["+strings.Join(many, ", ")+"]}"),
		"the largest VNI": manifest("lab", "{vni: 16777215, spokes: [srl]}"),
		"link names of 15 characters": manifest("lab",
			"{vni: 222, spokes: [srl], bridge: abcdefghijklmno, vxlan: vx_2.100-abcdef}"),
		"devices with unusual characters": manifest("lab",
			`{vni: 222, spokes: [srl], defaultVxlanDev: "bond0.100", vxlanDevMap: {node.example.com: "wan+1"}}`),
		"an MTU, a selector and a namespace": manifest("lab",
			`{vni: 222, spokes: [srl], mtu: 9000, nodeSelector: {kubernetes.io/os: linux, rack: ""}, `+
				`allowedNamespaces: [blue]}`),
		"all namespaces": manifest("lab",
			`{vni: 222, spokes: [srl], allowedNamespaces: ["*"]}`),
		"IPAM with keys of its plugin": manifest("lab",
			`{vni: 222, spokes: [srl], ipam: {type: host-local, ranges: [[{subnet: 10.1.0.0/24}]]}}`),
		"checksums without quotes": manifest("lab",
			"{vni: 222, spokes: [srl, vm], txChecksum: off, spokeOptions: {srl: {txChecksum: on}, vm: {}}}"),
		"checksums in quotes": manifest("lab",
			`{vni: 222, spokes: [srl, vm], txChecksum: "off", spokeOptions: {srl: {txChecksum: "on"}}}`),
		"checksums as booleans": manifest("lab",
			"{vni: 222, spokes: [srl, vm], txChecksum: false, spokeOptions: {srl: {txChecksum: true}}}"),
		"options for the largest number of spokes": manifest("lab",
			"{vni: 222, spokes: ["+strings.Join(many, ", ")+"], spokeOptions: {"+strings.Join(many,
				": {txChecksum: off}, ")+": {txChecksum: off}}}"),
		"empty EVPN settings": manifest("lab", "{vni: 222, spokes: [srl], evpn: {}}"),
		"targets and an RD": manifest("lab",
			`{vni: 222, spokes: [srl], discovery: evpn, evpn: {importTargets: ["65000:222", "4200000000:65535"], `+
				`exportTargets: ["0:4294967295"], rd: 65535, suppressNeighbors: true}}`),
		"targets without EVPN": manifest("lab",
			`{vni: 222, spokes: [srl], discovery: unicast, evpn: {exportTargets: ["65000:222"]}}`),
		"a pool and no spoke": manifest("lab", "{vni: 222, spokePools: [{name: web, size: 5}]}"),
		"pools and spokes": manifest("lab",
			"{vni: 222, spokes: [srl, br222], bridge: br2, spokePools: [{name: abcdefghi, size: 1}, {name: a.b-c, "+
				"size: 2, macBy: ordinal}], spokeOptions: {srl: {}, a.b-c: {txChecksum: off}}}"),
		"the largest pool": manifest("lab",
			"{vni: 222, spokes: [srl], spokePools: [{name: web, size: 499}]}"),
		"the largest number of pools": manifest("lab",
			"{vni: 222, spokes: ["+strings.Join(many[:400], ", ")+"], spokePools: ["+strings.Join(hundred, ", ")+"]}"),
		"the longest ns": manifest("lab",
			"{vni: 222, spokes: [srl], ns: "+strings.Repeat("n", 200)+"}"),
	} {
		t.Run(name, func(t *testing.T) {
			if have := refusal(t, manifest); have != "" {
				t.Errorf("refused: %s", have)
			}
		})
	}
}

func TestInvalidManifestsAreRefusedWithReason(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, spec, want string }{
		{"no vni", "{spokes: [srl]}", "spec.vni: Required value"},
		{"no spokes", "{vni: 222}", "spec.spokes: Required value: a LAN needs at least one spoke in spokes or one " +
			"pool in spokePools"},
		{
			"an empty list of spokes", "{vni: 222, spokes: []}",
			"spec.spokes: Invalid value: 0: spec.spokes in body should have at least 1 items",
		},
		{"a misspelt field", "{vni: 222, spokes: [srl], vxlanGroup: ff02::14}", `unknown field "spec.vxlanGroup"`},
		{
			"vni 0", "{vni: 0, spokes: [srl]}",
			"spec.vni: Invalid value: 0: spec.vni in body should be greater than or equal to 1",
		},
		{
			"a vni of 25 bits", "{vni: 16777216, spokes: [srl]}",
			"spec.vni in body should be less than or equal to 16777215",
		},
		{
			"a long spoke", "{vni: 222, spokes: [a, b, c, spine-router-01]}",
			`spec.spokes[3]: Invalid value: "spine-router-01": a spoke's name has at most 13 characters, because ` +
				`Linux allows 15 for an interface and k8slan adds a suffix of two`,
		},
		{
			"a spoke in upper case", "{vni: 222, spokes: [SRL]}",
			`spec.spokes[0]: Invalid value: "SRL": a spoke's name consists of lower-case letters, digits, '-' and '.'`,
		},
		{
			"a spoke with an underscore", "{vni: 222, spokes: [srl_b]}",
			"a spoke's name consists of lower-case letters, digits, '-' and '.'",
		},
		{"a spoke that ends in a dash", "{vni: 222, spokes: [srl-]}", "begins and ends with a letter or digit"},
		{
			"a spoke with two dots", "{vni: 222, spokes: [a..b]}",
			"begins and ends with a letter or digit, as does each part between dots",
		},
		{"an empty spoke", "{vni: 222, spokes: ['']}", "begins and ends with a letter or digit"},
		{"a spoke called lo", "{vni: 222, spokes: [lo]}", `"lo" is the loopback interface of every network namespace`},
		{"a spoke twice", "{vni: 222, spokes: [srl, vm, srl]}", `spec.spokes[2]: Duplicate value: "srl"`},
		{
			"too many spokes", "{vni: 222, spokes: [" + strings.Repeat("x,", v1beta1.MaxSpokes+1) + "]}",
			"spec.spokes: Too many: 501: must have at most 500 items",
		},
		{
			"a spoke with the bridge's name", "{vni: 222, bridge: srl, spokes: [srl]}",
			"spec.spokes: Invalid value: a spoke has the name of the bridge (by default br<vni>)",
		},
		{
			"a spoke with the derived bridge's name", "{vni: 222, spokes: [br222]}",
			"a spoke has the name of the bridge (by default br<vni>)",
		},
		{
			"a spoke with the VXLAN's name", "{vni: 222, vxlan: srl, spokes: [srl]}",
			"a spoke has the name of the VXLAN (by default vx<vni>)",
		},
		{
			"a spoke with the derived VXLAN's name", "{vni: 222, spokes: [vx222]}",
			"a spoke has the name of the VXLAN (by default vx<vni>)",
		},
		{
			"bridge and vxlan alike", "{vni: 222, bridge: x, vxlan: x, spokes: [srl]}",
			"bridge and vxlan must have different names",
		},
		{
			"bridge like the derived vxlan", "{vni: 222, bridge: vx222, spokes: [srl]}",
			"bridge and vxlan must have different names",
		},
		{
			"a long bridge", "{vni: 222, bridge: abcdefghijklmnop, spokes: [srl]}",
			"spec.bridge: Invalid value: \"abcdefghijklmnop\": an interface name has at most 15 characters, because " +
				"Linux allows no more",
		},
		{
			"a bridge with a slash", "{vni: 222, bridge: a/b, spokes: [srl]}",
			"an interface name consists of letters, digits, '_', '-' and '.'",
		},
		{
			"a bridge with a number to fill in", "{vni: 222, bridge: 'br%d', spokes: [srl]}",
			"an interface name consists of letters, digits, '_', '-' and '.'",
		},
		{
			"an empty bridge", "{vni: 222, bridge: '', spokes: [srl]}",
			"an interface name consists of letters, digits, '_', '-' and '.'",
		},
		{"a bridge called ..", "{vni: 222, bridge: '..', spokes: [srl]}", "begins with a letter, a digit or '_'"},
		{
			"a bridge called lo", "{vni: 222, bridge: lo, spokes: [srl]}",
			`"lo", "all" and "default" are already used in every network namespace`,
		},
		{
			"a bridge like a spoke's port", "{vni: 222, bridge: srl_b, spokes: [srl]}",
			"names that end in _b or _p belong to the links of spokes",
		},
		{
			"a vxlan like a spoke's plug", "{vni: 222, vxlan: srl_p, spokes: [srl]}",
			"spec.vxlan: Invalid value: \"srl_p\": names that end in _b or _p belong to the links of spokes",
		},
		{
			"ns with a slash", "{vni: 222, ns: ../etc, spokes: [srl]}",
			"spec.ns: Invalid value: \"../etc\": ns is the name of a file in /run/k8slan/netns",
		},
		{"ns ..", "{vni: 222, ns: '..', spokes: [srl]}", "ns is the name of a file in /run/k8slan/netns"},
		{
			"ns with a leading dash", "{vni: 222, ns: -rf, spokes: [srl]}",
			"ns is the name of a file in /run/k8slan/netns",
		},
		{"an empty ns", "{vni: 222, ns: '', spokes: [srl]}", "without it, the name is <namespace>.<name>"},
		{
			"a long ns", "{vni: 222, ns: " + strings.Repeat("n", 201) + ", spokes: [srl]}",
			"spec.ns: Too long: may not be more than 200 bytes",
		},
		{
			"an unknown discovery", "{vni: 222, discovery: ospf, spokes: [srl]}",
			`spec.discovery: Unsupported value: "ospf": supported values: "multicast", "unicast", "evpn"`,
		},
		{
			"a unicast group", "{vni: 222, vxlanGrp: 10.0.0.1, spokes: [srl]}",
			"spec.vxlanGrp: Invalid value: \"10.0.0.1\": vxlanGrp is a multicast address that leaves the node",
		},
		{
			"an IPv6 unicast group", "{vni: 222, vxlanGrp: 'fe80::1', spokes: [srl]}",
			"vxlanGrp is a multicast address that leaves the node",
		},
		{
			"a group within the node", "{vni: 222, vxlanGrp: 'ff01::14', spokes: [srl]}",
			"vxlanGrp is a multicast address that leaves the node",
		},
		{
			"a group with a zone", "{vni: 222, vxlanGrp: 'ff02::14%eth0', spokes: [srl]}",
			"vxlanGrp is a multicast address that leaves the node",
		},
		{
			"a group that is no address", "{vni: 222, vxlanGrp: 239.1.1, spokes: [srl]}",
			"vxlanGrp is a multicast address that leaves the node",
		},
		{
			"port 0", "{vni: 222, vxlanPort: 0, spokes: [srl]}",
			"spec.vxlanPort in body should be greater than or equal to 1",
		},
		{
			"port 65536", "{vni: 222, vxlanPort: 65536, spokes: [srl]}",
			"spec.vxlanPort in body should be less than or equal to 65535",
		},
		{
			"an MTU below IPv4's", "{vni: 222, mtu: 67, spokes: [srl]}",
			"spec.mtu in body should be greater than or equal to 68",
		},
		{
			"an MTU of 17 bits", "{vni: 222, mtu: 65536, spokes: [srl]}",
			"spec.mtu in body should be less than or equal to 65535",
		},
		{
			"a long device", "{vni: 222, defaultVxlanDev: abcdefghijklmnop, spokes: [srl]}",
			"spec.defaultVxlanDev: Invalid value: \"abcdefghijklmnop\": a device is the name of an interface of the " +
				"node: 1 to 15 characters",
		},
		{
			"a device with a blank", "{vni: 222, vxlanDevMap: {worker1: 'eth 1'}, spokes: [srl]}",
			"spec.vxlanDevMap[worker1]: Invalid value: \"eth 1\": a device is the name of an interface of the node",
		},
		{
			"a device with a colon", "{vni: 222, defaultVxlanDev: 'eth0:1', spokes: [srl]}",
			"a device is the name of an interface of the node: 1 to 15 characters without '/', ':' and blanks",
		},
		{
			"no device at all", "{vni: 222, defaultVxlanDev: '', spokes: [srl]}",
			"a device is the name of an interface of the node: 1 to 15 characters",
		},
		{
			"a pattern of namespaces", "{vni: 222, allowedNamespaces: ['team-*'], spokes: [srl]}",
			"spec.allowedNamespaces[0]: Invalid value: \"team-*\": an allowed namespace is the name of a namespace, " +
				"or \"*\" for all",
		},
		{
			"checksums maybe", "{vni: 222, txChecksum: maybe, spokes: [srl]}",
			`spec.txChecksum: Unsupported value: "maybe": supported values: "on", "off"`,
		},
		{
			"checksums by number", "{vni: 222, txChecksum: 0, spokes: [srl]}",
			`spec.txChecksum: Unsupported value: 0: supported values: "on", "off"`,
		},
		{
			"a spoke's checksums maybe", "{vni: 222, spokes: [srl], spokeOptions: {srl: {txChecksum: maybe}}}",
			`spec.spokeOptions.srl.txChecksum: Unsupported value: "maybe": supported values: "on", "off"`,
		},
		{
			"a misspelt option", "{vni: 222, spokes: [srl], spokeOptions: {srl: {txChecksums: off}}}",
			`unknown field "spec.spokeOptions.srl.txChecksums"`,
		},
		{
			"options for no spoke", "{vni: 222, spokes: [srl], spokeOptions: {srl: {}, vm: {txChecksum: off}}}",
			`spec.spokeOptions: Invalid value: spokeOptions names "vm", which is not a spoke or pool of this LAN; ` +
				`add it to spec.spokes or spec.spokePools, or remove it from spokeOptions`,
		},
		{
			"a target without an AS", "{vni: 222, spokes: [srl], evpn: {importTargets: ['222']}}",
			`spec.evpn.importTargets[0]: Invalid value: "222": a route target is AS:number, such as 65000:222; one ` +
				`of the two is at most 4294967295, the other at most 65535`,
		},
		{
			"a target that is too large", "{vni: 222, spokes: [srl], evpn: {exportTargets: ['65000:1', " +
				"'65536:65536']}}",
			`spec.evpn.exportTargets[1]: Invalid value: "65536:65536": a route target is AS:number`,
		},
		{
			"a target of 33 bits", "{vni: 222, spokes: [srl], evpn: {exportTargets: ['1:4294967296']}}",
			"a route target is AS:number",
		},
		{
			"a target with an address", "{vni: 222, spokes: [srl], evpn: {exportTargets: ['192.0.2.1:1']}}",
			"a route target is AS:number",
		},
		{
			"a target that is a number in YAML", "{vni: 222, spokes: [srl], evpn: {exportTargets: [222]}}",
			"spec.evpn.exportTargets[0]: Invalid value: \"integer\"",
		},
		{
			"a target twice", "{vni: 222, spokes: [srl], evpn: {exportTargets: ['65000:1', '65000:1']}}",
			`spec.evpn.exportTargets[1]: Duplicate value: "65000:1"`,
		},
		{
			"an RD of 0", "{vni: 222, spokes: [srl], evpn: {rd: 0}}",
			"spec.evpn.rd in body should be greater than or equal to 1",
		},
		{
			"an RD of 17 bits", "{vni: 222, spokes: [srl], evpn: {rd: 65536}}",
			"spec.evpn.rd in body should be less than or equal to 65535",
		},
		{
			"suppression of something", "{vni: 222, spokes: [srl], evpn: {suppressNeighbors: arp}}",
			"spec.evpn.suppressNeighbors: Invalid value: \"string\"",
		},
		{
			"an empty list of pools", "{vni: 222, spokes: [srl], spokePools: []}",
			"spec.spokePools in body should have at least 1 items",
		},
		{"a pool without a size", "{vni: 222, spokePools: [{name: web}]}", "spec.spokePools[0].size: Required value"},
		{
			"a pool of size 0", "{vni: 222, spokePools: [{name: web, size: 0}]}",
			"spec.spokePools[0].size in body should be greater than or equal to 1",
		},
		{
			"a large pool", "{vni: 222, spokePools: [{name: web, size: 501}]}",
			"spec.spokePools[0].size in body should be less than or equal to 500",
		},
		{
			"pools and spokes that are too many together",
			"{vni: 222, spokes: [srl], spokePools: [{name: web, size: 250}, {name: db, size: 250}]}",
			"spec.spokePools: Invalid value: the number of spokes and the sizes of all pools add up to more than " +
				"500, the most that one LAN can have on a node",
		},
		{
			"a pool with a long name", "{vni: 222, spokePools: [{name: abcdefghij, size: 5}]}",
			`spec.spokePools[0].name: Invalid value: "abcdefghij": a pool's name has at most 9 characters, because ` +
				`Linux allows 15`,
		},
		{
			"a pool with an underscore", "{vni: 222, spokePools: [{name: web_1, size: 5}]}",
			"a pool's name consists of lower-case letters, digits, '-' and '.'",
		},
		{
			"a pool twice", "{vni: 222, spokePools: [{name: web, size: 5}, {name: web, size: 6}]}",
			`spec.spokePools[1]: Duplicate value: {"name":"web"}`,
		},
		{
			"a pool like a spoke", "{vni: 222, spokes: [srl, web], spokePools: [{name: web, size: 5}]}",
			"spec.spokePools: Invalid value: a pool has the name of a spoke; rename one of them, because both would " +
				"be the same resource",
		},
		{
			"a bridge like a port", "{vni: 222, bridge: web_3, spokePools: [{name: web, size: 5}]}",
			"spec.bridge: Invalid value: the bridge's name begins with a pool's name and '_', as the names of the " +
				"pool's ports do",
		},
		{
			"a VXLAN like a port", "{vni: 222, vxlan: web_3, spokePools: [{name: web, size: 5}]}",
			"spec.vxlan: Invalid value: the VXLAN's name begins with a pool's name and '_'",
		},
		{
			"an unknown macBy", "{vni: 222, spokePools: [{name: web, size: 5, macBy: pod}]}",
			`spec.spokePools[0].macBy: Unsupported value: "pod": supported values: "port", "ordinal"`,
		},
		{"options for a port", "{vni: 222, spokePools: [{name: web, size: 5}], spokeOptions: {web_1: {txChecksum: " +
			"off}}}", `spokeOptions names "web_1", which is not a spoke or pool of this LAN`},
		{
			"IPAM that is no section", "{vni: 222, ipam: host-local, spokes: [srl]}",
			"spec.ipam: Invalid value: \"string\": spec.ipam in body must be of type object",
		},
		{
			"IPAM without a type", "{vni: 222, ipam: {subnet: 10.1.0.0/24}, spokes: [srl]}",
			"spec.ipam.type: Required value",
		},
		{
			"IPAM with a path", "{vni: 222, ipam: {type: ../sh}, spokes: [srl]}",
			"ipam.type is the name of an IPAM plugin in the nodes' CNI directory",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			if have := refusal(t, manifest("lab", test.spec)); !strings.Contains(have, test.want) {
				t.Errorf("\nhave %s\nwant …%s…", have, test.want)
			}
		})
	}
	t.Run("a long name", func(t *testing.T) {
		want := "a LAN's name has at most 63 characters"
		have := refusal(t, manifest(strings.Repeat("n", 64), "{vni: 222, spokes: [srl]}"))
		if !strings.Contains(have, want) {
			t.Errorf("\nhave %s\nwant …%s…", have, want)
		}
	})
}

func TestFieldsThatCanAndCannotBeChanged(t *testing.T) {
	given := "{vni: 222, ns: knlvrf, bridge: br2, vxlan: vx2, spokes: [srl, vm], vxlanGrp: ff02::14, vxlanPort: " +
		"4789, mtu: 1400, defaultVxlanDev: eth0}"
	derived := "{vni: 222, spokes: [srl, vm]}"
	for _, test := range []struct{ name, from, to, want string }{
		{
			"vni", derived, "{vni: 223, spokes: [srl, vm]}",
			"spec.vni: Invalid value: 223: vni cannot be changed, because for a while some nodes would use the old " +
				"one and others the new one; delete the LAN and create it again",
		},
		{
			"another ns", given, strings.Replace(given, "ns: knlvrf", "ns: other", 1),
			"spec.ns: Invalid value: ns cannot be changed, added or removed, because attached pods depend on the " +
				"network namespace of that name; delete the LAN and create it again",
		},
		{
			"no ns any more", given, strings.Replace(given, "ns: knlvrf, ", "", 1),
			"ns cannot be changed, added or removed",
		},
		{"an ns", derived, "{vni: 222, ns: default.lab, spokes: [srl, vm]}", "ns cannot be changed, added or removed"},
		{
			"another bridge", given, strings.Replace(given, "br2", "br3", 1),
			"spec.bridge: Invalid value: bridge cannot be changed, added or removed, because attached pods depend on " +
				"the bridge of that name",
		},
		{
			"no bridge any more", given, strings.Replace(given, "bridge: br2, ", "", 1),
			"bridge cannot be changed, added or removed",
		},
		{
			"a bridge", derived, "{vni: 222, bridge: br222, spokes: [srl, vm]}",
			"bridge cannot be changed, added or removed",
		},
		{
			"another vxlan", given, strings.Replace(given, "vx2", "vx3", 1),
			"spec.vxlan: Invalid value: vxlan cannot be changed, added or removed, because nodes would not all " +
				"rename the interface at once",
		},
		{
			"no vxlan any more", given, strings.Replace(given, "vxlan: vx2, ", "", 1),
			"vxlan cannot be changed, added or removed",
		},
		{
			"a vxlan", derived, "{vni: 222, vxlan: vx222, spokes: [srl, vm]}",
			"vxlan cannot be changed, added or removed",
		},
		{"the spokes", given, strings.Replace(given, "[srl, vm]", "[vm, host]", 1), ""},
		{"a pool in place of the spokes", derived, "{vni: 222, spokePools: [{name: web, size: 5}]}", ""},
		{
			"a pool's size and MACs", "{vni: 222, spokePools: [{name: web, size: 5}]}",
			"{vni: 222, spokePools: [{name: web, size: 3, macBy: ordinal}]}", "",
		},
		{"the group", given, strings.Replace(given, "ff02::14", "239.0.0.1", 1), ""},
		{"the port", given, strings.Replace(given, "4789", "4790", 1), ""},
		{"the MTU", given, strings.Replace(given, "1400", "1300", 1), ""},
		{"the underlay", given, strings.Replace(given, "defaultVxlanDev: eth0", "vxlanDevMap: {worker1: eth1}", 1), ""},
		{
			"targets and an RD", derived,
			"{vni: 222, spokes: [srl, vm], evpn: {importTargets: ['65000:1'], exportTargets: ['65000:2'], rd: 7}}", "",
		},
		{
			"checksums", derived, "{vni: 222, spokes: [srl, vm], txChecksum: off, spokeOptions: {srl: {txChecksum: " +
				"on}}}",
			"",
		},
		{
			"a spoke that has options", "{vni: 222, spokes: [srl, vm], spokeOptions: {vm: {txChecksum: off}}}",
			"{vni: 222, spokes: [srl], spokeOptions: {vm: {txChecksum: off}}}",
			`spokeOptions names "vm", which is not a spoke or pool of this LAN`,
		},
		{"optional fields", derived, "{vni: 222, spokes: [srl, vm], mtu: 1400, vxlanPort: 4790, vxlanGrp: ff02::15, " +
			"allowedNamespaces: [blue], nodeSelector: {a: b}, ipam: {type: static}}", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			object := parse(t, manifest("lab", test.from))
			if err := api.Create(t.Context(), object); err != nil {
				t.Fatal(err)
			}
			defer remove(t, object)
			edited := parse(t, manifest("lab", test.to))
			edited.SetResourceVersion(object.GetResourceVersion())
			have := ""
			if err := api.Update(t.Context(), edited, client.DryRunAll); err != nil {
				have = err.Error()
			}
			if test.want == "" && have != "" || !strings.Contains(have, test.want) {
				t.Errorf("\nhave %s\nwant …%s…", have, test.want)
			}
		})
	}
}

// kubectl reads YAML 1.1, in which an unquoted off is a boolean.
func TestEverySpellingOfOffIsOff(t *testing.T) {
	t.Parallel()
	for _, off := range []string{"off", "Off", "false", `"off"`} {
		t.Run(off, func(t *testing.T) {
			spec := fmt.Sprintf("{vni: 222, spokes: [srl, vm, host], txChecksum: %s, spokeOptions: {srl: "+
				"{txChecksum: on}}}", off)
			made, err := kube.kubectl(t.Context(), manifest("lab", spec), "create", "-n", "default", "--dry-run=server",
				"-o", "json", "-f", "-")
			if err != nil {
				t.Fatal(err)
			}
			var lan v1beta1.LAN
			if err := json.Unmarshal([]byte(made), &lan); err != nil {
				t.Fatal(err)
			}
			effective := lan.Effective()
			if have := effective.TxChecksumOff(); !slices.Equal(have, []string{"host", "vm"}) {
				t.Errorf("checksums are off for %v, want host and vm", have)
			}
		})
	}
}

func TestKubectlExplainsEveryField(t *testing.T) {
	t.Parallel()
	for _, path := range []string{
		"lan.spec", "lan.status", "lan.spec.ipam", "lan.spec.spokeOptions",
		"lan.spec.spokePools", "lan.status.holds", "lan.status.pools", "lan.status.pools.nodes", "lannode.status",
		"lannode.status.segments", "lannode.status.segments.attachments", "lannode.status.gone",
	} {
		out, err := kube.kubectl(t.Context(), "", "explain", path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out, "<no description>") {
			t.Errorf("%s has fields without a description:\n%s", path, out)
		}
	}
}
