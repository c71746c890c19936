package segment

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
)

// PortName is the bridge's end of a spoke's standing pair: _b for bridge. A spoke's own name has no underscore.
func PortName(spoke string) string { return spoke + "_b" }

// PortMTU returns the MTU of a spoke's standing port in a LAN of that MTU, in bytes. A guest's frame arrives with all
// its VLAN tags in the data, and a veth forwards at most one of them beyond its MTU (is_skb_forwardable in
// net/core/dev.c): this is room for a second one.
func PortMTU(mtu int) int { return mtu + 4 }

// PlugName is the end of a spoke's standing pair that waits for a VM.
func PlugName(spoke string) string { return spoke + "_p" }

// spokeOf returns the spoke to whose standing pair a link belongs, and whether the link is its port.
func spokeOf(link string) (spoke string, port, ok bool) {
	if s, ok := strings.CutSuffix(link, "_b"); ok && s != "" {
		return s, true, true
	}
	if s, ok := strings.CutSuffix(link, "_p"); ok && s != "" {
		return s, false, true
	}
	return "", false, false
}

// Port returns the name of a pool's port, counted from 0. The name of a spoke or pool cannot have the underscore.
func Port(pool string, number int) string { return pool + portMark + strconv.Itoa(number) }

const portMark = "_"

// PoolOf returns the pool of which a spoke is a port, and its number there; ok is false for a single spoke.
func PoolOf(spoke string) (pool string, number int, ok bool) {
	number, ok = cutNumber(spoke, portMark)
	if !ok {
		return "", 0, false
	}
	return spoke[:strings.LastIndex(spoke, portMark)], number, true
}

// Ordinal returns the number at the end of a pod's name, as the pods of a StatefulSet have it.
func Ordinal(pod string) (int, bool) { return cutNumber(pod, "-") }

// cutNumber returns the number behind the last mark if it is written as strconv.Itoa would write it.
func cutNumber(name, mark string) (int, bool) {
	at := strings.LastIndex(name, mark)
	if at < 1 {
		return 0, false
	}
	digits := name[at+len(mark):]
	number, err := strconv.Atoi(digits)
	return number, err == nil && number >= 0 && strconv.Itoa(number) == digits
}

// MAC returns the address of a spoke's plug if none is requested. It depends only on the LAN's name and the spoke, so
// that a pod keeps it when it is deleted and created again, on whichever node.
func MAC(lan LAN, spoke string) net.HardwareAddr { return derived(lan.String() + "/" + spoke) }

// PlugMAC returns the address of a spoke's plug. A port's depends on the node, too: every node has a port of that name.
func (s Segment) PlugMAC(spoke string) net.HardwareAddr {
	if _, _, port := PoolOf(spoke); port {
		return derived(s.LAN.String() + "/" + spoke + "@" + s.Node)
	}
	return MAC(s.LAN, spoke)
}

// PodMAC returns the address of a pod on a spoke if none is requested: the plug's or, in a pool with MACs by ordinal,
// one that depends on the pod's ordinal. There, a pod without an ordinal is an error.
func (s Segment) PodMAC(spoke, pod string) (net.HardwareAddr, error) {
	pool, _, port := PoolOf(spoke)
	if !port || !slices.Contains(s.MACByOrdinal, pool) {
		return s.PlugMAC(spoke), nil
	}
	ordinal, ok := Ordinal(pod)
	if !ok {
		return nil, fmt.Errorf("%w: pool %s derives MACs from it, and the pod is called %q", ErrNoOrdinal, pool, pod)
	}
	return derived(fmt.Sprintf("%s/%s#%d", s.LAN, pool, ordinal)), nil
}

// ErrNoOrdinal says that a pod's name does not end in a dash and a number, as those of a StatefulSet do.
var ErrNoOrdinal = errors.New("the pod has no ordinal")

// derived returns an address that depends only on a text.
func derived(from string) net.HardwareAddr {
	sum := sha256.Sum256([]byte(from))
	mac := net.HardwareAddr{0x02, 0, 0, 0, 0, 0} // locally administered, unicast
	copy(mac[1:], sum[:5])
	return mac
}
