package bgp

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// Any UPDATE becomes routes or nothing, and routes become only entries that a VXLAN can have.
func FuzzUpdate(f *testing.F) {
	for _, b := range updates(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := bgp.ParseBGPMessage(b)
		if err != nil {
			return
		}
		update, ok := m.Body.(*bgp.BGPUpdate)
		if !ok {
			return
		}
		own := netip.MustParseAddr("192.0.2.1")
		table := macvrf.New(65000, own)
		table.Set(began, []macvrf.LAN{{VNI: 222, VTEP: own, Claimed: true}})
		for _, r := range routesOf(t, update) {
			table.Import(began, r)
		}
		remotes, fdb, _ := table.Forwarding(222)
		vteps := slices.Clone(remotes)
		for _, e := range fdb {
			vteps = append(vteps, e.VTEP)
			if e.MAC[0]&1 != 0 {
				t.Errorf("entry %v", e)
			}
		}
		for _, v := range vteps {
			if !v.Is4() || v == own || v.IsMulticast() || v.IsUnspecified() || v.IsLoopback() {
				t.Errorf("VTEP %v", v)
			}
		}
	})
}

// updates returns valid UPDATE messages.
func updates(f *testing.F) (messages [][]byte) {
	f.Helper()
	targets := []macvrf.Target{macvrf.NewTarget(65000, 222)}
	for _, r := range []macvrf.Route{
		{
			Key:  macvrf.Key{Type: macvrf.MACIP, RD: macvrf.RD{1: 1, 7: 1}, MAC: macvrf.MAC{2, 0, 0, 0, 0, 9}},
			VTEP: one, VNI: 222, Targets: targets, Sequence: 7,
		},
		{
			Key: macvrf.Key{
				Type: macvrf.MACIP, RD: macvrf.RD{1: 1, 7: 1}, MAC: macvrf.MAC{2}, IP: netip.MustParseAddr("fd00::1"),
			},
			VTEP: netip.MustParseAddr("2001:db8::1"), VNI: 222,
		},
		{
			Key:  macvrf.Key{Type: macvrf.Multicast, RD: macvrf.RD{1: 1, 7: 1}, IP: two},
			VTEP: two, VNI: 222, Targets: targets,
		},
	} {
		p, err := pathOf(r)
		if err != nil {
			f.Fatal(err)
		}
		b, err := bgp.NewBGPUpdateMessage(nil, p.Attrs, nil).Serialize()
		if err != nil {
			f.Fatal(err)
		}
		messages = append(messages, b)
	}
	return messages
}

// routesOf returns the routes in an UPDATE. It checks that a withdrawal has the same key.
func routesOf(t *testing.T, update *bgp.BGPUpdate) (routes []macvrf.Route) {
	t.Helper()
	for _, attr := range update.PathAttributes {
		reach, ok := attr.(*bgp.PathAttributeMpReachNLRI)
		if !ok {
			continue
		}
		for _, nlri := range reach.Value {
			p := &apiutil.Path{Family: bgp.RF_EVPN, Nlri: nlri.NLRI, Attrs: update.PathAttributes}
			r, ok := routeOf(p)
			if !ok {
				continue
			}
			if key, ok := keyOf(withdrawal(p)); !ok || key != r.Key {
				t.Errorf("withdrawn as %v, advertised as %v", key, r.Key)
			}
			routes = append(routes, r)
		}
	}
	return routes
}
