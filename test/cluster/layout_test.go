package cluster

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

func TestEveryNodesPodsHaveTheirOwnAddresses(t *testing.T) {
	clusters := []netip.Prefix{netip.MustParsePrefix(podCIDR), netip.MustParsePrefix(podCIDR6)}
	taken := map[netip.Prefix]string{}
	for _, s := range specs() {
		content, err := render("00-multus.conf", s)
		if err != nil {
			t.Fatal(err)
		}
		var conf struct {
			Delegates []struct {
				Plugins []struct {
					IPAM struct {
						Ranges [][]struct{ Subnet netip.Prefix }
					}
				}
			}
		}
		if err := json.Unmarshal(content, &conf); err != nil {
			t.Fatalf("%s: %v in\n%s", s.Name, err, content)
		}
		for i, cluster := range clusters {
			subnet := conf.Delegates[0].Plugins[0].IPAM.Ranges[i][0].Subnet
			if !cluster.Contains(subnet.Addr()) || subnet.Bits() <= cluster.Bits() {
				t.Errorf("%s: %v is not inside the pods' %v", s.Name, subnet, cluster)
			}
			if other := taken[subnet]; other != "" {
				t.Errorf("%s and %s share %v", s.Name, other, subnet)
			}
			taken[subnet] = s.Name
		}
	}
}

func TestConfigurationFilesAreWellFormed(t *testing.T) {
	kubelet, err := render("kubelet.yaml", specs()[0])
	if err != nil {
		t.Fatal(err)
	}
	objects, err := manifests()
	if err != nil {
		t.Fatal(err)
	}
	for _, document := range append(strings.Split(objects, "\n---\n"), string(kubelet)) {
		var object struct{ APIVersion, Kind string }
		if err := yaml.Unmarshal([]byte(document), &object); err != nil || object.Kind == "" ||
			object.APIVersion == "" {
			t.Errorf("%+v, error %v, in\n%s", object, err, document)
		}
	}
}

func TestPortNamesFitTheKernel(t *testing.T) {
	for _, s := range specs() {
		for _, d := range devices() {
			if name := s.port(d); len(name) > 15 { // IFNAMSIZ - 1
				t.Errorf("%s is %d bytes long", name, len(name))
			}
		}
	}
}

func TestOnlyTheNodesDevicesCanBeBroken(t *testing.T) {
	for name, want := range map[string]bool{
		"eth0": true, "eth1": true, "eth2": true, "eth3": true, "eth4": true,
		"eth5": false, "lo": false, "": false,
	} {
		if _, err := parseDevice(name); (err == nil) != want {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestCacheDirectory(t *testing.T) {
	for want, env := range map[string]map[string]string{
		"/a":               {"K8SLAN_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"},
		"/b/k8slan":        {"XDG_CACHE_HOME": "/b", "HOME": "/c"},
		"/c/.cache/k8slan": {"HOME": "/c"},
	} {
		if got := CacheDir(func(name string) string { return env[name] }); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestClustersOfOneMachineShareNoName(t *testing.T) {
	taken := map[string]state{}
	for _, s := range []state{"", "a", "b", "z", "2", "3", "9", "a2", "b2", "z9"} {
		if err := checkName(string(s)); err != nil {
			t.Error(err)
		}
		for _, name := range []string{s.dir(), "group " + string(s.group()), s.underlayNetns(), s.address()} {
			if other, ok := taken[name]; ok {
				t.Errorf("clusters %q and %q share %s", s, other, name)
			}
			taken[name] = s
		}
	}
}

func TestClusterNameIsALetterAndADigit(t *testing.T) {
	for value, ok := range map[string]bool{
		"": true, "b": true, "2": true, "b2": true,
		"B": false, "bb": false, "/": false, "1": false, "22": false, "2b": false, "b22": false,
	} {
		name, err := Name(func(string) string { return value })
		if (err == nil) != ok || ok && name != value {
			t.Errorf("K8SLAN_CLUSTER=%q: %q, %v", value, name, err)
		}
	}
}

func TestACheckoutHasClustersBesideItsFirst(t *testing.T) {
	for _, c := range []struct {
		name string
		n    int
		want string
	}{{"", 0, ""}, {"", 1, "2"}, {"b", 0, "b"}, {"b", 1, "b2"}, {"b", 2, "b3"}} {
		if got, err := Beside(c.name, c.n); err != nil || got != c.want {
			t.Errorf("Beside(%q, %d) is %q, %v; want %q", c.name, c.n, got, err, c.want)
		}
	}
	if got, err := Beside("2", 1); err == nil {
		t.Errorf("there is a cluster %q beside cluster 2", got)
	}
}
