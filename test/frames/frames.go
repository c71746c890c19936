// Package frames builds the Ethernet frames that tests send through a LAN,
// sends and receives them, and counts what a stream of them lost.
package frames

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
)

// Marker is in the payload of every frame of the catalog and of every stream, so that a receiver can distinguish them
// from the kernel's own frames.
const Marker = "k8slan:"

// These are the ethertypes of the catalog. typeLocal is IEEE's for local experiments.
const (
	typeIPv4  = 0x0800
	typeARP   = 0x0806
	typeQ     = 0x8100
	typeIPv6  = 0x86dd
	typePause = 0x8808
	typeSlow  = 0x8809
	typeEAPOL = 0x888e
	typeAD    = 0x88a8
	typeLocal = 0x88b5
	typeLLDP  = 0x88cc
)

// These are the tag protocols for Tag.
const (
	Dot1Q  uint16 = typeQ  // 802.1Q, a customer's tag
	Dot1AD uint16 = typeAD // 802.1ad, a provider's tag outside the customer's
)

// minimum is the shortest Ethernet frame without its checksum. Shorter frames are padded so that hardware and virtual
// links carry the same bytes.
const minimum = 60

// Frame is one kind of frame.
type Frame struct {
	Name   string // lower case, digits and hyphens
	Bytes  []byte // from the destination address on, without the checksum
	Passes bool   // a LAN carries it; it does not carry PAUSE
}

// unknown is a unicast MAC that no host in a test has.
var unknown = mac(0x02, 0x6b, 0x38, 0x00, 0x00, 0x01)

// Catalog returns one frame of every kind that a LAN's hosts may send, from src, with payloads of exactly mtu bytes in
// those called full-mtu. No two have the same bytes. AF_PACKET can send them all on an interface with that MTU.
func Catalog(src net.HardwareAddr, mtu int) []Frame {
	broadcast := mac(0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	foreign := mac(0x02, 0x6b, 0x38, 0x00, 0x00, 0x02)
	full := func(name string) []byte { return fill(name, mtu) }
	return []Frame{
		passes("arp-request", broadcast, src, ethertype(typeARP), arpRequest(src)),
		passes("ipv4-ping", unknown, src, ethertype(typeIPv4), ipv4(protocolICMP, documentation4(2), icmpEcho(8))),
		passes("ipv6-ping", unknown, src, ethertype(typeIPv6), ipv6(protocolICMPv6, documentation6(2), icmpEcho(128))),
		passes("ipv6-neighbor-solicitation", mac(0x33, 0x33, 0xff, 0, 0, 2), src, ethertype(typeIPv6),
			neighborSolicitation(src)),
		passes("ipv4-multicast", mac(0x01, 0x00, 0x5e, 0x00, 0x00, 0xfb), src, ethertype(typeIPv4),
			ipv4(protocolUDP, net.IPv4(224, 0, 0, 251), udp())),
		passes("broadcast", broadcast, src, ethertype(typeLocal)),
		passes("multicast", mac(0x03, 0x6b, 0x38, 0x00, 0x00, 0x01), src, ethertype(typeLocal)),
		passes("unknown-unicast", unknown, src, ethertype(typeLocal)),
		passes("foreign-source", broadcast, foreign, ethertype(typeLocal)),
		passes("8021q", broadcast, src, tag(Dot1Q, 100), ethertype(typeLocal)),
		passes("qinq", broadcast, src, tag(Dot1AD, 200), tag(Dot1Q, 100), ethertype(typeLocal)),
		passes("8021q-in-8021q", broadcast, src, tag(Dot1Q, 200), tag(Dot1Q, 100), ethertype(typeLocal)),
		passes("priority-tag", broadcast, src, tag(Dot1Q, 5<<13), ethertype(typeLocal)),
		passes("stp", mac(0x01, 0x80, 0xc2, 0, 0, 0x00), src, llc(0x42, 0x42, bpdu(src))),
		passes("lacp", mac(0x01, 0x80, 0xc2, 0, 0, 0x02), src, ethertype(typeSlow), lacpdu(src)),
		passes("eapol-start", mac(0x01, 0x80, 0xc2, 0, 0, 0x03), src, ethertype(typeEAPOL), []byte{2, 1, 0, 0}),
		passes("lldp", mac(0x01, 0x80, 0xc2, 0, 0, 0x0e), src, ethertype(typeLLDP), lldpdu(src)),
		passes("ospf-hello", mac(0x01, 0x00, 0x5e, 0x00, 0x00, 0x05), src, ethertype(typeIPv4),
			ipv4(protocolOSPF, net.IPv4(224, 0, 0, 5), ospfHello())),
		passes("isis-hello", mac(0x01, 0x80, 0xc2, 0, 0, 0x14), src, llc(0xfe, 0xfe, isisHello(src))),
		passes("malformed-ipv4", broadcast, src, ethertype(typeIPv4), malformedIPv4()),
		passes("malformed-ipv6", broadcast, src, ethertype(typeIPv6), malformedIPv6()),
		{"full-mtu", ethernet(broadcast, src, ethertype(typeLocal), full("full-mtu")), true},
		{
			"full-mtu-8021q",
			ethernet(broadcast, src, tag(Dot1Q, 100), ethertype(typeLocal), full("full-mtu-8021q")), true,
		},
		{
			"pause",
			marked("pause", mac(0x01, 0x80, 0xc2, 0, 0, 0x01), src, ethertype(typePause), []byte{0, 1, 0xff, 0xff}),
			false,
		},
	}
}

// Names returns the names of the frames.
func Names(fs []Frame) []string {
	names := make([]string, 0, len(fs))
	for _, f := range fs {
		names = append(names, f.Name)
	}
	return names
}

// Tag returns the frame with one more VLAN tag outside those it has, as it is after it left through a VLAN device.
func Tag(frame []byte, protocol, vlan uint16) []byte {
	return join(frame[:12], tag(protocol, vlan), frame[12:])
}

// Filter selects frames. Its zero value selects all.
type Filter struct {
	EtherType uint16 // of the outermost header, or the length of an 802.3 frame; 0: any
	Src, Dst  net.HardwareAddr
	Marker    string // somewhere in the frame
}

// Match reports whether the filter selects the frame.
func (f Filter) Match(frame []byte) bool {
	if len(frame) < 14 {
		return false
	}
	return (f.EtherType == 0 || f.EtherType == binary.BigEndian.Uint16(frame[12:])) &&
		(f.Dst == nil || bytes.Equal(f.Dst, frame[:6])) &&
		(f.Src == nil || bytes.Equal(f.Src, frame[6:12])) &&
		bytes.Contains(frame, []byte(f.Marker))
}

func passes(name string, dst, src net.HardwareAddr, parts ...[]byte) Frame {
	return Frame{Name: name, Bytes: marked(name, dst, src, parts...), Passes: true}
}

// marked returns a frame that has its name after its last part.
func marked(name string, dst, src net.HardwareAddr, parts ...[]byte) []byte {
	return ethernet(dst, src, append(parts, []byte(Marker+name))...)
}

// ethernet returns a frame of at least the minimal length.
func ethernet(dst, src net.HardwareAddr, parts ...[]byte) []byte {
	frame := join(dst, src, join(parts...))
	return append(frame, make([]byte, max(0, minimum-len(frame)))...)
}

// fill returns a payload of size bytes that begins with the marker and a name.
func fill(name string, size int) []byte {
	payload := []byte(Marker + name)
	if size < len(payload) {
		panic(fmt.Sprintf("frames: an MTU of %d has no room for %q", size, payload))
	}
	for i := len(payload); i < size; i++ {
		payload = append(payload, byte(i))
	}
	return payload
}

// join is slices.Concat for slices of different types, too.
func join(parts ...[]byte) []byte { return slices.Concat(parts...) }

func mac(b ...byte) net.HardwareAddr { return b }

func ethertype(t uint16) []byte { return binary.BigEndian.AppendUint16(nil, t) }

func tag(protocol, control uint16) []byte {
	return binary.BigEndian.AppendUint16(ethertype(protocol), control)
}

// llc is the header of an 802.3 frame, with its length, and its contents.
func llc(dsap, ssap byte, pdu []byte) []byte {
	const unnumbered = 0x03
	return join(ethertype(uint16(3+len(pdu))), []byte{dsap, ssap, unnumbered}, pdu)
}

// checksum is the Internet checksum (RFC 1071) over all parts, each of an even
// length but the last.
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, p := range parts {
		for i := 0; i+1 < len(p); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(p[i:]))
		}
		if len(p)%2 == 1 {
			sum += uint32(p[len(p)-1]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
