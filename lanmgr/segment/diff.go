package segment

import (
	"bytes"
	"net/netip"
	"slices"
)

// Diff says what has to be done to a node so that it has the segment: deterministic, additions before deletions.
// What a pod is attached to stays, wanted or not. Links that k8slan would not name so are left alone.
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

// Teardown says how to take a segment away; the VXLAN comes first, so that its VNI is free as soon as it can be.
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

// VerifyClaims are the questions about claims that are open in a segment of which nobody knows any more what it should be.
func VerifyClaims(have State) []Op {
	d := diff{}
	for _, l := range have.Links {
		d.settle(l)
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
	alone  bool // it is but a VXLAN, which is in use

	// What is looked up for each spoke.
	links   map[string]Link  // by name
	holders map[string]Link  // by altname; a namespace has each once
	veths   map[string]Claim // of pods, by spoke
	// rebridged is set once the bridge is made anew: what was in the old one has lost its master.
	rebridged bool
	silenced  bool // IPv6 is switched off on all links
}

func newDiff(want Segment, have State) *diff {
	d := &diff{want: want, have: have, claims: have.Claims(), links: map[string]Link{}, holders: map[string]Link{}, veths: map[string]Claim{}}
	for _, l := range have.Links {
		d.links[l.Name] = l
		for _, name := range l.AltNames {
			d.holders[name] = l
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

// spokes are those that are wanted and those that are claimed: a spoke that was withdrawn stays until its pod is gone.
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
	talks := func(l Link) bool { return l.IPv6 && !(l.NoIPv6 && l.Type == "bridge" && l.Name == d.want.Bridge) }
	if !d.have.Silent || slices.ContainsFunc(d.have.Links, talks) {
		d.silenced = true
		var bridge string
		if l, ok := d.links[d.want.Bridge]; ok && l.Type == "bridge" {
			bridge = l.Name
		}
		d.do(Silence{bridge})
	}
	d.offloadAgain()
	d.groupAgain()
	if d.have.Record == nil || !d.have.Record.Equal(d.want.Recorded()) {
		d.do(WriteRecord{d.want.Recorded()})
	}
}

// offloadAgain undoes what is not wished any more; what was withdrawn stays as its pod knows it. It comes before the
// record is written anew: the old one is why the links were asked, and nothing else tells that they are not as they
// were made.
func (d *diff) offloadAgain() {
	for _, l := range d.have.Links {
		spoke, ok := l.Spoke()
		if ok && l.TxChecksum > TxChecksumOn && slices.Contains(d.want.Spokes, spoke) && !slices.Contains(d.want.TxChecksumOff, spoke) {
			d.do(SetTxChecksum{Name: l.Name, On: true})
		}
	}
}

// groupAgain has a VXLAN that stands send to its group instead of remotes one by one. It comes before the record is written
// anew, as offloadAgain does: of a VXLAN with a group the old record alone tells that it may have remotes left.
func (d *diff) groupAgain() {
	want := d.want.VXLAN
	l, ok := d.links[want.Name]
	if !ok || !want.Group.IsValid() || want.UnderlayIndex == 0 || !sameVXLAN(want, l) {
		return
	}
	if !sameEnds(want, l.VXLAN) {
		d.do(SetVXLAN{want})
	}
	if len(l.VXLAN.Remotes) > 0 {
		d.do(DelRemotes{Name: want.Name, Remotes: l.VXLAN.Remotes}) // the nodes are still there
	}
	if len(l.VXLAN.FDB) > 0 {
		d.do(DelFDB{want.Name, l.VXLAN.FDB})
	}
}

// remotes has a VXLAN without a group send what is flooded to each remote: to new ones before the group is left, and to
// those that stay throughout.
func (d *diff) remotes(l Link) {
	want := d.want.VXLAN
	if !want.Unicast() {
		return
	}
	add, del := changes(d.want.Remotes, l.VXLAN.Remotes)
	if len(add) > 0 {
		d.do(AddRemotes{want.Name, add})
	}
	if l.Index != 0 && !sameEnds(want, l.VXLAN) {
		d.do(SetVXLAN{want})
	}
	if d.want.Remotes != nil && !d.want.Partial && len(del) > 0 {
		d.do(DelRemotes{Name: want.Name, Remotes: del, Learned: !want.NoLearning})
	}
	d.fdb(l)
}

// fdb has the VXLAN and its bridge know where MACs are, and where they are not any more. While nobody is attached here, the VXLAN
// is down, and forgets such entries whenever it is set down (vxlan_stop in drivers/net/vxlan/vxlan_core.c).
func (d *diff) fdb(l Link) {
	want := d.want.FDB
	switch {
	case !d.want.VXLAN.NoLearning:
		want = []FDBEntry{} // it learns by itself
	case len(d.claims) == 0 && !d.alone:
		return
	}
	add, del := fdbChanges(want, l.VXLAN.FDB)
	if len(add) > 0 {
		d.do(SetFDB{d.want.VXLAN.Name, add})
	}
	if want != nil && !(d.want.Partial && d.want.VXLAN.NoLearning) && len(del) > 0 {
		d.do(DelFDB{d.want.VXLAN.Name, del})
	}
}

// leastIPv6 is the smallest MTU of a link with IPv6, in bytes (IPV6_MIN_MTU in include/uapi/linux/in6.h).
const leastIPv6 = 1280

// neighbors has the bridge answer for stations behind the VXLAN, or no more: then it forgets them first.
func (d *diff) neighbors(port Link, anew bool) {
	name, bridge := d.want.Bridge, Link{}
	if !d.rebridged {
		bridge = d.links[name]
	}
	suppressed, discovers := port.Suppress && !anew, bridge.IPv6 && !d.silenced
	if !d.want.VXLAN.SuppressNeighbors {
		if len(bridge.Neighbors) > 0 {
			d.do(DelNeighbors{name, bridge.Neighbors})
		}
		if suppressed {
			d.do(SetSuppress{port.Name, false})
		}
		if discovers {
			d.do(SetNeighborDiscovery{name, false})
		}
		return
	}
	if !suppressed {
		d.do(SetSuppress{port.Name, true})
	}
	want := d.want.takes(d.want.Neighbors)
	switch { // a small one gets IPv6 with its MTU
	case bridge.LacksIPv6 && bridge.MTU >= leastIPv6:
		want = onlyIPv4(want)
	case d.want.MTU >= leastIPv6 && !discovers:
		d.do(SetNeighborDiscovery{name, true})
	}
	if want == nil || len(d.claims) == 0 {
		return
	}
	have := bridge.Neighbors
	if !discovers { // it has no IPv6 ones any more
		have = onlyIPv4(have)
	}
	add, del := neighborChanges(want, have)
	if len(add) > 0 {
		d.do(AddNeighbors{name, add})
	}
	if !d.want.Partial && len(del) > 0 {
		d.do(DelNeighbors{name, del})
	}
}

// takes are the neighbours that a bridge of the segment's MTU takes.
func (s Segment) takes(neighbors []Neighbor) []Neighbor {
	if s.MTU >= leastIPv6 {
		return neighbors
	}
	return onlyIPv4(neighbors)
}

func onlyIPv4(neighbors []Neighbor) []Neighbor {
	return slices.DeleteFunc(slices.Clone(neighbors), func(n Neighbor) bool { return n.IP.Is6() })
}

// neighborChanges are the neighbours of one sorted list that the other lacks or has with another MAC, and those that only the other has.
func neighborChanges(want, have []Neighbor) (add, del []Neighbor) {
	for len(want) > 0 && len(have) > 0 {
		switch order := want[0].IP.Compare(have[0].IP); {
		case order < 0:
			add, want = append(add, want[0]), want[1:]
		case order > 0:
			del, have = append(del, have[0]), have[1:]
		default:
			if want[0] != have[0] {
				add = append(add, want[0])
			}
			want, have = want[1:], have[1:]
		}
	}
	return append(add, want...), append(del, have...)
}

// OnlyTablesDiffer says whether two wishes differ in nothing but what the VXLAN is told, of remotes and MACs, if at all.
func OnlyTablesDiffer(was, want Segment) bool {
	rest := want
	rest.Remotes, rest.FDB, rest.Neighbors = was.Remotes, was.FDB, was.Neighbors
	known := was.Remotes != nil && want.Remotes != nil && (was.FDB == nil) == (want.FDB == nil) && (was.Neighbors == nil) == (want.Neighbors == nil)
	return known && want.VXLAN.UnderlayIndex != 0 && want.VXLAN.Unicast() && rest.Equal(was)
}

// DiffTables brings what a VXLAN has been told from one wish to the next, of which OnlyTold is so. Without a claim here MACs are not told.
func DiffTables(was, want Segment, claimed bool) (ops []Op) {
	add, del := changes(want.Remotes, was.Remotes)
	var set []FDBEntry
	var gone []FDBState
	var come, leave []Neighbor
	if claimed {
		set, gone = toldChanges(want.FDB, was.FDB)
		come, leave = neighborChanges(want.takes(want.Neighbors), want.takes(was.Neighbors))
	}
	if want.Partial {
		del, gone, leave = nil, nil, nil
	}
	if len(add) > 0 {
		ops = append(ops, AddRemotes{want.VXLAN.Name, add})
	}
	if len(del) > 0 {
		ops = append(ops, DelRemotes{Name: want.VXLAN.Name, Remotes: del, Learned: !want.VXLAN.NoLearning})
	}
	if len(set) > 0 {
		ops = append(ops, SetFDB{want.VXLAN.Name, set})
	}
	if len(gone) > 0 {
		ops = append(ops, DelFDB{want.VXLAN.Name, gone})
	}
	if len(come) > 0 {
		ops = append(ops, AddNeighbors{want.Bridge, come})
	}
	if len(leave) > 0 {
		ops = append(ops, DelNeighbors{want.Bridge, leave})
	}
	return ops
}

// toldChanges are the entries of one list that the other lacks or has with another remote, and those that only the other has.
func toldChanges(want, was []FDBEntry) (set []FDBEntry, gone []FDBState) {
	for len(want) > 0 && len(was) > 0 {
		switch order := bytes.Compare(want[0].MAC[:], was[0].MAC[:]); {
		case order < 0:
			set, want = append(set, want[0]), want[1:]
		case order > 0:
			gone, was = append(gone, FDBState{was[0], true}), was[1:]
		default:
			if want[0].VTEP != was[0].VTEP || want[0].Local && !was[0].Local {
				set = append(set, want[0])
			}
			want, was = want[1:], was[1:]
		}
	}
	for _, e := range was {
		gone = append(gone, FDBState{e, true})
	}
	return append(set, want...), gone
}

// fdbChanges are the entries that the VXLAN lacks or has with another remote, and those that are not wanted. That the bridge has one on
// no port of the VXLAN's is left so, unless the wish knows of it: the MAC has shown itself here, and what is wanted may not know yet.
func fdbChanges(want []FDBEntry, have []FDBState) (add []FDBEntry, del []FDBState) {
	for len(want) > 0 || len(have) > 0 {
		order := 0
		switch {
		case len(have) == 0:
			order = -1
		case len(want) == 0:
			order = 1
		default:
			order = bytes.Compare(want[0].MAC[:], have[0].MAC[:])
		}
		switch {
		case order < 0:
			add, want = append(add, want[0]), want[1:]
		case order > 0:
			del, have = append(del, have[0]), have[1:]
		default:
			if unmapped(want[0].VTEP) != unmapped(have[0].VTEP) || want[0].Local && !have[0].Bridge {
				add = append(add, want[0])
			}
			want, have = want[1:], have[1:]
		}
	}
	return add, del
}

// changes are what one sorted list has and the other has not, and the reverse.
func changes(want, have []netip.Addr) (add, del []netip.Addr) {
	for len(want) > 0 || len(have) > 0 {
		switch {
		case len(have) == 0 || len(want) > 0 && want[0].Less(have[0]):
			add, want = append(add, want[0]), want[1:]
		case len(want) == 0 || have[0].Less(want[0]):
			del, have = append(del, have[0]), have[1:]
		default:
			want, have = want[1:], have[1:]
		}
	}
	return add, del
}

// txChecksum switches off what leaves checksums unfinished. A link of which nothing is known is not asked but set.
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
		d.rebridged = true
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
			d.do(DelLink{l.Name}) // from another life of this netns; it may hold the VNI
		}
	}
	l, ok := d.links[want.Name]
	anew := false
	switch {
	case ok && want.Unicast() && (d.want.Remotes == nil || d.want.Partial) && l.VXLAN.Group.IsValid() && want.UnderlayIndex != 0:
		// Its group stays until all remotes are known, in whose place nobody would hear what is flooded.
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
		anew = d.port(l)
		if want.NoLearning != (l.NoLearning && !anew) {
			d.do(SetLearning{want.Name, !want.NoLearning})
		}
	}
	d.remotes(l)
	d.neighbors(l, anew)
	// A LAN that nobody uses here costs the underlay nothing: a VXLAN joins its group only while it is up.
	d.settings(l, d.want.MTU, len(d.claims) > 0)
}

// spoke brings a spoke's standing pair in order, and the claim link of the pod that is attached.
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
	if l, ok := d.holders[spoke]; ok && l.Name != carrier.Name {
		d.do(DelAltName{l.Name, spoke})
	}
	if !carrier.answersTo(spoke) {
		d.do(AddAltName{carrier.Name, spoke})
	}
	d.settings(plug, d.want.MTU, true)
	d.settings(port, PortMTU(d.want.MTU), carrier.Name == port.Name)
	d.settle(plug)
}

// onDemand brings the link of a claim in order that has no standing pair behind it.
func (d *diff) onDemand(spoke string) {
	claim, ok := d.vethClaim(spoke)
	if !ok {
		return
	}
	if !claim.answersTo(spoke) {
		d.do(AddAltName{claim.Name, spoke})
	}
	d.port(claim)
	d.settings(claim, d.want.MTU, true)
}

// vethClaim is the link by which a pod is attached to the spoke.
func (d *diff) vethClaim(spoke string) (Link, bool) {
	l, ok := d.links[d.veths[spoke].ID]
	return l, ok
}

// settle looks after a claim whose macvtap may be gone: while it is up it keeps its plug promiscuous
// (macvlan_open in drivers/net/macvlan.c), but one that a pod has set down does not.
func (d *diff) settle(plug Link) {
	if c, ok := plug.claim(); ok && plug.Promisc == 0 {
		d.do(VerifyClaim{Spoke: c.Spoke, ClaimID: c.ID})
	}
}

// port puts a link into the bridge with the mask that lets link-local frames through, and says whether it has been put in anew.
func (d *diff) port(l Link) (anew bool) {
	bridge, ok := d.links[d.want.Bridge]
	if d.rebridged || !ok || l.Master != bridge.Index {
		d.do(SetMaster{l.Name, d.want.Bridge}, SetForwardMask{l.Name}) // a port that is put in anew has lost its mask
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

// leftovers deletes what nobody wants or has: pairs of spokes that are gone, and claim links whose attach never finished.
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
			stays[spoke] = true // its other end goes with it
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
