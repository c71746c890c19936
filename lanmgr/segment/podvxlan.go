package segment

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// PodVXLAN is the desired state of a VXLAN in a pod's own network namespace. It is in no bridge: its frames are the
// pod's. The namespace's routes choose the link by which its packets leave.
type PodVXLAN struct {
	VXLAN     VXLAN // without an underlay
	MTU       int   // bytes
	MAC       net.HardwareAddr
	Addresses []netip.Prefix // to add; addresses from elsewhere stay
	Remotes   []netip.Addr   // sorted; nil: not known, the present ones stay
	FDB       []FDBEntry     // sorted by MAC, if it does not learn; nil: not known, the present entries stay
	Partial   bool           // Remotes and FDB may lack entries: no present one is deleted
	Prepared  bool           // the up hook has run; before that, the VXLAN gets no remotes
}

// PodVXLANState is such a VXLAN as the kernel has it.
type PodVXLANState struct {
	Link      Link // without an index if there is none
	Addresses []netip.Prefix
	Others    []Link // VXLANs with other names that have the mark
}

// ForeignLinkError says that a link has the interface's name but is no VXLAN.
type ForeignLinkError struct{ Name, Type string }

func (e *ForeignLinkError) Error() string {
	return fmt.Sprintf("there is an interface %s already, a %s; choose another name", e.Name, e.Type)
}

// DiffPodVXLAN returns the operations that give the namespace the VXLAN. A VXLAN that cannot be changed into it is
// replaced; another kind of link is a ForeignLinkError.
func DiffPodVXLAN(want PodVXLAN, have PodVXLANState) ([]Op, error) {
	d := &diff{inPod: true, want: Segment{
		VXLAN: want.VXLAN, MTU: want.MTU, Remotes: want.Remotes, FDB: want.FDB, Partial: want.Partial,
	}}
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
		d.do(SetAlias{name, mark}) // before the addresses: the mark may name more than there are, but not fewer
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

// Prepared reports whether the up hook of the interface has run.
func (s PodVXLANState) Prepared() bool {
	_, prepared := parseMark(s.Link.Alias)
	return prepared
}

// The mark is the link's alias. It says that the link is k8slan's, whether it is prepared, and which addresses were
// added.
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

// Marked reports whether a link has the mark.
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

// PodVXLANMAC returns the address of a pod's interface if none is requested. It stays when the container restarts, and
// when another pod has the name.
func PodVXLANMAC(namespace, pod, ifname string) net.HardwareAddr {
	return derived(namespace + "/" + pod + " " + ifname)
}

// MaxAddresses is the number of addresses for which a mark has room.
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
	// DelAddress removes an IP address of a link.
	DelAddress struct {
		Name    string
		Address netip.Prefix
	}
)

func (o SetMAC) String() string { return fmt.Sprintf("ip link set %s address %s", o.Name, o.MAC) }

func (o SetAlias) String() string { return fmt.Sprintf("ip link set %s alias '%s'", o.Name, o.Alias) }

func (o AddAddress) String() string { return fmt.Sprintf("ip addr add %s dev %s", o.Address, o.Name) }

func (o DelAddress) String() string { return fmt.Sprintf("ip addr del %s dev %s", o.Address, o.Name) }
