package e2e

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	podresources "k8s.io/kubelet/pkg/apis/podresources/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/cluster"
	"github.com/k8slan/k8slan/test/netlab"
)

// The nodes.
const (
	worker1 = "worker1"
	worker2 = "worker2"
)

// machine is one of the nodes, without Kubernetes.
type machine struct {
	*cluster.Node
	lab
}

// machines returns both nodes.
func (l lab) machines() []machine { return []machine{l.machine(worker1), l.machine(worker2)} }

func (l lab) machine(name string) machine { return machine{l.bed.Cluster.Node(name), l} }

// String is the node's name.
func (m machine) String() string { return m.Name }

// powerOff cuts the node's power. After the test the node has power again and no taint, even if the test fails, because
// the next test needs two nodes.
func (m machine) powerOff(ctx context.Context) {
	m.Helper()
	m.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
		defer cancel()
		if err := errors.Join(m.PowerOn(ctx), m.bed.taint(ctx, m.Name)); err != nil {
			m.Errorf("switch %s on again: %v", m, err)
		}
	})
	if err := m.PowerOff(ctx); err != nil {
		m.Fatal(err)
	}
}

// powerOn gives the node power again, and returns when it is Ready.
func (m machine) powerOn(ctx context.Context) {
	m.Helper()
	if err := m.PowerOn(ctx); err != nil {
		m.Fatal(err)
	}
}

// afterwards runs a command in the node after the test.
func (m machine) afterwards(command ...string) {
	m.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := m.Exec(ctx, command...); err != nil {
			m.Error(err)
		}
	})
}

// run runs a command in the node.
func (m machine) run(command ...string) string {
	m.Helper()
	ctx, cancel := context.WithTimeout(m.Context(), patience)
	defer cancel()
	out, err := m.Exec(ctx, command...)
	if err != nil {
		m.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// ownNetns returns the node's own network namespace.
func (m machine) ownNetns() netlab.Namespace {
	m.Helper()
	path, err := m.Netns()
	if err != nil {
		m.Fatal(err)
	}
	return netlab.At(path)
}

// path translates a path in the node to one of this machine.
func (m machine) path(inNode string) string {
	m.Helper()
	process := strings.TrimSuffix(m.ownNetns().Path, "/ns/net")
	return filepath.Join(process, "root", inNode)
}

// lanNetns returns a LAN's network namespace on the node.
func (m machine) lanNetns(ns string) netlab.Namespace {
	return netlab.At(m.path("/run/k8slan/netns/" + ns))
}

// files lists a directory of the node; none if it does not exist.
func (m machine) files(dir string) []string {
	m.Helper()
	entries, err := os.ReadDir(m.path(dir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// awaitLinks returns when the links in a LAN's network namespace fit.
func (m machine) awaitLinks(ns, what string, fits func(linkList) bool) {
	m.Helper()
	fd, err := vnetns.GetFromPath(m.lanNetns(ns).Path)
	if err != nil {
		m.Fatalf("open network namespace %s of %s: %v", ns, m, err)
	}
	defer fd.Close()
	updates, done := make(chan netlink.LinkUpdate, 1024), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribeAt(fd, updates, done); err != nil {
		m.Fatal(err)
	}
	handle, err := netlink.NewHandleAt(fd)
	if err != nil {
		m.Fatal(err)
	}
	defer handle.Close()
	deadline := time.After(patience)
	for {
		links, err := handle.LinkList()
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			m.Fatal(err)
		}
		if fits(links) {
			return
		}
		select {
		case <-updates:
		case <-deadline:
			m.Fatalf("waited for %s in %s of %s; there are %v", what, ns, m, linkList(links))
		}
	}
}

// linkList is the links in a network namespace.
type linkList []netlink.Link

// have says whether links of all these names exist.
func (l linkList) have(names ...string) bool {
	return !slices.ContainsFunc(names, func(name string) bool { return l.link(name) == nil })
}

// link returns the link of that name, nil if there is none.
func (l linkList) link(name string) netlink.Link {
	for _, link := range l {
		if link.Attrs().Name == name {
			return link
		}
	}
	return nil
}

// up says whether the link of that name is up.
func (l linkList) up(name string) bool {
	link := l.link(name)
	return link != nil && link.Attrs().Flags&net.FlagUp != 0
}

// String lists the links.
func (l linkList) String() string {
	var names []string
	for _, link := range l {
		names = append(names, link.Attrs().Name)
	}
	return strings.Join(names, " ")
}

// until asks again and again until the answer is yes. It is for states whose change is not an event anywhere.
func (m machine) until(what string, fits func() bool) {
	m.Helper()
	again, deadline := time.NewTicker(50*time.Millisecond), time.After(patience)
	defer again.Stop()
	for !fits() {
		select {
		case <-again.C:
		case <-deadline:
			m.Fatalf("waited for %s on %s", what, m)
		}
	}
}

// sandboxGone says whether the runtime no longer runs any part of a pod. The sandbox is the last part; it ends after
// CNI DEL.
func (m machine) sandboxGone(uid string) bool {
	m.Helper()
	return len(m.tasks(uid)) == 0
}

// tasks returns the runtime's IDs of the sandbox and the containers that a pod still has.
func (m machine) tasks(uid string) (ids []string) {
	m.Helper()
	configs, err := filepath.Glob(m.path("/run/containerd/io.containerd.runtime.v2.task/k8s.io/*/config.json"))
	if err != nil {
		m.Fatal(err)
	}
	for _, path := range configs {
		config, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			m.Fatal(err)
		}
		if strings.Contains(string(config), uid) {
			ids = append(ids, filepath.Base(filepath.Dir(path)))
		}
	}
	return ids
}

// freeze keeps a pod's containers from ending until thaw is called or the test ends. It stops the shim, through which
// the runtime ends them.
func (m machine) freeze(uid string) (thaw func()) {
	m.Helper()
	shim := "containerd-shim.* -id (" + strings.Join(m.tasks(uid), "|") + ") "
	m.run("pkill", "-STOP", "-f", shim)
	thaw = sync.OnceFunc(func() { m.run("pkill", "-CONT", "-f", shim) })
	m.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_, _ = m.Exec(ctx, "pkill", "-CONT", "-f", shim) // a test that has failed may not leave one
	})
	return thaw
}

// awaitSandboxGone returns when the runtime no longer runs any part of a pod.
func (m machine) awaitSandboxGone(uid string) {
	m.Helper()
	m.until("the end of the sandbox of pod "+uid, func() bool { return m.sandboxGone(uid) })
}

// tapOwner returns user and group of the only tap in the /dev of the process with that command line.
func (m machine) tapOwner(command string) string {
	m.Helper()
	return m.run("sh", "-ec", `stat -c %u:%g /proc/$(pgrep -o -f "`+command+`")/root/dev/tap*`)
}

// daemon returns the process ID of k8slan's daemon in the node.
func (m machine) daemon() string {
	m.Helper()
	return m.run("pgrep", "-o", "-f", "^/k8slan node")
}

// indexes returns the indexes of the links in a LAN's network namespace.
func (m machine) indexes(ns string) map[string]int {
	m.Helper()
	fd, err := vnetns.GetFromPath(m.lanNetns(ns).Path)
	if err != nil {
		m.Fatal(err)
	}
	defer fd.Close()
	handle, err := netlink.NewHandleAt(fd)
	if err != nil {
		m.Fatal(err)
	}
	defer handle.Close()
	links, err := handle.LinkList()
	if err != nil {
		m.Fatal(err)
	}
	all := map[string]int{}
	for _, l := range links {
		all[l.Attrs().Name] = l.Attrs().Index
	}
	return all
}

// allocatable returns how many spokes with names of that prefix kubelet can allocate or has allocated; -1 while it does
// not answer.
func (m machine) allocatable(ctx context.Context, prefix string) int {
	m.Helper()
	conn, err := grpc.NewClient("unix:"+m.path("/var/lib/kubelet/pod-resources/kubelet.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		m.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	answer, err := podresources.NewPodResourcesListerClient(conn).GetAllocatableResources(ctx,
		&podresources.AllocatableResourcesRequest{})
	if err != nil {
		return -1
	}
	count := 0
	for _, d := range answer.GetDevices() {
		if strings.HasPrefix(d.GetResourceName(), v1beta1.Resource(prefix)) {
			count += len(d.GetDeviceIds())
		}
	}
	return count
}

// awaitSocket returns when a socket of the node was created after that time.
func (m machine) awaitSocket(path string, after time.Time) (made time.Time) {
	m.Helper()
	m.until("socket "+path, func() bool {
		info, err := os.Stat(m.path(path))
		if err != nil {
			return false
		}
		made = info.ModTime()
		return made.After(after)
	})
	return made
}
