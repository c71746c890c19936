package kernel

import (
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// veth creates the pod's link with its other end in the bridge. Creating that end under the claim's ID makes the claim.
func (c *claiming) veth() (Attachment, error) {
	id := c.ID()
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU, a.Group = id, c.want.MTU, segment.LinkGroup
	v := netlink.NewVeth(a)
	v.PeerName, v.PeerNamespace = c.Interface, netlink.NsFd(int(c.pod.ns))
	v.PeerHardwareAddr, v.PeerMTU = c.MAC, uint32(c.MTU)
	if err := c.lan.LinkAdd(v); err != nil {
		return Attachment{}, fmt.Errorf("create %s for the pod: %w", c.Interface, err)
	}
	c.undo = append(c.undo, func() error { return c.node.endVeth(c.lan, c.Spoke, id) })
	steps := []struct {
		what string
		do   func() error
	}{
		{"set its alias", func() error { return c.lan.LinkSetAlias(v, c.claim().Alias()) }},
		{"put it into the bridge", func() error { return c.lan.LinkSetMasterByIndex(v, c.bridge.Attrs().Index) }},
		{"let link-local frames pass", func() error { return c.lan.setForwardMask(v) }},
		{"switch its checksum offload off", func() error { return c.finishChecksums(c.lan, id) }},
		{"remove the spoke's name from the standing port", c.unnamePort},
		{"give it the spoke's name", func() error { return c.lan.LinkAddAltName(v, c.Spoke) }},
		{"set the standing port down", c.setPortDown},
		{"set it up", func() error { return c.lan.LinkSetUp(v) }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return Attachment{}, fmt.Errorf("attach %s: %s: %w", id, s.what, err)
		}
	}
	if err := c.finishChecksums(c.pod, c.Interface); err != nil {
		return Attachment{}, fmt.Errorf("attach %s: switch the pod's checksum offload off: %w", id, err)
	}
	att, err := c.finishPodLink()
	att.HostInterface = id
	return att, err
}

// unnamePort removes the spoke's name from its standing port. A spoke on demand has none.
func (c *claiming) unnamePort() error {
	if c.port == nil {
		return nil
	}
	return c.lan.LinkDelAltName(c.port, c.Spoke)
}

// setPortDown sets the spoke's standing port down.
func (c *claiming) setPortDown() error {
	if c.port == nil {
		return nil
	}
	return c.lan.LinkSetDown(c.port)
}

// finishChecksums switches a link's checksum offload off, if the LAN wants that of the spoke.
func (c *claiming) finishChecksums(conn *conn, link string) error {
	if !slices.Contains(c.want.TxChecksumOff, c.Spoke) {
		return nil
	}
	return conn.setTxChecksum(link, false)
}
