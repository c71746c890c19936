package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/netns"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// conn is a netlink connection into one network namespace. One that is in hand is used by many goroutines.
type conn struct {
	*netlink.Handle // nil where nothing but execute is needed
	ns              netns.Handle
	sockets         map[int]*nl.SocketHandle // for the requests that the library has no call for

	mu      sync.Mutex
	ethtool *ethtool.Ethtool // nil until it is needed; mu guards it
}

// dial connects to a namespace and owns the handle from then on, also when it fails.
func dial(ns netns.Handle) (*conn, error) {
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
		if nl.DeserializeIfInfomsg(m).Flags&unix.IFF_LOOPBACK == 0 { // lo is in every namespace and nobody's
			links = append(links, l)
		}
	}
	slices.SortFunc(links, func(a, b segment.Link) int { return a.Index - b.Index })
	return links, nil
}

// skipStats is RTEXT_FILTER_SKIP_STATS (include/uapi/linux/rtnetlink.h): counters are most of a dump's size.
const skipStats = 1 << 3

// parseLink reads a link from the kernel's message. The library's own reader knows neither a bridge's nor a port's settings, and
// reads very much that nobody asks for, which makes a look at a LAN take twice as long.
func parseLink(m []byte) (l segment.Link, err error) {
	info := nl.DeserializeIfInfomsg(m)
	l.Index, l.Up, l.Type, l.LacksIPv6 = int(info.Index), info.Flags&unix.IFF_UP != 0, "device", true // unless it says something else
	attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfInfomsg:])
	if err != nil {
		return l, err
	}
	for _, attr := range attrs {
		switch attr.Attr.Type &^ unix.NLA_F_NESTED {
		case unix.IFLA_IFNAME:
			l.Name = nl.BytesToString(attr.Value)
		case unix.IFLA_IFALIAS:
			l.Alias = nl.BytesToString(attr.Value)
		case unix.IFLA_ADDRESS:
			l.MAC = net.HardwareAddr(attr.Value)
		case unix.IFLA_MTU:
			l.MTU = int(nl.NativeEndian().Uint32(attr.Value))
		case unix.IFLA_MASTER:
			l.Master = int(nl.NativeEndian().Uint32(attr.Value))
		case unix.IFLA_PROMISCUITY:
			l.Promisc = int(nl.NativeEndian().Uint32(attr.Value))
		case unix.IFLA_PROP_LIST:
			l.AltNames, err = parseAltNames(attr.Value)
		case unix.IFLA_LINKINFO:
			err = parseLinkInfo(&l, attr.Value)
		case unix.IFLA_AF_SPEC:
			err = parseIPv6(&l, attr.Value)
		}
		if err != nil {
			return l, err
		}
	}
	return l, nil
}

func parseAltNames(b []byte) (names []string, err error) {
	list, err := nl.ParseRouteAttr(b)
	for _, name := range list {
		if name.Attr.Type == unix.IFLA_ALT_IFNAME {
			names = append(names, nl.BytesToString(name.Value))
		}
	}
	return names, err
}

// parseIPv6 reads whether a link has IPv6 switched on, and whether it would give itself no address then. One that has no IPv6 says nothing of it
// (inet6_fill_link_af in net/ipv6/addrconf.c).
func parseIPv6(l *segment.Link, b []byte) error {
	const (
		disableIPv6 = 26 // DEVCONF_DISABLE_IPV6 (include/uapi/linux/ipv6.h), of an array of int32
		addrGenMode = 8  // IFLA_INET6_ADDR_GEN_MODE (include/uapi/linux/if_link.h)
		none        = 1  // IN6_ADDR_GEN_MODE_NONE
	)
	families, err := nl.ParseRouteAttr(b)
	if err != nil {
		return err
	}
	for _, family := range families {
		if family.Attr.Type&^unix.NLA_F_NESTED != unix.AF_INET6 {
			continue
		}
		l.LacksIPv6 = false
		settings, err := nl.ParseRouteAttr(family.Value)
		if err != nil {
			return err
		}
		for _, s := range settings {
			switch {
			case s.Attr.Type == unix.IFLA_INET6_CONF && len(s.Value) >= 4*(disableIPv6+1):
				l.IPv6 = nl.NativeEndian().Uint32(s.Value[4*disableIPv6:]) == 0
			case s.Attr.Type == addrGenMode:
				l.NoIPv6 = s.Value[0] == none
			}
		}
	}
	return nil
}

// parseLinkInfo reads what is particular to a link of its kind, and to a bridge's port.
func parseLinkInfo(l *segment.Link, b []byte) error {
	infos, err := nl.ParseRouteAttr(b)
	if err != nil {
		return err
	}
	for _, info := range infos { // its kind comes first (rtnl_link_info_fill in net/core/rtnetlink.c)
		if info.Attr.Type == nl.IFLA_INFO_KIND {
			l.Type = nl.BytesToString(info.Value)
			continue
		}
		var parse func(*segment.Link, syscall.NetlinkRouteAttr)
		switch about := info.Attr.Type &^ unix.NLA_F_NESTED; {
		case about == nl.IFLA_INFO_DATA && l.Type == "bridge":
			parse, l.Learned = parseBridge, -1
		case about == nl.IFLA_INFO_DATA && l.Type == "vxlan":
			parse = parseVXLAN
		case about == nl.IFLA_INFO_SLAVE_DATA:
			parse = parsePort
		default:
			continue
		}
		data, err := nl.ParseRouteAttr(info.Value)
		if err != nil {
			return err
		}
		for _, d := range data {
			parse(l, d)
		}
	}
	return nil
}

// fdbLearned is IFLA_BR_FDB_N_LEARNED (include/uapi/linux/if_link.h), which kernels before 6.7 don't have.
const fdbLearned = 48

func parseBridge(l *segment.Link, d syscall.NetlinkRouteAttr) {
	switch d.Attr.Type {
	case nl.IFLA_BR_STP_STATE:
		l.Bridge.STP = nl.NativeEndian().Uint32(d.Value) != 0
	case nl.IFLA_BR_VLAN_FILTERING:
		l.Bridge.VLANFiltering = d.Value[0] != 0
	case nl.IFLA_BR_MCAST_SNOOPING:
		l.Bridge.MulticastSnooping = d.Value[0] != 0
	case fdbLearned:
		l.Learned = int(nl.NativeEndian().Uint32(d.Value))
	}
}

func parseVXLAN(l *segment.Link, d syscall.NetlinkRouteAttr) {
	switch d.Attr.Type {
	case nl.IFLA_VXLAN_ID:
		l.VXLAN.VNI = nl.NativeEndian().Uint32(d.Value)
	case nl.IFLA_VXLAN_PORT:
		l.VXLAN.Port = binary.BigEndian.Uint16(d.Value)
	case nl.IFLA_VXLAN_LINK:
		l.VXLAN.UnderlayIndex = int(nl.NativeEndian().Uint32(d.Value))
	case nl.IFLA_VXLAN_GROUP, nl.IFLA_VXLAN_GROUP6:
		l.VXLAN.Group, _ = netip.AddrFromSlice(d.Value)
	case nl.IFLA_VXLAN_LEARNING:
		l.VXLAN.NoLearning = d.Value[0] == 0
	case nl.IFLA_VXLAN_LOCAL, nl.IFLA_VXLAN_LOCAL6:
		l.VXLAN.Local, _ = netip.AddrFromSlice(d.Value)
	}
}

func parsePort(l *segment.Link, d syscall.NetlinkRouteAttr) {
	switch d.Attr.Type {
	case nl.IFLA_BRPORT_GROUP_FWD_MASK:
		l.ForwardMask = nl.NativeEndian().Uint16(d.Value)
	case nl.IFLA_BRPORT_NEIGH_SUPPRESS:
		l.Suppress = d.Value[0] != 0
	case nl.IFLA_BRPORT_LEARNING:
		l.NoLearning = d.Value[0] == 0
	}
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
		if err := netns.Do(c.ns, c.openSocket); err != nil {
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

// retryDump repeats a dump that was interrupted by a change.
func retryDump[T any](dump func() ([]T, error)) ([]T, error) {
	var items []T
	var err error
	for range dumpTries {
		if items, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return items, err
		}
	}
	return nil, err
}
