package segment

import (
	"errors"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"testing"
)

func wanted() PodVXLAN {
	return PodVXLAN{
		VXLAN: VXLAN{Name: "kubelan", VNI: 6969, Port: 4789, Local: netip.MustParseAddr("10.0.0.1")}, MTU: 1450,
		MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Addresses: []netip.Prefix{netip.MustParsePrefix("192.168.69.1/24")},
		Remotes: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")},
	}
}

// standing is the VXLAN as it was wanted.
func standing(want PodVXLAN) PodVXLANState {
	return PodVXLANState{Link: Link{
		Index: 3, Name: want.VXLAN.Name, Type: "vxlan", MAC: want.MAC, MTU: want.MTU, Up: true, Alias: mark(want.Addresses, true),
		VXLAN: VXLANState{VNI: want.VXLAN.VNI, Port: want.VXLAN.Port, Local: want.VXLAN.Local, Remotes: want.Remotes},
	}, Addresses: want.Addresses}
}

func TestDiffAlone(t *testing.T) {
	remote := func(text string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(text)} }
	other := netip.MustParsePrefix("192.168.70.1/24")
	make := []Op{
		AddVXLAN{VXLAN: wanted().VXLAN, MTU: 1450},
		SetMAC{"kubelan", wanted().MAC},
		SetAlias{"kubelan", "k8slan 192.168.69.1/24"},
		AddAddress{"kubelan", wanted().Addresses[0]},
		SetUp{"kubelan"},
	}
	for _, c := range []struct {
		what   string
		change func(want *PodVXLAN, have *PodVXLANState)
		ops    []Op
	}{
		{"all as it should be", func(*PodVXLAN, *PodVXLANState) {}, nil},
		{"there is none", func(_ *PodVXLAN, have *PodVXLANState) { *have = PodVXLANState{} }, make},
		{"another VNI", func(_ *PodVXLAN, have *PodVXLANState) { have.Link.VXLAN.VNI = 7 }, append([]Op{DelLink{"kubelan"}}, make...)},
		{"the other family", func(_ *PodVXLAN, have *PodVXLANState) {
			have.Link.VXLAN.Local = netip.MustParseAddr("fd00::1")
		}, append([]Op{DelLink{"kubelan"}}, make...)},
		{"another name before", func(_ *PodVXLAN, have *PodVXLANState) {
			old := have.Link
			old.Name = "lan"
			*have = PodVXLANState{Others: []Link{old, {Name: "another", Type: "vxlan", VXLAN: VXLANState{VNI: 5, Port: 4789}}}}
		}, append([]Op{DelLink{"lan"}}, make...)},
		{"a remote came and one went", func(want *PodVXLAN, _ *PodVXLANState) {
			want.Remotes = []netip.Addr{want.Remotes[1], netip.MustParseAddr("10.0.0.4")}
		}, []Op{AddRemotes{"kubelan", remote("10.0.0.4")}, DelRemotes{"kubelan", remote("10.0.0.2"), true}}},
		{"remotes are not known", func(want *PodVXLAN, _ *PodVXLANState) { want.Remotes = nil }, nil},
		{"it is not prepared", func(want *PodVXLAN, have *PodVXLANState) {
			have.Link.Alias, have.Link.VXLAN.Remotes = mark(want.Addresses, false), nil
		}, nil},
		{"it is prepared now", func(want *PodVXLAN, have *PodVXLANState) {
			have.Link.Alias, have.Link.VXLAN.Remotes, want.Prepared = mark(want.Addresses, false), nil, true
		}, []Op{SetAlias{"kubelan", "k8slan prepared 192.168.69.1/24"}, AddRemotes{"kubelan", wanted().Remotes}}},
		{"another address, beside somebody else's", func(want *PodVXLAN, have *PodVXLANState) {
			have.Addresses = append(slices.Clone(have.Addresses), netip.MustParsePrefix("10.9.9.9/32"))
			want.Addresses = []netip.Prefix{other}
		}, []Op{
			DelAddress{"kubelan", wanted().Addresses[0]}, SetAlias{"kubelan", "k8slan prepared 192.168.70.1/24"}, AddAddress{"kubelan", other},
		}},
		{"another pod's address", func(want *PodVXLAN, _ *PodVXLANState) {
			want.VXLAN.Local = netip.MustParseAddr("10.0.0.9")
		}, []Op{SetVXLAN{VXLAN{Name: "kubelan", VNI: 6969, Port: 4789, Local: netip.MustParseAddr("10.0.0.9")}}}},
		{"down, with another MTU", func(_ *PodVXLAN, have *PodVXLANState) { have.Link.Up, have.Link.MTU = false, 1500 }, []Op{SetMTU{"kubelan", 1450}, SetUp{"kubelan"}}},
	} {
		t.Run(c.what, func(t *testing.T) {
			want := wanted()
			have := standing(want)
			c.change(&want, &have)
			ops, err := DiffPodVXLAN(want, have)
			if err != nil || !reflect.DeepEqual(ops, c.ops) {
				t.Errorf("%v, %v\nwant %v", err, ops, c.ops)
			}
		})
	}
	var notOurs *ForeignLinkError
	if _, err := DiffPodVXLAN(wanted(), PodVXLANState{Link: Link{Index: 2, Name: "kubelan", Type: "veth"}}); !errors.As(err, &notOurs) {
		t.Errorf("an interface that is no VXLAN: %v", err)
	}
}

func TestAloneMACIsThePods(t *testing.T) {
	a, b := PodVXLANMAC("default", "web-0", "kubelan"), PodVXLANMAC("default", "web-1", "kubelan")
	if a.String() == b.String() || a[0] != 2 || a.String() != PodVXLANMAC("default", "web-0", "kubelan").String() {
		t.Errorf("%s and %s", a, b)
	}
}
