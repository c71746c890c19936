package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/images"
)

func TestLibvirtRunsAVMOnItsTapAsUnderKubeVirt(t *testing.T) {
	l := newLab(t)
	l.load(images.Libvirt)
	l.lan("libvirt", 1042, []string{"lv-near", "lv-far", "lv-vm"})
	begin := time.Now()
	l.startLibvirt(worker2, 1)
	both := l.start(pod("near", worker2, "lv-near"), pod("far", worker1, "lv-far"))
	near, far := both[0], both[1]
	machine := l.host(libvirtVM(worker2))
	l.logTime("from kubectl apply to a guest that runs commands", begin)
	near.address("10.42.0.2/24", "fd42::2/64")
	far.address("10.42.0.1/24", "fd42::1/64")
	far.pings("10.42.0.3", "fd42::3")
	near.pings("10.42.0.3", "fd42::3")
	machine.fetches(far, "10.42.0.1")

	lan := l.awaitLAN("libvirt", "with the VM", func(lan *v1beta1.LAN) bool {
		return len(attachments(lan, "lv-vm")) == 1
	})
	if got := attachments(lan, "lv-vm")[0]; got.Kind != v1beta1.KindMacvtap || got.Interface != tapName ||
		got.MAC != machine.mac.String() {
		t.Errorf("the LAN's status has %+v; the guest's NIC has %s", got, machine.mac)
	}
	if machine.mtu != far.mtu {
		t.Errorf("the guest's MTU is %d, a pod's %d", machine.mtu, far.mtu)
	}
	l.wantsQEMU(worker2, "107:107 107:107 1")
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

	if state := virsh(machine, "domstate", "vm"); state != "running" {
		t.Errorf("libvirt reports the VM as %q, want running", state)
	}
	virsh(machine, "destroy", "vm")
	if state := virsh(machine, "domstate", "vm"); state != "shut off" {
		t.Errorf("libvirt reports the destroyed VM as %q, want shut off", state)
	}
	l.delete(&corev1.Pod{}, "vm-1")
	l.awaitPodGone("vm-1")

	// The same VM is created again on the other node with two queues in its NIC, so that libvirt opens the tap twice.
	l.startLibvirt(worker1, 2)
	again := l.host(libvirtVM(worker1))
	if again.mac.String() != machine.mac.String() {
		t.Errorf("the VM's MAC was %s and is %s on the other node", machine.mac, again.mac)
	}
	l.wantsQEMU(worker1, "107:107 107:107 2")
	if queues := again.sh("cd /sys/class/net/eth0/queues && echo *"); queues != "rx-0 rx-1 tx-0 tx-1" {
		t.Errorf("the guest's NIC has the queues %q, want two", queues)
	}
	near.pings("10.42.0.3")
	far.reaches("fd42::3") // once the guest has found that no other host has the address
	again.fetches(near, "fd42::2")
	crosses(near, again)
}

// load builds an image and loads it into both nodes.
func (l lab) load(build func(ctx context.Context, cacheDir string) (archive string, err error)) {
	l.Helper()
	archive, err := build(l.Context(), l.bed.CacheDir)
	if err != nil {
		l.Fatal(err)
	}
	if err := l.bed.Cluster.LoadImage(l.Context(), archive); err != nil {
		l.Fatal(err)
	}
}

// libvirtVM returns the VM that libvirt runs.
func libvirtVM(node string) workload { return vm("vm-1", node, "lv-vm", "10.42.0.3/24", "fd42::3/64") }

// startLibvirt creates the VM with that many queues.
func (l lab) startLibvirt(node string, queues int) {
	l.Helper()
	l.apply(l.manifest("libvirt", struct {
		workload
		Queues int
	}{libvirtVM(node), queues}))
}

// virsh runs virsh in the VM's container.
func virsh(vm host, args ...string) string {
	vm.Helper()
	vm.prefix = []string{"virsh", "--quiet"}
	return vm.run(args...)
}

// wantsQEMU compares the user of libvirt's QEMU on a node, the owner of its tap, and how often the tap is open.
func (l lab) wantsQEMU(node, want string) {
	l.Helper()
	got := l.machine(node).run("sh", "-ec",
		`cd /proc/$(pgrep -o -f guest=vm) && stat -c %u:%g . root/dev/tap* && find fd -lname '/dev/tap*' | wc -l`)
	if got := strings.Join(strings.Fields(got), " "); got != want {
		l.Errorf("user of QEMU, owner of its tap, and how often the tap is open: %s, want %s", got, want)
	}
}
