package segment

import "slices"

// Diff returns the operations that give a node the segment, always in the same order, additions before deletions. A
// spoke with a claim stays, wanted or not. Links with names that k8slan does not use stay as they are.
func Diff(want Segment, have State) []Op {
	d := newDiff(want, have)
	d.namespace()
	d.bridge()
	d.vxlan()
	for _, spoke := range d.spokes() {
		d.spoke(spoke)
	}
	d.leftovers()
	return d.ops
}

// Teardown returns the operations that remove a segment. The VXLAN comes first, so that its VNI is free early.
func Teardown(have State) []Op {
	var ops []Op
	for _, l := range have.Links {
		if l.Type == "vxlan" {
			ops = append(ops, DelLink{l.Name})
		}
	}
	if slices.ContainsFunc(have.Links, isSpokeLink) {
		ops = append(ops, DelPairs{})
	}
	for _, l := range have.Links {
		if l.Type == "bridge" {
			ops = append(ops, DelLink{l.Name})
		}
	}
	if have.Record != nil {
		ops = append(ops, RemoveRecord{have.Netns})
	}
	if have.Exists || have.LostName || have.StaleName {
		ops = append(ops, RemoveNetns{have.Netns})
	}
	return ops
}

// VerifyClaims returns the operations that verify the claims of a segment whose desired state is not known.
func VerifyClaims(have State) []Op {
	d := diff{}
	for _, l := range have.Links {
		d.verifyClaim(l)
	}
	return d.ops
}

func isSpokeLink(l Link) bool {
	_, _, pair := spokeOf(l.Name)
	return pair || IsClaimID(l.Name)
}

type diff struct {
	want   Segment
	have   State
	claims []Claim
	ops    []Op
	inPod  bool // the segment is a PodVXLAN: it has no bridge, and is in use without a claim

	links     map[string]Link  // by name
	byAltName map[string]Link  // a namespace has each altname once
	veths     map[string]Claim // of pods, by spoke

	newBridge bool // ops create the bridge: ports of an earlier one have no master any longer
	silenced  bool // ops switch IPv6 off on all links
}

func newDiff(want Segment, have State) *diff {
	d := &diff{
		want: want, have: have, claims: have.Claims(),
		links: map[string]Link{}, byAltName: map[string]Link{}, veths: map[string]Claim{},
	}
	for _, l := range have.Links {
		d.links[l.Name] = l
		for _, name := range l.AltNames {
			d.byAltName[name] = l
		}
	}
	for _, c := range slices.Backward(d.claims) {
		if c.Kind == Veth {
			d.veths[c.Spoke] = c
		}
	}
	return d
}

func (d *diff) do(ops ...Op) { d.ops = append(d.ops, ops...) }

// spokes returns the spokes that are wanted or claimed: one that is no longer wanted stays until its claim ends.
func (d *diff) spokes() []string {
	spokes := slices.Clone(d.want.Spokes)
	for _, c := range d.claims {
		spokes = append(spokes, c.Spoke)
	}
	slices.Sort(spokes)
	return slices.Compact(spokes)
}

func (d *diff) namespace() {
	switch {
	case d.have.Exists:
	case d.have.LostName:
		d.do(RestoreNetns{d.want.Netns})
	default:
		d.do(CreateNetns{d.want.Netns})
	}
	// The bridge may have IPv6 on for neighbor discovery, but no address.
	sends := func(l Link) bool { return l.IPv6 && !(l.NoIPv6 && l.Type == "bridge" && l.Name == d.want.Bridge) }
	if !d.have.Silent || slices.ContainsFunc(d.have.Links, sends) {
		d.silenced = true
		var bridge string
		if l, ok := d.links[d.want.Bridge]; ok && l.Type == "bridge" {
			bridge = l.Name
		}
		d.do(Silence{bridge})
	}
	// These two come before the record: they depend on the old one, which shows what they have to undo.
	d.restoreOffload()
	d.restoreGroup()
	if d.have.Record == nil || !d.have.Record.Equal(d.want.Recorded()) {
		d.do(WriteRecord{d.want.Recorded()})
	}
}

// restoreOffload leaves checksums to hardware again on spokes that no longer want them complete. A spoke that is no
// longer wanted stays as its pod knows it. The setting of a link is read only if the record has its spoke.
func (d *diff) restoreOffload() {
	for _, l := range d.have.Links {
		spoke, ok := l.Spoke()
		if ok && l.TxChecksum > TxChecksumOn &&
			slices.Contains(d.want.Spokes, spoke) && !slices.Contains(d.want.TxChecksumOff, spoke) {
			d.do(SetTxChecksum{Name: l.Name, On: true})
		}
	}
}

// restoreGroup changes a VXLAN with remotes to one with a group. The remotes of a VXLAN that has a group already,
// because this was interrupted, are read only while the record has none.
func (d *diff) restoreGroup() {
	want := d.want.VXLAN
	l, ok := d.links[want.Name]
	if !ok || !want.Group.IsValid() || want.UnderlayIndex == 0 || !sameVXLAN(want, l) {
		return
	}
	if !sameEnds(want, l.VXLAN) {
		d.do(SetVXLAN{want})
	}
	if len(l.VXLAN.Remotes) > 0 {
		d.do(DelRemotes{Name: want.Name, Remotes: l.VXLAN.Remotes}) // what it learned behind them stays right
	}
	if len(l.VXLAN.FDB) > 0 {
		d.do(DelFDB{want.Name, l.VXLAN.FDB})
	}
}

// txChecksum has checksums completed before frames leave by the links of a spoke. A link whose setting is not known is
// set, not read.
func (d *diff) txChecksum(spoke string, links ...Link) {
	if !slices.Contains(d.want.TxChecksumOff, spoke) {
		return
	}
	for _, l := range links {
		if l.TxChecksum != TxChecksumOff {
			d.do(SetTxChecksum{Name: l.Name})
		}
	}
}

func (d *diff) bridge() {
	name := d.want.Bridge
	l, ok := d.links[name]
	if ok && l.Type != "bridge" {
		d.do(DelLink{name})
		ok = false
	}
	if !ok {
		d.do(AddBridge{Name: name, MTU: d.want.MTU})
		d.newBridge = true
		return
	}
	if l.Bridge != (BridgeState{}) {
		d.do(SetBridge{Name: name, Off: l.Bridge})
	}
	d.settings(l, d.want.MTU, true)
}

func (d *diff) vxlan() {
	want := d.want.VXLAN
	for _, l := range d.have.Links {
		if l.Type == "vxlan" && l.Name != want.Name {
			d.do(DelLink{l.Name}) // of an earlier LAN in this netns; it may occupy the VNI
		}
	}
	l, ok := d.links[want.Name]
	isNewPort := false
	known := d.want.Remotes != nil && !d.want.Partial
	switch {
	case ok && want.Unicast() && !known && l.VXLAN.Group.IsValid() && want.UnderlayIndex != 0:
		// The group stays until all remotes are known: the others would not receive flooded frames.
		d.neighbors(l, d.port(l))
		d.settings(l, d.want.MTU, len(d.claims) > 0)
		return
	case want.UnderlayIndex == 0:
		if ok {
			d.do(DelLink{want.Name})
		}
		return
	case !ok || !sameVXLAN(want, l):
		if ok {
			d.do(DelLink{want.Name})
		}
		d.do(AddVXLAN{VXLAN: want, MTU: d.want.MTU, Bridge: d.want.Bridge})
		l = Link{Name: want.Name, MTU: d.want.MTU, ForwardMask: ForwardMask}
	default:
		isNewPort = d.port(l)
		if want.NoLearning != (l.NoLearning && !isNewPort) {
			d.do(SetLearning{want.Name, !want.NoLearning})
		}
	}
	d.remotes(l)
	d.neighbors(l, isNewPort)
	// A LAN without claims on this node costs the underlay nothing: a VXLAN joins its group only while it is up.
	d.settings(l, d.want.MTU, len(d.claims) > 0)
}

// spoke repairs a spoke's standing pair, and the veth of a pod on it.
func (d *diff) spoke(spoke string) {
	if IsOnDemand(spoke) {
		d.onDemand(spoke)
		return
	}
	port, havePort := d.links[PortName(spoke)]
	plug, havePlug := d.links[PlugName(spoke)]
	if !havePort || !havePlug {
		if havePort {
			d.do(DelLink{port.Name})
		}
		if havePlug {
			d.do(DelLink{plug.Name})
		}
		port = Link{Name: PortName(spoke), MTU: PortMTU(d.want.MTU), Up: true, ForwardMask: ForwardMask}
		plug = Link{Name: PlugName(spoke), MTU: d.want.MTU, Up: true}
		d.do(AddPair{Spoke: spoke, MAC: d.want.PlugMAC(spoke), MTU: d.want.MTU, Bridge: d.want.Bridge})
	} else {
		d.port(port)
	}
	d.txChecksum(spoke, port, plug)
	carrier := port
	if claim, ok := d.vethClaim(spoke); ok {
		carrier = claim
		d.txChecksum(spoke, claim)
		d.port(claim)
		d.settings(claim, d.want.MTU, true)
	}
	if l, ok := d.byAltName[spoke]; ok && l.Name != carrier.Name {
		d.do(DelAltName{l.Name, spoke})
	}
	if !carrier.hasName(spoke) {
		d.do(AddAltName{carrier.Name, spoke})
	}
	d.settings(plug, d.want.MTU, true)
	d.settings(port, PortMTU(d.want.MTU), carrier.Name == port.Name)
	d.verifyClaim(plug)
}

// onDemand repairs the veth of a claim whose spoke has no standing pair.
func (d *diff) onDemand(spoke string) {
	claim, ok := d.vethClaim(spoke)
	if !ok {
		return
	}
	if !claim.hasName(spoke) {
		d.do(AddAltName{claim.Name, spoke})
	}
	d.port(claim)
	d.settings(claim, d.want.MTU, true)
}

// vethClaim returns the veth of the pod on a spoke.
func (d *diff) vethClaim(spoke string) (Link, bool) {
	l, ok := d.links[d.veths[spoke].ID]
	return l, ok
}

// verifyClaim verifies a claim whose macvtap may be gone. A macvtap that is up keeps its plug promiscuous (macvlan_open
// in drivers/net/macvlan.c), but one that its pod has set down does not.
func (d *diff) verifyClaim(plug Link) {
	if c, ok := plug.claim(); ok && plug.Promisc == 0 {
		d.do(VerifyClaim{Spoke: c.Spoke, ClaimID: c.ID})
	}
}

// port makes a link a port of the bridge with the mask that forwards link-local frames. It reports whether the link
// becomes a port, with default settings, by that.
func (d *diff) port(l Link) (isNew bool) {
	bridge, ok := d.links[d.want.Bridge]
	if d.newBridge || !ok || l.Master != bridge.Index {
		d.do(SetMaster{l.Name, d.want.Bridge}, SetForwardMask{l.Name})
		return true
	}
	if l.ForwardMask != ForwardMask {
		d.do(SetForwardMask{l.Name})
	}
	return false
}

func (d *diff) settings(l Link, mtu int, up bool) {
	if l.MTU != mtu {
		d.do(SetMTU{l.Name, mtu})
	}
	switch {
	case up && !l.Up:
		d.do(SetUp{l.Name})
	case !up && l.Up:
		d.do(SetDown{l.Name})
	}
}

// leftovers deletes the standing pairs of spokes that are neither wanted nor claimed, and veths of unfinished attaches.
func (d *diff) leftovers() {
	stays := map[string]bool{} // spokes and claims
	for _, spoke := range d.spokes() {
		stays[spoke] = true
	}
	for _, c := range d.claims {
		stays[c.ID] = true
	}
	var left []string
	for _, l := range d.have.Links {
		if IsClaimID(l.Name) && l.Type == "veth" {
			if !stays[l.Name] {
				left = append(left, l.Name)
			}
			continue
		}
		if spoke, _, ok := spokeOf(l.Name); ok && !stays[spoke] {
			stays[spoke] = true // deleting one end of the pair deletes the other
			left = append(left, l.Name)
		}
	}
	switch len(left) {
	case 0:
	case 1:
		d.do(DelLink{left[0]})
	default:
		d.do(DelLinks{left})
	}
}
