package dataplane

import (
	"encoding/json"
	"errors"
	"slices"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/k8slan/k8slan/cni"
	"github.com/k8slan/k8slan/lanmgr/segment"
	"github.com/k8slan/k8slan/test/frames"
	"github.com/k8slan/k8slan/test/netlab"
)

// pool returns a LAN on this node that has a spoke and a pool of that size.
func (n node) pool(t *testing.T, name string, vni uint32, size int) segment.Segment {
	t.Helper()
	s := n.withUnderlay(t, lan(name, vni, "srl"))
	for number := range size {
		s.Spokes = append(s.Spokes, segment.Port("web", number))
	}
	s.Node, s.Generation = n.Name, int64(size)
	slices.Sort(s.Spokes)
	return s
}

// attachToPort attaches a new sandbox to a port of a pool by the CNI plugin.
func (n node) attachToPort(t *testing.T, s segment.Segment, port string, kind segment.Kind) *poolMember {
	t.Helper()
	m := &poolMember{sandbox: n.sandbox(t), config: pooled(s, port, kind)}
	var out []byte
	m.Wire, out = m.add(t, s, m.config)
	var result current.Result
	if err := json.Unmarshal(out, &result); err != nil || len(result.Interfaces) != 2 {
		t.Fatalf("result %s: %v", out, err)
	}
	if m.mac = result.Interfaces[1].Mac; m.mac != s.PlugMAC(port).String() {
		t.Errorf("%s on %s has the MAC %s, want %s", port, n.Name, m.mac, s.PlugMAC(port))
	}
	return m
}

// poolMember is a pod or a VM on a port of a pool.
type poolMember struct {
	sandbox
	netlab.Wire
	config keys
	mac    string
}

// broadcasts sends a frame from each member and expects all others to receive it once.
func broadcasts(t *testing.T, all ...*poolMember) {
	t.Helper()
	for i, from := range all {
		frame := frames.Stream(nil, segment.MAC(segment.LAN{Name: from.id}, "from"), uint32(i), 1)
		if err := from.Send(frame); err != nil {
			t.Fatal(err)
		}
		for j, to := range all {
			if j == i {
				continue
			}
			if got, err := next(to.Wire, frameTimeout); err != nil || !slices.Equal(got, frame) {
				t.Fatalf("member %d received %x from member %d, %v; want %x", j, got, i, err, frame)
			}
		}
	}
}

func TestPoolIsResizedWhilePodsAndVMsAreAttached(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	ma, mb := a.manage(t), b.manage(t)
	size := func(n int) (onA, onB segment.Segment) {
		onA, onB = a.pool(t, "pool", 140, n), b.pool(t, "pool", 140, n)
		ma.runs(t, onA)
		mb.runs(t, onB)
		return onA, onB
	}
	sa, sb := size(3)
	pod, twin := a.attachToPort(t, sa, "web_0", segment.Veth), b.attachToPort(t, sb, "web_0", segment.Veth)
	if pod.mac == twin.mac {
		t.Errorf("ports with one number on two nodes have one MAC, %s", pod.mac)
	}
	vm := b.attachToPort(t, sb, "web_2", segment.Macvtap)
	broadcasts(t, pod, twin, vm)

	sa, _ = size(12)
	late := a.attachToPort(t, sa, "web_11", segment.Veth)
	broadcasts(t, pod, twin, vm, late)

	sa, _ = size(1)
	broadcasts(t, pod, twin, vm, late)
	a.sandbox(t).mustFail(t, "ADD", pooled(sa, "web_1", segment.Veth), cni.CodeNoSpoke,
		`no pool "web" with a port "web_1"`)
	for node, withdrawn := range map[*node]string{&a: "web_11", &b: "web_2"} {
		if have := node.observe(t, sa); len(ports(have)) != 2 || !slices.Contains(ports(have), withdrawn) {
			t.Errorf("%s has the ports %v, want web_0 and %s", node.Name, ports(have), withdrawn)
		}
	}

	// Multus may have lost its cache of the pod: then the kernel says which port the pod has.
	late.mustCall(t, "DEL", with(late.config, keys{"deviceID": ""}))
	vm.mustCall(t, "DEL", with(vm.config, keys{"deviceID": ""}))
	for _, node := range []node{a, b} {
		node.awaitState(t, sa, "the ports that are one too many to go", func(have segment.State) bool {
			return slices.Equal(ports(have), []string{"web_0"})
		})
		if devices := node.devices(t); len(devices) != 1 {
			t.Errorf("%s has the CDI devices %v, want only that of web_0", node.Name, devices)
		}
	}
	broadcasts(t, pod, twin)
	pod.mustCall(t, "DEL", pod.config)
	successor := a.attachToPort(t, sa, "web_0", segment.Macvtap)
	broadcasts(t, successor, twin)
	successor.mustCall(t, "DEL", successor.config)
	twin.mustCall(t, "DEL", twin.config)
	for _, node := range []node{a, b} {
		if devices := node.devices(t); len(devices) != 0 {
			t.Errorf("%s: devices are left: %v", node.Name, devices)
		}
	}
}

// ports returns the ports of pools that have a standing pair, sorted.
func ports(have segment.State) []string {
	var names []string
	for _, l := range have.Links {
		spoke, _ := l.Spoke()
		if _, _, ok := segment.PoolOf(spoke); ok && l.Name == segment.PortName(spoke) {
			names = append(names, spoke)
		}
	}
	slices.Sort(names)
	return names
}

func TestResizingAPoolLosesNoFrame(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	ma, mb := a.manage(t), b.manage(t)
	sa, sb := a.pool(t, "resized", 141, 4), b.pool(t, "resized", 141, 4)
	ma.runs(t, sa)
	mb.runs(t, sb)
	left, right := a.attach(t, sa, "web_0", segment.Veth), b.attach(t, sb, "web_3", segment.Veth)
	bothWays(t, left, right)
	streams := []*stream{startStream(t, 1, left, right), startStream(t, 2, right, left)}
	for range 4 {
		for _, size := range []int{16, 1, 4} {
			ma.runs(t, a.pool(t, "resized", 141, size))
			mb.runs(t, b.pool(t, "resized", 141, size))
		}
	}
	for _, s := range streams {
		s.expectAll(t)
	}
}

func TestMACsByOrdinalAreEqualOnAllNodes(t *testing.T) {
	t.Parallel()
	a, b := twoNodes(t)
	var macs []string
	for i, h := range []node{a, b} {
		s := h.pool(t, "ordinal", 142, 2)
		s.MACByOrdinal = []string{"web"}
		h.reconcile(t, s)
		pod := netlab.NewPod(t)
		r := request(s, segment.Port("web", i), segment.Veth, pod)
		if _, err := h.kernel.Claim(t.Context(), r); !errors.Is(err, segment.ErrNoOrdinal) {
			t.Fatalf("a pod called %q: %v", r.Pod, err)
		}
		r.Pod = "db-7"
		made, err := h.kernel.Claim(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		expectLink(t, pod, ifname, made.MAC.String(), lanMTU)
		if err := h.kernel.CheckClaim(t.Context(), r); err != nil {
			t.Error(err)
		}
		macs = append(macs, made.MAC.String())
	}
	if macs[0] != macs[1] {
		t.Errorf("pods with one ordinal on two nodes have the MACs %v", macs)
	}
	s := a.pool(t, "ordinal", 142, 2)
	_, err := a.sandbox(t).call("ADD", pooled(s, "db_0", segment.Veth))
	if said, ok := errors.AsType[*types.Error](err); !ok || said.Code != cni.CodeNoSpoke {
		t.Errorf("a pool that is not on the node: %v", err)
	}
}
