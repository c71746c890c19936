package kernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Errors of a claim, beside ErrNoLAN.
var (
	ErrNoSpoke     = errors.New("the LAN has no such spoke")
	ErrNameTaken   = errors.New("the pod already has an interface of that name")
	ErrSameSandbox = errors.New("this pod is attached to the spoke already")
)

// ClaimRequest asks for a spoke, for one interface of one pod.
type ClaimRequest struct {
	Netns, Spoke string
	Kind         segment.Kind
	Sandbox      string // container ID
	Interface    string // name in the pod
	PodNetns     string // path

	PodNamespace, Pod, PodUID string // for people

	Network string // segment.NetworkMark of the CNI network, where the spoke is made on demand; else empty

	MAC         net.HardwareAddr // nil: what segment.Segment.PodMAC derives
	MTU         int              // bytes; 0: the LAN's
	Promiscuous bool             // of the link in the pod

	// Admit may refuse the pod by the LAN's record, which nobody changes until the claim is made; nil refuses nobody.
	Admit func(segment.Segment) error

	// Make says what to build where the LAN is not on the node; nil: that is ErrNoLAN.
	Make func(context.Context) (segment.Segment, error)
}

// suits says whether the pod may have the spoke of that LAN, and fills in what was not asked for.
func (r *ClaimRequest) suits(want segment.Segment) error {
	if r.Admit != nil {
		if err := r.Admit(want); err != nil {
			return err
		}
	}
	if !segment.IsOnDemand(r.Spoke) && !slices.Contains(want.Spokes, r.Spoke) {
		return fmt.Errorf("%w: %q", ErrNoSpoke, r.Spoke)
	}
	return r.complete(want)
}

// complete fills in what was not asked for.
func (r *ClaimRequest) complete(want segment.Segment) (err error) {
	if r.MAC == nil {
		if r.MAC, err = want.PodMAC(r.Spoke, r.Pod); err != nil {
			return err
		}
	}
	if r.MTU == 0 {
		r.MTU = want.MTU
	}
	return nil
}

// ID is the claim's ID.
func (r ClaimRequest) ID() string { return segment.ClaimID(r.Sandbox, r.Interface) }

// Attachment is what a claim gave the pod.
type Attachment struct {
	ClaimID       string
	MAC           net.HardwareAddr
	MTU           int
	Index         int    // ifindex in the pod
	HostInterface string // the link in the LAN's netns that the pod's hangs on
	TookOver      bool   // another sandbox had the spoke until then
	TapMajor      uint32 // of a macvtap's character device
	TapMinor      uint32
}

// Claim takes a spoke for a pod: it makes the pod's link, in place, and sets the LAN's VXLAN up. Whoever has the
// spoke already loses it, for kubelet gave it to this pod. Nothing is left of a claim that fails.
func (n *Node) Claim(ctx context.Context, r ClaimRequest) (Attachment, error) {
	if err := checkName(r.Netns); err != nil {
		return Attachment{}, err
	}
	unlock, err := n.lock(ctx, r.Netns)
	if err != nil {
		return Attachment{}, err
	}
	defer unlock()
	want, err := n.Record(r.Netns)
	absent := errors.Is(err, ErrNoLAN)
	if absent && r.Make != nil {
		want, err = r.Make(ctx)
	}
	if err == nil {
		err = r.suits(want)
	}
	if err != nil && absent { // of what isn't there, the lock shall not stay either
		err = errors.Join(err, removeFile(n.lockPath(r.Netns)))
	}
	if err != nil {
		return Attachment{}, err
	}
	c := &claiming{ClaimRequest: r, want: want, node: n}
	defer c.close()
	if want.OnDemand {
		c.undo = append(c.undo, func() error { return n.endUnclaimed(context.WithoutCancel(ctx), r.Netns) })
	}
	a, err := c.run(ctx)
	if err != nil {
		return Attachment{}, errors.Join(err, c.undoAll())
	}
	return a, nil
}

// claiming is a claim under way.
type claiming struct {
	ClaimRequest
	want segment.Segment
	node *Node
	lan  *conn
	pod  *conn
	undo []func() error // last first

	// What stands in the LAN's netns, looked up once: a look-up is a tenth of a claim's time.
	bridge, port, plug netlink.Link
	carrier            netlink.Link // answers to the spoke's name
	tookOver           bool
}

func (c *claiming) close() {
	for _, conn := range []*conn{c.lan, c.pod} {
		if conn != nil {
			conn.close()
		}
	}
}

func (c *claiming) undoAll() error {
	var errs []error
	for _, f := range slices.Backward(c.undo) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

func (c *claiming) run(ctx context.Context) (Attachment, error) {
	ns, err := openNetns(c.PodNetns)
	if err != nil {
		return Attachment{}, fmt.Errorf("open the pod's network namespace: %w", err)
	}
	if c.pod, err = dial(ns); err != nil {
		return Attachment{}, err
	}
	if _, taken, err := c.pod.link(c.Interface); err != nil {
		return Attachment{}, err
	} else if taken {
		return Attachment{}, fmt.Errorf("%w: %q", ErrNameTaken, c.Interface)
	}
	if err := c.standing(ctx); err != nil {
		return Attachment{}, err
	}
	if err := c.takeOver(ctx); err != nil {
		return Attachment{}, err
	}
	var a Attachment
	if c.Kind == segment.Macvtap {
		a, err = c.macvtap()
	} else {
		a, err = c.veth()
	}
	if err != nil {
		return Attachment{}, err
	}
	a.TookOver = c.tookOver
	return a, c.vxlanUp()
}

// standing makes sure of what the daemon built ahead of time, and builds what is missing in its place.
func (c *claiming) standing(ctx context.Context) error {
	if c.want.OnDemand { // nobody builds it ahead of time, and who was about to may have been killed
		if err := c.build(ctx); err != nil {
			return err
		}
	}
	complete, err := c.find()
	if err != nil || complete {
		return err
	}
	if c.lan == nil {
		// A namespace made here could be covered by the one that the daemon has in hand and gives its name back.
		return fmt.Errorf("%w (no %s)", ErrNoLAN, c.node.netnsPath(c.Netns))
	}
	c.lan.close()
	c.lan = nil
	if err := c.build(ctx); err != nil {
		return err
	}
	if complete, err = c.find(); err == nil && !complete {
		err = fmt.Errorf("what spoke %s needs of the segment could not be built", c.Spoke)
	}
	return err
}

// build brings the segment in order.
func (c *claiming) build(ctx context.Context) error {
	_, err := c.node.reconcile(ctx, c.Netns, func(have segment.State) []segment.Op { return segment.Diff(c.want, have) })
	return err
}

// find looks up what stands, and says whether that is all of it.
func (c *claiming) find() (complete bool, err error) {
	if c.lan == nil {
		s := segment.State{Netns: c.Netns}
		lan, err := c.node.reach(&s)
		if err != nil || lan == nil || s.Lost {
			if lan != nil {
				lan.close()
			}
			return false, err
		}
		c.lan = lan
	}
	type part struct {
		name string
		to   *netlink.Link
	}
	needed := []part{{c.want.Bridge, &c.bridge}}
	if !c.onDemand() {
		needed = append(needed, part{segment.PortName(c.Spoke), &c.port}, part{segment.PlugName(c.Spoke), &c.plug}, part{c.Spoke, &c.carrier})
	}
	for _, l := range needed {
		var ok bool
		if *l.to, ok, err = c.lan.link(l.name); err != nil || !ok {
			return false, err
		}
	}
	return true, nil
}

// takeOver ends the claim of another sandbox: of a pod that kubelet has given up but whose sandbox still stands.
func (c *claiming) takeOver(ctx context.Context) error {
	if c.onDemand() {
		return nil // the spoke is this pod's alone
	}
	alias, end := c.carrier.Attrs().Alias, func(id string) error { return c.node.endVeth(c.lan, c.Spoke, id) }
	id := c.carrier.Attrs().Name
	if !segment.IsClaimID(id) {
		i := slices.IndexFunc(c.plug.Attrs().AltNames, segment.IsClaimID)
		if i < 0 {
			return nil
		}
		id, alias = c.plug.Attrs().AltNames[i], c.plug.Attrs().Alias
		end = func(id string) error { return c.node.endMacvtap(ctx, c.lan, c.want, c.Spoke, id) }
	}
	old, _ := segment.ParseAlias(id, alias)
	if old.OfSandbox(c.Sandbox) {
		return fmt.Errorf("%w, as %s", ErrSameSandbox, old.Interface)
	}
	if err := end(id); err != nil {
		return err
	}
	c.tookOver = true
	complete, err := c.find() // a VM's pair may have been built anew
	if err == nil && !complete {
		err = fmt.Errorf("the standing pair of spoke %s is gone", c.Spoke)
	}
	return err
}

// endVeth ends a pod's claim: its link goes, at both ends, and the standing port carries the spoke's frames again.
func (n *Node) endVeth(lan *conn, spoke, claimID string) error {
	if err := lan.delLink(claimID); err != nil {
		return fmt.Errorf("delete the link of claim %s: %w", claimID, err)
	}
	if segment.IsOnDemand(spoke) {
		return nil
	}
	return lan.standBy(spoke)
}

// onDemand says whether the spoke is made with the claim.
func (c *claiming) onDemand() bool { return segment.IsOnDemand(c.Spoke) }

// endUnclaimed takes a segment away that is there for who is attached, where nobody is. The caller has its lock.
func (n *Node) endUnclaimed(ctx context.Context, netnsName string) error {
	if record, err := n.Record(netnsName); err == nil && !record.OnDemand || err != nil && !errors.Is(err, ErrNoLAN) {
		return nil // one that cannot be read is the daemon's to judge
	}
	nothing := false
	_, err := n.reconcile(ctx, netnsName, func(have segment.State) []segment.Op {
		if len(have.Claims()) > 0 {
			return nil
		}
		nothing = !have.Exists && !have.Lost && !have.Dead
		return segment.Teardown(have)
	})
	if err == nil && nothing { // else the lock went with the namespace
		err = removeFile(n.lockPath(netnsName))
	}
	return err
}

// standBy lets a spoke's standing port carry its frames.
func (c *conn) standBy(spoke string) error {
	return c.with(segment.PortName(spoke), func(port netlink.Link) error {
		if err := c.LinkAddAltName(port, spoke); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("give %s the name %s: %w", port.Attrs().Name, spoke, err)
		}
		return c.LinkSetUp(port)
	})
}

// standByIfOrphaned does so where nothing carries them: the pod's link has gone with the pod's network namespace.
func (c *conn) standByIfOrphaned(spoke string) error {
	if _, carried, err := c.link(spoke); err != nil || carried {
		return err
	}
	if _, standing, err := c.link(segment.PortName(spoke)); err != nil || !standing {
		return err
	}
	return c.standBy(spoke)
}

// endMacvtap ends a VM's claim. Its macvtap may still be there, in a namespace that we don't know: it goes with the
// standing pair, which is built anew.
func (n *Node) endMacvtap(ctx context.Context, lan *conn, want segment.Segment, spoke, claimID string) error {
	plug, ok, err := lan.link(segment.PlugName(spoke))
	if err != nil || !ok {
		return err
	}
	free, err := lan.free(plug, spoke)
	if err != nil {
		return err
	}
	if free {
		return lan.unclaim(plug, claimID)
	}
	if err := lan.delLink(segment.PortName(spoke)); err != nil {
		return fmt.Errorf("delete the standing pair of spoke %s: %w", spoke, err)
	}
	if !slices.Contains(want.Spokes, spoke) {
		return nil
	}
	pair := segment.AddPair{Spoke: spoke, MAC: want.PlugMAC(spoke), MTU: want.MTU, Bridge: want.Bridge}
	if err := lan.addPair(pair); err != nil {
		return fmt.Errorf("%s: %w", pair, err)
	}
	if slices.Contains(want.TxChecksumOff, spoke) {
		for _, link := range []string{segment.PortName(spoke), segment.PlugName(spoke)} {
			if err := lan.setTxChecksum(link, false); err != nil {
				return err
			}
		}
	}
	return lan.set(segment.AddAltName{Name: segment.PortName(spoke), AltName: spoke})
}

func (c *claiming) claim() segment.Claim {
	return segment.Claim{
		ID: c.ID(), Spoke: c.Spoke, Kind: c.Kind, PodNamespace: c.PodNamespace, Pod: c.Pod, PodUID: c.PodUID,
		Interface: c.Interface, Sandbox: c.Sandbox, Network: c.Network, MAC: c.MAC, Since: time.Now(),
	}
}

// veth makes the pod's link with its other end in the bridge. To create that end under the claim's name is the claim.
func (c *claiming) veth() (Attachment, error) {
	id := c.ID()
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU, a.Group = id, c.want.MTU, segment.LinkGroup
	v := netlink.NewVeth(a)
	v.PeerName, v.PeerNamespace, v.PeerHardwareAddr, v.PeerMTU = c.Interface, netlink.NsFd(int(c.pod.ns)), c.MAC, uint32(c.MTU)
	if err := c.lan.LinkAdd(v); err != nil {
		return Attachment{}, fmt.Errorf("create %s for the pod: %w", c.Interface, err)
	}
	c.undo = append(c.undo, func() error { return c.node.endVeth(c.lan, c.Spoke, id) })
	steps := []struct {
		what string
		do   func() error
	}{
		{"name its owner", func() error { return c.lan.LinkSetAlias(v, c.claim().Alias()) }},
		{"put it into the bridge", func() error { return c.lan.LinkSetMasterByIndex(v, c.bridge.Attrs().Index) }},
		{"open it for link-local frames", func() error { return c.lan.setForwardMask(v) }},
		{"have its frames finished", func() error { return c.finished(c.lan, id) }},
		{"take the spoke's name off the standing port", c.unnamePort},
		{"give it the spoke's name", func() error { return c.lan.LinkAddAltName(v, c.Spoke) }},
		{"set the standing port down", c.portDown},
		{"set it up", func() error { return c.lan.LinkSetUp(v) }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return Attachment{}, fmt.Errorf("attach %s: %s: %w", id, s.what, err)
		}
	}
	if err := c.finished(c.pod, c.Interface); err != nil {
		return Attachment{}, fmt.Errorf("attach %s: have the pod's frames finished: %w", id, err)
	}
	att, err := c.podLink()
	att.HostInterface = id
	return att, err
}

func (c *claiming) unnamePort() error {
	if c.port == nil { // a spoke on demand
		return nil
	}
	return c.lan.LinkDelAltName(c.port, c.Spoke)
}

func (c *claiming) portDown() error {
	if c.port == nil {
		return nil
	}
	return c.lan.LinkSetDown(c.port)
}

// finished has what leaves by a new link bear finished checksums, if that is wished of the spoke.
func (c *claiming) finished(conn *conn, link string) error {
	if !slices.Contains(c.want.TxChecksumOff, c.Spoke) {
		return nil
	}
	return conn.setTxChecksum(link, false)
}

// macvtap makes the VM's link on the standing plug. The plug's altname is the claim: there is one of each name.
func (c *claiming) macvtap() (Attachment, error) {
	id, plug, plugName := c.ID(), c.plug, segment.PlugName(c.Spoke)
	if err := c.lan.LinkSetAlias(plug, c.claim().Alias()); err != nil {
		return Attachment{}, fmt.Errorf("name the owner of %s: %w", plugName, err)
	}
	if err := c.lan.LinkAddAltName(plug, id); err != nil {
		return Attachment{}, fmt.Errorf("claim %s: %w", plugName, err)
	}
	c.undo = append(c.undo, func() error { return c.lan.unclaim(plug, id) })
	if err := c.addMacvtap(plug); err != nil {
		return Attachment{}, err
	}
	c.undo = append(c.undo, func() error { return c.pod.delLink(c.Interface) })
	err := c.pod.with(c.Interface, func(tap netlink.Link) error {
		// A passthru macvtap drops all multicast unless it is allmulticast itself.
		if err := c.pod.LinkSetAllmulticastOn(tap); err != nil {
			return fmt.Errorf("set %s allmulticast: %w", c.Interface, err)
		}
		return do(c.pod.ns, func() error { return noIPv6(c.Interface) })
	})
	if err != nil {
		return Attachment{}, err
	}
	att, err := c.podLink()
	if err != nil {
		return Attachment{}, err
	}
	att.HostInterface = plugName
	att.TapMajor, att.TapMinor, err = tapDevice(c.pod.ns, c.Interface, att.Index)
	return att, err
}

// addMacvtap makes the macvtap directly in the pod, with an ifindex of our choice: the tap's device is named by it.
func (c *claiming) addMacvtap(plug netlink.Link) error {
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU, a.ParentIndex, a.Namespace = c.Interface, c.MTU, plug.Attrs().Index, netlink.NsFd(int(c.pod.ns))
	for try := range uint32(tapIndexTries) {
		a.Index = tapIndex(c.want.LAN, c.Spoke, try)
		err := c.lan.LinkAdd(&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_PASSTHRU}})
		if errors.Is(err, unix.EBUSY) { // the pod has a link of that ifindex
			continue
		}
		if err != nil {
			return fmt.Errorf("create macvtap %s on %s for the pod: %w", c.Interface, plug.Attrs().Name, err)
		}
		return nil
	}
	return fmt.Errorf("create macvtap %s: no free ifindex in the pod", c.Interface)
}

// podLink gives the pod's end what was asked for and sets it up.
func (c *claiming) podLink() (Attachment, error) {
	link, ok, err := c.pod.link(c.Interface)
	if err != nil || !ok {
		return Attachment{}, errors.Join(fmt.Errorf("the pod's link %s is gone", c.Interface), err)
	}
	a := link.Attrs()
	if a.HardwareAddr.String() != c.MAC.String() {
		if err := c.pod.LinkSetHardwareAddr(link, c.MAC); err != nil {
			return Attachment{}, fmt.Errorf("give %s the address %s: %w", c.Interface, c.MAC, err)
		}
	}
	if c.Promiscuous {
		if err := c.pod.SetPromiscOn(link); err != nil {
			return Attachment{}, fmt.Errorf("set %s promiscuous: %w", c.Interface, err)
		}
	}
	if err := c.pod.LinkSetUp(link); err != nil {
		return Attachment{}, fmt.Errorf("set %s up: %w", c.Interface, err)
	}
	return Attachment{ClaimID: c.ID(), MAC: c.MAC, MTU: a.MTU, Index: a.Index}, nil
}

// vxlanUp lets the LAN reach other nodes from the first claim on. A LAN whose underlay has gone has no VXLAN at the
// moment; the daemon makes it when the underlay is back.
func (c *claiming) vxlanUp() error {
	l, ok, err := c.lan.link(c.want.VXLAN.Name)
	if err != nil || !ok || l.Attrs().RawFlags&unix.IFF_UP != 0 {
		return err
	}
	if err := c.lan.up(l); err != nil {
		return fmt.Errorf("vxlan %s: set it up: %w", c.want.VXLAN.Name, err)
	}
	return nil
}

// Release ends a claim and makes the spoke wait for the next pod. A claim that is not there is no error: it may have
// been taken over, or have gone with its pod. A segment that is there for who is attached goes with its last claim.
func (n *Node) Release(ctx context.Context, netnsName, spoke, claimID string) error {
	if err := checkName(netnsName); err != nil {
		return err
	}
	unlock, err := n.lock(ctx, netnsName)
	if err != nil {
		return err
	}
	defer unlock()
	if err := n.release(ctx, netnsName, spoke, claimID); err != nil || !segment.IsOnDemand(spoke) {
		return err
	}
	return n.endUnclaimed(ctx, netnsName)
}

// release is Release for those who have the lock.
func (n *Node) release(ctx context.Context, netnsName, spoke, claimID string) error {
	s := segment.State{Netns: netnsName}
	lan, err := n.reach(&s)
	if err != nil {
		return err
	}
	if lan == nil && segment.IsOnDemand(spoke) {
		return nil
	}
	if lan == nil {
		return removeFile(n.lockPath(netnsName))
	}
	defer lan.close()
	l, ok, err := lan.link(claimID)
	if err != nil {
		return err
	}
	if !ok {
		return lan.standByIfOrphaned(spoke)
	}
	if l.Attrs().Name == claimID {
		return n.endVeth(lan, spoke, claimID)
	}
	want, err := n.Record(netnsName)
	if err != nil {
		return err
	}
	return n.endMacvtap(ctx, lan, want, spoke, claimID)
}

// Claims lists the claims of a segment; none where there is no such segment.
func (n *Node) Claims(ctx context.Context, netnsName string) ([]segment.Claim, error) {
	s, err := n.Observe(ctx, netnsName)
	if err != nil {
		return nil, err
	}
	return s.Claims(), nil
}

// CheckClaim says what of an attachment is no longer as Claim made it; nil if all is.
func (n *Node) CheckClaim(_ context.Context, r ClaimRequest) error {
	want, err := n.Record(r.Netns)
	if err != nil {
		return err
	}
	if err := r.complete(want); err != nil {
		return err
	}
	s := segment.State{Netns: r.Netns}
	lan, err := n.reach(&s)
	if err != nil {
		return err
	}
	if lan == nil {
		return fmt.Errorf("%w (no %s)", ErrNoLAN, n.netnsPath(r.Netns))
	}
	defer lan.close()
	claim, ok, err := lan.link(r.ID())
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("spoke %s is no longer claimed by this pod", r.Spoke)
	}
	carrier, ok, err := lan.link(r.Spoke)
	if err != nil {
		return err
	}
	if !ok || carrier.Attrs().RawFlags&unix.IFF_UP == 0 || carrier.Attrs().MasterIndex == 0 {
		return fmt.Errorf("spoke %s has no link that is up in bridge %s", r.Spoke, want.Bridge)
	}
	if r.Kind == segment.Veth && carrier.Attrs().Index != claim.Attrs().Index {
		return fmt.Errorf("spoke %s is carried by %s, not by this pod's link %s", r.Spoke, carrier.Attrs().Name, claim.Attrs().Name)
	}
	return checkPodLink(r)
}

func checkPodLink(r ClaimRequest) error {
	ns, err := openNetns(r.PodNetns)
	if err != nil {
		return fmt.Errorf("open the pod's network namespace: %w", err)
	}
	pod, err := dial(ns)
	if err != nil {
		return err
	}
	defer pod.close()
	link, ok, err := pod.link(r.Interface)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("the pod has no interface %s", r.Interface)
	}
	a := link.Attrs()
	switch {
	case link.Type() != string(r.Kind):
		return fmt.Errorf("%s is a %s, not a %s", r.Interface, link.Type(), r.Kind)
	case a.HardwareAddr.String() != r.MAC.String():
		return fmt.Errorf("%s has the address %s, not %s", r.Interface, a.HardwareAddr, r.MAC)
	case a.MTU != r.MTU:
		return fmt.Errorf("%s has the MTU %d, not %d", r.Interface, a.MTU, r.MTU)
	case a.RawFlags&unix.IFF_UP == 0:
		return fmt.Errorf("%s is down", r.Interface)
	}
	return nil
}
