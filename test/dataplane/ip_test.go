package dataplane

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/netlab"
)

func TestTCPBetweenNodes(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	s := lan("ip", 111, "one", "two", "three")
	a.reconcile(t, a.withUnderlay(t, s))
	b.reconcile(t, b.withUnderlay(t, s))
	one, two := a.claim(t, s, "one", segment.Veth), b.claim(t, s, "two", segment.Veth)
	three := b.claim(t, s, "three", segment.Veth)
	must(t, a.setPodAddresses(t, one, "10.77.0.1/24", "fd77::1/64"))
	must(t, b.setPodAddresses(t, two, "10.77.0.2/24", "fd77::2/64"))
	for _, address := range []string{"10.77.0.2", "fd77::2"} {
		t.Run(address, func(t *testing.T) { expectTCP(t, one, two, address) })
	}
	// Duplicate address detection asks on both nodes and gets the answer.
	if err := b.setPodAddresses(t, three, "fd77::1/64"); err == nil {
		t.Error("a pod got an address that a pod on the other node has")
	}
}

func (n node) setPodAddresses(t *testing.T, h *host, prefixes ...string) error {
	t.Helper()
	var want kernel.Addressing
	for _, p := range prefixes {
		want.Addresses = append(want.Addresses, netip.MustParsePrefix(p))
	}
	return n.kernel.SetAddresses(t.Context(), h.Path, ifname, want)
}

// expectTCP sends a megabyte from one pod to the other and expects the same megabyte back.
func expectTCP(t *testing.T, from, to *host, address string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*frameTimeout)
	defer cancel()
	var listener net.Listener
	must(t, to.Do(func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(address, "0"))
		return err
	}))
	defer listener.Close()
	echoed := make(chan error, 1)
	go func() { echoed <- echo(listener) }()
	var conn net.Conn
	must(t, from.Do(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, "tcp", listener.Addr().String())
		return err
	}))
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	must(t, conn.SetDeadline(deadline))
	sent, got := make([]byte, 1<<20), make([]byte, 1<<20)
	_, _ = rand.Read(sent) // it never fails
	wrote := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		wrote <- err
	}()
	_, err := io.ReadFull(conn, got)
	must(t, errors.Join(err, <-wrote))
	if !bytes.Equal(got, sent) {
		t.Error("the other pod sent back other bytes")
	}
	conn.Close()
	must(t, <-echoed)
}

// echo accepts one connection and sends back what comes in.
func echo(listener net.Listener) error {
	conn, err := listener.Accept()
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = io.Copy(conn, conn)
	return err
}

// An underlay with IPv4 only needs a group of that family; the overhead is 20 bytes smaller.
func TestIPv4GroupCarriesEveryFrame(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	s := lan("four", 112, "one", "two")
	s.VXLAN.Group, s.MTU = netip.MustParseAddr("239.77.0.14"), underlayMTU-58
	for i, h := range []node{a, b} {
		h.Sysctl(t, "net/ipv6/conf/all/disable_ipv6", "1")
		device, err := h.Netlink(t).LinkByName(netlab.UnderlayDevice)
		must(t, err)
		addr, err := netlink.ParseAddr(fmt.Sprintf("192.0.2.%d/24", i+1))
		must(t, err)
		must(t, h.Netlink(t).AddrAdd(device, addr))
		h.reconcile(t, h.withUnderlay(t, s))
	}
	one, two := a.attach(t, s, "one", segment.Veth), b.attach(t, s, "two", segment.Veth)
	catalogCrosses(t, one, two)
	catalogCrosses(t, two, one)
	vm := b.attach(t, s, "two", segment.Macvtap)
	doubleTaggedCrosses(t, vm, one)
}
