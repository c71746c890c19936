package kernel

import (
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

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
