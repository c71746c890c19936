package netlab

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// UnderlayDevice is the name of a node's device to the underlay.
const UnderlayDevice = "eth1"

// An Underlay is the network between nodes: a bridge in a namespace of its own that sends nothing by itself.
type Underlay struct {
	Namespace
	mtu int
}

// NewUnderlay makes an underlay whose devices carry packets of at most mtu bytes.
func NewUnderlay(t testing.TB, mtu int) *Underlay {
	t.Helper()
	u := &Underlay{Namespace: New(t, "underlay"), mtu: mtu}
	u.Sysctl(t, "net/ipv6/conf/all/disable_ipv6", "1")
	u.Sysctl(t, "net/ipv6/conf/default/disable_ipv6", "1")
	for _, family := range []string{"iptables", "ip6tables", "arptables"} {
		setting := "net/bridge/bridge-nf-call-" + family
		if _, err := os.Stat("/proc/sys/" + setting); err == nil { // br_netfilter is loaded
			u.Sysctl(t, setting, "0")
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "underlay", mtu
	snooping := false
	h := u.Netlink(t)
	bridge := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}
	if err := h.LinkAdd(bridge); err != nil {
		t.Fatalf("underlay bridge: %v", err)
	}
	if err := h.LinkSetUp(bridge); err != nil {
		t.Fatalf("underlay bridge up: %v", err)
	}
	return u
}

// A Node is a host of the cluster: a namespace with a device to the underlay that has only an IPv6 link-local address,
// and directories of its own for the files of k8slan.
type Node struct {
	Namespace
	Name string
	// Run and CDI stand for /run/k8slan and /var/run/cdi.
	Run, CDI string

	underlay *Underlay
}

// Join makes a node on the underlay. The name is at most 13 bytes.
func (u *Underlay) Join(t testing.TB, name string) *Node {
	t.Helper()
	ns := New(t, name)
	dir := filepath.Dir(ns.Path)
	n := &Node{
		Namespace: ns, Name: name, Run: filepath.Join(dir, "k8slan"), CDI: filepath.Join(dir, "cdi"), underlay: u,
	}
	// Addresses are usable at once, and no router solicitations are sent.
	n.Sysctl(t, "net/ipv6/conf/default/accept_dad", "0")
	n.Sysctl(t, "net/ipv6/conf/default/router_solicitations", "0")
	n.PlugIn(t)
	return n
}

// Port names the underlay's end of the node's cable, in the underlay's namespace.
func (n *Node) Port() string { return n.Name + ".1" }

// PlugIn makes the node's device to the underlay and waits for its address.
func (n *Node) PlugIn(t testing.TB) {
	t.Helper()
	there, err := vnetns.GetFromPath(n.Path)
	if err != nil {
		t.Fatalf("open network namespace %s: %v", n.Path, err)
	}
	defer there.Close()
	addresses := make(chan netlink.AddrUpdate, 64)
	done := make(chan struct{})
	defer close(done)
	if err := netlink.AddrSubscribeAt(there, addresses, done); err != nil {
		t.Fatalf("watch the addresses of %s: %v", n.Name, err)
	}

	h := n.underlay.Netlink(t)
	bridge, err := h.LinkByName("underlay")
	if err != nil {
		t.Fatalf("underlay bridge: %v", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.MasterIndex = n.Port(), n.underlay.mtu, bridge.Attrs().Index
	cable := &netlink.Veth{LinkAttrs: attrs, PeerName: UnderlayDevice, PeerNamespace: netlink.NsFd(int(there))}
	if err := h.LinkAdd(cable); err != nil {
		t.Fatalf("cable of %s: %v", n.Name, err)
	}
	if err := h.LinkSetUp(cable); err != nil {
		t.Fatalf("cable of %s up: %v", n.Name, err)
	}
	hn := n.Netlink(t)
	device, err := hn.LinkByName(UnderlayDevice)
	if err != nil {
		t.Fatalf("%s of %s: %v", UnderlayDevice, n.Name, err)
	}
	if err := hn.LinkSetMTU(device, n.underlay.mtu); err != nil {
		t.Fatalf("%s of %s: %v", UnderlayDevice, n.Name, err)
	}
	if err := hn.LinkSetUp(device); err != nil {
		t.Fatalf("%s of %s up: %v", UnderlayDevice, n.Name, err)
	}
	if err := awaitLinkLocal(hn, device, addresses); err != nil {
		t.Fatalf("%s of %s: %v", UnderlayDevice, n.Name, err)
	}
	n.underlay.AwaitCarrier(t, n.Port())
}

// PullOut removes the node's device to the underlay.
func (n *Node) PullOut(t testing.TB) {
	t.Helper()
	h := n.Netlink(t)
	device, err := h.LinkByName(UnderlayDevice)
	if err != nil {
		t.Fatalf("%s of %s: %v", UnderlayDevice, n.Name, err)
	}
	if err := h.LinkDel(device); err != nil {
		t.Fatalf("remove %s of %s: %v", UnderlayDevice, n.Name, err)
	}
}

// awaitLinkLocal returns when the link has a link-local address that can be used.
func awaitLinkLocal(h *netlink.Handle, link netlink.Link, updates <-chan netlink.AddrUpdate) error {
	deadline := time.After(10 * time.Second)
	for {
		addrs, err := h.AddrList(link, unix.AF_INET6)
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		for _, a := range addrs {
			if a.IP.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
				return nil
			}
		}
		select {
		case <-updates:
		case <-deadline:
			return fmt.Errorf("no link-local address within 10 s, addresses are %v", addrs)
		}
	}
}
