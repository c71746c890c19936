package cluster

import (
	"embed"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"text/template"

	"github.com/k8slan/k8slan/test/cluster/internal/cgroup"
)

// DefaultStateDir holds all that is the running cluster's.
const DefaultStateDir = "/var/tmp/k8slan-cluster"

// ForwardedAddress is the API server's for the machine's own programs.
const ForwardedAddress = "127.0.0.1:26443"

const (
	group        cgroup.Group = "k8slan-cluster"               // everything the cluster runs
	controlGroup cgroup.Group = "k8slan-cluster/control-plane" // beside one group per node
	nodeLeaf                  = "system"                       // see nodeinit.Config.CgroupLeaf

	underlayNetns = "k8slan-underlay"
	controlBridge = "control"  // carries the cluster; every node's eth0
	lanBridge     = "underlay" // what LANs run over; every node's eth1 and eth2

	controlIPv4   = "10.77.0.1"
	controlIPv6   = "fd77::1"
	apiServer     = controlIPv4 + ":6443" // in the control plane's network namespace
	serviceCIDR   = "10.96.0.0/16"
	kubernetesIP  = "10.96.0.1" // the first address of serviceCIDR
	podCIDR       = "10.244.0.0/16"
	clusterDomain = "cluster.local"
)

// spec is what tells one node from the other.
type spec struct {
	Name    string
	IPv4    string
	IPv6    string
	PodCIDR string
	number  byte
}

func specs() []spec {
	return []spec{
		{Name: "worker1", IPv4: "10.77.0.11", IPv6: "fd77::11", PodCIDR: "10.244.1.0/24", number: 1},
		{Name: "worker2", IPv4: "10.77.0.12", IPv6: "fd77::12", PodCIDR: "10.244.2.0/24", number: 2},
	}
}

// device is one of a node's network devices, by number: 0 for eth0.
type device byte

func devices() []device { return []device{0, 1, 2} }

func (d device) String() string { return fmt.Sprintf("eth%d", byte(d)) }

func (d device) bridge() string {
	if d == 0 {
		return controlBridge
	}
	return lanBridge
}

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

func (s spec) group() cgroup.Group { return group + "/" + cgroup.Group(s.Name) }

// state is the directory with all that is the cluster's; its methods name
// what is in it.
type state string

func (s state) path(elements ...string) string {
	return filepath.Join(append([]string{string(s)}, elements...)...)
}

func (s state) kubeconfig() string            { return s.path("kubeconfig") }
func (s state) record() string                { return s.path("cluster.json") }
func (s state) sysctls() string               { return s.path("sysctls.json") }
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
