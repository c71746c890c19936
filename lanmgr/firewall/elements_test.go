package firewall

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func members(texts ...string) []netip.Addr {
	list := []netip.Addr{}
	for _, t := range texts {
		list = append(list, netip.MustParseAddr(t))
	}
	return list
}

// tableOf returns what the kernel has once the table is reconciled with these LANs.
func tableOf(lans ...LAN) elements {
	have := newElements()
	for _, s := range steps(desired(lans, have), have) {
		have.apply(s)
	}
	return have
}

func (e elements) apply(s step) {
	for _, del := range s.del {
		delete(e[s.set], del.key)
	}
	for _, add := range s.add {
		e[s.set][add.key] = add.comment
	}
}

func TestStepsChangeWhatDiffers(t *testing.T) {
	lab := LAN{"default/lab", 4789, 222, members("192.0.2.2", "fe80::2")}
	more, fewer, unknown, other, renamed := lab, lab, lab, lab, lab
	more.Members = members("192.0.2.2", "192.0.2.3", "fe80::2")
	fewer.Members = members("192.0.2.2")
	unknown.Members = nil
	other.Port, other.VNI, other.Name = 8472, 0xffffff, "default/other"
	renamed.Name = "default/renamed"
	for _, c := range []struct {
		name string
		have elements
		want []LAN
		text string
	}{
		{"the first", tableOf(), []LAN{lab}, `
			add element inet k8slan members4 { 4789 . 222 . 192.0.2.2 }
			add element inet k8slan members6 { 4789 . 222 . fe80::2 }
			add element inet k8slan ports { 4789 }
			add element inet k8slan lans { 4789 . 222 comment "default/lab" }`},
		{"nothing", tableOf(lab), []LAN{lab}, ""},
		{"one member more", tableOf(lab), []LAN{more}, `
			add element inet k8slan members4 { 4789 . 222 . 192.0.2.3 }`},
		{"one member fewer", tableOf(more), []LAN{fewer}, `
			delete element inet k8slan members4 { 4789 . 222 . 192.0.2.3 }
			delete element inet k8slan members6 { 4789 . 222 . fe80::2 }`},
		{"members that are no longer known", tableOf(lab, other), []LAN{unknown, other}, ""},
		{"members that are not known yet", tableOf(), []LAN{unknown}, ""},
		{"another port", tableOf(lab), []LAN{lab, other}, `
			add element inet k8slan members4 { 8472 . 16777215 . 192.0.2.2 }
			add element inet k8slan members6 { 8472 . 16777215 . fe80::2 }
			add element inet k8slan ports { 8472 }
			add element inet k8slan lans { 8472 . 16777215 comment "default/other" }`},
		{"no longer strict", tableOf(lab, other), []LAN{lab}, `
			delete element inet k8slan lans { 8472 . 16777215 comment "default/other" }
			delete element inet k8slan members4 { 8472 . 16777215 . 192.0.2.2 }
			delete element inet k8slan members6 { 8472 . 16777215 . fe80::2 }
			delete element inet k8slan ports { 8472 }`},
		{"the VNI is another LAN's", tableOf(lab), []LAN{renamed}, `
			delete element inet k8slan lans { 4789 . 222 comment "default/lab" }; ` +
			`add element inet k8slan lans { 4789 . 222 comment "default/renamed" }`},
		{"no members", tableOf(), []LAN{{"default/lab", 4789, 222, members()}}, `
			add element inet k8slan ports { 4789 }
			add element inet k8slan lans { 4789 . 222 comment "default/lab" }`},
	} {
		t.Run(c.name, func(t *testing.T) {
			var lines []string
			for _, s := range steps(desired(c.want, c.have), c.have) {
				lines = append(lines, s.nft(TableName))
			}
			want := strings.ReplaceAll(strings.TrimSpace(c.text), "\t", "")
			if have := strings.Join(lines, "\n"); have != want {
				t.Errorf("the steps are\n%s\nwant\n%s", have, want)
			}
		})
	}
}

// Between any two states, after each step of a limited size, packets of an address that was and stays a member are
// accepted.
func TestMembersAreAcceptedAfterEachStep(t *testing.T) {
	rng := rand.New(rand.NewPCG(20261121, 1))
	random := func() (lans []LAN) {
		for vni := range uint32(4) {
			l := LAN{Name: fmt.Sprint("default/", rng.IntN(2)), Port: 4789, VNI: vni, Members: members()}
			for i := range 3 * stepSize {
				if rng.IntN(2) == 0 {
					l.Members = append(l.Members, netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}))
				}
			}
			if rng.IntN(4) > 0 {
				lans = append(lans, l)
			}
		}
		return lans
	}
	dropped := func(e elements, l LAN, a netip.Addr) bool {
		lan := lanKey(l.Port, l.VNI)
		set, key := memberKey(lan, a)
		_, strict := e[lansSet][lan]
		_, port := e[portsSet][lan[:2]]
		_, member := e[set][key]
		return port && strict && !member
	}
	before := random()
	have := tableOf(before...)
	for range 20 {
		after := random()
		want := desired(after, have)
		for _, s := range steps(want, have) {
			if len(s.add) > stepSize || len(s.del) > stepSize {
				t.Fatalf("a step adds %d and deletes %d elements, want at most %d", len(s.add), len(s.del), stepSize)
			}
			have.apply(s)
			for _, l := range before {
				i := slices.IndexFunc(after, func(a LAN) bool { return a.VNI == l.VNI })
				for _, m := range l.Members {
					if (i < 0 || slices.Contains(after[i].Members, m)) && dropped(have, l, m) {
						t.Fatalf("packets of member %s are dropped", m)
					}
				}
			}
		}
		if !reflect.DeepEqual(have, want) {
			t.Fatal("the steps do not lead to the desired elements")
		}
		before = after
	}
}
