package frames

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
)

var (
	ours4, theirs4 = netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("192.0.2.1")
	ours6, theirs6 = netip.MustParseAddr("2001:db8::9"), netip.MustParseAddr("2001:db8::1")
	ourMAC         = mac(0x02, 0, 0, 0, 0, 0x09)
)

func newResponder() *Responder {
	return &Responder{MAC: ourMAC, MTU: 1400, Addresses: []netip.Addr{ours4, ours6}}
}

// caller is the other side of a TCP connection to a Responder.
type caller struct {
	*testing.T
	*Responder
	from, to netip.Addr
}

func (c caller) segment(sequence, acknowledged uint32, flags byte, data string) []byte {
	header := []byte{0x80, 0, 0, 179}
	header = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(header, sequence), acknowledged)
	payload := append(header, 5<<4, flags, 0xff, 0xff, 0, 0, 0, 0)
	kind := uint16(typeIPv4)
	if c.from.Is6() {
		kind = typeIPv6
	}
	p := packet{c.from, c.to, protocolTCP, append(payload, data...)}
	return ethernet(ourMAC, testSrc, ethertype(kind), p.bytes(16))
}

// expectAnswer sends a segment and expects one in answer, with right checksums; 0 means no answer.
func (c caller) expectAnswer(sent []byte, flags byte, sequence, acknowledged uint32) {
	c.Helper()
	answers := c.Answer(sent)
	if flags == 0 {
		if len(answers) > 0 {
			c.Errorf("%x is answered by %x", sent, answers)
		}
		return
	}
	if len(answers) != 1 {
		c.Fatalf("%x has %d answers, want one", sent, len(answers))
	}
	back := &Responder{}
	var p *packet
	if c.from.Is6() {
		p = back.parse6(answers[0][14:])
	} else {
		p = back.parse4(answers[0][14:])
	}
	ends := join(testSrc, ourMAC)
	if p == nil || p.sum() != 0 || p.from != c.to || p.to != c.from || !bytes.Equal(answers[0][:12], ends) {
		c.Fatalf("%x does not have the right checksums and addresses", answers[0])
	}
	gotFlags, gotSequence := p.payload[13], binary.BigEndian.Uint32(p.payload[4:])
	gotAcknowledged := binary.BigEndian.Uint32(p.payload[8:])
	if gotFlags != flags || gotSequence != sequence || gotAcknowledged != acknowledged {
		c.Errorf("answer with flags %#x, sequence %d, acknowledged %d; want %#x, %d, %d",
			gotFlags, gotSequence, gotAcknowledged, flags, sequence, acknowledged)
	}
}

// expectReceived compares the responder's count.
func (c caller) expectReceived(want Received) {
	c.Helper()
	if got := c.Received(); got != want {
		c.Errorf("counted %+v, want %+v", got, want)
	}
}

func TestResponderTakesATCPStreamToItsEnd(t *testing.T) {
	for _, c := range []caller{{t, newResponder(), theirs4, ours4}, {t, newResponder(), theirs6, ours6}} {
		c.expectAnswer(c.segment(100, 0, flagSYN, ""), flagSYN|flagACK, 1, 101)
		c.expectAnswer(c.segment(100, 0, flagSYN, ""), flagSYN|flagACK, 1, 101) // its answer was lost
		c.expectAnswer(c.segment(101, 2, flagACK, ""), 0, 0, 0)
		c.expectAnswer(c.segment(101, 2, flagACK, "odd"), flagACK, 2, 104)
		c.expectAnswer(c.segment(109, 2, flagACK|flagFIN, "end"), flagACK, 2, 104) // before its turn
		c.expectAnswer(c.segment(101, 2, flagACK, "odd"), flagACK, 2, 104)         // twice
		c.expectAnswer(c.segment(102, 2, flagACK, "ddev"), flagACK, 2, 106)        // in part twice
		c.expectAnswer(c.segment(106, 2, flagACK, "en "), flagACK|flagFIN, 2, 113)
		c.expectAnswer(c.segment(109, 2, flagACK|flagFIN, "end"), flagACK|flagFIN, 2, 113) // its answer was lost
		c.expectAnswer(c.segment(113, 3, flagACK, ""), 0, 0, 0)
		c.expectReceived(Received{Good: 10, Opened: 1, Closed: 1, Bytes: 11})
	}
}

func TestResponderDropsWhatHasAWrongChecksum(t *testing.T) {
	for _, c := range []caller{{t, newResponder(), theirs4, ours4}, {t, newResponder(), theirs6, ours6}} {
		wrong := c.segment(100, 0, flagSYN, "")
		wrong[len(wrong)-7]++ // in the window
		c.expectAnswer(wrong, 0, 0, 0)

		// Linux leaves this to the hardware: the sum covers the addresses only.
		unfinished := c.segment(100, 0, flagSYN, "")
		segment := len(unfinished) - 20
		if c.from.Is4() {
			segment = 14 + 20
		}
		numbers := []byte{0, 0, 0, protocolTCP, 0, 0, 0, 20}
		binary.BigEndian.PutUint16(unfinished[segment+16:], ^checksum(c.from.AsSlice(), c.to.AsSlice(), numbers))
		c.expectAnswer(unfinished, 0, 0, 0)
		c.expectReceived(Received{Bad: 2})
	}
	c := caller{t, newResponder(), theirs4, ours4}
	header := c.segment(100, 0, flagSYN, "")
	header[14+8]-- // TTL
	c.expectAnswer(header, 0, 0, 0)
	c.expectReceived(Received{Bad: 1})
}

func TestResponderDropsWhatIsLargerThanTheMTU(t *testing.T) {
	c := caller{t, newResponder(), theirs4, ours4}
	c.expectAnswer(c.segment(100, 0, flagSYN, ""), flagSYN|flagACK, 1, 101)
	whole := string(make([]byte, c.MTU-40))
	c.expectAnswer(c.segment(101, 2, flagACK, whole), flagACK, 2, 101+uint32(len(whole)))
	c.expectAnswer(c.segment(101+uint32(len(whole)), 2, flagACK, whole+"!"), 0, 0, 0)
	c.expectReceived(Received{Good: 2, TooLarge: 1, Opened: 1, Bytes: uint64(len(whole))})
}

func TestResponderResolvesAndAnswersPings(t *testing.T) {
	r := newResponder()
	broadcast := mac(0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	ask := func(target netip.Addr) []byte {
		request := join([]byte{0, 1, 8, 0, 6, 4, 0, 1}, testSrc, theirs4.AsSlice(), make([]byte, 6), target.AsSlice())
		return ethernet(broadcast, testSrc, ethertype(typeARP), request)
	}
	solicit := func(target netip.Addr) []byte {
		solicitation := join([]byte{135, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice(), []byte{1, 1}, testSrc)
		p := packet{theirs6, netip.MustParseAddr("ff02::1:ff00:9"), protocolICMPv6, solicitation}
		return ethernet(mac(0x33, 0x33, 0xff, 0, 0, 9), testSrc, ethertype(typeIPv6), p.bytes(2))
	}
	ping := func(from, to netip.Addr, protocol, kind byte) []byte {
		p := packet{from, to, protocol, append([]byte{kind, 0, 0, 0, 0, 1, 0, 1}, "ping!"...)}
		et := ethertype(typeIPv4)
		if to.Is6() {
			et = ethertype(typeIPv6)
		}
		return ethernet(ourMAC, testSrc, et, p.bytes(2))
	}
	for _, c := range []struct {
		name    string
		request []byte
		want    []byte // part of the answer; nil if there is no answer
	}{
		{"ARP for its address", ask(ours4), join([]byte{0, 2}, ourMAC, ours4.AsSlice(), testSrc, theirs4.AsSlice())},
		{"ARP for another", ask(theirs4), nil},
		{"solicitation of its address", solicit(ours6), join(ours6.AsSlice(), []byte{2, 1}, ourMAC)},
		{"solicitation of another", solicit(theirs6), nil},
		{"ping", ping(theirs4, ours4, protocolICMP, 8), []byte("\x00\x01\x00\x01ping!")},
		{"ping over IPv6", ping(theirs6, ours6, protocolICMPv6, 128), []byte("\x00\x01\x00\x01ping!")},
		{"ping of another address", ping(theirs4, theirs4, protocolICMP, 8), nil},
		{"half a frame", ping(theirs4, ours4, protocolICMP, 8)[:20], nil},
	} {
		answers := r.Answer(c.request)
		answered := len(answers) == 1 && bytes.Contains(answers[0], c.want)
		if c.want == nil && len(answers) > 0 || c.want != nil && !answered {
			t.Errorf("%s: answered by %x, want one with %x", c.name, answers, c.want)
		}
	}
	if want := (Received{Pings: 2}); r.Received() != want {
		t.Errorf("counted %+v, want %+v", r.Received(), want)
	}
}

func TestResponderBearsWhatIsCutShort(t *testing.T) {
	r := newResponder()
	c := caller{t, r, theirs4, ours4}
	c6 := caller{t, r, theirs6, ours6}
	all := [][]byte{c.segment(1, 0, flagSYN, "data"), c6.segment(1, 0, flagSYN, "data")}
	for _, f := range Catalog(testSrc, 1400) {
		all = append(all, f.Bytes)
	}
	for _, frame := range all {
		for length := range frame {
			r.Answer(frame[:length]) // must not panic
		}
	}
}
