package e2e

import (
	"context"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

func TestPodsWaitForAMissingUnderlay(t *testing.T) {
	l := newLab(t)
	l.apply(l.lanYAML("lost", 1050, []string{"lost-1", "lost-2"}, "vxlanDevMap: {worker2: eth7}"))
	l.create(pod("lost-1", worker1, "lost-1"), pod("lost-2", worker2, "lost-2"))
	l.wantsWaiting(v1beta1.ReasonUnderlayMissing, "lost", "lost-2", `no device "eth7" (spec.vxlanDevMap.worker2)`)

	var addresses []string
	if l.underlay.oneByOne() {
		addresses = append(addresses, l.underlay.spare().address(1))
	}
	l.machine(worker2).addDevice("eth7", addresses...)
	l.wantsWorking("lost")
}

func TestPodsWaitForIPv6OnTheUnderlay(t *testing.T) {
	l := newLab(t).over(multicast)
	m := l.machine(worker2)
	m.addDevice("eth8")
	m.ownNetns().Sysctl(t, "net/ipv6/conf/eth8/disable_ipv6", "1")
	l.apply(l.lanYAML("sixless", 1051, []string{"sixless-1", "sixless-2"}, "vxlanDevMap: {worker2: eth8}"))
	l.create(pod("sixless-1", worker1, "sixless-1"), pod("sixless-2", worker2, "sixless-2"))
	l.wantsWaiting(v1beta1.ReasonUnderlayNoAddress, "sixless", "sixless-2", `IPv6 is switched off on device "eth8"`)

	m.ownNetns().Sysctl(t, "net/ipv6/conf/eth8/disable_ipv6", "0")
	l.wantsWorking("sixless")
}

// wantsWaiting wants a pod on worker2 to wait for its LAN, and LANNode, LAN and events to have the reason.
func (l lab) wantsWaiting(reason, lan, pod, sentence string) {
	l.Helper()
	l.awaitPending(pod, pod)
	l.awaitSegment(worker2, lan, "NotReady for "+reason+": "+sentence, func(s v1beta1.SegmentStatus) bool {
		return s.State == v1beta1.SegmentNotReady && s.Reason == reason && strings.Contains(s.Message, sentence)
	})
	l.awaitLAN(lan, "Degraded for "+reason, func(lan *v1beta1.LAN) bool {
		c := condition(lan, v1beta1.ConditionReady)
		return lan.Status.State == v1beta1.StateDegraded && lan.Status.Reason == reason && lan.Status.Nodes == "1/2" &&
			c.Status == "False" && c.Reason == reason && containsAll(c.Message, []string{sentence, worker2})
	})
	l.awaitEvent(lan, reason, worker2, sentence)
}

// wantsWorking wants the pods <lan>-1 and <lan>-2 to run and to reach each other.
func (l lab) wantsWorking(lan string) {
	l.Helper()
	begin := time.Now()
	l.ready(lan)
	l.logTime("until the LAN was Ready", begin)
	one, two := l.host(pod(lan+"-1", worker1, lan+"-1")), l.host(pod(lan+"-2", worker2, lan+"-2"))
	l.logTime("until the waiting pod ran", begin)
	one.address(address(1) + "/24")
	two.address(address(2) + "/24")
	one.reaches(address(2))
	two.pings(address(1))
}

// An underlay is back when its address is back: IPv6 first looks for duplicates of it for a second or two.
func TestTrafficIsBackWithinASecondOfItsUnderlay(t *testing.T) {
	newLab(t).trafficIsBackWithinASecondOfItsUnderlay()
}

func (l lab) trafficIsBackWithinASecondOfItsUnderlay() {
	l.Helper()
	device := l.underlay.second
	one, two := l.pair("cut", 1052, "vxlanDevMap: {worker2: "+device+"}")
	node := l.machine(worker2)
	l.restoreAfterwards(node, device)
	degraded := func(reason string) {
		l.Helper()
		l.awaitLAN("cut", "Degraded for "+reason+", with its pods", func(lan *v1beta1.LAN) bool {
			return lan.Status.State == v1beta1.StateDegraded && lan.Status.Reason == reason && lan.Status.Attached >= 2
		})
	}
	for _, c := range []struct {
		what   string
		broken func()
		mended func()
	}{
		{"after its carrier was lost", func() {
			l.try(node.CutUnderlay(device))
			degraded(v1beta1.ReasonUnderlayDown)
			l.start(pod("cut-3", worker2, "cut-3")) // spokes are healthy all the same
		}, func() { l.try(node.RestoreUnderlay(device)) }},
		{"after it was set down", func() {
			node.run("ip", "link", "set", device, "down")
			degraded(v1beta1.ReasonUnderlayDown)
		}, func() { l.try(node.RestoreUnderlay(device)) }},
		{"after it was removed", func() {
			l.try(node.RemoveUnderlay(device))
			degraded(v1beta1.ReasonUnderlayMissing)
			l.awaitAllocatable(worker2, "cut-3", 0) // a pod that the scheduler binds before fails for good
			l.delete(&corev1.Pod{}, "cut-3")
			l.awaitPodGone("cut-3")
			l.create(pod("cut-3", worker2, "cut-3"))
			l.awaitPending("cut-3", "cut-3")
		}, func() {
			l.try(node.RestoreUnderlay(device))
		}},
	} {
		l.Run(c.what, func(t *testing.T) {
			trafficIsBack(one.in(t), two.in(t), c.broken, func() time.Time {
				begin := time.Now()
				c.mended()
				back := node.awaitAddress(device)
				t.Logf("the underlay's address was back after %s", back.Sub(begin).Round(time.Millisecond))
				return back
			})
			l.ready("cut")
		})
	}
	one.pings(address(2))
	l.awaitRunning("cut-3")
}

// Without duplicate address detection, the underlay is back when its link is.
func TestTrafficIsBackWithinASecondOfItsUnderlaysLink(t *testing.T) {
	l := newLab(t)
	node := l.machine(worker2)
	for _, device := range []string{l.underlay.second, "default"} { // a new device has the default
		setting := "/proc/sys/net/ipv6/conf/" + device + "/accept_dad"
		before := strings.TrimSpace(node.run("cat", setting))
		node.run("sh", "-c", "echo 0 >"+setting)
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if _, err := node.Exec(ctx, "sh", "-c", "echo "+before+" >"+setting); err != nil {
				t.Error(err)
			}
		})
	}
	device := l.underlay.second
	one, two := l.pair("prompt", 1053, "vxlanDevMap: {worker2: "+device+"}")
	l.restoreAfterwards(node, device)
	for _, c := range []struct {
		what           string
		reason         string
		broken, mended func()
	}{
		{
			"after it was set down", v1beta1.ReasonUnderlayDown,
			func() { node.run("ip", "link", "set", device, "down") }, func() { l.try(node.RestoreUnderlay(device)) },
		},
		{
			"after it was removed", v1beta1.ReasonUnderlayMissing,
			func() { l.try(node.RemoveUnderlay(device)) }, func() { l.try(node.RestoreUnderlay(device)) },
		},
	} {
		t.Run(c.what, func(t *testing.T) {
			trafficIsBack(one.in(t), two.in(t), func() {
				c.broken()
				l.awaitLAN("prompt", "Degraded for "+c.reason, func(lan *v1beta1.LAN) bool {
					return lan.Status.State == v1beta1.StateDegraded && lan.Status.Reason == c.reason
				})
			}, func() time.Time {
				begin := time.Now()
				c.mended()
				return begin
			})
			l.ready("prompt")
		})
	}
}

// trafficIsBack breaks the underlay between two pods and restores it. It wants traffic back within a second of the time
// that mended returns.
func trafficIsBack(one, two host, broken func(), mended func() time.Time) {
	one.Helper()
	streams := []stream{startStream(one, two), startStream(two, one)}
	broken()
	back := mended()
	<-time.After(2 * aMoment)
	for _, s := range streams {
		tally := s.end()
		if tally.Lost == 0 || tally.Resumed.IsZero() {
			continue // the kernel kept the frames until it could send them; end fails for a stream that never came back
		}
		took := tally.Resumed.Sub(back)
		one.Logf("the stream to %s was back %s after the underlay", s.to, took.Round(time.Millisecond))
		if took > time.Second {
			one.Errorf("the stream to %s came back %s after the underlay, want a second at most", s.to, took)
		}
	}
}

// awaitAddress returns when a device of the node has an IPv6 address that is not tentative.
func (m machine) awaitAddress(device string) time.Time {
	m.Helper()
	const tentative = 0x40 // IFA_F_TENTATIVE, in the fifth field
	m.until("an address of "+device, func() bool {
		content, err := os.ReadFile(m.path("/proc/1/net/if_inet6"))
		if err != nil {
			m.Fatal(err)
		}
		for line := range strings.Lines(string(content)) {
			fields := strings.Fields(line)
			flags, err := strconv.ParseUint(fields[4], 16, 32)
			if err != nil {
				m.Fatal(err)
			}
			if fields[5] == device && flags&tentative == 0 {
				return true
			}
		}
		return false
	})
	return time.Now()
}

// restoreAfterwards restores a device after a failed test.
func (l lab) restoreAfterwards(m machine, device string) {
	l.Cleanup(func() {
		if !l.Failed() {
			return
		}
		if err := m.RestoreUnderlay(device); err != nil {
			l.Error(err)
		}
	})
}
