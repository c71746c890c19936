package kernel

import (
	"errors"
	"fmt"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/rtnl"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// VNITaken is the error that something else on the node uses a VNI on the same UDP port.
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
	return fmt.Sprintf("VNI %d on UDP port %d is in use by %s on this node; choose another vni or vxlanPort",
		e.VNI, e.Port, by)
}

// addVXLAN creates the VXLAN directly in the LAN's netns. Its underlay and its UDP socket are in the netns of the host.
func addVXLAN(host, lan *conn, o segment.AddVXLAN) error {
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU = o.Name, o.MTU
	if lan != host {
		a.Namespace = netlink.NsFd(int(lan.ns))
	}
	v := &netlink.Vxlan{
		LinkAttrs: a, VxlanId: int(o.VNI), Port: int(o.Port), Group: o.Group.AsSlice(), SrcAddr: o.Local.AsSlice(),
		VtepDevIndex: o.UnderlayIndex, Learning: !o.NoLearning, TTL: int(ttl(o.VXLAN)),
	}
	err := host.LinkAdd(v)
	if errors.Is(err, unix.EEXIST) {
		if _, ours, linkErr := lan.link(o.Name); linkErr != nil || !ours {
			return errors.Join(vniTaken(host, o.VXLAN), linkErr)
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

// vniTaken returns the error for a VNI that is in use, with the link that uses it if that is in the host's netns.
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

// ttl returns 0, the kernel's own choice, for a group that stays on the link, and 64 for addresses that may be routed.
func ttl(v segment.VXLAN) uint8 {
	if v.Group.IsLinkLocalMulticast() {
		return 0
	}
	return 64
}

// setVXLAN changes a VXLAN's group and source. The kernel leaves the old group and joins the new one in one step, and
// keeps what the VXLAN has learned (vxlan_changelink in drivers/net/vxlan/vxlan_core.c). An older kernel does so only
// when a VXLAN goes down and up. Then setVXLAN sets it down and up, and frames are lost meanwhile.
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

// RejoinsGroups reports whether a VXLAN that is up leaves and joins groups when its own group changes: since Linux 6.15
// ("vxlan: Join / leave MC group after remote changes"). It returns false for an older kernel with a backport.
var RejoinsGroups = sync.OnceValue(func() bool {
	var u unix.Utsname
	return unix.Uname(&u) == nil && atLeast(unix.ByteSliceToString(u.Release[:]), 6, 15)
})

// atLeast reports whether a kernel's release, such as 6.1.0-28-amd64, is that version or a later one.
func atLeast(release string, major, minor int) bool {
	var x, y int
	if _, err := fmt.Sscanf(release, "%d.%d", &x, &y); err != nil {
		return false
	}
	return x > major || x == major && y >= minor
}

// changeVXLAN changes a VXLAN in one message.
func (c *conn) changeVXLAN(o segment.SetVXLAN) error {
	return c.request(o.Name, func(r *rtnl.Conn, index int) error { return r.ChangeVXLAN(index, o.VXLAN, ttl(o.VXLAN)) })
}
