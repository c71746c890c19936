package macvrf_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

func TestRefusedRouteHasReason(t *testing.T) {
	withVTEP := func(routeType macvrf.RouteType, text string) macvrf.Route {
		return route(routeType, 2, func(r *macvrf.Route) { r.VTEP = netip.MustParseAddr(text) })
	}
	withMAC := func(mac macvrf.MAC) macvrf.Route {
		return route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.MAC = mac })
	}
	for _, tt := range []struct {
		name string
		r    macvrf.Route
		want macvrf.Reason
	}{
		{"own VTEP", route(macvrf.MACIP, 1, nil), macvrf.OwnVTEP},
		{"own VTEP, Multicast", route(macvrf.Multicast, 1, nil), macvrf.OwnVTEP},
		{"no VTEP", route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.VTEP = netip.Addr{} }), macvrf.InvalidVTEP},
		{"a group as VTEP", withVTEP(macvrf.Multicast, "239.1.1.1"), macvrf.InvalidVTEP},
		{"link-local", withVTEP(macvrf.Multicast, "fe80::1"), macvrf.InvalidVTEP},
		{"IPv6", withVTEP(macvrf.MACIP, "2001:db8::1"), macvrf.OtherFamily},
		{"IPv4 in IPv6", withVTEP(macvrf.MACIP, "::ffff:192.0.2.2"), macvrf.OtherFamily},
		{"another VNI", route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.VNI = 223 }), macvrf.OtherVNI},
		{"MPLS", route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.Unsupported = true }), macvrf.Encapsulation},
		{"VLAN-aware", route(macvrf.Multicast, 2, func(r *macvrf.Route) { r.Tag = 5 }), macvrf.VLANAware},
		{"a group's MAC", withMAC(macvrf.MAC{1, 0, 0x5e, 0, 0, 1}), macvrf.InvalidMAC},
		{"no MAC", withMAC(macvrf.MAC{}), macvrf.InvalidMAC},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := nodes(1)[0]
			n.Import(began, tt.r)
			n.Import(began, route(macvrf.MACIP, 3, func(r *macvrf.Route) { r.MAC = mac(1) }))
			expect(t, "beside a good route", n, "advertises itself, 1 behind 3")
			refused, total := n.Refused(222)
			if total != 1 || refused.Reason != tt.want || !strings.Contains(refused.String(), tt.r.VTEP.String()) {
				t.Errorf("%d refused, %v", total, refused)
			}
			n.Withdraw(began, tt.r.Key)
			if refused, total := n.Refused(222); total > 0 {
				t.Errorf("still refused: %v", refused)
			}
		})
	}
}

// From any route come only entries that a VXLAN can have, and no other LAN changes.
func FuzzRoute(f *testing.F) {
	add := func(r macvrf.Route) {
		f.Add(byte(r.Type), r.RD[:], r.Tag, r.MAC[:], r.IP.AsSlice(), r.VTEP.AsSlice(), r.VNI, r.Targets[0][:],
			r.Unsupported, r.Sequence, r.Sticky)
	}
	add(route(macvrf.MACIP, 2, nil))
	add(route(macvrf.Multicast, 2, nil))
	f.Fuzz(func(
		t *testing.T, routeType byte, rd []byte, tag uint32, mac, ip, vtep []byte, vni uint32, target []byte,
		unsupported bool, sequence uint32, sticky bool,
	) {
		n := newNode(1)
		n.Set(began, []macvrf.LAN{
			{VNI: 222, VTEP: n.vtep, Claimed: true},
			{VNI: 223, VTEP: n.vtep, Claimed: true, Import: []macvrf.Target{{9, 9}}},
		})
		r := macvrf.Route{
			VNI: vni, Targets: make([]macvrf.Target, 1), Unsupported: unsupported, Sequence: sequence, Sticky: sticky,
		}
		r.Type, r.Tag = macvrf.RouteType(routeType), tag
		copy(r.RD[:], rd)
		copy(r.MAC[:], mac)
		copy(r.Targets[0][:], target)
		r.IP, _ = netip.AddrFromSlice(ip)
		r.VTEP, _ = netip.AddrFromSlice(vtep)
		n.Import(began, r)
		remotes, fdb, _ := n.Forwarding(222)
		vteps := slices.Clone(remotes)
		for _, e := range fdb {
			vteps = append(vteps, e.VTEP)
			if e.MAC[0]&1 != 0 || e.MAC == [6]byte{} {
				t.Errorf("entry %v", e)
			}
		}
		for _, v := range vteps {
			if !v.Is4() || v == n.vtep || v.IsMulticast() || v.IsUnspecified() {
				t.Errorf("VTEP %v", v)
			}
		}
		_, refused := n.Refused(222)
		if got := len(remotes) + len(fdb) + refused; got > 1 {
			t.Errorf("one route became %d entries", got)
		}
		if r.Targets[0] != (macvrf.Target{9, 9}) {
			if remotes, fdb, _ := n.Forwarding(223); len(remotes)+len(fdb) > 0 {
				t.Errorf("the other LAN has %v %v", remotes, fdb)
			}
		}
		n.Withdraw(began, r.Key)
		remotes, fdb, _ = n.Forwarding(222)
		if _, refused := n.Refused(222); len(remotes)+len(fdb)+refused > 0 {
			t.Errorf("left: %v %v, %d refused", remotes, fdb, refused)
		}
	})
}
