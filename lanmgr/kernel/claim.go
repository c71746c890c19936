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

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Errors of a claim, beside ErrNoLAN.
var (
	ErrNoSpoke     = errors.New("the LAN has no such spoke")
	ErrNameTaken   = errors.New("the pod already has an interface of that name")
	ErrSameSandbox = errors.New("this pod is attached to the spoke already")
)

// ClaimRequest asks for a spoke for one interface of one pod.
type ClaimRequest struct {
	Netns, Spoke string
	Kind         segment.Kind
	Sandbox      string // container ID
	Interface    string // name in the pod
	PodNetns     string // path

	PodNamespace, Pod, PodUID string // only for status and messages

	Network string // segment.NetworkMark of the CNI network, for a spoke on demand; else empty

	MAC         net.HardwareAddr // nil: what segment.Segment.PodMAC derives
	MTU         int              // bytes; 0: the LAN's
	Promiscuous bool             // of the link in the pod

	// Admit checks the pod against the LAN's record. The lock keeps the record unchanged meanwhile; nil admits every
	// pod.
	Admit func(segment.Segment) error

	// Make returns the segment to build if the LAN is not on the node. If it is nil, Claim fails with ErrNoLAN then.
	Make func(context.Context) (segment.Segment, error)
}

// admit fails if the pod may not have the spoke of that LAN. It fills in what the request leaves open.
func (r *ClaimRequest) admit(want segment.Segment) error {
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

// complete fills in what the request leaves open.
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

// ID returns the claim's ID.
func (r ClaimRequest) ID() string { return segment.ClaimID(r.Sandbox, r.Interface) }

// Attachment is the result of a claim.
type Attachment struct {
	ClaimID       string
	MAC           net.HardwareAddr
	MTU           int
	Index         int    // ifindex in the pod
	HostInterface string // of a veth the bridge's end, of a macvtap its lower device
	TookOver      bool   // another sandbox had the spoke until then
	TapMajor      uint32 // of a macvtap's character device
	TapMinor      uint32
}

// Claim claims a spoke for a pod: it creates the pod's link in the pod and sets the LAN's VXLAN up. Another pod that
// has the spoke loses it, because kubelet has allocated it to this one. A claim that fails leaves nothing behind.
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
		err = r.admit(want)
	}
	if err != nil && absent { // without a segment, no lock stays
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

// claiming is a claim in progress.
type claiming struct {
	ClaimRequest
	want segment.Segment
	node *Node
	lan  *conn
	pod  *conn
	undo []func() error // last first

	// These links are in the LAN's netns. They are looked up once, because a look-up is a tenth of a claim's time.
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
	ns, err := netns.Open(c.PodNetns)
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
	if err := c.ensureSegment(ctx); err != nil {
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
	return a, c.setVXLANUp()
}

// ensureSegment builds what is missing of what the daemon builds ahead of time.
func (c *claiming) ensureSegment(ctx context.Context) error {
	if c.want.OnDemand { // the first claim builds it, and its process may have been killed
		if err := c.build(ctx); err != nil {
			return err
		}
	}
	complete, err := c.find()
	if err != nil || complete {
		return err
	}
	if c.lan == nil {
		// The daemon may have the namespace open and restore its name. A namespace created here would disappear below
		// it.
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

// build reconciles the segment.
func (c *claiming) build(ctx context.Context) error {
	_, err := c.node.reconcile(ctx, c.Netns, func(have segment.State) []segment.Op {
		return segment.Diff(c.want, have)
	})
	return err
}

// find looks up the links, and reports whether all are there.
func (c *claiming) find() (complete bool, err error) {
	if c.lan == nil {
		s := segment.State{Netns: c.Netns}
		lan, err := c.node.dialSegment(&s)
		if err != nil || lan == nil || s.LostName {
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
		needed = append(needed,
			part{segment.PortName(c.Spoke), &c.port},
			part{segment.PlugName(c.Spoke), &c.plug},
			part{c.Spoke, &c.carrier})
	}
	for _, l := range needed {
		var ok bool
		if *l.to, ok, err = c.lan.link(l.name); err != nil || !ok {
			return false, err
		}
	}
	return true, nil
}

// onDemand reports whether the spoke is created with the claim.
func (c *claiming) onDemand() bool { return segment.IsOnDemand(c.Spoke) }

func (c *claiming) claim() segment.Claim {
	return segment.Claim{
		ID: c.ID(), Spoke: c.Spoke, Kind: c.Kind, PodNamespace: c.PodNamespace, Pod: c.Pod, PodUID: c.PodUID,
		Interface: c.Interface, Sandbox: c.Sandbox, Network: c.Network, MAC: c.MAC, Since: time.Now(),
	}
}

// finishPodLink sets the pod's link to what the request asks for, and sets it up.
func (c *claiming) finishPodLink() (Attachment, error) {
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

// setVXLANUp connects the LAN to other nodes from the first claim on. A LAN without its underlay has no VXLAN; the
// daemon creates it when the underlay is back.
func (c *claiming) setVXLANUp() error {
	l, ok, err := c.lan.link(c.want.VXLAN.Name)
	if err != nil || !ok || l.Attrs().RawFlags&unix.IFF_UP != 0 {
		return err
	}
	if err := c.lan.up(l); err != nil {
		return fmt.Errorf("vxlan %s: set it up: %w", c.want.VXLAN.Name, err)
	}
	return nil
}
