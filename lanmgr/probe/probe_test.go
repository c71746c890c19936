package probe

import (
	"context"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// wire returns two ports that are connected.
func wire(t *testing.T) (one, two *Port) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	one = &Port{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1400, Wire: os.NewFile(uintptr(fds[0]), "one"), Owner: "node-one"}
	two = &Port{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, MTU: 1400, Wire: os.NewFile(uintptr(fds[1]), "two"), Owner: strings.Repeat("n", 253)}
	t.Cleanup(func() { one.Close(); two.Close() })
	return one, two
}

func TestEveryFrameIsAnswered(t *testing.T) {
	one, two := wire(t)
	ctx, cancel := context.WithCancel(t.Context())
	end := make(chan error, 1)
	go func() { end <- two.Answer(ctx) }()
	r, err := one.Ask(ctx, 100)
	if err != nil || r.Lost != 0 || r.Sent != 100 || !strings.HasPrefix(r.Peer, "nnn") || r.Short != 60 || r.Long != 1414 {
		t.Errorf("%+v, %v", r, err)
	}
	cancel()
	if err := <-end; err != nil {
		t.Error(err)
	}
}

func TestLostAndTruncatedFramesAreCounted(t *testing.T) {
	one, two := wire(t)
	go func() { // answers long frames short, and every fourth not at all
		for {
			m, _, err := two.receive(time.Time{})
			if err != nil {
				return
			}
			if m.number%4 != 1 {
				_ = two.send(m.from, message{kind: kindAnswer, number: m.number}, shortest)
			}
		}
	}()
	r, err := one.Ask(t.Context(), 4)
	if err != nil || r.Lost != 3 { // 1 is not answered, 2 and 4 are long
		t.Errorf("%+v, %v; want 3 lost", r, err)
	}
}

func TestSilenceIsToldWithTheWayOut(t *testing.T) {
	one, _ := wire(t)
	ctx, cancel := context.WithTimeout(t.Context(), helloEvery/2)
	defer cancel()
	if _, err := one.Ask(ctx, 1); err == nil || !strings.Contains(err.Error(), "kubectl get lans") {
		t.Errorf("%v", err)
	}
}
