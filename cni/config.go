package cni

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

const (
	minMTU     = 68    // bytes; the minimum of IPv4 (RFC 791), and of Linux for an Ethernet link (ETH_MIN_MTU)
	maxMTU     = 65535 // bytes; the maximum of Linux for a veth (ETH_MAX_MTU)
	maxSpoke   = 13    // characters: a link name has at most 15, and the spoke's links add a suffix of two
	maxPool    = 9     // characters: its ports' names add an underscore and a number below 500
	defaultTap = 107   // owner and group of the tap: qemu's in KubeVirt's images
)

// netConf is the network configuration in JSON.
type netConf struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
	Type       string `json:"type"`

	Kind     string `json:"kind"`
	LAN      string `json:"lan"`
	NS       string `json:"ns"`
	Spoke    string `json:"spoke"`
	Pool     string `json:"pool"`
	DeviceID string `json:"deviceID"`

	VXLANID *uint32 `json:"vxlanId"` // for type megalos, like master
	Master  string  `json:"master"`

	MTU         *int    `json:"mtu"`
	MAC         string  `json:"mac"`
	PromiscMode bool    `json:"promiscMode"`
	Owner       *uint32 `json:"owner"`
	Group       *uint32 `json:"group"`

	IPAM          map[string]json.RawMessage `json:"ipam"`
	DNS           types.DNS                  `json:"dns"`
	RuntimeConfig struct {
		MAC string `json:"mac"`
	} `json:"runtimeConfig"`
	Args struct {
		CNI struct {
			MTU *int   `json:"mtu"`
			MAC string `json:"mac"`
		} `json:"cni"`
	} `json:"args"`

	PrevResult       json.RawMessage      `json:"prevResult"`
	ValidAttachments []types.GCAttachment `json:"cni.dev/valid-attachments"`
}

// attachment is a validated request: which spoke of which LAN, and which sandbox.
type attachment struct {
	version string // of CNI, for the result
	network string // name of the network in the runtime's configuration

	lan       segment.LAN
	netns     string // name of the LAN's network namespace
	netnsPath string // its path, for error messages
	spoke     string // in a pool, the port that kubelet allocated; empty if that is unknown
	pool      string // empty for a single spoke
	kind      segment.Kind
	ipam      string // type of the IPAM plugin; empty: none
	config    []byte // the unchanged configuration, for the IPAM plugin
	vni       uint32 // for type megalos; else 0
	master    string // for type megalos: the underlay device; empty: that of the default route

	claimID   string
	sandbox   string // container ID
	podNetns  string // path
	ifname    string
	pathList  string // CNI_PATH, where IPAM plugins are
	arguments string // CNI_ARGS, unchanged
	env       []string
}

// String names the attachment's spoke for error messages.
func (a attachment) String() string {
	if a.vni != 0 {
		return fmt.Sprintf("VNI %d", a.vni)
	}
	if a.pool != "" && a.spoke == "" {
		return fmt.Sprintf("pool %q of LAN %s", a.pool, a.lan)
	}
	return fmt.Sprintf("spoke %q of LAN %s", a.spoke, a.lan)
}

// spokeOrPool returns the name that the attachment's resource, NADs and variables have: the pool's, else the spoke's.
func (a attachment) spokeOrPool() string { return cmp.Or(a.pool, a.spoke) }

// matches reports whether a spoke is the attachment's or a port of its pool.
func (a attachment) matches(spoke string) bool {
	if a.pool == "" {
		return spoke == a.spoke
	}
	pool, _, ok := segment.PoolOf(spoke)
	return ok && pool == a.pool
}

// existsIn reports whether the record has the attachment's spoke or any port of its pool.
func (a attachment) existsIn(record segment.Segment) bool {
	return slices.ContainsFunc(record.Spokes, a.matches)
}

// request is an attachment with the properties of its interface.
type request struct {
	attachment
	deviceID string
	mac      net.HardwareAddr // nil: derived from LAN and spoke
	mtu      int              // bytes; 0: the LAN's
	promisc  bool
	owner    uint32 // of the tap
	group    uint32 // of the tap
	dns      types.DNS
	pod      pod

	prevResult json.RawMessage // unchanged
}

// pod identifies the pod, from CNI_ARGS; all fields are empty outside of Kubernetes.
type pod struct{ namespace, name, uid string }

// decode reads the configuration. If one key has a wrong type, the others are still decoded: DEL needs that.
func decode(config []byte) (netConf, error) {
	var w netConf
	err := json.Unmarshal(config, &w)
	if err == nil {
		return w, nil
	}
	if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return w, fail(types.ErrInvalidNetworkConfig,
			"network configuration: key %q cannot be a JSON %s", wrong.Field, wrong.Value)
	}
	return w, fail(types.ErrDecodingFailure, "network configuration is not valid JSON: %v", err)
}

// attachment validates the keys that DEL, GC and STATUS need.
func (p *Plugin) attachment(w netConf, args *skel.CmdArgs) (attachment, error) {
	a := attachment{
		version: w.CNIVersion, network: w.Name,
		netns: w.NS, spoke: w.Spoke, pool: w.Pool, kind: segment.Kind(w.Kind), config: args.StdinData,
		claimID: segment.ClaimID(args.ContainerID, args.IfName),
		sandbox: args.ContainerID, podNetns: args.Netns, ifname: args.IfName,
		pathList: args.Path, arguments: args.Args, env: p.host.Env,
	}
	if a.version == "" {
		a.version = "0.1.0" // the default of the specification
	}
	if all := version.All.SupportedVersions(); !slices.Contains(all, a.version) {
		return a, fail(types.ErrIncompatibleCNIVersion,
			"cniVersion %q is none of %s", a.version, strings.Join(all, ", "))
	}
	if w.Type == megalos {
		return a.onDemandAttachment(w, p.host.Run)
	}
	if a.kind != segment.Veth && a.kind != segment.Macvtap {
		return a, invalid("kind", w.Kind, `is neither "veth" nor "macvtap"`)
	}
	if !isPathElement(a.netns) {
		return a, invalid("ns", w.NS, "is not the name of a network namespace: a file name without a slash or a space")
	}
	a.netnsPath = filepath.Join(p.host.Run, "netns", a.netns)
	switch {
	case a.pool != "" && a.spoke != "":
		return a, invalid("pool", w.Pool, "is set beside a spoke: an attachment has one of the two")
	case a.pool != "" && !isName(a.pool, maxPool):
		return a, invalid("pool", w.Pool, "is not the name of a pool: 1 to %d of a-z, 0-9, - and .", maxPool)
	case a.pool == "" && !isName(a.spoke, maxSpoke):
		return a, invalid("spoke", w.Spoke, "is not the name of a spoke: 1 to %d of a-z, 0-9, - and .", maxSpoke)
	case a.pool != "" && a.matches(w.DeviceID):
		a.spoke = w.DeviceID
	}
	namespace, name, _ := strings.Cut(w.LAN, "/")
	if !isObjectName(namespace) || !isObjectName(name) {
		return a, invalid("lan", w.LAN, "is not the namespace/name of a LAN")
	}
	a.lan = segment.LAN{Namespace: namespace, Name: name}
	var err error
	a.ipam, err = a.ipamType(w)
	return a, err
}

// ipamType validates the IPAM section as far as k8slan needs it, and returns the IPAM plugin's name.
func (a attachment) ipamType(w netConf) (string, error) {
	if len(w.IPAM) == 0 {
		return "", nil
	}
	var plugin string
	if err := json.Unmarshal(w.IPAM["type"], &plugin); err != nil || !isPathElement(plugin) {
		return "", invalid("ipam.type", string(w.IPAM["type"]), "is not the name of an IPAM plugin")
	}
	if plugin == w.Type {
		return "", invalid("ipam.type", plugin, "is this plugin, which allocates no addresses")
	}
	if a.kind == segment.Macvtap {
		return "", invalid("ipam.type", plugin, "cannot be used with kind macvtap: the addresses would be the pod's, "+
			"and the guest behind the tap would not have them; set them inside the guest")
	}
	return plugin, nil
}

// request validates the whole configuration, for ADD and CHECK.
func (p *Plugin) request(args *skel.CmdArgs) (request, error) {
	w, err := decode(args.StdinData)
	if err != nil {
		return request{}, err
	}
	a, err := p.attachment(w, args)
	if err != nil {
		return request{}, err
	}
	if a.ipam == "" {
		if _, err := (&current.Result{}).GetAsVersion(a.version); err != nil {
			return request{}, fail(types.ErrIncompatibleCNIVersion,
				"a result of cniVersion %s cannot have an interface without addresses; use 0.3.0 or later", a.version)
		}
	}
	env, err := parseArgs(args.Args)
	if err != nil {
		return request{}, err
	}
	r := request{
		attachment: a, deviceID: w.DeviceID, promisc: w.PromiscMode, dns: w.DNS, prevResult: w.PrevResult,
		owner: defaultTap, group: defaultTap,
	}
	if w.Owner != nil {
		r.owner = *w.Owner
	}
	if w.Group != nil {
		r.group = *w.Group
	}
	if r.mac, err = w.mac(env["MAC"]); err != nil {
		return request{}, err
	}
	if r.mtu, err = w.mtu(); err != nil {
		return request{}, err
	}
	r.pod = pod{namespace: env["K8S_POD_NAMESPACE"], name: env["K8S_POD_NAME"], uid: env["K8S_POD_UID"]}
	return r, nil
}

// mac returns the MAC that is set for this pod by the runtime, else by the user's cni-args, else for the whole network.
// It returns nil if none is set.
func (w netConf) mac(fromEnv string) (net.HardwareAddr, error) {
	for _, source := range []struct {
		key, value string
		code       uint
	}{
		{"CNI_ARGS MAC", fromEnv, types.ErrInvalidEnvironmentVariables},
		{"runtimeConfig.mac", w.RuntimeConfig.MAC, types.ErrInvalidNetworkConfig},
		{"args.cni.mac", w.Args.CNI.MAC, types.ErrInvalidNetworkConfig},
		{"mac", w.MAC, types.ErrInvalidNetworkConfig},
	} {
		if source.value == "" {
			continue
		}
		return parseMAC(source.key, source.value, source.code)
	}
	return nil, nil
}

// parseMAC reads the address of one Ethernet interface: 48 bits, unicast and not zero.
func parseMAC(key, value string, code uint) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(value)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 || slices.Equal(mac, make(net.HardwareAddr, 6)) {
		return nil, fail(code,
			"%s: %q is not the address of one Ethernet interface, such as 02:6b:5c:10:00:01", key, value)
	}
	return mac, nil
}

// mtu returns the MTU that is set for this pod, else for the whole network. It returns 0 if none is set.
func (w netConf) mtu() (int, error) {
	key, mtu := "args.cni.mtu", w.Args.CNI.MTU
	if mtu == nil {
		key, mtu = "mtu", w.MTU
	}
	if mtu == nil {
		return 0, nil
	}
	if *mtu < minMTU || *mtu > maxMTU {
		return 0, invalid(key, fmt.Sprint(*mtu), "is not an MTU: %d to that of the LAN", minMTU)
	}
	return *mtu, nil
}

// parseArgs reads the keys of CNI_ARGS that the plugin uses. Multus repeats keys from the runtime, but each must have
// one value: a user who could add another K8S_POD_NAMESPACE would choose the namespace that the plugin checks.
func parseArgs(args string) (map[string]string, error) {
	known := map[string]func(string) bool{
		"MAC":               func(string) bool { return true }, // checked in netConf.mac
		"K8S_POD_NAMESPACE": isObjectName,
		"K8S_POD_NAME":      isObjectName,
		"K8S_POD_UID":       isObjectName,
	}
	env := map[string]string{}
	for pair := range strings.SplitSeq(args, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: %q is not key=value", pair)
		}
		valid, ok := known[key]
		if !ok {
			continue
		}
		if before, twice := env[key]; twice && before != value {
			return nil, fail(types.ErrInvalidEnvironmentVariables,
				"CNI_ARGS: %s has two values, %q and %q", key, before, value)
		}
		if value != "" && !valid(value) {
			return nil, fail(types.ErrInvalidEnvironmentVariables,
				"CNI_ARGS: %s=%q is not a name that Kubernetes allows", key, value)
		}
		env[key] = value
	}
	return env, nil
}

// invalid returns the error for a key whose value is missing or not valid.
func invalid(key, value, format string, args ...any) error {
	if value == "" {
		return fail(types.ErrInvalidNetworkConfig, "network configuration has no %q", key)
	}
	return fail(types.ErrInvalidNetworkConfig, "%s: %q %s", key, value, fmt.Sprintf(format, args...))
}

// isPathElement reports whether a name is one path element without blanks.
func isPathElement(s string) bool {
	return s != "" && len(s) <= 255 && s != "." && s != ".." && !strings.ContainsFunc(s, func(r rune) bool {
		return r == '/' || r <= ' ' || r == 0x7f || r == '\uFFFD'
	})
}

// isObjectName reports whether a Kubernetes object could have that name (a DNS subdomain, RFC 1123).
func isObjectName(s string) bool {
	letter := func(r rune) bool { return 'a' <= r && r <= 'z' || '0' <= r && r <= '9' }
	return s != "" && len(s) <= 253 && letter(rune(s[0])) && letter(rune(s[len(s)-1])) &&
		!strings.ContainsFunc(s, func(r rune) bool { return !letter(r) && r != '-' && r != '.' })
}

// isName reports whether a spoke or pool could have that name. NADs and links contain it.
func isName(s string, longest int) bool { return len(s) <= longest && isObjectName(s) }
