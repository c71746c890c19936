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

// Reconcile observes a segment under its lock, applies the operations that decide returns, and returns those that it
// applied. It stops at the first that fails. Those before stay applied, and the next Reconcile continues from there.
func (n *Node) Reconcile(
	ctx context.Context, netnsName string, decide func(segment.State) []segment.Op,
) (applied []segment.Op, err error) {
	if err := checkName(netnsName); err != nil {
		return nil, err
	}
	unlock, err := n.lock(ctx, netnsName)
	if err != nil {
		return nil, err
	}
	defer unlock()
	absent := false
	applied, err = n.reconcile(ctx, netnsName, func(have segment.State) []segment.Op {
		ops := decide(have)
		absent = len(ops) == 0 && !have.Exists && !have.LostName && !have.StaleName && have.Record == nil
		return ops
	})
	if absent { // without a segment, no lock stays
		err = errors.Join(err, removeFile(n.lockPath(netnsName)))
	}
	return applied, err
}

// reconcile is Reconcile with the lock held.
func (n *Node) reconcile(
	ctx context.Context, netnsName string, decide func(segment.State) []segment.Op,
) (applied []segment.Op, err error) {
	have, err := n.Observe(ctx, netnsName)
	if err != nil {
		return nil, err
	}
	a := &applier{node: n, netns: netnsName}
	defer a.close()
	for _, op := range decide(have) {
		if err := ctx.Err(); err != nil {
			return applied, err
		}
		if err := a.apply(op); err != nil {
			return applied, fmt.Errorf("%s: %s: %w", netnsName, op, err)
		}
		applied = append(applied, op)
	}
	return applied, nil
}

// Apply applies operations to a segment under its lock, without observing it first.
func (n *Node) Apply(ctx context.Context, netnsName string, ops []segment.Op) error {
	if err := checkName(netnsName); err != nil {
		return err
	}
	unlock, err := n.lock(ctx, netnsName)
	if err != nil {
		return err
	}
	defer unlock()
	a := &applier{node: n, netns: netnsName}
	defer a.close()
	for _, op := range ops {
		if err := a.apply(op); err != nil {
			return fmt.Errorf("%s: %s: %w", netnsName, op, err)
		}
	}
	return nil
}

// applier applies operations to one segment.
type applier struct {
	node  *Node
	netns string
	open  *OpenNetns // nil until it is needed
}

func (a *applier) close() {
	if a.open != nil {
		a.node.put(a.open)
		a.open = nil
	}
}

// lan returns the connection into the segment's namespace.
func (a *applier) lan() (*conn, error) {
	if a.open != nil {
		return a.open.conn, nil
	}
	s := segment.State{Netns: a.netns}
	o, err := a.node.acquireOrOpen(&s)
	if err != nil {
		return nil, err
	}
	if o == nil {
		return nil, fmt.Errorf("%w (no %s)", ErrNoLAN, a.node.netnsPath(a.netns))
	}
	a.open = o
	return o.conn, nil
}

// apply applies one operation. To apply it again changes nothing.
func (a *applier) apply(op segment.Op) error {
	switch o := op.(type) {
	case segment.CreateNetns:
		return a.node.createNetns(o.Netns)
	case segment.RestoreNetns:
		return a.node.restoreNetns(o.Netns)
	case segment.RemoveNetns:
		a.close()
		return a.node.removeNetns(o.Netns)
	case segment.WriteRecord:
		return a.node.writeRecord(o.Segment)
	case segment.RemoveRecord:
		return removeFile(a.node.recordPath(o.Netns))
	}
	c, err := a.lan()
	if err != nil {
		return err
	}
	switch o := op.(type) {
	case segment.AddVXLAN:
		host, err := a.node.dialHost()
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

// apply applies one operation that stays within the namespace.
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
		if o.Learned { // first: while the remotes are there, an interrupted deletion is repeated
			if err := c.forgetBehind(o.Name, o.Remotes); err != nil {
				return err
			}
		}
		return c.changeRemotes(o.Name, o.Remotes, c.delNeighbor)
	case segment.SetFDB:
		return c.setFDB(o)
	case segment.DelFDB:
		return c.delFDB(o)
	case segment.SetNeighborDiscovery:
		return c.setNeighborDiscovery(o)
	case segment.AddNeighbors:
		return c.changeNeighbors(o.Name, o.Neighbors, c.NeighSet)
	case segment.DelNeighbors:
		return c.changeNeighbors(o.Name, o.Neighbors, c.delNeighbor)
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
		return c.verifyClaim(o.Spoke, o.ClaimID)
	}
	return c.set(op)
}

// set applies an operation that changes one setting of one link.
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
	return fmt.Errorf("operation %T is not implemented", op)
}

// delAltName removes an altname from a link. It is no error if the link is gone or does not have it.
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

// up sets a link up. A VXLAN opens its UDP port only now, and fails if another program has the port.
func (c *conn) up(l netlink.Link) error {
	err := c.LinkSetUp(l)
	if v, ok := l.(*netlink.Vxlan); ok && errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("UDP port %d is in use by something else on this node; choose another vxlanPort: %w",
			v.Port, err)
	}
	return err
}

// delLink deletes a link. It is no error if the link is gone.
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

// deleteGroup deletes all links of a link group.
func (c *conn) deleteGroup(group uint32) error {
	r, err := c.requests()
	if err != nil {
		return err
	}
	return r.DeleteGroup(group)
}

// delLinks deletes links in one message. It puts them into a link group, whose random number no earlier deletion that
// was interrupted can have left on a link that is wanted now.
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
