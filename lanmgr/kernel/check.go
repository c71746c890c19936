package kernel

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// CheckClaim fails if an attachment is no longer as Claim made it. The error says what differs.
func (n *Node) CheckClaim(_ context.Context, r ClaimRequest) error {
	want, err := n.Record(r.Netns)
	if err != nil {
		return err
	}
	if err := r.complete(want); err != nil {
		return err
	}
	s := segment.State{Netns: r.Netns}
	lan, err := n.dialSegment(&s)
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
		return fmt.Errorf("spoke %s is carried by %s, not by this pod's link %s",
			r.Spoke, carrier.Attrs().Name, claim.Attrs().Name)
	}
	return checkPodLink(r)
}

// checkPodLink checks the pod's end.
func checkPodLink(r ClaimRequest) error {
	ns, err := netns.Open(r.PodNetns)
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
