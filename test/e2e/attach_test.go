package e2e

import (
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

func TestPodGetsTheRequestedNameMACAndMTU(t *testing.T) {
	l := newLab(t)
	l.lan("asked", 1010, []string{"asked"})
	g := pod("asked", worker1, "asked")
	g.Networks = `[{"name": "k8slan-veth-asked", "interface": "ge-0.0.1", "mac": "02:6b:5c:10:00:01", ` +
		`"cni-args": {"mtu": 1300}}]`
	l.create(g)
	l.awaitRunning("asked")
	s := host{lab: l, pod: "asked", node: worker1, link: "ge-0.0.1"}
	s.readLink()
	if s.mac.String() != "02:6b:5c:10:00:01" || s.mtu != 1300 {
		t.Errorf("the pod's interface has %s and MTU %d, want 02:6b:5c:10:00:01 and 1300", s.mac, s.mtu)
	}
	l.awaitLAN("asked", "with its pod", func(lan *v1beta1.LAN) bool {
		a := attachments(lan, "asked")
		return len(a) == 1 && a[0].Interface == "ge-0.0.1" && a[0].MAC == "02:6b:5c:10:00:01" && a[0].Node == worker1 &&
			a[0].Pod == l.namespace+"/asked" && a[0].Kind == v1beta1.KindVeth && lan.Status.Attached == 1
	})
}

func TestPodKeepsItsMACWhenItIsRecreatedOnAnyNode(t *testing.T) {
	l := newLab(t)
	l.lan("moving", 1011, []string{"moving"})
	var mac net.HardwareAddr
	for _, node := range []string{worker1, worker2, worker1} {
		s := l.start(pod("moving", node, "moving"))[0]
		if mac == nil {
			mac = s.mac
		}
		if s.mac.String() != mac.String() {
			t.Errorf("on %s the pod's MAC is %s, it was %s", node, s.mac, mac)
		}
		want := l.awaitSegment(node, "moving", "attached", func(s v1beta1.SegmentStatus) bool {
			return len(s.Attachments) == 1
		})
		if s.mtu != int(want.MTU) || s.mtu != l.underlay.mtu {
			t.Errorf("on %s the pod's MTU is %d and LANNode says %d; want %d, because the underlay's is 1500", node,
				s.mtu, want.MTU,
				l.underlay.mtu)
		}
		l.delete(&corev1.Pod{}, "moving")
		l.awaitPodGone("moving")
	}
}

func TestPodGetsAddressesFromTheLANsIPAM(t *testing.T) {
	l := newLab(t)
	l.lan("ipam", 1012, []string{"ipam-1", "ipam-2"},
		`ipam: {type: host-local, dataDir: /run/e2e-ipam, ranges: [[{subnet: 10.12.0.0/24}], [{subnet: "fd12::/64"}]]}`)
	s := l.start(pod("ipam-1", worker1, "ipam-1"))[0]
	out := s.sh("ip addr show dev %s scope global", s.link)
	if !strings.Contains(out, "inet 10.12.0.") || !strings.Contains(out, "inet6 fd12::") ||
		strings.Contains(out, "tentative") {
		t.Errorf("the pod's interface does not have a usable address of each family:\n%s", out)
	}
}

func TestPodWithoutTheResourceLimitFailsWithASentence(t *testing.T) {
	l := newLab(t)
	l.lan("nolimit", 1013, []string{"nolimit"})
	g := pod("nolimit", worker1, "nolimit")
	g.Spokes = nil
	l.create(g)
	l.awaitEvent("nolimit", "FailedCreatePodSandBox",
		`spoke "nolimit" of LAN `+l.namespace+`/nolimit: kubelet allocated no macvtap.k8slan.io/k8slan-veth-nolimit `+
			`to this pod. Either none of its containers has it in resources.limits: add it there; `+
			`or the pod is bound to a node that did not advertise it: see kubectl get lan`)
}

func TestPodOfAnotherNamespaceNeedsAllowedNamespaces(t *testing.T) {
	l := newLab(t)
	l.lan("closed", 1014, []string{"closed"})
	blue := l.otherNamespace()
	config := `{"cniVersion": "1.0.0", "name": "stolen", "type": "k8slan", "kind": "veth", "lan": "` + l.namespace +
		`/closed", "ns": "` +
		l.namespace + `.closed", "spoke": "closed"}`
	blue.apply(`apiVersion: k8s.cni.cncf.io/v1
kind: NetworkAttachmentDefinition
metadata:
  name: stolen
  annotations:
    k8s.v1.cni.cncf.io/resourceName: macvtap.k8slan.io/k8slan-veth-closed
spec:
  config: '` + config + `'
`)
	g := pod("thief", worker1, "closed")
	g.Networks = "stolen"
	blue.create(g)
	blue.awaitEvent("thief", "FailedCreatePodSandBox",
		"LAN "+l.namespace+"/closed is not open to namespace "+blue.namespace+"; its owner can add "+
			blue.namespace+" to spec.allowedNamespaces")
	thief := &corev1.Pod{}
	if err := l.bed.client.Get(t.Context(), client.ObjectKey{Namespace: blue.namespace, Name: "thief"},
		thief); err != nil {
		t.Fatal(err)
	}
	if thief.Status.Phase != corev1.PodPending {
		t.Errorf("the pod is %s, want Pending", thief.Status.Phase)
	}
	l.edit("closed", func(s *v1beta1.LANSpec) { s.AllowedNamespaces = []string{blue.namespace} })
	blue.awaitRunning("thief")
	l.awaitLAN("closed", "with the pod of the other namespace", func(lan *v1beta1.LAN) bool {
		a := attachments(lan, "closed")
		return len(a) == 1 && a[0].Pod == blue.namespace+"/thief"
	})
}

// attachments returns those of one spoke.
func attachments(lan *v1beta1.LAN, spoke string) []v1beta1.SpokeAttachment {
	for _, s := range lan.Status.Spokes {
		if s.Name == spoke {
			return s.Attachments
		}
	}
	return nil
}

// A second pod for a claimed spoke waits. It takes the spoke over while the old pod's sandbox still exists: a pod that
// is deleted by force leaves the API at once, even if its node cannot end it.
func TestNewPodTakesOverASpoke(t *testing.T) {
	kinds := map[string]func(name, node, spoke string, addresses ...string) workload{
		"pod": func(name, node, spoke string, _ ...string) workload { return pod(name, node, spoke) },
		"VM":  vm,
	}
	l := newLab(t)
	vni := 1020
	tests := map[string]func(lab){}
	for _, from := range []string{"pod", "VM"} {
		for _, to := range []string{"pod", "VM"} {
			vni++
			spoke, vni := strings.ToLower("next-"+from+"-"+to), vni
			tests["from "+from+" to "+to] = func(l lab) {
				l.lan(spoke, vni, []string{spoke, spoke[5:] + "-x"})
				network := "10." + strconv.Itoa(vni-1000) + ".0."
				older, younger := kinds[from](spoke+"-old", worker1, spoke),
					kinds[to](spoke+"-new", worker1, spoke, network+"2/24")
				older.Wait = from == "VM" // it keeps its tap open
				old := l.start(older)[0]
				l.create(younger)
				l.awaitPending(younger.Name, spoke)

				thaw := l.machine(worker1).freeze(old.uid)
				l.delete(&corev1.Pod{}, older.Name, client.GracePeriodSeconds(0))
				begin := time.Now()
				l.awaitRunning(younger.Name)
				l.logTime("from kubectl delete --force to a new "+to+" that runs", begin)
				if l.machine(worker1).sandboxGone(old.uid) {
					l.Error("the old sandbox ended before the new one had the spoke, so nothing was taken over")
				}
				next := l.host(younger)
				if to == "pod" {
					next.address(network + "2/24")
				}
				far := l.start(pod(spoke+"-far", worker2, spoke[5:]+"-x"))[0]
				far.address(network + "1/24")
				far.reaches(network + "2")
				thaw()
				l.machine(worker1).awaitSandboxGone(old.uid)
				far.pings(network + "2") // the old pod's end does not touch the new one
				l.awaitLAN(spoke, "with only the new pod", func(lan *v1beta1.LAN) bool {
					a := attachments(lan, spoke)
					return len(a) == 1 && a[0].Pod == l.namespace+"/"+younger.Name
				})
			}
		}
	}
	l.sideBySide(tests)
}

func TestNextPodGetsASpokeAfterTheFirstIsDeleted(t *testing.T) {
	l := newLab(t)
	l.lan("polite", 1030, []string{"polite"})
	l.start(pod("first", worker1, "polite"))
	l.create(pod("second", worker1, "polite"))
	l.awaitPending("second", "polite")
	l.delete(&corev1.Pod{}, "first")
	l.awaitRunning("second")
}
