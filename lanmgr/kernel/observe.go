package kernel

import (
	"context"
	"errors"
	"fmt"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Observe reads a segment as it is. One that is not there at all is an empty State and no error.
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
		if err := n.follow(netnsName); err != nil {
			return s, fmt.Errorf("observe %s: %w", netnsName, err)
		}
	}
	h, err := n.take(&s)
	if err != nil || h == nil {
		return s, err
	}
	defer n.giveBack(h)
	if s.Silent, err = h.settings.areMade(h.conn.ns); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	if s.Links, err = h.conn.links(); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	n.noteVXLAN(h, s.Links)
	if err := h.conn.readRemotes(&s); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	if err := h.conn.readNeighbors(&s); err != nil {
		return s, fmt.Errorf("observe %s: %w", netnsName, err)
	}
	if s.Record != nil && len(s.Record.TxChecksumOff) > 0 {
		if err := h.conn.readTxChecksums(s.Links, s.Record.TxChecksumOff); err != nil {
			return s, fmt.Errorf("observe %s: %w", netnsName, err)
		}
	}
	return s, nil
}
