package kernel

import (
	"net/netip"
	"slices"
	"testing"
)

func TestWhoHasAnAddressIsReadFromFrames(t *testing.T) {
	station, other := []byte{2, 0, 0, 0, 0, 1}, []byte{2, 0, 0, 0, 0, 2}
	ip4, ip6 := netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("fd00::1")
	none := netip.Addr{}
	ethernet := func(kind ...byte) []byte { return slices.Concat(other, station, kind) }
	arp := func(operation byte, sender []byte, ip netip.Addr) []byte {
		return slices.Concat(ethernet(8, 6), []byte{0, 1, 8, 0, 6, 4, 0, operation}, sender, ip.AsSlice(), other, []byte{10, 1, 0, 2})
	}
	nd := func(hops, kind byte, source, target netip.Addr, option ...byte) []byte {
		return slices.Concat(ethernet(0x86, 0xdd), []byte{0x60, 0, 0, 0, 0, byte(24 + len(option)), 58, hops}, source.AsSlice(),
			netip.MustParseAddr("fd00::2").AsSlice(), []byte{kind, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice(), option)
	}
	mac := func(kind byte, mac []byte) []byte { return slices.Concat([]byte{kind, 1}, mac) }
	any6, target := netip.IPv6Unspecified(), netip.MustParseAddr("fd00::3")
	for name, tt := range map[string]struct {
		frame []byte
		want  netip.Addr
	}{
		"ARP request":                          {arp(1, station, ip4), ip4},
		"ARP reply":                            {arp(2, station, ip4), ip4},
		"reverse ARP":                          {arp(3, station, ip4), none},
		"ARP probe":                            {arp(1, station, netip.IPv4Unspecified()), none},
		"ARP of somebody else":                 {arp(2, other, ip4), none},
		"ARP of a group":                       {arp(2, station, netip.MustParseAddr("224.0.0.1")), none},
		"ARP cut short":                        {arp(1, station, ip4)[:41], none},
		"solicitation":                         {nd(255, 135, ip6, target, mac(1, station)...), ip6},
		"solicitation without an option":       {nd(255, 135, ip6, target), ip6},
		"solicitation, with a nonce before":    {nd(255, 135, ip6, target, slices.Concat([]byte{14, 1, 1, 2, 3, 4, 5, 6}, mac(1, station))...), ip6},
		"detection of duplicates":              {nd(255, 135, any6, ip6), none},
		"advertisement":                        {nd(255, 136, target, ip6, mac(2, station)...), ip6},
		"advertisement without an option":      {nd(255, 136, ip6, ip6), ip6},
		"advertisement for somebody else":      {nd(255, 136, ip6, ip6, mac(2, other)...), none},
		"advertisement that came by a router":  {nd(254, 136, ip6, ip6, mac(2, station)...), none},
		"advertisement of a group":             {nd(255, 136, ip6, netip.MustParseAddr("ff02::1")), none},
		"advertisement with an endless option": {nd(255, 136, ip6, ip6, 2, 0, 0, 0, 0, 0, 0, 0), none},
		"an option cut short":                  {nd(255, 136, ip6, ip6, 2, 2, 0, 0, 0, 0, 0, 0), none},
		"an echo":                              {nd(255, 128, ip6, ip6), none},
		"nothing":                              {nil, none},
		"IPv6 cut short":                       {nd(255, 136, ip6, ip6)[:70], none},
	} {
		got, ip, ok := shownBy(tt.frame)
		if ok != tt.want.IsValid() || ok && (ip != tt.want || !slices.Equal(got[:], station)) {
			t.Errorf("%s: %x has %v, %t; want %v", name, got, ip, ok, tt.want)
		}
	}
}
