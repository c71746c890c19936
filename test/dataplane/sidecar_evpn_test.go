package dataplane

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// Pods reach the reflector at reflectorAddress; the reflector sees them connect from sessionAddress and the addresses
// after it.
var (
	reflectorAddress = netip.MustParseAddr("198.51.100.254")
	sessionAddress   = netip.MustParseAddr("127.0.0.20")
)

// evpnVNI is the VNI of the LAN that sidecars share with a node.
const evpnVNI = 441

// Two pods with sidecars and one pod on a spoke of a node with the daemon are in one LAN.
func TestSidecarsJoinEVPNWithANode(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	for family, is6 := range map[string]bool{"ipv4": false, "ipv6": true} {
		t.Run(family, func(t *testing.T) {
			t.Parallel()
			expectLANWithNode(t, s.pods(t, 2), family, is6)
		})
	}
}

func expectLANWithNode(t *testing.T, tm *team, family string, is6 bool) {
	t.Helper()
	a, b := tm.pods[0], tm.pods[1]
	reflector := startReflector(t, netip.AddrPort{})
	mine := tm.evpnSettings(t, reflector, family, is6)
	vtep := map[*pod]netip.Addr{a: a.ipv4, b: b.ipv4}
	if is6 {
		vtep[a], vtep[b] = a.ipv6, b.ipv6
	}
	n, lan := tm.evpnNode(t, is6)
	local := lan.VXLAN.Local
	daemon := n.startSpeaker(t, lan, 1, reflector.at)
	one := n.attach(t, lan, "one", segment.Veth)
	link, err := one.Netlink(t).LinkByName(ifname)
	must(t, err)
	address := &net.IPNet{IP: net.IPv4(192, 168, 69, 9), Mask: net.CIDRMask(24, 32)}
	must(t, one.Netlink(t).AddrAdd(link, &netlink.Addr{IPNet: address}))

	onA := tables(t, a.Namespace)
	running := map[*pod]*sidecar{}
	tm.reach(t, reflector)
	for _, p := range tm.pods {
		running[p] = p.start(t, p.settings().with(mine))
	}
	for p, others := range map[*pod][]netip.Addr{a: {vtep[b], local}, b: {vtep[a], local}} {
		p.awaitRemotes(t, others...)
		p.awaitHealth(t, http.StatusNoContent)
		if mtu := p.link(t, kubelan).Attrs().MTU; mtu != lan.MTU {
			t.Errorf("the MTU of %s is %d, that of the node's LAN %d", p.Name, mtu, lan.MTU)
		}
	}
	awaitEntry(t, onA, one.MAC, local)
	for _, address := range []string{"192.168.69.1", "192.168.69.2", "192.168.69.9"} {
		for _, from := range []netlab.Namespace{a.Namespace, b.Namespace, one.Namespace} {
			ping(t, from, address)
		}
	}
	if entries := a.learned(t); len(entries) > 0 {
		t.Errorf("%s has learned %v", a.Name, entries)
	}

	// Frames to MACs with routes are not flooded, and no frame is lost while a killed sidecar restarts.
	from, to := a.host(t), b.host(t)
	streams := []*stream{startStream(t, 1, from, to), startStream(t, 2, to, from), startStream(t, 3, from, one)}
	for range 2 {
		running[a].kill()
		running[a] = a.start(t, a.settings().with(mine))
		a.awaitHealth(t, http.StatusNoContent)
	}
	for _, s := range streams {
		s.expectAll(t)
	}

	// A sidecar that ends withdraws its routes.
	daemon.awaitSettled(t)
	onNode := n.tables(t, lan)
	began := time.Now()
	running[b].stop(t)
	awaitUpdate(t, onNode, "the remote to be removed", func(u netlink.NeighUpdate) bool {
		return u.Type == unix.RTM_DELNEIGH && u.IP.Equal(vtep[b].AsSlice()) &&
			slices.Equal(u.HardwareAddr, make([]byte, 6))
	})
	t.Logf("the node removed a pod %v after its sidecar got SIGTERM", time.Since(began).Round(time.Millisecond))
	a.awaitRemotes(t, local)
	reaches(t, one, from, frames.Stream(nil, one.MAC, 5, 1)) // beside ARP
	daemon.end()
}

// evpnSettings are settings for EVPN with a reflector: over IPv6 by its address and without an API server, over IPv4 by
// a Service.
func (tm *team) evpnSettings(t *testing.T, reflector *reflector, family string, is6 bool) settings {
	t.Helper()
	port := int32(reflector.at.Port())
	mine := settings{
		"KL_SERVICES": "", "KL_DISCOVERY": "evpn", "KL_EVPN_AS": "65000",
		"KL_VXLAN_VNI": fmt.Sprint(evpnVNI), "KL_IP_FAMILY": family, "KL_STRICT_PEERS": "true",
	}
	if is6 {
		mine["KL_EVPN_PEERS"] = fmt.Sprintf("address=%s,port=%d,ipv6-vteps", reflectorAddress, port)
		mine["KUBECONFIG"] = ""
		return mine
	}
	mine["KL_EVPN_REFLECTORS"] = tm.namespace + "/reflectors"
	must(t, tm.api.Create(t.Context(), &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: tm.namespace, Name: "reflectors",
			Labels: map[string]string{discoveryv1.LabelServiceName: "reflectors"},
		},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Port: &port}},
		Endpoints: ready(reflectorAddress),
	}))
	return mine
}

// evpnNode makes a node beside the pods that has their LAN.
func (tm *team) evpnNode(t *testing.T, is6 bool) (node, segment.Segment) {
	t.Helper()
	n := addNode(t, tm.underlay, "worker1")
	ipv4, ipv6 := podAddresses(9)
	n.addUnderlayAddress(t, netip.PrefixFrom(ipv4, 24))
	n.addUnderlayAddress(t, netip.PrefixFrom(ipv6, 64))
	local, overhead := ipv4, segment.Overhead4
	if is6 {
		local, overhead = ipv6, segment.Overhead6
	}
	s := lan("evpn", evpnVNI, "one")
	s.MTU = underlayMTU - overhead
	s = n.withUnderlay(t, withEVPN(unicast(s, local)))
	n.reconcile(t, s)
	return n, s
}

// reach connects each pod to the reflector.
func (tm *team) reach(t *testing.T, reflector *reflector) {
	t.Helper()
	for i, p := range tm.pods {
		lo, err := p.Netlink(t).LinkByName("lo")
		must(t, err)
		address := &net.IPNet{IP: reflectorAddress.AsSlice(), Mask: net.CIDRMask(32, 32)}
		must(t, p.Netlink(t).AddrAdd(lo, &netlink.Addr{IPNet: address}))
		source := netip.AddrFrom4([4]byte{127, 0, 0, sessionAddress.As4()[3] + byte(i)})
		p.relayTo(t, netip.AddrPortFrom(reflectorAddress, reflector.at.Port()).String(), reflector.at.String(), source)
	}
}

// Pods change from one discovery to the other one after the other, and no frame is lost.
func TestSidecarsChangeBetweenUnicastAndEVPN(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 2)
	tm.service(t, "lan")
	a, b := tm.pods[0], tm.pods[1]
	reflector := startReflector(t, netip.AddrPort{})
	tm.reach(t, reflector)
	unicast := "services: [lan]\nvxlan: {mtu: 1400}\n"
	evpn := fmt.Sprintf("discovery: evpn\nevpn: {as: 65000, peers: ['address=%s,port=%d']}\nvxlan: {mtu: 1400}\n",
		reflectorAddress, reflector.at.Port())
	both := evpn + "services: [lan]\n"
	for _, p := range tm.pods {
		p.configure(t, unicast)
		mine := p.settings()
		delete(mine, "KL_SERVICES")
		p.start(t, mine)
	}
	a.awaitRemotes(t, b.ipv4)
	b.awaitRemotes(t, a.ipv4)
	index := a.index(t)
	one, two := a.host(t), b.host(t)
	crosses(t, one, two, frames.Stream(nil, one.MAC, 9, 1))
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 2))
	streams := []*stream{startStream(t, 1, one, two), startStream(t, 2, two, one)}
	for _, step := range []struct {
		what   string
		config string
		evpn   bool
	}{{"both", both, true}, {"EVPN", evpn, true}, {"both again", both, true}, {"unicast", unicast, false}} {
		for _, p := range tm.pods {
			p.configure(t, step.config)
		}
		for p, other := range map[*pod]*host{a: two, b: one} {
			what := fmt.Sprintf("%s: an entry of EVPN for the other pod on %s: %t", step.what, p.Name, step.evpn)
			eventually(t, what, func() bool {
				return p.hasFDBEntry(t, other.MAC) == step.evpn &&
					p.link(t, kubelan).(*netlink.Vxlan).Learning != step.evpn
			})
		}
	}
	for _, s := range streams {
		s.expectAll(t)
	}
	if now := a.index(t); now != index {
		t.Errorf("the interface has ifindex %d, it had %d", now, index)
	}
	a.awaitRemotes(t, b.ipv4)
}

// hasFDBEntry reports whether the pod's VXLAN has an entry for a MAC that it has not learned itself.
func (p *pod) hasFDBEntry(t *testing.T, mac net.HardwareAddr) bool {
	t.Helper()
	entries, err := p.Netlink(t).NeighList(p.index(t), unix.AF_BRIDGE)
	must(t, err)
	return slices.ContainsFunc(entries, func(e netlink.Neigh) bool {
		return e.Flags&netlink.NTF_EXT_LEARNED != 0 && slices.Equal(e.HardwareAddr, mac)
	})
}

// /health reports that no session is up; the first pod of a LAN is healthy without others.
func TestSidecarWithoutABGPSession(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 1)
	a := tm.pods[0]
	at := freePort()
	mine := a.settings().with(settings{
		"KL_SERVICES": "", "KUBECONFIG": "", "KL_DISCOVERY": "evpn", "KL_EVPN_AS": "65000",
		"KL_EVPN_PEERS":   fmt.Sprintf("address=%s,port=%d", reflectorAddress, at.Port()),
		"KL_STRICT_PEERS": "true",
	})
	sc := a.start(t, mine)
	a.awaitHealth(t, http.StatusInternalServerError, "no BGP session is up", reflectorAddress.String())
	sc.awaitLog(t, "level=WARN", "BGP session is down", reflectorAddress.String())
	tm.reach(t, startReflector(t, at))
	a.awaitHealth(t, http.StatusNoContent)
	sc.awaitLog(t, "level=INFO", "BGP session is up")
	sc.stop(t)
	if links := a.Links(t); !slices.Equal(links, []string{"eth1"}) {
		t.Errorf("%s still has %v", a.Name, links)
	}
}

// learned returns the MACs that the pod's VXLAN has learned from frames.
func (p *pod) learned(t *testing.T) (macs []string) {
	t.Helper()
	entries, err := p.Netlink(t).NeighList(p.index(t), unix.AF_BRIDGE)
	must(t, err)
	for _, e := range entries {
		if e.Flags&netlink.NTF_EXT_LEARNED == 0 && e.State&netlink.NUD_PERMANENT == 0 {
			macs = append(macs, e.HardwareAddr.String()+" behind "+e.IP.String())
		}
	}
	return macs
}
