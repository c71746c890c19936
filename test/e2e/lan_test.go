package e2e

import (
	"strconv"
	"testing"
	"time"

	"github.com/k8slan/k8slan/test/frames"
)

func TestPodsOnTwoNodesTalkThroughTheExampleLAN(t *testing.T) {
	l := newLab(t)
	l.apply(l.manifest("lan-example", nil))
	l.ready("lan-example")
	one, two := pod("srl-1", worker1, "srl"), pod("vm-1", worker2, "vm")
	one.Networks += "@e1-1"
	begin := time.Now()
	both := l.start(one, two)
	l.logTime("from kubectl apply to two running pods", begin)
	srl, vm := both[0], both[1]

	srl.address("192.168.22.1/24", "fd22::1/64")
	vm.address("192.168.22.2/24", "fd22::2/64")
	srl.pings("192.168.22.2", "fd22::2")
	vm.pings("192.168.22.1", "fd22::1")
	srl.fetches(vm, "192.168.22.2")
	vm.fetches(srl, "fd22::1")
	crosses(srl, vm)
	crosses(vm, srl)
}

func TestPodsOfOneNodeTalk(t *testing.T) {
	l := newLab(t)
	l.lan("local", 1002, []string{"local-a", "local-b"})
	both := l.start(pod("a", worker1, "local-a"), pod("b", worker1, "local-b"))
	a, b := both[0], both[1]
	a.address("10.2.0.1/24", "fd02::1/64")
	b.address("10.2.0.2/24", "fd02::2/64")
	a.pings("10.2.0.2", "fd02::2")
	crosses(a, b)
}

func TestLANsWithDifferentVNIsAreSeparate(t *testing.T) {
	l := newLab(t)
	l.apply(l.lanYAML("red", 1003, []string{"red-1", "red-2"}))
	l.apply(l.lanYAML("green", 1004, []string{"green-1", "green-2"}))
	l.ready("red")
	l.ready("green")
	all := l.start(pod("red-1", worker1, "red-1"), pod("red-2", worker2, "red-2"), pod("green-1", worker1, "green-1"),
		pod("green-2", worker2, "green-2"))
	red1, red2, green1, green2 := all[0], all[1], all[2], all[3]

	// A pod of the green LAN receives only the frame that the other pod there sends, after all frames of the red LAN.
	listeners := map[string]listener{}
	for _, s := range []host{green1, green2} {
		listeners[s.pod] = s.listen("listen", "--for", "60s", "--count", "1", "--marker", frames.Marker)
	}
	crosses(red1, red2)
	crosses(red2, red1)
	green1.run("frames", "-i", green1.link, "stream", "send", "--id", "7", "--count", "1")
	green2.run("frames", "-i", green2.link, "stream", "send", "--id", "7", "--count", "1")
	for name, listener := range listeners {
		other := green1
		if name == green1.pod {
			other = green2
		}
		received, err := listener.all()
		if want := hexed(frames.Stream(nil, other.mac, 7, 0)); err != nil || len(received) != 1 || received[0] != want {
			t.Errorf("%s received %q (%v), want %q", name, received, err, want)
		}
	}
}

func TestSpokesAreAddedAndRemovedWithoutALostFrame(t *testing.T) {
	l := newLab(t)
	l.lan("edited", 1005, []string{"stay-1", "stay-2", "go"})
	both := l.start(pod("stay-1", worker1, "stay-1"), pod("stay-2", worker2, "stay-2"))
	const netns = ".edited"
	losesNothing(both[0], both[1], func() {
		spokes := []string{"stay-1", "stay-2", "go"}
		for i := range 20 {
			spokes = append(spokes, "come-"+strconv.Itoa(i))
		}
		l.setSpokes("edited", spokes...)
		l.ready("edited")
		come := l.start(pod("come-7", worker1, "come-7"))[0]
		if come.mtu != both[0].mtu {
			t.Errorf("MTU of a new spoke is %d, of an old one %d", come.mtu, both[0].mtu)
		}
		l.setSpokes("edited", "stay-1", "stay-2", "come-7")
		l.ready("edited")
		for _, m := range l.machines() {
			m.awaitLinks(l.namespace+netns, "no spokes but those that stay", func(links linkList) bool {
				return links.have("stay-1_b", "stay-2_b", "come-7_b") && !links.have("go_b") &&
					!links.have("come-0_b") && !links.have("come-19_b")
			})
		}
	})
}
