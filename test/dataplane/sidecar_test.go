package dataplane

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
)

// The sidecars of three pods of a dual-stack Service make one LAN, over either family.
func TestSidecarsOfThreePodsAreOneLAN(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	for family, overhead := range map[string]int{"ipv4": 50, "ipv6": 70} {
		t.Run(family, func(t *testing.T) {
			t.Parallel()
			tm := s.pods(t, 3)
			tm.service(t, "lan")
			sidecars := tm.startAll(t, settings{
				"KL_IP_FAMILY": family, "KL_VXLAN_ADDRESSES": "192.168.69.{ordinal+1}/24,fd69::{ordinal+1:x}/64",
			})
			for _, p := range tm.pods {
				for n := range tm.pods {
					ping(t, p.Namespace, fmt.Sprintf("192.168.69.%d", n+1))
					ping(t, p.Namespace, fmt.Sprintf("fd69::%x", n+1))
				}
				if mtu := p.link(t, kubelan).Attrs().MTU; mtu != underlayMTU-overhead {
					t.Errorf("the MTU of %s is %d", p.Name, mtu)
				}
				code, body, err := p.get("/config")
				if err != nil || code != http.StatusOK || !strings.Contains(body, `"vni":6969`) {
					t.Errorf("/config of %s answers %d %s, %v", p.Name, code, body, err)
				}
			}
			for _, sc := range sidecars {
				sc.stop(t)
				if links := sc.pod.Links(t); !slices.Equal(links, []string{"eth1"}) {
					t.Errorf("%s still has %v", sc.pod.Name, links)
				}
			}
			for _, sc := range tm.startAll(t, settings{"KL_IP_FAMILY": family, "KL_VXLAN_ADDRESSES": ""}) {
				defer sc.stop(t)
			}
			one, two := tm.pods[0].host(t), tm.pods[1].host(t)
			everythingCrosses(t, one, two)
			everythingCrosses(t, two, one)
		})
	}
}

// everythingCrosses sends every kind of frame, with VLAN tags within the MTU. There is no bridge, so all of them pass.
func everythingCrosses(t *testing.T, from, to *host) {
	t.Helper()
	const tag = 4
	for _, f := range append(frames.Catalog(from.MAC, from.MTU-tag), frames.Catalog(from.MAC, from.MTU)...) {
		if len(f.Bytes) <= 14+from.MTU {
			t.Run(f.Name, func(t *testing.T) { crosses(t, from, to, f.Bytes) })
		}
	}
}

// An address in several slices and Services is one remote, and is removed with the last of them.
func TestSidecarJoinsServicesAndSlices(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 1)
	p := tm.pods[0]
	one, two := netip.MustParseAddr("198.51.100.11"), netip.MustParseAddr("198.51.100.12")
	three := netip.MustParseAddr("198.51.100.13")
	tm.slice(t, "a-1", "a", ready(p.ipv4, one, two)...)
	tm.slice(t, "a-2", "a", ready(two, three)...)
	tm.slice(t, "b-1", "b", ready(three, one)...)
	tm.slice(t, "c-1", "c", ready(netip.MustParseAddr("198.51.100.99"))...) // of another Service
	sc := p.start(t, p.settings().with(settings{
		"KL_SERVICES": "a," + tm.namespace + "/b", "KL_PEERS": "198.51.100.11,198.51.100.50," + p.ipv6.String(),
	}))
	static := netip.MustParseAddr("198.51.100.50")
	p.awaitRemotes(t, one, two, three, static)
	updates := tables(t, p.Namespace)
	tm.slice(t, "a-1", "a", ready(two, p.ipv4)...)         // one is still in b and in peers, in another order
	tm.slice(t, "b-1", "b", ready(one)...)                 // three is in a-2
	tm.slice(t, "a-2", "a", ready(three)...)               // two is in a-1
	tm.slice(t, "b-1", "b", ready(one, one.Next())...)     // one.Next() is two
	tm.slice(t, "a-1", "a", endpointsOf(false, p.ipv4)...) // two is now in b
	tm.slice(t, "b-1", "b")
	expectEntries(t, updates, remoteEvent{unix.RTM_DELNEIGH, two})
	p.awaitRemotes(t, one, three, static)
	if said := sc.logText(t); strings.Contains(said, "level=ERROR") || strings.Contains(said, "level=WARN") {
		t.Errorf("it logged\n%s", said)
	}
}

// remoteEvent is an event of a remote that is added or deleted.
type remoteEvent struct {
	kind   uint16
	remote netip.Addr
}

// expectEntries expects these events of remotes next, and no others.
func expectEntries(t *testing.T, updates <-chan netlink.NeighUpdate, want ...remoteEvent) {
	t.Helper()
	late := time.After(daemonTimeout)
	var got []remoteEvent
	for len(got) < len(want) {
		select {
		case u := <-updates:
			a, ok := netip.AddrFromSlice(u.IP)
			if ok && u.Family == unix.AF_BRIDGE && slices.Equal(u.HardwareAddr, make([]byte, 6)) {
				got = append(got, remoteEvent{u.Type, a.Unmap()})
			}
		case <-late:
			t.Fatalf("the events are %v, want %v", got, want)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("the events are %v, want %v", got, want)
	}
}

func TestSidecarOfAServiceWithAThousandPods(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	const pods, perSlice = 1000, 100
	tm := s.pods(t, 2)
	a, b := tm.pods[0], tm.pods[1]
	endpoints := []netip.Addr{a.ipv4, b.ipv4}
	for i := range pods {
		endpoints = append(endpoints, netip.AddrFrom4([4]byte{10, 9, byte(i / 250), byte(1 + i%250)}))
	}
	blackhole := &netlink.Route{ // a flooded frame would otherwise send ARP for a thousand next hops
		Dst: &net.IPNet{IP: net.IPv4(10, 0, 0, 0), Mask: net.CIDRMask(8, 32)}, Type: unix.RTN_BLACKHOLE,
	}
	for _, p := range tm.pods {
		must(t, p.Netlink(t).RouteAdd(blackhole))
	}
	slice := func(n int) {
		some := endpoints[n*perSlice : min(len(endpoints), (n+1)*perSlice)]
		tm.slice(t, fmt.Sprint("lan-", n), "lan", ready(some...)...)
	}
	for n := range (len(endpoints) + perSlice - 1) / perSlice {
		slice(n)
	}
	began := time.Now()
	sc := a.start(t, a.settings())
	a.awaitRemotes(t, endpoints[1:]...)
	t.Logf("%d remotes within %v of the start, %s resident",
		len(endpoints)-1, time.Since(began).Round(time.Millisecond), memory(t, sc.process))
	b.start(t, b.settings())
	b.awaitRemotes(t, append([]netip.Addr{a.ipv4}, endpoints[2:]...)...)

	one, two := a.host(t), b.host(t)
	crosses(t, one, two, frames.Stream(nil, one.MAC, 1, 1))
	crosses(t, two, one, frames.Stream(nil, two.MAC, 1, 1))
	stream := startStream(t, 2, one, two)
	updates := tables(t, a.Namespace)
	for i := range 5 {
		gone, come := endpoints[500+i], netip.AddrFrom4([4]byte{10, 9, 200, byte(1 + i)})
		began := time.Now()
		endpoints[500+i] = come
		slice((500 + i) / perSlice)
		expectEntries(t, updates, remoteEvent{unix.RTM_NEWNEIGH, come}, remoteEvent{unix.RTM_DELNEIGH, gone})
		t.Logf("one removed and one added: %v with the API server's write", time.Since(began).Round(time.Millisecond))
	}
	endpoints[3] = endpoints[2] // a duplicate: one remote less
	slice(0)
	expectEntries(t, updates, remoteEvent{unix.RTM_DELNEIGH, netip.AddrFrom4([4]byte{10, 9, 0, 2})})
	stream.expectAll(t)
}

// memory returns a process's resident memory as the kernel prints it.
func memory(t *testing.T, p *os.Process) string {
	t.Helper()
	for line := range strings.Lines(read(t, fmt.Sprintf("/proc/%d/status", p.Pid))) {
		if size, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strings.TrimSpace(size)
		}
	}
	t.Fatal("the kernel does not report its memory")
	return ""
}

// The other pods lose no frame when a pod is added, removed or becomes ready, and within a second no frame is sent to a
// removed pod.
func TestSidecarFollowsPodsWithoutLoss(t *testing.T) {
	s := startSidecars(t)
	tm := s.pods(t, 3)
	a, b, c := tm.pods[0], tm.pods[1], tm.pods[2]
	set := func(endpoints ...discoveryv1.Endpoint) { tm.slice(t, "lan-1", "lan", endpoints...) }
	set(ready(a.ipv4, b.ipv4, c.ipv4)...)
	tm.startAll(t, settings{"KL_READY_ONLY": "true"})
	one, two, three := a.host(t), b.host(t), c.host(t)
	crosses(t, one, two, frames.Stream(nil, one.MAC, 9, 1))
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 2))
	updates := tables(t, a.Namespace)
	known, flood := *two, *two
	flood.Attachment.MAC = nil
	streams := []*stream{startStream(t, 1, one, &known), startStream(t, 2, two, one)}
	for range 5 {
		set(append(ready(b.ipv4, a.ipv4), endpointsOf(false, c.ipv4)...)...)
		began := time.Now()
		expectEntries(t, updates, remoteEvent{unix.RTM_DELNEIGH, c.ipv4})
		if took := time.Since(began); took > time.Second {
			t.Errorf("frames were sent to a removed pod for %v", took)
		}
		set(ready(c.ipv4, b.ipv4, a.ipv4)...)
		expectEntries(t, updates, remoteEvent{unix.RTM_NEWNEIGH, c.ipv4})
		set(ready(a.ipv4, c.ipv4, b.ipv4)...)
	}
	for _, s := range streams {
		s.expectAll(t)
	}
	// Flooded frames are not lost either.
	set(ready(a.ipv4, b.ipv4)...)
	expectEntries(t, updates, remoteEvent{unix.RTM_DELNEIGH, c.ipv4})
	must(t, three.Drain())
	flooded := startStream(t, 3, one, &flood)
	for range 5 {
		set(endpointsOf(true, b.ipv4)...)
		set(ready(a.ipv4, b.ipv4)...)
	}
	flooded.expectAll(t)
	if frame, err := next(three.Wire, 100*time.Millisecond); err == nil {
		t.Errorf("a removed pod received %x", frame)
	}
}

func TestSidecarWithStaticPeersNeedsNoAPIServer(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 2)
	for i, p := range tm.pods {
		p.relay.close()
		mine := p.settings().with(settings{"KL_PEERS": tm.pods[1-i].ipv4.String()})
		if i == 0 { // the other pod's sidecar has a Service, too, and cannot read it
			mine["KL_SERVICES"], mine["KUBECONFIG"] = "", ""
		}
		p.start(t, mine)
	}
	for i, p := range tm.pods {
		p.awaitRemotes(t, tm.pods[1-i].ipv4)
		p.awaitHealth(t, http.StatusNoContent)
	}
	ping(t, tm.pods[0].Namespace, "192.168.69.2")
}

// What stays the same in a changed configuration keeps working.
func TestSidecarAppliesAChangedConfiguration(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 2)
	a, b := tm.pods[0], tm.pods[1]
	tm.service(t, "lan")
	said := filepath.Join(a.dir, "hooks")
	config := func(more string) string {
		return "services: [lan]\nhooks:\n  up: [sh, -c, 'echo up >> " + said + "']\n" + more
	}
	a.configure(t, config(""))
	mine := a.settings()
	delete(mine, "KL_SERVICES")
	sc := a.start(t, mine)
	b.start(t, b.settings())
	for _, p := range tm.pods {
		p.awaitRemotes(t, tm.others(p, false)...)
	}
	index := a.index(t)
	one, two := a.host(t), b.host(t)
	crosses(t, one, two, frames.Stream(nil, one.MAC, 9, 1))
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 2))
	there, back := startStream(t, 1, one, two), startStream(t, 2, two, one)
	more := netip.MustParseAddr("198.51.100.77")
	a.configure(t, config("peers: [198.51.100.77]\n"))
	a.awaitRemotes(t, b.ipv4, more)
	a.configure(t, config("log_level: debug\n"))
	a.awaitRemotes(t, b.ipv4)
	sc.awaitLog(t, "level=DEBUG", "198.51.100.77")
	a.configure(t, config("  change: [sh, -c, 'echo $SERVICE $IPS $DELETED $IFACE >> "+said+"']\nready_only: true\n"))
	sc.awaitLog(t, "configuration changed")
	tm.slice(t, "lan-1", "lan", ready(more)...)
	eventually(t, "the change hook to run", func() bool {
		return strings.Contains(fileText(t, said), tm.namespace+"/lan 198.51.100.77 false kubelan\n")
	})
	tm.slice(t, "lan-1", "lan")
	eventually(t, "the change hook to run", func() bool {
		return strings.Contains(fileText(t, said), tm.namespace+"/lan 198.51.100.77 true kubelan\n")
	})

	for _, wrong := range []string{"services: [lan]\nvxlan: {vni: 0}\n", "nonsense: 1\n", "services: [lan"} {
		before := sc.countLog(t, "the old values stay")
		a.configure(t, wrong)
		eventually(t, "the mistake to be logged", func() bool {
			return sc.countLog(t, "the old values stay") == before+1
		})
	}
	sc.awaitLog(t, `vxlan.vni: \"0\" is not a number from 1 to 16777215`)
	a.staysHealthy(t)
	there.expectAll(t)
	back.expectAll(t)
	if now := a.index(t); now != index {
		t.Errorf("the interface has ifindex %d, it had %d", now, index)
	}

	a.configure(t, config("vxlan: {vni: 7000}\n"))
	eventually(t, "another interface", func() bool { now := a.index(t); return now != 0 && now != index })
	a.awaitRemotes(t, b.ipv4)
	b.configure(t, "") // it has no effect: the sidecar was started without a file
	if l := a.link(t, kubelan).(*netlink.Vxlan); l.VxlanId != 7000 {
		t.Errorf("the VNI is %d", l.VxlanId)
	}
	eventually(t, "the up hook to run again", func() bool { return strings.Count(fileText(t, said), "up\n") == 2 })
	a.configure(t, config("vxlan: {vni: 7000, interface: lan0}\n"))
	eventually(t, "the interface to have another name", func() bool {
		return slices.Equal(a.Links(t), []string{"eth1", "lan0"})
	})
	sc.stop(t)
	if links := a.Links(t); !slices.Equal(links, []string{"eth1"}) {
		t.Errorf("%s still has %v", a.Name, links)
	}
}

// fileText returns the content of a file, or nothing if there is no file.
func fileText(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if !os.IsNotExist(err) {
		must(t, err)
	}
	return string(b)
}

func TestSidecarWithStrictPeersDropsNonMembers(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	for family, ipv6 := range map[string]bool{"ipv4": false, "ipv6": true} {
		t.Run(family, func(t *testing.T) {
			t.Parallel()
			tm := s.pods(t, 3)
			nonMember := tm.pods[2]
			tm.pods = tm.pods[:2]
			tm.service(t, "lan")
			sidecars := tm.startAll(t, settings{"KL_IP_FAMILY": family, "KL_STRICT_PEERS": "true"})
			a, b := tm.pods[0], tm.pods[1]
			one, two := a.host(t), b.host(t)
			from, to := nonMember.ipv4, a.ipv4
			if ipv6 {
				from, to = nonMember.ipv6, a.ipv6
			}
			lan := segment.Segment{VXLAN: segment.VXLAN{VNI: 6969, Port: 4789}}
			send := node{Node: nonMember.Node}.sender(t, from, to, lan)
			eventually(t, "packets of non-members to be dropped", func() bool {
				send(nonMemberFrame(1))
				frame, err := next(one.Wire, 100*time.Millisecond)
				return err != nil && frame == nil
			})
			must(t, one.Drain())
			for seq := range uint64(100) {
				send(nonMemberFrame(seq))
			}
			crosses(t, two, one, frames.Stream(one.MAC, two.MAC, 1, 1)) // no frame of the non-member comes before
			sidecars[0].stop(t)
			must(t, node{Node: a.Node}.nft(t, func(c *nftables.Conn) error {
				tables, err := c.ListTables()
				if len(tables) > 0 {
					t.Errorf("the sidecar left the filter %s", tables[0].Name)
				}
				return err
			}))
		})
	}
}

// Two sidecars of a pod keep each other's interface and filter, however one of them ends.
func TestTwoSidecarsInOnePod(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 2)
	tm.service(t, "lan")
	second := settings{
		"KL_VXLAN_INTERFACE": "lan2", "KL_VXLAN_VNI": "6970", "KL_HTTP_ADDRESS": ":8182",
		"KL_VXLAN_ADDRESSES": "192.168.70.{ordinal+1}/24",
	}
	tm.startAll(t, settings{"KL_STRICT_PEERS": "true"})
	var others []*sidecar
	for _, p := range tm.pods {
		others = append(others, p.start(t, p.settings().with(second).with(settings{"KL_STRICT_PEERS": "true"})))
	}
	a, b := tm.pods[0], tm.pods[1]
	reach := func() {
		eventually(t, "the second LAN", func() bool {
			return a.Do(exec.Command("ping", "-c", "1", "-W", "1", "192.168.70.2").Run) == nil
		})
		ping(t, a.Namespace, "192.168.69.2")
		ping(t, b.Namespace, "192.168.70.1")
	}
	reach()
	one, two := a.host(t), b.host(t)
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 1))
	stream := startStream(t, 1, two, one)
	others[0].kill()
	others[0] = a.start(t, a.settings().with(second)) // without strict peers
	reach()
	others[1].stop(t)
	if links := b.Links(t); !slices.Equal(links, []string{"eth1", kubelan}) {
		t.Errorf("%s still has %v", b.Name, links)
	}
	stream.expectAll(t)
	eventually(t, "one filter to be left in each pod", func() bool {
		for _, p := range tm.pods {
			var names []string
			must(t, node{Node: p.Node}.nft(t, func(c *nftables.Conn) error {
				tables, err := c.ListTables()
				for _, table := range tables {
					names = append(names, table.Name)
				}
				return err
			}))
			if !slices.Equal(names, []string{"k8slan-" + kubelan}) {
				return false
			}
		}
		return true
	})
}

func TestRestartedSidecarAdoptsItsInterface(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 2)
	tm.service(t, "lan")
	a, b := tm.pods[0], tm.pods[1]
	ups := filepath.Join(a.dir, "ups")
	hook := settings{"KL_HOOKS_UP": `["sh", "-c", "echo up >> ` + ups + `; ip addr add 10.66.0.1/24 dev $IFACE"]`}
	sc := a.start(t, a.settings().with(hook))
	b.start(t, b.settings())
	a.awaitRemotes(t, b.ipv4)
	b.awaitRemotes(t, a.ipv4)
	a.awaitHealth(t, http.StatusNoContent)
	one, two := a.host(t), b.host(t)
	crosses(t, one, two, frames.Stream(nil, one.MAC, 9, 1))
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 2))
	there, back := startStream(t, 1, one, two), startStream(t, 2, two, one)
	index := a.index(t)
	stale := netip.MustParseAddr("198.51.100.88")
	for range 3 {
		tm.slice(t, "stale", "lan", ready(stale)...)
		a.awaitRemotes(t, b.ipv4, stale)
		sc.kill()
		tm.slice(t, "stale", "lan")
		sc = a.start(t, a.settings().with(hook))
		a.awaitRemotes(t, b.ipv4)
		a.awaitHealth(t, http.StatusNoContent)
	}
	// While the API server is away, the sidecar keeps its remotes and is healthy.
	sc.kill()
	a.relay.close()
	sc = a.start(t, a.settings().with(hook))
	a.awaitHealth(t, http.StatusNoContent)
	a.awaitRemotes(t, b.ipv4)
	there.expectAll(t)
	back.expectAll(t)
	if now := a.index(t); now != index {
		t.Errorf("the interface has ifindex %d, it had %d", now, index)
	}
	if text := fileText(t, ups); text != "up\n" {
		t.Errorf("the up hook has run %q", text)
	}
	a.relay.open(t)
	ping(t, a.Namespace, "192.168.69.2")

	// An interface that does not fit is recreated, and the up hook runs again.
	sc.kill()
	sc = a.start(t, a.settings().with(hook).with(settings{"KL_VXLAN_PORT": "8472"}))
	eventually(t, "another interface", func() bool { now := a.index(t); return now != 0 && now != index })
	a.awaitRemotes(t, b.ipv4)
	a.awaitHealth(t, http.StatusNoContent)
	if text := fileText(t, ups); text != "up\nup\n" {
		t.Errorf("the up hook has run %q", text)
	}
	sc.stop(t)

	// The sidecar was killed while its up hook ran.
	slow := settings{"KL_HOOKS_UP": `["sh", "-c", "echo up >> ` + ups + `; test -e ` + ups + `.done || sleep 60"]`}
	sc = a.start(t, a.settings().with(slow))
	eventually(t, "the up hook to run", func() bool { return fileText(t, ups) == "up\nup\nup\n" })
	if code, body, err := a.get("/health"); err != nil || code != http.StatusInternalServerError {
		t.Errorf("before the hook is done /health answers %d %s, %v", code, body, err)
	}
	if remotes := a.remotes(t); len(remotes) > 0 {
		t.Errorf("before the hook is done there are remotes: %v", remotes)
	}
	sc.kill()
	must(t, os.WriteFile(ups+".done", nil, 0o644))
	sc = a.start(t, a.settings().with(slow))
	a.awaitRemotes(t, b.ipv4)
	if text := fileText(t, ups); text != "up\nup\nup\nup\n" {
		t.Errorf("the up hook has run %q", text)
	}
	sc.stop(t)
}

func TestSidecarKeepsForeignInterfaces(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 1)
	tm.service(t, "lan")
	a := tm.pods[0]
	h := a.Netlink(t)
	t.Run("the name", func(t *testing.T) {
		other := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: kubelan}, PeerName: "peer"}
		must(t, h.LinkAdd(other))
		index := a.index(t)
		sc := a.start(t, a.settings())
		sc.awaitLog(t, "there is an interface kubelan already, a veth; choose another name")
		a.awaitHealth(t, http.StatusInternalServerError, "there is an interface kubelan already")
		if a.index(t) != index || a.link(t, kubelan).Type() != "veth" {
			t.Error("it was changed")
		}
		must(t, h.LinkDel(other))
		a.awaitHealth(t, http.StatusNoContent)
		sc.stop(t)
		must(t, h.LinkAdd(other))
		sc = a.start(t, a.settings())
		sc.awaitLog(t, "choose another name")
		sc.stop(t)
		if l := a.link(t, kubelan); l == nil || l.Type() != "veth" {
			t.Error("it was removed")
		}
		must(t, h.LinkDel(a.link(t, kubelan)))
	})
	t.Run("the VNI", func(t *testing.T) {
		other := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "other"}, VxlanId: 6969, Port: 4789}
		must(t, h.LinkAdd(other))
		sc := a.start(t, a.settings())
		sc.awaitLog(t, "VNI 6969", "UDP port 4789", "in use")
		a.awaitHealth(t, http.StatusInternalServerError, "VNI 6969")
		if n := sc.countLog(t, "level=ERROR"); n != 1 {
			t.Errorf("it logged %d errors:\n%s", n, sc.logText(t))
		}
		must(t, h.LinkDel(other))
		a.awaitHealth(t, http.StatusNoContent)
		sc.stop(t)
	})
}

func TestSidecarRunsHooks(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 1)
	tm.service(t, "lan")
	a := tm.pods[0]
	for what, hook := range map[string]struct {
		command string
		words   []string
	}{
		"fails": {
			`["sh", "-c", "echo no such thing >&2; exit 3"]`, []string{"hook up", "exit status 3", "no such thing"},
		},
		"hangs":        {`["sh", "-c", "sleep 600 & sleep 600"]`, []string{"hook up", "took longer than 1s"}},
		"is not there": {`["/no/such/program"]`, []string{"hook up", "/no/such/program"}},
	} {
		t.Run("up "+what, func(t *testing.T) {
			sc := a.start(t, a.settings().with(settings{"KL_HOOKS_UP": hook.command, "KL_HOOKS_TIMEOUT": "1s"}))
			sc.expectFailure(t, hook.words...)
			if links := a.Links(t); !slices.Equal(links, []string{"eth1"}) {
				t.Errorf("%s still has %v", a.Name, links)
			}
		})
		t.Run("change "+what, func(t *testing.T) {
			sc := a.start(t, a.settings().with(settings{
				"KL_HOOKS_CHANGE": hook.command, "KL_HOOKS_TIMEOUT": "1s", "KL_PEERS": "198.51.100.9",
			}))
			peer := netip.MustParseAddr("198.51.100.5")
			a.awaitRemotes(t, netip.MustParseAddr("198.51.100.9"))
			tm.slice(t, "more", "lan", ready(peer)...)
			words := slices.Clone(hook.words)
			words[0] = "hook change"
			sc.awaitLog(t, words...)
			a.awaitRemotes(t, netip.MustParseAddr("198.51.100.9"), peer)
			a.awaitHealth(t, http.StatusNoContent)
			tm.slice(t, "more", "lan")
			a.awaitRemotes(t, netip.MustParseAddr("198.51.100.9"))
			sc.stop(t)
		})
	}
}

func TestSidecarReportsWrongConfigurations(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 1)
	a := tm.pods[0]
	for what, wrong := range map[string]struct {
		file  string
		env   settings
		words []string
	}{
		"unknown key": {
			"services: [lan]\nvxlan: {vnii: 3}", nil, []string{"kubelan.yaml", "vxlan.vnii: unknown key"},
		},
		"no YAML":          {"services: [lan", nil, []string{"kubelan.yaml", "is not YAML"}},
		"bad address":      {"", settings{"KL_IP": "198.51.1"}, []string{`ip: "198.51.1" is not an IP address`}},
		"another address":  {"", settings{"KL_IP": "198.51.100.9"}, nil},
		"bad service name": {"", settings{"KL_SERVICES": "a/b/c"}, []string{"services:", `"a/b/c"`}},
		"no services":      {"", settings{"KL_SERVICES": ""}, []string{"services: there are none"}},
		"VNI out of range": {
			"",
			settings{"KL_VXLAN_VNI": "16777216"},
			[]string{`vxlan.vni: "16777216" is not a number from 1 to 16777215`},
		},
		"port out of range": {"", settings{"KL_VXLAN_PORT": "0"}, []string{"vxlan.port:"}},
		"MTU out of range":  {"", settings{"KL_VXLAN_MTU": "12"}, []string{"vxlan.mtu:"}},
		"interface name":    {"", settings{"KL_VXLAN_INTERFACE": "much-too-long-a-name"}, []string{"vxlan.interface:"}},
		"log level":         {"", settings{"KL_LOG_LEVEL": "loud"}, []string{"log_level:", "loud"}},
		"http address":      {"", settings{"KL_HTTP_ADDRESS": "here"}, []string{"http_address:", "here"}},
		"address in use": {
			"",
			settings{"KL_HTTP_ADDRESS": s.serverAddress()},
			[]string{"http_address", "address already in use"},
		},
		"no ordinal":    {"", settings{"KL_POD": "web"}, []string{"vxlan.addresses:", `"web"`}},
		"no API server": {"", settings{"KUBECONFIG": ""}, []string{"find the API server"}},
		"kubeconfig":    {"", settings{"KUBECONFIG": "/no/such/file"}, []string{"/no/such/file"}},
	} {
		t.Run(what, func(t *testing.T) {
			if wrong.file != "" {
				a.configure(t, wrong.file)
				defer os.Remove(a.configFile())
			}
			sc := a.start(t, a.settings().with(wrong.env))
			if wrong.words == nil { // the pod may get the address later: the sidecar tries again
				sc.awaitLog(t, "no interface of the pod has the address 198.51.100.9")
				a.awaitHealth(t, http.StatusInternalServerError, "198.51.100.9")
				sc.stop(t)
				return
			}
			sc.expectFailure(t, wrong.words...)
			if links := a.Links(t); !slices.Equal(links, []string{"eth1"}) {
				t.Errorf("%s still has %v", a.Name, links)
			}
		})
	}
	t.Run("missing file", func(t *testing.T) {
		a.start(t, a.settings(), "--config=/no/such/file").expectFailure(t, "/no/such/file")
	})
	t.Run("file without rights", func(t *testing.T) {
		a.start(t, a.settings(), "--config=/").expectFailure(t, "read the configuration", "/")
	})
}

// outage is how long the API server is away: meanwhile the sidecar tries seven times to reach it.
const outage = 6 * time.Second

// A sidecar waits for the API server at its start, and keeps its remotes while the API server is away.
func TestSidecarWithoutAPIServer(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 2)
	tm.service(t, "lan")
	a, b := tm.pods[0], tm.pods[1]
	a.relay.close()
	sc := a.start(t, a.settings())
	b.start(t, b.settings())
	sc.awaitLog(t, "level=ERROR", "watch the EndpointSlices, trying again", "connection refused")
	a.awaitHealth(t, http.StatusInternalServerError, "connection refused")
	if a.index(t) == 0 {
		t.Error("there is no interface")
	}
	a.relay.open(t)
	a.awaitRemotes(t, b.ipv4)
	b.awaitRemotes(t, a.ipv4)
	a.awaitHealth(t, http.StatusNoContent)
	one, two := a.host(t), b.host(t)
	crosses(t, one, two, frames.Stream(nil, one.MAC, 9, 1))
	crosses(t, two, one, frames.Stream(nil, two.MAC, 9, 2))
	there, back := startStream(t, 1, one, two), startStream(t, 2, two, one)
	updates := tables(t, a.Namespace)
	a.relay.close()
	b.relay.close()
	come := netip.MustParseAddr("198.51.100.5")
	tm.slice(t, "more", "lan", ready(come)...)
	<-time.After(outage)
	there.expectAll(t)
	back.expectAll(t)
	a.staysHealthy(t)
	if lines := sc.countLog(t, "level=ERROR"); lines > 3 {
		t.Errorf("it logged %d errors:\n%s", lines, sc.logText(t))
	}
	a.relay.open(t)
	expectEntries(t, updates, remoteEvent{unix.RTM_NEWNEIGH, come})
	sc.awaitLog(t, "the API server sends endpoints again")
}

// A sidecar without rights to EndpointSlices logs what to do, and continues once it has the rights.
func TestSidecarWithoutRightsToEndpointSlices(t *testing.T) {
	t.Parallel()
	s := startSidecars(t)
	tm := s.pods(t, 1)
	a := tm.pods[0]
	tm.slice(t, "lan-1", "lan", ready(netip.MustParseAddr("198.51.100.5"))...)
	sc := a.start(t, a.settings().with(settings{"KUBECONFIG": tm.account(t, "poor")}))
	sc.awaitLog(t, "level=ERROR", "needs a Role with list and watch of endpointslices", tm.namespace)
	a.awaitHealth(t, http.StatusInternalServerError, "needs a Role with list and watch of endpointslices")
	tm.allow(t, "poor", rbacv1.PolicyRule{
		APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"},
		Verbs: []string{"list", "watch"},
	})
	a.awaitHealth(t, http.StatusNoContent)
	a.awaitRemotes(t, netip.MustParseAddr("198.51.100.5"))
}

// A sidecar warns after half a minute in which it sent frames and none arrived.
func TestSidecarWarnsWhenNoFramesArrive(t *testing.T) {
	t.Parallel()
	tm := startSidecars(t).pods(t, 2)
	a, b := tm.pods[0], tm.pods[1]
	unanswered := a.start(t, a.settings().with(settings{"KL_SERVICES": "", "KL_PEERS": b.ipv4.String()}))
	other := b.start(t, b.settings().with(settings{
		"KL_SERVICES": "", "KL_PEERS": a.ipv4.String(), "KL_VXLAN_VNI": "6970",
	}))
	a.awaitHealth(t, http.StatusNoContent)
	b.awaitHealth(t, http.StatusNoContent)
	from := a.host(t)
	eventuallyWithin(t, 2*daemonTimeout, "the warning", func() bool {
		if err := from.Send(frames.Stream(nil, from.MAC, 1, 1)); err != nil {
			t.Error(err)
		}
		return unanswered.countLog(t, "level=WARN", "frames are sent, but none has arrived yet",
			"NetworkPolicy", "port=4789", "vni=6969") == 1
	})
	a.staysHealthy(t)
	if said := other.logText(t); strings.Contains(said, "level=WARN") { // it sends nothing
		t.Errorf("the other sidecar logged\n%s", said)
	}
	other.stop(t)
	b.start(t, b.settings().with(settings{"KL_SERVICES": "", "KL_PEERS": a.ipv4.String()}))
	b.awaitHealth(t, http.StatusNoContent)
	crosses(t, b.host(t), from, frames.Stream(nil, b.link(t, kubelan).Attrs().HardwareAddr, 1, 2))
	unanswered.awaitLog(t, "level=INFO", "frames arrive")
}
