package kernel

import (
	"errors"
	"io/fs"
	"net"

	"github.com/vishvananda/netlink"

	"github.com/k8slan/k8slan/lanmgr/rtnl"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

func (c *conn) addBridge(o segment.AddBridge) error {
	off := false
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU = o.Name, o.MTU
	br := &netlink.Bridge{LinkAttrs: a, MulticastSnooping: &off} // a new bridge has neither STP nor VLAN filtering
	if err := c.LinkAdd(br); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return c.with(o.Name, c.up)
}

// setBridge switches off what makes a bridge less than transparent.
func (c *conn) setBridge(o segment.SetBridge) error {
	return c.request(o.Name, func(r *rtnl.Conn, index int) error { return r.SwitchOff(index, o.Off) })
}

// addPair creates a spoke's standing pair. The port can be up from the start; the plug cannot, because the kernel sets
// it up before the ends are connected (rtnl_configure_link: ENOTCONN).
func (c *conn) addPair(o segment.AddPair) error {
	return c.with(o.Bridge, func(bridge netlink.Link) error {
		a := netlink.NewLinkAttrs()
		a.Name, a.MTU, a.Group = segment.PortName(o.Spoke), segment.PortMTU(o.MTU), segment.LinkGroup
		a.MasterIndex, a.Flags = bridge.Attrs().Index, net.FlagUp
		port := netlink.NewVeth(a)
		port.PeerName, port.PeerHardwareAddr, port.PeerMTU = segment.PlugName(o.Spoke), o.MAC, uint32(o.MTU)
		if err := c.LinkAdd(port); err != nil {
			return err
		}
		if err := c.setForwardMask(port); err != nil {
			return err
		}
		return c.with(port.PeerName, func(plug netlink.Link) error { return c.LinkSetUp(plug) })
	})
}

func (c *conn) setForwardMask(l netlink.Link) error {
	return c.LinkSetBRSlaveGroupFwdMask(l, segment.ForwardMask)
}

func (c *conn) enslave(l netlink.Link, bridge string) error {
	return c.with(bridge, func(br netlink.Link) error { return c.LinkSetMasterByIndex(l, br.Attrs().Index) })
}
