package bench

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink/nl"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// This file has the floor: the same links, made by as few netlink messages as the kernel needs, over open sockets, with
// everything known that k8slan has to find out or decide.

// socket is a netlink socket in a namespace.
type socket struct{ handles map[int]*nl.SocketHandle }

// open opens a socket in the namespace bound to path, and returns the namespace's handle, too.
func open(path string) (socket, vnetns.NsHandle, error) {
	ns, err := vnetns.GetFromPath(path)
	if err != nil {
		return socket{}, ns, err
	}
	s, err := nl.GetNetlinkSocketAt(ns, vnetns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return socket{}, ns, err
	}
	return socket{map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}}, ns, nil
}

func (s socket) close() {
	for _, h := range s.handles {
		h.Close()
	}
}

// send sends a message and waits for the kernel's answer.
func (s socket) send(r *nl.NetlinkRequest) error {
	r.Sockets = s.handles
	_, err := r.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func text(kind int, s string) *nl.RtAttr   { return nl.NewRtAttr(kind, nl.ZeroTerminated(s)) }
func number(kind int, n uint32) *nl.RtAttr { return nl.NewRtAttr(kind, nl.Uint32Attr(n)) }

// message is a message about the link with a name; up is +1 to set it up, -1 to set it down, 0 for neither.
func message(kind, flags int, name string, up int, attrs ...*nl.RtAttr) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(kind, unix.NLM_F_ACK|flags)
	r.AddData(header(up))
	r.AddData(text(unix.IFLA_IFNAME, name))
	for _, a := range attrs {
		r.AddData(a)
	}
	return r
}

func header(up int) *nl.IfInfomsg {
	h := nl.NewIfInfomsg(unix.AF_UNSPEC)
	if up != 0 {
		h.Change = unix.IFF_UP
	}
	if up > 0 {
		h.Flags = unix.IFF_UP
	}
	return h
}

func create(name string, up int, attrs ...*nl.RtAttr) *nl.NetlinkRequest {
	return message(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, name, up, attrs...)
}

func set(name string, up int, attrs ...*nl.RtAttr) *nl.NetlinkRequest {
	return message(unix.RTM_NEWLINK, 0, name, up, attrs...)
}

// info is the data of one kind of link.
func info(kind string, attrs ...*nl.RtAttr) *nl.RtAttr {
	i := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	i.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated(kind))
	data := i.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	for _, a := range attrs {
		data.AddChild(a)
	}
	return i
}

// portMask is the mask of a bridge's port that forwards link-local frames.
func portMask() *nl.RtAttr {
	i := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	i.AddRtAttr(nl.IFLA_INFO_SLAVE_KIND, nl.NonZeroTerminated("bridge"))
	data := i.AddRtAttr(nl.IFLA_INFO_SLAVE_DATA, nil)
	data.AddRtAttr(nl.IFLA_BRPORT_GROUP_FWD_MASK, nl.Uint16Attr(segment.ForwardMask))
	return i
}

// veth is the data of a veth with that peer.
func veth(peer string, mac net.HardwareAddr, mtu int, more ...*nl.RtAttr) *nl.RtAttr {
	data := nl.NewRtAttr(nl.VETH_INFO_PEER, header(0).Serialize())
	more = append(more, text(unix.IFLA_IFNAME, peer), nl.NewRtAttr(unix.IFLA_ADDRESS, mac),
		number(unix.IFLA_MTU, uint32(mtu)))
	for _, a := range more {
		data.AddChild(a)
	}
	return info("veth", data)
}

// altName is a message that adds a name to a link or removes it.
func altName(kind int, link, name string) *nl.NetlinkRequest {
	list := nl.NewRtAttr(unix.IFLA_PROP_LIST|unix.NLA_F_NESTED, nil)
	list.AddChild(text(unix.IFLA_ALT_IFNAME, name))
	return message(kind, 0, link, 0, list)
}

// bareAttach is the messages that attach one pod.
type bareAttach struct {
	lan, pod socket
	inLAN    []*nl.NetlinkRequest
	inPod    *nl.NetlinkRequest
}

func newBareAttach(t *testing.T, n node, s segment.Segment, r kernel.ClaimRequest) bareAttach {
	t.Helper()
	lan, ns, err := open(filepath.Join(n.Run, "netns", s.Netns))
	must(t, err)
	ns.Close()
	pod, podNS, err := open(r.PodNetns)
	must(t, err)
	t.Cleanup(func() {
		lan.close()
		pod.close()
		podNS.Close()
	})
	have, err := n.kernel.Observe(t.Context(), s.Netns)
	must(t, err)
	bridge, _ := have.Link(s.Bridge)
	port, id := segment.PortName(r.Spoke), r.ID()
	alias := segment.Claim{ID: id, Kind: r.Kind, Spoke: r.Spoke, Sandbox: r.Sandbox, Interface: r.Interface}.Alias()
	return bareAttach{
		lan: lan, pod: pod,
		inLAN: []*nl.NetlinkRequest{
			create(id, 1, number(unix.IFLA_MTU, uint32(s.MTU)), number(unix.IFLA_GROUP, segment.LinkGroup),
				number(unix.IFLA_MASTER, uint32(bridge.Index)),
				veth(r.Interface, segment.MAC(s.LAN, r.Spoke), s.MTU, number(unix.IFLA_NET_NS_FD, uint32(podNS)))),
			set(id, 0, text(unix.IFLA_IFALIAS, alias), portMask()),
			altName(unix.RTM_DELLINKPROP, port, r.Spoke),
			altName(unix.RTM_NEWLINKPROP, id, r.Spoke),
			set(port, -1),
		},
		inPod: set(r.Interface, 1),
	}
}

func (a bareAttach) attach() error {
	for i, m := range a.inLAN {
		if err := a.lan.send(m); err != nil {
			return fmt.Errorf("message %d: %w", i, err)
		}
	}
	return a.pod.send(a.inPod)
}

// bareLAN makes a LAN's namespace and, by bare messages, its links; host is a socket in the node's own namespace.
func bareLAN(host socket, s segment.Segment, path string) error {
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		return err
	}
	if err := bareNetns(path); err != nil {
		return err
	}
	lan, ns, err := open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	defer lan.close()
	const bridge = 2 // the ifindex of the first link in a namespace
	master, mtu := number(unix.IFLA_MASTER, bridge), number(unix.IFLA_MTU, uint32(s.MTU))
	snooping := nl.NewRtAttr(nl.IFLA_BR_MCAST_SNOOPING, nl.Uint8Attr(0))
	err = lan.send(create(s.Bridge, 1, mtu, info("bridge", snooping)))
	if err == nil {
		group := s.VXLAN.Group.As16()
		port := nl.NewRtAttr(nl.IFLA_VXLAN_PORT, []byte{byte(s.VXLAN.Port >> 8), byte(s.VXLAN.Port)})
		err = host.send(create(s.VXLAN.Name, 0, mtu, number(unix.IFLA_NET_NS_FD, uint32(ns)),
			info("vxlan", number(nl.IFLA_VXLAN_ID, s.VXLAN.VNI), nl.NewRtAttr(nl.IFLA_VXLAN_GROUP6, group[:]),
				number(nl.IFLA_VXLAN_LINK, uint32(s.VXLAN.UnderlayIndex)), port,
				nl.NewRtAttr(nl.IFLA_VXLAN_LEARNING, nl.Uint8Attr(1)))))
	}
	if err == nil {
		err = lan.send(set(s.VXLAN.Name, 0, master))
	}
	if err == nil {
		err = lan.send(set(s.VXLAN.Name, 0, portMask()))
	}
	for _, spoke := range s.Spokes {
		port, plug := segment.PortName(spoke), segment.PlugName(spoke)
		for _, m := range []*nl.NetlinkRequest{
			create(port, 1, number(unix.IFLA_MTU, uint32(segment.PortMTU(s.MTU))),
				number(unix.IFLA_GROUP, segment.LinkGroup), master,
				veth(plug, segment.MAC(s.LAN, spoke), s.MTU)),
			set(port, 0, portMask()),
			set(plug, 1),
			altName(unix.RTM_NEWLINKPROP, port, spoke),
		} {
			if err == nil {
				err = lan.send(m)
			}
		}
	}
	return err
}

// bareNetns makes a namespace at an existing file, with IPv6 off.
func bareNetns(path string) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // it is not unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		for _, setting := range []string{"all", "default"} {
			if err == nil {
				err = os.WriteFile("/proc/sys/net/ipv6/conf/"+setting+"/disable_ipv6", []byte("1"), 0)
			}
		}
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		}
		done <- err
	}()
	return <-done
}
