package controller

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// attached is a pod that hangs on a spoke of a LAN on a node that answers, whatever became of that LAN or of the spoke in its spec.
type attached struct {
	UID                       types.UID // of the LAN
	LAN, NS, Spoke, Pod, Node string
}

// verdict is what a LAN holds, and why not all that it asks for.
type verdict struct {
	Holds   *v1beta1.Holding  // nil: the LAN is refused
	Clash   string            // why the LAN is refused, as a phrase: "vni 222 is default/lab's"
	WayOut  string            // what to do about it
	Refused map[string]string // refused spokes and why, as phrases
}

// vniKey is what a VNI is unique by.
type vniKey struct{ vni, port int32 }

// admission is the state of one run of admit: who holds what so far.
type admission struct {
	attached []attached
	ns       map[string]*v1beta1.LAN
	vni      map[vniKey]*v1beta1.LAN
	spoke    map[string]*v1beta1.LAN
}

// admit decides what each LAN holds, by UID. A LAN keeps what its status says it holds as long as its spec asks for it; what is
// free goes to the LAN that was created first, then to the smaller UID. What pods of another LAN still hang on is not free.
// No ns, no VNI on a port and no spoke ever has two holders in the answer, and answering the answer again changes nothing.
func admit(lans []v1beta1.LAN, pods []attached) map[types.UID]verdict {
	a := admission{
		attached: pods,
		ns:       map[string]*v1beta1.LAN{},
		vni:      map[vniKey]*v1beta1.LAN{},
		spoke:    map[string]*v1beta1.LAN{},
	}
	ranked := rank(lans)
	verdicts := map[types.UID]verdict{}
	for _, lan := range byTenure(ranked) {
		a.admitLAN(lan)
	}
	for _, lan := range ranked {
		verdicts[lan.UID] = a.explain(lan)
	}
	for _, lan := range ranked {
		a.keepSpokes(lan, verdicts[lan.UID])
	}
	for _, lan := range ranked {
		a.admitSpokes(lan, verdicts[lan.UID])
	}
	return verdicts
}

// rank orders LANs by creation time, then UID.
func rank(lans []v1beta1.LAN) []*v1beta1.LAN {
	ranked := make([]*v1beta1.LAN, len(lans))
	for i := range lans {
		ranked[i] = &lans[i]
	}
	slices.SortFunc(ranked, func(x, y *v1beta1.LAN) int {
		return cmp.Or(x.CreationTimestamp.Compare(y.CreationTimestamp.Time), cmp.Compare(x.UID, y.UID))
	})
	return ranked
}

// byTenure puts first who holds all that it asks for, then who holds its ns but asks for another port now, then who holds nothing.
func byTenure(ranked []*v1beta1.LAN) []*v1beta1.LAN {
	tenure := func(lan *v1beta1.LAN) int {
		holds, spec := lan.Status.Holds, lan.Effective()
		switch {
		case holds == nil || holds.NS != spec.NS:
			return 2
		case holds.VNI != spec.VNI || holds.Port != spec.VXLANPort:
			return 1
		}
		return 0
	}
	ordered := slices.Clone(ranked)
	slices.SortStableFunc(ordered, func(x, y *v1beta1.LAN) int { return cmp.Compare(tenure(x), tenure(y)) })
	return ordered
}

// admitLAN gives the LAN its ns and VNI if both are free.
func (a admission) admitLAN(lan *v1beta1.LAN) {
	spec := lan.Effective()
	key := vniKey{spec.VNI, spec.VXLANPort}
	if a.ns[spec.NS] == nil && a.vni[key] == nil && len(a.inNS(lan, spec.NS)) == 0 {
		a.ns[spec.NS], a.vni[key] = lan, lan
	}
}

// explain is the verdict on the LAN, but for its spokes.
func (a admission) explain(lan *v1beta1.LAN) verdict {
	spec := lan.Effective()
	key := vniKey{spec.VNI, spec.VXLANPort}
	switch {
	case a.ns[spec.NS] == lan:
		return verdict{
			Holds:   &v1beta1.Holding{NS: spec.NS, VNI: spec.VNI, Port: spec.VXLANPort},
			Refused: map[string]string{},
		}
	case a.ns[spec.NS] != nil:
		return verdict{
			Clash:  fmt.Sprintf("ns %s is %s's", spec.NS, name(a.ns[spec.NS])),
			WayOut: "ns cannot change: delete this LAN and create it with another ns, or without one",
		}
	case a.vni[key] != nil:
		return verdict{
			Clash:  fmt.Sprintf("vni %s is %s's", key, name(a.vni[key])),
			WayOut: "vni cannot change: choose another vxlanPort, or delete this LAN and create it with another vni",
		}
	}
	return verdict{
		Clash:  fmt.Sprintf("ns %s is still in use", spec.NS),
		WayOut: "it will be free when these pods are gone: " + describe(a.inNS(lan, spec.NS)),
	}
}

// inNS are the pods that hang on another LAN's segment of that ns; none for a LAN that holds the ns already.
func (a admission) inNS(lan *v1beta1.LAN, ns string) []attached {
	if lan.Status.Holds != nil && lan.Status.Holds.NS == ns {
		return nil
	}
	return a.others(lan, func(p attached) bool { return p.NS == ns })
}

// keepSpokes leaves an admitted LAN the spokes that it holds and still asks for.
func (a admission) keepSpokes(lan *v1beta1.LAN, v verdict) {
	if v.Holds == nil || lan.Status.Holds == nil {
		return
	}
	for _, spoke := range lan.Status.Holds.Spokes {
		if a.spoke[spoke] == nil && slices.Contains(lan.Spec.Spokes, spoke) {
			a.spoke[spoke] = lan
		}
	}
}

// admitSpokes gives an admitted LAN those of its spokes that nobody holds, and fills in what it holds and what is refused.
func (a admission) admitSpokes(lan *v1beta1.LAN, v verdict) {
	if v.Holds == nil {
		return
	}
	for _, spoke := range slices.Sorted(slices.Values(lan.Spec.Spokes)) {
		holder := a.spoke[spoke]
		if holder != nil && holder != lan {
			v.Refused[spoke] = fmt.Sprintf("spoke %s is %s's", spoke, name(holder))
			continue
		}
		if holder == nil {
			if pods := a.others(lan, func(p attached) bool { return p.Spoke == spoke }); len(pods) > 0 {
				v.Refused[spoke] = fmt.Sprintf("spoke %s is still in use by %s", spoke, describe(pods))
				continue
			}
		}
		a.spoke[spoke] = lan
		v.Holds.Spokes = append(v.Holds.Spokes, spoke)
	}
}

// others are the pods that hang on other LANs and match.
func (a admission) others(lan *v1beta1.LAN, match func(attached) bool) []attached {
	var pods []attached
	for _, p := range a.attached {
		if p.UID != lan.UID && match(p) {
			pods = append(pods, p)
		}
	}
	return pods
}

// vnis are those that LANs hold.
func vnis(lans []v1beta1.LAN) map[vniKey]bool {
	taken := map[vniKey]bool{}
	for i := range lans {
		if h := lans[i].Status.Holds; h != nil {
			taken[vniKey{h.VNI, h.Port}] = true
		}
	}
	return taken
}

// kept is what a LAN held before and still holds: what may be written before anything is granted. A LAN that moves to another
// port, where nobody has its VNI, keeps the rest: without anything held, nodes would tear it down.
func kept(before, after *v1beta1.Holding, taken map[vniKey]bool) *v1beta1.Holding {
	if before == nil || after == nil || before.NS != after.NS {
		return nil
	}
	now := vniKey{after.VNI, after.Port}
	if now != (vniKey{before.VNI, before.Port}) && taken[now] {
		return nil
	}
	k := &v1beta1.Holding{NS: after.NS, VNI: after.VNI, Port: after.Port}
	for _, spoke := range after.Spokes {
		if slices.Contains(before.Spokes, spoke) {
			k.Spokes = append(k.Spokes, spoke)
		}
	}
	return k
}

// String names the port where it is not the usual one.
func (k vniKey) String() string {
	if k.port == v1beta1.DefaultPort {
		return fmt.Sprint(k.vni)
	}
	return fmt.Sprintf("%d on port %d", k.vni, k.port)
}

func name(lan *v1beta1.LAN) string { return lan.Namespace + "/" + lan.Name }

// describe lists the first few pods: "default/srl-1 on worker1 (spoke srl of LAN default/lab)".
func describe(pods []attached) string {
	words := make([]string, len(pods))
	for i, p := range pods {
		words[i] = fmt.Sprintf("%s on %s (spoke %s of LAN %s)", p.Pod, p.Node, p.Spoke, p.LAN)
	}
	return enumerate(words, ", ")
}

// enumerate joins the first few words and says how many more there are.
func enumerate(words []string, separator string) string {
	const few = 3
	if more := len(words) - few; more > 1 {
		words = append(slices.Clone(words[:few]), fmt.Sprintf("and %d more", more))
	}
	return strings.Join(words, separator)
}
