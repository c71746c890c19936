package macvrf

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// The order in which LANs get the number of their RD: those that keep the number they asked for come first.
const (
	keepsRequested = iota
	requests
	keepsOwn
	isNew
)

// rdNumbers chooses a number for the RD of each LAN, different from that of any other LAN of the node. A LAN gets the
// number that it asks for, else the one that it has, else its VNI if that fits; if another LAN has that number, the
// next free one.
func (t *Table) rdNumbers(lans []LAN) map[uint32]uint16 {
	type request struct {
		rank   int
		vni    uint32
		number uint16
	}
	var all []request
	for _, l := range lans {
		r, have := request{isNew, l.VNI, uint16(l.VNI)}, t.lans[l.VNI]
		switch {
		case l.RD != 0 && have != nil && have.rdNumber() == l.RD:
			r.rank, r.number = keepsRequested, l.RD
		case l.RD != 0:
			r.rank, r.number = requests, l.RD
		case have != nil && have.RD == 0:
			r.rank, r.number = keepsOwn, have.rdNumber()
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b request) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.vni, b.vni))
	})
	numbers, used := make(map[uint32]uint16, len(lans)), make(map[uint16]bool, len(lans))
	for _, r := range all {
		for used[r.number] {
			r.number++
		}
		numbers[r.vni], used[r.number] = r.number, true
	}
	return numbers
}

func (l *lan) rdNumber() uint16 { return binary.BigEndian.Uint16(l.rd[6:]) }
