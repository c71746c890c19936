package frames_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }

var testSrc = net.HardwareAddr{0x02, 0, 0, 0, 0, 0x0a}

// pair is a veth pair, a and b, in a namespace of its own.
func pair(t *testing.T) netlab.Namespace {
	t.Helper()
	ns := netlab.NewPod(t)
	h := ns.Netlink(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "a"
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "b"}); err != nil {
		t.Fatal("make a veth pair: ", err)
	}
	for _, name := range []string{"a", "b"} {
		link, err := h.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
	}
	ns.AwaitCarrier(t, "a")
	ns.AwaitCarrier(t, "b")
	return ns
}

func sender(t *testing.T, ns netlab.Namespace, link string) *frames.Sender {
	t.Helper()
	var s *frames.Sender
	err := ns.Do(func() (err error) {
		s, err = frames.NewSender(link)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func receiver(t *testing.T, ns netlab.Namespace, link string) *frames.Receiver {
	t.Helper()
	var r *frames.Receiver
	err := ns.Do(func() (err error) {
		r, err = frames.NewReceiver(link)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func TestReceiverReturnsFramesAsTheyWereSent(t *testing.T) {
	ns := pair(t)
	r, s := receiver(t, ns, "b"), sender(t, ns, "a")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, f := range frames.Catalog(s.Interface.HardwareAddr, s.Interface.MTU) {
		if err := s.Send(f.Bytes); err != nil {
			t.Fatalf("%s: %v", f.Name, err)
		}
		got, err := r.Receive(ctx)
		if err != nil {
			t.Fatalf("%s did not arrive: %v", f.Name, err)
		}
		if !bytes.Equal(got, f.Bytes) {
			t.Errorf("%s arrived as %x, was sent as %x", f.Name, got, f.Bytes)
		}
	}
}

func TestReceiverDoesNotReturnWhatItsOwnSideSends(t *testing.T) {
	ns := pair(t)
	r, s, back := receiver(t, ns, "b"), sender(t, ns, "a"), sender(t, ns, "b")
	own, theirs := frames.Stream(nil, testSrc, 1, 0), frames.Stream(nil, testSrc, 1, 1)
	if err := errors.Join(back.Send(own), s.Send(theirs)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if got, err := r.Receive(ctx); err != nil || !bytes.Equal(got, theirs) {
		t.Errorf("received %x (%v), want the frame of the other side: %x", got, err, theirs)
	}
}

func TestReceiverCanBeAskedAgainAfterAContextEnded(t *testing.T) {
	ns := pair(t)
	r, s := receiver(t, ns, "b"), sender(t, ns, "a")
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := r.Receive(ended); !errors.Is(err, context.Canceled) {
		t.Fatalf("error is %v, want that the context was canceled", err)
	}
	want := frames.Stream(nil, testSrc, 1, 0)
	if err := s.Send(want); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if got, err := r.Receive(ctx); err != nil || !bytes.Equal(got, want) {
		t.Errorf("received %x (%v), want %x", got, err, want)
	}
}

func TestDrainDropsWhatHasArrived(t *testing.T) {
	ns := pair(t)
	r, s := receiver(t, ns, "b"), sender(t, ns, "a")
	want := frames.Stream(nil, testSrc, 1, 2)
	first, second := frames.Stream(nil, testSrc, 1, 0), frames.Stream(nil, testSrc, 1, 1)
	err := errors.Join(s.Send(first), s.Send(second), r.Drain(), s.Send(want))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if got, err := r.Receive(ctx); err != nil || !bytes.Equal(got, want) {
		t.Errorf("received %x (%v), want %x", got, err, want)
	}
}

func TestDroppedFramesAreReported(t *testing.T) {
	ns := pair(t)
	r, s := receiver(t, ns, "b"), sender(t, ns, "a")
	if n, err := r.Dropped(); err != nil || n != 0 {
		t.Fatalf("%d frames dropped at first (%v)", n, err)
	}
	large := make([]byte, 1500)
	for range 200_000 { // more than the largest buffer holds
		if err := s.Send(large); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := r.Dropped(); err != nil || n == 0 {
		t.Errorf("%d frames dropped (%v), want some", n, err)
	}
}

func TestMissingInterfaceIsAnError(t *testing.T) {
	ns := pair(t)
	if err := ns.Do(func() error { _, err := frames.NewReceiver("none"); return err }); err == nil {
		t.Error("receiver on an absent interface")
	}
	if err := ns.Do(func() error { _, err := frames.NewSender("none"); return err }); err == nil {
		t.Error("sender on an absent interface")
	}
}
