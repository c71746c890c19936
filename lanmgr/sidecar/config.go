package sidecar

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
)

// Config says to which LAN the pod belongs, and how.
type Config struct {
	LogLevel    Level        `json:"log_level"`
	HTTPAddress string       `json:"http_address"`
	IP          []netip.Addr `json:"ip,omitempty"`        // of the pod; empty: as its default route has it
	IPFamily    string       `json:"ip_family,omitempty"` // which of them to use, ipv4 or ipv6; empty: as the first
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

// Discovery is how pods find each other.
type Discovery string

// The kinds of discovery.
const (
	UnicastDiscovery Discovery = "unicast" // by Services
	EVPNDiscovery    Discovery = "evpn"    // by Services and BGP
)

// EVPN configures BGP.
type EVPN struct {
	AS                     uint32     `json:"as,omitempty"`
	RouterID               netip.Addr `json:"router_id,omitzero"` // IPv4
	Peers                  []string   `json:"peers,omitempty"`    // as bgp.ParsePeer reads them
	Reflectors             *Service   `json:"reflectors,omitempty"`
	ReflectorsPasswordFile string     `json:"reflectors_password_file,omitempty"`

	peers             []bgp.Peer // with their passwords, which /config must not show
	reflectorPassword string
}

// VXLAN configures the pod's interface.
type VXLAN struct {
	Interface string         `json:"interface"`
	VNI       uint32         `json:"vni"`
	Port      uint16         `json:"port"`          // UDP
	MTU       int            `json:"mtu"`           // bytes; -1: that of the pod's link less the overhead
	MAC       string         `json:"mac,omitempty"` // empty: derived from the pod's name
	Addresses []netip.Prefix `json:"addresses,omitempty"`
}

// Hooks are programs that the sidecar runs.
type Hooks struct {
	Up      []string `json:"up,omitempty"`     // after the interface was made
	Change  []string `json:"change,omitempty"` // after a Service's endpoints have changed
	Timeout Duration `json:"timeout"`          // of each run
}

// Service names a Service whose endpoints are peers.
type Service struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func (s Service) String() string { return s.Namespace + "/" + s.Name }

// Duration is a time.Duration in text form, such as 30s.
type Duration time.Duration

// MarshalText returns the text form.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// Level is the name of a level of logrus.
type Level string

// levels maps the levels of logrus, which kubelan's users write, to those of slog.
var levels = map[Level]slog.Level{
	"PANIC": slog.LevelError, "FATAL": slog.LevelError, "ERROR": slog.LevelError, "WARN": slog.LevelWarn,
	"WARNING": slog.LevelWarn, "INFO": slog.LevelInfo, "DEBUG": slog.LevelDebug, "TRACE": slog.LevelDebug,
}

// Slog returns the level of slog.
func (l Level) Slog() slog.Level { return levels[l] }

// check checks keys against each other.
func (c *Config) check() error {
	if c.IPFamily != "" && len(c.IP) > 0 && !slices.ContainsFunc(c.IP, c.isOfFamily) {
		return fmt.Errorf("ip_family: the pod has no %s address among %v", c.IPFamily, c.IP)
	}
	if c.Discovery == EVPNDiscovery {
		return c.EVPN.check()
	}
	if len(c.Services) == 0 && len(c.Peers) == 0 {
		return errors.New("services: there are none, nor peers: the LAN has no other pods")
	}
	return nil
}

func (e *EVPN) check() error {
	switch {
	case e.AS == 0:
		return errors.New("evpn.as: the number of the autonomous system is missing, which discovery evpn needs")
	case len(e.Peers) == 0 && e.Reflectors == nil:
		return errors.New("evpn.peers: there are none, nor evpn.reflectors: there is no router to connect to")
	}
	return nil
}

// PasswordFiles returns the files whose contents are part of the configuration.
func (c *Config) PasswordFiles() []string {
	files := bgp.PasswordFiles(c.EVPN.Peers)
	if c.EVPN.ReflectorsPasswordFile != "" {
		files = append(files, c.EVPN.ReflectorsPasswordFile)
	}
	return files
}

// routerID returns the router ID: as configured, else the pod's IPv4 address, else derived from the pod's name.
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
