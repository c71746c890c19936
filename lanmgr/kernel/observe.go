package kernel

import (
	"context"
	"errors"
	"fmt"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Observe reads the state of a segment. It is no error if nothing of the segment is on the node.
func (n *Node) Observe(_ context.Context, netnsName string) (segment.State, error) {
	if err := checkName(netnsName); err != nil {
		return segment.State{}, err
	}
	s := segment.State{Netns: netnsName}
	if r, err := n.Record(netnsName); err == nil {
		s.Record = &r
	} else if !errors.Is(err, ErrNoLAN) && !isDamaged(err) {
		return s, err
	}
	if s.Record != nil && s.Record.OnDemand {
		if err := n.forgetReplaced(netnsName); err != nil {
			return s, fmt.Errorf("observe %s: %w", netnsName, err)
		}
	}
	o, err := n.acquireOrOpen(&s)
	if err != nil || o == nil {
		return s, err
	}
	defer n.put(o)
	if s.Silent, err = o.settings.areSet(o.conn.ns); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	if s.Links, err = o.conn.links(); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	n.noteVXLAN(o, s.Links)
	if err := o.conn.readRemotes(&s); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	if err := o.conn.readNeighbors(&s); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	if s.Record != nil && len(s.Record.TxChecksumOff) > 0 {
		if err := o.conn.readTxChecksums(s.Links, s.Record.TxChecksumOff); err != nil {
			return s, fmt.Errorf("observe %s: %w", netnsName, err)
		}
	}
	return s, nil
}
