package rtnl

import (
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Entry is one entry of a bridge's FDB, or of a VXLAN's own.
type Entry struct {
	Index  int // of the port, or of the VXLAN
	State  uint16
	Flags  uint8
	MAC    [6]byte
	VTEP   netip.Addr    // of a VXLAN's entry
	Master int           // of a bridge's entry: the bridge
	Age    time.Duration // since a frame or a program updated it
}

// InVXLAN reports whether the entry is in a VXLAN's own FDB, and not in a bridge's.
func (e Entry) InVXLAN() bool { return e.Flags&unix.NTF_SELF != 0 }

// IsExternal reports whether a program has set the entry, instead of a frame.
func (e Entry) IsExternal() bool { return e.Flags&unix.NTF_EXT_LEARNED != 0 }

// IsPermanent reports whether the entry never ages: it is an address of the bridge's own links, or a remote.
func (e Entry) IsPermanent() bool { return e.State&unix.NUD_PERMANENT != 0 }

// FDB dumps all FDBs of the namespace.
func (c *Conn) FDB() ([]Entry, error) { return c.dumpFDB(0, 0) }

// PortFDB dumps what is behind a port: the part of its bridge's FDB, and its own FDB if it is a VXLAN.
func (c *Conn) PortFDB(port int) ([]Entry, error) { return c.dumpFDB(port, 0) }

// BridgeFDB dumps the FDB of a bridge.
func (c *Conn) BridgeFDB(bridge int) ([]Entry, error) { return c.dumpFDB(0, bridge) }

// dumpFDB dumps the FDBs of a port or of a bridge; 0 is any.
func (c *Conn) dumpFDB(port, bridge int) ([]Entry, error) {
	newRequest := func() *nl.NetlinkRequest {
		req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, unix.NLM_F_DUMP)
		msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
		msg.Index = int32(port)
		req.AddData(msg)
		if bridge != 0 {
			req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(bridge))))
		}
		return req
	}
	return dump(c, newRequest, unix.RTM_NEWNEIGH, func(m []byte) (Entry, bool, error) {
		e, ok := ParseEntry(m)
		return e, ok, nil
	})
}

// clockTick is the unit of times in the kernel's messages (USER_HZ), on all architectures but Alpha.
const clockTick = time.Second / 100

// ParseEntry reads an entry such as k8slan or the kernel makes. It refuses others: those with a port, VNI or device of
// their own.
func ParseEntry(m []byte) (e Entry, ok bool) {
	const size = 12 // of struct ndmsg (include/uapi/linux/neighbour.h)
	if len(m) < size {
		return e, false
	}
	e.Index, e.State, e.Flags = int(int32(binary.NativeEndian.Uint32(m[4:]))), binary.NativeEndian.Uint16(m[8:]), m[10]
	a := attributes{rest: m[size:]}
	for a.next() {
		switch a.kind {
		case unix.NDA_LLADDR:
			ok = copy(e.MAC[:], a.value) == len(e.MAC)
		case unix.NDA_DST:
			e.VTEP, _ = netip.AddrFromSlice(a.value)
		case unix.NDA_MASTER:
			e.Master = int(number(a.value))
		case unix.NDA_CACHEINFO: // the third of struct nda_cacheinfo, ndm_updated (include/uapi/linux/neighbour.h)
			if len(a.value) >= 12 {
				e.Age = time.Duration(binary.NativeEndian.Uint32(a.value[8:])) * clockTick
			}
		case unix.NDA_PORT, unix.NDA_VNI, unix.NDA_IFINDEX:
			return e, false
		}
	}
	return e, ok && a.err == nil
}
