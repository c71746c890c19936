package segment

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// PodVXLAN is a VXLAN in a pod's own network namespace, in no bridge: its frames are the pod's. By which link its packets leave is left to the
// namespace's routes.
type PodVXLAN struct {
	VXLAN     VXLAN // without an underlay
	MTU       int   // bytes
	MAC       net.HardwareAddr
	Addresses []netip.Prefix // what it shall have; others are somebody else's
	Remotes   []netip.Addr   // sorted; nil: not known, those that stand stay
	FDB       []FDBEntry     // sorted, where it does not learn; nil: not known
	Partial   bool           // Remotes and FDB may lack some: none that stands is deleted
	Prepared  bool           // what is done once to each such interface is done. One that is not prepared is told of no remotes
}

// PodVXLANState is such a VXLAN as the kernel has it.
type PodVXLANState struct {
	Link      Link // without an index where there is none
	Addresses []netip.Prefix
	Others    []Link // VXLANs of other names that bear the mark
}

// ForeignLinkError says that a link has the interface's name and is no VXLAN.
type ForeignLinkError struct{ Name, Type string }

func (e *ForeignLinkError) Error() string {
	return fmt.Sprintf("there is an interface %s already, a %s; choose another name", e.Name, e.Type)
}

// DiffPodVXLAN says what has to be done so that the namespace has the VXLAN. One that cannot be changed into it is made anew; what is no VXLAN is
// left alone, and NotOurs.
func DiffPodVXLAN(want PodVXLAN, have PodVXLANState) ([]Op, error) {
	d := &diff{want: Segment{VXLAN: want.VXLAN, MTU: want.MTU, Remotes: want.Remotes, FDB: want.FDB, Partial: want.Partial}, alone: true}
	name, l := want.VXLAN.Name, have.Link
	if l.Index != 0 && l.Type != "vxlan" {
		return nil, &ForeignLinkError{name, l.Type}
	}
	for _, o := range have.Others {
		if o.VXLAN.VNI == want.VXLAN.VNI && o.VXLAN.Port == want.VXLAN.Port {
			d.do(DelLink{o.Name}) // the same LAN under its old name; another LAN of the pod has another VNI or port
		}
	}
	if l.Index == 0 || !sameVXLAN(want.VXLAN, l) {
		if l.Index != 0 {
			d.do(DelLink{name})
		}
		d.do(AddVXLAN{VXLAN: want.VXLAN, MTU: want.MTU})
		l, have.Addresses = Link{Name: name, MTU: want.MTU}, nil
	}
	if want.MAC != nil && !bytes.Equal(l.MAC, want.MAC) {
		d.do(SetMAC{name, want.MAC})
	}
	set, prepared := parseMark(l.Alias)
	for _, a := range set {
		if !slices.Contains(want.Addresses, a) && slices.Contains(have.Addresses, a) {
			d.do(DelAddress{name, a})
		}
	}
	if mark := mark(want.Addresses, prepared || want.Prepared); l.Alias != mark {
		d.do(SetAlias{name, mark}) // before the addresses that it names: one too many there does no harm
	}
	for _, a := range want.Addresses {
		if !slices.Contains(have.Addresses, a) {
			d.do(AddAddress{name, a})
		}
	}
	d.settings(l, want.MTU, true)
	if prepared || want.Prepared {
		d.remotes(l)
	}
	return d.ops, nil
}

// Prepared says whether what is done once to each such interface is done.
func (s PodVXLANState) Prepared() bool {
	_, prepared := parseMark(s.Link.Alias)
	return prepared
}

// The mark is the link's alias: whose it is, whether it is prepared, and which addresses were given to it.
const (
	markWord     = "k8slan"
	preparedWord = "prepared"
)

func mark(addresses []netip.Prefix, prepared bool) string {
	words := []string{markWord}
	if prepared {
		words = append(words, preparedWord)
	}
	for _, a := range addresses {
		words = append(words, a.String())
	}
	return strings.Join(words, " ")
}

// Marked says whether a link bears the mark.
func Marked(l Link) bool { return l.Alias == markWord || strings.HasPrefix(l.Alias, markWord+" ") }

func parseMark(alias string) (addresses []netip.Prefix, prepared bool) {
	words := strings.Fields(alias)
	if len(words) == 0 || words[0] != markWord {
		return nil, false
	}
	for _, w := range words[1:] {
		if a, err := netip.ParsePrefix(w); err == nil {
			addresses = append(addresses, a)
		}
		prepared = prepared || w == preparedWord
	}
	return addresses, prepared
}

// Ordinal is the number at the end of a pod's name, as those of a StatefulSet have.
func Ordinal(pod string) (int, bool) { return cutNumber(pod, "-") }

// PodVXLANMAC is the address of a pod's interface where none is requested: the same after its container was started again, and of another
// pod of the same name.
func PodVXLANMAC(namespace, pod, ifname string) net.HardwareAddr {
	return derived(namespace + "/" + pod + " " + ifname)
}

// MaxAddresses is how many addresses of an interface its mark has room for.
const MaxAddresses = 4

type (
	// SetMAC sets a link's address.
	SetMAC struct {
		Name string
		MAC  net.HardwareAddr
	}
	// SetAlias sets a link's alias.
	SetAlias struct{ Name, Alias string }
	// AddAddress gives a link an IP address.
	AddAddress struct {
		Name    string
		Address netip.Prefix
	}
	// DelAddress takes it away.
	DelAddress struct {
		Name    string
		Address netip.Prefix
	}
)

func (o SetMAC) String() string { return fmt.Sprintf("ip link set %s address %s", o.Name, o.MAC) }

func (o SetAlias) String() string { return fmt.Sprintf("ip link set %s alias '%s'", o.Name, o.Alias) }

func (o AddAddress) String() string { return fmt.Sprintf("ip addr add %s dev %s", o.Address, o.Name) }

func (o DelAddress) String() string { return fmt.Sprintf("ip addr del %s dev %s", o.Address, o.Name) }
