// Package forward carries TCP connections from one network namespace into
// another.
package forward

import (
	"fmt"
	"io"
	"log/slog"
	"net"

	"github.com/k8slan/k8slan/test/cluster/internal/process"
)

// Serve hands every connection that the listener accepts to an address in the
// network namespace at netns; it returns when the listener fails.
func Serve(log *slog.Logger, listener net.Listener, netns, address string) error {
	for {
		client, err := listener.Accept()
		if err != nil {
			return fmt.Errorf("accept a connection on %s: %w", listener.Addr(), err)
		}
		go func() {
			defer client.Close()
			if err := carry(client.(*net.TCPConn), netns, address); err != nil {
				log.Error("a connection was not carried", "error", err)
			}
		}()
	}
}

// carry ends when both directions have ended.
func carry(client *net.TCPConn, netns, address string) error {
	server, err := dial(netns, address)
	if err != nil {
		return err
	}
	defer server.Close()
	back := make(chan struct{})
	go func() {
		defer close(back)
		half(client, server)
	}()
	half(server, client)
	<-back
	return nil
}

// half copies one direction and passes its end on.
func half(to, from *net.TCPConn) {
	_, _ = io.Copy(to, from) // the end of either side ends it, however it came
	to.CloseWrite()
	from.CloseRead()
}

func dial(netns, address string) (*net.TCPConn, error) {
	var server net.Conn
	err := process.InNetns(netns, func() (err error) {
		// A socket stays in the namespace it was made in; with a literal address Dial makes it on this thread.
		server, err = net.Dial("tcp", address)
		return err
	})
	if err != nil {
		return nil, err
	}
	return server.(*net.TCPConn), nil
}
