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

// TestSidecars is on a cluster where k8slan is not installed, with the documentation's own examples and commands.
func TestSidecars(t *testing.T) {
	l := newLab(t)
	l.reinstall()
	ctx, cancel := context.WithTimeout(t.Context(), 12*patience)
	defer cancel()
	l.helm(ctx, "uninstall", install.Release, "--namespace", install.Namespace)
	t.Run("of a cluster with an API server", func(t *testing.T) {
		for _, c := range []struct {
			what  string
			prove func(lab)
		}{
			{"kubelan's configuration", lab.kubelanIsReplaced},
			{"no right to endpoints", lab.sidecarHasNoRight},
			{"kubelan's program", lab.kubelansProgram},
			{"a StatefulSet with native sidecars", lab.nativeSidecars},
			{"a Deployment that hears its peers alone", lab.deploymentOfSidecars},
			{"two LANs in one pod", lab.twoSidecars},
			{"over IPv6", lab.sidecarsOverIPv6},
			{"a mistake in the configuration", lab.sidecarIsMisconfigured},
		} {
			t.Run(c.what, func(t *testing.T) {
				t.Parallel()
				c.prove(newLab(t).withSidecars())
			})
		}
	})
	t.Run("the API server is away", func(t *testing.T) { newLab(t).withSidecars().sidecarsHaveNoAPIServer() })
	for _, m := range l.machines() {
		m.isClean()
	}
}

// withSidecars has a test that fails tell what sidecars say.
func (l lab) withSidecars() lab {
	l.Cleanup(func() {
		if !l.Failed() {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		out, err := bed.Kubectl(ctx, "logs", "--namespace", l.namespace, "--selector", appLabel, "--all-containers", "--prefix", "--tail=60")
		l.Logf("--- sidecars (%v)\n%s", err, out)
	})
	return l
}

// kubelan is a manifest as kubelan's users have it.
type kubelan struct {
	Namespace string
	Replicas  int
	Program   string // how the sidecar's container starts it
	Level     string // of what it logs
	Change    bool   // with a hook for changes of peers
	Rights    bool   // to EndpointSlices
}

// asSidecar is all of the manifest that is not kubelan's, beside the image's name.
const asSidecar = "args: [sidecar]"

func (l lab) kubelan(k kubelan) {
	l.Helper()
	k.Namespace = l.namespace
	l.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := bed.Kubectl(ctx, "delete", "--ignore-not-found", "clusterrole/kubelan-"+l.namespace, "clusterrolebinding/kubelan-"+l.namespace); err != nil {
			l.Error(err)
		}
	})
	l.apply(here(l.manifest("kubelan", k)))
}

// example is a manifest of the documentation.
func (l lab) example(path string) string {
	l.Helper()
	content, err := os.ReadFile(filepath.Join("../..", path))
	if err != nil {
		l.Fatal(err)
	}
	return here(string(content))
}

// accounts is where an example says its service account, which is called as its pods are labelled.
var accounts = regexp.MustCompile(`(?m)^      serviceAccountName: (.*)$`)

// here is a manifest with the images that there are, and pods on both nodes.
func here(manifest string) string {
	manifest = accounts.ReplaceAllString(manifest, `$0
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: $1}}}`)
	return strings.NewReplacer("image: "+image.Repository+"\n", "image: "+bed.Image()+"\n", "image: alpine\n", "image: "+images.ToolboxName+"\n").Replace(manifest)
}

// documented runs the first commands of docs/sidecar.md that have an example in them.
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

// member is a pod that is in the LAN by a sidecar, seen from the container beside.
func (l lab) member(name, link string) station {
	l.Helper()
	s := l.beside(name)
	s.awaitHealth()
	s.link = link
	s.look()
	return s
}

// beside is the container beside a pod's sidecar.
func (l lab) beside(name string) station {
	l.Helper()
	p := l.awaitRunning(name)
	return station{lab: l, pod: p.Name, node: p.Spec.NodeName, uid: string(p.UID), container: "app"}
}

// awaitHealth returns when the pod's sidecar says that all is well.
func (s station) awaitHealth() {
	s.Helper()
	s.machine(s.node).until("health of "+s.String(), func() bool {
		code, _ := s.health()
		return code == http.StatusNoContent
	})
}

// members are the pods of a StatefulSet.
func (l lab) members(set, link string, count int) (all []station) {
	l.Helper()
	for i := range count {
		all = append(all, l.member(fmt.Sprintf("%s-%d", set, i), link))
	}
	if all[0].node == all[1].node {
		l.Fatalf("%s and %s are on one node", all[0], all[1])
	}
	return all
}

// allReach wants each to find every other by ARP and by ping.
func allReach(all []station, address func(i int) string) {
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

// inOrder is the address of a StatefulSet's pod.
func inOrder(i int) string { return fmt.Sprintf("192.168.69.%d", i+1) }

// scaleSet gives a StatefulSet another number of pods, and returns when there are as many.
func (l lab) scaleSet(set string, from, to int) {
	l.Helper()
	l.kubectl("scale", "statefulset", set, "--replicas", strconv.Itoa(to))
	l.kubectl("rollout", "status", "statefulset", set)
	for i := to; i < from; i++ {
		l.awaitPodGone(fmt.Sprintf("%s-%d", set, i))
	}
}

// scales scales a StatefulSet of two or more to five and to two, and wants nothing between the first two to be lost, nor of what is flooded.
func (l lab) scales(set string, all []station) {
	l.Helper()
	one, two := all[0], all[1]
	flood := startFlood(two, one)
	losesNothing(one, two, func() {
		l.scaleSet(set, len(all), 5)
		allReach([]station{one, l.member(set+"-4", one.link)}, func(i int) string { return inOrder(4 * i) })
		l.scaleSet(set, 5, 2)
		one.awaitPeers(two)
		two.awaitPeers(one)
	})
	if tally := flood.end(); tally.Lost > 0 {
		l.Errorf("%d flooded frames from %s to %s were lost", tally.Lost, two, one)
	}
}

// process is the number that the station's node has for a container's first process.
func (s station) process(container string) string {
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

// netns is the pod's network namespace.
func (s station) netns() netlab.Namespace {
	s.Helper()
	return netlab.At(s.machine(s.node).path("/proc/" + s.process(s.inContainer()) + "/ns/net"))
}

// ip is the pod's on the cluster's own network.
func (s station) ip() string {
	s.Helper()
	return s.awaitRunning(s.pod).Status.PodIP
}

// awaitPeers returns when these are whom the pod sends to, and no other.
func (s station) awaitPeers(peers ...station) {
	s.Helper()
	var want []netip.Addr
	for _, p := range peers {
		want = append(want, netip.MustParseAddr(p.ip()))
	}
	slices.SortFunc(want, netip.Addr.Compare)
	ns := s.netns()
	s.machine(s.node).until(fmt.Sprintf("the peers %v of %s", want, s), func() bool { return slices.Equal(s.peers(ns), want) })
}

func (s station) peers(ns netlab.Namespace) []netip.Addr {
	s.Helper()
	peers := s.remotesIn(ns)
	slices.SortFunc(peers, netip.Addr.Compare)
	return peers
}

// frames is how many the station's link has received.
func (s station) frames() uint64 {
	s.Helper()
	link, err := s.netns().Netlink(s.T).LinkByName(s.link)
	s.lab.try(err)
	return link.Attrs().Statistics.RxPackets
}

// towards are the addresses that the pod sends frames for single MACs to.
func (s station) towards() (all []string) {
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

// health is what the pod's sidecar answers to kubelet's probe.
func (s station) health() (code int, body string) {
	s.Helper()
	var c net.Conn
	err := s.netns().Do(func() (err error) {
		c, err = net.DialTimeout("tcp", "127.0.0.1:8181", time.Second)
		return err
	})
	if errors.Is(err, unix.ECONNREFUSED) {
		return 0, "" // it is starting
	}
	s.lab.try(err)
	defer c.Close()
	_, err = io.WriteString(c, "GET /health HTTP/1.0\r\n\r\n")
	s.lab.try(err)
	answer, err := http.ReadResponse(bufio.NewReader(c), nil)
	s.lab.try(err)
	defer answer.Body.Close()
	said, err := io.ReadAll(answer.Body)
	s.lab.try(err)
	return answer.StatusCode, string(said)
}

// containers are all of a pod that go on running.
func containers(p *corev1.Pod) []corev1.ContainerStatus {
	return append(slices.Clone(p.Status.InitContainerStatuses), p.Status.ContainerStatuses...)
}

// restarts sends a container's process a signal that ends it, and returns, when kubelet has started it again, how it ended.
func (s station) restarts(container, signal string) *corev1.ContainerStateTerminated {
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

// isKilled kills the first pod's sidecar, which has not heard that the last one left.
func (l lab) isKilled(set, container string, all []station) {
	l.Helper()
	one, two, last := all[0], all[1], all[len(all)-1]
	gone, ns, index := netip.MustParseAddr(last.ip()), one.netns(), one.index()
	losesNothing(one, two, func() {
		m := l.machine(one.node)
		m.run("kill", "-STOP", one.process(container))
		l.scaleSet(set, len(all), len(all)-1)
		if !slices.Contains(one.peers(ns), gone) || !slices.Contains(one.towards(), gone.String()) {
			l.Errorf("%s sends to %v and, for single MACs, %v; want %s among both", one, one.peers(ns), one.towards(), gone)
		}
		begin := time.Now()
		one.restarts(container, "KILL")
		one.awaitPeers(all[1 : len(all)-1]...)
		l.logTime("until a sidecar that was killed was back and had its peers right", begin)
		if slices.Contains(one.towards(), gone.String()) {
			l.Errorf("%s still sends to %s, which is gone", one, gone)
		}
	})
	if is := one.index(); is != index {
		l.Errorf("the interface was made anew: its index is %s, it was %s", is, index)
	}
	if said := l.kubectl("logs", one.pod, "-c", container); strings.Contains(said, "hook=up") {
		l.Errorf("the up hook has run again:\n%s", said)
	}
}

// ends ends a pod's sidecar in order, whose interface goes with it; the next one makes another.
func (s station) ends(container string) {
	s.Helper()
	index := s.index()
	if ended := s.restarts(container, "TERM"); ended.ExitCode != 0 {
		s.Errorf("the sidecar of %s ended with %+v", s, ended)
	}
	if said := s.kubectl("logs", s.pod, "-c", container, "--previous"); !strings.Contains(said, "interface removed") {
		s.Errorf("the sidecar of %s does not say that it removed the interface:\n%s", s, said)
	}
	s.machine(s.node).until("another interface of "+s.String(), func() bool {
		is, err := s.try("cat", "/sys/class/net/"+s.link+"/ifindex")
		return err == nil && strings.TrimSpace(is) != index
	})
}

// reload changes what sidecars are configured with, and returns when they know.
func (l lab) reload(app, container string, change func(), all ...station) {
	l.Helper()
	change()
	// Kubelet looks at a pod that changes at once, at others within a minute.
	l.kubectl("annotate", "pods", "--selector", appLabel+"="+app, "--overwrite", "k8slan.io/e2e="+strconv.FormatInt(time.Now().UnixNano(), 10))
	for _, s := range all {
		s.container = container
		s.awaitLog("configuration changed")
	}
}

func (l lab) kubelanIsReplaced() {
	k := kubelan{Replicas: 3, Program: asSidecar, Level: "DEBUG", Rights: true}
	l.kubelan(k)
	l.kubectl("rollout", "status", "statefulset", "kubelan")
	all := l.members("kubelan", "kubelan", 3)
	allReach(all, inOrder)
	l.isKilled("kubelan", "kubelan", all)
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
		sidecar.awaitLog(fmt.Sprintf("%s/kubelan has %s on kubelan, deleted false", l.namespace, l.member("kubelan-2", "kubelan").ip()))
	})
	if is := one.index(); is != index {
		l.Errorf("the interface was made anew: its index is %s, it was %s", is, index)
	}
	two.ends("kubelan") // the other one has been killed, and kubelet would let it wait
	allReach(all[:2], inOrder)
}

func (l lab) kubelansProgram() {
	l.kubelan(kubelan{Replicas: 2, Program: "command: [/usr/local/bin/kubelan]", Level: "WARN", Rights: true})
	l.kubectl("rollout", "status", "statefulset", "kubelan")
	allReach(l.members("kubelan", "kubelan", 2), inOrder)
}

// sidecarHasNoRight until long after its start.
func (l lab) sidecarHasNoRight() {
	whole := l.example("docs/examples/sidecar-statefulset.yaml")
	l.apply(strings.Join(slices.DeleteFunc(strings.Split(whole, "---\n"), func(document string) bool { return strings.Contains(document, "kind: RoleBinding\n") }), "---\n"))
	p := l.awaitPod("lan-0", "starting its sidecar", func(p *corev1.Pod) bool {
		return len(p.Status.InitContainerStatuses) == 1 && p.Status.InitContainerStatuses[0].State.Running != nil
	})
	sidecar := station{lab: l, pod: p.Name, node: p.Spec.NodeName, uid: string(p.UID), container: "k8slan"}
	const reason = "the pod's service account may not"
	sidecar.awaitLog(reason)
	l.machine(sidecar.node).until("health to tell of it", func() bool { // before, it tells of the interface
		code, said := sidecar.health()
		return code == http.StatusInternalServerError && strings.Contains(said, reason)
	})
	<-time.After(20 * time.Second)
	l.apply(whole)
	begin := time.Now()
	sidecar.awaitHealth()
	l.logTime("until a right that was given was used", begin)
	if took := time.Since(begin); took > 10*time.Second {
		l.Errorf("a right that was given was used after %s, want seconds", took)
	}
	l.kubectl("rollout", "status", "statefulset", "lan")
	allReach(l.members("lan", "kubelan", 3), inOrder)
	if said := l.kubectl("logs", sidecar.pod, "-c", "k8slan"); strings.Count(said, reason) != 1 {
		l.Errorf("the missing right is told other than once:\n%s", said)
	}
}

func (l lab) nativeSidecars() {
	l.documented()
	all := l.members("lan", "kubelan", 3)
	allReach(all, inOrder)
	l.isKilled("lan", "k8slan", all)
	all[1].ends("k8slan") // kubelet would let the other one wait, which has been killed
	allReach(all[:2], inOrder)
}

func (l lab) deploymentOfSidecars() {
	const path = "docs/examples/sidecar-deployment.yaml"
	l.apply(l.example(path))
	all := l.deployed()
	allReach(all, inOrder)
	one, two, three := all[0], all[1], all[2]

	stranger := l.plain()
	send := stranger.toVXLAN(one.ip(), 4790, 7001)
	said, after := frames.Stream(nil, segment.MAC(segment.LAN{}, "stranger"), 66, 1), frames.Stream(nil, two.mac, 1, 0)
	hears := func(what string, do func(), want []byte) {
		l.Helper()
		ear := one.listen("listen", "--for", "20s", "--count", "1", "--marker", frames.Marker)
		do()
		heard, err := ear.all()
		if err != nil || len(heard) != 1 || heard[0] != hexed(want) {
			l.Errorf("%s: heard %v, %v; want %s", what, heard, err, hexed(want))
		}
	}
	const packets = 10
	hears("a stranger, then a peer", func() {
		for range packets {
			send(said)
		}
		l.machine(one.node).until("the packets to be dropped", func() bool { return one.dropped() == packets })
		two.run("frames", "-i", two.link, "stream", "send", "--count", "1")
	}, after)
	// One leaves the Service, and goes on running.
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
		l.Errorf("%d frames came to %s in the second second after it left", more, three)
	}
	for _, s := range []station{one, two} {
		s.sh("kill -INT $(cat /tmp/sender)")
		if slices.Contains(s.peers(s.netns()), left) {
			l.Errorf("%s still has %s as a peer", s, left)
		}
	}

	index := one.index()
	losesNothing(two, one, func() {
		l.reload("peers", "k8slan", func() { l.apply(strings.Replace(l.example(path), "strict_peers: true", "strict_peers: false", 1)) }, one)
	})
	hears("a stranger, where all are heard", func() { send(said) }, said)
	if is := one.index(); is != index {
		l.Errorf("the interface was made anew: its index is %s, it was %s", is, index)
	}

	l.kubectl("rollout", "restart", "deployment", "peers")
	again := l.deployed()
	for _, s := range again {
		if s.uid == one.uid || s.uid == two.uid {
			l.Errorf("%s is not new", s)
		}
	}
	allReach(again, inOrder)
	for i, s := range again {
		s.awaitPeers(slices.Delete(slices.Clone(again), i, i+1)...)
	}
}

// deployed are the pods of the documentation's Deployment, each with an address from the sidecar's container.
func (l lab) deployed() (all []station) {
	l.Helper()
	l.kubectl("rollout", "status", "deployment", "peers")
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	for i, p := range l.awaitPods(ctx, "peers", 3) {
		s := l.member(p.Name, "lan0")
		l.kubectl("exec", s.pod, "-c", "k8slan", "--", "ip", "addr", "add", inOrder(i)+"/24", "dev", s.link)
		all = append(all, s)
	}
	return all
}

// plain is a pod that is in no LAN.
func (l lab) plain() station {
	l.Helper()
	l.create(guest{Name: "stranger", Node: worker2})
	p := l.awaitRunning("stranger")
	return station{lab: l, pod: p.Name, node: p.Spec.NodeName, uid: string(p.UID)}
}

// toVXLAN is what sends a frame from the pod to another's address as a packet of a VXLAN.
func (s station) toVXLAN(address string, port int, vni uint32) func(frame []byte) {
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

// counted is a set's element with what it has counted.
var counted = regexp.MustCompile(`counter packets (\d+)`)

// dropped is how many packets of strangers the pod's filter has dropped.
func (s station) dropped() int {
	s.Helper()
	out := s.machine(s.node).run("nsenter", "--net=/proc/"+s.process(s.container)+"/ns/net", "nft", "list", "set", "inet", "k8slan-"+s.link, "lans")
	n := 0
	if found := counted.FindStringSubmatch(out); found != nil {
		n, _ = strconv.Atoi(found[1])
	}
	return n
}

func (l lab) twoSidecars() {
	l.apply(l.example("docs/examples/sidecar-two-lans.yaml"))
	l.kubectl("rollout", "status", "statefulset", "two")
	inside, outside := l.members("two", "inside", 2), l.members("two", "outside", 2)
	allReach(inside, func(i int) string { return fmt.Sprintf("10.70.2.%d", i+1) })
	allReach(outside, func(i int) string { return fmt.Sprintf("10.70.3.%d", i+1) })
	ear := outside[1].listen("listen", "--for", "20s", "--count", "1", "--marker", frames.Marker)
	losesNothing(inside[0], inside[1], func() {})
	outside[0].run("frames", "-i", "outside", "stream", "send", "--id", "7", "--count", "1")
	heard, err := ear.all()
	if want := hexed(frames.Stream(nil, outside[0].mac, 7, 0)); err != nil || len(heard) != 1 || heard[0] != want {
		l.Errorf("the other LAN heard %v, %v; want %s alone", heard, err, want)
	}
	losesNothing(outside[0], outside[1], func() { inside[0].ends("inside") })
	allReach(inside, func(i int) string { return fmt.Sprintf("10.70.2.%d", i+1) })
}

// sidecarsOverIPv6 is the StatefulSet of the documentation on a cluster with addresses of both families, with what the documentation says of IPv6.
func (l lab) sidecarsOverIPv6() {
	l.apply(strings.NewReplacer(
		"  clusterIP: None\n", "  clusterIP: None\n  ipFamilies: [IPv6]\n",
		"fieldPath: status.podIP\n", "fieldPath: status.podIPs\n",
		"            - name: KL_SERVICES\n", "            - name: KL_IP_FAMILY\n              value: ipv6\n            - name: KL_SERVICES\n",
	).Replace(l.example("docs/examples/sidecar-statefulset.yaml")))
	l.kubectl("rollout", "status", "statefulset", "lan")
	all := l.members("lan", "kubelan", 3)
	allReach(all, inOrder)
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
	l.apply(strings.Replace(l.example("docs/examples/sidecar-deployment.yaml"), "vni: 7001", "vin: 7001", 1))
	p := l.onlyPodOf("peers", "one whose sidecar has ended", func(p *corev1.Pod) bool {
		return slices.ContainsFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.LastTerminationState.Terminated != nil })
	})
	i := slices.IndexFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.Name == "k8slan" })
	ended := p.Status.ContainerStatuses[i].LastTerminationState.Terminated
	if ended == nil || ended.ExitCode != 1 || strings.Count(strings.TrimSpace(ended.Message), "\n") > 0 {
		l.Errorf("the container ended with %+v", ended)
	}
	if out := l.kubectl("describe", "pod", p.Name); !strings.Contains(out, "k8slan: configuration (/run/config/kubelan.yaml): vxlan.vin: unknown key") {
		l.Errorf("kubectl describe pod does not say what is wrong:\n%s", out)
	}
}

func (l lab) sidecarsHaveNoAPIServer() {
	l.documented()
	all := l.members("lan", "kubelan", 3)
	allReach(all, inOrder)
	spaces := []netlab.Namespace{all[0].netns(), all[1].netns()}
	ctx, cancel := context.WithTimeout(l.Context(), 4*patience)
	defer cancel()
	l.Cleanup(func() { // every other test wants it
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := bed.Cluster.StartAPIServer(ctx); err != nil {
			l.Error(err)
		}
	})
	losesNothing(all[0], all[1], func() {
		peers := all[0].peers(spaces[0])
		l.try(bed.Cluster.StopAPIServer(ctx))
		<-time.After(5 * time.Second)
		for _, s := range all {
			if code, said := s.health(); code != http.StatusNoContent {
				l.Errorf("%s: without an API server health is %d: %s", s, code, said)
			}
		}
		if is := all[0].peers(spaces[0]); !slices.Equal(is, peers) {
			l.Errorf("without an API server %s sends to %v, with it to %v", all[0], is, peers)
		}
		l.try(bed.Cluster.StartAPIServer(ctx))
	})
	l.awaitCluster(ctx)
	begin := time.Now()
	l.scaleSet("lan", 3, 2)
	all[0].awaitPeers(all[1])
	l.logTime("until a change was known after the API server was back", begin)
}
