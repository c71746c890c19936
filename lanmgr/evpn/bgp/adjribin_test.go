package bgp

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

var (
	began     = time.Unix(1_800_000_000, 0)
	one, two  = netip.MustParseAddr("192.0.2.101"), netip.MustParseAddr("192.0.2.102")
	firstKey  = macvrf.Key{Type: macvrf.MACIP, RD: macvrf.RD{1: 1, 7: 1}, MAC: macvrf.MAC{2}}
	secondKey = macvrf.Key{Type: macvrf.MACIP, RD: macvrf.RD{1: 1, 7: 1}, MAC: macvrf.MAC{2, 1}}
)

func after(d time.Duration) time.Time { return began.Add(d) }

func withSequence(k macvrf.Key, n uint32) macvrf.Route { return macvrf.Route{Key: k, Sequence: n} }

func keysOf(r *adjRIBsIn) (keys []macvrf.Key) {
	r.changes()
	for k := range r.best {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b macvrf.Key) int { return slices.Compare(a.MAC[:], b.MAC[:]) })
	return keys
}

func TestRoutesOfLostPeerStayUntilItHasSentAllAgain(t *testing.T) {
	r := newAdjRIBsIn()
	r.sessionUp(one, began)
	if r.allSynced() {
		t.Error("synced before anything was received")
	}
	r.add(one, withSequence(firstKey, 0))
	r.add(one, withSequence(secondKey, 0))
	if next := r.expire(began); !next.Equal(after(SyncTime)) {
		t.Errorf("next is %v", next)
	}
	r.expire(after(SyncTime))
	if !r.allSynced() {
		t.Error("is not synced")
	}
	r.sessionDown(one, after(time.Minute))
	r.expire(after(time.Hour))
	if got := keysOf(r); len(got) != 2 {
		t.Errorf("no peer was up to withdraw any, and %v is left", got)
	}
	r.sessionUp(one, after(time.Hour))
	r.add(one, withSequence(firstKey, 0))
	r.expire(after(time.Hour + SyncTime - time.Second))
	if got := keysOf(r); len(got) != 2 {
		t.Errorf("%v is left before all was sent again", got)
	}
	r.expire(after(time.Hour + SyncTime))
	if got := keysOf(r); !slices.Equal(got, []macvrf.Key{firstKey}) {
		t.Errorf("%v is left, one was not sent again", got)
	}
}

func TestStaleRoutesAreDeletedOnceAnotherPeerHasSentAll(t *testing.T) {
	r := newAdjRIBsIn()
	r.sessionUp(one, began)
	r.add(one, withSequence(firstKey, 0))
	r.sessionDown(one, began)
	r.sessionUp(two, after(StaleTime)) // it has not sent all yet
	r.expire(after(StaleTime + SyncTime/2))
	if got := keysOf(r); len(got) != 1 {
		t.Errorf("%v is left while the other still sends", got)
	}
	r.expire(after(StaleTime + SyncTime))
	if got := keysOf(r); len(got) > 0 || len(r.peers) != 1 {
		t.Errorf("%v is left of %d peers", got, len(r.peers))
	}
}

// Both peers have sent two routes, and one session is lost. Then a peer withdraws the first route.
func TestStaleRouteIsDeletedWhenSyncedPeerWithdrawsIt(t *testing.T) {
	both, second := []macvrf.Key{firstKey, secondKey}, []macvrf.Key{secondKey}
	for _, c := range []struct {
		what    string
		happens func(*adjRIBsIn)
		want    []macvrf.Key
	}{
		{"one that is synced", func(r *adjRIBsIn) { r.withdraw(two, firstKey, after(time.Minute)) }, second},
		{"none", func(*adjRIBsIn) {}, both},
		{"one that has restarted, and may not have received it yet", func(r *adjRIBsIn) {
			r.sessionDown(two, after(time.Minute))
			r.sessionUp(two, after(time.Minute))
			r.add(two, withSequence(firstKey, 0))
			r.withdraw(two, firstKey, after(time.Minute+SyncTime-time.Second))
		}, both},
		{"the same one a moment later, when it is synced", func(r *adjRIBsIn) {
			r.sessionDown(two, after(time.Minute))
			r.sessionUp(two, after(time.Minute))
			r.add(two, withSequence(firstKey, 0))
			r.add(two, withSequence(secondKey, 0))
			r.withdraw(two, firstKey, after(time.Minute+SyncTime))
		}, second},
		{"one that is synced, after the lost one is back and has sent it again", func(r *adjRIBsIn) {
			r.sessionUp(one, after(time.Minute))
			r.add(one, withSequence(firstKey, 0))
			r.withdraw(two, firstKey, after(time.Minute))
		}, both},
		{"one that is synced, before the lost one is back and sends it again", func(r *adjRIBsIn) {
			r.sessionUp(one, after(time.Minute))
			r.withdraw(two, firstKey, after(time.Minute))
			r.add(one, withSequence(firstKey, 0))
		}, both},
		{"one that is synced, while the lost one is back and has not sent it yet", func(r *adjRIBsIn) {
			r.sessionUp(one, after(time.Minute))
			r.withdraw(two, firstKey, after(time.Minute))
		}, second},
	} {
		r := newAdjRIBsIn()
		for _, p := range []netip.Addr{one, two} {
			r.sessionUp(p, began)
			r.add(p, withSequence(firstKey, 0))
			r.add(p, withSequence(secondKey, 0))
		}
		r.expire(after(SyncTime))
		r.sessionDown(one, after(SyncTime))
		c.happens(r)
		if got := keysOf(r); !slices.Equal(got, c.want) {
			t.Errorf("withdrawn by %s: %v is left, want %v", c.what, got, c.want)
		}
	}
}

func TestRouteOfConnectedPeerIsBest(t *testing.T) {
	r := newAdjRIBsIn()
	r.sessionUp(one, began)
	r.sessionUp(two, began)
	r.add(one, withSequence(firstKey, 3))
	r.add(two, withSequence(firstKey, 2)) // later, but not as new
	if routes, _ := r.changes(); len(routes) != 1 || routes[0].Sequence != 3 {
		t.Errorf("%v is best", routes)
	}
	r.sessionDown(one, began)
	if routes, _ := r.changes(); len(routes) != 1 || routes[0].Sequence != 2 {
		t.Errorf("%v is best after the session with the other peer was lost", routes)
	}
	r.add(two, withSequence(firstKey, 2))
	if routes, withdrawn := r.changes(); len(routes)+len(withdrawn) > 0 {
		t.Errorf("%v %v, and nothing has changed", routes, withdrawn)
	}
	r.withdraw(two, firstKey, began)
	if routes, withdrawn := r.changes(); len(routes) != 1 || len(withdrawn) > 0 {
		t.Errorf("%v and %v", routes, withdrawn)
	}
	r.withdraw(one, firstKey, began)
	if _, withdrawn := r.changes(); !slices.Equal(withdrawn, []macvrf.Key{firstKey}) {
		t.Errorf("%v is withdrawn", withdrawn)
	}
}
