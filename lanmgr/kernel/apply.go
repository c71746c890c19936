package kernel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Reconcile observes a segment under its lock, does what decide says, and returns what was done.
// It stops at the first operation that fails; what was done before stays and the next Reconcile goes on from there.
func (n *Node) Reconcile(ctx context.Context, netnsName string, decide func(segment.State) []segment.Op) ([]segment.Op, error) {
	if err := checkName(netnsName); err != nil {
		return nil, err
	}
	unlock, err := n.lock(ctx, netnsName)
	if err != nil {
		return nil, err
	}
	defer unlock()
	absent := false
	done, err := n.reconcile(ctx, netnsName, func(have segment.State) []segment.Op {
		ops := decide(have)
		absent = len(ops) == 0 && !have.Exists && !have.LostName && !have.StaleName && have.Record == nil
		return ops
	})
	if absent { // of what isn't there, the lock shall not stay either
		err = errors.Join(err, removeFile(n.lockPath(netnsName)))
	}
	return done, err
}

// reconcile is Reconcile for those who have the lock.
func (n *Node) reconcile(ctx context.Context, netnsName string, decide func(segment.State) []segment.Op) ([]segment.Op, error) {
	have, err := n.Observe(ctx, netnsName)
	if err != nil {
		return nil, err
	}
	b := &builder{node: n, netns: netnsName}
	defer b.close()
	var done []segment.Op
	for _, op := range decide(have) {
		if err := ctx.Err(); err != nil {
			return done, err
		}
		if err := b.apply(op); err != nil {
			return done, fmt.Errorf("%s: %s: %w", netnsName, op, err)
		}
		done = append(done, op)
	}
	return done, nil
}

// Apply does operations on a segment while nobody else changes it, without a look at it before.
func (n *Node) Apply(ctx context.Context, netnsName string, ops []segment.Op) error {
	if err := checkName(netnsName); err != nil {
		return err
	}
	unlock, err := n.lock(ctx, netnsName)
	if err != nil {
		return err
	}
	defer unlock()
	b := &builder{node: n, netns: netnsName}
	defer b.close()
	for _, op := range ops {
		if err := b.apply(op); err != nil {
			return fmt.Errorf("%s: %s: %w", netnsName, op, err)
		}
	}
	return nil
}

// builder applies operations to one segment, over the connection in hand.
type builder struct {
	node  *Node
	netns string
	open  *OpenNetns // nil until it is needed
}

func (b *builder) close() {
	if b.open != nil {
		b.node.put(b.open)
		b.open = nil
	}
}

// lan is the connection into the segment's namespace.
func (b *builder) lan() (*conn, error) {
	if b.open != nil {
		return b.open.conn, nil
	}
	s := segment.State{Netns: b.netns}
	o, err := b.node.acquireOrOpen(&s)
	if err != nil {
		return nil, err
	}
	if o == nil {
		return nil, fmt.Errorf("%w (no %s)", ErrNoLAN, b.node.netnsPath(b.netns))
	}
	b.open = o
	return o.conn, nil
}

// apply does one operation; doing it again does no harm.
func (b *builder) apply(op segment.Op) error {
	switch o := op.(type) {
	case segment.CreateNetns:
		return b.node.createNetns(o.Netns)
	case segment.RestoreNetns:
		return b.node.restoreNetns(o.Netns)
	case segment.RemoveNetns:
		b.close()
		return b.node.removeNetns(o.Netns)
	case segment.WriteRecord:
		return b.node.writeRecord(o.Segment)
	case segment.RemoveRecord:
		return removeFile(b.node.recordPath(o.Netns))
	}
	c, err := b.lan()
	if err != nil {
		return err
	}
	switch o := op.(type) {
	case segment.AddVXLAN:
		host, err := b.node.dialHost()
		if err != nil {
			return err
		}
		defer host.close()
		return addVXLAN(host, c, o)
	case segment.Silence:
		return c.silence(o.Bridge)
	}
	return c.apply(op)
}

// apply does one operation that stays within the namespace.
func (c *conn) apply(op segment.Op) error {
	switch o := op.(type) {
	case segment.AddBridge:
		return c.addBridge(o)
	case segment.SetBridge:
		return c.setBridge(o)
	case segment.SetVXLAN:
		return c.setVXLAN(o)
	case segment.AddRemotes:
		return c.changeRemotes(o.Name, o.Remotes, c.NeighAppend)
	case segment.DelRemotes:
		if o.Learned { // before: while the remotes are there, what was broken off is begun again
			if err := c.forgetBehind(o.Name, o.Remotes); err != nil {
				return err
			}
		}
		return c.changeRemotes(o.Name, o.Remotes, c.forget)
	case segment.SetFDB:
		return c.setFDB(o)
	case segment.DelFDB:
		return c.delFDB(o)
	case segment.SetNeighborDiscovery:
		return c.setNeighborDiscovery(o)
	case segment.AddNeighbors:
		return c.changeNeighbors(o.Name, o.Neighbors, c.NeighSet)
	case segment.DelNeighbors:
		return c.changeNeighbors(o.Name, o.Neighbors, c.forget)
	case segment.AddPair:
		return c.addPair(o)
	case segment.DelLink:
		return c.delLink(o.Name)
	case segment.DelLinks:
		return c.delLinks(o.Names)
	case segment.DelPairs:
		return c.deleteGroup(segment.LinkGroup)
	case segment.SetTxChecksum:
		return c.setTxChecksum(o.Name, o.On)
	case segment.VerifyClaim:
		return c.settle(o.Spoke, o.ClaimID)
	}
	return c.set(op)
}

// set does the operations that change one setting of one link.
func (c *conn) set(op segment.Op) error {
	switch o := op.(type) {
	case segment.SetMTU:
		return c.with(o.Name, func(l netlink.Link) error { return c.LinkSetMTU(l, o.MTU) })
	case segment.SetMaster:
		return c.with(o.Name, func(l netlink.Link) error { return c.enslave(l, o.Bridge) })
	case segment.SetForwardMask:
		return c.with(o.Name, c.setForwardMask)
	case segment.SetLearning:
		return c.with(o.Name, func(l netlink.Link) error { return c.LinkSetLearning(l, o.On) })
	case segment.SetSuppress:
		return c.with(o.Name, func(l netlink.Link) error { return c.LinkSetBrNeighSuppress(l, o.On) })
	case segment.SetUp:
		return c.with(o.Name, c.up)
	case segment.SetDown:
		return c.with(o.Name, func(l netlink.Link) error { return c.LinkSetDown(l) })
	case segment.SetMAC:
		return c.with(o.Name, func(l netlink.Link) error { return c.LinkSetHardwareAddr(l, o.MAC) })
	case segment.SetAlias:
		return c.with(o.Name, func(l netlink.Link) error { return c.LinkSetAlias(l, o.Alias) })
	case segment.AddAddress:
		return c.with(o.Name, func(l netlink.Link) error { return c.addAddress(l, o.Address) })
	case segment.DelAddress:
		return c.with(o.Name, func(l netlink.Link) error { return c.delAddress(l, o.Address) })
	case segment.AddAltName:
		return c.with(o.Name, func(l netlink.Link) error { return c.LinkAddAltName(l, o.AltName) })
	case segment.DelAltName:
		return c.delAltName(o.Name, o.AltName)
	}
	return fmt.Errorf("no way to do %T", op)
}

// delAltName takes a name off a link; it is no error if the link has gone, or doesn't have it.
func (c *conn) delAltName(name, altName string) error {
	l, ok, err := c.link(name)
	if err != nil || !ok {
		return err
	}
	err = c.LinkDelAltName(l, altName)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) { // EINVAL: another link has it
		return nil
	}
	return err
}

// up sets a link up. A VXLAN opens its UDP port only now, so this is where another user of the port shows.
func (c *conn) up(l netlink.Link) error {
	err := c.LinkSetUp(l)
	if v, ok := l.(*netlink.Vxlan); ok && errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("UDP port %d is in use by something else on this node; choose another vxlanPort: %w", v.Port, err)
	}
	return err
}

func (c *conn) delLink(name string) error {
	l, ok, err := c.link(name)
	if err != nil || !ok {
		return err
	}
	if err := c.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}

func (c *conn) deleteGroup(group uint32) error {
	r, err := c.requests()
	if err != nil {
		return err
	}
	return r.DeleteGroup(group)
}

// delLinks deletes links in one message. They are named to it by a link group of their own, of a number that no earlier
// deletion, broken off halfway, can have left on a link that is wanted now.
func (c *conn) delLinks(names []string) error {
	group := rand.Uint32() | 1<<31
	for _, name := range names {
		l, ok, err := c.link(name)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if err := c.LinkSetGroup(l, int(group)); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("mark %s for deletion: %w", name, err)
		}
	}
	return c.deleteGroup(group)
}
