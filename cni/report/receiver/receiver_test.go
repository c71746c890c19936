package receiver_test

import (
	"context"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/cni/report/receiver"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// timeout is how long a test waits for an outcome.
const timeout = 20 * time.Second

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

// receive runs a daemon's receiver until the test ends or stop is called.
func receive(t *testing.T, run string) (outcomes <-chan report.Outcome, stop func()) {
	t.Helper()
	received := make(chan report.Outcome, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	go func() {
		defer close(ended)
		receiver.Run(ctx, run, log, func(o report.Outcome) { received <- o })
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		<-ended
	})
	t.Cleanup(stop)
	return received, stop
}

// send sends until a daemon receives.
func send(t *testing.T, run string, o report.Outcome) {
	t.Helper()
	again, deadline := time.NewTicker(time.Millisecond), time.After(timeout)
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

func wantReceived(t *testing.T, outcomes <-chan report.Outcome, want report.Outcome) {
	t.Helper()
	select {
	case got := <-outcomes:
		if got != want {
			t.Fatalf("received %+v, want %+v", got, want)
		}
	case <-time.After(timeout):
		t.Fatalf("waited for %+v", want)
	}
}

var (
	attached = report.Outcome{Verb: report.Add, Kind: segment.Macvtap, TookOver: true, Took: 12 * time.Millisecond}
	refused  = report.Outcome{Verb: report.Del, Reason: report.IPAM, Took: time.Second}
)

func TestOutcomesAreReceivedAndOtherMessagesIgnored(t *testing.T) {
	run := folder(t)
	outcomes, _ := receive(t, run)
	send(t, run, attached)
	wantReceived(t, outcomes, attached)
	conn, err := net.Dial("unixgram", report.Socket(run))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, other := range []string{"", "null", "ADD", `{"verb":"CHECK"}`, `{"verb":1}`} {
		if _, err := conn.Write([]byte(other)); err != nil {
			t.Fatal(err)
		}
	}
	send(t, run, refused)
	wantReceived(t, outcomes, refused)
	info, err := os.Stat(report.Socket(run))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v, %v; only root may send to it", info.Mode(), err)
	}
}

// Where more plugins send at once than the daemon can read in the time that each waits, some outcomes are lost.
func TestSendFailsWhereTheOutcomeIsLost(t *testing.T) {
	run := folder(t)
	outcomes, _ := receive(t, run)
	send(t, run, attached)
	wantReceived(t, outcomes, attached)
	var all sync.WaitGroup
	var sent atomic.Int64
	for range 64 {
		all.Go(func() {
			if report.Send(run, attached) == nil {
				sent.Add(1)
			}
		})
	}
	all.Wait()
	if sent.Load() == 0 {
		t.Fatal("none of 64 outcomes was sent")
	}
	for range sent.Load() {
		wantReceived(t, outcomes, attached)
	}
	send(t, run, refused)
	wantReceived(t, outcomes, refused) // so that no more than those were received
}

// A plugin must not wait for a daemon that is not there, or that does not read.
func TestSendDoesNotWaitForADaemon(t *testing.T) {
	run := folder(t)
	if report.Send(run, attached) == nil {
		t.Error("an outcome was sent without a daemon")
	}
	outcomes, stop := receive(t, run)
	send(t, run, attached)
	wantReceived(t, outcomes, attached)
	stop()
	if report.Send(run, attached) == nil {
		t.Error("an outcome was sent after the daemon's end")
	}
	if err := os.Remove(report.Socket(run)); err != nil {
		t.Fatal(err)
	}
	unread, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: report.Socket(run), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer unread.Close()
	for range 2000 { // more than any system queues
		if report.Send(run, attached) != nil {
			return
		}
	}
	t.Error("2,000 outcomes were sent to a daemon that does not read")
}

func TestRemovedSocketIsMadeAgain(t *testing.T) {
	run := folder(t)
	outcomes, stop := receive(t, run)
	for range 3 {
		send(t, run, attached)
		wantReceived(t, outcomes, attached)
		if err := os.Remove(report.Socket(run)); err != nil {
			t.Fatal(err)
		}
	}
	send(t, run, attached)
	wantReceived(t, outcomes, attached)
	stop() // another daemon replaces the socket of an earlier one
	outcomes, _ = receive(t, run)
	send(t, run, refused)
	wantReceived(t, outcomes, refused)
}
