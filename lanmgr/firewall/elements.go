package firewall

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// LAN is a LAN that hears its members alone.
type LAN struct {
	Name    string // namespace/name
	Port    uint16 // UDP
	VNI     uint32
	Members []netip.Addr // what their packets may come from, in any order; nil: not known, those that stand stay
}

func (l LAN) known() bool { return l.Members != nil }

func (l LAN) equal(o LAN) bool {
	return l.Name == o.Name && l.Port == o.Port && l.VNI == o.VNI &&
		(l.Members == nil) == (o.Members == nil) && slices.Equal(l.Members, o.Members)
}

// The table's sets.
const (
	lansSet     = "lans"     // port and VNI of each LAN; its name is the element's comment
	members4Set = "members4" // port, VNI and IPv4 address
	members6Set = "members6" // port, VNI and IPv6 address
	portsSet    = "ports"    // of the LANs: what is for another is passed on at once
)

// elements are those of each set, as the kernel has them: their keys, and what they are called.
type elements map[string]map[string]string

func newElements() elements {
	return elements{lansSet: {}, members4Set: {}, members6Set: {}, portsSet: {}}
}

// lanKey is a LAN as a key of the kernel's: in network order, each part filled up to four bytes.
func lanKey(port uint16, vni uint32) string {
	key := binary.BigEndian.AppendUint16(nil, port)
	return string(binary.BigEndian.AppendUint32(append(key, 0, 0), vni<<8))
}

// Lengths in bytes: a port as a key of its own, and how much of a member's is the LAN.
const (
	portKeyLen = 2
	lanKeyLen  = 8
)

func memberKey(lan string, a netip.Addr) (set, key string) {
	if a = a.Unmap(); a.Is4() {
		return members4Set, lan + string(a.AsSlice())
	}
	return members6Set, lan + string(a.AsSlice())
}

// desired are the elements of those LANs. Of a LAN whose members are not known yet, what stands stays; one of which nothing stands
// goes on hearing all.
func desired(lans []LAN, have elements) elements {
	want := newElements()
	add := func(key, name string) {
		want[lansSet][key] = name
		want[portsSet][key[:portKeyLen]] = ""
	}
	for _, l := range lans {
		key := lanKey(l.Port, l.VNI)
		if l.Members != nil {
			add(key, l.Name)
			for _, m := range l.Members {
				set, key := memberKey(key, m)
				want[set][key] = ""
			}
			continue
		}
		name, stands := have[lansSet][key]
		if !stands {
			continue
		}
		add(key, name)
		for _, set := range []string{members4Set, members6Set} {
			for member := range have[set] {
				if member[:lanKeyLen] == key {
					want[set][member] = ""
				}
			}
		}
	}
	return want
}

// step is a change of one set, which the kernel makes in whole or not at all.
type step struct {
	set      string
	del, add []element
}

type element struct{ key, name string }

// stepSize is how many elements a step has at most: with their answers, many more do not fit into a socket's buffers.
const stepSize = 256

// steps lead from what is to what is wanted. A LAN's members are there before it is, and go after it, so that none is taken for a
// stranger on the way.
func steps(want, have elements) []step {
	var all []step
	for _, set := range []string{members4Set, members6Set, portsSet} {
		all = append(all, chunks(set, nil, difference(want[set], have[set]))...)
	}
	all = append(all, chunks(lansSet, difference(have[lansSet], want[lansSet]), difference(want[lansSet], have[lansSet]))...)
	for _, set := range []string{members4Set, members6Set, portsSet} {
		all = append(all, chunks(set, difference(have[set], want[set]), nil)...)
	}
	return all
}

// difference are the elements of one set that another has not, or under another name; sorted.
func difference(of, in map[string]string) []element {
	var list []element
	for key, name := range of {
		if other, ok := in[key]; !ok || other != name {
			list = append(list, element{key, name})
		}
	}
	slices.SortFunc(list, func(a, b element) int { return cmp.Compare(a.key, b.key) })
	return list
}

// chunks makes steps of a set's change. An element under another name goes and comes in one.
func chunks(set string, del, add []element) []step {
	byKey := map[string]step{}
	for _, e := range del {
		byKey[e.key] = step{del: []element{e}}
	}
	for _, e := range add {
		byKey[e.key] = step{del: byKey[e.key].del, add: []element{e}}
	}
	var list []step
	for keys := range slices.Chunk(slices.Sorted(maps.Keys(byKey)), stepSize) {
		s := step{set: set}
		for _, key := range keys {
			s.del = append(s.del, byKey[key].del...)
			s.add = append(s.add, byKey[key].add...)
		}
		list = append(list, s)
	}
	return list
}

// nft is the step as nft(8) would take it, in a table.
func (s step) nft(table string) string {
	var lines []string
	for verb, list := range map[string][]element{"delete": s.del, "add": s.add} {
		if len(list) == 0 {
			continue
		}
		texts := make([]string, len(list))
		for i, e := range list {
			texts[i] = e.String()
		}
		lines = append(lines, fmt.Sprintf("%s element inet %s %s { %s }", verb, table, s.set, strings.Join(texts, ", ")))
	}
	slices.Sort(lines)
	slices.Reverse(lines)
	return strings.Join(lines, "; ")
}

// String is the element as nft(8) would write it.
func (e element) String() string {
	b := []byte(e.key)
	text := fmt.Sprint(binary.BigEndian.Uint16(b))
	if len(b) >= lanKeyLen {
		text += fmt.Sprintf(" . %d", binary.BigEndian.Uint32(b[4:])>>8)
	}
	if a, ok := netip.AddrFromSlice(b[min(lanKeyLen, len(b)):]); ok {
		text += " . " + a.String()
	}
	if e.name != "" {
		text += fmt.Sprintf(" comment %q", e.name)
	}
	return text
}
