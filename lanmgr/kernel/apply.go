package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Reconcile observes a segment under its lock, does what decide says, and returns what was done.
// It stops at the first operation that fails; what was done before stays and the next Reconcile goes on from there.
func (n *Node) Reconcile(ctx context.Context, netnsName string, decide func(segment.State) []segment.Op) ([]segment.Op, error) {
	if err := checkName(netnsName); err != nil {
		return nil, err
	}
	unlock, err := n.lock(ctx, netnsName)
	if err != nil {
		return nil, err
	}
	defer unlock()
	absent := false
	done, err := n.reconcile(ctx, netnsName, func(have segment.State) []segment.Op {
		ops := decide(have)
		absent = len(ops) == 0 && !have.Exists && !have.Lost && !have.Dead && have.Record == nil
		return ops
	})
	if absent { // of what isn't there, the lock shall not stay either
		err = errors.Join(err, removeFile(n.lockPath(netnsName)))
	}
	return done, err
}

// reconcile is Reconcile for those who have the lock.
func (n *Node) reconcile(ctx context.Context, netnsName string, decide func(segment.State) []segment.Op) ([]segment.Op, error) {
	have, err := n.Observe(ctx, netnsName)
	if err != nil {
		return nil, err
	}
	b := &builder{node: n, netns: netnsName}
	defer b.close()
	var done []segment.Op
	for _, op := range decide(have) {
		if err := ctx.Err(); err != nil {
			return done, err
		}
		if err := b.apply(op); err != nil {
			return done, fmt.Errorf("%s: %s: %w", netnsName, op, err)
		}
		done = append(done, op)
	}
	return done, nil
}

// Apply does operations on a segment while nobody else changes it, without a look at it before.
func (n *Node) Apply(ctx context.Context, netnsName string, ops []segment.Op) error {
	if err := checkName(netnsName); err != nil {
		return err
	}
	unlock, err := n.lock(ctx, netnsName)
	if err != nil {
		return err
	}
	defer unlock()
	b := &builder{node: n, netns: netnsName}
	defer b.close()
	for _, op := range ops {
		if err := b.apply(op); err != nil {
			return fmt.Errorf("%s: %s: %w", netnsName, op, err)
		}
	}
	return nil
}

// VNITaken says that something else on the node uses a VNI on the same UDP port.
type VNITaken struct {
	VNI  uint32
	Port uint16
	By   string // the link's name, where it is in the node's own netns
}

func (e *VNITaken) Error() string {
	by := "something else"
	if e.By != "" {
		by = fmt.Sprintf("%q", e.By)
	}
	return fmt.Sprintf("VNI %d on UDP port %d is in use by %s on this node; choose another vni or vxlanPort", e.VNI, e.Port, by)
}

// builder applies operations to one segment, over the connection in hand.
type builder struct {
	node  *Node
	netns string
	held  *held // nil until it is needed
}

func (b *builder) close() {
	if b.held != nil {
		b.node.giveBack(b.held)
		b.held = nil
	}
}

// lan is the connection into the segment's namespace.
func (b *builder) lan() (*conn, error) {
	if b.held != nil {
		return b.held.conn, nil
	}
	s := segment.State{Netns: b.netns}
	h, err := b.node.take(&s)
	if err != nil {
		return nil, err
	}
	if h == nil {
		return nil, fmt.Errorf("%w (no %s)", ErrNoLAN, b.node.netnsPath(b.netns))
	}
	b.held = h
	return h.conn, nil
}

// apply does one operation; doing it again does no harm.
func (b *builder) apply(op segment.Op) error {
	switch o := op.(type) {
	case segment.CreateNetns:
		return b.node.createNetns(o.Netns)
	case segment.RestoreNetns:
		return b.node.restoreNetns(o.Netns)
	case segment.RemoveNetns:
		b.close()
		return b.node.removeNetns(o.Netns)
	case segment.WriteRecord:
		return b.node.writeRecord(o.Segment)
	case segment.RemoveRecord:
		return removeFile(b.node.recordPath(o.Netns))
	}
	c, err := b.lan()
	if err != nil {
		return err
	}
	switch o := op.(type) {
	case segment.AddVXLAN:
		host, err := b.node.dialHost()
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

// apply does one operation that stays within the namespace.
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
		if o.Learned { // before: while the remotes are there, what was broken off is begun again
			if err := c.forgetBehind(o.Name, o.Remotes); err != nil {
				return err
			}
		}
		return c.changeRemotes(o.Name, o.Remotes, c.forget)
	case segment.SetFDB:
		return c.setFDB(o)
	case segment.DelFDB:
		return c.delFDB(o)
	case segment.SetNeighborDiscovery:
		return c.setNeighborDiscovery(o)
	case segment.AddNeighbors:
		return c.changeNeighbors(o.Name, o.Neighbors, c.NeighSet)
	case segment.DelNeighbors:
		return c.changeNeighbors(o.Name, o.Neighbors, c.forget)
	case segment.AddPair:
		return c.addPair(o)
	case segment.DelLink:
		return c.delLink(o.Name)
	case segment.DelLinks:
		return c.delLinks(o.Names)
	case segment.DelPairs:
		return c.delGroup(segment.LinkGroup)
	case segment.SetTxChecksum:
		return c.setTxChecksum(o.Name, o.On)
	case segment.VerifyClaim:
		return c.settle(o.Spoke, o.ClaimID)
	}
	return c.set(op)
}

// silence makes a namespace silent. Links that spoke before have taught the bridge where their addresses are, and a plug
// has that of the pod or VM that it waits for, which may be elsewhere: it forgets what it learnt.
func (c *conn) silence(bridge string) error {
	if err := do(c.ns, silence); err != nil || bridge == "" {
		return err
	}
	return c.setLinkInfo(bridge, "bridge", func(data *nl.RtAttr) { data.AddRtAttr(nl.IFLA_BR_FDB_FLUSH, nil) })
}

// set does the operations that change one setting of one link.
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
	return fmt.Errorf("no way to do %T", op)
}

// delAltName takes a name off a link; it is no error if the link has gone, or doesn't have it.
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

func (c *conn) with(name string, f func(netlink.Link) error) error {
	l, ok, err := c.link(name)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("link %s is gone", name)
	}
	return f(l)
}

func (c *conn) setForwardMask(l netlink.Link) error {
	return c.LinkSetBRSlaveGroupFwdMask(l, segment.ForwardMask)
}

func (c *conn) enslave(l netlink.Link, bridge string) error {
	return c.with(bridge, func(br netlink.Link) error { return c.LinkSetMasterByIndex(l, br.Attrs().Index) })
}

// up sets a link up. A VXLAN opens its UDP port only now, so this is where another user of the port shows.
func (c *conn) up(l netlink.Link) error {
	err := c.LinkSetUp(l)
	if v, ok := l.(*netlink.Vxlan); ok && errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("UDP port %d is in use by something else on this node; choose another vxlanPort: %w", v.Port, err)
	}
	return err
}

func (n *Node) createNetns(name string) error {
	path := n.netnsPath(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make the folder of network namespaces: %w", err)
	}
	return createNetns(path)
}

// restoreNetns mounts the namespace in hand at its name again, over whatever is there.
func (n *Node) restoreNetns(name string) error {
	h := n.inHand(name)
	if h == nil {
		return fmt.Errorf("network namespace %s is not in hand", name)
	}
	defer n.giveBack(h)
	path := n.netnsPath(name)
	if err := unmountNetns(path); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make the folder of network namespaces: %w", err)
	}
	return mountNetns(fmt.Sprintf("/proc/self/fd/%d", int(h.conn.ns)), path)
}

// removeNetns takes a segment's name and lock away.
func (n *Node) removeNetns(name string) error {
	n.letGo(name)
	if err := unmountNetns(n.netnsPath(name)); err != nil {
		return err
	}
	return removeFile(n.lockPath(name))
}

func (c *conn) addBridge(o segment.AddBridge) error {
	off := false
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU = o.Name, o.MTU
	br := &netlink.Bridge{LinkAttrs: a, MulticastSnooping: &off} // a new one has neither STP nor VLAN filtering
	if err := c.LinkAdd(br); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return c.with(o.Name, c.up)
}

// addVXLAN makes the VXLAN from where its underlay and its UDP socket stay, the node's own netns, directly into the LAN's.
func addVXLAN(host, lan *conn, o segment.AddVXLAN) error {
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU = o.Name, o.MTU
	if lan != host {
		a.Namespace = netlink.NsFd(int(lan.ns))
	}
	v := &netlink.Vxlan{
		LinkAttrs: a, VxlanId: int(o.VNI), Port: int(o.Port), Group: o.Group.AsSlice(), SrcAddr: o.Local.AsSlice(),
		VtepDevIndex: o.UnderlayIndex, Learning: !o.NoLearning, TTL: ttl(o.VXLAN),
	}
	err := host.LinkAdd(v)
	if errors.Is(err, unix.EEXIST) {
		if _, ours, lookErr := lan.link(o.Name); lookErr != nil || !ours {
			return errors.Join(vniTaken(host, o.VXLAN), lookErr)
		}
		err = nil
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: the kernel has no VXLAN; load its module on the node (modprobe vxlan)", err)
	}
	if err != nil || o.Bridge == "" {
		return err
	}
	return lan.with(o.Name, func(l netlink.Link) error {
		if err := lan.enslave(l, o.Bridge); err != nil {
			return err
		}
		if o.NoLearning {
			if err := lan.LinkSetLearning(l, false); err != nil {
				return err
			}
		}
		return lan.setForwardMask(l)
	})
}

// setVXLAN changes a VXLAN's group and source, each of which may be none: the unspecified address of the family then. The old
// group is left and the new one joined in one step; what the VXLAN has learnt stays (vxlan_changelink in
// drivers/net/vxlan/vxlan_core.c). Where the kernel does that only as a VXLAN goes down and up, so does this one, and frames are lost meanwhile.
func (c *conn) setVXLAN(o segment.SetVXLAN) error {
	if RejoinsGroups() {
		return c.changeVXLAN(o)
	}
	return c.with(o.Name, func(l netlink.Link) error {
		if l.Attrs().RawFlags&unix.IFF_UP == 0 {
			return c.changeVXLAN(o)
		}
		if err := c.LinkSetDown(l); err != nil {
			return err
		}
		return errors.Join(c.changeVXLAN(o), c.LinkSetUp(l))
	})
}

// RejoinsGroups says whether a VXLAN that is up leaves and joins groups when its own is changed: since Linux 6.15 ("vxlan: Join / leave MC
// group after remote changes"); an older kernel that has it as well is not known by its number.
var RejoinsGroups = sync.OnceValue(func() bool {
	var u unix.Utsname
	return unix.Uname(&u) == nil && atLeast(unix.ByteSliceToString(u.Release[:]), 6, 15)
})

// atLeast compares the release of a kernel, such as 6.1.0-28-amd64.
func atLeast(release string, major, minor int) bool {
	var x, y int
	if _, err := fmt.Sscanf(release, "%d.%d", &x, &y); err != nil {
		return false
	}
	return x > major || x == major && y >= minor
}

func (c *conn) changeVXLAN(o segment.SetVXLAN) error {
	none, group, local := netip.IPv6Unspecified(), nl.IFLA_VXLAN_GROUP6, nl.IFLA_VXLAN_LOCAL6
	if o.Group.Is4() || o.Local.Is4() {
		none, group, local = netip.IPv4Unspecified(), nl.IFLA_VXLAN_GROUP, nl.IFLA_VXLAN_LOCAL
	}
	or := func(a netip.Addr) []byte {
		if !a.IsValid() {
			a = none
		}
		return a.AsSlice()
	}
	return c.setLinkInfo(o.Name, "vxlan", func(data *nl.RtAttr) {
		data.AddRtAttr(nl.IFLA_VXLAN_ID, nl.Uint32Attr(o.VNI))
		data.AddRtAttr(group, or(o.Group))
		data.AddRtAttr(local, or(o.Local))
		data.AddRtAttr(nl.IFLA_VXLAN_TTL, nl.Uint8Attr(uint8(ttl(o.VXLAN))))
		data.AddRtAttr(nl.IFLA_VXLAN_LEARNING, boolAttr(!o.NoLearning))
	})
}

func boolAttr(on bool) []byte {
	if on {
		return nl.Uint8Attr(1)
	}
	return nl.Uint8Attr(0)
}

// flooded is the address under which a VXLAN's table has those who get what is flooded (all_zeros_mac in
// drivers/net/vxlan/vxlan_core.c).
var flooded = make(net.HardwareAddr, 6)

// changeRemotes adds or deletes remotes one by one. No device is named: the kernel would look for it in the LAN's namespace
// (vxlan_fdb_parse), so the node's routes say by which device a packet leaves.
func (c *conn) changeRemotes(vxlan string, remotes []netip.Addr, change func(*netlink.Neigh) error) error {
	return c.with(vxlan, func(l netlink.Link) error {
		for _, r := range remotes {
			err := change(&netlink.Neigh{
				LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT,
				HardwareAddr: flooded, IP: r.AsSlice(),
			})
			if err != nil {
				return fmt.Errorf("remote %s: %w", r, err)
			}
		}
		return nil
	})
}

// forgetBehind deletes what a VXLAN has learnt to be behind these remotes. An entry is deleted by its MAC alone: one that has moved there
// from a link-local address bears a device, which cannot be named (see changeRemotes).
func (c *conn) forgetBehind(vxlan string, remotes []netip.Addr) error {
	return c.with(vxlan, func(l netlink.Link) error {
		entries, err := retryDump(func() ([]netlink.Neigh, error) { return c.NeighList(l.Attrs().Index, unix.AF_BRIDGE) })
		if err != nil {
			return fmt.Errorf("list what it has learnt: %w", err)
		}
		for _, e := range entries {
			remote, _ := netip.AddrFromSlice(e.IP)
			if e.Flags&netlink.NTF_SELF == 0 || e.State&netlink.NUD_PERMANENT != 0 || !slices.Contains(remotes, remote.Unmap()) {
				continue
			}
			any := net.IPv6unspecified
			if remote.Unmap().Is4() {
				any = net.IPv4zero
			}
			err := c.forget(&netlink.Neigh{
				LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, HardwareAddr: e.HardwareAddr, IP: any,
			})
			if err != nil {
				return fmt.Errorf("forget %s behind %s: %w", e.HardwareAddr, remote, err)
			}
		}
		return nil
	})
}

// setFDB writes both halves of entries, each in one request. They are of a state that the VXLAN takes and that does not age because they
// come from outside (vxlan_fdb_parse and vxlan_cleanup in drivers/net/vxlan/vxlan_core.c).
func (c *conn) setFDB(o segment.SetFDB) error {
	return c.with(o.Name, func(l netlink.Link) error {
		for _, e := range o.Entries {
			err := c.NeighSet(&netlink.Neigh{
				LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_REACHABLE,
				Flags: netlink.NTF_SELF | netlink.NTF_MASTER | netlink.NTF_EXT_LEARNED, HardwareAddr: e.MAC[:], IP: e.VTEP.AsSlice(),
			})
			if err != nil {
				return fmt.Errorf("%s behind %s: %w", net.HardwareAddr(e.MAC[:]), e.VTEP, err)
			}
		}
		return nil
	})
}

// delFDB deletes the halves of entries, each in a request of its own: of one for both the kernel leaves the second where the first is
// gone (rtnl_fdb_del in net/core/rtnetlink.c).
func (c *conn) delFDB(o segment.DelFDB) error {
	return c.with(o.Name, func(l netlink.Link) error {
		for _, e := range o.Entries {
			n := netlink.Neigh{LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, HardwareAddr: e.MAC[:]}
			if e.Bridge {
				n.Flags = netlink.NTF_MASTER
				if err := c.forget(&n); err != nil {
					return fmt.Errorf("%s on the bridge: %w", n.HardwareAddr, err)
				}
			}
			if e.VTEP.IsValid() {
				n.Flags, n.IP = netlink.NTF_SELF, e.VTEP.AsSlice()
				if err := c.forget(&n); err != nil {
					return fmt.Errorf("%s behind %s: %w", n.HardwareAddr, e.VTEP, err)
				}
			}
		}
		return nil
	})
}

// forget deletes an entry of a table; one that is gone is no error.
func (c *conn) forget(n *netlink.Neigh) error {
	if err := c.NeighDel(n); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// ttl is 0, the kernel's own choice, for groups that stay on the link; others are meant to be routed.
func ttl(v segment.VXLAN) int {
	if v.Group.IsLinkLocalMulticast() {
		return 0
	}
	return 64
}

func vniTaken(host *conn, v segment.VXLAN) error {
	taken := &VNITaken{VNI: v.VNI, Port: v.Port}
	links, err := host.links()
	if err != nil {
		return errors.Join(taken, err)
	}
	for _, l := range links {
		if l.Type == "vxlan" && l.VXLAN.VNI == v.VNI && l.VXLAN.Port == v.Port {
			taken.By = l.Name
		}
	}
	return taken
}

// addPair makes a spoke's standing pair. The bridge's end can be up from the start, its peer cannot
// (rtnl_configure_link runs before the ends know each other: ENOTCONN).
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

// delLinks deletes links in one message. They are named to it by a link group of their own, of a number that no earlier
// deletion, broken off halfway, can have left on a link that is wanted now.
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
	return c.delGroup(group)
}

// settle ends a macvtap's claim if the macvtap is gone. Whether it is, only the lower link knows: a second passthru
// link on it fails with EINVAL while there is a first (macvlan_common_newlink in drivers/net/macvlan.c).
func (c *conn) settle(spoke, claimID string) error {
	plug, ok, err := c.link(segment.PlugName(spoke))
	if err != nil || !ok {
		return err
	}
	free, err := c.free(plug, spoke)
	if err != nil || !free {
		return err
	}
	return c.unclaim(plug, claimID)
}

// free says whether a plug has no macvtap on it.
func (c *conn) free(plug netlink.Link, spoke string) (bool, error) {
	a := netlink.NewLinkAttrs()
	a.Name, a.ParentIndex = spoke+"+t", plug.Attrs().Index // no bridge and no VXLAN can be called that
	probe := &netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_PASSTHRU}
	err := c.LinkAdd(probe)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EBUSY) {
		return false, nil
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return false, fmt.Errorf("find out whether a macvtap is on %s: %w", plug.Attrs().Name, err)
	}
	return true, c.delLink(a.Name)
}

// unclaim takes the marks of a claim off a plug; the alias last, for without the altname it means nothing.
func (c *conn) unclaim(plug netlink.Link, claimID string) error {
	if err := c.LinkDelAltName(plug, claimID); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("end claim %s on %s: %w", claimID, plug.Attrs().Name, err)
	}
	return c.LinkSetAlias(plug, "")
}
