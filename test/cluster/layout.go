package cluster

import (
	"embed"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"

	"github.com/k8slan/k8slan/test/cluster/internal/cgroup"
)

const (
	nodeLeaf = "system" // see nodeinit.Config.CgroupLeaf

	controlBridge = "control"  // carries the cluster; every node's eth0
	lanBridge     = "underlay" // what LANs run over; every node's eth1 and eth2
	subnetBridge  = "subnet"   // carries no multicast of UDP; every node's eth3

	controlIPv4   = "10.77.0.1"
	controlIPv6   = "fd77::1"
	apiServer     = controlIPv4 + ":6443" // in the control plane's network namespace
	serviceCIDRs  = "10.96.0.0/16,fd96::/112"
	kubernetesIP  = "10.96.0.1" // the first address of serviceCIDRs
	podCIDR       = "10.244.0.0/16"
	podCIDR6      = "fd44::/48"
	clusterDomain = "cluster.local"
)

// spec is how one node differs from the other.
type spec struct {
	Name     string
	IPv4     string
	IPv6     string
	PodCIDR  string
	PodCIDR6 string
	number   byte
}

func specs() []spec {
	return []spec{
		{
			Name:     "worker1",
			IPv4:     "10.77.0.11",
			IPv6:     "fd77::11",
			PodCIDR:  "10.244.1.0/24",
			PodCIDR6: "fd44:0:0:1::/64",
			number:   1,
		},
		{
			Name:     "worker2",
			IPv4:     "10.77.0.12",
			IPv6:     "fd77::12",
			PodCIDR:  "10.244.2.0/24",
			PodCIDR6: "fd44:0:0:2::/64",
			number:   2,
		},
	}
}

// device is one of a node's network devices, by number: 0 for eth0.
type device byte

// The devices that have addresses.
const (
	control device = 0
	subnet  device = 3 // all nodes' in one subnet
	routed  device = 4 // each node's in a subnet of its own, with the router between them
)

func devices() []device { return []device{control, 1, 2, subnet, routed} }

func (d device) String() string { return fmt.Sprintf("eth%d", byte(d)) }

// bridge is the one that a device of the node is connected to.
func (s spec) bridge(d device) string {
	switch d {
	case control:
		return controlBridge
	case subnet:
		return subnetBridge
	case routed:
		return fmt.Sprintf("routed%d", s.number)
	}
	return lanBridge
}

// addresses returns the IPv4 (/24) and IPv6 (/64) address of a device of the node. If they are empty, the device has
// only a link-local one.
func (s spec) addresses(d device) (ipv4, ipv6 string) {
	switch d {
	case control:
		return s.IPv4, s.IPv6
	case subnet:
		return fmt.Sprintf("192.0.2.1%d", s.number), fmt.Sprintf("2001:db8:77::1%d", s.number)
	case routed:
		return fmt.Sprintf("198.18.%d.11", s.number), fmt.Sprintf("2001:db8:18:%d::11", s.number)
	}
	return "", ""
}

// router has the other end of a node's routed device.
func (s spec) router() (ipv4, ipv6 string) {
	return fmt.Sprintf("198.18.%d.1", s.number), fmt.Sprintf("2001:db8:18:%d::1", s.number)
}

// routedPrefixes have all routed devices.
func routedPrefixes() []string { return []string{"198.18.0.0/16", "2001:db8:18::/48"} }

func parseDevice(name string) (device, error) {
	i := slices.IndexFunc(devices(), func(d device) bool { return d.String() == name })
	if i < 0 {
		return 0, fmt.Errorf("a node has no device %q, only %v", name, devices())
	}
	return devices()[i], nil
}

// port is the name of the bridge's end of a node's device.
func (s spec) port(d device) string { return s.Name + "-" + d.String() }

// mac is the address of a node's device: the same after each power cycle.
func (s spec) mac(d device) []byte { return []byte{0x02, 0x77, 0, 0, s.number, byte(d)} }

// Name is the name of the cluster that a program's environment means:
// $K8SLAN_CLUSTER, a letter from a to z, for a cluster beside the usual one;
// else empty.
func Name(getenv func(string) string) (string, error) {
	name := getenv("K8SLAN_CLUSTER")
	if err := checkName(name); err != nil {
		return "", fmt.Errorf("K8SLAN_CLUSTER: %w", err)
	}
	return name, nil
}

// Beside is the name of another cluster for the same checkout: 0 is the cluster of
// that name itself, 1 the one with a 2 behind its name, and so on up to 8.
func Beside(name string, n int) (string, error) {
	if n == 0 {
		return name, checkName(name)
	}
	name += strconv.Itoa(n + 1)
	return name, checkName(name)
}

// checkName accepts a letter, a digit from 2 to 9, both, or neither.
func checkName(name string) error {
	letters := strings.TrimRight(name, "23456789")
	if len(letters) <= 1 && strings.Trim(letters, "abcdefghijklmnopqrstuvwxyz") == "" && len(name)-len(letters) <= 1 {
		return nil
	}
	return fmt.Errorf("a cluster is called by a letter from a to z or, the usual one, by none, not %q", name)
}

// state is a cluster by its name; its methods name what is the cluster's, here
// in the machine and below in the cluster's directory.
type state string

func (s state) named(what string) string {
	if s == "" {
		return what
	}
	return what + "-" + string(s)
}

// dir has all files of the cluster.
func (s state) dir() string { return filepath.Join(stateParent, s.named("k8slan-cluster")) }

// stateParent outlives a boot of the machine, so that what a boot interrupted
// is found and removed.
const stateParent = "/var/tmp"

// group has everything the cluster runs: the control plane's group and one per
// node.
func (s state) group() cgroup.Group        { return cgroup.Group(s.named("k8slan-cluster")) }
func (s state) controlGroup() cgroup.Group { return s.group() + "/control-plane" }

func (s state) nodeGroup(node string) cgroup.Group { return s.group() + "/" + cgroup.Group(node) }

// netnsDir is where ip-netns(8) looks for network namespaces by name.
const netnsDir = "/run/netns"

func (s state) underlayNetns() string { return s.named("k8slan-underlay") }
func (s state) underlayPath() string  { return filepath.Join(netnsDir, s.underlayNetns()) }

// address is the API server's for the machine's own programs. Each name has a port of its own.
func (s state) address() string {
	port := 26443
	for _, c := range s {
		if c >= 'a' {
			port += 1 + int(c-'a')
		} else {
			port += 27 * int(c-'1')
		}
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}

func (s state) path(elements ...string) string {
	return filepath.Join(append([]string{s.dir()}, elements...)...)
}

func (s state) kubeconfig() string            { return s.path("kubeconfig") }
func (s state) record() string                { return s.path("cluster.json") }
func (s state) bin(program string) string     { return s.path("bin", program) }
func (s state) pki(file string) string        { return s.path("pki", file) }
func (s state) log(process string) string     { return s.path("log", process+".log") }
func (s state) process(name string) string    { return s.path("pids", name) }
func (s state) disk(name, file string) string { return s.path("nodes", name, "disk", file) }

// CacheDir is where programs that were built are kept: $K8SLAN_CACHE, else
// k8slan in the user's cache directory.
func CacheDir(getenv func(string) string) string {
	if dir := getenv("K8SLAN_CACHE"); dir != "" {
		return dir
	}
	if dir := getenv("XDG_CACHE_HOME"); dir != "" {
		return filepath.Join(dir, "k8slan")
	}
	return filepath.Join(getenv("HOME"), ".cache", "k8slan")
}

//go:embed config
var configs embed.FS

// manifests are the objects that every cluster starts with.
func manifests() (string, error) {
	var all []string
	for _, name := range []string{"network-attachment-definition.yaml", "multus-rbac.yaml"} {
		content, err := configs.ReadFile("config/" + name)
		if err != nil {
			return "", err
		}
		all = append(all, string(content))
	}
	return strings.Join(all, "---\n"), nil
}

// render fills a configuration file in for one node.
func render(name string, s spec) ([]byte, error) {
	t, err := template.New(name).Option("missingkey=error").ParseFS(configs, "config/"+name)
	if err != nil {
		return nil, err
	}
	var out strings.Builder
	if err := t.Execute(&out, s); err != nil {
		return nil, err
	}
	return []byte(out.String()), nil
}
