package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	podresources "k8s.io/kubelet/pkg/apis/podresources/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/deviceplugin"
	"github.com/k8slan/k8slan/test/netlab"
)

// kubeletCost measures B7: what it costs to advertise spokes to a real kubelet. It needs no API server: kubelet runs
// alone, with a real container runtime that has nothing to run.
func kubeletCost(t *testing.T, b *bench) {
	spokes := times(1000, 20)
	k := startKubelet(t)
	p := startPlugins(t)
	p.advertise(t, 1)
	k.awaitListed(t, 1)
	before, after := p.memory(t), int64(0)

	var each, ours, kubelets samples
	for round := range times(5, 1) {
		if round > 0 {
			p.advertise(t, 1)
			k.awaitListed(t, 1)
		}
		began, oursBefore, kubeletsBefore := time.Now(), work(t, p.process), work(t, k.process)
		p.advertise(t, spokes)
		k.awaitListed(t, spokes)
		per := func(d time.Duration) float64 { return milliseconds(d) / float64(spokes) }
		each = append(each, per(time.Since(began)))
		ours = append(ours, per(work(t, p.process)-oursBefore))
		kubelets = append(kubelets, per(work(t, k.process)-kubeletsBefore))
		if round == 0 {
			after = p.memory(t)
		}
	}
	b.atMost("B7-time", fmt.Sprintf("%d spokes advertised until kubelet lists them, each, in ms", spokes),
		each.median(), 0.6,
		fmt.Sprintf("middle half %s ms, %d rounds; the daemon worked for %v ms, kubelet for %v ms",
			each.spread(), len(each), round(ours.median()), round(kubelets.median())))

	idle := time.Duration(times(20, 1)) * time.Second
	calls, written := p.idle(t, idle), k.checkpoints(t)
	calls = p.idle(t, idle) - calls
	written = k.checkpoints(t) - written
	b.atMost("B7-idle", "messages per second while nothing happens", float64(calls)/idle.Seconds(), 0,
		fmt.Sprintf("%d reads and writes of the daemon in %v; kubelet wrote its checkpoint %d times",
			calls, idle, written))

	b.atMost("B7-memory", "memory of the daemon for each spoke, in KB",
		float64(after-before)/float64(spokes-1)/1000, 60,
		fmt.Sprintf("%.1f MB resident with %d spokes, %.1f MB with one",
			float64(after)/1e6, spokes, float64(before)/1e6))
}

// spokesRole makes the test binary a process that only advertises spokes, so that their cost is counted alone. It
// advertises as many spokes as a line of its input says, and answers with a line when all are registered. To any other
// line it answers with its resident memory in bytes after a garbage collection.
const spokesRole = "K8SLAN_TEST_SPOKES"

func advertiseSpokes(in io.Reader, out io.Writer) int {
	plugins := deviceplugin.New(deviceplugin.Dir, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- plugins.Run(ctx) }()
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	for lines := bufio.NewScanner(in); lines.Scan(); {
		number, err := strconv.Atoi(lines.Text())
		if err != nil {
			runtime.GC() // one collection leaves the content of sync.Pools
			debug.FreeOSMemory()
			fmt.Fprintln(out, resident(os.Getpid()))
			continue
		}
		offer := make([]deviceplugin.Spoke, number)
		for i := range offer {
			offer[i] = deviceplugin.Spoke{Name: fmt.Sprint("s", i), Healthy: true}
		}
		plugins.Set(offer)
		for again.Reset(time.Millisecond); plugins.Ready() != nil; {
			<-again.C
		}
		again.Stop()
		fmt.Fprintln(out, number)
	}
	cancel()
	if err := <-ended; err != nil {
		fmt.Fprintln(os.Stderr, "device plugins:", err)
		return 1
	}
	return 0
}

// resident returns a process's resident memory in bytes.
func resident(pid int) int64 {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(status)) {
		var kilobytes int64
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kilobytes); err == nil {
			return kilobytes << 10
		}
	}
	return 0
}

// plugins is the process that advertises spokes.
type plugins struct {
	process *os.Process
	in      io.Writer
	out     *bufio.Reader
}

func startPlugins(t *testing.T) *plugins {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), spokesRole+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("device plugins: %v", err)
		}
	})
	return &plugins{process: cmd.Process, in: in, out: bufio.NewReader(out)}
}

func (p *plugins) send(t *testing.T, line string) int64 {
	t.Helper()
	_, err := fmt.Fprintln(p.in, line)
	must(t, err)
	answer, err := p.out.ReadString('\n')
	must(t, err)
	bytes, err := strconv.ParseInt(strings.TrimSpace(answer), 10, 64)
	must(t, err)
	return bytes
}

func (p *plugins) advertise(t *testing.T, spokes int) {
	t.Helper()
	p.send(t, strconv.Itoa(spokes))
}

func (p *plugins) memory(t *testing.T) int64 {
	t.Helper()
	return p.send(t, "memory")
}

// idle waits that long and returns how many reads and writes the process has done since it started.
func (p *plugins) idle(t *testing.T, long time.Duration) (calls int64) {
	t.Helper()
	timer := time.NewTimer(long)
	defer timer.Stop()
	<-timer.C
	counts, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", p.process.Pid))
	must(t, err)
	for line := range strings.Lines(string(counts)) {
		var n int64
		for _, format := range []string{"syscr: %d", "syscw: %d"} {
			if _, err := fmt.Sscanf(line, format, &n); err == nil {
				calls += n
			}
		}
	}
	return calls
}

// work returns the processor time that a process has used.
func work(t *testing.T, p *os.Process) time.Duration {
	t.Helper()
	var all time.Duration
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.Pid))
	must(t, err)
	for _, task := range tasks {
		stat, _ := os.ReadFile(task) // of a thread that may have ended
		var ns int64
		if _, err := fmt.Sscan(string(stat), &ns); err == nil {
			all += time.Duration(ns)
		}
	}
	return all
}

// kubelet is a kubelet without an API server.
type kubelet struct {
	process   *os.Process
	resources podresources.PodResourcesListerClient
	log       string
	written   time.Time // the last known modification time of the checkpoint
	writes    int
}

// startKubelet starts kubelet and its container runtime, with directories of their own in place of the machine's.
func startKubelet(t *testing.T) *kubelet {
	t.Helper()
	kubernetes, err := netlab.Component(t.Context(), "kubernetes")
	must(t, err)
	containerd, err := netlab.Component(t.Context(), "containerd")
	must(t, err)
	dir := t.TempDir()
	ownFolders(t, dir)
	ownSysctls(t, dir)

	containerdConfig := filepath.Join(dir, "containerd.toml")
	must(t, os.WriteFile(containerdConfig, []byte("version = 3\n"), 0o600))
	path := "PATH=" + containerd + ":" + os.Getenv("PATH")
	runtimeLog := filepath.Join(dir, "containerd.log")
	start(t, runtimeLog, path, filepath.Join(containerd, "containerd"), "--config="+containerdConfig)
	const runtimeSocket = "/run/containerd/containerd.sock"
	awaitSocket(t, runtimeSocket, filepath.Join(dir, "containerd.log"))

	kubeletConfig := filepath.Join(dir, "kubelet.yaml")
	must(t, os.WriteFile(kubeletConfig, []byte(`
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://`+runtimeSocket+`
enableServer: false
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
makeIPTablesUtilChains: false
resolvConf: ""
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}
`), 0o600))
	log := filepath.Join(dir, "kubelet.log")
	process := start(t, log, path, filepath.Join(kubernetes, "kubelet"),
		"--config="+kubeletConfig, "--hostname-override=bench")
	awaitSocket(t, filepath.Join(deviceplugin.Dir, "kubelet.sock"), log)
	const resources = "/var/lib/kubelet/pod-resources/kubelet.sock"
	awaitSocket(t, resources, log)
	conn, err := grpc.NewClient("unix:"+resources, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return &kubelet{process: process, resources: podresources.NewPodResourcesListerClient(conn), log: log}
}

// ownFolders mounts a /var/lib and a /var/log on disk, where a node's kubelet has its own, too, and shows the machine's
// /sys, which has the control groups.
func ownFolders(t *testing.T, dir string) {
	t.Helper()
	for _, folder := range []string{"/var/lib", "/var/log"} {
		own := filepath.Join(dir, filepath.Base(folder))
		must(t, os.Mkdir(own, 0o755))
		must(t, unix.Mount(own, folder, "", unix.MS_BIND, ""))
		t.Cleanup(func() {
			if err := unix.Unmount(folder, unix.MNT_DETACH); err != nil {
				t.Errorf("unmount %s: %v", folder, err)
			}
		})
	}
	must(t, unix.Unmount("/sys", unix.MNT_DETACH)) // the one of the test's network namespace, on top of it
	t.Cleanup(func() {
		if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_NODEV, ""); err != nil {
			t.Errorf("mount sysfs: %v", err)
		}
	})
}

// ownSysctls mounts files of the test over the settings that a kubelet would change for the whole machine
// (setupKernelTunables in pkg/kubelet/cm/container_manager_linux.go).
func ownSysctls(t *testing.T, dir string) {
	t.Helper()
	for _, name := range []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	} {
		setting := filepath.Join("/proc/sys", name)
		value, err := os.ReadFile(setting)
		must(t, err)
		own := filepath.Join(dir, filepath.Base(name))
		must(t, os.WriteFile(own, value, 0o644))
		must(t, unix.Mount(own, setting, "", unix.MS_BIND, ""))
		t.Cleanup(func() {
			if err := unix.Unmount(setting, unix.MNT_DETACH); err != nil {
				t.Errorf("unmount %s: %v", setting, err)
			}
		})
	}
}

// start starts a program that ends with the test, even if the test is killed.
func start(t *testing.T, log, env, program string, args ...string) *os.Process {
	t.Helper()
	process, _ := startIn(t, func(f func() error) error { return f() }, log, env, program, args...)
	return process
}

// startIn starts a program on the thread on which do runs a function, which lives until the program has ended; stop
// ends it earlier.
func startIn(
	t *testing.T, do func(func() error) error, log, env, program string, args ...string,
) (process *os.Process, stop func()) {
	t.Helper()
	out, err := os.Create(log)
	must(t, err)
	defer out.Close()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), env)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // the program would end with the thread that started it
		defer runtime.UnlockOSThread()
		err := do(func() error {
			err := cmd.Start()
			started <- err
			if err == nil {
				_ = cmd.Wait() // the program is killed
			}
			return nil
		})
		if err != nil {
			started <- err
		}
	}()
	must(t, <-started)
	stop = func() {
		_ = cmd.Process.Kill() // it may have ended
		<-ended
	}
	t.Cleanup(stop)
	return cmd.Process, stop
}

// awaitSocket returns when a program listens on the socket.
func awaitSocket(t *testing.T, socket, log string) {
	t.Helper()
	late := time.After(time.Minute)
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			conn.Close()
			return
		}
		select {
		case <-again.C:
		case <-late:
			t.Fatalf("nothing listens at %s after a minute: %v\n%s", socket, err, tail(log))
		}
	}
}

func tail(log string) string {
	text, _ := os.ReadFile(log)
	const most = 4000
	return string(text[max(0, len(text)-most):])
}

// awaitListed returns when kubelet can allocate that many spokes.
func (k *kubelet) awaitListed(t *testing.T, spokes int) {
	t.Helper()
	late := time.After(time.Minute)
	again := time.NewTicker(20 * time.Millisecond) // kubelet answers at most a hundred requests a second
	defer again.Stop()
	for {
		answer, err := k.resources.GetAllocatableResources(t.Context(), &podresources.AllocatableResourcesRequest{})
		have := 0
		for _, d := range answer.GetDevices() {
			if strings.HasPrefix(d.GetResourceName(), v1beta1.Resource("")) {
				have += len(d.GetDeviceIds())
			}
		}
		if err == nil && have == spokes {
			return
		}
		select {
		case <-again.C:
		case <-late:
			t.Fatalf("kubelet lists %d spokes after a minute, want %d: %v\n%s", have, spokes, err, tail(k.log))
		}
	}
}

// checkpoints returns how often kubelet has written its checkpoint, as far as this was called in between; kubelet
// writes it with each message of a plugin.
func (k *kubelet) checkpoints(t *testing.T) int {
	t.Helper()
	info, err := os.Stat(filepath.Join(deviceplugin.Dir, "kubelet_internal_checkpoint"))
	if errors.Is(err, os.ErrNotExist) {
		return k.writes
	}
	must(t, err)
	if !info.ModTime().Equal(k.written) {
		k.written = info.ModTime()
		k.writes++
	}
	return k.writes
}
