package sockfilter

import (
	"encoding/binary"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Where fields are in a frame without VLAN tags.
const (
	etherSource = 6
	etherType   = 12
	ip          = 14
	ipv4Next    = ip + 9
	ipv6Next    = ip + 6
	ipv6Payload = ip + 40
)

// The types of ICMPv6 that say which MAC has an address (RFC 4861).
const (
	solicitation  = 135
	advertisement = 136
)

// Bindings passes the first bytes of ARP and neighbour discovery without VLAN tags, unless they came in by one of the
// ignored links. Other frames are dropped after two or three comparisons.
func Bindings(bytes uint32, ignored []int) []bpf.RawInstruction {
	const (
		untagged label = "untagged"
		byLink   label = "byLink"
	)
	program := []bpf.Instruction{
		bpf.LoadAbsolute{Off: etherType, Size: 2},
		jumpIf{bpf.JumpEqual, unix.ETH_P_ARP, untagged},
		jumpIf{bpf.JumpNotEqual, unix.ETH_P_IPV6, drop},
		bpf.LoadAbsolute{Off: ipv6Next, Size: 1},
		jumpIf{bpf.JumpNotEqual, unix.IPPROTO_ICMPV6, drop},
		bpf.LoadAbsolute{Off: ipv6Payload, Size: 1},
		jumpIf{bpf.JumpEqual, solicitation, untagged},
		jumpIf{bpf.JumpEqual, advertisement, untagged},

		drop, // here, because the end may be farther than a jump
		bpf.RetConstant{Val: 0},

		untagged,
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		jumpIf{bpf.JumpEqual, 0, byLink},
		bpf.RetConstant{Val: 0},

		byLink,
		bpf.LoadExtension{Num: bpf.ExtInterfaceIndex},
	}
	for _, index := range ignored {
		isOther := bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(index), SkipTrue: 1}
		program = append(program, isOther, bpf.RetConstant{Val: 0})
	}
	return assemble(append(program, bpf.RetConstant{Val: bytes})...)
}

// None passes no packet, for a socket that only sends.
func None() []bpf.RawInstruction { return assemble() }

// Source passes the first bytes of frames whose source address starts with these four bytes.
func Source(bytes uint32, prefix [4]byte) []bpf.RawInstruction {
	return assemble(
		bpf.LoadAbsolute{Off: etherSource, Size: 4},
		jumpIf{bpf.JumpNotEqual, binary.BigEndian.Uint32(prefix[:]), drop},
		bpf.RetConstant{Val: bytes},
	)
}

// UDPPort passes the first bytes of UDP packets to a port, by IPv4 and IPv6. Of a packet in fragments it passes the
// first, and of IPv6 all.
func UDPPort(bytes uint32, port uint16) []bpf.RawInstruction {
	const (
		byIPv6 label = "byIPv6"
		pass   label = "pass"

		destination = 2 // in a UDP header
	)
	return assemble(
		bpf.LoadAbsolute{Off: etherType, Size: 2},
		jumpIf{bpf.JumpNotEqual, unix.ETH_P_IP, byIPv6},
		bpf.LoadAbsolute{Off: ipv4Next, Size: 1},
		jumpIf{bpf.JumpNotEqual, unix.IPPROTO_UDP, drop},
		bpf.LoadMemShift{Off: ip}, // the length of the IPv4 header
		bpf.LoadIndirect{Off: ip + destination, Size: 2},
		jumpIf{bpf.JumpNotEqual, uint32(port), drop},
		bpf.RetConstant{Val: bytes},

		byIPv6,
		jumpIf{bpf.JumpNotEqual, unix.ETH_P_IPV6, drop},
		bpf.LoadAbsolute{Off: ipv6Next, Size: 1},
		jumpIf{bpf.JumpEqual, unix.IPPROTO_FRAGMENT, pass},
		jumpIf{bpf.JumpNotEqual, unix.IPPROTO_UDP, drop},
		bpf.LoadAbsolute{Off: ipv6Payload + destination, Size: 2},
		jumpIf{bpf.JumpNotEqual, uint32(port), drop},

		pass,
		bpf.RetConstant{Val: bytes},
	)
}
