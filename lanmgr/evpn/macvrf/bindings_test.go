package macvrf_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// An address is advertised while its host is on this node. The last host that showed it has it, on any node.
func TestAddressBelongsToLastHostThatShowedIt(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	n := nodes(1, mac(7))[0]
	now := began
	has := func(when, want string) {
		t.Helper()
		var words []string
		for _, r := range n.Advertised() {
			if r.Type == macvrf.MACIP && r.IP.IsValid() {
				words = append(words, fmt.Sprintf("%d has %s", r.MAC[5], r.IP))
			} else if r.Type == macvrf.MACIP {
				words = append(words, fmt.Sprintf("%d", r.MAC[5]))
			}
		}
		if have := strings.Join(words, ", "); have != want {
			t.Errorf("%s: advertises %s, want %s", when, have, want)
		}
	}
	bind := func(m macvrf.MAC, ip netip.Addr) bool {
		t.Helper()
		changed, full := n.Bind(now, 222, m, ip)
		if full {
			t.Errorf("%s exceeds a limit", ip)
		}
		return changed
	}
	if !bind(mac(7), a) || bind(mac(7), a) || !bind(mac(7), b) {
		t.Error("Bind does not report whether the address is new")
	}
	has("a pod has two addresses", "7, 7 has 10.0.0.1, 7 has fd00::1")
	bind(mac(8), a) // the bridge has not reported the MAC yet
	has("the MAC is not known", "7, 7 has 10.0.0.1, 7 has fd00::1")
	n.LearnLocal(now, 222, mac(8))
	has("the MAC is local", "7, 7 has fd00::1, 8, 8 has 10.0.0.1")
	n.Import(now, route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.MAC, r.IP = mac(9), b }))
	has("bound on another node", "7, 8, 8 has 10.0.0.1")
	bind(mac(7), b)
	has("and on this one again", "7, 7 has fd00::1, 8, 8 has 10.0.0.1")
	n.Import(now, route(macvrf.MACIP, 2, func(r *macvrf.Route) { r.MAC, r.Sequence = mac(8), 1 }))
	has("the MAC has moved, and is still on its local port", "7, 7 has fd00::1")
	n.ForgetLocal(now, 222, mac(8))
	n.LearnLocal(now, 222, mac(8))
	has("aged out and learned again", "7, 7 has fd00::1, 8")
	bind(mac(6), a)
	now = now.Add(time.Minute)
	n.LearnLocal(now, 222, mac(6))
	has("bound long before", "6, 7, 7 has fd00::1, 8")
	for _, bad := range []string{
		"0.0.0.0", "::", "ff02::1", "224.0.0.5", "255.255.255.255", "127.0.0.1", "::1", "::ffff:10.0.0.1",
	} {
		if bind(mac(7), netip.MustParseAddr(bad)) {
			t.Errorf("%s is advertised", bad)
		}
	}
	n.Set(now, nil)
	if changed, _ := n.Bind(now, 222, mac(7), a); changed {
		t.Error("Bind changes a LAN that the node takes no part in")
	}
}

// Of a host with a thousand addresses sixteen are advertised, and they do not change all the time.
func TestAdvertisedAddressesAreBounded(t *testing.T) {
	n := nodes(1, mac(7))[0]
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
	count := func() int { return len(n.Advertised()) - 2 }
	changes, refused := 0, 0
	for i := range 1000 {
		changed, full := n.Bind(began, 222, mac(7), at(i))
		if changed {
			changes++
		}
		if full {
			refused++
		}
	}
	if count() != 16 || changes != 17 || refused != 984 {
		t.Errorf("%d are advertised after %d changes; %d exceed the limit", count(), changes, refused)
	}
	n.Bind(began, 222, mac(7), at(1)) // it is the newest now
	n.Bind(began.Add(time.Minute), 222, mac(7), at(2000))
	has := func(ip netip.Addr) bool {
		return slices.ContainsFunc(n.Advertised(), func(r macvrf.Route) bool { return r.IP == ip })
	}
	if count() != 16 || !has(at(1)) || has(at(2)) || !has(at(2000)) {
		t.Errorf("%d are advertised; the newest %t, the oldest %t, the new %t",
			count(), has(at(1)), has(at(2)), has(at(2000)))
	}
	for i := range 1000 { // other hosts
		m := macvrf.MAC{2, 1, 0, 0, byte(i >> 8), byte(i)}
		n.LearnLocal(began, 222, m)
		for j := range 16 {
			n.Bind(began, 222, m, netip.AddrFrom4([4]byte{11, byte(i >> 8), byte(i), byte(j)}))
		}
	}
	if count() != 8192+1000 {
		t.Errorf("%d are advertised of all", count()-1000)
	}
	for i := range 1000 { // MACs that are not known
		n.Bind(began, 222, macvrf.MAC{2, 2, 0, 0, byte(i >> 8), byte(i)}, at(i))
	}
}
