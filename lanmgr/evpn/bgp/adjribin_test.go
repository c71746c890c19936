package bgp

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

var (
	began      = time.Unix(1_800_000_000, 0)
	one, two   = netip.MustParseAddr("192.0.2.101"), netip.MustParseAddr("192.0.2.102")
	stationAt  = macvrf.Key{Type: macvrf.MACIP, RD: macvrf.RD{1: 1, 7: 1}, MAC: macvrf.MAC{2}}
	anotherOne = macvrf.Key{Type: macvrf.MACIP, RD: macvrf.RD{1: 1, 7: 1}, MAC: macvrf.MAC{2, 1}}
)

func after(d time.Duration) time.Time { return began.Add(d) }

func withNumber(k macvrf.Key, n uint32) macvrf.Route { return macvrf.Route{Key: k, Sequence: n} }

func keysOf(r *adjRIBsIn) (keys []macvrf.Key) {
	r.changes()
	for k := range r.best {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b macvrf.Key) int { return slices.Compare(a.MAC[:], b.MAC[:]) })
	return keys
}

func TestWhatALostPeerToldStaysUntilAllIsToldAgain(t *testing.T) {
	r := newAdjRIBsIn()
	r.sessionUp(one, began)
	if r.allSynced() {
		t.Error("settled before anything was told")
	}
	r.add(one, withNumber(stationAt, 0))
	r.add(one, withNumber(anotherOne, 0))
	if next := r.expire(began); !next.Equal(after(SyncTime)) {
		t.Errorf("next is %v", next)
	}
	r.expire(after(SyncTime))
	if !r.allSynced() {
		t.Error("is not settled")
	}
	r.sessionDown(one, after(time.Minute))
	r.expire(after(time.Hour))
	if got := keysOf(r); len(got) != 2 {
		t.Errorf("nobody was there to tell better, and %v is left", got)
	}
	r.sessionUp(one, after(time.Hour))
	r.add(one, withNumber(stationAt, 0))
	r.expire(after(time.Hour + SyncTime - time.Second))
	if got := keysOf(r); len(got) != 2 {
		t.Errorf("%v is left before all was told again", got)
	}
	r.expire(after(time.Hour + SyncTime))
	if got := keysOf(r); !slices.Equal(got, []macvrf.Key{stationAt}) {
		t.Errorf("%v is left, one was not told again", got)
	}
}

func TestWhatALostPeerToldGoesWhereOthersTellNothingOfIt(t *testing.T) {
	r := newAdjRIBsIn()
	r.sessionUp(one, began)
	r.add(one, withNumber(stationAt, 0))
	r.sessionDown(one, began)
	r.sessionUp(two, after(StaleTime)) // it is new and has not told everything yet
	r.expire(after(StaleTime + SyncTime/2))
	if got := keysOf(r); len(got) != 1 {
		t.Errorf("%v is left while the other still tells", got)
	}
	r.expire(after(StaleTime + SyncTime))
	if got := keysOf(r); len(got) > 0 || len(r.peers) != 1 {
		t.Errorf("%v is left of %d peers", got, len(r.peers))
	}
}

// Both have told of two stations, one of them is lost, and then a peer takes back the first.
func TestWhatALostPeerToldGoesWhereAnotherTakesItBack(t *testing.T) {
	kept, gone := []macvrf.Key{stationAt, anotherOne}, []macvrf.Key{anotherOne}
	for _, c := range []struct {
		what    string
		happens func(*adjRIBsIn)
		want    []macvrf.Key
	}{
		{"one that is settled", func(r *adjRIBsIn) { r.withdraw(two, stationAt, after(time.Minute)) }, gone},
		{"nobody, for the lost one was cut off alone", func(*adjRIBsIn) {}, kept},
		{"one that has restarted, and may not have heard of it yet", func(r *adjRIBsIn) {
			r.sessionDown(two, after(time.Minute))
			r.sessionUp(two, after(time.Minute))
			r.add(two, withNumber(stationAt, 0))
			r.withdraw(two, stationAt, after(time.Minute+SyncTime-time.Second))
		}, kept},
		{"the same one a moment later, when it is settled", func(r *adjRIBsIn) {
			r.sessionDown(two, after(time.Minute))
			r.sessionUp(two, after(time.Minute))
			r.add(two, withNumber(stationAt, 0))
			r.add(two, withNumber(anotherOne, 0))
			r.withdraw(two, stationAt, after(time.Minute+SyncTime))
		}, gone},
		{"one that is settled, and the lost one is back and has told it again", func(r *adjRIBsIn) {
			r.sessionUp(one, after(time.Minute))
			r.add(one, withNumber(stationAt, 0))
			r.withdraw(two, stationAt, after(time.Minute))
		}, kept},
		{"one that is settled, and the lost one is back and tells it afterwards", func(r *adjRIBsIn) {
			r.sessionUp(one, after(time.Minute))
			r.withdraw(two, stationAt, after(time.Minute))
			r.add(one, withNumber(stationAt, 0))
		}, kept},
		{"one that is settled, and the lost one is back and has not told it yet", func(r *adjRIBsIn) {
			r.sessionUp(one, after(time.Minute))
			r.withdraw(two, stationAt, after(time.Minute))
		}, gone},
	} {
		r := newAdjRIBsIn()
		for _, p := range []netip.Addr{one, two} {
			r.sessionUp(p, began)
			r.add(p, withNumber(stationAt, 0))
			r.add(p, withNumber(anotherOne, 0))
		}
		r.expire(after(SyncTime))
		r.sessionDown(one, after(SyncTime))
		c.happens(r)
		if got := keysOf(r); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v is left, want %v", c.what, got, c.want)
		}
	}
}

func TestOfSeveralPeersTheOneThatIsThereCounts(t *testing.T) {
	r := newAdjRIBsIn()
	r.sessionUp(one, began)
	r.sessionUp(two, began)
	r.add(one, withNumber(stationAt, 3))
	r.add(two, withNumber(stationAt, 2)) // later, but not as new
	if routes, _ := r.changes(); len(routes) != 1 || routes[0].Sequence != 3 {
		t.Errorf("%v counts", routes)
	}
	r.sessionDown(one, began)
	if routes, _ := r.changes(); len(routes) != 1 || routes[0].Sequence != 2 {
		t.Errorf("%v counts, though the peer is lost that told the other", routes)
	}
	r.add(two, withNumber(stationAt, 2))
	if routes, gone := r.changes(); len(routes)+len(gone) > 0 {
		t.Errorf("%v %v, and nothing has changed", routes, gone)
	}
	r.withdraw(two, stationAt, began)
	if routes, gone := r.changes(); len(routes) != 1 || len(gone) > 0 {
		t.Errorf("%v and %v", routes, gone)
	}
	r.withdraw(one, stationAt, began)
	if _, gone := r.changes(); !slices.Equal(gone, []macvrf.Key{stationAt}) {
		t.Errorf("%v has gone", gone)
	}
}

// Whatever comes over a session becomes routes, or nothing; and what of them becomes entries is what a VXLAN can have.
func FuzzUpdate(f *testing.F) {
	for _, r := range []macvrf.Route{
		{Key: macvrf.Key{Type: macvrf.MACIP, RD: macvrf.RD{1: 1, 7: 1}, MAC: macvrf.MAC{2, 0, 0, 0, 0, 9}}, VTEP: one, VNI: 222, Targets: []macvrf.Target{macvrf.NewTarget(65000, 222)}, Sequence: 7},
		{Key: macvrf.Key{Type: macvrf.MACIP, RD: macvrf.RD{1: 1, 7: 1}, MAC: macvrf.MAC{2}, IP: netip.MustParseAddr("fd00::1")}, VTEP: netip.MustParseAddr("2001:db8::1"), VNI: 222},
		{Key: macvrf.Key{Type: macvrf.Multicast, RD: macvrf.RD{1: 1, 7: 1}, IP: two}, VTEP: two, VNI: 222, Targets: []macvrf.Target{macvrf.NewTarget(65000, 222)}},
	} {
		p, err := pathOf(r)
		if err != nil {
			f.Fatal(err)
		}
		b, err := bgp.NewBGPUpdateMessage(nil, p.Attrs, nil).Serialize()
		if err != nil {
			f.Fatal(err)
		}
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
		table := macvrf.New(65000, netip.MustParseAddr("192.0.2.1"))
		own := netip.MustParseAddr("192.0.2.1")
		table.Set(began, []macvrf.LAN{{VNI: 222, VTEP: own, Claimed: true}})
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
					t.Errorf("withdrawn as %v, told as %v", key, r.Key)
				}
				table.Import(began, r)
			}
		}
		remotes, fdb, _ := table.Forwarding(222)
		for _, e := range fdb {
			remotes = append(slices.Clone(remotes), e.VTEP)
			if e.MAC[0]&1 != 0 {
				t.Errorf("entry %v", e)
			}
		}
		for _, v := range remotes {
			if !v.Is4() || v == own || v.IsMulticast() || v.IsUnspecified() || v.IsLoopback() {
				t.Errorf("VTEP %v", v)
			}
		}
	})
}
