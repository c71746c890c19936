package frames

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
)

// Responder answers for IP addresses of its own, frame by frame, as a network function does that reads raw frames and
// trusts their content: address resolution, ping, and TCP on every port, where it receives until the other side closes.
// It drops and counts frames larger than the MTU, and packets and segments with wrong checksums.
type Responder struct {
	MAC       net.HardwareAddr
	MTU       int
	Addresses []netip.Addr

	received Received
	sessions map[session]*conversation
}

// Received counts what a Responder received.
type Received struct {
	Pings    uint64 `json:"pings"`    // echo requests, answered
	Good     uint64 `json:"good"`     // TCP segments with right checksums
	Bad      uint64 `json:"bad"`      // packets with a wrong checksum, or an unfinished one
	TooLarge uint64 `json:"tooLarge"` // frames larger than the MTU
	Opened   uint64 `json:"opened"`   // TCP connections
	Closed   uint64 `json:"closed"`   // connections that ended by FIN
	Bytes    uint64 `json:"bytes"`    // of all connections' data, in order
}

// Received returns the count so far.
func (r *Responder) Received() Received { return r.received }

// session is a TCP connection by its two ends.
type session struct{ theirs, ours netip.AddrPort }

// conversation is the state of a TCP connection (RFC 9293, 3.3.1).
type conversation struct {
	receiveNext, sendNext uint32
	early                 map[uint32]uint32 // by its begin, the end of data that came out of order
	end                   *uint32           // the sequence number of their FIN, once it came
	closing               bool              // our FIN is sent
}

// add notes that the data between two sequence numbers came, and returns how much more data there is now without a gap.
func (c *conversation) add(begin, end uint32) (more uint32) {
	before := c.receiveNext
	if earlier, ok := c.early[begin]; !ok || int32(end-earlier) > 0 {
		c.early[begin] = end
	}
	for advanced := true; advanced; {
		advanced = false
		for begin, end := range c.early {
			if int32(begin-c.receiveNext) > 0 { // sequence numbers wrap
				continue
			}
			delete(c.early, begin)
			if int32(end-c.receiveNext) > 0 {
				c.receiveNext, advanced = end, true
			}
		}
	}
	return c.receiveNext - before
}

// These are flags of TCP (RFC 9293, 3.1).
const (
	flagFIN = 1 << iota
	flagSYN
	flagRST
	_
	flagACK
)

const (
	protocolTCP = 6
	window      = 0xffff
	ourFirst    = 1 // sequence number of our SYN; it need not be random here
)

// Answer returns the frames to send in answer to a frame.
func (r *Responder) Answer(frame []byte) [][]byte {
	if len(frame) < 14 || !bytes.Equal(frame[:6], r.MAC) && frame[0]&1 == 0 {
		return nil
	}
	if len(frame) > 14+r.MTU {
		r.received.TooLarge++
		return nil
	}
	sender, payload := net.HardwareAddr(frame[6:12]), frame[14:]
	kind := binary.BigEndian.Uint16(frame[12:])
	var answer []byte
	switch kind {
	case typeARP:
		answer = r.resolve(payload)
	case typeIPv4:
		answer = r.packet(r.parse4(payload))
	case typeIPv6:
		answer = r.packet(r.parse6(payload))
	}
	if answer == nil {
		return nil
	}
	return [][]byte{ethernet(sender, r.MAC, ethertype(kind), answer)}
}

// resolve answers an ARP request (RFC 826).
func (r *Responder) resolve(request []byte) []byte {
	if len(request) < 28 || !bytes.Equal(request[:8], []byte{0, 1, 8, 0, 6, 4, 0, 1}) {
		return nil
	}
	sender, target := request[8:18], request[24:28]
	if !r.has(target) {
		return nil
	}
	return join([]byte{0, 1, 8, 0, 6, 4, 0, 2}, r.MAC, target, sender)
}

func (r *Responder) has(address []byte) bool {
	a, ok := netip.AddrFromSlice(address)
	return ok && slices.Contains(r.Addresses, a)
}

// packet is an IP packet, of either version.
type packet struct {
	from, to netip.Addr
	protocol byte
	payload  []byte
}

// parse4 returns nil unless data is a whole packet.
func (r *Responder) parse4(data []byte) *packet {
	if len(data) < 20 {
		return nil
	}
	header, total := int(data[0]&0xf)*4, int(binary.BigEndian.Uint16(data[2:]))
	fragment := binary.BigEndian.Uint16(data[6:]) & 0x3fff
	if data[0]>>4 != 4 || header < 20 || total < header || total > len(data) || fragment != 0 {
		return nil
	}
	if checksum(data[:header]) != 0 {
		r.received.Bad++
		return nil
	}
	from, to := netip.AddrFrom4([4]byte(data[12:16])), netip.AddrFrom4([4]byte(data[16:20]))
	return &packet{from, to, data[9], data[header:total]}
}

func (r *Responder) parse6(data []byte) *packet {
	if len(data) < 40 || data[0]>>4 != 6 {
		return nil
	}
	length := int(binary.BigEndian.Uint16(data[4:]))
	if 40+length > len(data) {
		return nil
	}
	from, to := netip.AddrFrom16([16]byte(data[8:24])), netip.AddrFrom16([16]byte(data[24:40]))
	return &packet{from, to, data[6], data[40 : 40+length]}
}

// bytes returns the packet with its checksums; that of its payload is at offset.
func (p packet) bytes(offset int) []byte {
	binary.BigEndian.PutUint16(p.payload[offset:], 0)
	binary.BigEndian.PutUint16(p.payload[offset:], p.sum())
	length := len(p.payload)
	if p.from.Is6() {
		header := []byte{0x60, 0, 0, 0, byte(length >> 8), byte(length), p.protocol, 255}
		return join(header, p.from.AsSlice(), p.to.AsSlice(), p.payload)
	}
	header := []byte{0x45, 0, byte((20 + length) >> 8), byte(20 + length), 0, 0, 0x40, 0, 64, p.protocol, 0, 0}
	header = join(header, p.from.AsSlice(), p.to.AsSlice())
	binary.BigEndian.PutUint16(header[10:], checksum(header))
	return append(header, p.payload...)
}

// sum returns the payload's checksum: 0 if the payload has the right one. It covers the addresses (RFC 9293, 3.1; RFC
// 8200, 8.1), except for ICMP over IPv4.
func (p packet) sum() uint16 {
	if p.protocol == protocolICMP {
		return checksum(p.payload)
	}
	numbers := binary.BigEndian.AppendUint32([]byte{0, 0, 0, p.protocol}, uint32(len(p.payload)))
	return checksum(p.from.AsSlice(), p.to.AsSlice(), numbers, p.payload)
}

// packet answers a packet; nil means no answer.
func (r *Responder) packet(p *packet) []byte {
	if p == nil || len(p.payload) < 8 {
		return nil
	}
	solicitation := p.protocol == protocolICMPv6 && p.payload[0] == 135 && len(p.payload) >= 24
	if !solicitation && !slices.Contains(r.Addresses, p.to) {
		return nil
	}
	if sums := []byte{protocolICMP, protocolTCP, protocolICMPv6}; !slices.Contains(sums, p.protocol) {
		return nil
	}
	if p.sum() != 0 {
		r.received.Bad++
		return nil
	}
	back := packet{from: p.to, to: p.from, protocol: p.protocol}
	const echoRequest, echoReply, echoRequest6, echoReply6 = 8, 0, 128, 129
	switch {
	case solicitation:
		target := p.payload[8:24]
		if !r.has(target) {
			return nil
		}
		back.from = netip.AddrFrom16([16]byte(target))
		const solicitedOverride = 0x60 // flags, RFC 4861, 4.4; with the option of 4.6.1
		back.payload = join([]byte{136, 0, 0, 0, solicitedOverride, 0, 0, 0}, target, []byte{2, 1}, r.MAC)
	case p.protocol == protocolICMP && p.payload[0] == echoRequest:
		r.received.Pings++
		back.payload = join([]byte{echoReply}, p.payload[1:])
	case p.protocol == protocolICMPv6 && p.payload[0] == echoRequest6:
		r.received.Pings++
		back.payload = join([]byte{echoReply6}, p.payload[1:])
	case p.protocol == protocolTCP && len(p.payload) >= 20 && int(p.payload[12]>>4)*4 <= len(p.payload):
		r.received.Good++
		if back.payload = r.segment(p); back.payload == nil {
			return nil
		}
		return back.bytes(16)
	default:
		return nil
	}
	return back.bytes(2)
}

// segment answers a TCP segment with another one, without a checksum.
func (r *Responder) segment(p *packet) []byte {
	theirPort, ourPort := binary.BigEndian.Uint16(p.payload), binary.BigEndian.Uint16(p.payload[2:])
	sequence, acknowledged := binary.BigEndian.Uint32(p.payload[4:]), binary.BigEndian.Uint32(p.payload[8:])
	data, flags := p.payload[int(p.payload[12]>>4)*4:], p.payload[13]
	key := session{netip.AddrPortFrom(p.from, theirPort), netip.AddrPortFrom(p.to, ourPort)}
	c := r.sessions[key]
	answer := func(sequence uint32, flags byte, options ...byte) []byte {
		header := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, ourPort), theirPort)
		header = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(header, sequence), c.receiveNext)
		header = append(header, byte(20+len(options))/4<<4, flags|flagACK, window>>8, window&0xff, 0, 0, 0, 0)
		return append(header, options...)
	}
	switch {
	case flags&flagRST != 0:
		delete(r.sessions, key)
		return nil
	case flags&flagSYN != 0:
		if c == nil || c.receiveNext != sequence+1 {
			c = &conversation{receiveNext: sequence + 1, sendNext: ourFirst + 1, early: map[uint32]uint32{}}
			if r.sessions == nil {
				r.sessions = map[session]*conversation{}
			}
			r.sessions[key] = c
			r.received.Opened++
		}
		headers := 40
		if p.from.Is6() {
			headers = 60
		}
		size := r.MTU - headers
		return answer(ourFirst, flagSYN, 2, 4, byte(size>>8), byte(size)) // option: maximum segment size
	case c == nil:
		return nil
	case c.closing && acknowledged == c.sendNext:
		r.received.Closed++
		delete(r.sessions, key)
		return nil
	case !c.closing:
		behind := sequence + uint32(len(data))
		if len(data) > 0 {
			r.received.Bytes += uint64(c.add(sequence, behind))
		}
		if flags&flagFIN != 0 {
			c.end = &behind
		}
		if c.end != nil && c.receiveNext == *c.end {
			c.receiveNext++
			c.sendNext++
			c.closing = true
		}
	}
	switch {
	case c.closing: // also when they send theirs again because ours was lost
		return answer(c.sendNext-1, flagFIN)
	case len(data) > 0 || flags&flagFIN != 0: // also for data out of order, or received twice
		return answer(c.sendNext, 0)
	default:
		return nil
	}
}
