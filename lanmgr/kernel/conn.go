package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// conn is a netlink connection into one network namespace.
type conn struct {
	*netlink.Handle // nil where nothing but execute is needed
	ns              netns.NsHandle
	sockets         map[int]*nl.SocketHandle // for the requests that the library has no call for
	ethtool         *ethtool.Ethtool         // nil until it is needed
}

// dial connects to a namespace and owns the handle from then on, also when it fails.
func dial(ns netns.NsHandle) (*conn, error) {
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	return &conn{Handle: h, ns: ns}, nil
}

// close ends the connection.
func (c *conn) close() {
	if c.Handle != nil {
		c.Handle.Close()
	}
	for _, s := range c.sockets {
		s.Close()
	}
	if c.ethtool != nil {
		c.ethtool.Close()
	}
	c.ns.Close()
}

// link finds a link by its name or an altname.
func (c *conn) link(name string) (l netlink.Link, ok bool, err error) {
	l, err = c.LinkByName(name)
	if notFound(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look up link %s: %w", name, err)
	}
	return l, true, nil
}

func notFound(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing)
}

// dumpTries is how often a dump is repeated that something else interrupted; under churn four in ten are.
const dumpTries = 50

// links dumps the namespace's links.
func (c *conn) links() ([]segment.Link, error) {
	var msgs [][]byte
	var err error
	for range dumpTries {
		req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
		req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
		msgs, err = c.execute(req, unix.RTM_NEWLINK)
		if !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	links := make([]segment.Link, 0, len(msgs))
	for _, m := range msgs {
		l, err := parseLink(m)
		if err != nil {
			return nil, fmt.Errorf("list links: %w", err)
		}
		if l.Type != "" {
			links = append(links, l)
		}
	}
	slices.SortFunc(links, func(a, b segment.Link) int { return a.Index - b.Index })
	return links, nil
}

// skipStats is RTEXT_FILTER_SKIP_STATS (include/uapi/linux/rtnetlink.h): counters are most of a dump's size.
const skipStats = 1 << 3

// parseLink reads a link from the kernel's message: what the library knows and, beside it, a bridge's and a port's own settings.
func parseLink(m []byte) (segment.Link, error) {
	nlLink, err := netlink.LinkDeserialize(nil, m)
	if err != nil {
		return segment.Link{}, err
	}
	a := nlLink.Attrs()
	l := segment.Link{
		Index: a.Index, Name: a.Name, AltNames: a.AltNames, Alias: a.Alias, Type: nlLink.Type(), MAC: a.HardwareAddr,
		MTU: a.MTU, Up: a.RawFlags&unix.IFF_UP != 0, Master: a.MasterIndex, Promisc: a.Promisc,
	}
	if a.RawFlags&unix.IFF_LOOPBACK != 0 {
		l.Type = "" // lo is in every namespace and nobody's
	}
	if v, ok := nlLink.(*netlink.Vxlan); ok {
		group, _ := netip.AddrFromSlice(v.Group)
		l.VXLAN = segment.VXLANState{VNI: uint32(v.VxlanId), Port: uint16(v.Port), Group: group.Unmap(), UnderlayIndex: v.VtepDevIndex}
	}
	attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfInfomsg:])
	if err != nil {
		return l, err
	}
	for _, attr := range attrs {
		switch attr.Attr.Type &^ unix.NLA_F_NESTED {
		case unix.IFLA_LINKINFO:
			err = parseLinkInfo(&l, attr.Value)
		case unix.IFLA_AF_SPEC:
			l.IPv6, err = parseIPv6(attr.Value)
		}
		if err != nil {
			return l, err
		}
	}
	return l, nil
}

// parseIPv6 says whether a link has IPv6 switched on.
func parseIPv6(b []byte) (bool, error) {
	const disableIPv6 = 26 // DEVCONF_DISABLE_IPV6 (include/uapi/linux/ipv6.h), of an array of int32
	families, err := nl.ParseRouteAttr(b)
	if err != nil {
		return false, err
	}
	for _, family := range families {
		if family.Attr.Type&^unix.NLA_F_NESTED != unix.AF_INET6 {
			continue
		}
		settings, err := nl.ParseRouteAttr(family.Value)
		if err != nil {
			return false, err
		}
		for _, s := range settings {
			if s.Attr.Type == unix.IFLA_INET6_CONF && len(s.Value) >= 4*(disableIPv6+1) {
				return nl.NativeEndian().Uint32(s.Value[4*disableIPv6:]) == 0, nil
			}
		}
	}
	return false, nil
}

func parseLinkInfo(l *segment.Link, b []byte) error {
	infos, err := nl.ParseRouteAttr(b)
	if err != nil {
		return err
	}
	for _, info := range infos {
		switch {
		case info.Attr.Type&^unix.NLA_F_NESTED == nl.IFLA_INFO_DATA && l.Type == "bridge":
			data, err := nl.ParseRouteAttr(info.Value)
			if err != nil {
				return err
			}
			for _, d := range data {
				switch d.Attr.Type {
				case nl.IFLA_BR_STP_STATE:
					l.Bridge.STP = nl.NativeEndian().Uint32(d.Value) != 0
				case nl.IFLA_BR_VLAN_FILTERING:
					l.Bridge.VLANFiltering = d.Value[0] != 0
				case nl.IFLA_BR_MCAST_SNOOPING:
					l.Bridge.MulticastSnooping = d.Value[0] != 0
				}
			}
		case info.Attr.Type&^unix.NLA_F_NESTED == nl.IFLA_INFO_SLAVE_DATA:
			data, err := nl.ParseRouteAttr(info.Value)
			if err != nil {
				return err
			}
			for _, d := range data {
				if d.Attr.Type == nl.IFLA_BRPORT_GROUP_FWD_MASK {
					l.ForwardMask = nl.NativeEndian().Uint16(d.Value)
				}
			}
		}
	}
	return nil
}

// setBridge switches off what makes a bridge less than transparent, in one message. What is off already is not named:
// a kernel that was built without VLAN filtering refuses even to switch it off.
func (c *conn) setBridge(o segment.SetBridge) error {
	return c.setLinkInfo(o.Name, "bridge", func(data *nl.RtAttr) {
		if o.Off.STP {
			data.AddRtAttr(nl.IFLA_BR_STP_STATE, nl.Uint32Attr(0))
		}
		if o.Off.VLANFiltering {
			data.AddRtAttr(nl.IFLA_BR_VLAN_FILTERING, nl.Uint8Attr(0))
		}
		if o.Off.MulticastSnooping {
			data.AddRtAttr(nl.IFLA_BR_MCAST_SNOOPING, nl.Uint8Attr(0))
		}
	})
}

func (c *conn) setLinkInfo(name, kind string, fill func(data *nl.RtAttr)) error {
	l, ok, err := c.link(name)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("link %s is gone", name)
	}
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(l.Attrs().Index)
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated(kind))
	fill(info.AddRtAttr(nl.IFLA_INFO_DATA, nil))
	req.AddData(info)
	_, err = c.execute(req, 0)
	return err
}

// delGroup deletes every link of a link group in one message.
func (c *conn) delGroup(group uint32) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
	_, err := c.execute(req, 0)
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// execute sends a request that the library has no call for.
func (c *conn) execute(req *nl.NetlinkRequest, answer uint16) ([][]byte, error) {
	if c.sockets == nil {
		if err := do(c.ns, c.openSocket); err != nil {
			return nil, err
		}
	}
	req.Sockets = c.sockets
	return req.Execute(unix.NETLINK_ROUTE, answer)
}

// openSocket opens what execute needs, on a thread that is in the namespace.
func (c *conn) openSocket() error {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open a netlink socket: %w", err)
	}
	c.sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}
	return nil
}
