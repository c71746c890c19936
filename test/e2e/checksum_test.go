package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/frames"
)

// networkFunction is a network function on a host. It reads frames raw, and drops packets that have a wrong checksum or
// are larger than the MTU. The kernel does not have its addresses.
type networkFunction struct {
	host
	addresses []string
}

// in is the same function for a subtest.
func (f networkFunction) in(t *testing.T) networkFunction {
	f.host = f.host.in(t)
	return f
}

func TestTxChecksumOffLetsTCPReachARawNetworkFunction(t *testing.T) {
	l := newLab(t)
	l.lan("raw", 1043, []string{"raw-near", "raw-fin", "raw-far", "raw-pod", "raw-vm", "raw-plain"},
		"spokeOptions: {raw-fin: {txChecksum: off}}")
	plain := vm("plain", worker1, "raw-plain")
	plain.Plain = true
	all := l.start(
		pod("near", worker2, "raw-near"), pod("fin", worker2, "raw-fin"), pod("far", worker1, "raw-far"),
		pod("pod", worker2, "raw-pod"), vm("vm", worker2, "raw-vm", "10.43.0.5/24", "fd43::5/64"), plain,
	)
	for i, s := range all[:3] {
		s.address(fmt.Sprintf("10.43.0.%d/24", i+1), fmt.Sprintf("fd43::%d/64", i+1))
	}
	near, fin, far := all[0], all[1], all[2]
	inPod := networkFunction{all[3], []string{"10.43.0.14", "fd43::14"}}
	inVM := networkFunction{all[4], []string{"10.43.0.15", "fd43::15"}}
	inPlainVM := networkFunction{all[5], []string{"10.43.0.16", "fd43::16"}}

	t.Run("on", func(t *testing.T) {
		t.Run("ping works and TCP doesn't, on the same node", func(t *testing.T) {
			wantsOnlyPing(near.in(t), inPod.in(t))
		})
		t.Run("ping works and TCP doesn't, into a VM", func(t *testing.T) { wantsOnlyPing(near.in(t), inVM.in(t)) })
		t.Run("TCP works into a VM whose NIC has no offloads", func(t *testing.T) {
			wantsTCP(near.in(t), inPlainVM.in(t))
		})
		t.Run("TCP works on the same node from a spoke that has it off", func(t *testing.T) {
			wantsTCP(fin.in(t), inPod.in(t))
		})
		t.Run("Linux's own TCP works", func(t *testing.T) { wantsSessions(near.in(t), far.in(t), inVM.in(t)) })
	})
	everywhere := func(t *testing.T) {
		t.Run("TCP works on the same node", func(t *testing.T) { wantsTCP(near.in(t), inPod.in(t)) })
		t.Run("TCP works from the other node", func(t *testing.T) { wantsTCP(far.in(t), inPod.in(t)) })
		t.Run("TCP works into a VM", func(t *testing.T) { wantsTCP(near.in(t), inVM.in(t)) })
		t.Run("TCP works into a VM from the other node", func(t *testing.T) { wantsTCP(far.in(t), inVM.in(t)) })
		t.Run("TCP works out of a VM", func(t *testing.T) { wantsTCP(inVM.host.in(t), inPod.in(t)) })
		t.Run("Linux's own TCP works", func(t *testing.T) { wantsSessions(near.in(t), far.in(t), inVM.in(t)) })
	}
	l.change("raw", func(s *v1beta1.LANSpec) {
		off := v1beta1.SpokeOptions{TxChecksum: v1beta1.Off}
		s.SpokeOptions = map[string]v1beta1.SpokeOptions{"raw-pod": off, "raw-vm": off}
	})
	t.Run("off for the function's spoke", everywhere)
	l.change("raw", func(s *v1beta1.LANSpec) { s.SpokeOptions, s.TxChecksum = nil, v1beta1.Off })
	t.Run("off for the LAN", everywhere)
	l.change("raw", func(s *v1beta1.LANSpec) { s.TxChecksum = v1beta1.On })
	t.Run("on again", func(t *testing.T) { wantsOnlyPing(near.in(t), inPod.in(t)) })
}

// change edits a LAN's spec and returns when both nodes have applied it.
func (l lab) change(name string, edit func(*v1beta1.LANSpec)) {
	l.Helper()
	l.edit(name, edit)
	generation := l.ready(name).Generation
	for _, node := range []string{worker1, worker2} {
		l.awaitSegment(node, name, fmt.Sprintf("of generation %d", generation), func(s v1beta1.SegmentStatus) bool {
			return s.Generation == generation
		})
	}
}

// wantsSessions wants Linux's own TCP to work within the node, across nodes, and into and out of a VM.
func wantsSessions(near, far host, vm networkFunction) {
	near.fetches(far, "10.43.0.3")
	far.fetches(near, "fd43::1")
	vm.fetches(near, "10.43.0.1")
	near.fetches(vm.host, "fd43::5")
}

// wantsTCP sends a megabyte over IPv4 and one over IPv6. All of it must arrive, without a bad packet.
func wantsTCP(from host, to networkFunction) {
	to.Helper()
	program := to.respond()
	for _, a := range to.addresses {
		if _, err := from.try("sh", "-ec",
			fmt.Sprintf("ping -c 1 -W 5 %s; head -c 1000000 /dev/urandom | timeout 20 nc %[1]s 179", a)); err != nil {
			to.Error(err)
			to.run("killall", "frames")
		}
	}
	if received := program.tally(); received.Bytes != 2_000_000 || received.Opened != 2 || received.Closed != 2 ||
		received.Bad+received.TooLarge > 0 {
		to.Errorf("from %s, %s received %+v, want two connections with a megabyte each and no bad packet", from, to,
			received)
	}
}

// wantsOnlyPing wants pings to be answered, and TCP connections to fail because of wrong checksums.
func wantsOnlyPing(from host, to networkFunction) {
	to.Helper()
	program := to.respond()
	for _, a := range to.addresses {
		from.sh("ping -c 1 -W 5 %s", a)
		if out, err := from.try("sh", "-c", "echo hello | timeout 1 nc "+a+" 179"); err == nil {
			from.Errorf("TCP from %s to %s at %s works: %q", from, a, to, out)
		}
	}
	to.run("killall", "frames")
	if received := program.tally(); received.Pings != 2 || received.Bad < 2 || received.Opened > 0 {
		to.Errorf("from %s, %s received %+v, want two pings, bad segments, and no connection", from, to, received)
	}
}

// respond starts the function, which ends after two TCP connections.
func (f networkFunction) respond() listener {
	f.Helper()
	return f.listen("respond", "--address", strings.Join(f.addresses, ","), "--count", "2", "--for", "60s")
}

// tally returns the counts that the program prints at its end.
func (h listener) tally() frames.Received {
	h.Helper()
	lines, err := h.all()
	var received frames.Received
	if err == nil && len(lines) != 1 {
		err = fmt.Errorf("it printed %q", lines)
	}
	if err == nil {
		err = json.Unmarshal([]byte(lines[0]), &received)
	}
	if err != nil {
		h.Fatalf("the network function at %s: %v", h.host, err)
	}
	return received
}
