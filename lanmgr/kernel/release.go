package kernel

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Release ends a claim, so that the spoke is free for the next pod. It is no error if there is no such claim: it may
// have been taken over, or have ended with its pod. The last claim of a segment on demand ends the segment, too.
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

// release is Release with the lock held.
func (n *Node) release(ctx context.Context, netnsName, spoke, claimID string) error {
	s := segment.State{Netns: netnsName}
	lan, err := n.dialSegment(&s)
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

// Claims lists the claims of a segment. It lists none where there is no such segment.
func (n *Node) Claims(ctx context.Context, netnsName string) ([]segment.Claim, error) {
	s, err := n.Observe(ctx, netnsName)
	if err != nil {
		return nil, err
	}
	return s.Claims(), nil
}

// endVeth ends a pod's claim: it deletes the link with both ends, and the standing port carries the spoke's frames
// again.
func (n *Node) endVeth(lan *conn, spoke, claimID string) error {
	if err := lan.delLink(claimID); err != nil {
		return fmt.Errorf("delete the link of claim %s: %w", claimID, err)
	}
	if segment.IsOnDemand(spoke) {
		return nil
	}
	return lan.standBy(spoke)
}

// endMacvtap ends a VM's claim. Its macvtap may still exist, in a namespace that this process does not know. Then it
// deletes the standing pair, and the macvtap with it, and creates the pair again.
func (n *Node) endMacvtap(ctx context.Context, lan *conn, want segment.Segment, spoke, claimID string) error {
	plug, ok, err := lan.link(segment.PlugName(spoke))
	if err != nil || !ok {
		return err
	}
	free, err := lan.isFree(plug, spoke)
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

// endUnclaimed removes a segment on demand that has no claims. The caller holds its lock.
func (n *Node) endUnclaimed(ctx context.Context, netnsName string) error {
	if record, err := n.Record(netnsName); err == nil && !record.OnDemand || err != nil && !errors.Is(err, ErrNoLAN) {
		return nil // the daemon decides about a record that cannot be read
	}
	nothing := false
	_, err := n.reconcile(ctx, netnsName, func(have segment.State) []segment.Op {
		if len(have.Claims()) > 0 {
			return nil
		}
		nothing = !have.Exists && !have.LostName && !have.StaleName
		return segment.Teardown(have)
	})
	if err == nil && nothing { // else the lock was removed with the namespace
		err = removeFile(n.lockPath(netnsName))
	}
	return err
}

// standBy makes a spoke's standing port carry the spoke's frames.
func (c *conn) standBy(spoke string) error {
	return c.with(segment.PortName(spoke), func(port netlink.Link) error {
		if err := c.LinkAddAltName(port, spoke); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("give %s the name %s: %w", port.Attrs().Name, spoke, err)
		}
		return c.LinkSetUp(port)
	})
}

// standByIfOrphaned does so if no link carries them: the pod's link was deleted with the pod's network namespace.
func (c *conn) standByIfOrphaned(spoke string) error {
	if _, carried, err := c.link(spoke); err != nil || carried {
		return err
	}
	if _, standing, err := c.link(segment.PortName(spoke)); err != nil || !standing {
		return err
	}
	return c.standBy(spoke)
}
