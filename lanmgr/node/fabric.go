package node

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// EVPN is what LANs with that discovery need of the daemon.
type EVPN struct {
	AS       uint32
	RouterID netip.Addr // an IPv4 address, no other router's
	Peers    []bgp.Peer // to speak with
	Stations Stations
}

// Stations tells of the MACs on the ports of LANs' bridges; kernel.Node does.
type Stations interface {
	WatchStations(ctx context.Context, tell kernel.Stations) error
	Stations(netns string) ([][6]byte, error)
}

// fabric is what the node's LANs with discovery evpn learn from other routers, and what they tell them.
type fabric struct {
	EVPN
	speaker *bgp.Speaker
	log     *slog.Logger
	changed chan struct{} // one slot: segments have to have something else

	mu       sync.Mutex
	table    *evpn.Table
	vnis     map[string]uint32 // by netns
	partial  bool
	sessions []bgp.Session
	failed   string // what the last failure to tell routes said
}

func newFabric(e EVPN, log *slog.Logger) *fabric {
	f := &fabric{
		EVPN: e, log: log, changed: make(chan struct{}, 1),
		table: evpn.New(e.AS, e.RouterID), vnis: map[string]uint32{}, partial: true,
	}
	f.speaker = bgp.NewSpeaker(bgp.Config{AS: e.AS, RouterID: e.RouterID, Hear: f.hear, Log: log})
	return f
}

// run speaks with the peers and hears the bridges until ctx ends.
func (f *fabric) run(ctx context.Context) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	tasks.Go(func() { f.keep(ctx, "cannot speak BGP, LANs with discovery evpn stay as they are", f.speaker.Run) })
	tasks.Go(func() {
		f.keep(ctx, "cannot hear which MACs are on this node, trying again", func(ctx context.Context) error {
			return f.Stations.WatchStations(ctx, kernel.Stations{Seen: f.seen, Left: f.left, Missed: f.list})
		})
	})
	if err := f.speaker.SetPeers(ctx, f.Peers); err != nil {
		f.log.Error("cannot speak BGP with all peers", "err", err)
	}
}

// keep does something again and again until ctx ends, after a pause where it fails.
func (f *fabric) keep(ctx context.Context, message string, do func(context.Context) error) {
	retry := newRetry()
	defer retry.stop()
	for {
		err := do(ctx)
		if ctx.Err() != nil {
			return
		}
		retry.failed(f.log, message, err)
		select {
		case <-ctx.Done():
			return
		case <-retry.timer.C:
		}
	}
}

// set says which LANs there are and who is attached to them. Of one that is new, the MACs on its ports are asked for: their events
// were before.
func (f *fabric) set(plans []Plan, reports []lanmgr.Report) {
	byNetns := index(reports)
	var lans []evpn.LAN
	vnis := make(map[string]uint32)
	for _, p := range plans {
		r, built := byNetns[p.Segment.Netns]
		if !p.EVPN || !built || r.Leaving || r.Segment.LAN != p.Segment.LAN || !p.VTEP.IsValid() {
			continue
		}
		lans = append(lans, evpnLAN(p, r))
		vnis[p.Segment.Netns] = p.Segment.VXLAN.VNI
	}
	f.after(func(now time.Time) {
		f.table.Set(now, lans)
		for netns, vni := range vnis {
			if f.vnis[netns] != vni {
				f.listed(now, netns, vni)
			}
		}
		f.vnis = vnis
	})
}

// evpnLAN is a LAN as the node takes part in it. A VM's MAC is told once it has spoken: two nodes have it while it moves.
func evpnLAN(p Plan, r lanmgr.Report) evpn.LAN {
	lan := evpn.LAN{VNI: p.Segment.VXLAN.VNI, VTEP: p.VTEP, Claimed: len(r.Claims) > 0}
	for _, c := range r.Claims {
		if c.Kind == segment.Veth && len(c.MAC) == len(evpn.MAC{}) {
			lan.Attached = append(lan.Attached, evpn.MAC(c.MAC))
		}
	}
	return lan
}

// fill writes into a segment what others have told of its LAN; what is not known stays nil.
func (f *fabric) fill(s *segment.Segment) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if remotes, fdb, ok := f.table.View(s.VXLAN.VNI); ok && f.vnis[s.Netns] == s.VXLAN.VNI {
		s.Remotes, s.FDB, s.Partial = remotes, fdb, f.partial
	}
}

// hear takes in what other routers tell.
func (f *fabric) hear(h bgp.Heard) {
	f.after(func(now time.Time) {
		for _, r := range h.Routes {
			f.table.Learn(now, r)
		}
		for _, k := range h.Gone {
			f.table.Forget(now, k)
		}
		f.partial = h.Partial
		if h.Sessions != nil {
			f.noteSessions(h.Sessions)
		}
	})
}

// noteSessions logs what is another than before.
func (f *fabric) noteSessions(sessions []bgp.Session) {
	for _, s := range sessions {
		if i := slices.IndexFunc(f.sessions, func(o bgp.Session) bool { return o.Peer == s.Peer && o.Up == s.Up && o.Why == s.Why }); i >= 0 {
			continue
		}
		if s.Up {
			f.log.Info("BGP session is up", "peer", s.Peer)
		} else {
			f.log.Warn("BGP session is down", "peer", s.Peer, "why", s.Why)
		}
	}
	f.sessions = sessions
}

func (f *fabric) seen(netns string, mac [6]byte) {
	f.after(func(now time.Time) {
		if vni, ok := f.vnis[netns]; ok {
			f.table.See(now, vni, mac)
		}
	})
}

func (f *fabric) left(netns string, mac [6]byte) {
	f.after(func(now time.Time) {
		if vni, ok := f.vnis[netns]; ok {
			f.table.Lose(now, vni, mac)
		}
	})
}

// list asks for the MACs on every LAN's ports.
func (f *fabric) list() {
	f.after(func(now time.Time) {
		for netns, vni := range f.vnis {
			f.listed(now, netns, vni)
		}
	})
}

func (f *fabric) listed(now time.Time, netns string, vni uint32) {
	macs, err := f.Stations.Stations(netns)
	if err != nil {
		f.log.Error("cannot read which MACs are on a LAN, those that speak from now on are heard", "netns", netns, "err", err)
		return
	}
	all := make([]evpn.MAC, len(macs))
	for i, mac := range macs {
		all[i] = mac
	}
	f.table.Seen(now, vni, all)
}

// after does what follows from an event: the others are told, and the segments get what they have to have.
func (f *fabric) after(event func(now time.Time)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	event(time.Now())
	failed := ""
	if err := f.speaker.Set(f.table.Own()); err != nil {
		failed = err.Error()
	}
	if failed != "" && failed != f.failed {
		f.log.Error("cannot tell all routes, trying again at the next event", "err", failed)
	}
	f.failed = failed
	signal(f.changed)
}
