package kernel

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// A tap's ifindex is chosen by LAN and spoke, from a range far above what the kernel assigns. A spoke has one tap on a
// node, so two taps have different ones. (CDI creates a VM's device from major:minor; the kernel's own
// /dev/tap<ifindex> on the host is not used.)
const (
	tapIndexMin   = 1 << 24
	tapIndexSpan  = 1 << 30
	tapIndexTries = 16
)

// tapIndex returns the ifindex for a spoke's tap. Each try has another one.
func tapIndex(lan segment.LAN, spoke string, try uint32) int {
	sum := sha256.Sum256([]byte(lan.String() + "/" + spoke))
	return tapIndexMin + int((binary.BigEndian.Uint32(sum[:])+try)%tapIndexSpan)
}

// tapDevice reads the numbers of a macvtap's character device. Only a sysfs of the link's namespace has them. It opens
// one that is mounted nowhere (fsmount, Linux 5.2).
func tapDevice(ns netns.Handle, link string, index int) (major, minor uint32, err error) {
	err = netns.Do(ns, func() error {
		sysfs, err := openSysfs()
		if err != nil {
			return err
		}
		defer unix.Close(sysfs)
		dev, err := readTapDevice(sysfs, link, index)
		if err != nil {
			return err
		}
		if _, err := fmt.Sscanf(dev, "%d:%d", &major, &minor); err != nil {
			return fmt.Errorf("tap of %s: device number %q: %w", link, dev, err)
		}
		return nil
	})
	return major, minor, err
}

// openSysfs opens a sysfs of the thread's network namespace, mounted nowhere.
func openSysfs() (int, error) {
	fsfd, err := unix.Fsopen("sysfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open a sysfs: %w", err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return -1, fmt.Errorf("set a sysfs up: %w", err)
	}
	const attributes = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return -1, fmt.Errorf("mount a sysfs: %w", err)
	}
	return fd, nil
}

// readTapDevice reads "major:minor" of a tap.
func readTapDevice(sysfs int, link string, index int) (string, error) {
	var errs []error
	for _, format := range []string{"class/net/%s/macvtap/tap%d/dev", "class/net/%s/tap%d/dev"} {
		path := fmt.Sprintf(format, link, index)
		fd, err := unix.Openat(sysfs, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("no %s in sysfs", path))
			continue
		}
		if err != nil {
			return "", fmt.Errorf("open %s in sysfs: %w", path, err)
		}
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		b := make([]byte, 32)
		n, err := f.Read(b)
		if err != nil {
			return "", fmt.Errorf("read %s in sysfs: %w", path, err)
		}
		return strings.TrimSpace(string(b[:n])), nil
	}
	return "", fmt.Errorf("tap of %s has no device: %w", link, errors.Join(errs...))
}

// macvtap creates the VM's link on the standing plug. The plug's altname is the claim: each name exists once.
func (c *claiming) macvtap() (Attachment, error) {
	id, plug, plugName := c.ID(), c.plug, segment.PlugName(c.Spoke)
	if err := c.lan.LinkSetAlias(plug, c.claim().Alias()); err != nil {
		return Attachment{}, fmt.Errorf("set the alias of %s: %w", plugName, err)
	}
	if err := c.lan.LinkAddAltName(plug, id); err != nil {
		return Attachment{}, fmt.Errorf("claim %s: %w", plugName, err)
	}
	c.undo = append(c.undo, func() error { return c.lan.unclaim(plug, id) })
	if err := c.addMacvtap(plug); err != nil {
		return Attachment{}, err
	}
	c.undo = append(c.undo, func() error { return c.pod.delLink(c.Interface) })
	err := c.pod.with(c.Interface, func(tap netlink.Link) error {
		// A passthru macvtap drops all multicast unless it is allmulticast.
		if err := c.pod.LinkSetAllmulticastOn(tap); err != nil {
			return fmt.Errorf("set %s allmulticast: %w", c.Interface, err)
		}
		return netns.Do(c.pod.ns, func() error { return noIPv6(c.Interface) })
	})
	if err != nil {
		return Attachment{}, err
	}
	att, err := c.finishPodLink()
	if err != nil {
		return Attachment{}, err
	}
	att.HostInterface = plugName
	att.TapMajor, att.TapMinor, err = tapDevice(c.pod.ns, c.Interface, att.Index)
	return att, err
}

// addMacvtap creates the macvtap directly in the pod, with an ifindex that names the tap's device.
func (c *claiming) addMacvtap(plug netlink.Link) error {
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU, a.ParentIndex, a.Namespace = c.Interface, c.MTU, plug.Attrs().Index, netlink.NsFd(int(c.pod.ns))
	for try := range uint32(tapIndexTries) {
		a.Index = tapIndex(c.want.LAN, c.Spoke, try)
		tap := netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_PASSTHRU}
		err := c.lan.LinkAdd(&netlink.Macvtap{Macvlan: tap})
		if errors.Is(err, unix.EBUSY) { // the pod has a link of that ifindex
			continue
		}
		if err != nil {
			return fmt.Errorf("create macvtap %s on %s for the pod: %w", c.Interface, plug.Attrs().Name, err)
		}
		return nil
	}
	return fmt.Errorf("create macvtap %s: no free ifindex in the pod", c.Interface)
}

// verifyClaim ends a macvtap's claim if the macvtap is gone.
func (c *conn) verifyClaim(spoke, claimID string) error {
	plug, ok, err := c.link(segment.PlugName(spoke))
	if err != nil || !ok {
		return err
	}
	free, err := c.isFree(plug, spoke)
	if err != nil || !free {
		return err
	}
	return c.unclaim(plug, claimID)
}

// isFree reports whether a plug has no macvtap. Only the plug's own driver knows: a second passthru link on it fails
// with EINVAL while there is a first (macvlan_common_newlink in drivers/net/macvlan.c).
func (c *conn) isFree(plug netlink.Link, spoke string) (bool, error) {
	a := netlink.NewLinkAttrs()
	a.Name, a.ParentIndex = spoke+"+t", plug.Attrs().Index // no bridge and no VXLAN can have that name
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

// unclaim removes the marks of a claim from a plug. The alias is last, because without the altname it means nothing.
func (c *conn) unclaim(plug netlink.Link, claimID string) error {
	err := c.LinkDelAltName(plug, claimID)
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("end claim %s on %s: %w", claimID, plug.Attrs().Name, err)
	}
	return c.LinkSetAlias(plug, "")
}
