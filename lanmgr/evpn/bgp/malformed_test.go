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

// rawRouter is one at an address of the loopback device that opens sessions in order, and then sends these bytes.
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
				_ = open(conn, at.Addr(), messages) // what comes of it is the speaker's to say
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
	hello, err := packet.NewBGPOpenMessage(as, 90, id, []packet.OptionParameterInterface{packet.NewOptionParameterCapability([]packet.ParameterCapabilityInterface{
		packet.NewCapMultiProtocol(packet.RF_EVPN), packet.NewCapFourOctetASNumber(as),
	})})
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

// attribute is a path attribute whose length is as long as it says.
func attribute(flags, kind byte, value []byte) []byte {
	return append([]byte{flags, kind, byte(len(value))}, value...)
}

func join(parts ...[]byte) (all []byte) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// update is an UPDATE with these path attributes.
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

// What is right of an UPDATE with one route.
var (
	origin, asPath, localPref = attribute(0x40, 1, []byte{0}), attribute(0x40, 2, nil), attribute(0x40, 5, []byte{0, 0, 0, 100})
	targets                   = attribute(0xc0, 16, []byte{0, 2, as >> 8, as & 0xff, 0, 0, 0, 222, 3, 0xc, 0, 0, 0, 0, 0, 8})
	nextHop                   = []byte{4, 192, 0, 2, 77, 0}
)

func reach(nextHop, nlri []byte) []byte {
	return attribute(0x80, 14, join([]byte{0, 25, 70}, nextHop, nlri))
}

func macIP(mac byte) []byte {
	return join([]byte{2, 33, 0, 1, 127, 0, 0, 77, 0, 222}, make([]byte, 10+4), []byte{48, 2, 0, 0, 0, 77, mac, 0, 0, 0, 222})
}

func good(mac byte) []byte {
	return update(origin, asPath, localPref, targets, reach(nextHop, macIP(mac)))
}

// with is a copy that has another byte there.
func with(b []byte, at int, value byte) []byte {
	b = append([]byte{}, b...)
	b[at] = value
	return b
}

// A router tells what is no route. It ends its own session, which says why, or that route; what another tells stays, and nothing is made of it.
func TestWhatIsNoRouteHarmsNobodyElse(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	startReflector(t, port, "")
	bad := map[string][]byte{
		"longer than it is":            update(origin, asPath, localPref, targets, reach(nextHop, with(macIP(9), 1, 200))),
		"cut off":                      update(origin, asPath, localPref, targets, reach(nextHop, macIP(9)[:7])),
		"a MAC of 40 bits":             update(origin, asPath, localPref, targets, reach(nextHop, with(macIP(9), 24, 40))),
		"an IP address of 17 bits":     update(origin, asPath, localPref, targets, reach(nextHop, with(macIP(9), 31, 17))),
		"a next hop of three octets":   update(origin, asPath, localPref, targets, reach([]byte{3, 192, 0, 2, 0}, macIP(9))),
		"a tunnel that is cut off":     update(origin, asPath, localPref, targets, reach(nextHop, macIP(9)), attribute(0xc0, 22, []byte{0, 6})),
		"half a community":             update(origin, asPath, localPref, attribute(0xc0, 16, []byte{0, 2, 0, 0}), reach(nextHop, macIP(9))),
		"attributes beyond the end":    with(good(9), 22, 255),
		"no origin":                    update(asPath, localPref, targets, reach(nextHop, macIP(9))),
		"another marker than all ones": with(good(9), 3, 0),
		"nothing wrong":                good(8),
	}
	peers, names, next := []bgp.Peer{peerAt(port, 2)}, map[netip.Addr]string{}, byte(20)
	for name, message := range bad {
		at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, next}), port)
		rawRouter(t, at, message, good(next))
		names[at.Addr()] = name
		peers, next = append(peers, bgp.Peer{Address: at.Addr(), Port: port, AS: as, Source: netip.MustParseAddr("127.0.0.2")}), next+1
	}
	other := speak(t, 3, peerAt(port, 3))
	other.set(t, flood(3), route(3, nil))
	s := speak(t, 2, peers...)
	has := func(mac byte) bool {
		key := route(77, func(r *macvrf.Route) { r.MAC = macvrf.MAC{2, 0, 0, 0, 77, mac} }).Key
		r, ok := s.routes[key]
		return ok && r.VTEP == netip.MustParseAddr("192.0.2.77") && r.VNI == 222
	}
	for _, p := range peers[1:] {
		name := names[p.Address]
		s.await(t, "what comes of a route with "+name, func() bool {
			_, lost := s.lost[p.Address]
			return lost || has(p.Address.As4()[3])
		})
	}
	s.await(t, "the others' routes", func() bool { _, ok := s.routes[flood(3).Key]; return ok && has(8) })
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range peers[1:] {
		name := names[p.Address]
		if why, lost := s.lost[p.Address]; lost {
			t.Logf("%s: the session ends, %s", name, why)
			if why == "" || name == "nothing wrong" {
				t.Errorf("%s: it says %q", name, why)
			}
		} else {
			t.Logf("%s: the session stands", name)
		}
	}
	if why, lost := s.lost[peers[0].Address]; lost {
		t.Errorf("the reflector's session was lost: %s", why)
	}
	if has(9) {
		t.Error("something was made of what is no route")
	}
	for key := range s.routes {
		if key.RD == flood(3).RD || key.MAC[4] == 77 {
			continue
		}
		t.Errorf("it has %v", key)
	}
}
