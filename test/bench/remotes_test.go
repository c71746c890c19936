package bench

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/manifests"
	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/test/cluster/apiserver"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// unicast measures B9 and B10 with the released daemon and a real API server: what a LAN with unicast discovery costs
// with a thousand nodes. Most of the nodes are only a LANNode.
func unicast(t *testing.T, b *bench) {
	f := newFleet(t)
	_, stop := f.daemon(t, 0)
	_, stopOther := f.daemon(t, 1)
	for i := range f.nodes {
		f.awaitReady(t, i)
	}
	f.firstPacket(t, b)
	stopOther()
	stop()

	peers := times(1000, 20)
	without := f.memory(t)
	f.join(t, peers)
	together := f.memory(t)
	b.atMost("B9-memory", fmt.Sprintf("memory of the daemon for each of %d peers with 10 LANs, in KB", peers),
		(together.median()-without.median())/float64(peers)/1000, 25,
		fmt.Sprintf("%.1f MB resident with them, %.1f MB without, medians of %d starts",
			together.median()/1e6, without.median()/1e6, len(without)))

	process, _ := f.daemon(t, 0)
	f.awaitIdle(t, process)
	f.fill(t, b, peers)
	f.oneMore(t, b, peers)
	f.fanOut(t, b, process, peers)
	f.atRest(t, b, process, peers)
}

// fleet is two nodes on one underlay, with an API server on the first.
type fleet struct {
	nodes  [2]node
	server *apiserver.Server
	api    client.WithWatch
	binary string // k8slan
	lan    *v1beta1.LAN
}

// vtep is the address of a node of the fleet, or of a peer after them.
func vtep(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i / 250), byte(1 + i%250)}) }

// buildBinary builds k8slan with the flags of a release.
func buildBinary(t *testing.T) (binary string) {
	t.Helper()
	binary = filepath.Join(t.TempDir(), "k8slan")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w",
		"-o", binary, "github.com/k8slan/k8slan/cmd/k8slan")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build k8slan: %v\n%s", err, out)
	}
	return binary
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{binary: buildBinary(t)}
	u := netlab.NewUnderlay(t, netlab.UnderlayMTU)
	for i := range f.nodes {
		f.nodes[i] = addNode(t, u, fmt.Sprint("worker", i+1))
		ip(t, f.nodes[i].Namespace, "addr add %s/8 dev %s", vtep(i), netlab.UnderlayDevice)
	}
	kubernetes, err := netlab.Component(t.Context(), "kubernetes")
	must(t, err)
	etcd, err := netlab.Component(t.Context(), "etcd")
	must(t, err)
	f.server, err = apiserver.Start(t.Context(), apiserver.Config{
		Kubernetes: kubernetes, Etcd: etcd, Do: f.nodes[0].Do, Address: vtep(0).String(),
	})
	if f.server != nil {
		t.Cleanup(f.server.Stop)
	}
	must(t, err)
	scheme := runtime.NewScheme()
	must(t, errors.Join(corev1.AddToScheme(scheme), v1beta1.AddToScheme(scheme), apiextensionsv1.AddToScheme(scheme)))
	f.api, err = client.NewWithWatch(f.server.Client, client.Options{Scheme: scheme})
	must(t, err)
	definitions, err := fs.Glob(manifests.Files, "*.yaml")
	must(t, err)
	for _, file := range definitions {
		definition, err := manifests.Files.ReadFile(file)
		must(t, err)
		must(t, apiserver.Define(t.Context(), f.api, definition))
	}
	for _, n := range f.nodes {
		must(t, f.api.Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name}}))
	}
	f.lan = &v1beta1.LAN{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "lab"},
		// With a group of their family, a change to and from multicast keeps the VXLAN.
		Spec: v1beta1.LANSpec{
			VNI: 1, Spokes: []string{"a", "b", "c"}, Discovery: v1beta1.Unicast, VXLANGroup: "239.1.1.1",
			DefaultVXLANDev: netlab.UnderlayDevice,
		},
	}
	must(t, f.api.Create(t.Context(), f.lan))
	f.lan.Status.Holds = &v1beta1.Holding{ // as the controller writes it
		NS: "default.lab", VNI: 1, Port: v1beta1.DefaultPort, Spokes: f.lan.Spec.Spokes,
	}
	must(t, f.api.Status().Update(t.Context(), f.lan))
	return f
}

// lanNetns is the LAN's namespace on a node.
func (f *fleet) lanNetns(i int) netlab.Namespace {
	return netlab.At(filepath.Join(f.nodes[i].Run, "netns", "default.lab"))
}

// daemon runs k8slan node on a node, with these flags added, until stop.
func (f *fleet) daemon(t *testing.T, i int, flags ...string) (process *os.Process, stop func()) {
	t.Helper()
	n := f.nodes[i]
	log := filepath.Join(t.TempDir(), n.Name+".log")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon of %s: %s", n.Name, tail(log))
		}
	})
	return startIn(t, n.Do, log, "KUBECONFIG="+f.server.Kubeconfig, f.binary, append([]string{
		"node", "--node-name=" + n.Name, "--run-dir=" + n.Run, "--cdi-dir=" + n.CDI,
		"--device-plugin-dir=" + t.TempDir(), "--health-address=0", "--log-format=text", "--log-level=warn",
	}, flags...)...)
}

// awaitReady returns when the node reports the LAN as ready.
func (f *fleet) awaitReady(t *testing.T, i int) {
	t.Helper()
	eventually(t, f.nodes[i].Name+" to carry the LAN", func() bool {
		var n v1beta1.LANNode
		err := f.api.Get(t.Context(), client.ObjectKey{Name: f.nodes[i].Name}, &n)
		return client.IgnoreNotFound(err) == nil && n.Status.Ready == 1
	})
}

func eventually(t *testing.T, what string, fits func() bool) {
	t.Helper()
	late := time.After(time.Minute)
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for !fits() {
		select {
		case <-again.C:
		case <-late:
			t.Fatalf("timed out after a minute waiting for %s", what)
		}
	}
}

// awaitIdle returns when a process has used hardly any processor time for a second.
func (f *fleet) awaitIdle(t *testing.T, p *os.Process) {
	t.Helper()
	late := time.After(time.Minute)
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for before := work(t, p); ; {
		select {
		case <-second.C:
		case <-late:
			t.Fatal("a daemon without events still works after a minute")
		}
		now := work(t, p)
		if now-before < 5*time.Millisecond {
			return
		}
		before = now
	}
}

// memory returns the resident memory of an idle daemon in bytes, once for each of several starts.
func (f *fleet) memory(t *testing.T) (all samples) {
	t.Helper()
	for range times(5, 1) {
		process, stop := f.daemon(t, 0)
		f.awaitIdle(t, process)
		all = append(all, float64(resident(process.Pid)))
		stop()
	}
	return all
}

func peerName(i int) string {
	return fmt.Sprintf("ip-10-0-%d-%d.eu-central-1.compute.internal", i/250, 1+i%250)
}

// statusOf is the status of a node with ten LANs: two pods on each, and that many on the LAN that is measured.
func (f *fleet) statusOf(i, pods int) v1beta1.LANNodeStatus {
	const lans = 10
	s := v1beta1.LANNodeStatus{
		Version: "1.0.0", LANs: lans, Ready: lans,
		Underlays: []v1beta1.NodeUnderlay{
			{Name: "eth0", Addresses: []string{vtep(2 + i).String(), "fe80::5054:ff:fe12:3456"}},
		},
	}
	for l := range lans {
		name, attached := fmt.Sprint("segment-", l), 2
		uid := types.UID(fmt.Sprintf("5f6c0a4e-8f0e-4d34-9b5c-0c4c2b0f1d%02x", l))
		if l == 0 {
			name, uid, attached = f.lan.Name, f.lan.UID, pods
		}
		on := v1beta1.SegmentStatus{
			LAN: "production/" + name, UID: uid, Generation: 1, State: v1beta1.SegmentReady, VNI: int32(1 + l),
			Port: v1beta1.DefaultPort,
			NS:   "production." + name, Underlay: "eth0", VTEP: vtep(2 + i).String(), MTU: 1442, Offered: 4,
		}
		for p := range attached {
			spoke := fmt.Sprintf("web_%d", p)
			on.Attachments = append(on.Attachments, v1beta1.Attachment{
				Spoke: spoke, Pool: "web", Interface: "net1",
				Pod: fmt.Sprintf("production/router-6d4cf56db6-x2v%02x", p),
				MAC: "02:6b:38:5e:11:7a", Kind: v1beta1.KindVeth, Since: metav1.NewTime(time.Unix(1_800_000_000, 0)),
			})
		}
		s.Attached += int32(attached)
		s.Segments = append(s.Segments, on)
	}
	return s
}

// report writes a peer's status.
func (f *fleet) report(ctx context.Context, i, pods int) error {
	n := &v1beta1.LANNode{}
	if err := f.api.Get(ctx, client.ObjectKey{Name: peerName(i)}, n); err != nil {
		return err
	}
	n.Status = f.statusOf(i, pods)
	return f.api.Status().Update(ctx, n)
}

// join makes peers with one pod each on the LAN, and a last one without a pod.
func (f *fleet) join(t *testing.T, peers int) {
	t.Helper()
	var joining sync.WaitGroup
	errs := make(chan error, peers+1)
	next := make(chan int)
	for range 4 {
		joining.Go(func() {
			for i := range next {
				owner := metav1.OwnerReference{
					APIVersion: "v1", Kind: "Node", Name: peerName(i), UID: "3c1f7a52-6a0e-4d63-9f0b-0d8a6d0f3b11",
				}
				err := f.api.Create(t.Context(), &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{
					Name: peerName(i), OwnerReferences: []metav1.OwnerReference{owner},
				}})
				pods := 1
				if i == peers {
					pods = 0
				}
				errs <- errors.Join(err, f.report(t.Context(), i, pods))
			}
		})
	}
	for i := range peers + 1 {
		next <- i
	}
	close(next)
	joining.Wait()
	for range peers + 1 {
		must(t, <-errs)
	}
}

// entries counts the FDB entries that are added and deleted in a namespace.
type entries struct{ fd int }

func watchEntries(t *testing.T, ns netlab.Namespace) entries {
	t.Helper()
	var fd int
	must(t, ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		return err
	}))
	t.Cleanup(func() { unix.Close(fd) })
	must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
	must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60}))
	must(t, unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	must(t, unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.RTNLGRP_NEIGH))
	return entries{fd}
}

// await returns after that many events of remotes, of one type.
func (e entries) await(kind uint16, count int) error { return e.awaitThat(kind, count, ofRemote) }

func (e entries) awaitThat(kind uint16, count int, fits func(neighbour []byte) bool) error {
	buf := make([]byte, 1<<16)
	for seen := 0; seen < count; {
		n, _, err := unix.Recvfrom(e.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%d of %d entries: %w", seen, count, err)
		}
		messages, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return err
		}
		for _, m := range messages {
			if m.Header.Type == kind && fits(m.Data) {
				seen++
			}
		}
	}
	return nil
}

// ofRemote reports whether an entry is for the all-zeros MAC, as those of remotes are.
func ofRemote(neighbour []byte) bool {
	attrs, err := nl.ParseRouteAttr(neighbour[(&netlink.Ndmsg{}).Len():])
	return err == nil && slices.ContainsFunc(attrs, func(a syscall.NetlinkRouteAttr) bool {
		return a.Attr.Type == unix.NDA_LLADDR && bytes.Equal(a.Value, make([]byte, 6))
	})
}

// bareVXLAN is a VXLAN made by ip(8), with an open socket in its namespace.
type bareVXLAN struct {
	socket
	index   int
	remotes []*nl.NetlinkRequest // to add
}

func (f *fleet) newBareVXLAN(t *testing.T, remotes int) bareVXLAN {
	t.Helper()
	ns := netlab.New(t, "bare")
	ip(t, ns, "link add vxlan type vxlan id 4711 local %s dstport 4789", vtep(0))
	link, err := ns.Netlink(t).LinkByName("vxlan")
	must(t, err)
	s, handle, err := open(ns.Path)
	must(t, err)
	handle.Close()
	t.Cleanup(s.close)
	v := bareVXLAN{socket: s, index: link.Attrs().Index}
	for i := range remotes {
		v.remotes = append(v.remotes, v.remote(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_APPEND, vtep(2+i)))
	}
	return v
}

func (v bareVXLAN) remote(kind, flags int, to netip.Addr) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(kind, unix.NLM_F_ACK|flags)
	r.AddData(&netlink.Ndmsg{
		Family: unix.AF_BRIDGE, Index: uint32(v.index), State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF,
	})
	r.AddData(nl.NewRtAttr(unix.NDA_LLADDR, make([]byte, 6)))
	r.AddData(nl.NewRtAttr(unix.NDA_DST, to.AsSlice()))
	return r
}

// removeAll deletes all remotes.
func (v bareVXLAN) removeAll() error {
	for i := range v.remotes {
		if err := v.send(v.remote(unix.RTM_DELNEIGH, 0, vtep(2+i))); err != nil {
			return err
		}
	}
	return nil
}

// objectWatch is a watch like the daemon's.
type objectWatch struct{ watch.Interface }

func (f *fleet) watch(t *testing.T, kind client.ObjectList) objectWatch {
	t.Helper()
	w, err := f.api.Watch(t.Context(), kind)
	must(t, err)
	t.Cleanup(w.Stop)
	return objectWatch{w}
}

// awaitWrite returns when the watch reports what was just written.
func (n objectWatch) awaitWrite(written client.Object) error {
	return n.await(written.GetName(), func(o client.Object) bool {
		return o.GetResourceVersion() == written.GetResourceVersion()
	})
}

// awaitLater returns when the watch reports a later state of an object.
func (n objectWatch) awaitLater(before client.Object) error {
	return n.await(before.GetName(), func(o client.Object) bool {
		order, err := resourceversion.CompareResourceVersion(o.GetResourceVersion(), before.GetResourceVersion())
		return err == nil && order > 0
	})
}

func (n objectWatch) await(name string, fits func(client.Object) bool) error {
	late := time.After(time.Minute)
	for {
		select {
		case e, ok := <-n.ResultChan():
			if !ok {
				return errors.New("the watch has ended")
			}
			if o, ok := e.Object.(client.Object); ok && o.GetName() == name && fits(o) {
				return nil
			}
		case <-late:
			return fmt.Errorf("the API server does not report %s within a minute", name)
		}
	}
}

// pause lets a daemon become idle: it waits after an observation of a LAN, and collects what it writes.
func pause() {
	timer := time.NewTimer(500 * time.Millisecond)
	<-timer.C
}

// fill measures B9: the time from a LAN's change to unicast until a node has all peers as remotes.
func (f *fleet) fill(t *testing.T, b *bench, peers int) {
	lans, e, bare := f.watch(t, &v1beta1.LANList{}), watchEntries(t, f.lanNetns(0)), f.newBareVXLAN(t, peers)
	var loops samples
	bystander := &v1beta1.LAN{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "bystander"},
		Spec:       v1beta1.LANSpec{VNI: 2, Spokes: []string{"x"}},
	}
	must(t, f.api.Create(t.Context(), bystander)) // it holds nothing, so no node builds it
	discover := func(d v1beta1.Discovery) error {
		if err := f.api.Get(t.Context(), client.ObjectKeyFromObject(f.lan), f.lan); err != nil {
			return err
		}
		f.lan.Spec.Discovery = d
		if err := f.api.Update(t.Context(), f.lan); err != nil {
			return err
		}
		return lans.awaitWrite(f.lan)
	}
	got := race(t, times(15, 1), contender{"k8slan", func() (float64, error) {
		if err := errors.Join(discover(v1beta1.Multicast), e.await(unix.RTM_DELNEIGH, peers)); err != nil {
			return 0, err
		}
		pause()
		began := time.Now()
		err := errors.Join(discover(v1beta1.Unicast), e.await(unix.RTM_NEWNEIGH, peers))
		took := milliseconds(time.Since(began))
		pause()
		return took, err
	}}, contender{"bare", func() (float64, error) {
		bystander.Status.Reason = time.Now().String()
		began := time.Now()
		err := errors.Join(f.api.Status().Update(t.Context(), bystander), lans.awaitWrite(bystander))
		transport := time.Since(began)
		for _, r := range bare.remotes {
			err = errors.Join(err, bare.send(r))
		}
		took := time.Since(began)
		loops = append(loops, 1000*milliseconds(took-transport)/float64(peers))
		return milliseconds(took), errors.Join(err, bare.removeAll())
	}})
	ours, theirs := got["k8slan"], got["bare"]
	const what = "%d remotes, from the write of the LAN's discovery / a bare watch and the bare netlink messages"
	b.atMost("B9", fmt.Sprintf(what, peers), ours.over(theirs).median(), 2,
		figures("ms", ours, theirs))
	b.atMost("B9-each", "time for each of them, in µs", 1000*ours.median()/float64(peers), 50,
		fmt.Sprintf("%v µs for a bare message", round(loops.median())))
}

// oneMore measures B9-one: the time from one more peer's write to the API server until its entry is in the FDB, and
// what else changes.
func (f *fleet) oneMore(t *testing.T, b *bench, peers int) {
	nodes, e, bare := f.watch(t, &v1beta1.LANNodeList{}), watchEntries(t, f.lanNetns(0)), f.newBareVXLAN(t, 1)
	var last, other v1beta1.LANNode
	must(t, f.api.Get(t.Context(), client.ObjectKey{Name: peerName(peers)}, &last))
	must(t, f.api.Get(t.Context(), client.ObjectKey{Name: peerName(0)}, &other))
	write := func(n *v1beta1.LANNode, i, pods int) error {
		n.Status = f.statusOf(i, pods)
		return f.api.Status().Update(t.Context(), n)
	}
	flip := 0
	got := race(t, times(40, 1), contender{"k8slan", func() (float64, error) {
		began := time.Now()
		err := errors.Join(write(&last, peers, 1), e.await(unix.RTM_NEWNEIGH, 1))
		took := milliseconds(time.Since(began))
		pause()
		err = errors.Join(err, write(&last, peers, 0), e.await(unix.RTM_DELNEIGH, 1), nodes.awaitWrite(&last))
		pause()
		return took, err
	}}, contender{"bare", func() (float64, error) {
		flip++
		began := time.Now()
		err := errors.Join(write(&other, 0, 1+flip%2), nodes.awaitWrite(&other), bare.send(bare.remotes[0]))
		return milliseconds(time.Since(began)), errors.Join(err, bare.removeAll())
	}})
	ours, theirs := got["k8slan"], got["bare"]
	const what = "one remote more beside %d, from the peer's write / a bare watch and one bare message"
	b.atMost("B9-one", fmt.Sprintf(what, peers), ours.over(theirs).median(), 2,
		figures("ms", ours, theirs))

	changes := subscribe(t, f.lanNetns(0))
	must(t, errors.Join(write(&last, peers, 1), e.await(unix.RTM_NEWNEIGH, 1)))
	pause()
	b.atMost("B9-writes", "changes to the LAN's links, table and addresses for it", float64(events(changes)), 1,
		"netlink events in the LAN's namespace")
}

// fanOut measures what a change costs that does not concern other nodes: in another node's daemon, and in the API
// server for each watch that receives it.
func (f *fleet) fanOut(t *testing.T, b *bench, daemon *os.Process, peers int) {
	writes, watches := times(500, 10), times(50, 2)
	var size atomic.Int64
	pods := 1
	write := func() (server, ours float64) { // µs of processor time for each write
		pods = 3 - pods
		f.awaitIdle(t, daemon)
		serverBefore, before := work(t, f.server.APIServer), work(t, daemon)
		for i := range writes {
			must(t, f.report(t.Context(), i%peers, pods))
		}
		took := work(t, f.server.APIServer) - serverBefore
		f.awaitIdle(t, daemon)
		per := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(writes) }
		return per(took), per(work(t, daemon) - before)
	}
	var unwatched, received, watched samples
	for range times(5, 1) {
		server, ours := write()
		unwatched, received = append(unwatched, server), append(received, ours)
		size.Store(0)
		stop := f.startWatches(t, watches, &size)
		server, _ = write()
		watched = append(watched, server)
		stop()
	}
	const what = "processor time of the daemon for each change of another node's LANNode " +
		"that does not concern it, in µs"
	b.atMost("B9-event", what, received.median(), 1000,
		fmt.Sprintf("middle half %s µs, %d changes in each of %d rounds", received.spread(), writes, len(received)))
	b.atMost("B9-watch", "bytes of a watch event, of a node with 10 LANs of two pods",
		float64(size.Load())/float64(writes*watches), 16384, "managed fields included")
	each := make(samples, len(unwatched))
	for i := range each {
		each[i] = (watched[i] - unwatched[i]) / float64(watches)
	}
	const whatServer = "processor time of the API server for each watch that an event is sent to, in µs"
	b.atMost("B9-server", whatServer, each.median(), 100,
		fmt.Sprintf("middle half %s µs, %d watches; %v µs for a read and a write with the daemon's watch only",
			each.spread(), watches, round(unwatched.median())))
}

// startWatches starts watches of LANNodes over connections of their own, which count the bytes that they receive.
func (f *fleet) startWatches(t *testing.T, number int, bytes *atomic.Int64) (stop func()) {
	t.Helper()
	var list v1beta1.LANNodeList
	must(t, f.api.List(t.Context(), &list))
	ctx, cancel := context.WithCancel(t.Context())
	var listening sync.WaitGroup
	for range number {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet,
			f.server.Client.Host+"/apis/lan.k8slan.io/v1beta1/lannodes?watch=1&resourceVersion="+list.ResourceVersion,
			nil)
		must(t, err)
		r.Header.Set("Authorization", "Bearer "+f.server.Client.BearerToken)
		transport := &http.Transport{
			DialContext: f.server.Client.Dial, TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
			ForceAttemptHTTP2: true,
		}
		answer, err := (&http.Client{Transport: transport}).Do(r)
		must(t, err)
		if answer.StatusCode != http.StatusOK {
			t.Fatalf("watch LANNodes: %s", answer.Status)
		}
		listening.Go(func() {
			defer transport.CloseIdleConnections()
			defer answer.Body.Close()
			for buf := make([]byte, 1<<16); ; {
				n, err := answer.Body.Read(buf)
				bytes.Add(int64(n))
				if err != nil {
					return // stop was called
				}
			}
		})
	}
	return func() {
		cancel()
		listening.Wait()
	}
}

// atRest measures B9-idle: the processor time of a daemon without events.
func (f *fleet) atRest(t *testing.T, b *bench, daemon *os.Process, peers int) {
	f.awaitIdle(t, daemon)
	long := time.Duration(times(120, 2)) * time.Second // once a minute the daemon observes everything
	changes, before := subscribe(t, f.lanNetns(0)), work(t, daemon)
	timer := time.NewTimer(long)
	<-timer.C
	took := work(t, daemon) - before
	const what = "processor time of the daemon with %d remotes while nothing happens, in ms a second"
	b.atMost("B9-idle", fmt.Sprintf(what, peers), milliseconds(took)/long.Seconds(), 1,
		fmt.Sprintf("%v in %v; %d netlink events in the LAN's namespace",
			took.Round(time.Microsecond), long, events(changes)))
}

// firstPacket measures B10: the time until a pod that was just attached receives a frame from a pod on another node,
// which finds its node by the API server.
func (f *fleet) firstPacket(t *testing.T, b *bench) {
	here, there := f.nodes[0], f.nodes[1]
	sender := f.attach(t, here, "a", sandbox(t))
	defer sender.Close()
	e := watchEntries(t, f.lanNetns(0))
	box := sandbox(t)
	nodes := f.watch(t, &v1beta1.LANNodeList{})
	bystander := &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: "bystander"}}
	must(t, f.api.Create(t.Context(), bystander))
	broadcast := frames.Stream(nil, sender.Interface.HardwareAddr, 1, 1)
	// firstFrame attaches a pod and returns after how many ms it receives a frame that is sent all the time; meanwhile
	// runs beside that.
	firstFrame := func(n node, spoke string, meanwhile ...func(began time.Time) error) (float64, error) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		sending := make(chan error, 1)
		go func() { sending <- sendUntil(ctx, sender, broadcast) }()
		r := f.request(n, spoke, box)
		if _, err := n.kernel.Claim(ctx, r); err != nil {
			return 0, err
		}
		began := time.Now()
		ended := make(chan error, len(meanwhile))
		for _, do := range meanwhile {
			go func() { ended <- do(began) }()
		}
		err := awaitFrom(ctx, box, sender.Interface.HardwareAddr)
		took := milliseconds(time.Since(began))
		cancel()
		err = errors.Join(err, <-sending)
		for range meanwhile {
			err = errors.Join(err, <-ended)
		}
		return took, errors.Join(err, n.kernel.Release(t.Context(), r.Netns, r.Spoke, r.ID()))
	}
	var reported, entered samples // the steps in between
	got := race(t, times(60, 1), contender{"k8slan", func() (float64, error) {
		var before v1beta1.LANNode
		if err := f.api.Get(t.Context(), client.ObjectKey{Name: there.Name}, &before); err != nil {
			return 0, err
		}
		took, err := firstFrame(there, "b", func(began time.Time) error {
			err := nodes.awaitLater(&before)
			reported = append(reported, milliseconds(time.Since(began)))
			return err
		}, func(began time.Time) error {
			err := e.await(unix.RTM_NEWNEIGH, 1)
			entered = append(entered, milliseconds(time.Since(began)))
			return err
		})
		err = errors.Join(err, e.await(unix.RTM_DELNEIGH, 1))
		pause()
		return took, err
	}}, contender{"local", func() (float64, error) {
		took, err := firstFrame(here, "c")
		pause()
		return took, err
	}}, contender{"transport", func() (float64, error) {
		bystander.Status.Attached++
		began := time.Now()
		err := errors.Join(f.api.Status().Update(t.Context(), bystander), nodes.awaitWrite(bystander))
		return milliseconds(time.Since(began)), err
	}})
	ours, theirs := got["k8slan"], got["transport"]
	b.atMost("B10", "from the end of ADD until the first frame from another node, unicast, in ms", ours.median(), 5,
		fmt.Sprintf("middle half %s ms, worst tenth from %v ms; the node's status is written after %v ms, "+
			"other nodes have the entry after %v ms, and a watch reports a write to the API server after %v ms; "+
			"from a pod on the same node %v ms; %d rounds",
			ours.spread(), round(ours.quantile(0.9)), round(reported.median()), round(entered.median()),
			round(theirs.median()), round(got["local"].median()), len(ours)))
}

// request is the claim of a pod on a spoke of the LAN.
func (f *fleet) request(n node, spoke string, box netlab.Sandbox) kernel.ClaimRequest {
	return claimRequest("default.lab", spoke, box)
}

// attach attaches a pod and returns a sender on its interface.
func (f *fleet) attach(t *testing.T, n node, spoke string, box netlab.Sandbox) (s *frames.Sender) {
	t.Helper()
	_, err := n.kernel.Claim(t.Context(), f.request(n, spoke, box))
	must(t, err)
	must(t, box.Do(func() (err error) {
		s, err = frames.NewSender(box.Interface)
		return err
	}))
	return s
}

// sendUntil sends a frame five times a millisecond until ctx ends.
func sendUntil(ctx context.Context, s *frames.Sender, frame []byte) error {
	again := time.NewTicker(200 * time.Microsecond)
	defer again.Stop()
	for {
		if err := s.Send(frame); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-again.C:
		}
	}
}

// awaitFrom returns when the sandbox has received a frame from that MAC.
func awaitFrom(ctx context.Context, box netlab.Sandbox, from []byte) error {
	var r *frames.Receiver
	err := box.Do(func() (err error) {
		r, err = frames.NewReceiver(box.Interface)
		return err
	})
	if err != nil {
		return err
	}
	defer r.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		frame, err := r.Receive(ctx)
		if err != nil {
			return fmt.Errorf("no frame came from the other node: %w", err)
		}
		if len(frame) > 12 && bytes.Equal(frame[6:12], from) {
			return nil
		}
	}
}

// flooding measures B9-flood: what it costs a node to send a frame to each remote.
func flooding(t *testing.T, b *bench) {
	n := addNode(t, netlab.NewUnderlay(t, netlab.UnderlayMTU), "worker1")
	ip(t, n.Namespace, "addr add 192.0.2.1/24 dev %s", netlab.UnderlayDevice)
	ip(t, n.Namespace, "neigh add 192.0.2.254 lladdr 02:00:00:00:00:fe dev %s", netlab.UnderlayDevice)
	ip(t, n.Namespace, "route add 10.0.0.0/8 via 192.0.2.254")
	s := netlab.LAN(1, n.device, "a")
	s.VXLAN.Group, s.VXLAN.Local = netip.Addr{}, netip.MustParseAddr("192.0.2.1")
	box := sandbox(t)
	links := n.Netlink(t)
	span := time.Duration(times(300, 20)) * time.Millisecond
	var sender *frames.Sender
	frame := make([]byte, 100)
	copy(frame, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5})
	cost := func(remotes int) contender { // µs for a frame
		return contender{fmt.Sprint(remotes), func() (float64, error) {
			s.Remotes = []netip.Addr{}
			for i := range remotes {
				s.Remotes = append(s.Remotes, vtep(i))
			}
			n.reconcile(t, s)
			if sender == nil {
				_, err := n.kernel.Claim(t.Context(), claimRequest(s.Netns, "a", box))
				if err != nil {
					return 0, err
				}
				if err := box.Do(func() (err error) {
					sender, err = frames.NewSender(box.Interface)
					return err
				}); err != nil {
					return 0, err
				}
			}
			sent := func() (uint64, error) {
				device, err := links.LinkByIndex(n.device)
				if err != nil {
					return 0, err
				}
				return device.Attrs().Statistics.TxPackets, nil
			}
			before, err := sent()
			if err != nil {
				return 0, err
			}
			began := time.Now()
			for time.Since(began) < span {
				if err := sender.Send(frame); err != nil && !errors.Is(err, unix.ENOBUFS) {
					return 0, err
				}
			}
			took := time.Since(began)
			after, err := sent()
			if err == nil && after == before {
				err = errors.New("nothing was sent")
			}
			return float64(took.Nanoseconds()) / 1000 * float64(remotes) / float64(after-before), err
		}}
	}
	got := race(t, times(20, 1), cost(1), cost(10), cost(100), cost(1000))
	each := make(samples, len(got["1000"]))
	for i := range each {
		each[i] = (got["1000"][i] - got["10"][i]) / 990
	}
	b.atMost("B9-flood", "time that a frame that is flooded takes for each remote, in µs", each.median(), 2,
		fmt.Sprintf("middle half %s µs; a frame takes %v, %v, %v and %v µs with 1, 10, 100 and 1,000 remotes",
			each.spread(), round(got["1"].median()), round(got["10"].median()), round(got["100"].median()),
			round(got["1000"].median())))
	sender.Close()
}
