package frames

import (
	"encoding/binary"
	"net"
	"slices"
)

// IP protocol numbers.
const (
	protocolICMP   = 1
	protocolUDP    = 17
	protocolICMPv6 = 58
	protocolOSPF   = 89
)

// documentation4 and documentation6 are addresses that no interface in a test has, so that no host answers.
func documentation4(host byte) net.IP { return net.IPv4(192, 0, 2, host) }

func documentation6(host byte) net.IP {
	return net.IP{0x20, 0x01, 0x0d, 0xb8, 15: host}
}

// arpRequest asks for 192.0.2.2 (RFC 826).
func arpRequest(src net.HardwareAddr) []byte {
	return join([]byte{0, 1, 8, 0, 6, 4, 0, 1}, src, documentation4(1).To4(), make([]byte, 6), documentation4(2).To4())
}

// ipv4 is a packet from 192.0.2.1 with a right checksum (RFC 791).
func ipv4(protocol byte, dst net.IP, payload []byte) []byte {
	header := []byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0}
	if dst.IsMulticast() {
		header[8] = 1 // TTL
	}
	binary.BigEndian.PutUint16(header[2:], uint16(20+len(payload)))
	header = join(header, documentation4(1).To4(), dst.To4())
	binary.BigEndian.PutUint16(header[10:], checksum(header))
	return append(header, payload...)
}

// ipv6 is a packet from 2001:db8::1, hop limit 255 (RFC 8200). It computes ICMPv6's checksum, which covers the
// addresses.
func ipv6(next byte, dst net.IP, payload []byte) []byte {
	length := binary.BigEndian.AppendUint16(nil, uint16(len(payload)))
	addresses := join(documentation6(1), dst)
	if next == protocolICMPv6 {
		payload = slices.Clone(payload)
		payload[2], payload[3] = 0, 0
		binary.BigEndian.PutUint16(payload[2:], checksum(addresses, length, []byte{0, next}, payload))
	}
	return join([]byte{0x60, 0, 0, 0}, length, []byte{next, 255}, addresses, payload)
}

// icmpEcho is an echo request of the given type, 8 for ICMP and 128 for ICMPv6,
// with ICMP's checksum.
func icmpEcho(kind byte) []byte {
	echo := append([]byte{kind, 0, 0, 0, 0x6b, 0x38, 0, 1}, "ping pong ping pong"...)
	binary.BigEndian.PutUint16(echo[2:], checksum(echo))
	return echo
}

// neighborSolicitation asks for 2001:db8::2 (RFC 4861).
func neighborSolicitation(src net.HardwareAddr) []byte {
	group := net.IP{0xff, 0x02, 11: 1, 12: 0xff, 15: 2}
	return ipv6(protocolICMPv6, group, join([]byte{135, 0, 0, 0, 0, 0, 0, 0}, documentation6(2), []byte{1, 1}, src))
}

// udp is a datagram of mDNS's ports without a checksum.
func udp() []byte { return []byte{0x14, 0xe9, 0x14, 0xe9, 0, 12, 0, 0, 'm', 'd', 'n', 's'} }

// bpdu is a spanning tree configuration BPDU from a root bridge (802.1D, 9.3.1).
func bpdu(src net.HardwareAddr) []byte {
	bridge := join([]byte{0x80, 0}, src)
	return join([]byte{0, 0, 0, 0, 0}, bridge, []byte{0, 0, 0, 0}, bridge,
		[]byte{0x80, 1, 0, 0, 20, 0, 2, 0, 15, 0})
}

// lacpdu is an active LACP actor's first message (802.1AX, 6.4.2).
func lacpdu(src net.HardwareAddr) []byte {
	participant := func(kind byte, system net.HardwareAddr, state byte) []byte {
		return join([]byte{kind, 20, 0x80, 0}, system, []byte{0, 1, 0x80, 0, 0, 1, state, 0, 0, 0})
	}
	return join([]byte{1, 1}, participant(1, src, 0x45), participant(2, make(net.HardwareAddr, 6), 0),
		[]byte{3, 16}, make([]byte, 14), make([]byte, 52))
}

// lldpdu has the three mandatory TLVs and a system name (802.1AB, 8).
func lldpdu(src net.HardwareAddr) []byte {
	name := "k8slan-test"
	return join([]byte{2, 7, 4}, src, []byte{4, 5, 5}, []byte("net1"), []byte{6, 2, 0, 120},
		[]byte{10, byte(len(name))}, []byte(name), []byte{0, 0})
}

// ospfHello is router 192.0.2.1's hello in area 0 (RFC 2328, A.3.2).
func ospfHello() []byte {
	hello := join(
		[]byte{2, 1, 0, 44}, documentation4(1).To4(), []byte{0, 0, 0, 0}, // version 2, hello, length; router; area
		[]byte{0, 0, 0, 0}, make([]byte, 8), // checksum, no authentication
		[]byte{255, 255, 255, 0, 0, 10, 2, 1, 0, 0, 0, 40}, make([]byte, 8), // mask, intervals; no designated router
	)
	binary.BigEndian.PutUint16(hello[12:], checksum(hello))
	return hello
}

// isisHello is a level 1 LAN hello without TLVs (ISO 10589, 9.5).
func isisHello(src net.HardwareAddr) []byte {
	return join([]byte{0x83, 27, 1, 0, 15, 1, 0, 0, 1}, src, []byte{0, 30, 0, 27, 64}, src, []byte{1})
}

// malformedIPv4 has a header length and a total length beyond its end, and a wrong checksum.
func malformedIPv4() []byte {
	header := ipv4(protocolUDP, documentation4(2), nil)
	header[0] = 0x4f
	header[2], header[3] = 0xff, 0xff
	header[10] ^= 0xff
	return header
}

// malformedIPv6 has a payload length beyond its end, a multicast source, and hop limit 0.
func malformedIPv6() []byte {
	header := ipv6(59, documentation6(2), nil) // 59: no next header
	header[4], header[5] = 0xff, 0xff
	header[7] = 0
	header[8] = 0xff
	return header
}
