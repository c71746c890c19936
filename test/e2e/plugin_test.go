package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/frames"
)

// plugin returns a command of kubectl k8slan in the lab's namespace.
func (l lab) plugin(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, l.bed.Built("kubectl-k8slan"),
		append([]string{"--kubeconfig", l.bed.Cluster.Kubeconfig(), "--namespace", l.namespace}, args...)...)
}

// k8slan runs kubectl k8slan, which must exit with that code, and returns its output.
func (l lab) k8slan(code int, args ...string) string {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	cmd := l.plugin(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		l.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		l.Fatalf("kubectl k8slan %s ended with %d, want %d\n%s%s", strings.Join(args, " "), got, code, &stdout, &stderr)
	}
	return stdout.String() + stderr.String()
}

func TestStatusShowsLANsPodsAndNodesOnOneScreen(t *testing.T) {
	l := newLab(t).over(multicast)
	l.apply(l.lanYAML("seen", 1085, []string{"seen-1", "seen-2"}))
	l.apply(l.lanYAML("seen-broken", 1086, []string{"seen-3"}, "vxlanDevMap: {worker2: eth7}"))
	l.ready("seen")
	l.start(pod("seen-1", worker1, "seen-1"))
	l.awaitLAN("seen", "with its pod", func(lan *v1beta1.LAN) bool { return lan.Status.Attached == 1 })
	l.awaitLAN("seen-broken", "Degraded", func(lan *v1beta1.LAN) bool {
		return lan.Status.State == v1beta1.StateDegraded
	})

	out := l.k8slan(0, "status", "seen")
	if !containsAll(out, []string{
		l.namespace + "/seen  Ready  vni 1085, multicast, 2/2 nodes, 2 spokes, 1 attached",
		l.namespace + "/seen-1", "free: seen-2", worker1, worker2, "eth1",
	}) {
		t.Errorf("kubectl k8slan status prints\n%s", out)
	}
	out = l.k8slan(1, "status")
	if !containsAll(out, []string{
		"/seen  Ready", "/seen-broken  Degraded UnderlayMissing",
		`no device "eth7" (spec.vxlanDevMap.worker2)`,
	}) {
		t.Errorf("kubectl k8slan status of a degraded LAN prints\n%s", out)
	}
	if out := l.k8slan(1, "status", "nowhere"); !strings.Contains(out,
		"there is no LAN nowhere in namespace "+l.namespace) {
		t.Errorf("kubectl k8slan status of a missing LAN prints\n%s", out)
	}
	if out := l.k8slan(2, "status", "--as", "guest"); !strings.Contains(out, "forbidden") {
		t.Errorf("kubectl k8slan status for a user without rights prints\n%s", out)
	}
}

// capturing is a capture that runs.
type capturing struct {
	*exec.Cmd
	stdout bytes.Buffer
	stderr chan string // all of standard error, at its end
}

func (l lab) capture(args ...string) *capturing {
	l.Helper()
	c := &capturing{
		Cmd:    l.plugin(context.Background(), append([]string{"capture"}, args...)...),
		stderr: make(chan string, 1),
	}
	c.Stdout = &c.stdout
	stderr, err := c.StderrPipe()
	if err != nil {
		l.Fatal(err)
	}
	if err := c.Start(); err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { _ = c.Process.Kill() }) // it fails if the capture has ended
	lines := bufio.NewScanner(stderr)
	if !lines.Scan() || !strings.HasPrefix(lines.Text(), "capturing ") {
		l.Fatalf("kubectl k8slan capture prints %q", lines.Text())
	}
	go func() {
		var all strings.Builder
		for lines.Scan() {
			all.WriteString(lines.Text() + "\n")
		}
		c.stderr <- all.String()
	}()
	return c
}

// framesOf reads a pcap file with nanoseconds.
func framesOf(t *testing.T, pcap []byte) (frames []string) {
	t.Helper()
	if len(pcap) < 24 || binary.LittleEndian.Uint32(pcap) != 0xa1b23c4d {
		t.Fatalf("%d bytes are not a pcap file", len(pcap))
	}
	for rest := pcap[24:]; len(rest) > 0; {
		if len(rest) < 16 || len(rest) < 16+int(binary.LittleEndian.Uint32(rest[8:])) {
			t.Fatalf("the last frame of the pcap file is cut short: %x", rest)
		}
		length := 16 + int(binary.LittleEndian.Uint32(rest[8:]))
		frames = append(frames, hex.EncodeToString(rest[16:length]))
		rest = rest[length:]
	}
	return frames
}

func TestCaptureWritesTheFramesOfASpoke(t *testing.T) {
	l := newLab(t)
	l.lan("caught", 1087, []string{"caught-1", "caught-2", "caught-3"})
	both := l.start(pod("caught-1", worker1, "caught-1"), pod("caught-2", worker2, "caught-2"))
	one, two := both[0], both[1]
	l.awaitSegment(worker1, "caught", "with its pod", func(s v1beta1.SegmentStatus) bool {
		return len(s.Attachments) == 1
	})
	begin := time.Now()
	c := l.capture("caught-1")
	l.logTime("until the capture had started", begin)
	crosses(one, two)
	crosses(two, one) // a frame that has arrived is in the capture
	if err := c.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	stderr := <-c.stderr
	if err := c.Wait(); err != nil {
		t.Errorf("kubectl k8slan capture: %v", err)
	}
	if !strings.Contains(stderr, " frames, 0 more were dropped") {
		t.Errorf("kubectl k8slan capture ends with %q", stderr)
	}
	got := framesOf(t, c.stdout.Bytes())
	for _, from := range both {
		for _, f := range frames.Catalog(from.mac, from.mtu) {
			if (f.Passes || from.pod == one.pod) && !slices.Contains(got, hexed(f.Bytes)) {
				t.Errorf("%s from %s is not in the capture", f.Name, from)
			}
		}
	}

	killed := l.capture("caught-1")
	if err := killed.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	l.machine(worker1).until("the end of the capture of a killed plugin", func() bool {
		return !strings.Contains(l.machine(worker1).run("sh", "-c",
			"cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"), "capture --ns="+l.namespace+".caught")
	})

	const hint = "give --node to capture at its port on a node"
	if out := l.k8slan(2, "capture", "caught-3"); !strings.Contains(out, hint) {
		t.Errorf("a capture of a free spoke prints %s", out)
	}
	if out := l.k8slan(2, "capture", "never"); !strings.Contains(out, "no LAN has a spoke never") {
		t.Errorf("a capture of a missing spoke prints %s", out)
	}
	l.kubectl("create", "serviceaccount", "viewer")
	l.kubectl("create", "clusterrolebinding", l.namespace, "--clusterrole=view",
		"--serviceaccount="+l.namespace+":viewer")
	l.kubectlAfterwards("delete", "clusterrolebinding", l.namespace)
	if out := l.k8slan(2, "capture", "caught-1", "--as",
		"system:serviceaccount:"+l.namespace+":viewer"); !containsAll(out,
		[]string{"forbidden", "pods/exec", "k8slan-system"}) {
		t.Errorf("a capture by a user with role view prints %s", out)
	}
}

// kubectlAfterwards runs kubectl after the test.
func (l lab) kubectlAfterwards(args ...string) {
	l.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := l.bed.Kubectl(ctx, args...); err != nil {
			l.Error(err)
		}
	})
}
