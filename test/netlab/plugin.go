package netlab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// UnderlayMTU is the MTU of the network between nodes in bytes, and MTU what is left of it for a LAN.
const (
	UnderlayMTU = 1500
	MTU         = UnderlayMTU - 78
)

// LAN returns a LAN with that VNI and names made from it; underlay is the ifindex of the node's device.
func LAN(vni uint32, underlay int, spokes ...string) segment.Segment {
	name := fmt.Sprint("lan", vni)
	return segment.Segment{
		LAN:        segment.LAN{Namespace: "default", Name: name, UID: "uid-" + name},
		Generation: 1,
		Netns:      name,
		Bridge:     fmt.Sprint("br", vni),
		MTU:        MTU,
		VXLAN: segment.VXLAN{
			Name: fmt.Sprint("vx", vni), VNI: vni, Port: 4789, Group: netip.MustParseAddr("ff02::14"),
			Underlay: UnderlayDevice, UnderlayIndex: underlay,
		},
		Spokes: spokes,
	}
}

// Config is a CNI network configuration.
type Config map[string]any

// Network is a spoke's network configuration as the controller writes it and Multus passes it on.
func Network(s segment.Segment, spoke string, kind segment.Kind) Config {
	return Config{
		"cniVersion": "1.1.0", "name": "k8slan-" + string(kind) + "-" + spoke, "type": "k8slan", "kind": kind,
		"lan": s.LAN.String(), "ns": s.Netns, "spoke": spoke, "deviceID": spoke,
	}
}

// With returns the configuration with one more key.
func (c Config) With(key string, value any) Config {
	c = maps.Clone(c)
	c[key] = value
	return c
}

// Plugin is a CNI plugin on a node.
type Plugin struct {
	Path string
	Dirs string // CNI_PATH, the directories of IPAM plugins
	Env  []string
	Node Namespace
}

// BuildPlugin builds k8slan-cni to path with the flags of a release, and returns it as installed on a node.
func BuildPlugin(ctx context.Context, path string, node *Node) (Plugin, error) {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w",
		"-o", path, "github.com/k8slan/k8slan/cmd/k8slan-cni")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return Plugin{}, fmt.Errorf("build the CNI plugin: %w\n%s", err, out)
	}
	return Plugin{
		Path: path, Dirs: filepath.Dir(path), Node: node.Namespace,
		Env: []string{"K8SLAN_RUN_DIR=" + node.Run, "K8SLAN_CDI_DIR=" + node.CDI},
	}, nil
}

// Sandbox is a pod's sandbox.
type Sandbox struct {
	Namespace
	ID        string
	Interface string // the name of the plugin's interface in it
}

// NewSandbox makes a sandbox with a network namespace of its own, which Remove removes.
func NewSandbox() (Sandbox, error) {
	ns, err := Make("pod")
	return Sandbox{Namespace: ns, ID: filepath.Base(filepath.Dir(ns.Path)), Interface: "net1"}, err
}

// Command returns a call of the plugin, to be run on a thread that is in the node's namespace.
func (p Plugin) Command(ctx context.Context, verb string, s Sandbox, c Config) (*exec.Cmd, error) {
	stdin, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, p.Path)
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Env = append([]string{
		"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + s.ID, "CNI_NETNS=" + s.Path, "CNI_IFNAME=" + s.Interface,
		"CNI_PATH=" + p.Dirs,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + s.ID +
			";K8S_POD_UID=" + strconv.Itoa(len(s.ID)),
	}, p.Env...)
	return cmd, nil
}

// Call runs the plugin and returns its output; a CNI error is a *types.Error.
func (p Plugin) Call(ctx context.Context, verb string, s Sandbox, c Config) ([]byte, error) {
	cmd, err := p.Command(ctx, verb, s, c)
	if err != nil {
		return nil, err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := p.Node.Do(cmd.Run); err != nil {
		return nil, PluginError(err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes(), nil
}

// PluginError returns the error of a plugin that ended with err and this output: its CNI error if it has one.
func PluginError(err error, stdout, stderr []byte) error {
	words := &types.Error{}
	exit, ok := errors.AsType[*exec.ExitError](err)
	if ok && exit.Exited() && json.Unmarshal(stdout, words) == nil && words.Msg != "" {
		return words
	}
	return fmt.Errorf("%w: %s%s", err, stdout, stderr)
}

// Component returns the directory of programs that test/cluster builds from source once.
func Component(ctx context.Context, name string) (dir string, err error) {
	cmd := exec.CommandContext(ctx, "go", "run", "github.com/k8slan/k8slan/test/cluster/cmd/cluster", "build", name)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}
