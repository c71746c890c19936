package sidecar

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// key is a key of the configuration. set reads its value, or the values of a list.
type key struct {
	name string
	list bool
	set  func(c *Config, v []string) error
}

const peersKey = "evpn.peers"

// keys are all keys. A key may use the values of those before it.
var keys = []key{
	{"log_level", false, setLogLevel},
	{"http_address", false, setHTTPAddress},
	{"ip", true, func(c *Config, v []string) (err error) {
		c.IP, err = addresses(v)
		return err
	}},
	{"ip_family", false, func(c *Config, v []string) error {
		c.IPFamily = v[0]
		if v[0] != "ipv4" && v[0] != "ipv6" {
			return fmt.Errorf("%q is neither ipv4 nor ipv6", v[0])
		}
		return nil
	}},
	{"namespace", false, func(c *Config, v []string) error {
		c.Namespace = v[0]
		return checkLabel(v[0])
	}},
	{"pod", false, func(c *Config, v []string) error {
		c.Pod = v[0]
		return nil
	}},
	{"services", true, setServices},
	{"peers", true, func(c *Config, v []string) (err error) {
		c.Peers, err = addresses(v)
		return err
	}},
	{"ready_only", false, setBool(func(c *Config) *bool { return &c.ReadyOnly })},
	{"strict_peers", false, setBool(func(c *Config) *bool { return &c.StrictPeers })},
	{"discovery", false, func(c *Config, v []string) error {
		c.Discovery = Discovery(v[0])
		if c.Discovery != UnicastDiscovery && c.Discovery != EVPNDiscovery {
			return fmt.Errorf("%q is neither %s nor %s", v[0], UnicastDiscovery, EVPNDiscovery)
		}
		return nil
	}},
	{"evpn.as", false, setAS},
	{"evpn.router_id", false, setRouterID},
	{peersKey, true, func(c *Config, v []string) (err error) {
		c.EVPN.Peers = v
		c.EVPN.peers, err = bgp.ParsePeers(v, c.EVPN.AS)
		return err
	}},
	{"evpn.reflectors", false, func(c *Config, v []string) error {
		s, err := service(c.Namespace, v[0])
		c.EVPN.Reflectors = &s
		return err
	}},
	{"evpn.reflectors_password_file", false, func(c *Config, v []string) (err error) {
		c.EVPN.ReflectorsPasswordFile = v[0]
		c.EVPN.reflectorPassword, err = bgp.ReadPassword(v[0])
		return err
	}},
	{"vxlan.interface", false, setInterface},
	{"vxlan.vni", false, func(c *Config, v []string) error {
		n, err := number(v[0], 1, 1<<24-1)
		c.VXLAN.VNI = uint32(n)
		return err
	}},
	{"vxlan.port", false, func(c *Config, v []string) error {
		n, err := number(v[0], 1, 1<<16-1)
		c.VXLAN.Port = uint16(n)
		return err
	}},
	{"vxlan.mtu", false, func(c *Config, v []string) (err error) {
		if c.VXLAN.MTU = -1; v[0] != "-1" {
			c.VXLAN.MTU, err = number(v[0], 68, 1<<16-1)
		}
		return err
	}},
	{"vxlan.mac", false, setMAC},
	{"vxlan.addresses", true, setAddresses},
	{"hooks.up", true, func(c *Config, v []string) error {
		c.Hooks.Up = v
		return nil
	}},
	{"hooks.change", true, func(c *Config, v []string) error {
		c.Hooks.Change = v
		return nil
	}},
	{"hooks.timeout", false, func(c *Config, v []string) error {
		d, err := time.ParseDuration(v[0])
		c.Hooks.Timeout = Duration(d)
		if err != nil || d <= 0 {
			return fmt.Errorf("%q is not a time such as 30s", v[0])
		}
		return nil
	}},
}

func knownKeys() string {
	var names []string
	for _, k := range keys {
		names = append(names, k.name)
	}
	return strings.Join(names, ", ")
}

// isKnown reports whether there is a key with that name, or one nested in it.
func isKnown(name string) bool {
	return slices.ContainsFunc(keys, func(k key) bool { return k.name == name || strings.HasPrefix(k.name, name+".") })
}

func setLogLevel(c *Config, v []string) error {
	c.LogLevel = Level(strings.ToUpper(v[0]))
	if _, ok := levels[c.LogLevel]; ok {
		return nil
	}
	var names []string
	for _, l := range slices.Sorted(maps.Keys(levels)) {
		names = append(names, string(l))
	}
	return fmt.Errorf("%q is not a level; levels are %s", v[0], strings.Join(names, ", "))
}

func setHTTPAddress(c *Config, v []string) error {
	c.HTTPAddress = v[0]
	_, port, err := net.SplitHostPort(v[0])
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf("%q is neither host:port nor :port", v[0])
	}
	return nil
}

func setAS(c *Config, v []string) error {
	n, err := strconv.ParseUint(v[0], 10, 32)
	c.EVPN.AS = uint32(n)
	if err != nil || n == 0 {
		return fmt.Errorf("%q is not a number from 1 to %d", v[0], uint32(math.MaxUint32))
	}
	return nil
}

func setRouterID(c *Config, v []string) (err error) {
	c.EVPN.RouterID, err = netip.ParseAddr(v[0])
	if err != nil || !c.EVPN.RouterID.Is4() || c.EVPN.RouterID.IsUnspecified() {
		return fmt.Errorf("%q is not an IPv4 address", v[0])
	}
	return nil
}

func setInterface(c *Config, v []string) error {
	name := v[0]
	c.VXLAN.Interface = name
	reserved := name == "." || name == ".." || name == "lo"
	if len(name) > 15 || reserved || strings.ContainsAny(name, "/: \t\n%") {
		return fmt.Errorf("%q is not a name that Linux accepts for an interface: "+
			"at most 15 characters, no space, '/', ':' or '%%'", name)
	}
	return nil
}

func setMAC(c *Config, v []string) error {
	text, err := expand(v[0], c.Pod)
	if err != nil {
		return err
	}
	mac, err := net.ParseMAC(text)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 || bytes.Equal(mac, make([]byte, 6)) {
		return fmt.Errorf("%q is not a MAC that an interface can have, such as 02:00:00:00:00:01", text)
	}
	c.VXLAN.MAC = mac.String()
	return nil
}

func setAddresses(c *Config, v []string) error {
	if len(v) > segment.MaxAddresses {
		return fmt.Errorf("has %d addresses, at most %d are possible", len(v), segment.MaxAddresses)
	}
	for _, template := range v {
		text, err := expand(template, c.Pod)
		if err != nil {
			return err
		}
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return fmt.Errorf("%q is not an IP address with its prefix length, such as 192.168.69.1/24", text)
		}
		c.VXLAN.Addresses = append(c.VXLAN.Addresses, p)
	}
	return nil
}

func setServices(c *Config, v []string) error {
	for _, text := range v {
		s, err := service(c.Namespace, text)
		if err != nil {
			return err
		}
		if !slices.Contains(c.Services, s) {
			c.Services = append(c.Services, s)
		}
	}
	return nil
}

func setBool(field func(*Config) *bool) func(*Config, []string) error {
	return func(c *Config, v []string) error {
		b, err := strconv.ParseBool(v[0])
		if *field(c) = b; err != nil {
			return fmt.Errorf("%q is neither true nor false", v[0])
		}
		return nil
	}
}

func number(text string, least, most int) (int, error) {
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most {
		return 0, fmt.Errorf("%q is not a number from %d to %d", text, least, most)
	}
	return n, nil
}

func addresses(texts []string) (all []netip.Addr, err error) {
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" {
			return nil, fmt.Errorf("%q is not an IP address", text)
		}
		all = append(all, a.Unmap())
	}
	return all, nil
}

func checkLabel(text string) error {
	if problems := validation.IsDNS1123Label(text); len(problems) > 0 {
		return fmt.Errorf("%q cannot be the name of a namespace or Service: lower-case letters, digits and '-'", text)
	}
	return nil
}

// service reads namespace/name, or a name in the given namespace.
func service(namespace, text string) (Service, error) {
	s := Service{Namespace: namespace, Name: text}
	if namespace, name, ok := strings.Cut(text, "/"); ok {
		s = Service{namespace, name}
	}
	if s.Namespace == "" {
		return s, fmt.Errorf("%q has no namespace: write namespace/%s, or set namespace", text, text)
	}
	if err := errors.Join(checkLabel(s.Namespace), checkLabel(s.Name)); err != nil {
		return s, fmt.Errorf("%q is neither a Service's name nor namespace/name", text)
	}
	return s, nil
}
