package dataplane

import (
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Ten thousand MACs beside the one that changes: it alone is written.
func TestOneMACMoreIsOneWrite(t *testing.T) {
	a, _, s, _ := unicastHosts(t, families["IPv4"], 431)
	s = told(s)
	a.build(t, s)
	a.attach(t, s, "one", segment.Veth)
	bare := s
	vtep := families["IPv4"].vteps[1]
	for i := range 10_000 {
		s.FDB = append(s.FDB, segment.FDBEntry{MAC: [6]byte{2, 0, 0, byte(i >> 8), byte(i), 1}, VTEP: vtep})
	}
	a.build(t, bare)
	began := time.Now()
	a.build(t, s)
	took := time.Since(began)
	link, err := a.inside(s).Netlink(t).LinkByName(s.VXLAN.Name)
	try(t, err)
	a.build(t, bare)
	handle := a.inside(s).Netlink(t)
	began = time.Now()
	for _, e := range s.FDB {
		try(t, handle.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_REACHABLE,
			Flags: netlink.NTF_SELF | netlink.NTF_MASTER | netlink.NTF_EXT_LEARNED, HardwareAddr: e.MAC[:], IP: e.VTEP.AsSlice(),
		}))
	}
	t.Logf("10,000 MACs: %v, with bare netlink %v", took, time.Since(began))
	began = time.Now()
	if ops := a.build(t, s); len(ops) > 0 {
		t.Errorf("did %v", ops)
	}
	t.Logf("a look at them: %v", time.Since(began))
	s.FDB = s.FDB[:len(s.FDB)-1]
	began = time.Now()
	ops := a.build(t, s)
	t.Logf("one less, with the look: %v", time.Since(began))
	if len(ops) != 1 || ops[0].String() != "bridge fdb del 02:00:00:27:0f:01 dev vx431 dst 192.0.2.2 self; bridge fdb del 02:00:00:27:0f:01 dev vx431 master" {
		t.Errorf("did %v", ops)
	}
}
