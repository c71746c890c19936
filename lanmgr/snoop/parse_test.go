package snoop

import (
	"net/netip"
	"slices"
	"testing"
)

var (
	host, other = []byte{2, 0, 0, 0, 0, 1}, []byte{2, 0, 0, 0, 0, 2}
	ip4, ip6    = netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("fd00::1")
	any6        = netip.IPv6Unspecified()
)

// ethernet is the header of a frame from host to other.
func ethernet(etherType ...byte) []byte { return slices.Concat(other, host, etherType) }

// arp is an ARP frame from host.
func arp(operation byte, sender []byte, ip netip.Addr) []byte {
	head := []byte{0, 1, 8, 0, 6, 4, 0, operation}
	return slices.Concat(ethernet(8, 6), head, sender, ip.AsSlice(), other, []byte{10, 1, 0, 2})
}

// nd is a frame of neighbour discovery from host.
func nd(hops, kind byte, source, target netip.Addr, options ...byte) []byte {
	header := []byte{0x60, 0, 0, 0, 0, byte(24 + len(options)), 58, hops}
	return slices.Concat(ethernet(0x86, 0xdd), header, source.AsSlice(), netip.MustParseAddr("fd00::2").AsSlice(),
		[]byte{kind, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice(), options)
}

// option is one that has a link-layer address.
func option(kind byte, mac []byte) []byte { return slices.Concat([]byte{kind, 1}, mac) }

func TestBindingIsParsedFromFrames(t *testing.T) {
	target, none := netip.MustParseAddr("fd00::3"), netip.Addr{}
	nonceFirst := slices.Concat([]byte{14, 1, 1, 2, 3, 4, 5, 6}, option(1, host))
	for name, tt := range map[string]struct {
		frame []byte
		want  netip.Addr
	}{
		"ARP request":                          {arp(1, host, ip4), ip4},
		"ARP reply":                            {arp(2, host, ip4), ip4},
		"reverse ARP":                          {arp(3, host, ip4), none},
		"ARP probe":                            {arp(1, host, netip.IPv4Unspecified()), none},
		"ARP about another MAC":                {arp(2, other, ip4), none},
		"ARP of a group":                       {arp(2, host, netip.MustParseAddr("224.0.0.1")), none},
		"ARP cut short":                        {arp(1, host, ip4)[:41], none},
		"solicitation":                         {nd(255, 135, ip6, target, option(1, host)...), ip6},
		"solicitation without an option":       {nd(255, 135, ip6, target), ip6},
		"solicitation, with a nonce before":    {nd(255, 135, ip6, target, nonceFirst...), ip6},
		"detection of duplicates":              {nd(255, 135, any6, ip6), none},
		"advertisement":                        {nd(255, 136, target, ip6, option(2, host)...), ip6},
		"advertisement without an option":      {nd(255, 136, ip6, ip6), ip6},
		"advertisement of another MAC":         {nd(255, 136, ip6, ip6, option(2, other)...), none},
		"advertisement that came by a router":  {nd(254, 136, ip6, ip6, option(2, host)...), none},
		"advertisement of a group":             {nd(255, 136, ip6, netip.MustParseAddr("ff02::1")), none},
		"advertisement with an endless option": {nd(255, 136, ip6, ip6, 2, 0, 0, 0, 0, 0, 0, 0), none},
		"an option cut short":                  {nd(255, 136, ip6, ip6, 2, 2, 0, 0, 0, 0, 0, 0), none},
		"an echo":                              {nd(255, 128, ip6, ip6), none},
		"nothing":                              {nil, none},
		"IPv6 cut short":                       {nd(255, 136, ip6, ip6)[:70], none},
	} {
		got, ip, ok := Parse(tt.frame)
		if ok != tt.want.IsValid() || ok && (ip != tt.want || !slices.Equal(got[:], host)) {
			t.Errorf("%s: %x has %v, %t; want %v", name, got, ip, ok, tt.want)
		}
	}
}

// FuzzParse checks that no frame makes the parser panic, and that a binding's address is that of one host.
func FuzzParse(f *testing.F) {
	f.Add(arp(1, host, ip4))
	f.Add(nd(255, 135, ip6, ip6, option(1, host)...))
	f.Add(nd(255, 136, ip6, ip6, option(2, host)...))
	f.Add(arp(1, host, ip4)[:20])
	f.Fuzz(func(t *testing.T, frame []byte) {
		if mac, ip, ok := Parse(frame); ok && (!ip.IsValid() || ip.IsUnspecified() || ip.IsMulticast()) {
			t.Errorf("%x has %v", mac, ip)
		}
	})
}
