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

// podState returns the state of a namespace that has the VXLAN.
func podState(want PodVXLAN) PodVXLANState {
	return PodVXLANState{
		Link: Link{
			Index: 3, Name: want.VXLAN.Name, Type: "vxlan", MAC: want.MAC, MTU: want.MTU, Up: true,
			Alias: mark(want.Addresses, true), VXLAN: VXLANState{
				VNI: want.VXLAN.VNI, Port: want.VXLAN.Port, Local: want.VXLAN.Local, Remotes: want.Remotes,
			},
		},
		Addresses: want.Addresses,
	}
}

func TestDiffOfAPodVXLAN(t *testing.T) {
	remote := func(text string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(text)} }
	other := netip.MustParsePrefix("192.168.70.1/24")
	create := []Op{
		AddVXLAN{VXLAN: wanted().VXLAN, MTU: 1450},
		SetMAC{"kubelan", wanted().MAC},
		SetAlias{"kubelan", "k8slan 192.168.69.1/24"},
		AddAddress{"kubelan", wanted().Addresses[0]},
		SetUp{"kubelan"},
	}
	replace := append([]Op{DelLink{"kubelan"}}, create...)
	moved := wanted().VXLAN
	moved.Local = netip.MustParseAddr("10.0.0.9")
	for _, tt := range []struct {
		name   string
		change func(want *PodVXLAN, have *PodVXLANState)
		ops    []Op
	}{
		{"the same", func(*PodVXLAN, *PodVXLANState) {}, nil},
		{"there is none", func(_ *PodVXLAN, have *PodVXLANState) { *have = PodVXLANState{} }, create},
		{"it has another VNI", func(_ *PodVXLAN, have *PodVXLANState) { have.Link.VXLAN.VNI = 7 }, replace},
		{"it is of the other family", func(_ *PodVXLAN, have *PodVXLANState) {
			have.Link.VXLAN.Local = netip.MustParseAddr("fd00::1")
		}, replace},
		{"it has another name", func(_ *PodVXLAN, have *PodVXLANState) {
			old := have.Link
			old.Name = "lan"
			another := Link{Name: "another", Type: "vxlan", VXLAN: VXLANState{VNI: 5, Port: 4789}}
			*have = PodVXLANState{Others: []Link{old, another}}
		}, append([]Op{DelLink{"lan"}}, create...)},
		{"one remote is added and one deleted", func(want *PodVXLAN, _ *PodVXLANState) {
			want.Remotes = []netip.Addr{want.Remotes[1], netip.MustParseAddr("10.0.0.4")}
		}, []Op{AddRemotes{"kubelan", remote("10.0.0.4")}, DelRemotes{"kubelan", remote("10.0.0.2"), true}}},
		{"the remotes are not known", func(want *PodVXLAN, _ *PodVXLANState) { want.Remotes = nil }, nil},
		{"it is not prepared", func(want *PodVXLAN, have *PodVXLANState) {
			have.Link.Alias, have.Link.VXLAN.Remotes = mark(want.Addresses, false), nil
		}, nil},
		{"it becomes prepared", func(want *PodVXLAN, have *PodVXLANState) {
			have.Link.Alias, have.Link.VXLAN.Remotes, want.Prepared = mark(want.Addresses, false), nil, true
		}, []Op{SetAlias{"kubelan", "k8slan prepared 192.168.69.1/24"}, AddRemotes{"kubelan", wanted().Remotes}}},
		{"it has another address, and one from elsewhere", func(want *PodVXLAN, have *PodVXLANState) {
			have.Addresses = append(slices.Clone(have.Addresses), netip.MustParsePrefix("10.9.9.9/32"))
			want.Addresses = []netip.Prefix{other}
		}, []Op{
			DelAddress{"kubelan", wanted().Addresses[0]},
			SetAlias{"kubelan", "k8slan prepared 192.168.70.1/24"},
			AddAddress{"kubelan", other},
		}},
		{
			"the pod has another address", func(want *PodVXLAN, _ *PodVXLANState) { want.VXLAN.Local = moved.Local },
			[]Op{SetVXLAN{moved}},
		},
		{"it is down and has another MTU", func(_ *PodVXLAN, have *PodVXLANState) {
			have.Link.Up, have.Link.MTU = false, 1500
		}, []Op{SetMTU{"kubelan", 1450}, SetUp{"kubelan"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := wanted()
			have := podState(want)
			tt.change(&want, &have)
			ops, err := DiffPodVXLAN(want, have)
			if err != nil || !reflect.DeepEqual(ops, tt.ops) {
				t.Errorf("the operations are %v, %v\nwant %v", ops, err, tt.ops)
			}
		})
	}
	foreign := PodVXLANState{Link: Link{Index: 2, Name: "kubelan", Type: "veth"}}
	var foreignLink *ForeignLinkError
	if _, err := DiffPodVXLAN(wanted(), foreign); !errors.As(err, &foreignLink) {
		t.Errorf("another kind of link leads to the error %v", err)
	}
}

func TestMACOfAPodVXLANDependsOnThePod(t *testing.T) {
	a, b := PodVXLANMAC("default", "web-0", "kubelan"), PodVXLANMAC("default", "web-1", "kubelan")
	if a.String() == b.String() || a[0] != 2 || a.String() != PodVXLANMAC("default", "web-0", "kubelan").String() {
		t.Errorf("the MACs of two pods are %s and %s", a, b)
	}
}
