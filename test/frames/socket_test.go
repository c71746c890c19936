package frames

import (
	"bytes"
	"context"
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inVeth moves the test into a new network namespace that holds the veth pair
// a and b, up. The test's thread, and the namespace with it, ends with the test.
func inVeth(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("K8SLAN_NO_SKIP") == "1" {
			t.Fatal("needs root to make a network namespace")
		}
		t.Skip("needs root to make a network namespace")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal("make a network namespace: ", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "a"
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: "b"}
	if err := netlink.LinkAdd(pair); err != nil {
		t.Fatal("make a veth pair: ", err)
	}
	updates, done := make(chan netlink.LinkUpdate, 16), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribe(updates, done); err != nil {
		t.Fatal("watch the veth pair: ", err)
	}
	waiting := map[string]bool{"a": true, "b": true}
	for name := range waiting {
		link, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
	}
	// Until the kernel says that it is operational, what is sent on a link is
	// dropped in silence.
	for deadline := time.After(10 * time.Second); len(waiting) > 0; {
		select {
		case update := <-updates:
			if attrs := update.Attrs(); attrs.OperState == netlink.OperUp {
				delete(waiting, attrs.Name)
			}
		case <-deadline:
			t.Fatalf("the veth pair's ends %v did not come up", waiting)
		}
	}
}

func openPair(t *testing.T) (*Sender, *Receiver) {
	t.Helper()
	inVeth(t)
	r, err := NewReceiver("b")
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSender("a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(r.Close(), s.Close()); err != nil {
			t.Error(err)
		}
	})
	return s, r
}

func TestReceiverReturnsFramesAsTheyWereSent(t *testing.T) {
	s, r := openPair(t)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, f := range Catalog(s.Interface.HardwareAddr, s.Interface.MTU) {
		if err := s.Send(f.Bytes); err != nil {
			t.Fatalf("%s: %v", f.Name, err)
		}
		for {
			got, err := r.Receive(ctx)
			if err != nil {
				t.Fatalf("%s did not arrive: %v", f.Name, err)
			}
			if !(Filter{Marker: Marker}).Match(got) {
				continue // the kernel's own
			}
			if !bytes.Equal(got, f.Bytes) {
				t.Errorf("%s arrived as %x, was sent as %x", f.Name, got, f.Bytes)
			}
			break
		}
	}
}

func TestReceiverDoesNotReturnWhatItsOwnSideSends(t *testing.T) {
	s, r := openPair(t)
	back, err := NewSender("b")
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	own, theirs := Stream(nil, testSrc, 1, 0), Stream(nil, testSrc, 1, 1)
	if err := errors.Join(back.Send(own), s.Send(theirs)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		got, err := r.Receive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(got, own) {
			t.Fatal("received a frame that left the interface")
		}
		if bytes.Equal(got, theirs) {
			return
		}
	}
}

func TestReceiverCanBeAskedAgainAfterAContextEnded(t *testing.T) {
	s, r := openPair(t)
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for { // what the kernel said before
		if _, err := r.Receive(ended); errors.Is(err, context.Canceled) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	want := Stream(nil, testSrc, 1, 0)
	if err := s.Send(want); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		got, err := r.Receive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(got, want) {
			return
		}
	}
}

func TestDroppedFramesAreReported(t *testing.T) {
	s, r := openPair(t)
	if n, err := r.Dropped(); err != nil || n != 0 {
		t.Fatalf("%d frames dropped at first (%v)", n, err)
	}
	if err := r.raw.Control(func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	for seq := range uint64(100) {
		if err := s.Send(Stream(nil, testSrc, 1, seq)); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := r.Dropped(); err != nil || n == 0 {
		t.Errorf("%d frames dropped (%v), want some", n, err)
	}
}

func TestMissingInterfaceIsNamed(t *testing.T) {
	inVeth(t)
	if _, err := NewReceiver("none"); err == nil {
		t.Error("receiver on an interface that is not there")
	}
	if _, err := NewSender("none"); err == nil {
		t.Error("sender on an interface that is not there")
	}
}
