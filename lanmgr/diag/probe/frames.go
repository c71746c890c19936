package probe

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
)

const (
	etherType = 0x88b5 // IEEE 802, for local experiments: kernels and network functions ignore it
	tagged    = 0x8100 // IEEE 802.1Q
	provider  = 0x88a8 // IEEE 802.1ad
	ipv4      = 0x0800
	ipv6      = 0x86dd
	udp       = 17
	minFrame  = 60 // length of an Ethernet frame without its checksum
	maxTags   = 4  // VLAN tags
)

// Source is the beginning of the source address of a probe's frames. The next two bytes are the direction.
var Source = []byte{0x02, 0x6b, 0x38, 0x70}

var magic = []byte("k8slan path ")

// unusedMAC is a unicast address that no interface has.
var unusedMAC = []byte{0x02, 0x6b, 0x38, 0x71, 0x00, 0x00}

// testFrame is a frame to send, with its result so far.
type testFrame struct {
	FrameResult
	bytes         func(id uint32) []byte
	unfinished    bool
	start, offset uint16
}

func (f testFrame) order(id uint32) Order {
	return Order{ID: id, Bytes: f.bytes(id), Unfinished: f.unfinished, Start: f.start, Offset: f.offset}
}

// knownUnicast is the kind of frame for which bridge and VXLAN may have learned a path. It can pass where floods do
// not.
const knownUnicast = "unicast to the other's address"

// catalog returns one frame of every kind. Kinds differ in destination, tags or size. No frame is a valid message of a
// protocol, so pods ignore them.
func catalog(direction, mtu int, peer []byte) []testFrame {
	broadcast := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	kind := func(name string, to []byte, tags ...uint16) testFrame {
		return newFrame(name, direction, to, minFrame-14, tags...)
	}
	frames := []testFrame{
		kind("broadcast", broadcast),
		kind("multicast", []byte{0x03, 0x6b, 0x38, 0x70, 0, 1}),
		kind("unicast to an unknown address", unusedMAC),
		kind(knownUnicast, peer),
		kind("the address of STP", []byte{0x01, 0x80, 0xc2, 0, 0, 0x00}),
		kind("the address of LACP", []byte{0x01, 0x80, 0xc2, 0, 0, 0x02}),
		kind("the address of 802.1X", []byte{0x01, 0x80, 0xc2, 0, 0, 0x03}),
		kind("the address of LLDP", []byte{0x01, 0x80, 0xc2, 0, 0, 0x0e}),
		kind("the address of IS-IS", []byte{0x01, 0x80, 0xc2, 0, 0, 0x14}),
		kind("the address of OSPF", []byte{0x01, 0x00, 0x5e, 0, 0, 0x05}),
		kind("a priority tag", unusedMAC, tagged, 5<<13),
		kind("1 VLAN tag", unusedMAC, tagged, 100),
		kind("2 VLAN tags", unusedMAC, tagged, 200, tagged, 100),
		kind("2 VLAN tags (QinQ)", unusedMAC, provider, 200, tagged, 100),
		kind("3 VLAN tags", unusedMAC, tagged, 300, tagged, 200, tagged, 100),
		kind("4 VLAN tags", unusedMAC, tagged, 400, tagged, 300, tagged, 200, tagged, 100),
		newFrame("the full MTU", direction, unusedMAC, mtu),
		newFrame("the full MTU and a VLAN tag", direction, unusedMAC, mtu, tagged, 100),
		packet4(direction), packet6(direction),
	}
	unfinished := packet4(direction)
	unfinished.Kind, unfinished.unfinished, unfinished.start, unfinished.offset = "an unfinished checksum",
		true, 14+20, 6
	return append(frames, unfinished)
}

// frameOfSize returns a frame with that many bytes of payload.
func frameOfSize(direction, payload int) testFrame {
	return newFrame("size", direction, unusedMAC, payload)
}

// header returns a frame's bytes up to its EtherType. tags are pairs of protocol and content, the outermost first.
func header(direction int, to []byte, kind uint16, tags ...uint16) []byte {
	h := slices.Concat(to, Source, []byte{0, byte(direction)})
	for _, t := range tags {
		h = binary.BigEndian.AppendUint16(h, t)
	}
	return binary.BigEndian.AppendUint16(h, kind)
}

// mark returns the bytes by which Recognize finds a frame.
func mark(id uint32) []byte { return binary.BigEndian.AppendUint32(slices.Clone(magic), id) }

func newFrame(name string, direction int, to []byte, payload int, tags ...uint16) testFrame {
	return testFrame{
		FrameResult: FrameResult{Kind: name, Payload: payload, Tags: len(tags) / 2},
		bytes: func(id uint32) []byte {
			content := make([]byte, payload)
			copy(content, mark(id))
			return append(header(direction, to, etherType, tags...), content...)
		},
	}
}

// packet4 returns a datagram between documentation addresses (RFC 5737), to the discard port. Its checksum covers only
// the pseudo header, like one whose rest is left to hardware.
func packet4(direction int) testFrame {
	return testFrame{FrameResult: FrameResult{Kind: "IPv4", Payload: 46}, bytes: func(id uint32) []byte {
		data := mark(id)
		ip := []byte{0x45, 0, 0, byte(28 + len(data)), 0, 0, 0, 0, 1, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2}
		binary.BigEndian.PutUint16(ip[10:], ^sum(ip))
		datagram := []byte{0, 9, 0, 9, 0, byte(8 + len(data)), 0, 0}
		binary.BigEndian.PutUint16(datagram[6:], sum(ip[12:], []byte{0, 17, 0, byte(8 + len(data))}))
		return pad(slices.Concat(header(direction, unusedMAC, ipv4), ip, datagram, data))
	}}
}

// packet6 returns the same datagram in IPv6 (RFC 3849), with a complete checksum.
func packet6(direction int) testFrame {
	return testFrame{FrameResult: FrameResult{Kind: "IPv6", Payload: 64}, bytes: func(id uint32) []byte {
		data := mark(id)
		address := func(host byte) []byte { return []byte{0x20, 0x01, 0x0d, 0xb8, 15: host} }
		datagram := []byte{0, 9, 0, 9, 0, byte(8 + len(data)), 0, 0}
		check := ^sum(address(1), address(2), []byte{0, 17, 0, byte(8 + len(data))}, datagram, data)
		binary.BigEndian.PutUint16(datagram[6:], check)
		return pad(slices.Concat(header(direction, unusedMAC, ipv6),
			[]byte{0x60, 0, 0, 0, 0, byte(8 + len(data)), 17, 1}, address(1), address(2), datagram, data))
	}}
}

// sum returns the sum of the Internet checksum (RFC 1071) over parts. All parts but the last have even lengths.
func sum(parts ...[]byte) uint16 {
	var s uint32
	for _, p := range parts {
		for i := 0; i+1 < len(p); i += 2 {
			s += uint32(binary.BigEndian.Uint16(p[i:]))
		}
		if len(p)%2 == 1 {
			s += uint32(p[len(p)-1]) << 8
		}
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func pad(frame []byte) []byte { return append(frame, make([]byte, max(0, minFrame-len(frame)))...) }

// Recognize returns the number of a probe's frame, which may be inside a packet of the underlay.
func Recognize(frame []byte) (id uint32, ok bool) {
	i := bytes.Index(frame, magic)
	if i < 0 || len(frame) < i+len(magic)+4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(frame[i+len(magic):]), true
}

// OuterSource returns the IP source of a packet on the underlay, and the zero Addr if it is not an IP packet.
func OuterSource(packet []byte) netip.Addr {
	const ethernet = 14
	var a netip.Addr
	switch {
	case len(packet) >= ethernet+20 && binary.BigEndian.Uint16(packet[12:]) == ipv4:
		a, _ = netip.AddrFromSlice(packet[ethernet+12:][:4])
	case len(packet) >= ethernet+40 && binary.BigEndian.Uint16(packet[12:]) == ipv6:
		a, _ = netip.AddrFromSlice(packet[ethernet+8:][:16])
	}
	return a
}

// Outer returns the VNI of a VXLAN packet on the underlay (RFC 7348), and whether its UDP checksum is wrong. It returns
// 0 and false for a packet that is not whole or not of a VXLAN.
func Outer(packet []byte) (vni uint32, wrongChecksum bool) {
	const ethernet, udpHeader, vxlan = 14, 8, 8
	if len(packet) < ethernet {
		return 0, false
	}
	var addresses, datagram []byte
	switch ip := packet[ethernet:]; binary.BigEndian.Uint16(packet[12:]) {
	case ipv4:
		if len(ip) < 20 || ip[9] != udp || binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 { // a fragment
			return 0, false
		}
		begin, end := int(ip[0]&0xf)*4, int(binary.BigEndian.Uint16(ip[2:]))
		if begin > end || end > len(ip) {
			return 0, false
		}
		addresses, datagram = ip[12:20], ip[begin:end]
	case ipv6:
		if len(ip) < 40 || ip[6] != udp {
			return 0, false
		}
		end := 40 + int(binary.BigEndian.Uint16(ip[4:]))
		if end > len(ip) {
			return 0, false
		}
		addresses, datagram = ip[8:40], ip[40:end]
	}
	if len(datagram) < udpHeader+vxlan {
		return 0, false
	}
	vni = binary.BigEndian.Uint32(datagram[udpHeader+4:]) >> 8
	if binary.BigEndian.Uint16(datagram[6:]) == 0 { // no checksum
		return vni, false
	}
	length := binary.BigEndian.AppendUint16([]byte{0, udp}, uint16(len(datagram)))
	return vni, sum(addresses, length, datagram) != 0xffff
}
