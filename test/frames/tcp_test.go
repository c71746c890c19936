package frames_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// callLinux sends by Linux's own TCP, on a, to a responder on b, and returns what the responder counted.
func callLinux(t *testing.T, ns netlab.Namespace, address string) (frames.Received, error) {
	t.Helper()
	r, s := receiver(t, ns, "b"), sender(t, ns, "b")
	responder := frames.Responder{
		MAC: s.Interface.HardwareAddr, MTU: s.Interface.MTU, Addresses: []netip.Addr{netip.MustParseAddr(address)},
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { // it ends with ctx
		done <- func() error {
			for responder.Received().Closed == 0 {
				frame, err := r.Receive(ctx)
				if err != nil {
					return err
				}
				for _, answer := range responder.Answer(frame) {
					if err := s.Send(answer); err != nil {
						return err
					}
				}
			}
			return nil
		}()
	}()
	err := ns.Do(func() error {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(address, "179"), 2*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := conn.Write(make([]byte, 1_000_000)); err != nil {
			return err
		}
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, conn)
		return err
	})
	if err != nil {
		cancel()
	}
	if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	cancel()
	return responder.Received(), err
}

// callingPair is a pair whose end a has addresses, and finishes checksums or leaves them to hardware.
func callingPair(t *testing.T, finished bool) netlab.Namespace {
	t.Helper()
	ns := pair(t)
	ns.Sysctl(t, "net/ipv6/conf/a/disable_ipv6", "0")
	h := ns.Netlink(t)
	a, err := h.LinkByName("a")
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"192.0.2.1/24", "2001:db8::1/64"} {
		addr, err := netlink.ParseAddr(address)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := h.AddrAdd(a, addr); err != nil {
			t.Fatal(err)
		}
	}
	if finished {
		err := ns.Do(func() error {
			e, err := ethtool.NewEthtool()
			if err != nil {
				return err
			}
			defer e.Close()
			return e.Change("a", map[string]bool{
				"tx-checksum-ip-generic": false, "tx-tcp-segmentation": false, "tx-tcp6-segmentation": false,
			})
		})
		if err != nil {
			t.Fatal("switch checksum offload off: ", err)
		}
	}
	return ns
}

func TestLinuxCannotCallAResponderUntilItFinishesChecksums(t *testing.T) {
	for _, address := range []string{"192.0.2.9", "2001:db8::9"} {
		received, err := callLinux(t, callingPair(t, false), address)
		if err == nil || received.Opened > 0 || received.Bad == 0 {
			t.Errorf("without checksums the responder at %s received %+v (%v), want bad segments and no connection",
				address, received, err)
		}
		received, err = callLinux(t, callingPair(t, true), address)
		bad := received.Bad + received.TooLarge
		if err != nil || received.Bytes != 1_000_000 || received.Opened != 1 || received.Closed != 1 || bad > 0 {
			t.Errorf("with checksums the responder at %s received %+v (%v), want one connection with 1000000 bytes",
				address, received, err)
		}
	}
}
