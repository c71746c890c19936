package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/test/cluster/internal/process"
)

// createUnderlay makes the network namespace with the bridges between the
// nodes, and the router, where the control plane runs as well.
func (s state) createUnderlay() error {
	if err := createNetns(s.underlayNetns()); err != nil {
		return fmt.Errorf("make network namespace %s: %w", s.underlayNetns(), err)
	}
	err := setSysctls(s.underlayPath(), map[string]string{
		// webhooks and Services: the control plane reaches pods through their nodes
		"net/ipv4/ip_forward":          "1",
		"net/ipv6/conf/all/forwarding": "1",
		// Ports and the LANs' bridge say nothing of their own.
		"net/ipv6/conf/default/disable_ipv6": "1",
		// Frames are for the nodes to filter.
		"net/bridge/bridge-nf-call-iptables":  "0",
		"net/bridge/bridge-nf-call-ip6tables": "0",
		"net/bridge/bridge-nf-call-arptables": "0",
	})
	if err != nil {
		return err
	}
	err = inside(s.underlayPath(), func(h *netlink.Handle) error {
		if err := setUp(h, "lo"); err != nil {
			return err
		}
		bridges, addresses := []string{controlBridge, lanBridge, subnetBridge},
			map[string][2]string{controlBridge: {controlIPv4, controlIPv6}}
		for _, n := range specs() {
			ipv4, ipv6 := n.router()
			bridges, addresses[n.bridge(routed)] = append(bridges, n.bridge(routed)), [2]string{ipv4, ipv6}
		}
		for i, name := range bridges {
			if err := createBridge(h, name, net.HardwareAddr{0x02, 0x77, 0, 0xff, 0, byte(i)}); err != nil {
				return err
			}
		}
		for name, a := range addresses {
			if err := setSysctls(s.underlayPath(),
				map[string]string{"net/ipv6/conf/" + name + "/disable_ipv6": "0"}); err != nil {
				return err
			}
			if err := errors.Join(askOften(s.underlayPath(), name), address(h, name, a[0], a[1])); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.dropMulticast()
}

// dropMulticast takes multicast of UDP from the network that is to carry none;
// what IPv6 itself needs passes.
func (s state) dropMulticast() error {
	var ports []string
	for _, n := range specs() {
		ports = append(ports, n.port(subnet))
	}
	nft := exec.Command("ip", "netns", "exec", s.underlayNetns(), "nft", fmt.Sprintf(`table bridge subnet {
	chain forward {
		type filter hook forward priority 0
		oifname { %s } jump multicast
	}
	chain multicast {
		ip daddr 224.0.0.0/4 meta l4proto udp counter drop
		ip6 daddr ff00::/8 meta l4proto udp counter drop
	}
}`, strings.Join(ports, ", ")))
	if _, err := output(nft); err != nil {
		return fmt.Errorf("drop multicast on bridge %s: %w", subnetBridge, err)
	}
	return nil
}

// shareNetnsDir makes the folder of named network namespaces a shared mount of
// its own, as ip-netns(8) does before it makes its first. Done later, by
// another program's "ip netns add", it would cover the cluster's name, which
// could then not be removed.
func shareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	err := unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if !errors.Is(err, unix.EINVAL) { // EINVAL: it is no mount yet
		return err
	}
	if err := unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	return unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
}

// createNetns makes a named network namespace, as ip-netns(8) does.
func createNetns(name string) error {
	if err := shareNetnsDir(); err != nil {
		return fmt.Errorf("share %s: %w", netnsDir, err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends, in the new namespace, with the goroutine
		ns, err := netns.NewNamed(name)
		if err == nil {
			err = ns.Close()
		}
		done <- err
	}()
	return <-done
}

// removeUnderlay removes the network namespace, and with it the bridges' ends
// of the nodes' devices; what is left of one that was half made, too.
func (s state) removeUnderlay() error {
	err := unix.Unmount(s.underlayPath(), unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) { // EINVAL: nothing is mounted there
		return fmt.Errorf("unmount network namespace %s: %w", s.underlayNetns(), err)
	}
	if err := os.Remove(s.underlayPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network namespace %s: %w", s.underlayNetns(), err)
	}
	return nil
}

// createBridge makes a bridge that passes multicast on as it comes. Its
// address is given, else it changes as ports come and go.
func createBridge(h *netlink.Handle, name string, mac net.HardwareAddr) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = name, mac
	snooping := false
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
		return fmt.Errorf("make bridge %s: %w", name, err)
	}
	return setUp(h, name)
}

// connect gives the node its network devices, addresses and routes.
func (n *Node) connect() error {
	for _, d := range devices() {
		if err := n.plug(d); err != nil {
			return err
		}
	}
	return inside(n.state.underlayPath(), n.routePods)
}

// plug connects one device of the node to its bridge.
func (n *Node) plug(d device) error {
	path, err := n.Netns()
	if err != nil {
		return err
	}
	node, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open the network namespace of %s: %w", n.Name, err)
	}
	defer node.Close()
	err = inside(n.state.underlayPath(), func(h *netlink.Handle) error {
		bridge, err := h.LinkByName(n.bridge(d))
		if err != nil {
			return fmt.Errorf("find bridge %s: %w", n.bridge(d), err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MasterIndex = n.port(d), bridge.Attrs().Index
		veth := &netlink.Veth{
			LinkAttrs: attrs, PeerName: d.String(), PeerHardwareAddr: n.mac(d),
			PeerNamespace: netlink.NsFd(node),
		}
		if err := h.LinkAdd(veth); err != nil {
			return fmt.Errorf("connect %s of %s to bridge %s: %w", d, n.Name, n.bridge(d), err)
		}
		return setUp(h, attrs.Name)
	})
	if err != nil {
		return err
	}
	if err := askOften(path, d.String()); err != nil {
		return err
	}
	return inside(path, func(h *netlink.Handle) error { return n.configure(h, d) })
}

// askOften has the kernel ask for neighbours on a device five times a second
// instead of once, so that a network that is back after a fault is used at once.
func askOften(netns, device string) error {
	const retransmit = "200"
	return setSysctls(netns, map[string]string{
		"net/ipv4/neigh/" + device + "/retrans_time_ms": retransmit,
		"net/ipv6/neigh/" + device + "/retrans_time_ms": retransmit,
	})
}

// configure sets a device of the node up and gives it its addresses and the
// node its routes by it, unless they exist.
func (n *Node) configure(h *netlink.Handle, d device) error {
	if err := setUp(h, d.String()); err != nil {
		return err
	}
	ipv4, ipv6 := n.addresses(d)
	if ipv4 == "" {
		return nil
	}
	if err := address(h, d.String(), ipv4, ipv6); err != nil {
		return err
	}
	switch d {
	case control:
		return n.routeControl(h)
	case routed:
		return n.routeRouted(h)
	}
	return nil
}

// routeRouted sends what is for the other nodes' routed devices to the router,
// and never anywhere else: the way by the control network ends there as well.
func (n *Node) routeRouted(h *netlink.Handle) error {
	ipv4, ipv6 := n.router()
	for i, via := range []string{ipv4, ipv6} {
		_, to, err := net.ParseCIDR(routedPrefixes()[i])
		if err != nil {
			return err
		}
		if err := h.RouteReplace(&netlink.Route{Dst: to, Type: unix.RTN_UNREACHABLE, Priority: 1 << 16}); err != nil {
			return fmt.Errorf("keep %s from other ways: %w", to, err)
		}
		if err := route(h, to.String(), via); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) routeControl(h *netlink.Handle) error {
	if err := route(h, "0.0.0.0/0", controlIPv4); err != nil {
		return err
	}
	if err := route(h, "::/0", controlIPv6); err != nil {
		return err
	}
	for _, other := range specs() {
		if other.Name == n.Name {
			continue
		}
		if err := other.routePods(h); err != nil {
			return err
		}
	}
	return nil
}

// routePods sends what is for the node's pods to the node.
func (s spec) routePods(h *netlink.Handle) error {
	return errors.Join(route(h, s.PodCIDR, s.IPv4), route(h, s.PodCIDR6, s.IPv6))
}

// unplug removes one device of the node, if it is there.
func (n *Node) unplug(d device) error {
	return inside(n.state.underlayPath(), func(h *netlink.Handle) error {
		port, err := h.LinkByName(n.port(d))
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find %s: %w", n.port(d), err)
		}
		// The devices vanish at any moment when a node loses power.
		if err := h.LinkDel(port); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove %s: %w", n.port(d), err)
		}
		return nil
	})
}

// UnderlayPort is where a device's cable ends in the network between the nodes:
// the path of that network's namespace, and the name of the port in its bridge.
func (n *Node) UnderlayPort(dev string) (netns, port string, err error) {
	d, err := parseDevice(dev)
	if err != nil {
		return "", "", err
	}
	return n.state.underlayPath(), n.port(d), nil
}

// CutUnderlay removes a device's carrier, as if its cable were pulled.
func (n *Node) CutUnderlay(dev string) error {
	d, err := parseDevice(dev)
	if err != nil {
		return err
	}
	return inside(n.state.underlayPath(), func(h *netlink.Handle) error {
		port, err := h.LinkByName(n.port(d))
		if err != nil {
			return fmt.Errorf("find %s: %w", n.port(d), err)
		}
		if err := h.LinkSetDown(port); err != nil {
			return fmt.Errorf("cut %s of %s: %w", dev, n.Name, err)
		}
		return nil
	})
}

// RemoveUnderlay deletes a device of the node, as if its card were pulled.
func (n *Node) RemoveUnderlay(dev string) error {
	d, err := parseDevice(dev)
	if err != nil {
		return err
	}
	return n.unplug(d)
}

// RestoreUnderlay undoes CutUnderlay and RemoveUnderlay, and sets a device up
// that was set down, with the addresses and routes that this took.
func (n *Node) RestoreUnderlay(dev string) error {
	d, err := parseDevice(dev)
	if err != nil {
		return err
	}
	missing := false
	err = inside(n.state.underlayPath(), func(h *netlink.Handle) error {
		port, err := h.LinkByName(n.port(d))
		if missing = errors.As(err, &netlink.LinkNotFoundError{}); missing {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find %s: %w", n.port(d), err)
		}
		if err := h.LinkSetUp(port); err != nil {
			return fmt.Errorf("restore %s of %s: %w", dev, n.Name, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if missing {
		return n.plug(d)
	}
	path, err := n.Netns()
	if err != nil {
		return err
	}
	return inside(path, func(h *netlink.Handle) error { return n.configure(h, d) })
}

// inside calls f with a handle to the network namespace at path.
func inside(path string, f func(*netlink.Handle) error) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in %s: %w", path, err)
	}
	defer h.Close()
	return f(h)
}

func setUp(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// address gives a device its IPv4 (/24) and IPv6 (/64) address, unless it has
// them. The IPv6 address is usable at once.
func address(h *netlink.Handle, name, ipv4, ipv6 string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	for _, addr := range []*netlink.Addr{
		{IPNet: &net.IPNet{IP: net.ParseIP(ipv4).To4(), Mask: net.CIDRMask(24, 32)}},
		{IPNet: &net.IPNet{IP: net.ParseIP(ipv6), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD},
	} {
		if err := h.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("give %s the address %s: %w", name, addr, err)
		}
	}
	return nil
}

func route(h *netlink.Handle, cidr, via string) error {
	_, to, err := net.ParseCIDR(cidr)
	if err != nil {
		return err
	}
	if err := h.RouteReplace(&netlink.Route{Dst: to, Gw: net.ParseIP(via)}); err != nil {
		return fmt.Errorf("route %s via %s: %w", cidr, via, err)
	}
	return nil
}

// setSysctls sets sysctls of a network namespace; those that the kernel lacks
// (br_netfilter is a module) need no setting.
func setSysctls(netns string, values map[string]string) error {
	return process.InNetns(netns, func() error {
		for name, value := range values {
			err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("set sysctl %s in %s: %w", name, netns, err)
			}
		}
		return nil
	})
}
