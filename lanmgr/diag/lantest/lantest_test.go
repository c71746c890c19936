package lantest

import (
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/k8slan/k8slan/lanmgr/diag/packet"
)

// cable is one end of a wire. It loses frames that are longer than limit, and frames for which loses is true.
type cable struct {
	in, out chan packet.Frame
	limit   int
	loses   func(frame []byte) bool
}

func (c *cable) Send(frame []byte) error {
	if len(frame) <= c.limit && !c.loses(frame) {
		c.out <- packet.Frame{Bytes: frame}
	}
	return nil
}

func (c *cable) Receive(ctx context.Context) (packet.Frame, error) {
	select {
	case f := <-c.in:
		return f, nil
	case <-ctx.Done():
		return packet.Frame{}, ctx.Err()
	}
}

func (c *cable) Close() error { return nil }

// wire returns two connected ports, and the cable of the first.
func wire(t *testing.T) (one, two *Port, end *cable) {
	t.Helper()
	there, back := make(chan packet.Frame, 4096), make(chan packet.Frame, 4096)
	all := func([]byte) bool { return false }
	end = &cable{back, there, packet.Largest, all}
	one = &Port{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1400, Wire: end, Owner: "node-one"}
	two = &Port{
		MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2},
		MTU: 1400, Wire: &cable{there, back, packet.Largest, all}, Owner: strings.Repeat("n", 253),
	}
	return one, two, end
}

func TestEveryFrameIsAnswered(t *testing.T) {
	one, two, _ := wire(t)
	ctx, cancel := context.WithCancel(t.Context())
	end := make(chan error, 1)
	go func() { end <- two.Answer(ctx) }()
	peer, err := one.Find(ctx)
	if err != nil || !strings.HasPrefix(peer.Owner, "nnn") {
		t.Errorf("%+v, %v", peer, err)
	}
	r, err := one.Count(ctx, peer, 100)
	if err != nil || r.Lost != 0 || r.Sent != 100 || r.Short != 60 || r.Long != 1414 {
		t.Errorf("%+v, %v", r, err)
	}
	cancel()
	if err := <-end; err != nil {
		t.Error(err)
	}
}

func TestLostAndTruncatedFramesAreCounted(t *testing.T) {
	inABubble(lostAndTruncated)(t)
}

func lostAndTruncated(t *testing.T) {
	one, two, _ := wire(t)
	go func() { // answers long frames with short ones, and every fourth frame not at all
		for {
			m, _, err := two.receive(t.Context()) // the context ends with the test
			if err != nil {
				return
			}
			if m.number%4 != 1 {
				_ = two.send(m.from, message{kind: kindAnswer, number: m.number}, minFrame)
			}
		}
	}()
	r, err := one.Count(t.Context(), Peer{MAC: two.MAC}, 4)
	if err != nil || r.Lost != 3 { // 1 is not answered, 2 and 4 are long
		t.Errorf("%+v, %v; want 3 lost", r, err)
	}
	r, err = one.Count(t.Context(), Peer{MAC: two.MAC}, 1000)
	if err != nil || r.Lost != 10 || r.Sent > 20 {
		t.Errorf("with a thousand frames: %+v, %v; want it to stop after 10 lost frames", r, err)
	}
}

func TestErrorWithoutAnswerSaysWhatToCheck(t *testing.T) {
	one, _, _ := wire(t)
	ctx, cancel := context.WithTimeout(t.Context(), helloInterval/2)
	defer cancel()
	if _, err := one.Find(ctx); err == nil || !strings.Contains(err.Error(), "kubectl get lans") {
		t.Errorf("%v", err)
	}
}

func TestEveryKindOfFrameIsInTheVerdict(t *testing.T) {
	for name, c := range map[string]struct {
		limit int
		loses func(frame []byte) bool
		ok    bool
		want  string
	}{
		"all": {packet.Largest, func([]byte) bool { return false }, true, "pod on node-one → pod on nnn"},
		"their size": {
			packet.Largest, func([]byte) bool { return false }, true,
			"every kind of frame passes, packets of up to 1400 bytes, up to 4 VLAN tags and maybe more.",
		},
		"long ones": {
			1234 + 14, func([]byte) bool { return false }, false,
			"packets of up to 1234 bytes pass, longer ones do not; the LAN's MTU is 1400.",
		},
		"LACP": {
			packet.Largest, func(f []byte) bool { return f[0] == 1 && f[1] == 0x80 && f[5] == 2 }, false,
			"some kinds of frames do not pass: the address of LACP. For where it is lost, run kubectl k8slan probe",
		},
	} {
		t.Run(name, inABubble(func(t *testing.T) {
			one, two, end := wire(t)
			ctx, cancel := context.WithCancel(t.Context())
			over := make(chan error, 1)
			go func() { over <- two.Answer(ctx) }()
			peer, err := one.Find(ctx)
			if err != nil {
				t.Fatal(err)
			}
			end.limit, end.loses = c.limit, c.loses
			path, err := one.ProbeKinds(ctx, peer)
			if err != nil {
				t.Fatal(err)
			}
			ok, sentences := path.Verdict()
			if ok != c.ok || !strings.Contains(strings.Join(sentences, "\n"), c.want) {
				t.Errorf("%t, %q; want %t, %q", ok, sentences, c.ok, c.want)
			}
			cancel()
			if err := <-over; err != nil {
				t.Error(err)
			}
		}))
	}
}

// inABubble runs a test with a fake clock, so that waiting for lost frames takes no time.
func inABubble(test func(*testing.T)) func(*testing.T) {
	return func(t *testing.T) { synctest.Test(t, test) }
}
