package e2e

import (
	"testing"
	"time"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/frames"
)

func TestVMTalksToPodsOfBothNodesThroughItsTap(t *testing.T) {
	l := newLab(t)
	l.lan("vms", 1040, []string{"vms-near", "vms-far", "vms-vm"})
	begin := time.Now()
	l.create(vm("vm-1", worker2, "vms-vm", "10.40.0.3/24", "fd40::3/64"), pod("near", worker2, "vms-near"),
		pod("far", worker1, "vms-far"))
	near, far := l.host(pod("near", worker2, "vms-near")), l.host(pod("far", worker1, "vms-far"))
	machine := l.host(vm("vm-1", worker2, "vms-vm"))
	l.logTime("from kubectl apply to a guest that runs commands", begin)
	near.address("10.40.0.2/24", "fd40::2/64")
	far.address("10.40.0.1/24", "fd40::1/64")
	far.pings("10.40.0.3", "fd40::3")
	near.pings("10.40.0.3", "fd40::3")
	machine.pings("10.40.0.1", "fd40::1", "10.40.0.2")

	a := l.awaitLAN("vms", "with the VM", func(lan *v1beta1.LAN) bool { return len(attachments(lan, "vms-vm")) == 1 })
	if got := attachments(a, "vms-vm")[0]; got.Kind != v1beta1.KindMacvtap || got.Interface != tapName ||
		got.MAC != machine.mac.String() {
		t.Errorf("the LAN's status has %+v; the guest's NIC has %s", got, machine.mac)
	}
	if machine.mtu != far.mtu {
		t.Errorf("the guest's MTU is %d, a pod's %d", machine.mtu, far.mtu)
	}
	t.Run("frames of every kind into the tap from the other node", func(t *testing.T) {
		crosses(far.in(t), machine.in(t))
	})
	t.Run("frames of every kind out of the tap to the other node", func(t *testing.T) {
		crosses(machine.in(t), far.in(t))
	})
	t.Run("frames of every kind into the tap from the same node", func(t *testing.T) {
		crosses(near.in(t), machine.in(t))
	})
	t.Run("frames of every kind out of the tap to the same node", func(t *testing.T) {
		crosses(machine.in(t), near.in(t))
	})
	t.Run("frames of the full MTU with two tags out of the tap", func(t *testing.T) {
		machine, far := machine.in(t), far.in(t)
		machine.run("ip", "link", "add", "link", machine.link, "name", "provider", "type", "vlan", "protocol",
			"802.1ad", "id", "200")
		machine.sh("ip link set provider mtu %d && ip link set provider up", machine.mtu)
		listener := far.listen("listen", "--for", "10s", "--count", "1", "--marker", "full-mtu-8021q")
		machine.run("frames", "-i", "provider", "catalog", "--name", "full-mtu-8021q")
		received, err := listener.all()
		want := ""
		for _, f := range frames.Catalog(machine.mac, machine.mtu) {
			if f.Name == "full-mtu-8021q" {
				want = hexed(frames.Tag(f.Bytes, frames.Dot1AD, 200))
			}
		}
		if err != nil || len(received) != 1 || received[0] != want {
			t.Errorf("%s received %q (%v), want %q", far, received, err, want)
		}
	})
}

func TestTapBelongsToQEMUAndIsSilentUntilTheGuestStarts(t *testing.T) {
	l := newLab(t)
	l.lan("quiet", 1041, []string{"quiet-pod", "quiet-vm"})
	quiet := l.start(pod("quiet", worker1, "quiet-pod"))[0]
	listener := quiet.listen("listen", "--for", "90s")

	g := vm("vm-1", worker2, "quiet-vm", "10.41.0.2/24")
	g.Wait = true
	waiting := l.start(g)[0]
	waiting.awaitLog("opened /dev/tap")
	m := l.machine(worker2)
	// IPv6 sends router solicitations 0, 4 and 8 s after a link's start.
	select {
	case frame := <-listener.lines:
		t.Errorf("before QEMU's start the LAN carried %s", frame)
	case <-time.After(9 * time.Second):
	}
	if owner := m.tapOwner("/vm run"); owner != "107:107" {
		t.Errorf("the tap in the container belongs to %s, want 107:107", owner)
	}
	waiting.run("/vm", "start")
	select {
	case <-listener.lines:
	case <-time.After(patience):
		t.Error("the guest sends nothing")
	}
}
