package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	packet "github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

const (
	bareAS      = 65000
	macsOfAPeer = 10
)

// Where the two reflectors are, that of k8slan and that of the floor, and who tells them of peers that are not there.
var (
	reflectorAt, bareReflectorAt = netip.MustParseAddrPort("10.9.0.2:1790"), netip.MustParseAddrPort("10.9.0.2:1791")
	peersAddress                 = netip.MustParseAddr("10.9.0.1")
)

// evpn measures B11: how soon a node with the daemon as it is shipped has what others tell by EVPN. The floor is a process with gobgp as it comes that
// writes each route in one bare message. Both hear it from k8slan's reflector, each from one of its own.
func evpn(t *testing.T, b *bench) {
	f := newFleet(t)
	f.lan.Spec.Discovery = v1beta1.EVPN
	must(t, f.api.Update(t.Context(), f.lan))
	f.connectPeers(t)
	f.reflector(t, reflectorAt)
	f.reflector(t, bareReflectorAt)
	flags := []string{"--evpn-as=65000", "--evpn-peer=address=" + reflectorAt.Addr().String() + ",port=" + fmt.Sprint(reflectorAt.Port())}
	var daemons [2]*os.Process
	var stops [2]func()
	for i := range f.nodes {
		daemons[i], stops[i] = f.daemon(t, i, append(flags, "--evpn-router-id="+vtep(i).String())...)
	}
	for i := range f.nodes {
		f.awaitReady(t, i)
	}
	ns, index := newBareTable(t)
	log := filepath.Join(t.TempDir(), "bare.log")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the floor: %s", tail(log))
		}
	})
	bare, _ := startIn(t, f.nodes[1].Do, log, fmt.Sprintf("%s=%d %s %s", bareSpeaker, index, bareReflectorAt, ns.Path), "/proc/self/exe")
	e, bareEntries := watchEntries(t, netlab.At(filepath.Join(f.nodes[0].Run, "netns", "default.lab"))), watchEntries(t, ns)
	tellBare := peerSpeaker(t, bareReflectorAt)
	must(t, errors.Join(tellBare.Set(peersOf(1, 2)), bareEntries.awaitThat(unix.RTM_NEWNEIGH, macsOfAPeer, ofMAC), tellBare.Set(nil), bareEntries.awaitThat(unix.RTM_DELNEIGH, macsOfAPeer, ofMAC)))

	f.oneMAC(t, b, e, bareEntries, tellBare)
	stops[1]()
	f.allMACs(t, b, daemons[0], bare, e, bareEntries, tellBare)
}

// oneMAC measures what one event takes: a pod's attachment or a MAC's first frame on the other node.
func (f *fleet) oneMAC(t *testing.T, b *bench, e, bareEntries entries, tellBare *bgp.Speaker) {
	there := f.nodes[1]
	f.attach(t, f.nodes[0], "c", sandbox(t)).Close() // a node without pods writes no entries
	sender := f.attach(t, there, "a", sandbox(t))
	defer sender.Close()
	must(t, e.awaitThat(unix.RTM_NEWNEIGH, 1, ofMAC))
	box, n := sandbox(t), 0
	pod := f.request(there, "b", box)
	got := race(t, times(60, 1), contender{"ADD", func() (float64, error) {
		if _, err := there.kernel.Claim(t.Context(), pod); err != nil {
			return 0, err
		}
		began := time.Now()
		err := e.awaitThat(unix.RTM_NEWNEIGH, 1, ofMAC)
		took := milliseconds(time.Since(began))
		err = errors.Join(err, there.kernel.Release(t.Context(), pod.Netns, pod.Spoke, pod.ID()), e.awaitThat(unix.RTM_DELNEIGH, 1, ofMAC))
		pause()
		return took, err
	}}, contender{"frame", func() (float64, error) {
		n++
		began := time.Now()
		err := errors.Join(sender.Send(frames.Stream(nil, []byte{2, 0xbb, 0, 0, byte(n >> 8), byte(n)}, 1, 1)), e.awaitThat(unix.RTM_NEWNEIGH, 1, ofMAC))
		return milliseconds(time.Since(began)), err
	}}, contender{"bare", func() (float64, error) {
		routes := peersOf(1, 2)[1:2]
		began := time.Now()
		err := errors.Join(tellBare.Set(routes), bareEntries.awaitThat(unix.RTM_NEWNEIGH, 1, ofMAC))
		took := milliseconds(time.Since(began))
		return took, errors.Join(err, tellBare.Set(nil), bareEntries.awaitThat(unix.RTM_DELNEIGH, 1, ofMAC))
	}})
	for _, m := range []struct{ id, from, name string }{
		{"B11-ADD", "the end of ADD", "ADD"}, {"B11-frame", "a MAC's first frame", "frame"},
	} {
		s := got[m.name]
		b.atMost(m.id, fmt.Sprintf("from %s until the other node has its entry, EVPN, in ms", m.from), s.median(), 5,
			fmt.Sprintf("middle half %s ms, worst tenth from %v ms; %v times the floor, which takes %v ms from a route to its entry, worst tenth from %v ms; %d rounds",
				s.spread(), round(s.quantile(0.9)), round(s.over(got["bare"]).median()), round(got["bare"].median()), round(got["bare"].quantile(0.9)), len(s)))
	}
}

// allMACs measures what very many peers cost a node, with ten MACs each.
func (f *fleet) allMACs(t *testing.T, b *bench, daemon, bare *os.Process, e, bareEntries entries, tellBare *bgp.Speaker) {
	peers := times(1000, 20)
	macs := peers * macsOfAPeer
	tell, routes, bareRoutes := peerSpeaker(t, reflectorAt), peersOf(peers, 1), peersOf(peers, 2)
	f.awaitIdle(t, daemon)
	before, bareBefore := resident(daemon.Pid), resident(bare.Pid)
	must(t, errors.Join(tell.Set(routes), e.awaitThat(unix.RTM_NEWNEIGH, macs, ofMAC), tellBare.Set(bareRoutes), bareEntries.awaitThat(unix.RTM_NEWNEIGH, macs, ofMAC)))
	f.awaitIdle(t, daemon)
	ours, floor := float64(resident(daemon.Pid)-before)/float64(macs), float64(resident(bare.Pid)-bareBefore)/float64(macs)
	b.atMost("B11-memory", fmt.Sprintf("memory of the daemon for each of %d MACs / the floor", macs), ours/floor, 2,
		fmt.Sprintf("%v / %v bytes resident; %.1f MB without them", round(ours), round(floor), float64(before)/1e6))

	long := time.Duration(times(120, 2)) * time.Second
	worked, bareWorked := work(t, daemon), work(t, bare)
	timer := time.NewTimer(long)
	<-timer.C
	worked, bareWorked = work(t, daemon)-worked, work(t, bare)-bareWorked
	b.atMost("B11-idle", "processor time of the daemon with them while nothing happens, in ms a second", milliseconds(worked)/long.Seconds(), 2,
		fmt.Sprintf("%v in %v; the floor %v", worked.Round(time.Microsecond), long, bareWorked.Round(time.Microsecond)))

	withdraw := func(s *bgp.Speaker, e entries) error {
		return errors.Join(s.Set(nil), e.awaitThat(unix.RTM_DELNEIGH, macs, ofMAC))
	}
	must(t, withdraw(tell, e))
	must(t, withdraw(tellBare, bareEntries))
	fill := func(name string, s *bgp.Speaker, e entries, routes []macvrf.Route) contender {
		return contender{name, func() (float64, error) {
			began := time.Now()
			err := errors.Join(s.Set(routes), e.awaitThat(unix.RTM_NEWNEIGH, macs, ofMAC))
			took := milliseconds(time.Since(began))
			pause()
			err = errors.Join(err, withdraw(s, e))
			pause()
			return took, err
		}}
	}
	got := race(t, times(15, 1), fill("k8slan", tell, e, routes), fill("bare", tellBare, bareEntries, bareRoutes))
	b.atMost("B11", fmt.Sprintf("%d MACs of %d peers, told by EVPN / the floor", macs, peers), got["k8slan"].over(got["bare"]).median(), 2,
		figures("ms", got["k8slan"], got["bare"]))
}

// connectPeers lays a cable from the first node to where this test runs, for who tells routes.
func (f *fleet) connectPeers(t *testing.T) {
	t.Helper()
	ip(t, f.nodes[0].Namespace, "link add tellers type veth peer name tellers netns %d", os.Getpid())
	ip(t, f.nodes[0].Namespace, "addr add %s/24 dev tellers", reflectorAt.Addr())
	ip(t, f.nodes[0].Namespace, "link set tellers up")
	ip(t, f.nodes[1].Namespace, "route add %s via %s", reflectorAt.Addr(), vtep(0))
	here, err := netlink.LinkByName("tellers")
	must(t, err)
	t.Cleanup(func() { must(t, netlink.LinkDel(here)) })
	address, err := netlink.ParseAddr(peersAddress.String() + "/24")
	must(t, err)
	must(t, errors.Join(netlink.AddrAdd(here, address), netlink.LinkSetUp(here)))
}

func (f *fleet) reflector(t *testing.T, at netip.AddrPort) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "reflector.log")
	startIn(t, f.nodes[0].Do, log, "", f.binary, "reflector", "--as=65000", "--router-id="+at.Addr().String(), fmt.Sprintf("--listen=0.0.0.0:%d", at.Port()),
		"--health-address=0", "--log-format=text")
}

// peerSpeaker is who tells what peers would tell that are not there.
func peerSpeaker(t *testing.T, to netip.AddrPort) *bgp.Speaker {
	t.Helper()
	up := make(chan struct{}, 1)
	s := bgp.NewSpeaker(bgp.Config{AS: bareAS, RouterID: peersAddress, Log: slog.New(slog.DiscardHandler), OnUpdate: func(h bgp.Update) {
		for _, session := range h.Sessions {
			if session.Up {
				up <- struct{}{}
			}
		}
	}})
	must(t, s.SetPeers(t.Context(), []bgp.Peer{{Address: to.Addr(), Port: to.Port(), AS: bareAS, Source: peersAddress}}))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() { cancel(); must(t, <-done) })
	select {
	case <-up:
	case <-time.After(time.Minute):
		t.Fatalf("no session with the reflector at %s", to)
	}
	return s
}

// peersOf are the routes of so many peers in a LAN.
func peersOf(peers int, vni uint32) (routes []macvrf.Route) {
	for i := range peers {
		r := macvrf.Route{VNI: vni, VTEP: vtep(2 + i), Targets: []macvrf.Target{macvrf.NewTarget(bareAS, vni)}}
		r.Key = macvrf.Key{Type: macvrf.Multicast, RD: macvrf.RD{1: 1, 2: 10, 3: 200, 4: byte(i >> 8), 5: byte(i), 7: 1}, IP: r.VTEP}
		routes = append(routes, r)
		for m := range byte(macsOfAPeer) {
			r.Key = macvrf.Key{Type: macvrf.MACIP, RD: r.RD, MAC: macvrf.MAC{2, 1, m, byte(i >> 8), byte(i), 1}}
			routes = append(routes, r)
		}
	}
	return routes
}

// ofMAC says whether an entry is a VXLAN's, and of a MAC that is behind a VTEP.
func ofMAC(neighbour []byte) bool {
	const flags = 10 // where they are in struct ndmsg
	return neighbour[flags]&netlink.NTF_SELF != 0 && !ofRemote(neighbour)
}

// bareSpeaker makes the test binary the floor of B11: the index of a VXLAN, a reflector, and the VXLAN's namespace.
const bareSpeaker = "K8SLAN_TEST_BARE_SPEAKER"

// newBareTable makes a bridge with a VXLAN that somebody typed, and returns that.
func newBareTable(t *testing.T) (ns netlab.Namespace, index int) {
	t.Helper()
	ns = netlab.New(t, "bare")
	ip(t, ns, "link add br0 type bridge")
	ip(t, ns, "link add vxlan master br0 type vxlan id 2 local %s dstport 4789 nolearning", vtep(0))
	ip(t, ns, "link set vxlan up")
	ip(t, ns, "link set br0 up")
	link, err := ns.Netlink(t).LinkByName("vxlan")
	must(t, err)
	return ns, link.Attrs().Index
}

func runBareSpeaker(what string) int {
	var index int
	var reflector, path string
	_, err := fmt.Sscan(what, &index, &reflector, &path)
	if err == nil {
		err = runBareSpeakerTo(reflector, path, index)
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// runBareSpeakerTo writes what a reflector tells into a table until it is killed.
func runBareSpeakerTo(reflector, path string, index int) error {
	at, err := netip.ParseAddrPort(reflector)
	if err != nil {
		return err
	}
	table, ns, err := open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	defer table.close()
	ctx, failed := context.Background(), make(chan error, 1)
	srv := server.NewBgpServer(server.LoggerOption(slog.New(slog.DiscardHandler), nil))
	go srv.Serve()
	err = srv.StartBgp(ctx, &api.StartBgpRequest{Global: &api.Global{Asn: bareAS, RouterId: "10.0.0.9", ListenPort: -1}})
	if err == nil {
		err = srv.WatchEvent(ctx, server.WatchEventMessageCallbacks{OnPathUpdate: func(paths []*apiutil.Path, _ time.Time) {
			for _, p := range paths {
				if err := table.send(bareEntry(index, p)); err != nil {
					failed <- fmt.Errorf("write %s: %w", p.Nlri, err)
				}
			}
		}}, server.WatchUpdate(false, "", ""))
	}
	if err == nil {
		err = srv.AddPeer(ctx, &api.AddPeerRequest{Peer: &api.Peer{
			Conf:      &api.PeerConf{NeighborAddress: at.Addr().String(), PeerAsn: bareAS},
			Timers:    &api.Timers{Config: &api.TimersConfig{HoldTime: 9, KeepaliveInterval: 3, ConnectRetry: 3, IdleHoldTimeAfterReset: 3}},
			Transport: &api.Transport{RemotePort: uint32(at.Port())},
			AfiSafis:  []*api.AfiSafi{{Config: &api.AfiSafiConfig{Family: &api.Family{Afi: api.Family_AFI_L2VPN, Safi: api.Family_SAFI_EVPN}, Enabled: true}}},
		}})
	}
	if err != nil {
		return err
	}
	return <-failed
}

// bareEntry is the message that a route comes down to.
func bareEntry(index int, p *apiutil.Path) *nl.NetlinkRequest {
	kind, flags := unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE
	if p.Withdrawal {
		kind, flags = unix.RTM_DELNEIGH, 0
	}
	entry := &netlink.Ndmsg{Family: unix.AF_BRIDGE, Index: uint32(index), State: netlink.NUD_REACHABLE, Flags: netlink.NTF_SELF | netlink.NTF_MASTER | netlink.NTF_EXT_LEARNED}
	var vtep netip.Addr
	for _, attr := range p.Attrs {
		if reach, ok := attr.(*packet.PathAttributeMpReachNLRI); ok {
			vtep = reach.Nexthop
		}
	}
	mac := make([]byte, 6)
	switch d := p.Nlri.(*packet.EVPNNLRI).RouteTypeData.(type) {
	case *packet.EVPNMacIPAdvertisementRoute:
		mac = d.MacAddress
	case *packet.EVPNMulticastEthernetTagRoute:
		vtep = d.IPAddress // also of a withdrawal, which has no attributes
		entry.State, entry.Flags = netlink.NUD_PERMANENT, netlink.NTF_SELF
		if !p.Withdrawal {
			flags = unix.NLM_F_CREATE | unix.NLM_F_APPEND
		}
	}
	r := nl.NewNetlinkRequest(kind, unix.NLM_F_ACK|flags)
	r.AddData(entry)
	r.AddData(nl.NewRtAttr(unix.NDA_LLADDR, mac))
	if vtep.IsValid() {
		r.AddData(nl.NewRtAttr(unix.NDA_DST, vtep.AsSlice()))
	}
	return r
}
