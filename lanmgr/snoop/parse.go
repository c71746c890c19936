package snoop

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Where things are in a frame without VLAN tags.
const (
	etherType   = 12
	etherHeader = 14
)

// Types of ICMPv6 (RFC 4861).
const (
	solicitation  = 135
	advertisement = 136
)

// Parse reads the binding that the sender of a frame has: its own MAC, and an address of it. It takes no binding of
// another MAC, and none from a question whether an address is free (RFC 5227, RFC 4862).
func Parse(frame []byte) (mac [6]byte, ip netip.Addr, ok bool) {
	if len(frame) < etherHeader {
		return mac, ip, false
	}
	source, payload := frame[6:12], frame[etherHeader:]
	switch binary.BigEndian.Uint16(frame[etherType:]) {
	case unix.ETH_P_ARP:
		ip, ok = parseARP(payload, source)
	case unix.ETH_P_IPV6:
		ip, ok = parseND(payload, source)
	}
	return [6]byte(source), ip, ok && !ip.IsUnspecified() && !ip.IsMulticast()
}

// parseARP reads the sender's address from ARP for IPv4 on Ethernet (RFC 826).
func parseARP(arp, source []byte) (netip.Addr, bool) {
	head := []byte{0, 1, 8, 0, 6, 4, 0} // the operation is 1 or 2
	if len(arp) < 28 || !bytes.HasPrefix(arp, head) || arp[7] < 1 || arp[7] > 2 || !bytes.Equal(arp[8:14], source) {
		return netip.Addr{}, false
	}
	return netip.AddrFromSlice(arp[14:18])
}

// parseND reads the source of a solicitation, or the target of an advertisement. A link-layer address in it must be the
// sender's own.
func parseND(packet, source []byte) (ip netip.Addr, ok bool) {
	const header, hopLimit = 40, 255 // a router would have lowered the hop limit
	if len(packet) < header+24 || packet[0]>>4 != 6 || packet[6] != unix.IPPROTO_ICMPV6 || packet[7] != hopLimit {
		return ip, false
	}
	message := packet[header:]
	option := byte(1) // the source's link-layer address
	switch message[0] {
	case solicitation:
		ip, ok = netip.AddrFromSlice(packet[8:24])
	case advertisement:
		ip, ok = netip.AddrFromSlice(message[8:24])
		option = 2 // the target's
	}
	for options := message[24:]; len(options) >= 8; {
		length := 8 * int(options[1])
		if length == 0 || length > len(options) {
			return ip, false
		}
		if options[0] == option && !bytes.Equal(options[2:8], source) {
			return ip, false
		}
		options = options[length:]
	}
	return ip, ok
}
