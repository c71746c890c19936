package dataplane

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/cni"
	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// pluginBinary builds the plugin as it is shipped, once for all tests, into the test process's own /run.
var pluginBinary = sync.OnceValues(func() (string, error) {
	path := "/run/k8slan-cni"
	build := exec.Command("go", "build", "-o", path, "github.com/k8slan/k8slan/cmd/k8slan-cni")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the CNI plugin: %w\n%s", err, out)
	}
	return path, nil
})

// sandbox is a pod's sandbox as a runtime describes it to the plugin.
type sandbox struct {
	netlab.Namespace
	node   node
	id     string
	ifname string
	mac    string // the MAC address in CNI_ARGS; empty: none
}

func (n node) sandbox(t *testing.T) sandbox {
	t.Helper()
	pod := netlab.NewPod(t)
	return sandbox{Namespace: pod, node: n, id: filepath.Base(filepath.Dir(pod.Path)), ifname: ifname}
}

type keys = map[string]any

// network is a spoke's network as the controller writes it and Multus sends it, with keys added.
func network(s segment.Segment, spoke string, kind segment.Kind, add keys) keys {
	config := keys{
		"cniVersion": "1.1.0", "name": "k8slan-" + string(kind) + "-" + spoke, "type": "k8slan", "kind": kind,
		"lan": s.LAN.String(), "ns": s.Netns, "spoke": spoke, "deviceID": spoke,
	}
	maps.Copy(config, add)
	return config
}

// pooled is the same for a pool port that kubelet has allocated.
func pooled(s segment.Segment, port string, kind segment.Kind) keys {
	pool, _, _ := segment.PoolOf(port)
	config := network(s, pool, kind, keys{"pool": pool, "deviceID": port})
	delete(config, "spoke")
	return config
}

// spokeOf is the spoke or pool port that a network configuration names.
func spokeOf(config keys) string { return cmp.Or(config["spoke"], config["deviceID"]).(string) }

// call runs the plugin's binary on the sandbox's node, as a runtime does. Any goroutine may call it.
func (s sandbox) call(verb string, config keys) ([]byte, error) {
	stdin, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	return s.send(verb, stdin)
}

// send is call with any bytes on standard input.
func (s sandbox) send(verb string, stdin []byte) ([]byte, error) {
	cmd, err := s.command(verb)
	if err != nil {
		return nil, err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	err = s.node.Do(cmd.Run)
	if err == nil {
		return stdout.Bytes(), nil
	}
	said := &types.Error{}
	if json.Unmarshal(stdout.Bytes(), said) != nil || said.Code == 0 || said.Msg == "" {
		return nil, fmt.Errorf("%s returned no CNI error: %w: %s%s", verb, err, &stdout, &stderr)
	}
	return nil, said
}

// command returns the plugin's command as a runtime starts it.
func (s sandbox) command(verb string) (*exec.Cmd, error) {
	binary, err := pluginBinary()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(binary)
	args := "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + s.id + ";K8S_POD_UID=1234"
	if s.mac != "" {
		args += ";MAC=" + s.mac
	}
	cmd.Env = []string{
		"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + s.id, "CNI_NETNS=" + s.Path, "CNI_IFNAME=" + s.ifname,
		"CNI_PATH=" + s.node.plugins(),
		"CNI_ARGS=" + args,
		"K8SLAN_RUN_DIR=" + s.node.Run, "K8SLAN_CDI_DIR=" + s.node.CDI,
	}
	return cmd, nil
}

func (s sandbox) mustCall(t *testing.T, verb string, config keys) []byte {
	t.Helper()
	out, err := s.call(verb, config)
	if err != nil {
		t.Fatalf("%s: %v", verb, err)
	}
	return out
}

// mustFail expects a CNI error with that code and a text that contains sentence.
func (s sandbox) mustFail(t *testing.T, verb string, config keys, code uint, sentence string) {
	t.Helper()
	_, err := s.call(verb, config)
	said, ok := errors.AsType[*types.Error](err)
	if !ok || said.Code != code || !strings.Contains(said.Error(), sentence) {
		t.Fatalf("%s: %v, want code %d: %s", verb, err, code, sentence)
	}
}

// add attaches the sandbox and returns its wire and what the plugin printed.
func (s sandbox) add(t *testing.T, lan segment.Segment, config keys) (netlab.Wire, []byte) {
	t.Helper()
	if config["kind"] == segment.Macvtap {
		netlab.NeedDevices(t)
	}
	out := s.mustCall(t, "ADD", config)
	wire, err := s.speak(t, config)
	if err != nil {
		t.Fatal(err)
	}
	s.node.lanNetns(lan).AwaitCarrier(t, spokeOf(config))
	return wire, out
}

// speak opens the pod's link, or the VM's tap by the device numbers in the CDI file.
func (s sandbox) speak(t *testing.T, config keys) (netlab.Wire, error) {
	t.Helper()
	if config["kind"] != segment.Macvtap {
		s.AwaitCarrier(t, s.ifname)
		return s.Open(t, s.ifname), nil
	}
	tap, err := s.tap(config)
	if err != nil {
		return nil, err
	}
	return netlab.OpenTap(t, tap.Major, tap.Minor), nil
}

// tap is the device node that the runtime makes in the VM's container.
type tap struct {
	Path         string
	Major, Minor uint32
	UID, GID     uint32
}

func (s sandbox) tap(config keys) (tap, error) {
	b, err := os.ReadFile(s.deviceFile(config))
	if err != nil {
		return tap{}, err
	}
	var spec struct {
		Devices []struct {
			ContainerEdits struct{ DeviceNodes []tap }
		}
	}
	err = json.Unmarshal(b, &spec)
	if err != nil || len(spec.Devices) != 1 || len(spec.Devices[0].ContainerEdits.DeviceNodes) != 1 {
		return tap{}, fmt.Errorf("CDI file %s: %w", b, err)
	}
	return spec.Devices[0].ContainerEdits.DeviceNodes[0], nil
}

func (s sandbox) deviceFile(config keys) string {
	name := fmt.Sprintf("macvtap.k8slan.io-spoke_%s_%s.json", spokeOf(config), segment.ClaimID(s.id, s.ifname))
	return filepath.Join(s.node.CDI, name)
}

// devices returns the CDI devices on the node.
func (n node) devices(t *testing.T) []cdi.Device {
	t.Helper()
	devices, err := cdi.List(n.CDI)
	if err != nil {
		t.Fatal(err)
	}
	return devices
}

// links describes a segment's links without the VXLAN, which stays up until the daemon sees that no claim needs it.
func (n node) links(t *testing.T, s segment.Segment) string {
	t.Helper()
	have := n.observe(t, s)
	have.Links = slices.DeleteFunc(have.Links, func(l segment.Link) bool { return l.Type == "vxlan" })
	return describe(have)
}

// nodeWithLAN makes a node that has a LAN with two spokes.
func nodeWithLAN(t *testing.T) (node, segment.Segment) {
	t.Helper()
	h := addNode(t, netlab.NewUnderlay(t, underlayMTU), "worker1")
	s := h.withUnderlay(t, lan("lab", 222, "srl", "vm"))
	h.reconcile(t, s)
	return h, s
}

func TestPluginAttachesPodsAndVMs(t *testing.T) {
	t.Parallel()
	h, s := nodeWithLAN(t)
	empty := h.links(t, s)
	podNetwork, vmNetwork := network(s, "srl", segment.Veth, nil), network(s, "vm", segment.Macvtap, nil)
	pod, vm := h.sandbox(t), h.sandbox(t)
	vm.ifname = "pod37a8eec1ce1" // KubeVirt's name
	podWire, podResult := pod.add(t, s, podNetwork)
	vmWire, vmResult := vm.add(t, s, vmNetwork)

	for _, a := range []struct {
		sandbox
		config keys
		out    []byte
		spoke  string
	}{{pod, podNetwork, podResult, "srl"}, {vm, vmNetwork, vmResult, "vm"}} {
		var result current.Result
		if err := json.Unmarshal(a.out, &result); err != nil || len(result.Interfaces) != 2 {
			t.Fatalf("result %s: %v", a.out, err)
		}
		want := current.Interface{
			Name: a.ifname, Mac: segment.MAC(s.LAN, a.spoke).String(), Mtu: lanMTU, Sandbox: a.Path,
		}
		if *result.Interfaces[1] != want {
			t.Errorf("result has %+v, want %+v", *result.Interfaces[1], want)
		}
		expectLink(t, a.Namespace, a.ifname, want.Mac, lanMTU)
		a.mustCall(t, "CHECK", with(a.config, keys{"prevResult": json.RawMessage(a.out)}))
	}
	tap, err := vm.tap(vmNetwork)
	if err != nil {
		t.Fatal(err)
	}
	link, err := vm.Netlink(t).LinkByName(vm.ifname)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("/dev/tap%d", link.Attrs().Index); tap.Path != want || tap.UID != 107 || tap.GID != 107 {
		t.Errorf("tap %+v, want %s of 107:107", tap, want)
	}
	crosses(t, podWire, vmWire, frames.Stream(nil, segment.MAC(s.LAN, "srl"), 1, 1))
	crosses(t, vmWire, podWire, frames.Stream(nil, segment.MAC(s.LAN, "vm"), 1, 2))
	if links := h.Links(t); !slices.Equal(links, []string{netlab.UnderlayDevice}) {
		t.Errorf("the node's own namespace has %v", links)
	}

	for _, a := range []struct {
		sandbox
		config keys
	}{{pod, podNetwork}, {vm, vmNetwork}} {
		for range 3 {
			a.mustCall(t, "DEL", a.config)
		}
		a.Path = ""
		a.mustCall(t, "DEL", a.config)
		a.Path = "/run/gone"
		a.mustCall(t, "DEL", a.config)
	}
	if links := h.links(t, s); links != empty {
		t.Errorf("left:\n%s\nwant\n%s", links, empty)
	}
	if devices := h.devices(t); len(devices) != 0 {
		t.Errorf("left: %v", devices)
	}
}

func with(config, add keys) keys {
	config = maps.Clone(config)
	maps.Copy(config, add)
	return config
}

func TestPluginSetsRequestedMACMTUAndOwner(t *testing.T) {
	t.Parallel()
	h, s := nodeWithLAN(t)
	const mac = "02:00:5e:00:53:01"
	for _, kind := range []segment.Kind{segment.Veth, segment.Macvtap} {
		config := network(s, "srl", kind, keys{
			"runtimeConfig": keys{"mac": mac}, "args": keys{"cni": keys{"mtu": 1280}},
			"owner": 1000, "group": 1001, "promiscMode": true,
		})
		pod := h.sandbox(t)
		pod.mustCall(t, "ADD", config)
		expectLink(t, pod.Namespace, ifname, mac, 1280)
		link, err := pod.Netlink(t).LinkByName(ifname)
		if err != nil {
			t.Fatal(err)
		}
		if link.Attrs().Promisc == 0 {
			t.Errorf("%s: not promiscuous", kind)
		}
		if kind == segment.Macvtap {
			if tap, err := pod.tap(config); err != nil || tap.UID != 1000 || tap.GID != 1001 {
				t.Errorf("tap %+v, %v", tap, err)
			}
		}
		pod.mustCall(t, "DEL", config)
	}
}

func TestPluginRefusesBadInputAndChangesNothing(t *testing.T) {
	t.Parallel()
	h, s := nodeWithLAN(t)
	other := h.sandbox(t)
	other.add(t, s, network(s, "srl", segment.Veth, nil))
	h.reconcile(t, s)
	links, devices := h.links(t, s), h.devices(t)
	sb := h.sandbox(t)

	bad := map[string][]byte{
		"nothing": nil, "no JSON": []byte("\xff\xfe{"), "null": []byte("null"), "a list": []byte("[]"),
		"empty": []byte("{}"),
	}
	for name, add := range map[string]keys{
		"a path for a netns":            {"ns": "../../proc/1/ns"},
		"a netns with a NUL":            {"ns": "a\x00b"},
		"another LAN's netns":           {"ns": "elsewhere"},
		"no spoke":                      {"spoke": ""},
		"a spoke that is not one":       {"spoke": "srl_b", "deviceID": "srl_b"},
		"a spoke the LAN hasn't":        {"spoke": "nope", "deviceID": "nope"},
		"another spoke's device":        {"deviceID": "srl"},
		"no device":                     {"deviceID": ""},
		"a kind that is not one":        {"kind": "ipvlan"},
		"a multicast MAC":               {"mac": "01:00:5e:00:00:01"},
		"a MAC that is too long":        {"runtimeConfig": keys{"mac": "02:00:00:00:00:00:00:01"}},
		"an MTU above the LAN's":        {"mtu": 9000},
		"a negative MTU":                {"args": keys{"cni": keys{"mtu": -1}}},
		"IPAM for a VM":                 {"kind": "macvtap", "ipam": keys{"type": "host-local"}},
		"an IPAM plugin that is absent": {"ipam": keys{"type": "no-such-plugin"}},
		"an IPAM plugin with a path":    {"ipam": keys{"type": "../../bin/sh"}},
		"numbers for words":             {"lan": 1, "spoke": 2},
		"a CNI version that is not one": {"cniVersion": "9.9"},
	} {
		config, err := json.Marshal(network(s, "vm", segment.Veth, add))
		if err != nil {
			t.Fatal(err)
		}
		bad[name] = config
	}
	for name, config := range bad {
		for _, verb := range []string{"ADD", "CHECK", "DEL", "STATUS"} {
			out, err := sb.send(verb, config)
			if _, ok := errors.AsType[*types.Error](err); err != nil && !ok {
				t.Errorf("%s with %s: %v", verb, name, err)
			}
			if verb == "ADD" && err == nil {
				t.Errorf("ADD with %s succeeded: %s", name, out)
			}
			if now := h.links(t, s); now != links {
				t.Fatalf("%s with %s changed\n%s\ninto\n%s", verb, name, links, now)
			}
		}
	}
	sameClaim := func(a, b cdi.Device) bool { return a.ClaimID == b.ClaimID }
	if now := h.devices(t); !slices.EqualFunc(now, devices, sameClaim) {
		t.Errorf("CDI devices were %+v and are %+v", devices, now)
	}
	if left := sb.Links(t); !slices.Equal(left, []string{"lo"}) && len(left) != 0 {
		t.Errorf("the pod has %v", left)
	}
}

func TestAddFailsWhenPodHasThatInterface(t *testing.T) {
	t.Parallel()
	h, s := nodeWithLAN(t)
	pod := h.sandbox(t)
	pod.mustCall(t, "ADD", network(s, "srl", segment.Veth, nil))
	before := h.links(t, s)
	for _, kind := range []segment.Kind{segment.Veth, segment.Macvtap} {
		pod.mustFail(t, "ADD", network(s, "vm", kind, nil), cni.CodeNameTaken, `already has an interface "net1"`)
	}
	if after := h.links(t, s); after != before {
		t.Errorf("changed\n%s\ninto\n%s", before, after)
	}
	if devices := h.devices(t); len(devices) != 1 {
		t.Errorf("CDI devices %v", devices)
	}
}

func TestAddFailsWithoutAPodNetns(t *testing.T) {
	t.Parallel()
	h, s := nodeWithLAN(t)
	before := h.links(t, s)
	pod := h.sandbox(t)
	pod.Path = "/run/gone"
	for _, kind := range []segment.Kind{segment.Veth, segment.Macvtap} {
		pod.mustFail(t, "ADD", network(s, "srl", kind, nil), types.ErrInvalidNetNS, "the pod's network namespace")
	}
	pod.Path = h.Path
	pod.mustFail(t, "ADD", network(s, "srl", segment.Veth, nil), types.ErrInvalidNetNS,
		"the node's own network namespace")
	if links := h.Links(t); !slices.Equal(links, []string{netlab.UnderlayDevice}) {
		t.Errorf("the node's own namespace has %v", links)
	}
	if after := h.links(t, s); after != before {
		t.Errorf("changed\n%s\ninto\n%s", before, after)
	}
}

func TestCheckFindsWhatWasChanged(t *testing.T) {
	t.Parallel()
	h, s := nodeWithLAN(t)
	for _, kind := range []segment.Kind{segment.Veth, segment.Macvtap} {
		for _, c := range []struct {
			name   string
			change func(*netlink.Handle, netlink.Link) error
			want   string
		}{
			{"address", func(h *netlink.Handle, l netlink.Link) error {
				return h.LinkSetHardwareAddr(l, net.HardwareAddr{2, 0, 0x5e, 0, 0x53, 1})
			}, "has the address 02:00:5e:00:53:01"},
			{"MTU", func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetMTU(l, 1000) }, "has the MTU 1000"},
			{"down", (*netlink.Handle).LinkSetDown, "is down"},
			{"deleted", (*netlink.Handle).LinkDel, ""},
		} {
			t.Run(fmt.Sprintf("%s %s", kind, c.name), func(t *testing.T) {
				pod, config := h.sandbox(t), network(s, "srl", kind, nil)
				out := pod.mustCall(t, "ADD", config)
				check := with(config, keys{"prevResult": json.RawMessage(out)})
				pod.mustCall(t, "CHECK", check)
				inside := pod.Netlink(t)
				link, err := inside.LinkByName(ifname)
				if err != nil {
					t.Fatal(err)
				}
				if err := c.change(inside, link); err != nil {
					t.Fatal(err)
				}
				pod.mustFail(t, "CHECK", check, cni.CodeChanged, c.want)
				pod.mustCall(t, "DEL", config)
			})
		}
	}
}

func TestPluginGCAndStatus(t *testing.T) {
	t.Parallel()
	h, s := nodeWithLAN(t)
	empty := h.links(t, s)
	stays, goes := h.sandbox(t), h.sandbox(t)
	srl, vm := network(s, "srl", segment.Veth, nil), network(s, "vm", segment.Macvtap, nil)
	stays.mustCall(t, "ADD", srl)
	goes.mustCall(t, "ADD", vm)
	stays.mustCall(t, "STATUS", srl)
	valid := keys{"cni.dev/valid-attachments": []keys{{"containerID": stays.id, "ifname": ifname}}}
	stays.mustCall(t, "GC", with(srl, valid))
	goes.mustCall(t, "GC", with(vm, valid))
	if devices := h.devices(t); len(devices) != 1 || devices[0].Spoke != "srl" {
		t.Errorf("CDI devices %v", devices)
	}
	stays.mustCall(t, "DEL", srl)
	if links := h.links(t, s); links != empty {
		t.Errorf("left:\n%s\nwant\n%s", links, empty)
	}
	absent := lan("absent", 9, "srl")
	stays.mustFail(t, "STATUS", network(absent, "srl", segment.Veth, nil), types.ErrPluginNotAvailable,
		"is not on this node")
	stays.mustFail(t, "ADD", network(absent, "srl", segment.Veth, nil), types.ErrTryAgainLater, "is not on this node")
}

func TestAddCreatesAMissingStandingPair(t *testing.T) {
	t.Parallel()
	h, s := nodeWithLAN(t)
	other := h.attach(t, s, "vm", segment.Veth)
	for _, kind := range []segment.Kind{segment.Veth, segment.Macvtap} {
		inside := h.lanNetns(s).Netlink(t)
		plug, err := inside.LinkByName(segment.PlugName("srl"))
		if err != nil {
			t.Fatal(err)
		}
		if err := inside.LinkDel(plug); err != nil {
			t.Fatal(err)
		}
		pod, config := h.sandbox(t), network(s, "srl", kind, nil)
		wire, _ := pod.add(t, s, config)
		crosses(t, wire, other, frames.Stream(nil, segment.MAC(s.LAN, "srl"), 1, 1))
		pod.mustCall(t, "DEL", config)
	}
}

// The name of a LAN's namespace is unmounted: a pod that comes before the daemon has restored it has to try again.
func TestAddIsRetriedUntilTheNamespaceHasItsName(t *testing.T) {
	t.Parallel()
	h, s := nodeWithLAN(t)
	other := h.attach(t, s, "vm", segment.Veth)
	if err := unix.Unmount(h.lanNetns(s).Path, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	pod, config := h.sandbox(t), network(s, "srl", segment.Veth, nil)
	pod.mustFail(t, "ADD", config, types.ErrTryAgainLater, "is not on this node")
	pod.mustCall(t, "DEL", config)
	h.reconcile(t, s)
	wire, _ := pod.add(t, s, config)
	crosses(t, wire, other, frames.Stream(nil, segment.MAC(s.LAN, "srl"), 1, 1))
}

// plugins is the node's directory of other CNI plugins.
func (n node) plugins() string { return filepath.Join(filepath.Dir(n.Path), "plugins") }

// installIPAM installs an IPAM plugin on the node that returns these addresses to every caller.
func (n node) installIPAM(t *testing.T, addresses ...string) keys {
	t.Helper()
	var ips []keys
	for _, a := range addresses {
		ips = append(ips, keys{"address": a})
	}
	answer, err := json.Marshal(keys{
		"cniVersion": "1.1.0", "ips": ips, "routes": []keys{{"dst": "198.51.100.0/24", "gw": "192.0.2.254"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(n.plugins(), 0o755); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\nif [ $CNI_COMMAND = ADD ]; then echo '%s'; fi\n", answer)
	if err := os.WriteFile(filepath.Join(n.plugins(), "fixed"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return keys{"ipam": keys{"type": "fixed"}}
}

func TestPluginSetsAddressesUsableAtOnce(t *testing.T) {
	t.Parallel()
	h, s := nodeWithLAN(t)
	empty := h.links(t, s)
	pod := h.sandbox(t)
	config := network(s, "srl", segment.Veth, h.installIPAM(t, "192.0.2.1/24", "2001:db8::1/64"))
	out := pod.mustCall(t, "ADD", config)
	if err := pod.Do(func() error {
		for _, address := range []string{"192.0.2.1", "2001:db8::1"} {
			l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
			if err != nil {
				return err
			}
			l.Close()
		}
		return nil
	}); err != nil {
		t.Errorf("the pod cannot listen on its address: %v", err)
	}
	routes, err := pod.Netlink(t).RouteGet(net.ParseIP("198.51.100.7"))
	if err != nil || len(routes) == 0 || routes[0].Gw.String() != "192.0.2.254" {
		t.Errorf("route %v, %v", routes, err)
	}
	check := with(config, keys{"prevResult": json.RawMessage(out)})
	pod.mustCall(t, "CHECK", check)

	t.Run("an address that is in use is refused", func(t *testing.T) {
		before := h.links(t, s)
		second := h.sandbox(t)
		second.mustFail(t, "ADD", network(s, "vm", segment.Veth, keys{"ipam": config["ipam"]}), cni.CodeAttach,
			"2001:db8::1 is in use in the LAN")
		if links := second.Links(t); len(links) != 0 {
			t.Errorf("the second pod has %v", links)
		}
		if after := h.links(t, s); after != before {
			t.Errorf("left:\n%s\nwant\n%s", after, before)
		}
	})

	link, err := pod.Netlink(t).LinkByName(ifname)
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := pod.Netlink(t).AddrList(link, unix.AF_INET)
	if err != nil || len(addrs) != 1 {
		t.Fatalf("addresses %v, %v", addrs, err)
	}
	if err := pod.Netlink(t).AddrDel(link, &addrs[0]); err != nil {
		t.Fatal(err)
	}
	pod.mustFail(t, "CHECK", check, cni.CodeChanged, "has lost its address 192.0.2.1/24")
	pod.mustCall(t, "DEL", config)
	if after := h.links(t, s); after != empty {
		t.Errorf("left:\n%s\nwant\n%s", after, empty)
	}
}

func Test64PodsAttachAtOnceBeside1000Spokes(t *testing.T) {
	t.Parallel()
	netlab.NeedDevices(t)
	const attachments, spokes = 64, 500
	h := addNode(t, netlab.NewUnderlay(t, underlayMTU), "worker1")
	var lans []segment.Segment
	for i, name := range []string{"one", "two"} {
		s := lan(name, uint32(100+i))
		for n := range spokes {
			s.Spokes = append(s.Spokes, fmt.Sprintf("%s-%d", name, n))
		}
		lans = append(lans, h.withUnderlay(t, s))
		h.reconcile(t, lans[i])
	}
	// Every second attachment of a LAN is a VM; the spokes are spread over the LAN.
	var pods []sandbox
	var configs []keys
	for i := range attachments {
		s := lans[i%2]
		kind := []segment.Kind{segment.Macvtap, segment.Veth}[i/2%2]
		pods = append(pods, h.sandbox(t))
		configs = append(configs, network(s, s.Spokes[i*spokes/attachments], kind, nil))
	}
	if _, err := pluginBinary(); err != nil {
		t.Fatal(err)
	}
	errs := make([]error, attachments)
	var all sync.WaitGroup
	for i := range attachments {
		all.Go(func() { _, errs[i] = pods[i].call("ADD", configs[i]) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}

	taps, paths := map[[2]uint32]bool{}, map[string]bool{}
	wires := make([]netlab.Wire, attachments)
	for i, pod := range pods {
		wire, err := pod.speak(t, configs[i])
		if err != nil {
			t.Fatal(err)
		}
		wires[i] = wire
		h.lanNetns(lans[i%2]).AwaitCarrier(t, configs[i]["spoke"].(string))
		if configs[i]["kind"] == segment.Macvtap {
			tap, err := pod.tap(configs[i])
			if err != nil {
				t.Fatal(err)
			}
			taps[[2]uint32{tap.Major, tap.Minor}], paths[tap.Path] = true, true
		}
	}
	if len(taps) != attachments/2 || len(paths) != attachments/2 {
		t.Errorf("%d VMs have %d taps of %d names", attachments/2, len(taps), len(paths))
	}
	for i, wire := range wires {
		next := (i + 2) % attachments // of the same LAN
		s := lans[i%2]
		src := segment.MAC(s.LAN, configs[i]["spoke"].(string))
		dst := segment.MAC(s.LAN, configs[next]["spoke"].(string))
		frame := frames.Stream(dst, src, 1, uint64(i))
		if err := wire.Send(frame); err != nil {
			t.Fatal(err)
		}
		sent := func(got []byte) bool { return bytes.Equal(got, frame) }
		if _, err := netlab.Await(wires[next], frameTimeout, sent); err != nil {
			t.Fatalf("%s to %s: %v", configs[i]["spoke"], configs[next]["spoke"], err)
		}
	}

	for i := range attachments {
		all.Go(func() { _, errs[i] = pods[i].call("DEL", configs[i]) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	for _, s := range lans {
		if claims := h.observe(t, s).Claims(); len(claims) != 0 {
			t.Errorf("left: %v", claims)
		}
	}
	if devices := h.devices(t); len(devices) != 0 {
		t.Errorf("left: %v", devices)
	}
}
