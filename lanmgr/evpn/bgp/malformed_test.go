package bgp_test

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"

	packet "github.com/osrg/gobgp/v4/pkg/packet/bgp"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// rawRouter listens at a loopback address, opens BGP sessions correctly, and then sends these messages.
func rawRouter(t *testing.T, at netip.AddrPort, messages ...[]byte) {
	t.Helper()
	l, err := net.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return // the test has ended
			}
			go func() {
				defer conn.Close()
				_ = open(conn, at.Addr(), messages) // the speaker says what becomes of the session
				_, _ = io.Copy(io.Discard, conn)
			}()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
}

func open(conn net.Conn, id netip.Addr, messages [][]byte) error {
	capabilities := packet.NewOptionParameterCapability([]packet.ParameterCapabilityInterface{
		packet.NewCapMultiProtocol(packet.RF_EVPN), packet.NewCapFourOctetASNumber(as),
	})
	hello, err := packet.NewBGPOpenMessage(as, 90, id, []packet.OptionParameterInterface{capabilities})
	if err != nil {
		return err
	}
	start, err := hello.Serialize()
	if err != nil {
		return err
	}
	alive, err := packet.NewBGPKeepAliveMessage().Serialize()
	if err != nil {
		return err
	}
	for _, m := range append([][]byte{start, alive}, messages...) {
		if _, err := conn.Write(m); err != nil {
			return err
		}
	}
	return nil
}

// attribute returns a path attribute with a correct length.
func attribute(flags, kind byte, value []byte) []byte {
	return append([]byte{flags, kind, byte(len(value))}, value...)
}

// join concatenates byte slices.
func join(parts ...[]byte) (all []byte) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// update returns an UPDATE message with these path attributes.
func update(attributes ...[]byte) []byte {
	all := join(attributes...)
	body := binary.BigEndian.AppendUint16([]byte{0, 0}, uint16(len(all))) // no withdrawn routes
	body = append(body, all...)
	header := make([]byte, 16, packet.BGP_HEADER_LENGTH+len(body))
	for i := range header {
		header[i] = 0xff
	}
	header = binary.BigEndian.AppendUint16(header, uint16(packet.BGP_HEADER_LENGTH+len(body)))
	return join(header, []byte{packet.BGP_MSG_UPDATE}, body)
}

// The correct parts of an UPDATE with one route.
var (
	origin    = attribute(0x40, 1, []byte{0})
	asPath    = attribute(0x40, 2, nil)
	localPref = attribute(0x40, 5, []byte{0, 0, 0, 100})
	targets   = attribute(0xc0, 16, []byte{0, 2, as >> 8, as & 0xff, 0, 0, 0, 222, 3, 0xc, 0, 0, 0, 0, 0, 8})
	nextHop   = []byte{4, 192, 0, 2, 77, 0}
)

func reach(nextHop, nlri []byte) []byte {
	return attribute(0x80, 14, join([]byte{0, 25, 70}, nextHop, nlri))
}

func macIP(mac byte) []byte {
	rd, ethernetSegmentAndTag := []byte{0, 1, 127, 0, 0, 77, 0, 222}, make([]byte, 10+4)
	return join([]byte{2, 33}, rd, ethernetSegmentAndTag, []byte{48, 2, 0, 0, 0, 77, mac, 0, 0, 0, 222})
}

func good(mac byte) []byte {
	return update(origin, asPath, localPref, targets, reach(nextHop, macIP(mac)))
}

// with returns a copy with another byte at one place.
func with(b []byte, at int, value byte) []byte {
	b = append([]byte{}, b...)
	b[at] = value
	return b
}

// malformedUpdates returns malformed UPDATE messages by what is wrong with them, and a valid one.
func malformedUpdates() map[string][]byte {
	withReach := func(nextHop, nlri []byte, more ...[]byte) []byte {
		return update(append([][]byte{origin, asPath, localPref, targets, reach(nextHop, nlri)}, more...)...)
	}
	halfCommunity, cutOffTunnel := attribute(0xc0, 16, []byte{0, 2, 0, 0}), attribute(0xc0, 22, []byte{0, 6})
	return map[string][]byte{
		"a length beyond the end":      withReach(nextHop, with(macIP(9), 1, 200)),
		"cut off":                      withReach(nextHop, macIP(9)[:7]),
		"a MAC of 40 bits":             withReach(nextHop, with(macIP(9), 24, 40)),
		"an IP address of 17 bits":     withReach(nextHop, with(macIP(9), 31, 17)),
		"a next hop of three octets":   withReach([]byte{3, 192, 0, 2, 0}, macIP(9)),
		"a tunnel that is cut off":     withReach(nextHop, macIP(9), cutOffTunnel),
		"half a community":             update(origin, asPath, localPref, halfCommunity, reach(nextHop, macIP(9))),
		"attributes beyond the end":    with(good(9), 22, 255),
		"no origin":                    update(asPath, localPref, targets, reach(nextHop, macIP(9))),
		"another marker than all ones": with(good(9), 3, 0),
		"nothing wrong":                good(8),
	}
}

// A malformed UPDATE ends the session of its sender, with a reason, or is ignored. Routes of others stay, and none
// comes from it.
func TestMalformedUpdateAffectsNoOtherSession(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	startReflector(t, port, "")
	peers, names, next := []bgp.Peer{peerAt(port, 2)}, map[netip.Addr]string{}, byte(20)
	for name, message := range malformedUpdates() {
		at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, next}), port)
		rawRouter(t, at, message, good(next))
		names[at.Addr()] = name
		peers = append(peers, bgp.Peer{Address: at.Addr(), Port: port, AS: as, Source: peers[0].Source})
		next++
	}
	other := startSpeaker(t, 3, peerAt(port, 3))
	other.set(t, flood(3), route(3, nil))
	s := startSpeaker(t, 2, peers...)
	has := func(mac byte) bool {
		key := route(77, func(r *macvrf.Route) { r.MAC = macvrf.MAC{2, 0, 0, 0, 77, mac} }).Key
		r, ok := s.routes[key]
		return ok && r.VTEP == netip.MustParseAddr("192.0.2.77") && r.VNI == 222
	}
	for _, p := range peers[1:] {
		name := names[p.Address]
		s.await(t, "the session to end or the next route, after "+name, func() bool {
			_, lost := s.lost[p.Address]
			return lost || has(p.Address.As4()[3])
		})
	}
	s.await(t, "the routes of the others", func() bool { _, ok := s.routes[flood(3).Key]; return ok && has(8) })
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range peers[1:] {
		name := names[p.Address]
		if why, lost := s.lost[p.Address]; lost {
			t.Logf("%s: the session ends, %s", name, why)
			if why == "" || name == "nothing wrong" {
				t.Errorf("%s: the session is down because of %q", name, why)
			}
		} else {
			t.Logf("%s: the session stays up", name)
		}
	}
	if why, lost := s.lost[peers[0].Address]; lost {
		t.Errorf("the reflector's session was lost: %s", why)
	}
	if has(9) {
		t.Error("a route came from a malformed UPDATE")
	}
	for key := range s.routes {
		if key.RD == flood(3).RD || key.MAC[4] == 77 {
			continue
		}
		t.Errorf("there is a route %v", key)
	}
}
