package segment_test

import (
	"errors"
	"fmt"
	"net"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

func TestMACIsStableAndLocal(t *testing.T) {
	other := segment.LAN{Namespace: "default", Name: "lab", UID: "2"} // deleted and created again
	a := segment.MAC(lab.LAN, "srl")
	if a.String() != segment.MAC(other, "srl").String() {
		t.Error("the MAC depends on the LAN's UID")
	}
	if a.String() == segment.MAC(lab.LAN, "vm").String() {
		t.Error("two spokes have one MAC")
	}
	if a[0]&3 != 2 {
		t.Errorf("%s is not a locally administered unicast address", net.HardwareAddr(a))
	}
}

func TestOnlyNamesOfPortsAreReadAsPorts(t *testing.T) {
	for name, want := range map[string]string{"web_0": "web 0 true", "a.b-c_499": "a.b-c 499 true"} {
		pool, number, ok := segment.PoolOf(name)
		if got := fmt.Sprint(pool, " ", number, " ", ok); got != want || segment.Port(pool, number) != name {
			t.Errorf("%s is read as %s", name, got)
		}
	}
	for _, name := range []string{
		"", "web", "web-3", "web.3", "_3", "web_", "web_03", "web_+3", "web_-3", "web_x", "web_3_b",
	} {
		if pool, number, ok := segment.PoolOf(name); ok {
			t.Errorf("%q is read as port %d of %q", name, number, pool)
		}
	}
}

func TestMACsOfPortsDifferByNodeAndThoseByOrdinalDoNot(t *testing.T) {
	on := func(node string) segment.Segment {
		s := lab
		s.Spokes, s.MACByOrdinal, s.Node = []string{"db_0", "srl", "web_0"}, []string{"db"}, node
		return s
	}
	one, two := on("worker1"), on("worker2")
	if one.Equal(two) || one.Equal(lab) {
		t.Error("segments of two nodes are equal")
	}
	mac := func(s segment.Segment, spoke, pod string) string {
		t.Helper()
		m, err := s.PodMAC(spoke, pod)
		if err != nil {
			t.Fatal(err)
		}
		if m[0] != 0x02 || len(m) != 6 {
			t.Errorf("%s has the MAC %s, which is not locally administered", spoke, m)
		}
		return m.String()
	}
	if mac(one, "srl", "srl-1") != segment.MAC(lab.LAN, "srl").String() ||
		mac(two, "srl", "x") != mac(one, "srl", "y") {
		t.Error("a single spoke's MAC depends on more than LAN and spoke")
	}
	if mac(one, "web_0", "web-0") == mac(two, "web_0", "web-0") ||
		mac(one, "web_0", "a") != mac(one, "web_0", "b") {
		t.Error("a port's MAC is the same on two nodes, or depends on the pod")
	}
	if mac(one, "db_0", "db-1") != mac(two, "db_7", "db-1") ||
		mac(one, "db_0", "db-1") == mac(one, "db_0", "db-2") {
		t.Error("a MAC by ordinal depends on more or less than the ordinal")
	}
	for _, pod := range []string{"", "nameless", "db-", "db-x", "db-01", "-1"} {
		if m, err := one.PodMAC("db_0", pod); !errors.Is(err, segment.ErrNoOrdinal) {
			t.Errorf("the pod %q has the MAC %s, %v", pod, m, err)
		}
	}
}
