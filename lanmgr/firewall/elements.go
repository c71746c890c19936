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

// LAN is a LAN that accepts packets from its members only.
type LAN struct {
	Name string // namespace/name
	Port uint16 // UDP
	VNI  uint32
	// Members are the source addresses that the LAN accepts, in any order. nil: not known, the table keeps those it
	// has.
	Members []netip.Addr
}

func (l LAN) known() bool { return l.Members != nil }

func (l LAN) equal(o LAN) bool {
	return l.Name == o.Name && l.Port == o.Port && l.VNI == o.VNI &&
		(l.Members == nil) == (o.Members == nil) && slices.Equal(l.Members, o.Members)
}

// The table's sets.
const (
	lansSet     = "lans"     // port and VNI of each LAN; the element's comment is the LAN's name
	members4Set = "members4" // port, VNI and IPv4 address
	members6Set = "members6" // port, VNI and IPv6 address
	portsSet    = "ports"    // ports of the LANs; packets to other ports are accepted first
)

// elements has, by set, the keys of its elements in the kernel's format, and their comments.
type elements map[string]map[string]string

func newElements() elements {
	return elements{lansSet: {}, members4Set: {}, members6Set: {}, portsSet: {}}
}

// lanKey returns a LAN's key in the kernel's format: in network order, each part padded to four bytes.
func lanKey(port uint16, vni uint32) string {
	key := binary.BigEndian.AppendUint16(nil, port)
	return string(binary.BigEndian.AppendUint32(append(key, 0, 0), vni<<8))
}

// Lengths of parts of a key in bytes.
const (
	portKeyLen = 2
	lanKeyLen  = 8 // a member's key begins with that of its LAN
)

func memberKey(lan string, a netip.Addr) (set, key string) {
	if a = a.Unmap(); a.Is4() {
		return members4Set, lan + string(a.AsSlice())
	}
	return members6Set, lan + string(a.AsSlice())
}

// desired returns the elements that the table should have for these LANs. A LAN whose members are not known keeps the
// elements that it has. If it has none, it goes on accepting all packets.
func desired(lans []LAN, have elements) elements {
	want := newElements()
	for _, l := range lans {
		key := lanKey(l.Port, l.VNI)
		if l.known() {
			want.addLAN(key, l.Name)
			for _, m := range l.Members {
				set, key := memberKey(key, m)
				want[set][key] = ""
			}
		} else if name, ok := have[lansSet][key]; ok {
			want.addLAN(key, name)
			want.copyMembers(key, have)
		}
	}
	return want
}

func (e elements) addLAN(key, name string) {
	e[lansSet][key] = name
	e[portsSet][key[:portKeyLen]] = ""
}

func (e elements) copyMembers(lan string, from elements) {
	for _, set := range []string{members4Set, members6Set} {
		for member := range from[set] {
			if member[:lanKeyLen] == lan {
				e[set][member] = ""
			}
		}
	}
}

// step is a change of one set. The kernel applies all of it or nothing.
type step struct {
	set      string
	del, add []element
}

type element struct{ key, comment string }

// stepSize is the greatest number of elements in a step. The kernel's answers to many more would not fit into a
// socket's buffer.
const stepSize = 256

// steps returns the changes from have to want. A LAN's members are added before the LAN and deleted after it, so that
// packets of a member are accepted in between.
func steps(want, have elements) []step {
	var all []step
	for _, set := range []string{members4Set, members6Set, portsSet} {
		all = append(all, chunks(set, nil, difference(want[set], have[set]))...)
	}
	del, add := difference(have[lansSet], want[lansSet]), difference(want[lansSet], have[lansSet])
	all = append(all, chunks(lansSet, del, add)...)
	for _, set := range []string{members4Set, members6Set, portsSet} {
		all = append(all, chunks(set, difference(have[set], want[set]), nil)...)
	}
	return all
}

// difference returns the elements of x that y does not have, or has with another comment; sorted.
func difference(x, y map[string]string) []element {
	var list []element
	for key, comment := range x {
		if other, ok := y[key]; !ok || other != comment {
			list = append(list, element{key, comment})
		}
	}
	slices.SortFunc(list, func(a, b element) int { return cmp.Compare(a.key, b.key) })
	return list
}

// chunks splits a change of a set into steps. An element that gets another comment is deleted and added in one step.
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

// nft returns the commands of nft(8) for the step.
func (s step) nft(table string) string {
	var commands []string
	for verb, list := range map[string][]element{"delete": s.del, "add": s.add} {
		if len(list) == 0 {
			continue
		}
		texts := make([]string, len(list))
		for i, e := range list {
			texts[i] = e.String()
		}
		command := fmt.Sprintf("%s element inet %s %s { %s }", verb, table, s.set, strings.Join(texts, ", "))
		commands = append(commands, command)
	}
	slices.Sort(commands)
	slices.Reverse(commands) // delete before add
	return strings.Join(commands, "; ")
}

// String returns the element as nft(8) writes it.
func (e element) String() string {
	b := []byte(e.key)
	text := fmt.Sprint(binary.BigEndian.Uint16(b))
	if len(b) >= lanKeyLen {
		text += fmt.Sprintf(" . %d", binary.BigEndian.Uint32(b[4:])>>8)
	}
	if a, ok := netip.AddrFromSlice(b[min(lanKeyLen, len(b)):]); ok {
		text += " . " + a.String()
	}
	if e.comment != "" {
		text += fmt.Sprintf(" comment %q", e.comment)
	}
	return text
}
