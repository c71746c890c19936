package remote

import (
	"bytes"
	"context"
	"net"
	"strings"
	"testing"
	"time"
)

// serve returns a client and a channel that gives the server's end.
func serve(t *testing.T) (*Client, <-chan error) {
	t.Helper()
	here, there := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- Serve(context.Background(), there) }()
	c, err := Dial(here)
	if err != nil {
		t.Fatal(err)
	}
	return c, ended
}

func TestCommandsOutputAndStatusComeBack(t *testing.T) {
	c, _ := serve(t)
	var stdout, stderr bytes.Buffer
	exit, err := c.Run(context.Background(), []string{"sh", "-c", "echo out; echo err >&2; exit 3"}, &stdout, &stderr)
	if err != nil || exit != 3 || stdout.String() != "out\n" || stderr.String() != "err\n" {
		t.Errorf("exit %d, stdout %q, stderr %q, error %v", exit, &stdout, &stderr, err)
	}
}

func TestOutputComesWhileTheCommandRuns(t *testing.T) {
	c, ended := serve(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	first := writer(func(p []byte) error { cancel(); return nil })
	if _, err := c.Run(ctx, []string{"sh", "-c", "echo now; exec sleep 600"}, first, first); err == nil {
		t.Error("no error from a command that was interrupted")
	}
	select {
	case err := <-ended:
		t.Log("the server: ", err) // the reader of the answer has ended
	case <-time.After(10 * time.Second):
		t.Error("the command outlives its client")
	}
}

func TestImpossibleCommandsAreErrors(t *testing.T) {
	for _, args := range [][]string{{"/no/such/program"}, {}} {
		c, _ := serve(t)
		var out bytes.Buffer
		_, err := c.Run(context.Background(), args, &out, &out)
		if err == nil ||
			!strings.Contains(err.Error(), "command") && !strings.Contains(err.Error(), "/no/such/program") {
			t.Errorf("%q: error is %v", args, err)
		}
	}
}

func TestDialFailsWithoutAServer(t *testing.T) {
	here, there := net.Pipe()
	there.Close()
	if _, err := Dial(here); err == nil {
		t.Error("no error")
	}
}
