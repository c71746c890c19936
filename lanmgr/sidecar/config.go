// Package sidecar gives a pod a LAN with other pods from within: a VXLAN in the pod's own network namespace, whose remotes are the
// endpoints of Services. It takes kubelan's configuration.
package sidecar

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/yaml"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Config says what LAN the pod shall have.
type Config struct {
	LogLevel    Level        `json:"log_level"`
	HTTPAddress string       `json:"http_address"`
	IP          []netip.Addr `json:"ip,omitempty"`        // the pod's; none: that of its default route
	IPFamily    string       `json:"ip_family,omitempty"` // ipv4 or ipv6, of those; empty: that of the first
	Namespace   string       `json:"namespace"`           // of the pod, and of Services that name none
	Pod         string       `json:"pod"`                 // its name
	Services    []Service    `json:"services"`
	Peers       []netip.Addr `json:"peers,omitempty"` // besides the Services' endpoints
	ReadyOnly   bool         `json:"ready_only"`
	StrictPeers bool         `json:"strict_peers"`
	Discovery   Discovery    `json:"discovery"`
	EVPN        EVPN         `json:"evpn,omitzero"`
	VXLAN       VXLAN        `json:"vxlan"`
	Hooks       Hooks        `json:"hooks"`
}

// Discovery is how pods know of each other.
type Discovery string

// The kinds of discovery.
const (
	UnicastDiscovery Discovery = "unicast" // by Services
	EVPNDiscovery    Discovery = "evpn"    // by BGP as well
)

// EVPN is as whom and with whom to speak BGP.
type EVPN struct {
	AS                     uint32     `json:"as,omitempty"`
	RouterID               netip.Addr `json:"router_id,omitzero"` // IPv4
	Peers                  []string   `json:"peers,omitempty"`    // as bgp.ParsePeer reads them
	Reflectors             *Service   `json:"reflectors,omitempty"`
	ReflectorsPasswordFile string     `json:"reflectors_password_file,omitempty"`

	peers             []bgp.Peer // with their passwords, which nobody is told
	reflectorPassword string
}

// VXLAN is the pod's interface.
type VXLAN struct {
	Interface string         `json:"interface"`
	VNI       uint32         `json:"vni"`
	Port      uint16         `json:"port"`          // UDP
	MTU       int            `json:"mtu"`           // bytes; -1: what the link with the pod's address leaves
	MAC       string         `json:"mac,omitempty"` // empty: one of the pod's name
	Addresses []netip.Prefix `json:"addresses,omitempty"`
}

// Hooks are programs that are told what happens.
type Hooks struct {
	Up      []string `json:"up,omitempty"`     // once the interface is there
	Change  []string `json:"change,omitempty"` // when a Service's endpoints change
	Timeout Duration `json:"timeout"`          // how long each may take
}

// Service is a Service whose endpoints are peers.
type Service struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func (s Service) String() string { return s.Namespace + "/" + s.Name }

// Duration is one that reads as people write it.
type Duration time.Duration

// MarshalText writes it, such as 30s.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// Level is a level of logrus, by its name.
type Level string

// levels are those of logrus, the names that kubelan's users write, and what they are here.
var levels = map[Level]slog.Level{
	"PANIC": slog.LevelError, "FATAL": slog.LevelError, "ERROR": slog.LevelError, "WARN": slog.LevelWarn, "WARNING": slog.LevelWarn,
	"INFO": slog.LevelInfo, "DEBUG": slog.LevelDebug, "TRACE": slog.LevelDebug,
}

// Slog is the level that it stands for.
func (l Level) Slog() slog.Level { return levels[l] }

// Sources is where a configuration comes from; of a key that several have, the last of them counts.
type Sources struct {
	File  []byte            // YAML; nil: there is none
	Env   map[string]string // the process's environment
	Flags map[string]string // by key

	Hostname  string // the pod's, unless it is told otherwise
	Namespace string // of the pod's service account; empty: not known
}

const (
	envPrefix = "KL_"
	peersKey  = "evpn.peers"

	defaultTimeout = 30 * time.Second
)

// Read makes a configuration of its sources. Unknown keys in the file and values out of range are errors that name the key; an empty
// environment variable counts as none.
func Read(s Sources) (Config, error) {
	c := Config{
		LogLevel: "INFO", HTTPAddress: ":8181", Namespace: s.Namespace, Pod: s.Hostname, Discovery: UnicastDiscovery,
		VXLAN: VXLAN{Interface: "kubelan", VNI: 6969, Port: 4789, MTU: -1},
		Hooks: Hooks{Timeout: Duration(defaultTimeout)},
	}
	values, err := fileValues(s.File)
	if err != nil {
		return c, err
	}
	for _, k := range keys {
		if text := s.Env[envPrefix+strings.ToUpper(strings.ReplaceAll(k.name, ".", "_"))]; text != "" {
			if values[k.name], err = textValues(k, text); err != nil {
				return c, fmt.Errorf("environment: %s: %w", k.name, err)
			}
		}
		if text := s.Flags[k.name]; text != "" {
			values[k.name] = []string{text}
		}
	}
	var errs []error
	for _, k := range keys {
		v := values[k.name]
		switch {
		case len(v) == 0:
		case len(v) > 1 && !k.list:
			errs = append(errs, fmt.Errorf("%s: has %d values, one is wanted", k.name, len(v)))
		default:
			if err := k.set(&c, v); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", k.name, err))
			}
		}
		delete(values, k.name)
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		errs = append(errs, fmt.Errorf("%s: unknown key; known are %s", name, knownKeys()))
	}
	if len(errs) == 0 {
		errs = append(errs, c.check())
	}
	return c, joinErrors(errs)
}

// joinErrors is all that is wrong, in one line.
func joinErrors(errs []error) error {
	var texts []string
	for _, err := range errs {
		if err != nil {
			texts = append(texts, err.Error())
		}
	}
	if len(texts) == 0 {
		return nil
	}
	return errors.New(strings.Join(texts, "; "))
}

// key is one setting. Its values are text, of a list one for each item.
type key struct {
	name string
	list bool
	set  func(c *Config, v []string) error
}

// keys are all there are, in an order in which each may build on those before it.
var keys = []key{
	{"log_level", false, func(c *Config, v []string) error {
		c.LogLevel = Level(strings.ToUpper(v[0]))
		if _, ok := levels[c.LogLevel]; !ok {
			return fmt.Errorf("%q is no level; one of %s", v[0], strings.Join(names(levels), ", "))
		}
		return nil
	}},
	{"http_address", false, func(c *Config, v []string) error {
		c.HTTPAddress = v[0]
		_, port, err := net.SplitHostPort(v[0])
		if err == nil {
			_, err = strconv.ParseUint(port, 10, 16)
		}
		if err != nil {
			return fmt.Errorf("%q is no host:port, of which the host may be left out", v[0])
		}
		return nil
	}},
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
	{"evpn.as", false, func(c *Config, v []string) error {
		n, err := strconv.ParseUint(v[0], 10, 32)
		c.EVPN.AS = uint32(n)
		if err != nil || n == 0 {
			return fmt.Errorf("%q is no number from 1 to %d", v[0], uint32(math.MaxUint32))
		}
		return nil
	}},
	{"evpn.router_id", false, func(c *Config, v []string) (err error) {
		if c.EVPN.RouterID, err = netip.ParseAddr(v[0]); err != nil || !c.EVPN.RouterID.Is4() || c.EVPN.RouterID.IsUnspecified() {
			return fmt.Errorf("%q is no IPv4 address", v[0])
		}
		return nil
	}},
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
	{"vxlan.interface", false, func(c *Config, v []string) error {
		c.VXLAN.Interface = v[0]
		if name := v[0]; len(name) > 15 || name == "." || name == ".." || name == "lo" || strings.ContainsAny(name, "/: \t\n%") {
			return fmt.Errorf("%q is no name that Linux takes for an interface: at most 15 characters, no space, '/', ':' or '%%'", name)
		}
		return nil
	}},
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
	{"vxlan.mac", false, func(c *Config, v []string) error {
		text, err := expand(v[0], c.Pod)
		if err != nil {
			return err
		}
		mac, err := net.ParseMAC(text)
		if err != nil || len(mac) != 6 || mac[0]&1 != 0 || bytes.Equal(mac, make([]byte, 6)) {
			return fmt.Errorf("%q is no MAC that an interface can have, such as 02:00:00:00:00:01", text)
		}
		c.VXLAN.MAC = mac.String()
		return nil
	}},
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
			return fmt.Errorf("%q is no time such as 30s", v[0])
		}
		return nil
	}},
}

func names[V any](m map[Level]V) (names []string) {
	for _, n := range slices.Sorted(maps.Keys(m)) {
		names = append(names, string(n))
	}
	return names
}

func knownKeys() string {
	var names []string
	for _, k := range keys {
		names = append(names, k.name)
	}
	return strings.Join(names, ", ")
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
		return 0, fmt.Errorf("%q is no number from %d to %d", text, least, most)
	}
	return n, nil
}

func addresses(texts []string) (all []netip.Addr, err error) {
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" {
			return nil, fmt.Errorf("%q is no IP address", text)
		}
		all = append(all, a.Unmap())
	}
	return all, nil
}

func checkLabel(text string) error {
	if problems := validation.IsDNS1123Label(text); len(problems) > 0 {
		return fmt.Errorf("%q is no name of a namespace or Service: lower-case letters, digits and '-'", text)
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

// service reads namespace/name, or name alone.
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
			return fmt.Errorf("%q is no IP address with its prefix length, such as 192.168.69.1/24", text)
		}
		c.VXLAN.Addresses = append(c.VXLAN.Addresses, p)
	}
	return nil
}

// check is what of a configuration goes beyond single keys.
func (c *Config) check() error {
	if c.IPFamily != "" && len(c.IP) > 0 && !slices.ContainsFunc(c.IP, c.isOfFamily) {
		return fmt.Errorf("ip_family: the pod has no %s address among %v", c.IPFamily, c.IP)
	}
	if c.Discovery == EVPNDiscovery {
		return c.EVPN.check()
	}
	if len(c.Services) == 0 && len(c.Peers) == 0 {
		return errors.New("services: there are none, nor peers: nobody is in the LAN")
	}
	return nil
}

func (e *EVPN) check() error {
	switch {
	case e.AS == 0:
		return errors.New("evpn.as: the number of the autonomous system is missing, which discovery evpn needs")
	case len(e.Peers) == 0 && e.Reflectors == nil:
		return errors.New("evpn.peers: there are none, nor evpn.reflectors: there is nobody to speak with")
	}
	return nil
}

// PasswordFiles are those whose contents the configuration has.
func (c *Config) PasswordFiles() []string {
	files := bgp.PasswordFiles(c.EVPN.Peers)
	if c.EVPN.ReflectorsPasswordFile != "" {
		files = append(files, c.EVPN.ReflectorsPasswordFile)
	}
	return files
}

// routerID is as configured, or the pod's IPv4 address, or one made from its name.
func (c *Config) routerID() netip.Addr {
	if c.EVPN.RouterID.IsValid() {
		return c.EVPN.RouterID
	}
	address := ""
	if i := slices.IndexFunc(c.IP, netip.Addr.Is4); i >= 0 {
		address = c.IP[i].String()
	}
	return bgp.RouterID(address, c.Namespace+"/"+c.Pod)
}

func (c *Config) isOfFamily(a netip.Addr) bool {
	return c.IPFamily == "" || a.Is4() == (c.IPFamily == "ipv4")
}

// expand puts the pod's ordinal, the number at the end of its name, into {ordinal}, {ordinal+N} and, in hexadecimal with two digits at least,
// {ordinal:x} and {ordinal+N:x}.
func expand(template, pod string) (string, error) {
	var out strings.Builder
	for rest := template; ; {
		before, after, ok := strings.Cut(rest, "{")
		out.WriteString(before)
		if !ok {
			return out.String(), nil
		}
		expression, tail, ok := strings.Cut(after, "}")
		expression, hex := strings.CutSuffix(expression, ":x")
		plus, isOrdinal := strings.CutPrefix(expression, "ordinal")
		number := 0
		if plus != "" && isOrdinal {
			n, err := strconv.ParseUint(strings.TrimPrefix(plus, "+"), 10, 31)
			isOrdinal = err == nil && plus[0] == '+'
			number = int(n)
		}
		if !ok || !isOrdinal {
			return "", fmt.Errorf("%q: {...} is {ordinal}, {ordinal+1} or, in hexadecimal, {ordinal+1:x}", template)
		}
		ordinal, has := segment.Ordinal(pod)
		if !has {
			return "", fmt.Errorf("%q needs the pod's ordinal, and the pod is called %q", template, pod)
		}
		if hex {
			fmt.Fprintf(&out, "%02x", ordinal+number)
		} else {
			fmt.Fprintf(&out, "%d", ordinal+number)
		}
		rest = tail
	}
}

// fileValues are the values of a YAML file by key, whatever those are; letter case does not matter in keys, as with kubelan.
func fileValues(file []byte) (map[string][]string, error) {
	values := map[string][]string{}
	text, err := yaml.YAMLToJSONStrict(file)
	if err != nil {
		return nil, fmt.Errorf("is no YAML: %s", strings.Join(strings.Fields(err.Error()), " "))
	}
	if len(bytes.TrimSpace(text)) == 0 || string(text) == "null" {
		return values, nil
	}
	var tree map[string]any
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber() // as it is written: 6969 shall not become 6.969e+03
	if err := d.Decode(&tree); err != nil {
		return nil, errors.New("is no list of keys and values")
	}
	return values, flatten(values, "", tree)
}

func flatten(values map[string][]string, prefix string, tree map[string]any) error {
	for name, v := range tree {
		name = prefix + strings.ToLower(name)
		known := slices.ContainsFunc(keys, func(k key) bool { return k.name == name || strings.HasPrefix(k.name, name+".") })
		var items []any
		switch v := v.(type) {
		case map[string]any:
			if err := flatten(values, name+".", v); err != nil {
				return err
			}
			continue
		case []any:
			items = v
		case nil:
		default:
			items = []any{v}
		}
		for _, item := range items {
			switch item.(type) {
			case nil, []any, map[string]any:
				return fmt.Errorf("%s: has something else than values", name)
			}
			values[name] = append(values[name], fmt.Sprint(item))
		}
		if known && len(items) == 1 && items[0] == "" {
			delete(values, name) // empty, which is none
		} else if !known && len(items) == 0 {
			values[name] = nil
		}
	}
	return nil
}

// textValues are the values of an environment variable: of a list, with commas between, of routers, which have commas in them, with spaces, or written
// as in YAML.
func textValues(k key, text string) ([]string, error) {
	if !k.list {
		return []string{text}, nil
	}
	if strings.HasPrefix(text, "[") {
		values, err := fileValues([]byte(k.name + ": " + text))
		return values[k.name], err
	}
	if k.name == peersKey {
		return strings.Fields(text), nil
	}
	var values []string
	for v := range strings.SplitSeq(text, ",") {
		values = append(values, strings.TrimSpace(v))
	}
	return values, nil
}
