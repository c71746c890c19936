package report_test

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

const patience = 20 * time.Second

// folder is shorter than t.TempDir: a socket's path has at most 107 bytes.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "run")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// listen runs a daemon's ear until the test ends or stop is called.
func listen(t *testing.T, run string) (told <-chan report.Outcome, stop func()) {
	t.Helper()
	heard := make(chan report.Outcome, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		report.Listen(ctx, run, slog.New(slog.NewTextHandler(t.Output(), nil)), func(o report.Outcome) { heard <- o })
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		<-ended
	})
	t.Cleanup(stop)
	return heard, stop
}

// send sends until somebody listens.
func send(t *testing.T, run string, o report.Outcome) {
	t.Helper()
	again, deadline := time.NewTicker(time.Millisecond), time.After(patience)
	defer again.Stop()
	for {
		err := report.Send(run, o)
		if err == nil {
			return
		}
		select {
		case <-again.C:
		case <-deadline:
			t.Fatal(err)
		}
	}
}

func wantHeard(t *testing.T, told <-chan report.Outcome, want report.Outcome) {
	t.Helper()
	select {
	case got := <-told:
		if got != want {
			t.Fatalf("heard %+v, want %+v", got, want)
		}
	case <-time.After(patience):
		t.Fatalf("waited for %+v", want)
	}
}

var (
	attached = report.Outcome{Verb: report.Add, Kind: segment.Macvtap, TookOver: true, Took: 12 * time.Millisecond}
	refused  = report.Outcome{Verb: report.Del, Reason: report.IPAM, Took: time.Second}
)

func TestTheDaemonHearsWhatThePluginSays(t *testing.T) {
	run := folder(t)
	told, _ := listen(t, run)
	send(t, run, attached)
	wantHeard(t, told, attached)
	conn, err := net.Dial("unixgram", filepath.Join(run, "outcomes.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, nonsense := range []string{"", "null", "ADD", `{"verb":"CHECK"}`, `{"verb":1}`} {
		if _, err := conn.Write([]byte(nonsense)); err != nil {
			t.Fatal(err)
		}
	}
	send(t, run, refused)
	wantHeard(t, told, refused)
	info, err := os.Stat(filepath.Join(run, "outcomes.sock"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v, %v; only root may speak", info.Mode(), err)
	}
}

// Where more speak at once than the daemon can read in the time that each waits, some are lost, and know it.
func TestWhoeverSpeaksAtOnceIsHeardOrKnowsBetter(t *testing.T) {
	run := folder(t)
	told, _ := listen(t, run)
	send(t, run, attached)
	wantHeard(t, told, attached)
	var all sync.WaitGroup
	var heard atomic.Int64
	for range 64 {
		all.Go(func() {
			if report.Send(run, attached) == nil {
				heard.Add(1)
			}
		})
	}
	all.Wait()
	if heard.Load() == 0 {
		t.Fatal("nobody of 64 was heard")
	}
	for range heard.Load() {
		wantHeard(t, told, attached)
	}
	send(t, run, refused)
	wantHeard(t, told, refused) // and no more than that
}

// A plugin must not wait for a daemon that is away, or that does not read.
func TestNobodyThatListensIsNotWaitedFor(t *testing.T) {
	run := folder(t)
	if report.Send(run, attached) == nil {
		t.Error("told, though there is no daemon")
	}
	told, stop := listen(t, run)
	send(t, run, attached)
	wantHeard(t, told, attached)
	stop()
	if report.Send(run, attached) == nil {
		t.Error("told, though the daemon has ended")
	}
	if err := os.Remove(filepath.Join(run, "outcomes.sock")); err != nil {
		t.Fatal(err)
	}
	deaf, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(run, "outcomes.sock"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	for range 2000 { // more than any system lets wait
		if report.Send(run, attached) != nil {
			return
		}
	}
	t.Error("2,000 were told to a daemon that does not read")
}

func TestASocketThatIsRemovedIsMadeAnew(t *testing.T) {
	run := folder(t)
	told, stop := listen(t, run)
	for range 3 {
		send(t, run, attached)
		wantHeard(t, told, attached)
		if err := os.Remove(filepath.Join(run, "outcomes.sock")); err != nil {
			t.Fatal(err)
		}
	}
	send(t, run, attached)
	wantHeard(t, told, attached)
	stop() // and one that an earlier daemon has left is replaced
	told, _ = listen(t, run)
	send(t, run, refused)
	wantHeard(t, told, refused)
}
