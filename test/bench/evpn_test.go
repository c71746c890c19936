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

// reflectorAt and bareReflectorAt are the reflectors of k8slan and of the floor. peersAddress is the speaker that
// advertises the routes of peers which do not exist.
var (
	reflectorAt, bareReflectorAt = netip.MustParseAddrPort("10.9.0.2:1790"), netip.MustParseAddrPort("10.9.0.2:1791")
	peersAddress                 = netip.MustParseAddr("10.9.0.1")
)

// evpn measures B11: how soon a node with the released daemon has the routes that others advertise. The floor is a
// process with an unchanged gobgp that writes each route in one bare message. Each receives the routes from a k8slan
// reflector of its own.
func evpn(t *testing.T, b *bench) {
	f := newFleet(t)
	f.lan.Spec.Discovery = v1beta1.EVPN
	must(t, f.api.Update(t.Context(), f.lan))
	f.connectPeers(t)
	f.reflector(t, reflectorAt)
	f.reflector(t, bareReflectorAt)
	peer := fmt.Sprintf("--evpn-peer=address=%s,port=%d", reflectorAt.Addr(), reflectorAt.Port())
	flags := []string{"--evpn-as=65000", peer}
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
	env := fmt.Sprintf("%s=%d %s %s", bareSpeaker, index, bareReflectorAt, ns.Path)
	bare, _ := startIn(t, f.nodes[1].Do, log, env, "/proc/self/exe")
	e, bareEntries := watchEntries(t, f.lanNetns(0)), watchEntries(t, ns)
	barePeers := peerSpeaker(t, bareReflectorAt)
	must(t, errors.Join(
		barePeers.Set(peersOf(1, 2)), bareEntries.awaitThat(unix.RTM_NEWNEIGH, macsOfAPeer, ofMAC),
		barePeers.Set(nil), bareEntries.awaitThat(unix.RTM_DELNEIGH, macsOfAPeer, ofMAC),
	))

	f.oneMAC(t, b, e, bareEntries, barePeers)
	stops[1]()
	f.allMACs(t, b, daemons[0], bare, e, bareEntries, barePeers)
}

// oneMAC measures one event: a pod is attached, or a MAC sends its first frame, on the other node.
func (f *fleet) oneMAC(t *testing.T, b *bench, e, bareEntries entries, barePeers *bgp.Speaker) {
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
		err = errors.Join(err, there.kernel.Release(t.Context(), pod.Netns, pod.Spoke, pod.ID()),
			e.awaitThat(unix.RTM_DELNEIGH, 1, ofMAC))
		pause()
		return took, err
	}}, contender{"frame", func() (float64, error) {
		n++
		began := time.Now()
		frame := frames.Stream(nil, []byte{2, 0xbb, 0, 0, byte(n >> 8), byte(n)}, 1, 1)
		err := errors.Join(sender.Send(frame), e.awaitThat(unix.RTM_NEWNEIGH, 1, ofMAC))
		return milliseconds(time.Since(began)), err
	}}, contender{"bare", func() (float64, error) {
		routes := peersOf(1, 2)[1:2]
		began := time.Now()
		err := errors.Join(barePeers.Set(routes), bareEntries.awaitThat(unix.RTM_NEWNEIGH, 1, ofMAC))
		took := milliseconds(time.Since(began))
		return took, errors.Join(err, barePeers.Set(nil), bareEntries.awaitThat(unix.RTM_DELNEIGH, 1, ofMAC))
	}})
	for _, m := range []struct{ id, from, name string }{
		{"B11-ADD", "the end of ADD", "ADD"}, {"B11-frame", "a MAC's first frame", "frame"},
	} {
		s := got[m.name]
		b.atMost(m.id, fmt.Sprintf("from %s until the other node has its entry, EVPN, in ms", m.from), s.median(), 5,
			fmt.Sprintf("middle half %s ms, worst tenth from %v ms; %v times the floor, "+
				"which takes %v ms from a route to its entry, worst tenth from %v ms; %d rounds",
				s.spread(), round(s.quantile(0.9)), round(s.over(got["bare"]).median()), round(got["bare"].median()),
				round(got["bare"].quantile(0.9)), len(s)))
	}
}

// allMACs measures what a thousand peers with ten MACs each cost a node.
func (f *fleet) allMACs(
	t *testing.T, b *bench, daemon, bare *os.Process, e, bareEntries entries, barePeers *bgp.Speaker,
) {
	peers := times(1000, 20)
	macs := peers * macsOfAPeer
	others, routes, bareRoutes := peerSpeaker(t, reflectorAt), peersOf(peers, 1), peersOf(peers, 2)
	f.awaitIdle(t, daemon)
	before, bareBefore := resident(daemon.Pid), resident(bare.Pid)
	must(t, errors.Join(
		others.Set(routes), e.awaitThat(unix.RTM_NEWNEIGH, macs, ofMAC),
		barePeers.Set(bareRoutes), bareEntries.awaitThat(unix.RTM_NEWNEIGH, macs, ofMAC),
	))
	f.awaitIdle(t, daemon)
	ours := float64(resident(daemon.Pid)-before) / float64(macs)
	floor := float64(resident(bare.Pid)-bareBefore) / float64(macs)
	b.atMost("B11-memory", fmt.Sprintf("memory of the daemon for each of %d MACs / the floor", macs), ours/floor, 2,
		fmt.Sprintf("%v / %v bytes resident; %.1f MB without them", round(ours), round(floor), float64(before)/1e6))

	long := time.Duration(times(120, 2)) * time.Second
	worked, bareWorked := work(t, daemon), work(t, bare)
	timer := time.NewTimer(long)
	<-timer.C
	worked, bareWorked = work(t, daemon)-worked, work(t, bare)-bareWorked
	b.atMost("B11-idle", "processor time of the daemon with them while nothing happens, in ms a second",
		milliseconds(worked)/long.Seconds(), 2,
		fmt.Sprintf("%v in %v; the floor %v", worked.Round(time.Microsecond), long, bareWorked.Round(time.Microsecond)))

	withdraw := func(s *bgp.Speaker, e entries) error {
		return errors.Join(s.Set(nil), e.awaitThat(unix.RTM_DELNEIGH, macs, ofMAC))
	}
	must(t, withdraw(others, e))
	must(t, withdraw(barePeers, bareEntries))
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
	got := race(t, times(15, 1), fill("k8slan", others, e, routes), fill("bare", barePeers, bareEntries, bareRoutes))
	b.atMost("B11", fmt.Sprintf("%d MACs of %d peers, by EVPN / the floor", macs, peers),
		got["k8slan"].over(got["bare"]).median(), 2,
		figures("ms", got["k8slan"], got["bare"]))
}

// connectPeers lays a cable from the first node to the namespace of this test, for the speaker of the peers.
func (f *fleet) connectPeers(t *testing.T) {
	t.Helper()
	ip(t, f.nodes[0].Namespace, "link add peers type veth peer name peers netns %d", os.Getpid())
	ip(t, f.nodes[0].Namespace, "addr add %s/24 dev peers", reflectorAt.Addr())
	ip(t, f.nodes[0].Namespace, "link set peers up")
	ip(t, f.nodes[1].Namespace, "route add %s via %s", reflectorAt.Addr(), vtep(0))
	here, err := netlink.LinkByName("peers")
	must(t, err)
	t.Cleanup(func() { must(t, netlink.LinkDel(here)) })
	address, err := netlink.ParseAddr(peersAddress.String() + "/24")
	must(t, err)
	must(t, errors.Join(netlink.AddrAdd(here, address), netlink.LinkSetUp(here)))
}

func (f *fleet) reflector(t *testing.T, at netip.AddrPort) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "reflector.log")
	startIn(t, f.nodes[0].Do, log, "", f.binary, "reflector", "--as=65000",
		"--router-id="+at.Addr().String(), fmt.Sprintf("--listen=0.0.0.0:%d", at.Port()),
		"--health-address=0", "--log-format=text")
}

// peerSpeaker starts a speaker for the routes of peers that do not exist.
func peerSpeaker(t *testing.T, to netip.AddrPort) *bgp.Speaker {
	t.Helper()
	up := make(chan struct{}, 1)
	onUpdate := func(h bgp.Update) {
		for _, session := range h.Sessions {
			if session.Up {
				up <- struct{}{}
			}
		}
	}
	s := bgp.NewSpeaker(bgp.Config{
		AS: bareAS, RouterID: peersAddress, Log: slog.New(slog.DiscardHandler), OnUpdate: onUpdate,
	})
	peer := bgp.Peer{Address: to.Addr(), Port: to.Port(), AS: bareAS, Source: peersAddress}
	must(t, s.SetPeers(t.Context(), []bgp.Peer{peer}))
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

// peersOf returns the routes of that many peers in a LAN.
func peersOf(peers int, vni uint32) (routes []macvrf.Route) {
	for i := range peers {
		r := macvrf.Route{VNI: vni, VTEP: vtep(2 + i), Targets: []macvrf.Target{macvrf.NewTarget(bareAS, vni)}}
		rd := macvrf.RD{1: 1, 2: 10, 3: 200, 4: byte(i >> 8), 5: byte(i), 7: 1}
		r.Key = macvrf.Key{Type: macvrf.Multicast, RD: rd, IP: r.VTEP}
		routes = append(routes, r)
		for m := range byte(macsOfAPeer) {
			r.Key = macvrf.Key{Type: macvrf.MACIP, RD: r.RD, MAC: macvrf.MAC{2, 1, m, byte(i >> 8), byte(i), 1}}
			routes = append(routes, r)
		}
	}
	return routes
}

// ofMAC reports whether an entry is a VXLAN's entry for a MAC behind a VTEP.
func ofMAC(neighbour []byte) bool {
	const flags = 10 // their offset in struct ndmsg
	return neighbour[flags]&netlink.NTF_SELF != 0 && !ofRemote(neighbour)
}

// bareSpeaker makes the test binary the floor of B11: it has the ifindex of a VXLAN, a reflector, and the VXLAN's
// namespace.
const bareSpeaker = "K8SLAN_TEST_BARE_SPEAKER"

// newBareTable makes a bridge with a VXLAN by ip(8), and returns the VXLAN.
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

// runBareSpeakerTo writes a reflector's routes into a table until it is killed.
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
	global := &api.Global{Asn: bareAS, RouterId: "10.0.0.9", ListenPort: -1}
	err = srv.StartBgp(ctx, &api.StartBgpRequest{Global: global})
	if err == nil {
		onPathUpdate := func(paths []*apiutil.Path, _ time.Time) {
			for _, p := range paths {
				if err := table.send(bareEntry(index, p)); err != nil {
					failed <- fmt.Errorf("write %s: %w", p.Nlri, err)
				}
			}
		}
		callbacks := server.WatchEventMessageCallbacks{OnPathUpdate: onPathUpdate}
		err = srv.WatchEvent(ctx, callbacks, server.WatchUpdate(false, "", ""))
	}
	if err == nil {
		err = srv.AddPeer(ctx, &api.AddPeerRequest{Peer: &api.Peer{
			Conf: &api.PeerConf{NeighborAddress: at.Addr().String(), PeerAsn: bareAS},
			Timers: &api.Timers{Config: &api.TimersConfig{
				HoldTime: 9, KeepaliveInterval: 3, ConnectRetry: 3, IdleHoldTimeAfterReset: 3,
			}},
			Transport: &api.Transport{RemotePort: uint32(at.Port())},
			AfiSafis: []*api.AfiSafi{{Config: &api.AfiSafiConfig{
				Family: &api.Family{Afi: api.Family_AFI_L2VPN, Safi: api.Family_SAFI_EVPN}, Enabled: true,
			}}},
		}})
	}
	if err != nil {
		return err
	}
	return <-failed
}

// bareEntry is the one message for a route.
func bareEntry(index int, p *apiutil.Path) *nl.NetlinkRequest {
	kind, flags := unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE
	if p.Withdrawal {
		kind, flags = unix.RTM_DELNEIGH, 0
	}
	entry := &netlink.Ndmsg{
		Family: unix.AF_BRIDGE, Index: uint32(index), State: netlink.NUD_REACHABLE,
		Flags: netlink.NTF_SELF | netlink.NTF_MASTER | netlink.NTF_EXT_LEARNED,
	}
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
		vtep = d.IPAddress // a withdrawal has it, too, and no attributes
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
