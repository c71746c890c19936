package dataplane

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// These are the sandboxes of the pod and the VM in the fixtures.
const (
	olderPod = "0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9"
	olderVM  = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100"
)

// older is a node as an older version leaves it.
type older struct {
	node
	segment.Segment // from that version's record
	pod, vm         attachment
	version         string
}

// olderNode makes a node as that version leaves it: by ip(8) and that version's files, with none of today's code.
func olderNode(t *testing.T, version string) older {
	t.Helper()
	netlab.NeedDevices(t)
	dir := filepath.Join("testdata", version)
	h := addNode(t, netlab.NewUnderlay(t, underlayMTU), "worker1")
	must(t, os.CopyFS(h.Run, os.DirFS(filepath.Join(dir, "run"))))
	must(t, os.CopyFS(h.CDI, os.DirFS(filepath.Join(dir, "cdi"))))
	o := older{node: h, version: version}
	o.Segment = o.record(t)
	lan := netlab.New(t, "lan")
	must(t, os.MkdirAll(h.Run+"/netns", 0o755))
	must(t, os.WriteFile(h.lanNetns(o.Segment).Path, nil, 0o444))
	must(t, unix.Mount(lan.Path, h.lanNetns(o.Segment).Path, "", unix.MS_BIND, ""))
	o.pod = attachment{h.sandbox(t), o.config(t, "srl")}
	o.pod.id, o.pod.ifname = olderPod, "e1-1"
	o.vm = attachment{h.sandbox(t), o.config(t, "vm")}
	o.vm.id, o.vm.ifname = olderVM, "pod37a8eec1ce1"
	o.play(t, filepath.Join(dir, "steps"))
	return o
}

// play runs the steps of a file.
func (o older) play(t *testing.T, file string) {
	t.Helper()
	places := map[string]netlab.Namespace{
		"node": o.Namespace, "lan": o.lanNetns(o.Segment), "pod": o.pod.Namespace, "vm": o.vm.Namespace,
	}
	paths := strings.NewReplacer("$LAN", places["lan"].Path, "$POD", places["pod"].Path, "$VM", places["vm"].Path)
	f, err := os.Open(file)
	must(t, err)
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		where, what, _ := strings.Cut(lines.Text(), " ")
		if where == "#" {
			continue
		}
		ns, ok := places[where]
		if !ok {
			t.Fatalf("%s: no namespace %q", file, where)
		}
		if setting, ok := strings.CutPrefix(what, "sysctl "); ok {
			name, value, _ := strings.Cut(setting, " ")
			_, err := os.Stat("/proc/sys/" + name)
			if err == nil || !strings.HasPrefix(name, "net/bridge/") { // br_netfilter may be absent
				ns.Sysctl(t, name, value)
			}
			continue
		}
		must(t, ns.Do(func() error {
			ip := exec.Command("ip", "-batch", "-")
			ip.Stdin = strings.NewReader(paths.Replace(what))
			if out, err := ip.CombinedOutput(); err != nil {
				return fmt.Errorf("ip %s: %w\n%s", what, err, out)
			}
			return nil
		}))
	}
	must(t, lines.Err())
}

// record returns the LAN from that version's record.
func (o older) record(t *testing.T) (s segment.Segment) {
	t.Helper()
	paths, err := filepath.Glob(o.Run + "/lan/*.json")
	if err != nil || len(paths) != 1 {
		t.Fatalf("records %v, %v", paths, err)
	}
	b, err := os.ReadFile(paths[0])
	must(t, err)
	must(t, json.Unmarshal(b, &s))
	return s
}

// config returns the network configuration that Multus keeps from ADD to DEL.
func (o older) config(t *testing.T, spoke string) (config keys) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", o.version, "cni", spoke+".json"))
	must(t, err)
	must(t, json.Unmarshal(b, &config))
	return config
}

// openWires opens the wires of the old pod and the old VM.
func (o older) openWires(t *testing.T) (pod, vm *host) {
	t.Helper()
	devices, err := filepath.Glob(o.vm.Sysfs(t) + "/class/net/" + o.vm.ifname + "/macvtap/tap*/dev")
	if err != nil || len(devices) != 1 {
		t.Fatalf("taps of the VM: %v, %v", devices, err)
	}
	var major, minor uint32
	_, err = fmt.Sscanf(read(t, devices[0]), "%d:%d", &major, &minor)
	must(t, err)
	pod = &host{Namespace: o.pod.Namespace, Wire: o.pod.Open(t, o.pod.ifname)}
	vm = &host{Namespace: o.vm.Namespace, Wire: netlab.OpenTap(t, major, minor)}
	pod.MAC, vm.MAC = segment.MAC(o.LAN, "srl"), segment.MAC(o.LAN, "vm")
	o.lanNetns(o.Segment).AwaitCarrier(t, "srl")
	o.lanNetns(o.Segment).AwaitCarrier(t, "vm")
	return pod, vm
}

// versions returns the versions that have a fixture.
func versions(t *testing.T) []string {
	t.Helper()
	entries, err := fs.ReadDir(os.DirFS("testdata"), ".")
	must(t, err)
	var versions []string
	for _, e := range entries {
		versions = append(versions, e.Name())
	}
	return versions
}

func TestSegmentsOfOlderVersionsAreAdopted(t *testing.T) {
	t.Parallel()
	for _, version := range versions(t) {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			o := olderNode(t, version)
			o.expectAdopted(t)
		})
	}
}

// After a downgrade to this version, fields that a newer version added are ignored.
func TestSegmentsOfANewerVersionAreAdopted(t *testing.T) {
	t.Parallel()
	o := olderNode(t, versions(t)[0])
	for _, file := range []string{o.Run + "/lan/" + o.Netns + ".json", o.deviceFileOf(o.pod), o.deviceFileOf(o.vm)} {
		b, err := os.ReadFile(file)
		must(t, err)
		newer := `{"later":{"than":["this"]},` + string(b[1:])
		must(t, os.WriteFile(file, []byte(newer), 0o600))
	}
	links := o.lanNetns(o.Segment).Netlink(t)
	for _, name := range []string{"srl", segment.PlugName("vm")} {
		l, err := links.LinkByName(name)
		must(t, err)
		must(t, links.LinkSetAlias(l, l.Attrs().Alias+" later=x"))
	}
	o.expectAdopted(t)
}

func (o older) deviceFileOf(a attachment) string { return a.deviceFile(a.config) }

// later is how long an adopted node must stay unchanged.
const later = 2 * time.Second

// expectAdopted runs today's daemon on the node. It must change nothing and lose no frame, and today's plugin must
// detach the old pods and attach new ones.
func (o older) expectAdopted(t *testing.T) {
	t.Helper()
	if index := o.withUnderlay(t, o.Segment).VXLAN.UnderlayIndex; index != o.VXLAN.UnderlayIndex {
		t.Fatalf("the underlay device has ifindex %d, and the record has %d", index, o.VXLAN.UnderlayIndex)
	}
	pod, vm := o.openWires(t)
	before := o.files(t)
	var sockets []*eventSocket
	for _, ns := range []netlab.Namespace{o.lanNetns(o.Segment), o.pod.Namespace, o.vm.Namespace} {
		socket := o.watchEvents(t, ns)
		socket.awaitQuiet(t)
		sockets = append(sockets, socket)
	}
	streams := []*stream{startStream(t, 1, pod, vm), startStream(t, 2, vm, pod)}
	m := o.manage(t)
	m.runs(t, o.Segment)
	<-time.After(later) // the daemon may observe once more
	for _, s := range streams {
		s.expectAll(t)
	}
	for _, socket := range sockets {
		if socket.sawLinkEvents(t) {
			t.Error("rtnetlink reported a change of a link")
		}
	}
	if after := o.files(t); after != before {
		t.Errorf("files were\n%s\nand are\n%s", before, after)
	}
	claims := o.observe(t, o.Segment).Claims()
	if len(claims) != 2 || claims[0].Spoke != "srl" || claims[1].Spoke != "vm" || claims[0].Pod != "srl-1" {
		t.Errorf("claims %+v", claims)
	}
	if ops := segment.Diff(o.Segment, o.observe(t, o.Segment)); len(ops) != 0 {
		t.Errorf("the daemon has to do %v", ops)
	}

	for _, a := range []attachment{o.pod, o.vm} {
		a.mustCall(t, "DEL", a.config)
		if links := a.Links(t); len(links) != 0 {
			t.Errorf("after DEL the pod has %v", links)
		}
	}
	if devices := o.devices(t); len(devices) != 0 {
		t.Errorf("CDI devices %v", devices)
	}
	one := o.attachByPlugin(t, o.Segment, "vm", segment.Veth)
	other := o.attachByPlugin(t, o.Segment, "srl", segment.Veth)
	from, err := one.speak(t, one.config)
	must(t, err)
	to, err := other.speak(t, other.config)
	must(t, err)
	o.lanNetns(o.Segment).AwaitCarrier(t, "vm")
	o.lanNetns(o.Segment).AwaitCarrier(t, "srl")
	reaches(t, from, to, frames.Stream(nil, vm.MAC, 1, 1))
}

// files returns the content of all files of k8slan on the node.
func (o older) files(t *testing.T) string {
	t.Helper()
	var all []string
	for _, dir := range []string{o.Run, o.CDI} {
		must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || filepath.Base(filepath.Dir(path)) == "netns" {
				return err
			}
			b, err := os.ReadFile(path)
			all = append(all, path+" "+string(b))
			return err
		}))
	}
	return strings.Join(all, "\n")
}

// awaitQuiet returns when rtnetlink has reported earlier changes, which it may delay by a second (linkwatch_event in
// net/core/link_watch.c).
func (e *eventSocket) awaitQuiet(t *testing.T) {
	t.Helper()
	const longest = 1200 * time.Millisecond
	for {
		must(t, e.file.SetReadDeadline(time.Now().Add(longest)))
		if _, err := e.file.Read(make([]byte, 1<<16)); errors.Is(err, os.ErrDeadlineExceeded) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// sawLinkEvents reports whether there was an event of a link so far, and closes the socket.
func (e *eventSocket) sawLinkEvents(t *testing.T) (saw bool) {
	t.Helper()
	defer e.file.Close()
	b := make([]byte, 1<<16)
	for {
		must(t, e.file.SetReadDeadline(time.Now().Add(2*time.Millisecond)))
		n, err := e.file.Read(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return saw
		}
		must(t, err)
		messages, err := syscall.ParseNetlinkMessage(b[:n])
		must(t, err)
		for _, m := range messages {
			saw = saw || m.Header.Type == unix.RTM_NEWLINK || m.Header.Type == unix.RTM_DELLINK
		}
	}
}
