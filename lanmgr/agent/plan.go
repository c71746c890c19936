package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

const (
	hostnameLabel = "kubernetes.io/hostname"

	// fallbackMTU is that of an underlay nobody knows: Ethernet's.
	fallbackMTU = 1500
	// minMTU is the smallest that a link takes (ETH_MIN_MTU in include/uapi/linux/if_ether.h).
	minMTU = 68
)

// Node is what a plan needs to know of the node.
type Node struct {
	Name      string
	Labels    map[string]string
	Underlays kernel.Underlays
	Addresses []netip.Addr   // by which the cluster knows the node: its InternalIPs
	VTEPs     []netip.Prefix // ranges in which VTEPs are; empty: anywhere
	EVPN      bool           // the daemon speaks BGP
}

// Plan is a LAN as this node should have it.
type Plan struct {
	Segment segment.Segment
	VTEP    netip.Addr // the node's address on the underlay; the zero Addr if it has none
	Unicast bool       // the segment's Remotes are the other nodes, as their LANNodes tell
	Strict  bool       // VXLAN packets of others than the LAN's nodes are to be dropped
	EVPN    bool       // its Remotes and FDB are what other routers tell
	Problem Problem
}

// Problem is what keeps a LAN on this node from working well. The zero value is no problem.
type Problem struct {
	Reason   string // one of the reasons of v1beta1
	Message  string // what is wrong and the way out
	Blocking bool   // pods wait
}

// NewPlan decides what the node should have of a LAN; ok is false if that is nothing. A LAN that cannot reach other
// nodes is planned without its VXLAN, so that what is attached to it goes on within the node. now is what the LAN has on the
// node, or had before this daemon started, zero if it isn't there: a LAN whose underlay is lost keeps its MTU, and one that the underlay cannot
// carry as it is wanted any more stays as it is, for what is attached.
func NewPlan(lan *v1beta1.LAN, node Node, now segment.Segment) (p Plan, ok bool) {
	if lan.Status.Holds == nil || !lan.DeletionTimestamp.IsZero() || !selects(lan.Spec.NodeSelector, node.Labels) {
		return Plan{}, false
	}
	spec, holds := lan.Effective(), lan.Status.Holds
	p.Segment = segment.Segment{
		LAN:               segment.LAN{Namespace: lan.Namespace, Name: lan.Name, UID: string(lan.UID)},
		Generation:        lan.Generation,
		Netns:             holds.NS,
		Bridge:            spec.Bridge,
		Spokes:            ports(&spec, held(spec.SpokesAndPools(), holds.Spokes)),
		TxChecksumOff:     ports(&spec, held(spec.TxChecksumOff(), holds.Spokes)),
		MACByOrdinal:      held(poolsByOrdinal(spec.SpokePools), holds.Spokes),
		AllowedNamespaces: slices.Sorted(slices.Values(spec.AllowedNamespaces)),
		VXLAN:             segment.VXLAN{Name: spec.VXLAN, VNI: uint32(holds.VNI), Port: uint16(holds.Port)},
	}
	if len(spec.SpokePools) > 0 {
		p.Segment.Node = node.Name
	}
	if e := spec.EVPN; e != nil {
		p.Segment.Routes = segment.Routes{Import: texts(e.ImportTargets), Export: texts(e.ExportTargets), RD: uint16(e.RD)}
	}
	discovery := lan.DiscoveryOr(holds.Discovery)
	p.Unicast, p.EVPN, p.Strict = discovery == v1beta1.Unicast, discovery == v1beta1.EVPN, lan.Spec.Strict(discovery)
	oneByOne := p.Unicast || p.EVPN // remotes have addresses, there is no group
	p.Segment.VXLAN.NoLearning = p.EVPN
	p.Segment.VXLAN.SuppressNeighbors = p.EVPN && spec.EVPN != nil && spec.EVPN.SuppressNeighbors
	group, err := netip.ParseAddr(spec.VXLANGroup)
	if err != nil || !group.IsMulticast() {
		p.Segment.MTU = firstPositive(int(spec.MTU), now.MTU, fallbackMTU-overhead6.doubleTagged)
		p.Problem = Problem{v1beta1.ReasonBuildFailed, fmt.Sprintf("spec.vxlanGrp: %q is not a multicast address; pods wait until it is", spec.VXLANGroup), true}
		return p, true
	}

	family := group
	if oneByOne && lan.Spec.VXLANGroup == "" {
		family = netip.Addr{} // the default group names none
	}
	wish := selectVTEP(node, oneByOne, family)
	choice := chooseUnderlay(&spec, node, wish, now.VXLAN)
	p.Segment.VXLAN.Underlay = choice.name
	device, found := node.Underlays.Devices[choice.name]
	noAddress := addressProblem(choice.name, device, group)
	switch {
	case oneByOne:
		p.VTEP = wish.choose(device, now.VXLAN)
		p.Segment.VXLAN.Local = p.VTEP
		noAddress = wish.problem(choice.name, device, p.VTEP, discovery)
	case group.Is4():
		p.Segment.VXLAN.Group, p.VTEP = group, device.IPv4
	default:
		p.Segment.VXLAN.Group, p.VTEP = group, device.IPv6
		if source := keptSource(device, now.VXLAN); source.IsValid() {
			p.Segment.VXLAN.Local, p.VTEP = source, source
		}
	}
	overhead := overhead6
	if p.Segment.VXLAN.Group.Is4() || p.VTEP.Is4() {
		overhead = overhead4
	}
	p.Segment.MTU = firstPositive(int(spec.MTU), device.MTU-overhead.doubleTagged)
	switch {
	case !found:
		p.Problem = choice.missing(node.Name, wish)
	default:
		p.Problem = firstProblem(
			noBGPProblem(p.EVPN && !node.EVPN),
			targetProblem(p.Segment.Routes),
			noAddress,
			mtuProblem(choice.name, device, int(spec.MTU), overhead),
			linkProblem(choice.name, device))
	}
	there := p.Segment.VXLAN
	there.UnderlayIndex = device.Index
	switch {
	case !p.Problem.Blocking:
		p.Segment.VXLAN = there
	case device.Index != 0 && now.VXLAN.UnderlayIndex == device.Index && now.VXLAN.Name == there.Name && now.VXLAN.VNI == there.VNI && now.VXLAN.Port == there.Port:
		p.Segment.VXLAN, p.Segment.MTU = now.VXLAN, now.MTU
	default:
		p.Segment.MTU = firstPositive(int(spec.MTU), now.MTU, fallbackMTU-overhead.doubleTagged)
	}
	return p, true
}

func selects(selector map[string]v1beta1.LabelValue, nodeLabels map[string]string) bool {
	set := make(labels.Set, len(selector))
	for key, value := range selector {
		set[key] = string(value)
	}
	return set.AsSelector().Matches(labels.Set(nodeLabels))
}

// held are the names that are both asked for and held, sorted.
func held(asked, holds []string) []string {
	isHeld := make(map[string]bool, len(holds))
	for _, spoke := range holds {
		isHeld[spoke] = true
	}
	spokes := slices.DeleteFunc(slices.Clone(asked), func(spoke string) bool { return !isHeld[spoke] })
	slices.Sort(spokes)
	return spokes
}

// ports puts the ports of a pool in the place of its name, sorted.
func ports(spec *v1beta1.LANSpec, names []string) []string {
	spokes := slices.Clone(names[:0])
	for _, name := range names {
		pool, ok := spec.Pool(name)
		if !ok {
			spokes = append(spokes, name)
		}
		for number := range int(pool.Size) {
			spokes = append(spokes, segment.Port(name, number))
		}
	}
	slices.Sort(spokes)
	return spokes
}

// texts are route targets as they are written, sorted.
func texts(targets []v1beta1.RouteTarget) (list []string) {
	for _, t := range targets {
		list = append(list, string(t))
	}
	slices.Sort(list)
	return list
}

// poolsByOrdinal are the pools whose pods have MACs by their ordinals.
func poolsByOrdinal(pools []v1beta1.SpokePool) []string {
	var names []string
	for _, pool := range pools {
		if pool.MACBy == v1beta1.MACByOrdinal {
			names = append(names, pool.Name)
		}
	}
	return names
}

// firstPositive is the first number above zero.
func firstPositive(numbers ...int) int {
	for _, n := range numbers {
		if n > 0 {
			return n
		}
	}
	return 0
}

// underlayChoice is a device and what in the spec chose it.
type underlayChoice struct{ name, field string }

// chooseUnderlay takes the node's own device if the LAN has one for it, else the LAN's default, else one with a VTEP as it is wished for,
// else the device of the default route.
func chooseUnderlay(spec *v1beta1.LANSpec, node Node, wish vtepSelector, now segment.VXLAN) underlayChoice {
	for _, key := range []string{node.Name, node.Labels[hostnameLabel]} {
		if device, ok := spec.VXLANDevMap[key]; ok && key != "" {
			return underlayChoice{string(device), "spec.vxlanDevMap." + key}
		}
	}
	if spec.DefaultVXLANDev != "" {
		return underlayChoice{string(spec.DefaultVXLANDev), "spec.defaultVxlanDev"}
	}
	best, name := len(wish.prefer), ""
	for _, device := range slices.Sorted(maps.Keys(node.Underlays.Devices)) {
		if rank := wish.rank(wish.choose(node.Underlays.Devices[device], now)); rank < best {
			best, name = rank, device
		}
	}
	if name == "" && !wish.strict {
		name = node.Underlays.Default
	}
	return underlayChoice{name: name}
}

func (c underlayChoice) missing(node string, wish vtepSelector) Problem {
	switch {
	case c.field == "" && wish.strict:
		return Problem{v1beta1.ReasonUnderlayMissing, fmt.Sprintf(
			"no device has an address in %s (vtepCIDRs of k8slan's chart). Give one such an address, or name a device in spec.defaultVxlanDev or spec.vxlanDevMap.%s; pods wait until then", wish, node), true}
	case c.field == "":
		return Problem{v1beta1.ReasonUnderlayMissing, fmt.Sprintf(
			"no default route, and the LAN names no device for this node. Set spec.defaultVxlanDev or spec.vxlanDevMap.%s; pods wait until then", node), true}
	}
	return Problem{v1beta1.ReasonUnderlayMissing, fmt.Sprintf("no device %q (%s). Create it, or change %s; pods wait until then", c.name, c.field, c.field), true}
}

// overhead is what a VXLAN adds to a packet of the LAN, in bytes.
type overhead struct {
	untagged     int // inner Ethernet, VXLAN, UDP and IP
	doubleTagged int // the same with two VLAN tags in the inner Ethernet header
}

var (
	overhead4 = overhead{untagged: 50, doubleTagged: segment.Overhead4}
	overhead6 = overhead{untagged: 70, doubleTagged: segment.Overhead6}
)

func firstProblem(problems ...Problem) Problem {
	for _, p := range problems {
		if p.Reason != "" {
			return p
		}
	}
	return Problem{}
}

// addressProblem looks for an address of the group's family. A device that is down or has no carrier has no IPv6
// address, or none yet; that is linkProblem's to tell.
func addressProblem(name string, device kernel.Underlay, group netip.Addr) Problem {
	switch {
	case group.Is4() && !device.IPv4.IsValid():
		return Problem{v1beta1.ReasonUnderlayNoAddress, fmt.Sprintf(
			"device %q has no IPv4 address, which the group %s needs. Give it one, or choose an IPv6 group in spec.vxlanGrp; pods wait until then", name, group), true}
	case group.Is4():
		return Problem{}
	case device.IPv6Off:
		return Problem{v1beta1.ReasonUnderlayNoAddress, fmt.Sprintf(
			"IPv6 is switched off on device %q, and the group %s needs it. Set net.ipv6.conf.%s.disable_ipv6=0, or choose an IPv4 group in spec.vxlanGrp; pods wait until then", name, group, name), true}
	case !device.IPv6.IsValid() && device.Up && device.Carrier:
		return Problem{v1beta1.ReasonUnderlayNoAddress, fmt.Sprintf(
			"device %q has no IPv6 address, which the group %s needs; a link-local one is enough. Give it one, or choose an IPv4 group in spec.vxlanGrp; pods wait until then", name, group), true}
	}
	return Problem{}
}

// vtepSelector is which of a device's addresses other nodes are to send to.
type vtepSelector struct {
	family netip.Addr     // the group's, whose IP version it has to be; the zero Addr: either
	prefer []netip.Prefix // the earlier the better
	strict bool           // no others will do
}

// selectVTEP goes by the ranges that the cluster's VTEPs are in or, in unicast, by the node's InternalIPs. Ranges decide the IP version by
// themselves.
func selectVTEP(node Node, unicast bool, family netip.Addr) vtepSelector {
	if len(node.VTEPs) > 0 {
		return vtepSelector{prefer: node.VTEPs, strict: true}
	}
	wish := vtepSelector{family: family}
	for _, a := range node.Addresses {
		if unicast && wish.fits(a) {
			wish.prefer = append(wish.prefer, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return wish
}

// candidates are the addresses of a device that other nodes could send to. A link-local one will not do: nobody but the kernel can say
// by which device to send to it. A device without link has lost its IPv6 addresses, and asks whether others have them when it is back:
// the node keeps the one that it had while there is no other of that family.
func candidates(device kernel.Underlay, now segment.VXLAN) []netip.Addr {
	had := now.Local.IsValid() && device.Index != 0 && now.UnderlayIndex == device.Index
	if had && !slices.ContainsFunc(device.Addresses, func(a netip.Addr) bool { return a.Is4() == now.Local.Is4() }) {
		return append(slices.Clone(device.Addresses), now.Local)
	}
	return device.Addresses
}

// keptSource is the source that a VXLAN over IPv6 had in unicast, which it keeps with a group. Without one its source would be the device's
// link-local address, and to that the others could not send: they learn that a MAC has moved to another address, but not by
// which device a link-local one is reached (vxlan_snoop in drivers/net/vxlan/vxlan_core.c).
func keptSource(device kernel.Underlay, now segment.VXLAN) netip.Addr {
	if now.Local.Is6() && now.UnderlayIndex == device.Index && slices.Contains(candidates(device, now), now.Local) {
		return now.Local
	}
	return netip.Addr{}
}

func (w vtepSelector) fits(a netip.Addr) bool {
	return !w.family.IsValid() || w.family.Is4() == a.Is4()
}

// rank is the place of the range that the address is in; their number if it is in none.
func (w vtepSelector) rank(a netip.Addr) int {
	if i := slices.IndexFunc(w.prefer, func(p netip.Prefix) bool { return p.Contains(a) }); i >= 0 {
		return i
	}
	return len(w.prefer)
}

// choose is the best address: of the first range that has one, else, unless that is all that will do, any; IPv4 before IPv6, and
// then the one that the node had before the first: the kernel lists a new IPv6 address before the others.
func (w vtepSelector) choose(device kernel.Underlay, now segment.VXLAN) (best netip.Addr) {
	better := func(a, b netip.Addr) bool {
		switch {
		case !b.IsValid() || w.rank(a) != w.rank(b):
			return !b.IsValid() || w.rank(a) < w.rank(b)
		case a.Is4() != b.Is4():
			return a.Is4()
		}
		return a == now.Local
	}
	for _, a := range candidates(device, now) {
		if w.fits(a) && !(w.strict && w.rank(a) == len(w.prefer)) && better(a, best) {
			best = a
		}
	}
	return best
}

// String lists the ranges.
func (w vtepSelector) String() string {
	var ranges []string
	for _, p := range w.prefer {
		ranges = append(ranges, p.String())
	}
	return strings.Join(ranges, ", ")
}

func (w vtepSelector) problem(name string, device kernel.Underlay, vtep netip.Addr, discovery v1beta1.Discovery) Problem {
	kind, wayOut := "no IPv4 or IPv6 address", ""
	switch {
	case vtep.IsValid() && device.Up && device.Carrier && !slices.Contains(device.Addresses, vtep) && !slices.Contains(device.Sources, vtep):
		return Problem{v1beta1.ReasonUnderlayNoAddress, fmt.Sprintf(
			"device %q has lost its address %s: frames reach no other node. Give it back, or another", name, vtep), false}
	case vtep.IsValid():
		return Problem{}
	case w.strict:
		kind, wayOut = "no address in "+w.String()+" (vtepCIDRs of k8slan's chart)", ", or change those ranges"
	case w.family.IsValid():
		kind, wayOut = "no IPv6 address", ", or leave spec.vxlanGrp out, whose family nodes use"
		if w.family.Is4() {
			kind = "no IPv4 address"
		}
	}
	return Problem{v1beta1.ReasonUnderlayNoAddress, fmt.Sprintf(
		"device %q has %s that other nodes could send to, which discovery %s needs; a link-local one will not do. Give it one%s; pods wait until then",
		name, kind, discovery, wayOut), true}
}

// noBGPProblem is that of a LAN that needs BGP on a node that does not speak it.
func noBGPProblem(mute bool) Problem {
	if !mute {
		return Problem{}
	}
	return Problem{v1beta1.ReasonBuildFailed, "discovery evpn needs BGP, and the daemon was started without it. Set evpn.enabled in k8slan's chart (--evpn-as of the daemon), or choose another spec.discovery; pods wait until then", true}
}

// targetProblem is that of a route target that the API server should not have taken.
func targetProblem(r segment.Routes) Problem {
	for _, t := range slices.Concat(r.Import, r.Export) {
		if _, err := macvrf.ParseTarget(t); err != nil {
			return Problem{v1beta1.ReasonBuildFailed, "spec.evpn: " + err.Error() + "; pods wait until it is", true}
		}
	}
	return Problem{}
}

func mtuProblem(name string, device kernel.Underlay, mtu int, o overhead) Problem {
	if mtu == 0 && device.MTU-o.doubleTagged < minMTU {
		return Problem{v1beta1.ReasonMTUTooLarge, fmt.Sprintf(
			"device %q has MTU %d, too little for a VXLAN. Raise it to %d at least; pods wait until then", name, device.MTU, minMTU+o.doubleTagged), true}
	}
	if mtu+o.untagged > device.MTU {
		return Problem{v1beta1.ReasonMTUTooLarge, fmt.Sprintf(
			"spec.mtu %d and %d bytes of VXLAN do not fit device %q with MTU %d. Lower spec.mtu to %d (%d if frames bear two VLAN tags), or raise the device's MTU; pods wait until then",
			mtu, o.untagged, name, device.MTU, device.MTU-o.untagged, device.MTU-o.doubleTagged), true}
	}
	return Problem{}
}

func firewallProblem(err error) Problem {
	return Problem{v1beta1.ReasonNonMembersAccepted, err.Error() +
		": whoever sends VXLAN packets to the node is heard in the LAN. Have the node load the kernel module nf_tables, or say spec.strictPeers: false to do without", false}
}

// StrictLANs are the LANs of the node that hear their members alone. What of a LAN is leaving, or not known to be wanted yet, keeps the
// members that it has. now is what the node has, by netns.
func StrictLANs(plans []Plan, now map[string]segment.Segment, members func(types.UID) []netip.Addr) []firewall.LAN {
	type number struct {
		port uint16
		vni  uint32
	}
	taken := map[number]bool{}
	var lans []firewall.LAN
	for _, p := range plans {
		vxlan := p.Segment.VXLAN
		taken[number{vxlan.Port, vxlan.VNI}] = true
		if p.Strict {
			lans = append(lans, firewall.LAN{
				Name: p.Segment.LAN.String(), Port: vxlan.Port, VNI: vxlan.VNI, Members: members(types.UID(p.Segment.LAN.UID)),
			})
		}
	}
	for _, netns := range slices.Sorted(maps.Keys(now)) {
		s := now[netns]
		if vxlan := s.VXLAN; vxlan.VNI != 0 && !taken[number{vxlan.Port, vxlan.VNI}] {
			lans = append(lans, firewall.LAN{Name: s.LAN.String(), Port: vxlan.Port, VNI: vxlan.VNI})
		}
	}
	return lans
}

func linkProblem(name string, device kernel.Underlay) Problem {
	switch {
	case !device.Up:
		return Problem{v1beta1.ReasonUnderlayDown, fmt.Sprintf("device %q is down: frames reach no other node. Set it up", name), false}
	case !device.Carrier:
		return Problem{v1beta1.ReasonUnderlayDown, fmt.Sprintf("device %q has no carrier: frames reach no other node. Look at its cable or peer", name), false}
	}
	return Problem{}
}
