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

// station is where a pod or a VM's guest speaks on a LAN.
type station struct {
	lab
	pod    string
	node   string
	uid    string   // of the pod
	prefix []string // brings a command into the guest
	link   string
	mac    net.HardwareAddr
	mtu    int

	container string // of the pod, where commands run; empty: main
}

func (s station) String() string { return s.pod + " on " + s.node }

func (s station) inContainer() string { return cmp.Or(s.container, "main") }

// exec runs a command until its end or the context's.
func (s station) exec(ctx context.Context, stdout, stderr io.Writer, command ...string) error {
	request := bed.core.CoreV1().RESTClient().Post().Resource("pods").Namespace(s.namespace).Name(s.pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{
			Container: s.inContainer(), Command: append(slices.Clone(s.prefix), command...), Stdout: true, Stderr: true,
		}, scheme.ParameterCodec)
	executor, err := remotecommand.NewWebSocketExecutor(bed.config, "GET", request.URL().String())
	if err != nil {
		return err
	}
	return executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: stdout, Stderr: stderr})
}

// try runs a command and returns what it prints.
func (s station) try(command ...string) (string, error) {
	ctx, cancel := context.WithTimeout(s.Context(), patience)
	defer cancel()
	var stdout, stderr bytes.Buffer
	if err := s.exec(ctx, &stdout, &stderr, command...); err != nil {
		return stdout.String(), fmt.Errorf("%s: %s: %w\n%s%s", s, strings.Join(command, " "), err, &stdout, &stderr)
	}
	return stdout.String(), nil
}

// run runs a command that must succeed and returns what it prints.
func (s station) run(command ...string) string {
	s.Helper()
	out, err := s.try(command...)
	if err != nil {
		s.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// sh runs a shell script that must succeed and returns what it prints.
func (s station) sh(format string, args ...any) string {
	s.Helper()
	return s.run("sh", "-ec", fmt.Sprintf(format, args...))
}

// look reads the link's address and MTU.
func (s *station) look() {
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

// address gives the link addresses and returns when they can be used: IPv6 ones when the kernel has found that nobody
// else on the LAN has them.
func (s station) address(prefixes ...string) {
	s.Helper()
	for _, p := range prefixes {
		family := "-4"
		if netip.MustParsePrefix(p).Addr().Is6() {
			family = "-6"
		}
		s.run("ip", family, "addr", "add", p, "dev", s.link)
	}
	s.sh(`deadline=$(($(date +%%s) + 20))
while ip -6 addr show dev %s | grep -q tentative; do [ $(date +%%s) -lt $deadline ]; usleep 50000; done
! ip -6 addr show dev %[1]s | grep dadfailed`, s.link)
}

// pings wants every one of some pings to be answered.
func (s station) pings(addresses ...string) {
	s.Helper()
	for _, a := range addresses {
		s.run("ping", "-c", "2", "-W", "5", a)
	}
}

// reaches waits until an address answers.
func (s station) reaches(address string) {
	s.Helper()
	s.run("timeout", "50", "sh", "-c", "until ping -c 1 -W 1 "+address+"; do :; done")
}

// fetches lets another station serve a file of some megabytes over TCP, and wants to get all of it.
func (s station) fetches(from station, address string) {
	s.Helper()
	if a := netip.MustParseAddr(address); a.Is6() {
		address = "[" + address + "]"
	}
	from.sh("pidof httpd || httpd -p 8080 -h /bin")
	want := strings.Fields(from.run("sha256sum", "/bin/frames"))[0]
	got := s.sh("wget -q -O - http://%s:8080/frames | sha256sum", address)
	if got := strings.Fields(got)[0]; got != want {
		s.Errorf("%s fetched a file from %s whose checksum is %s, want %s", s, from, got, want)
	}
}

// in is the same station for a subtest.
func (s station) in(t *testing.T) station {
	s.lab = s.lab.in(t)
	return s
}

// awaitLog returns when the station's container has said something.
func (s station) awaitLog(words string) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), patience)
	defer cancel()
	log, err := bed.core.CoreV1().Pods(s.namespace).GetLogs(s.pod, &corev1.PodLogOptions{Container: s.inContainer(), Follow: true}).Stream(ctx)
	if err != nil {
		s.Fatalf("read the log of %s: %v", s, err)
	}
	defer log.Close()
	said := bufio.NewScanner(log)
	for said.Scan() {
		if strings.Contains(said.Text(), words) {
			return
		}
	}
	s.Fatalf("%s never said %q: %v", s, words, said.Err())
}

func hexed(frame []byte) string { return hex.EncodeToString(frame) }

// listener is a program frames that hears what arrives.
type listener struct {
	station
	lines <-chan string // a frame each; closed at the end
	end   <-chan error  // why it ended
}

// listen starts the program frames and returns once it hears.
func (s station) listen(args ...string) listener {
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
		heard := &announcement{ready: ready}
		err := s.exec(ctx, in, heard, append([]string{"frames", "-i", s.link}, args...)...)
		if err != nil {
			err = fmt.Errorf("%s: frames %s: %w: %s", s, strings.Join(args, " "), err, &heard.said)
		}
		end <- errors.Join(err, in.Close())
	}()
	select {
	case <-ready:
	case err := <-end:
		s.Fatalf("frames ended before it listened: %v", err)
	case <-time.After(patience):
		s.Fatalf("%s does not listen", s)
	}
	return listener{station: s, lines: lines, end: end}
}

// announcement takes the program's standard error and tells when that says that it listens.
type announcement struct {
	said  bytes.Buffer
	ready chan struct{}
	told  bool
}

// Write takes what the program says.
func (a *announcement) Write(p []byte) (int, error) {
	n, err := a.said.Write(p)
	if !a.told && strings.Contains(a.said.String(), "listening\n") {
		a.told = true
		close(a.ready)
	}
	return n, err
}

// all returns what the listener heard, at its end.
func (h listener) all() (heard []string, err error) {
	for line := range h.lines {
		heard = append(heard, line)
	}
	return heard, <-h.end
}

// crosses sends a frame of every kind from one station and wants exactly those that pass to arrive at the other.
func crosses(from, to station) {
	to.Helper()
	last := frames.Frame{Name: "last", Bytes: frames.Stream(nil, from.mac, 1, 0), Passes: true}
	names := map[string]string{} // of what should arrive, by hex
	for _, f := range append(frames.Catalog(from.mac, from.mtu), last) {
		if f.Passes {
			names[hexed(f.Bytes)] = f.Name
		}
	}
	ear := to.listen("listen", "--for", "20s", "--count", strconv.Itoa(len(names)), "--marker", frames.Marker)
	from.run("frames", "-i", from.link, "catalog")
	from.run("frames", "-i", from.link, "stream", "send", "--count", "1")
	heard, err := ear.all()
	for _, frame := range heard {
		if names[frame] == "" {
			to.Errorf("%s → %s: not sent, or twice: %s", from, to, frame)
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

// stream is 1,000 frames a second from one pod to another. The programs run in the pods by themselves: kubelet and the API
// server, which carry exec, may be away meanwhile.
type stream struct {
	from, to station
	began    time.Time
}

// startStream starts a stream.
func startStream(from, to station) stream {
	to.Helper()
	return start(from, to, "--dst "+to.mac.String())
}

// startFlood starts a stream to an address that nobody has.
func startFlood(from, to station) stream {
	to.Helper()
	return start(from, to, "")
}

func start(from, to station, destination string) stream {
	to.Helper()
	id := crc32.ChecksumIEEE([]byte(from.pod + " " + to.pod)) // two pods may have a stream in each direction
	to.sh(`frames -i %s stream receive --id %d --count 0 --for 10m >/tmp/tally 2>/tmp/ear &
echo $! >/tmp/receiver
until grep -q listening /tmp/ear; do usleep 20000; done`, to.link, id)
	from.sh(`frames -i %s stream send --id %d %s --count 0 --rate 1000 >/tmp/sent 2>&1 &
echo $! >/tmp/sender`, from.link, id, destination)
	return stream{from: from, to: to, began: time.Now()}
}

// end ends the stream and returns what of it arrived. A stream that didn't flow in the end is an error.
func (s stream) end() frames.Tally {
	s.to.Helper()
	interrupt := func(of station, program string) string {
		of.Helper()
		// A program that has ended may still have its number, as nobody's child, but not its file.
		return of.sh(`p=$(cat /tmp/%s); kill -INT $p || true; while [ -e /proc/$p/exe ]; do usleep 20000; done`, program)
	}
	interrupt(s.from, "sender")
	sent, err := strconv.ParseUint(s.from.run("cat", "/tmp/sent"), 10, 64)
	if err != nil {
		s.from.Fatalf("how many frames were sent: %v", err)
	}
	s.to.sh("sleep 0.3") // what has not come by then, will not
	interrupt(s.to, "receiver")
	result, rest, _ := strings.Cut(s.to.sh("cat /tmp/tally /tmp/ear"), "\n")
	var tally frames.Tally
	if err := json.Unmarshal([]byte(result), &tally); err != nil {
		s.to.Fatalf("the receiver said %q %q: %v", result, rest, err)
	}
	s.to.Logf("%d frames from %s to %s in %s: %+v", sent, s.from, s.to, time.Since(s.began).Round(time.Millisecond), tally)
	if came := tally.Received + tally.Lost; came < sent {
		s.to.Errorf("the last %d frames from %s to %s did not arrive", sent-came, s.from, s.to)
		tally.Lost += sent - came
	}
	return tally
}

// aMoment is how long a stream goes on after what is done meanwhile.
const aMoment = time.Second

// losesNothing does something while a stream flows, and wants every frame of it to arrive.
func losesNothing(from, to station, do func()) {
	to.Helper()
	s := startStream(from, to)
	do()
	<-time.After(aMoment)
	if tally := s.end(); tally.Lost > 0 {
		to.Errorf("%d frames from %s to %s were lost", tally.Lost, from, to)
	}
}

// losesLittle does something while a stream flows, and wants it to be interrupted for at most a second.
func losesLittle(from, to station, do func()) {
	to.Helper()
	s := startStream(from, to)
	do()
	<-time.After(2 * aMoment)
	if tally := s.end(); tally.LongestLoss > 1000 {
		to.Errorf("the stream from %s to %s was interrupted for %d ms, want 1,000 at most", from, to, tally.LongestLoss)
	}
}
