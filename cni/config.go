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
	minMTU     = 68    // bytes; the least that IPv4 allows (RFC 791), and Linux for an Ethernet link (ETH_MIN_MTU)
	maxMTU     = 65535 // bytes; the most that Linux allows for a veth (ETH_MAX_MTU)
	maxSpoke   = 13    // characters: a link name has at most 15, and the spoke's links add a suffix of two
	maxPool    = 9     // characters: its ports' names add an underscore and a number below 500
	defaultTap = 107   // owner and group of the tap: qemu's in KubeVirt's images
)

// netConf is the network configuration as it is written, by the names of its keys.
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

	VXLANID *uint32 `json:"vxlanId"` // of type megalos, with master
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

// attachment is one request, validated: which spoke of which LAN, and for whom.
type attachment struct {
	version string // of CNI, for the result
	network string // name of the network in the runtime's configuration

	lan       segment.LAN
	netns     string // the LAN's, by name
	netnsPath string // for people
	spoke     string // of a pool the port that kubelet allocated, if that is known
	pool      string // empty for a single spoke
	kind      segment.Kind
	ipam      string // type of the IPAM plugin; empty for none
	config    []byte // as it came, for the IPAM plugin
	vni       uint32 // of a network of type megalos; 0 for a LAN's own
	master    string // the underlay device that such a network names; empty: that of the default route

	claimID   string
	sandbox   string // container ID
	podNetns  string // path
	ifname    string
	pathList  string // where IPAM plugins are
	arguments string // CNI_ARGS as it came
	env       []string
}

// String names the attachment's spoke in a sentence.
func (a attachment) String() string {
	if a.vni != 0 {
		return fmt.Sprintf("VNI %d", a.vni)
	}
	if a.pool != "" && a.spoke == "" {
		return fmt.Sprintf("pool %q of LAN %s", a.pool, a.lan)
	}
	return fmt.Sprintf("spoke %q of LAN %s", a.spoke, a.lan)
}

// spokeOrPool is what the attachment's resource, NADs and variables are named after: the spoke or the pool.
func (a attachment) spokeOrPool() string { return cmp.Or(a.pool, a.spoke) }

// matches says whether a spoke is the attachment's or, of a pool, one of its ports.
func (a attachment) matches(spoke string) bool {
	if a.pool == "" {
		return spoke == a.spoke
	}
	pool, _, ok := segment.PoolOf(spoke)
	return ok && pool == a.pool
}

// existsIn says whether a LAN as the node has it has the attachment's spoke or any port of its pool.
func (a attachment) existsIn(record segment.Segment) bool {
	return slices.ContainsFunc(record.Spokes, a.matches)
}

// request is an attachment with how it is to be made.
type request struct {
	attachment
	deviceID string
	mac      net.HardwareAddr // nil: what is derived
	mtu      int              // bytes; 0: the LAN's
	promisc  bool
	owner    uint32 // of the tap
	group    uint32 // of the tap
	dns      types.DNS
	pod      pod

	prevResult json.RawMessage // as it came
}

// pod is who asks, as the runtime says; all empty when it is not Kubernetes.
type pod struct{ namespace, name, uid string }

// decode reads the configuration. After an error about one key, what could be read of the others is there.
func decode(config []byte) (netConf, error) {
	var w netConf
	err := json.Unmarshal(config, &w)
	if err == nil {
		return w, nil
	}
	if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return w, fail(types.ErrInvalidNetworkConfig, "network configuration: key %q cannot be a JSON %s", wrong.Field, wrong.Value)
	}
	return w, fail(types.ErrDecodingFailure, "network configuration is not the JSON it should be: %v", err)
}

// attachment validates what names the attachment: all that DEL, GC and STATUS need.
func (p *Plugin) attachment(w netConf, args *skel.CmdArgs) (attachment, error) {
	a := attachment{
		version: w.CNIVersion, network: w.Name,
		netns: w.NS, spoke: w.Spoke, pool: w.Pool, kind: segment.Kind(w.Kind), config: args.StdinData,
		claimID: segment.ClaimID(args.ContainerID, args.IfName),
		sandbox: args.ContainerID, podNetns: args.Netns, ifname: args.IfName,
		pathList: args.Path, arguments: args.Args, env: p.host.Env,
	}
	if a.version == "" {
		a.version = "0.1.0" // what the specification takes it for
	}
	if !slices.Contains(version.All.SupportedVersions(), a.version) {
		return a, fail(types.ErrIncompatibleCNIVersion, "cniVersion %q is none of %s", a.version, strings.Join(version.All.SupportedVersions(), ", "))
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
		return a, invalid("pool", w.Pool, "is there beside a spoke: an attachment is to one of them")
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

// ipamType validates the IPAM section as far as it is ours to judge.
func (a attachment) ipamType(w netConf) (string, error) {
	if len(w.IPAM) == 0 {
		return "", nil
	}
	var plugin string
	if err := json.Unmarshal(w.IPAM["type"], &plugin); err != nil || !isPathElement(plugin) {
		return "", invalid("ipam.type", string(w.IPAM["type"]), "is not the name of an IPAM plugin")
	}
	if plugin == w.Type {
		return "", invalid("ipam.type", plugin, "is this plugin, which gives no addresses")
	}
	if a.kind == segment.Macvtap {
		return "", invalid("ipam.type", plugin, "has no place with kind macvtap: addresses would be the pod's, and the guest behind the tap would never see them; give them inside the guest")
	}
	return plugin, nil
}

// request validates the whole of what ADD and CHECK are asked for.
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
			return request{}, fail(types.ErrIncompatibleCNIVersion, "cniVersion %s cannot tell of an interface without addresses; use 0.3.0 or later", a.version)
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

// mac is the address that is asked for most directly: of this pod by the runtime, of this pod by the user's cni-args,
// of every pod of the network. Nil where none is.
func (w netConf) mac(fromEnv string) (net.HardwareAddr, error) {
	for _, asked := range []struct {
		key, value string
		code       uint
	}{
		{"CNI_ARGS MAC", fromEnv, types.ErrInvalidEnvironmentVariables},
		{"runtimeConfig.mac", w.RuntimeConfig.MAC, types.ErrInvalidNetworkConfig},
		{"args.cni.mac", w.Args.CNI.MAC, types.ErrInvalidNetworkConfig},
		{"mac", w.MAC, types.ErrInvalidNetworkConfig},
	} {
		if asked.value == "" {
			continue
		}
		return parseMAC(asked.key, asked.value, asked.code)
	}
	return nil, nil
}

// parseMAC reads the address of one Ethernet interface: 48 bits, neither a group's nor zero.
func parseMAC(key, value string, code uint) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(value)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 || slices.Equal(mac, make(net.HardwareAddr, 6)) {
		return nil, fail(code, "%s: %q is not the address of one Ethernet interface, such as 02:6b:5c:10:00:01", key, value)
	}
	return mac, nil
}

// mtu is the MTU that is asked for, of this pod before that of every pod; 0 where none is.
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

// parseArgs reads the keys of CNI_ARGS that matter here. Multus repeats what it got from the runtime, but each must have
// one value: who could add another K8S_POD_NAMESPACE would choose whose pod this is.
func parseArgs(args string) (map[string]string, error) {
	known := map[string]func(string) bool{
		"MAC":               func(string) bool { return true }, // with the other MACs
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
			return nil, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: %s is there twice, as %q and %q", key, before, value)
		}
		if value != "" && !valid(value) {
			return nil, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: %s=%q is not a name in Kubernetes", key, value)
		}
		env[key] = value
	}
	return env, nil
}

func invalid(key, value, format string, args ...any) error {
	if value == "" {
		return fail(types.ErrInvalidNetworkConfig, "network configuration has no %q", key)
	}
	return fail(types.ErrInvalidNetworkConfig, "%s: %q %s", key, value, fmt.Sprintf(format, args...))
}

// isPathElement says whether a name stays in the folder it is put into, and in one word of a log line.
func isPathElement(s string) bool {
	return s != "" && len(s) <= 255 && s != "." && s != ".." && !strings.ContainsFunc(s, func(r rune) bool {
		return r == '/' || r <= ' ' || r == 0x7f || r == '\uFFFD'
	})
}

// isObjectName says whether Kubernetes could have an object of that name (a DNS subdomain, RFC 1123).
func isObjectName(s string) bool {
	letter := func(r rune) bool { return 'a' <= r && r <= 'z' || '0' <= r && r <= '9' }
	return s != "" && len(s) <= 253 && letter(rune(s[0])) && letter(rune(s[len(s)-1])) &&
		!strings.ContainsFunc(s, func(r rune) bool { return !letter(r) && r != '-' && r != '.' })
}

// isName says whether a LAN could have a spoke or pool of that name: NADs and links are named after it.
func isName(s string, longest int) bool { return len(s) <= longest && isObjectName(s) }
