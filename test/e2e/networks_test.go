package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// underlay is a network under LANs, and how nodes find each other on it.
type underlay struct {
	name   string
	device string // of both nodes
	second string // a device of worker2 on the same network; the same one if that has no other
	group  string // decides the family of addresses; empty: the LAN's default
	vteps  [2]string
	bits   int // of the VTEPs' prefixes; 0 with multicast, which needs only link-local addresses
	mtu    int // a LAN's

	discovery v1beta1.Discovery // empty: the chart's
}

// multicast is the usual underlay, unless the flag names another: one link without addresses.
var multicast = underlay{name: "multicast", device: "eth1", second: "eth2", mtu: 1500 - 78}

// The underlays of LANs with unicast discovery do not carry multicast. The nodes' devices are in one subnet, or in two
// subnets with a router between them.
var (
	subnet4 = underlay{
		name: "subnet4", device: "eth3", second: "eth3", vteps: [2]string{"192.0.2.11", "192.0.2.12"},
		bits: 24, mtu: 1500 - 58, discovery: v1beta1.Unicast,
	}
	subnet6 = underlay{
		name: "subnet6", device: "eth3", second: "eth3", group: "ff02::14",
		vteps: [2]string{"2001:db8:77::11", "2001:db8:77::12"}, bits: 64, mtu: 1500 - 78, discovery: v1beta1.Unicast,
	}
	routed4 = underlay{
		name: "routed4", device: "eth4", second: "eth4", vteps: [2]string{"198.18.1.11", "198.18.2.11"},
		bits: 24, mtu: 1500 - 58, discovery: v1beta1.Unicast,
	}
	routed6 = underlay{
		name: "routed6", device: "eth4", second: "eth4", group: "ff02::14",
		vteps: [2]string{"2001:db8:18:1::11", "2001:db8:18:2::11"}, bits: 64, mtu: 1500 - 78,
		discovery: v1beta1.Unicast,
	}

	unicasts = []underlay{subnet4, subnet6, routed4, routed6}
)

// The same networks for LANs with discovery evpn.
var (
	evpn4  = subnet4.byEVPN("evpn4")
	evpn6  = subnet6.byEVPN("evpn6")
	evpn4r = routed4.byEVPN("evpn4r")
	evpn6r = routed6.byEVPN("evpn6r")

	evpns = []underlay{evpn4, evpn6, evpn4r, evpn6r}
)

func (u underlay) byEVPN(name string) underlay {
	u.name, u.discovery = name, v1beta1.EVPN
	return u
}

// usual is the underlay of the tests that do not name one. TestMain sets it; nothing changes it later.
var usual = multicast

// setUsual sets the usual underlay by name.
func setUsual(name string) error {
	for _, u := range slices.Concat(unicasts, evpns, []underlay{multicast}) {
		if u.name == name {
			usual = u
			return nil
		}
	}
	return fmt.Errorf("there is no underlay %q", name)
}

// String is the underlay's name.
func (u underlay) String() string { return u.name }

// oneByOne says whether nodes send packets to each other's addresses, not to a group.
func (u underlay) oneByOne() bool { return u.bits > 0 }

// over returns the lab with another underlay for its LANs. By EVPN it waits for the reflectors.
func (l lab) over(u underlay) lab {
	l.Helper()
	l.underlay = u
	if u.discovery == v1beta1.EVPN {
		ctx, cancel := context.WithTimeout(l.Context(), patience)
		defer cancel()
		l.try(l.bed.awaitDeployment(ctx, "k8slan-reflector"))
	}
	return l
}

// spec returns the lines of a LAN's spec for the underlay.
func (u underlay) spec() string {
	lines := []string{"defaultVxlanDev: " + u.device}
	if u.discovery != "" {
		lines = append(lines, "discovery: "+string(u.discovery))
	}
	if u.group != "" {
		lines = append(lines, "vxlanGrp: "+u.group)
	}
	return strings.Join(lines, "\n  ")
}

// otherGroup returns another group of the family of the underlay's addresses.
func (u underlay) otherGroup() string {
	if u.oneByOne() && netip.MustParseAddr(u.vteps[0]).Is4() {
		return "239.77.0.36"
	}
	return "ff02::1:36"
}

// address returns the VTEP of a node with its prefix length; worker1 is 0.
func (u underlay) address(node int) string { return fmt.Sprintf("%s/%d", u.vteps[node], u.bits) }

// spare returns the underlay with another address for worker2, which no host has.
func (u underlay) spare() underlay {
	const unused = 0x17
	a := netip.MustParseAddr(u.vteps[1]).AsSlice()
	a[len(a)-1] = unused
	other, _ := netip.AddrFromSlice(a)
	u.vteps[1] = other.String()
	return u
}

// addDevice gives a node another device on the underlay, up, with addresses, for the time of the test.
func (m machine) addDevice(name string, addresses ...string) {
	m.Helper()
	m.run("ip", "link", "add", name, "link", m.underlay.second, "type", "macvlan", "mode", "bridge")
	m.afterwards("ip", "link", "del", name)
	m.run("ip", "link", "set", name, "up")
	for _, a := range addresses {
		m.addAddress(name, a)
	}
}

// addAddress gives a device of the node an address that can be used at once.
func (m machine) addAddress(device, prefix string) {
	m.Helper()
	add := []string{"ip", "addr", "add", prefix, "dev", device}
	if netip.MustParsePrefix(prefix).Addr().Is6() {
		add = append(add, "nodad")
	}
	m.run(add...)
}
