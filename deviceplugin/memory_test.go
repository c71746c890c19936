//go:build !race

package deviceplugin_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"

	"github.com/k8slan/k8slan/deviceplugin"
)

// kubeletEnv names a directory. The test binary then runs a fake kubelet there, in a process of its own, so that the
// kubelet's memory is not counted. It reads numbers from standard input, the first of which is zero, and prints a line
// each time it lists that many resources. It ends when its standard input ends.
const kubeletEnv = "K8SLAN_TEST_KUBELET"

func TestMain(m *testing.M) {
	if dir := os.Getenv(kubeletEnv); dir != "" {
		kubelet, err := newFakeKubelet(dir)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			number, err := strconv.Atoi(lines.Text())
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			kubelet.awaitNumber(number)
			fmt.Println(number)
		}
		kubelet.stop()
		return
	}
	os.Exit(m.Run())
}

// awaitNumber waits until that many resources are connected and listed.
func (k *fakeKubelet) awaitNumber(number int) {
	for {
		k.mu.Lock()
		changed, listed := k.changed, 0
		for _, r := range k.seen {
			if r.Connected && len(r.Devices) == 1 {
				listed++
			}
		}
		k.mu.Unlock()
		if listed == number {
			return
		}
		<-changed
	}
}

// startKubeletProcess starts a fake kubelet, and returns a function that waits until it lists a number of resources.
func startKubeletProcess(t *testing.T, dir string) (await func(number int)) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), kubeletEnv+"="+dir)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("kubelet process: %v", err)
		}
	})
	answers := bufio.NewReader(stdout)
	await = func(number int) {
		t.Helper()
		if _, err := fmt.Fprintln(stdin, number); err != nil {
			t.Fatal(err)
		}
		if _, err := answers.ReadString('\n'); err != nil {
			t.Fatalf("kubelet process: %v", err)
		}
	}
	await(0)
	return await
}

// resident returns the process's resident memory in bytes, after a garbage collection.
func resident(t *testing.T) int64 {
	t.Helper()
	debug.FreeOSMemory()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		var kilobytes int64
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kilobytes); err == nil {
			return kilobytes << 10
		}
	}
	t.Fatal("no VmRSS in /proc/self/status")
	return 0
}

func TestASpokeCostsAtMost60KiB(t *testing.T) {
	const number, limit = 1000, 60 << 10
	dir := pluginDir(t)
	await := startKubeletProcess(t, dir)
	spokes := []deviceplugin.Spoke{{Name: "first", Healthy: true}}
	plugins, _ := run(t, dir, spokes...)
	await(1)
	before := resident(t)
	for n := range number {
		spokes = append(spokes, deviceplugin.Spoke{Name: fmt.Sprint("s", n), Healthy: true})
	}
	plugins.Set(spokes)
	await(1 + number)
	each := (resident(t) - before) / number
	t.Logf("%d bytes for each of %d spokes", each, number)
	if each > limit {
		t.Errorf("a spoke costs %d bytes, want at most %d", each, limit)
	}
}
