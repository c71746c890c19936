package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/k8slan/k8slan/test/frames"
)

// host is the interface of a pod or of a VM's guest on a LAN.
type host struct {
	lab
	pod    string
	node   string
	uid    string   // of the pod
	prefix []string // runs a command in the guest
	link   string
	mac    net.HardwareAddr
	mtu    int

	container string // of the pod, in which commands run; empty: main
}

func (s host) String() string { return s.pod + " on " + s.node }

func (s host) inContainer() string { return cmp.Or(s.container, "main") }

// exec runs a command until it ends or the context does.
func (s host) exec(ctx context.Context, stdout, stderr io.Writer, command ...string) error {
	request := s.bed.core.CoreV1().RESTClient().Post().
		Resource("pods").Namespace(s.namespace).Name(s.pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{
			Container: s.inContainer(), Command: append(slices.Clone(s.prefix), command...), Stdout: true, Stderr: true,
		}, scheme.ParameterCodec)
	executor, err := remotecommand.NewWebSocketExecutor(s.bed.config, "GET", request.URL().String())
	if err != nil {
		return err
	}
	return executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: stdout, Stderr: stderr})
}

// try runs a command and returns what it prints.
func (s host) try(command ...string) (string, error) {
	ctx, cancel := context.WithTimeout(s.Context(), patience)
	defer cancel()
	var stdout, stderr bytes.Buffer
	if err := s.exec(ctx, &stdout, &stderr, command...); err != nil {
		return stdout.String(), fmt.Errorf("%s: %s: %w\n%s%s", s, strings.Join(command, " "), err, &stdout, &stderr)
	}
	return stdout.String(), nil
}

// run runs a command that must succeed and returns what it prints.
func (s host) run(command ...string) string {
	s.Helper()
	out, err := s.try(command...)
	if err != nil {
		s.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// sh runs a shell script that must succeed and returns what it prints.
func (s host) sh(format string, args ...any) string {
	s.Helper()
	return s.run("sh", "-ec", fmt.Sprintf(format, args...))
}

// readLink reads the link's address and MTU.
func (s *host) readLink() {
	s.Helper()
	out := strings.Fields(s.sh("cat /sys/class/net/%s/address /sys/class/net/%[1]s/mtu", s.link))
	var err error
	if s.mac, err = net.ParseMAC(out[0]); err != nil {
		s.Fatal(err)
	}
	if s.mtu, err = strconv.Atoi(out[1]); err != nil {
		s.Fatal(err)
	}
}

// address gives the link addresses and returns when they can be used. IPv6 addresses can be used when the kernel has
// found that no other host on the LAN has them.
func (s host) address(prefixes ...string) {
	s.Helper()
	var add strings.Builder
	for _, p := range prefixes {
		family := "-4"
		if netip.MustParsePrefix(p).Addr().Is6() {
			family = "-6"
		}
		fmt.Fprintf(&add, "ip %s addr add %s dev %s\n", family, p, s.link)
	}
	s.sh(`%s
deadline=$(($(date +%%s) + 20))
while ip -6 addr show dev %s | grep -q tentative; do [ $(date +%%s) -lt $deadline ]; usleep 50000; done
! ip -6 addr show dev %[2]s | grep dadfailed`, &add, s.link)
}

// pings wants each of two pings to each address to be answered.
func (s host) pings(addresses ...string) {
	s.Helper()
	s.sh("for a in %s; do ping -c 2 -i 0.1 -W 5 $a; done", strings.Join(addresses, " "))
}

// reaches waits until an address answers.
func (s host) reaches(address string) {
	s.Helper()
	s.run("timeout", "50", "sh", "-c", "until ping -c 1 -W 1 "+address+"; do :; done")
}

// fetches lets another host serve a file of some megabytes over TCP, and wants to get all of it.
func (s host) fetches(from host, address string) {
	s.Helper()
	if a := netip.MustParseAddr(address); a.Is6() {
		address = "[" + address + "]"
	}
	from.sh("pidof httpd || httpd -p 8080 -h /bin")
	want := strings.Fields(from.run("sha256sum", "/bin/frames"))[0]
	got := s.sh("wget -q -O - http://%s:8080/frames | sha256sum", address)
	if got := strings.Fields(got)[0]; got != want {
		s.Errorf("%s fetched a file from %s with checksum %s, want %s", s, from, got, want)
	}
}

// in returns the host for a subtest.
func (s host) in(t *testing.T) host {
	s.lab = s.lab.in(t)
	return s
}

// awaitLog returns when the host's container has logged some words.
func (s host) awaitLog(words string) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), patience)
	defer cancel()
	log, err := s.bed.core.CoreV1().Pods(s.namespace).GetLogs(s.pod,
		&corev1.PodLogOptions{Container: s.inContainer(), Follow: true}).Stream(ctx)
	if err != nil {
		s.Fatalf("read the log of %s: %v", s, err)
	}
	defer log.Close()
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		if strings.Contains(lines.Text(), words) {
			return
		}
	}
	s.Fatalf("%s never logged %q: %v", s, words, lines.Err())
}

func hexed(frame []byte) string { return hex.EncodeToString(frame) }

// listener is a program frames that prints the frames that arrive.
type listener struct {
	host
	lines <-chan string // one frame each; closed at the end
	end   <-chan error  // why the program ended
}

// listen starts the program frames and returns once it listens.
func (s host) listen(args ...string) listener {
	s.Helper()
	ctx, cancel := context.WithCancel(s.Context())
	s.Cleanup(cancel)
	lines, end := make(chan string, 1<<16), make(chan error, 1)
	ready := make(chan struct{})
	out, in := io.Pipe()
	go func() { // ends with the program
		defer close(lines)
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			lines <- scanner.Text()
		}
	}()
	go func() { // ends with the context
		stderr := &readySignal{ready: ready}
		err := s.exec(ctx, in, stderr, append([]string{"frames", "-i", s.link}, args...)...)
		if err != nil {
			err = fmt.Errorf("%s: frames %s: %w: %s", s, strings.Join(args, " "), err, &stderr.said)
		}
		end <- errors.Join(err, in.Close())
	}()
	select {
	case <-ready:
	case err := <-end:
		s.Fatalf("frames ended before it could listen: %v", err)
	case <-time.After(patience):
		s.Fatalf("%s does not listen", s)
	}
	return listener{host: s, lines: lines, end: end}
}

// readySignal reads the program's standard error and closes a channel when the program reports that it listens.
type readySignal struct {
	said  bytes.Buffer
	ready chan struct{}
	done  bool
}

// Write reads a part of the standard error.
func (a *readySignal) Write(p []byte) (int, error) {
	n, err := a.said.Write(p)
	if !a.done && strings.Contains(a.said.String(), "listening\n") {
		a.done = true
		close(a.ready)
	}
	return n, err
}

// all returns the frames that arrived, once the program has ended.
func (h listener) all() (received []string, err error) {
	for line := range h.lines {
		received = append(received, line)
	}
	return received, <-h.end
}

// crosses sends a frame of every kind from one host, and wants exactly those that LANs carry to arrive at the other.
func crosses(from, to host) {
	to.Helper()
	last := frames.Frame{Name: "last", Bytes: frames.Stream(nil, from.mac, 1, 0), Passes: true}
	names := map[string]string{} // of the frames that should arrive, by hex
	for _, f := range append(frames.Catalog(from.mac, from.mtu), last) {
		if f.Passes {
			names[hexed(f.Bytes)] = f.Name
		}
	}
	listener := to.listen("listen", "--for", "20s", "--count", strconv.Itoa(len(names)), "--marker", frames.Marker)
	from.run("frames", "-i", from.link, "catalog")
	from.run("frames", "-i", from.link, "stream", "send", "--count", "1")
	received, err := listener.all()
	for _, frame := range received {
		if names[frame] == "" {
			to.Errorf("%s → %s: a frame that was not sent, or a copy: %s", from, to, frame)
		}
		delete(names, frame)
	}
	for _, name := range names {
		to.Errorf("%s → %s: %s did not arrive", from, to, name)
	}
	if err != nil {
		to.Errorf("%s → %s: %v", from, to, err)
	}
}

// stream is 1,000 frames a second from one pod to another. The programs run in the pods in the background, because
// kubelet and the API server, which carry exec, may be down meanwhile.
type stream struct {
	from, to host
	began    time.Time
}

// startStream starts a stream.
func startStream(from, to host) stream {
	to.Helper()
	return start(from, to, "--dst "+to.mac.String())
}

// startFlood starts a stream to a MAC that no host has.
func startFlood(from, to host) stream {
	to.Helper()
	return start(from, to, "")
}

func start(from, to host, destination string) stream {
	to.Helper()
	id := crc32.ChecksumIEEE([]byte(from.pod + " " + to.pod)) // two pods may have a stream in each direction
	to.sh(`frames -i %s stream receive --id %d --count 0 --for 10m >/tmp/tally 2>/tmp/ear &
echo $! >/tmp/receiver
until grep -q listening /tmp/ear; do usleep 20000; done`, to.link, id)
	from.sh(`frames -i %s stream send --id %d %s --count 0 --rate 1000 >/tmp/sent 2>&1 &
echo $! >/tmp/sender`, from.link, id, destination)
	return stream{from: from, to: to, began: time.Now()}
}

// end ends the stream and counts the frames that arrived. It is an error if the last frames did not arrive.
func (s stream) end() frames.Tally {
	s.to.Helper()
	interrupt := func(of host, program string) string {
		of.Helper()
		// A program that has ended and has no parent may still have its process ID, but not its executable.
		return of.sh(`p=$(cat /tmp/%s); kill -INT $p || true; while [ -e /proc/$p/exe ]; do usleep 20000; done`,
			program)
	}
	interrupt(s.from, "sender")
	sent, err := strconv.ParseUint(s.from.run("cat", "/tmp/sent"), 10, 64)
	if err != nil {
		s.from.Fatalf("count the frames that were sent: %v", err)
	}
	s.to.sh("sleep 0.3") // frames that have not arrived by then are lost
	interrupt(s.to, "receiver")
	result, rest, _ := strings.Cut(s.to.sh("cat /tmp/tally /tmp/ear"), "\n")
	var tally frames.Tally
	if err := json.Unmarshal([]byte(result), &tally); err != nil {
		s.to.Fatalf("the receiver printed %q %q: %v", result, rest, err)
	}
	s.to.Logf("%d frames from %s to %s in %s: %+v", sent, s.from, s.to, time.Since(s.began).Round(time.Millisecond),
		tally)
	if counted := tally.Received + tally.Lost; counted < sent {
		s.to.Errorf("the last %d frames from %s to %s did not arrive", sent-counted, s.from, s.to)
		tally.Lost += sent - counted
	}
	return tally
}

// aMoment is how long a stream continues after the action of a test.
const aMoment = time.Second

// losesNothing does something during a stream, and wants every frame of the stream to arrive.
func losesNothing(from, to host, do func()) {
	to.Helper()
	s := startStream(from, to)
	do()
	<-time.After(aMoment)
	if tally := s.end(); tally.Lost > 0 {
		to.Errorf("%d frames from %s to %s were lost", tally.Lost, from, to)
	}
}

// losesLittle does something during a stream, and wants the stream to be interrupted for at most a second.
func losesLittle(from, to host, do func()) {
	to.Helper()
	s := startStream(from, to)
	do()
	<-time.After(2 * aMoment)
	if tally := s.end(); tally.LongestLoss > 1000 {
		to.Errorf("the stream from %s to %s was interrupted for %d ms, want 1,000 at most", from, to, tally.LongestLoss)
	}
}
