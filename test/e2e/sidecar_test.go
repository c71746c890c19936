package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/k8slan/k8slan/build/image"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/cluster/install"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/images"
	"github.com/k8slan/k8slan/test/netlab"
)

// k8slan is not installed on the cluster. The examples and commands are those of the documentation.
func TestSidecars(t *testing.T) {
	l := newLab(t)
	l.reinstall()
	ctx, cancel := context.WithTimeout(t.Context(), 12*patience)
	defer cancel()
	l.helm(ctx, "uninstall", install.Release, "--namespace", install.Namespace)
	l.apart(map[string]func(lab){
		"kubelan's configuration":        lab.kubelanIsReplaced,
		"no right to endpoints":          lab.sidecarHasNoRight,
		"kubelan's program":              lab.kubelansProgram,
		"a Deployment with strict peers": lab.deploymentOfSidecars,
		"two LANs in one pod":            lab.twoSidecars,
		"over IPv6":                      lab.sidecarsOverIPv6,
		"a mistake in the configuration": lab.sidecarIsMisconfigured,
	})
	t.Run("the API server is away", func(t *testing.T) { l.fresh(t).sidecarsHaveNoAPIServer() })
	for _, m := range l.machines() {
		m.wantsClean()
	}
}

// logSidecars logs what the sidecars have logged, if the test fails.
func (l lab) logSidecars() {
	l.Cleanup(func() {
		if !l.Failed() {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		out, err := l.bed.Kubectl(ctx, "logs", "--namespace", l.namespace, "--selector", appLabel, "--all-containers",
			"--prefix", "--tail=60")
		l.Logf("--- sidecars (%v)\n%s", err, out)
	})
}

// kubelan fills in a manifest like those of kubelan's users.
type kubelan struct {
	Namespace string
	Replicas  int
	Program   string // the line that starts it in the sidecar's container
	Level     string // of its log
	Change    bool   // whether it has a hook for changes of peers
	Rights    bool   // whether it may read EndpointSlices
}

// asSidecar is the only line, beside the image's name, that differs from a manifest for kubelan.
const asSidecar = "args: [sidecar]"

func (l lab) kubelan(k kubelan) {
	l.Helper()
	k.Namespace = l.namespace
	l.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := l.bed.Kubectl(ctx, "delete", "--ignore-not-found", "clusterrole/kubelan-"+l.namespace,
			"clusterrolebinding/kubelan-"+l.namespace); err != nil {
			l.Error(err)
		}
	})
	l.apply(l.here(l.manifest("kubelan", k)))
}

// example returns a manifest of the documentation.
func (l lab) example(path string) string {
	l.Helper()
	content, err := os.ReadFile(filepath.Join("../..", path))
	if err != nil {
		l.Fatal(err)
	}
	return l.here(string(content))
}

// accounts finds the service account of an example, which has the name that is the label of its pods.
var accounts = regexp.MustCompile(`(?m)^      serviceAccountName: (.*)$`)

// here changes a manifest to the images of the cluster, and spreads its pods over both nodes.
func (l lab) here(manifest string) string {
	manifest = accounts.ReplaceAllString(manifest, `$0
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: DoNotSchedule
        labelSelector: {matchLabels: {app: $1}}`)
	return strings.NewReplacer("image: "+image.Repository+"\n", "image: "+l.bed.Image()+"\n", "image: alpine\n",
		"image: "+images.ToolboxName+"\n").Replace(manifest)
}

// documented runs the first commands of docs/sidecar.md that apply an example.
func (l lab) documented() {
	l.Helper()
	text, err := os.ReadFile("../../docs/sidecar.md")
	l.try(err)
	_, commands, ok := strings.Cut(string(text), "```\nkubectl apply -f ")
	commands, _, closed := strings.Cut(commands, "```")
	if !ok || !closed {
		l.Fatal("docs/sidecar.md has no commands")
	}
	path, commands, _ := strings.Cut(commands, "\n")
	l.apply(l.example(path))
	for command := range strings.Lines(commands) {
		l.Log(command, l.kubectl(strings.Fields(command)[1:]...))
	}
}

// member returns the host of a pod that is in the LAN through a sidecar. Its commands run in the container beside.
func (l lab) member(name, link string) host {
	l.Helper()
	s := l.appContainer(name)
	s.awaitHealth()
	s.link = link
	s.readLink()
	return s
}

// appContainer returns the container beside a pod's sidecar.
func (l lab) appContainer(name string) host {
	l.Helper()
	p := l.awaitRunning(name)
	return host{lab: l, pod: p.Name, node: p.Spec.NodeName, uid: string(p.UID), container: "app"}
}

// awaitHealth returns when the pod's sidecar reports that it is healthy.
func (s host) awaitHealth() {
	s.Helper()
	s.machine(s.node).until("health of "+s.String(), func() bool {
		code, _ := s.health()
		return code == http.StatusNoContent
	})
}

// members returns the pods of a StatefulSet.
func (l lab) members(set, link string, count int) (all []host) {
	l.Helper()
	for i := range count {
		all = append(all, l.member(fmt.Sprintf("%s-%d", set, i), link))
	}
	if all[0].node == all[1].node {
		l.Fatalf("%s and %s are on one node", all[0], all[1])
	}
	return all
}

// allReach wants each host to reach every other by ARP and by ping.
func allReach(all []host, address func(i int) string) {
	all[0].Helper()
	for i, s := range all {
		var others []string
		for j := range all {
			if i != j {
				others = append(others, address(j))
			}
		}
		s.sh("for a in %s; do arping -f -w 20 -I %s $a; ping -c 1 -W 5 $a; done", strings.Join(others, " "), s.link)
	}
}

// ordinalAddress returns the address of a StatefulSet's pod.
func ordinalAddress(i int) string { return fmt.Sprintf("192.168.69.%d", i+1) }

// scaleSet scales a StatefulSet, and returns when it has that number of pods.
func (l lab) scaleSet(set string, from, to int) {
	l.Helper()
	l.kubectl("scale", "statefulset", set, "--replicas", strconv.Itoa(to))
	l.kubectl("rollout", "status", "statefulset", set)
	for i := to; i < from; i++ {
		l.awaitPodGone(fmt.Sprintf("%s-%d", set, i))
	}
}

// scales scales a StatefulSet of at least two to five and to two. Between the first two, no frame may be lost, flooded
// ones included.
func (l lab) scales(set string, all []host) {
	l.Helper()
	one, two := all[0], all[1]
	flood := startFlood(two, one)
	losesNothing(one, two, func() {
		l.scaleSet(set, len(all), 5)
		allReach([]host{one, l.member(set+"-4", one.link)}, func(i int) string { return ordinalAddress(4 * i) })
		l.scaleSet(set, 5, 2)
		one.awaitPeers(two)
		two.awaitPeers(one)
	})
	if tally := flood.end(); tally.Lost > 0 {
		l.Errorf("%d flooded frames from %s to %s were lost", tally.Lost, two, one)
	}
}

// process returns the process ID, in the node, of a container's first process.
func (s host) process(container string) string {
	s.Helper()
	m := s.machine(s.node)
	for _, id := range m.tasks(s.uid) {
		dir := "/run/containerd/io.containerd.runtime.v2.task/k8s.io/" + id
		config, err := os.ReadFile(m.path(dir + "/config.json"))
		if err == nil && strings.Contains(string(config), `"io.kubernetes.cri.container-name":"`+container+`"`) {
			return m.run("cat", dir+"/init.pid")
		}
	}
	s.Fatalf("%s has no container %s", s, container)
	return ""
}

// netns returns the pod's network namespace.
func (s host) netns() netlab.Namespace {
	s.Helper()
	return netlab.At(s.machine(s.node).path("/proc/" + s.process(s.inContainer()) + "/ns/net"))
}

// ip returns the pod's address on the cluster's own network.
func (s host) ip() string {
	s.Helper()
	return s.awaitRunning(s.pod).Status.PodIP
}

// awaitPeers returns when the pod sends exactly to these peers.
func (s host) awaitPeers(peers ...host) {
	s.Helper()
	var want []netip.Addr
	for _, p := range peers {
		want = append(want, netip.MustParseAddr(p.ip()))
	}
	slices.SortFunc(want, netip.Addr.Compare)
	ns := s.netns()
	s.machine(s.node).until(fmt.Sprintf("the peers %v of %s", want, s), func() bool {
		return slices.Equal(s.peers(ns), want)
	})
}

func (s host) peers(ns netlab.Namespace) []netip.Addr {
	s.Helper()
	peers := s.remotesIn(ns)
	slices.SortFunc(peers, netip.Addr.Compare)
	return peers
}

// frames returns how many frames the host's link has received.
func (s host) frames() uint64 {
	s.Helper()
	link, err := s.netns().Netlink(s.T).LinkByName(s.link)
	s.lab.try(err)
	return link.Attrs().Statistics.RxPackets
}

// towards returns the addresses to which the pod sends frames for single MACs.
func (s host) towards() (all []string) {
	s.Helper()
	handle := s.netns().Netlink(s.T)
	link, err := handle.LinkByName(s.link)
	s.lab.try(err)
	entries, err := handle.NeighList(link.Attrs().Index, unix.AF_BRIDGE)
	s.lab.try(err)
	for _, e := range entries {
		if e.Flags&netlink.NTF_SELF != 0 && e.HardwareAddr.String() != "00:00:00:00:00:00" {
			all = append(all, e.IP.String())
		}
	}
	return all
}

// health returns the answer of the pod's sidecar to kubelet's probe.
func (s host) health() (code int, body string) {
	s.Helper()
	var c net.Conn
	err := s.netns().Do(func() (err error) {
		c, err = net.DialTimeout("tcp", "127.0.0.1:8181", time.Second)
		return err
	})
	if errors.Is(err, unix.ECONNREFUSED) {
		return 0, "" // it has not started yet
	}
	s.lab.try(err)
	defer c.Close()
	_, err = io.WriteString(c, "GET /health HTTP/1.0\r\n\r\n")
	s.lab.try(err)
	answer, err := http.ReadResponse(bufio.NewReader(c), nil)
	s.lab.try(err)
	defer answer.Body.Close()
	content, err := io.ReadAll(answer.Body)
	s.lab.try(err)
	return answer.StatusCode, string(content)
}

// containers returns all containers of a pod, native sidecars included.
func containers(p *corev1.Pod) []corev1.ContainerStatus {
	return append(slices.Clone(p.Status.InitContainerStatuses), p.Status.ContainerStatuses...)
}

// restartContainer sends a container's process a signal that ends it. Once kubelet has started it again, the function
// returns how it ended.
func (s host) restartContainer(container, signal string) *corev1.ContainerStateTerminated {
	s.Helper()
	var before int32
	is := func(c corev1.ContainerStatus) bool { return c.Name == container }
	if all := containers(s.awaitRunning(s.pod)); slices.ContainsFunc(all, is) {
		before = all[slices.IndexFunc(all, is)].RestartCount
	}
	s.machine(s.node).run("kill", "-"+signal, s.process(container))
	var ended *corev1.ContainerStateTerminated
	s.awaitPod(s.pod, "with its sidecar again", func(p *corev1.Pod) bool {
		c := containers(p)[slices.IndexFunc(containers(p), is)]
		ended = c.LastTerminationState.Terminated
		return c.RestartCount > before && c.Ready && ended != nil
	})
	return ended
}

// killSidecar kills the first pod's sidecar, which does not know yet that the last pod has ended.
func (l lab) killSidecar(set, container string, all []host) {
	l.Helper()
	one, two, last := all[0], all[1], all[len(all)-1]
	gone, ns, index := netip.MustParseAddr(last.ip()), one.netns(), one.index()
	losesNothing(one, two, func() {
		m := l.machine(one.node)
		m.run("kill", "-STOP", one.process(container))
		l.scaleSet(set, len(all), len(all)-1)
		if !slices.Contains(one.peers(ns), gone) || !slices.Contains(one.towards(), gone.String()) {
			l.Errorf("%s sends to %v and, for single MACs, to %v; want %s among both", one, one.peers(ns),
				one.towards(), gone)
		}
		begin := time.Now()
		one.restartContainer(container, "KILL")
		one.awaitPeers(all[1 : len(all)-1]...)
		l.logTime("until a killed sidecar was back and had the right peers", begin)
		if slices.Contains(one.towards(), gone.String()) {
			l.Errorf("%s still sends to %s, which has ended", one, gone)
		}
	})
	if is := one.index(); is != index {
		l.Errorf("the interface was recreated: its index is %s, it was %s", is, index)
	}
	if log := l.kubectl("logs", one.pod, "-c", container); strings.Contains(log, "hook=up") {
		l.Errorf("the up hook has run again:\n%s", log)
	}
}

// stopSidecar stops a pod's sidecar by SIGTERM. It removes its interface; the next sidecar creates another.
func (s host) stopSidecar(container string) {
	s.Helper()
	index := s.index()
	if ended := s.restartContainer(container, "TERM"); ended.ExitCode != 0 {
		s.Errorf("the sidecar of %s ended with %+v", s, ended)
	}
	if log := s.kubectl("logs", s.pod, "-c", container, "--previous"); !strings.Contains(log, "interface removed") {
		s.Errorf("the sidecar of %s does not log that it removed the interface:\n%s", s, log)
	}
	s.machine(s.node).until("another interface of "+s.String(), func() bool {
		is, err := s.try("cat", "/sys/class/net/"+s.link+"/ifindex")
		return err == nil && strings.TrimSpace(is) != index
	})
}

// reload changes the configuration of sidecars, and returns when they have read it.
func (l lab) reload(app, container string, change func(), all ...host) {
	l.Helper()
	change()
	// Kubelet updates the volumes of a changed pod at once, those of others within a minute.
	l.kubectl("annotate", "pods", "--selector", appLabel+"="+app, "--overwrite",
		"k8slan.io/e2e="+strconv.FormatInt(time.Now().UnixNano(), 10))
	for _, s := range all {
		s.container = container
		s.awaitLog("configuration changed")
	}
}

func (l lab) kubelanIsReplaced() {
	l.logSidecars()
	k := kubelan{Replicas: 3, Program: asSidecar, Level: "DEBUG", Rights: true}
	l.kubelan(k)
	l.kubectl("rollout", "status", "statefulset", "kubelan")
	all := l.members("kubelan", "kubelan", 3)
	allReach(all, ordinalAddress)
	l.killSidecar("kubelan", "kubelan", all)
	one, two := all[0], all[1]
	l.scales("kubelan", all[:2])
	index := one.index()
	losesNothing(one, two, func() {
		l.reload("kubelan", "kubelan", func() {
			k.Replicas, k.Level, k.Change = 2, "info", true
			l.kubelan(k)
		}, one, two)
		l.scaleSet("kubelan", 2, 3)
		sidecar := one
		sidecar.container = "kubelan"
		sidecar.awaitLog(fmt.Sprintf("%s/kubelan has %s on kubelan, deleted false", l.namespace,
			l.member("kubelan-2", "kubelan").ip()))
	})
	if is := one.index(); is != index {
		l.Errorf("the interface was recreated: its index is %s, it was %s", is, index)
	}
	two.stopSidecar("kubelan") // the other one was killed already, so kubelet would wait before it starts it again
	allReach(all[:2], ordinalAddress)
}

func (l lab) kubelansProgram() {
	l.logSidecars()
	l.kubelan(kubelan{Replicas: 2, Program: "command: [/usr/local/bin/kubelan]", Level: "WARN", Rights: true})
	l.kubectl("rollout", "status", "statefulset", "kubelan")
	allReach(l.members("kubelan", "kubelan", 2), ordinalAddress)
}

// sidecarHasNoRight gives a sidecar its right long after its start.
func (l lab) sidecarHasNoRight() {
	l.logSidecars()
	whole := l.example("docs/examples/sidecar-statefulset.yaml")
	l.apply(strings.Join(slices.DeleteFunc(strings.Split(whole, "---\n"), func(document string) bool {
		return strings.Contains(document, "kind: RoleBinding\n")
	}), "---\n"))
	p := l.awaitPod("lan-0", "starting its sidecar", func(p *corev1.Pod) bool {
		return len(p.Status.InitContainerStatuses) == 1 && p.Status.InitContainerStatuses[0].State.Running != nil
	})
	sidecar := host{lab: l, pod: p.Name, node: p.Spec.NodeName, uid: string(p.UID), container: "k8slan"}
	const reason = "the pod's service account may not"
	sidecar.awaitLog(reason)
	l.machine(sidecar.node).until("the missing right in health", func() bool { // at first, health reports the interface
		code, body := sidecar.health()
		return code == http.StatusInternalServerError && strings.Contains(body, reason)
	})
	<-time.After(20 * time.Second)
	l.apply(whole)
	begin := time.Now()
	sidecar.awaitHealth()
	l.logTime("until a new right was used", begin)
	if took := time.Since(begin); took > 10*time.Second {
		l.Errorf("a new right was used after %s, want seconds", took)
	}
	l.kubectl("rollout", "status", "statefulset", "lan")
	allReach(l.members("lan", "kubelan", 3), ordinalAddress)
	if log := l.kubectl("logs", sidecar.pod, "-c", "k8slan"); strings.Count(log, reason) != 1 {
		l.Errorf("the missing right is not logged once:\n%s", log)
	}
}

// The test runs the first example of the documentation with its own commands.
func TestNativeSidecarsJoinAStatefulSetToALAN(t *testing.T) {
	l := newLab(t)
	l.logSidecars()
	l.documented()
	all := l.members("lan", "kubelan", 3)
	allReach(all, ordinalAddress)
	l.killSidecar("lan", "k8slan", all)
	all[1].stopSidecar("k8slan") // the other one was killed already, so kubelet would wait before it starts it again
	allReach(all[:2], ordinalAddress)
}

func (l lab) deploymentOfSidecars() {
	l.logSidecars()
	const path = "docs/examples/sidecar-deployment.yaml"
	l.apply(l.example(path))
	all := l.deployed()
	allReach(all, ordinalAddress)
	one, two, three := all[0], all[1], all[2]

	nonMember := l.plain()
	send := nonMember.toVXLAN(one.ip(), 4790, 7001)
	foreign, after := frames.Stream(nil, segment.MAC(segment.LAN{}, "nonmember"), 66, 1),
		frames.Stream(nil, two.mac, 1, 0)
	receives := func(what string, do func(), want []byte) {
		l.Helper()
		listener := one.listen("listen", "--for", "20s", "--count", "1", "--marker", frames.Marker)
		do()
		received, err := listener.all()
		if err != nil || len(received) != 1 || received[0] != hexed(want) {
			l.Errorf("%s: received %v, %v; want %s", what, received, err, hexed(want))
		}
	}
	const packets = 10
	receives("frames of a non-member and then of a peer", func() {
		for range packets {
			send(foreign)
		}
		l.machine(one.node).until("the dropped packets", func() bool { return one.dropped() == packets })
		two.run("frames", "-i", two.link, "stream", "send", "--count", "1")
	}, after)
	// One pod leaves the Service and continues to run.
	flood := "frames -i lan0 stream send %s --count 0 --rate 1000 >/tmp/sent 2>&1 & echo $! >/tmp/sender"
	one.sh(flood, "")
	two.sh(flood, "--dst "+three.mac.String())
	before := three.frames()
	l.machine(three.node).until("frames", func() bool { return three.frames() > before })
	left := netip.MustParseAddr(three.ip())
	l.kubectl("label", "pod", three.pod, appLabel+"-")
	<-time.After(time.Second)
	before = three.frames()
	<-time.After(time.Second)
	if more := three.frames() - before; more > 0 {
		l.Errorf("%d frames arrived at %s in the second second after it left", more, three)
	}
	for _, s := range []host{one, two} {
		s.sh("kill -INT $(cat /tmp/sender)")
		if slices.Contains(s.peers(s.netns()), left) {
			l.Errorf("%s still has %s as a peer", s, left)
		}
	}

	index := one.index()
	losesNothing(two, one, func() {
		l.reload("peers", "k8slan", func() {
			l.apply(strings.Replace(l.example(path), "strict_peers: true", "strict_peers: false", 1))
		}, one)
	})
	receives("a frame of a non-member without strict peers", func() { send(foreign) }, foreign)
	if is := one.index(); is != index {
		l.Errorf("the interface was recreated: its index is %s, it was %s", is, index)
	}

	l.kubectl("rollout", "restart", "deployment", "peers")
	again := l.deployed()
	for _, s := range again {
		if s.uid == one.uid || s.uid == two.uid {
			l.Errorf("%s is not new", s)
		}
	}
	allReach(again, ordinalAddress)
	for i, s := range again {
		s.awaitPeers(slices.Delete(slices.Clone(again), i, i+1)...)
	}
}

// deployed gives the pods of the documentation's Deployment an address each, in the sidecar's container, and returns
// them.
func (l lab) deployed() (all []host) {
	l.Helper()
	l.kubectl("rollout", "status", "deployment", "peers")
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	for i, p := range l.awaitPods(ctx, "peers", 3) {
		s := l.member(p.Name, "lan0")
		l.kubectl("exec", s.pod, "-c", "k8slan", "--", "ip", "addr", "add", ordinalAddress(i)+"/24", "dev", s.link)
		all = append(all, s)
	}
	return all
}

// plain creates a pod that is in no LAN.
func (l lab) plain() host {
	l.Helper()
	l.create(workload{Name: "nonmember", Node: worker2})
	p := l.awaitRunning("nonmember")
	return host{lab: l, pod: p.Name, node: p.Spec.NodeName, uid: string(p.UID)}
}

// toVXLAN returns a function that sends a frame from the pod to another address in a packet of a VXLAN.
func (s host) toVXLAN(address string, port int, vni uint32) func(frame []byte) {
	s.Helper()
	var c net.Conn
	s.lab.try(s.netns().Do(func() (err error) {
		c, err = net.Dial("udp", net.JoinHostPort(address, strconv.Itoa(port)))
		return err
	}))
	s.Cleanup(func() { c.Close() })
	return func(frame []byte) {
		s.Helper()
		_, err := c.Write(encapsulated(vni, frame))
		s.lab.try(err)
	}
}

// counted finds the count of a set's element.
var counted = regexp.MustCompile(`counter packets (\d+)`)

// dropped returns how many packets of non-members the pod's filter has dropped.
func (s host) dropped() int {
	s.Helper()
	out := s.machine(s.node).run("nsenter", "--net=/proc/"+s.process(s.container)+"/ns/net", "nft", "list", "set",
		"inet", "k8slan-"+s.link, "lans")
	n := 0
	if found := counted.FindStringSubmatch(out); found != nil {
		n, _ = strconv.Atoi(found[1])
	}
	return n
}

func (l lab) twoSidecars() {
	l.logSidecars()
	l.apply(l.example("docs/examples/sidecar-two-lans.yaml"))
	l.kubectl("rollout", "status", "statefulset", "two")
	inside, outside := l.members("two", "inside", 2), l.members("two", "outside", 2)
	allReach(inside, func(i int) string { return fmt.Sprintf("10.70.2.%d", i+1) })
	allReach(outside, func(i int) string { return fmt.Sprintf("10.70.3.%d", i+1) })
	listener := outside[1].listen("listen", "--for", "20s", "--count", "1", "--marker", frames.Marker)
	losesNothing(inside[0], inside[1], func() {})
	outside[0].run("frames", "-i", "outside", "stream", "send", "--id", "7", "--count", "1")
	received, err := listener.all()
	if want := hexed(frames.Stream(nil, outside[0].mac, 7, 0)); err != nil || len(received) != 1 ||
		received[0] != want {
		l.Errorf("the other LAN carried %v, %v; want only %s", received, err, want)
	}
	losesNothing(outside[0], outside[1], func() { inside[0].stopSidecar("inside") })
	allReach(inside, func(i int) string { return fmt.Sprintf("10.70.2.%d", i+1) })
}

// sidecarsOverIPv6 runs the documentation's StatefulSet, changed as the documentation describes for IPv6. The cluster
// has addresses of both families.
func (l lab) sidecarsOverIPv6() {
	l.logSidecars()
	l.apply(strings.NewReplacer(
		"  clusterIP: None\n", "  clusterIP: None\n  ipFamilies: [IPv6]\n",
		"fieldPath: status.podIP\n", "fieldPath: status.podIPs\n",
		"            - name: KL_SERVICES\n",
		"            - name: KL_IP_FAMILY\n              value: ipv6\n            - name: KL_SERVICES\n",
	).Replace(l.example("docs/examples/sidecar-statefulset.yaml")))
	l.kubectl("rollout", "status", "statefulset", "lan")
	all := l.members("lan", "kubelan", 3)
	allReach(all, ordinalAddress)
	one, two := all[0], all[1]
	losesNothing(one, two, func() {
		l.scaleSet("lan", 3, 4)
		l.scaleSet("lan", 4, 2)
	})
	ns := one.netns()
	l.machine(one.node).until("one peer", func() bool { return len(one.peers(ns)) == 1 })
	other := l.awaitRunning(two.pod).Status.PodIPs[1].IP
	if peer := one.peers(ns)[0]; peer.String() != other {
		l.Errorf("%s sends to %s, not to %s", one, peer, other)
	}
	if link := 1450; one.mtu != link-70 {
		l.Errorf("the MTU is %d", one.mtu)
	}
}

func (l lab) sidecarIsMisconfigured() {
	l.logSidecars()
	l.apply(strings.Replace(l.example("docs/examples/sidecar-deployment.yaml"), "vni: 7001", "vin: 7001", 1))
	p := l.onlyPodOf("peers", "one whose sidecar has ended", func(p *corev1.Pod) bool {
		return slices.ContainsFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool {
			return c.LastTerminationState.Terminated != nil
		})
	})
	i := slices.IndexFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.Name == "k8slan" })
	ended := p.Status.ContainerStatuses[i].LastTerminationState.Terminated
	if ended == nil || ended.ExitCode != 1 || strings.Count(strings.TrimSpace(ended.Message), "\n") > 0 {
		l.Errorf("the container ended with %+v", ended)
	}
	if out := l.kubectl("describe", "pod", p.Name); !strings.Contains(out,
		"k8slan: configuration (/run/config/kubelan.yaml): vxlan.vin: unknown key") {
		l.Errorf("kubectl describe pod does not show the mistake:\n%s", out)
	}
}

func (l lab) sidecarsHaveNoAPIServer() {
	l.logSidecars()
	l.documented()
	all := l.members("lan", "kubelan", 3)
	allReach(all, ordinalAddress)
	spaces := []netlab.Namespace{all[0].netns(), all[1].netns()}
	ctx, cancel := context.WithTimeout(l.Context(), 4*patience)
	defer cancel()
	l.Cleanup(func() { // every other test needs it
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := l.bed.Cluster.StartAPIServer(ctx); err != nil {
			l.Error(err)
		}
	})
	losesNothing(all[0], all[1], func() {
		peers := all[0].peers(spaces[0])
		l.try(l.bed.Cluster.StopAPIServer(ctx))
		<-time.After(3 * time.Second)
		for _, s := range all {
			if code, body := s.health(); code != http.StatusNoContent {
				l.Errorf("%s: without an API server health is %d: %s", s, code, body)
			}
		}
		if is := all[0].peers(spaces[0]); !slices.Equal(is, peers) {
			l.Errorf("without an API server %s sends to %v, with it to %v", all[0], is, peers)
		}
		l.try(l.bed.Cluster.StartAPIServer(ctx))
	})
	l.awaitCluster(ctx)
	begin := time.Now()
	l.scaleSet("lan", 3, 2)
	all[0].awaitPeers(all[1])
	l.logTime("until the sidecars knew a change after the API server was back", begin)
}
