package dataplane

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/k8slan/k8slan/build/debian"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/netlab"
)

// installRouters installs other BGP routers from Debian, as root and before the tests have a network of their own.
func installRouters() error {
	if os.Geteuid() != 0 || netlab.Inside() {
		return nil
	}
	return debian.Install(context.Background(), slog.Default(), "frr", "gobgpd")
}

// program is a process of another project that can be killed and started again.
type program struct {
	args   []string
	output bytes.Buffer
	kill   func() // by SIGKILL
	term   func() // by SIGTERM
}

func start(t *testing.T, args ...string) *program {
	t.Helper()
	p := &program{args: args}
	p.start(t)
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("the output of %s:\n%s", strings.Join(p.args, " "), p.output.Bytes())
		}
	})
	return p
}

func (p *program) start(t *testing.T) {
	t.Helper()
	cmd := exec.Command(p.args[0], p.args[1:]...)
	cmd.Stdout, cmd.Stderr = &p.output, &p.output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		// The process ends with the thread that started it (PR_SET_PDEATHSIG in prctl(2)), so no other goroutine may
		// use that thread.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if started <- err; err == nil {
			_ = cmd.Wait() // the process is killed
		}
	}()
	must(t, <-started)
	end := func(s os.Signal) {
		if err := cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("%s to %v: %v", s, p.args, err)
		}
		<-ended
	}
	p.kill, p.term = func() { end(syscall.SIGKILL) }, func() { end(syscall.SIGTERM) }
}

// speakerNet is the network over which speakers reach one FRR. It is not the underlay: speakers are in the namespace of
// all tests, so each FRR has a network of its own.
type speakerNet byte

var speakerNets atomic.Uint32 // how many there are

func newSpeakerNet() speakerNet { return speakerNet(speakerNets.Add(1)) }

func (n speakerNet) address(host byte) netip.Addr {
	return netip.AddrFrom4([4]byte{198, 18, byte(n), host})
}
func (n speakerNet) prefix() netip.Prefix { return netip.PrefixFrom(n.address(0), 24) }
func (n speakerNet) frr() netip.Addr      { return n.address(254) }
func (n speakerNet) speaker(number byte) netip.Addr {
	return n.address(number)
}

// frr is Debian's FRR on a node of its own, with its part of a LAN.
type frr struct {
	node
	dir         string
	as          uint32
	speakers    speakerNet
	at          netip.Addr // where speakers reach it
	zebra, bgpd *program
	vtep        netip.Addr
}

// These are the roles of FRR; its configuration is that of docs/evpn.md.
const (
	asVTEP      = "  advertise-all-vni\n"
	asReflector = "  neighbor nodes route-reflector-client\n"
)

// startFRR starts FRR on a node beside others; role is one of the above, or both.
func startFRR(t *testing.T, beside node, role string) *frr {
	t.Helper()
	return startFRRWith(t, beside, frrConfig{as: 65000, peerAS: 65000, role: role})
}

// frrConfig is what differs between the tests in FRR's configuration.
type frrConfig struct {
	as, peerAS   uint32 // FRR's own, and that of the nodes
	nodes        string // more lines about the nodes
	role         string // see above
	behindRouter bool   // there is a router between FRR and the speakers
}

func startFRRWith(t *testing.T, beside node, c frrConfig) *frr {
	t.Helper()
	netlab.NeedRoot(t, "FRR needs its own user and group")
	dir, err := os.MkdirTemp("/run", "frr-") // the path is short because FRR binds sockets in it
	must(t, err)
	r := &frr{
		node: addNode(t, beside.underlay, "frr"), dir: dir, as: c.as, speakers: newSpeakerNet(),
		vtep: netip.MustParseAddr("192.0.2.3"),
	}
	r.addUnderlayAddress(t, netip.PrefixFrom(r.vtep, families["IPv4"].bits))
	r.at = r.speakers.frr()
	if c.behindRouter {
		r.placeBehindRouter(t)
	} else {
		r.speakers.connect(t, r.node)
	}
	config := filepath.Join(r.dir, "bgpd.conf")
	must(t, os.WriteFile(config, fmt.Appendf(nil, `router bgp %d
 bgp router-id %s
 no bgp default ipv4-unicast
 timers bgp 3 9
 neighbor nodes peer-group
 neighbor nodes remote-as %d
%s bgp listen range %s peer-group nodes
 address-family l2vpn evpn
  neighbor nodes activate
%s exit-address-family
`, c.as, r.vtep, c.peerAS, c.nodes, r.speakers.prefix(), c.role), 0o600))
	none := filepath.Join(r.dir, "zebra.conf")
	must(t, os.WriteFile(none, nil, 0o600))
	must(t, ownedBy("frr", r.dir, config, none))
	// FRR's daemons change their user, which clears PR_SET_PDEATHSIG; a PID namespace ends them with the test. They
	// write logs to /var/tmp.
	daemon := func(name, config string, more ...string) *program {
		return start(t, append([]string{
			"nsenter", "--net=" + r.Path, "--", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--",
			"sh", "-c", `mount -t tmpfs none /var/tmp && { "$@" & wait; }`, "sh",
			"/usr/lib/frr/" + name, "-A", "127.0.0.1", "-P", "0",
			"-f", config, "--vty_socket", r.dir, "-z", filepath.Join(r.dir, "zserv"),
			"-i", filepath.Join(r.dir, name+".pid"), "--log", "stdout",
		}, more...)...)
	}
	r.zebra = daemon("zebra", none)
	r.awaitVTY(t, "zebra")
	r.bgpd = daemon("bgpd", config)
	r.awaitVTY(t, "bgpd")
	return r
}

// ownedBy makes a user the owner of files.
func ownedBy(name string, files ...string) error {
	u, err := user.Lookup(name)
	if err != nil {
		return err
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := os.Chown(file, uid, -1); err != nil {
			return err
		}
	}
	return nil
}

// awaitVTY waits until one of FRR's daemons accepts commands.
func (r *frr) awaitVTY(t *testing.T, daemon string) {
	t.Helper()
	eventually(t, daemon+" to take commands", func() bool {
		c, err := net.Dial("unix", filepath.Join(r.dir, daemon+".vty"))
		if err != nil {
			return false
		}
		c.Close()
		return true
	})
}

// placeBehindRouter makes speakers reach FRR by a router that is beside it in the underlay.
func (r *frr) placeBehindRouter(t *testing.T) {
	t.Helper()
	hop, address := addNode(t, r.underlay, "hop"), netip.MustParseAddr("192.0.2.9")
	hop.addUnderlayAddress(t, netip.PrefixFrom(address, families["IPv4"].bits))
	hop.Sysctl(t, "net/ipv4/ip_forward", "1")
	r.speakers.connect(t, hop)
	r.at = r.vtep
	must(t, r.Netlink(t).RouteAdd(route(r.speakers.prefix(), address)))
	far := route(netip.PrefixFrom(r.at, r.at.BitLen()), r.speakers.frr())
	must(t, netlink.RouteAdd(far)) // it is removed with its link
}

func route(to netip.Prefix, by netip.Addr) *netlink.Route {
	to = to.Masked()
	dst := &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())}
	return &netlink.Route{Dst: dst, Gw: by.AsSlice()}
}

// connect lays a cable between a node and the namespace of all tests, with addresses for the speakers.
func (n speakerNet) connect(t *testing.T, h node) {
	t.Helper()
	there, err := os.Open(h.Path)
	must(t, err)
	defer there.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = fmt.Sprintf("speakers%d", n)
	cable := &netlink.Veth{LinkAttrs: attrs, PeerName: "mgmt", PeerNamespace: netlink.NsFd(int(there.Fd()))}
	must(t, netlink.LinkAdd(cable))
	t.Cleanup(func() { must(t, netlink.LinkDel(cable)) })
	for i := range byte(4) {
		must(t, netlink.AddrAdd(cable, addressOf(t, n.speaker(1+i), n.prefix().Bits())))
	}
	must(t, netlink.LinkSetUp(cable))
	nl := h.Netlink(t)
	mgmt, err := nl.LinkByName("mgmt")
	must(t, err)
	must(t, nl.AddrAdd(mgmt, addressOf(t, n.frr(), n.prefix().Bits())))
	must(t, nl.LinkSetUp(mgmt))
}

func addressOf(t *testing.T, a netip.Addr, bits int) *netlink.Addr {
	t.Helper()
	addr, err := netlink.ParseAddr(netip.PrefixFrom(a, bits).String())
	must(t, err)
	return addr
}

// peer is FRR as the speaker with that number connects to it.
func (r *frr) peer(n byte) bgp.Peer {
	return bgp.Peer{Address: r.at, AS: r.as, Source: r.speakers.speaker(n)}
}

// attach makes FRR's part of the LAN, as docs/evpn.md shows it, and a host on it.
func (r *frr) attach(t *testing.T, s segment.Segment) *host {
	t.Helper()
	r.Sysctl(t, "net/ipv6/conf/default/disable_ipv6", "1")
	st := &host{Namespace: netlab.NewPod(t)}
	pod, err := os.Open(st.Path)
	must(t, err)
	defer pod.Close()
	h := r.Netlink(t)
	named := func(name string) netlink.LinkAttrs {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = name, s.MTU
		return attrs
	}
	snooping := false
	bridge := &netlink.Bridge{LinkAttrs: named("br"), MulticastSnooping: &snooping}
	must(t, h.LinkAdd(bridge))
	vxlan := &netlink.Vxlan{
		LinkAttrs: named("vx"), VxlanId: int(s.VXLAN.VNI), Port: int(s.VXLAN.Port), SrcAddr: r.vtep.AsSlice(),
	}
	vxlan.MasterIndex = bridge.Index
	must(t, h.LinkAdd(vxlan))
	must(t, h.LinkSetLearning(vxlan, false))
	must(t, h.LinkSetBrNeighSuppress(vxlan, true))
	port := &netlink.Veth{LinkAttrs: named("port"), PeerName: ifname, PeerNamespace: netlink.NsFd(int(pod.Fd()))}
	port.MasterIndex = bridge.Index
	must(t, h.LinkAdd(port))
	for _, link := range []netlink.Link{bridge, vxlan, port} {
		must(t, h.LinkSetUp(link))
	}
	ph := st.Netlink(t)
	inside, err := ph.LinkByName(ifname)
	must(t, err)
	must(t, ph.LinkSetMTU(inside, s.MTU))
	must(t, ph.LinkSetUp(inside))
	st.Attachment = kernel.Attachment{MAC: inside.Attrs().HardwareAddr, MTU: s.MTU}
	st.AwaitCarrier(t, ifname)
	r.AwaitCarrier(t, "port")
	st.Wire = st.Open(t, ifname)
	return st
}

// logState logs FRR's state if the test has failed.
func (r *frr) logState(t *testing.T) {
	if t.Failed() {
		for _, command := range []string{
			"show bgp l2vpn evpn summary", "show bgp l2vpn evpn", "show evpn mac vni all",
		} {
			t.Logf("%s\n%s", command, r.show(t, command))
		}
	}
}

// show returns the output of a command.
func (r *frr) show(t *testing.T, command string) string {
	t.Helper()
	return r.vtysh(t, command)
}

// vtysh runs commands of FRR's shell one after the other.
func (r *frr) vtysh(t *testing.T, commands ...string) string {
	t.Helper()
	args := []string{"--vty_socket", r.dir}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := exec.Command("vtysh", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("vtysh, %q: %v\n%s", commands, err, out)
	}
	return string(out)
}

// awaitOutput waits until the output of a command has all these words, and returns the output.
func (r *frr) awaitOutput(t *testing.T, command string, words ...string) (answer string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%q in %q", words, command), func() bool {
		answer = r.show(t, command)
		return hasAll(answer, words...)
	})
	return answer
}

func hasAll(text string, words ...string) bool {
	for _, w := range words {
		if !strings.Contains(text, w) {
			return false
		}
	}
	return true
}

// startGoBGP starts Debian's gobgpd as a reflector; its configuration is what docs/evpn.md shows.
func startGoBGP(t *testing.T) (*program, netip.AddrPort) {
	t.Helper()
	if _, err := exec.LookPath("gobgpd"); err != nil {
		netlab.NeedRoot(t, "gobgpd is not there, and installing it needs root")
	}
	at, api := freePort(), freePort()
	config := filepath.Join(t.TempDir(), "gobgpd.toml")
	must(t, os.WriteFile(config, fmt.Appendf(nil, `[global.config]
as = 65000
router-id = "127.0.0.1"
port = %d
local-address-list = ["127.0.0.1"]
[[peer-groups]]
[peer-groups.config]
peer-group-name = "nodes"
peer-as = 65000
[peer-groups.timers.config]
hold-time = 9
keepalive-interval = 3
[peer-groups.transport.config]
passive-mode = true
[peer-groups.route-reflector.config]
route-reflector-client = true
route-reflector-cluster-id = "127.0.0.1"
[peer-groups.graceful-restart.config]
enabled = true
restart-time = 120
[[peer-groups.afi-safis]]
[peer-groups.afi-safis.config]
afi-safi-name = "l2vpn-evpn"
[peer-groups.afi-safis.mp-graceful-restart.config]
enabled = true
[[dynamic-neighbors]]
[dynamic-neighbors.config]
prefix = "127.0.0.0/8"
peer-group = "nodes"
`, at.Port()), 0o600))
	return start(t, "gobgpd", "-f", config, "-t", "toml", "--api-hosts", api.String(), "--pprof-disable"), at
}

// lastPort counts the ports that freePort returned, which are below those that the kernel chooses.
var lastPort atomic.Uint32

// freePort returns an address of the loopback device and a port that no other test uses.
func freePort() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(20000+lastPort.Add(1)))
}
