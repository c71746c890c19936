// Package remote runs a command at the other end of a connection: how a test's
// VM container has its guest do things.
package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"sync"
)

// request is what the client sends, once.
type request struct {
	Args []string
}

// event is what the server sends: Ready first and once, then output as it
// comes, then the end.
type event struct {
	Ready          bool `json:",omitempty"`
	Stdout, Stderr []byte
	Exit           *int   `json:",omitempty"`
	Error          string `json:",omitempty"`
}

// Dial says hello over conn, and returns an error if no server answers there.
func Dial(conn io.ReadWriteCloser) (*Client, error) {
	c := &Client{conn: conn, events: json.NewDecoder(conn)}
	var hello event
	if err := c.events.Decode(&hello); err != nil || !hello.Ready {
		return nil, errors.Join(fmt.Errorf("no server is ready at the other end: %w", err), conn.Close())
	}
	return c, nil
}

// Client is a connection to a server that waits for a command.
type Client struct {
	conn   io.ReadWriteCloser
	events *json.Decoder
}

// Run runs a command over there, copies its output, and returns its exit
// status. When ctx ends, so does the command. A client runs one command.
func (c *Client) Run(ctx context.Context, args []string, stdout, stderr io.Writer) (exit int, err error) {
	defer c.conn.Close()
	defer context.AfterFunc(ctx, func() { c.conn.Close() })()
	if err := json.NewEncoder(c.conn).Encode(request{args}); err != nil {
		return 0, fmt.Errorf("send the command: %w", err)
	}
	for {
		var e event
		if err := c.events.Decode(&e); err != nil {
			return 0, errors.Join(ctx.Err(), fmt.Errorf("the command's connection broke: %w", err))
		}
		if _, err := stdout.Write(e.Stdout); err != nil {
			return 0, fmt.Errorf("copy the command's output: %w", err)
		}
		if _, err := stderr.Write(e.Stderr); err != nil {
			return 0, fmt.Errorf("copy the command's output: %w", err)
		}
		if e.Error != "" {
			return 0, errors.New(e.Error)
		}
		if e.Exit != nil {
			return *e.Exit, nil
		}
	}
}

// Serve runs the one command that the client at conn asks for, and kills it
// when the client goes away. It closes conn.
func Serve(ctx context.Context, conn io.ReadWriteCloser) error {
	defer conn.Close()
	out := &sender{encoder: json.NewEncoder(conn)}
	if err := out.send(event{Ready: true}); err != nil {
		return fmt.Errorf("say hello: %w", err)
	}
	requests := json.NewDecoder(conn)
	var r request
	if err := requests.Decode(&r); errors.Is(err, io.EOF) {
		return nil // the client only wanted to know whether we are ready
	} else if err != nil {
		return fmt.Errorf("receive a command: %w", err)
	}
	if len(r.Args) == 0 {
		return out.send(event{Error: "no command given"})
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends when the deferred Close does its work
		_ = requests.Decode(&request{}) // returns when the client is gone
		cancel()
	}()
	return out.send(run(ctx, r.Args, out))
}

func run(ctx context.Context, args []string, out *sender) event {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdout = writer(func(p []byte) error { return out.send(event{Stdout: p}) })
	cmd.Stderr = writer(func(p []byte) error { return out.send(event{Stderr: p}) })
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return event{Error: fmt.Sprintf("run %q: %v", args, err)}
	}
	code := cmd.ProcessState.ExitCode()
	return event{Exit: &code}
}

// sender sends whole events from several goroutines.
type sender struct {
	mu      sync.Mutex
	encoder *json.Encoder
}

func (s *sender) send(e event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.encoder.Encode(e)
}

type writer func([]byte) error

func (w writer) Write(p []byte) (int, error) {
	if err := w(p); err != nil {
		return 0, err
	}
	return len(p), nil
}
