package sidecar

import (
	"net/netip"
	"slices"

	discoveryv1 "k8s.io/api/discovery/v1"
)

// endpoints are the addresses of each Service's endpoints, sorted, each once.
type endpoints map[Service][]netip.Addr

// endpointsOf puts the parts of each Service together. Unless readyOnly, endpoints count whether they are ready or not.
func endpointsOf(services []Service, parts []discoveryv1.EndpointSlice, readyOnly bool) endpoints {
	all := make(endpoints, len(services))
	for _, s := range services {
		all[s] = []netip.Addr{}
	}
	for _, part := range parts {
		s := serviceOf(part)
		if _, ok := all[s]; !ok {
			continue
		}
		for _, e := range part.Endpoints {
			if ready := e.Conditions.Ready; readyOnly && ready != nil && !*ready {
				continue
			}
			for _, text := range e.Addresses {
				if a, err := netip.ParseAddr(text); err == nil { // of a slice of names it is none
					all[s] = append(all[s], a.Unmap())
				}
			}
		}
	}
	for s := range all {
		all[s] = sorted(all[s])
	}
	return all
}

// serviceOf is the Service that a part is of.
func serviceOf(part discoveryv1.EndpointSlice) Service {
	return Service{part.Namespace, part.Labels[discoveryv1.LabelServiceName]}
}

func sorted(all []netip.Addr) []netip.Addr {
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// peers are those that a pod with these addresses, of which it uses one, can send to: those of its family but itself.
func (e endpoints) peers(address netip.Addr, own []netip.Addr) endpoints {
	peers := make(endpoints, len(e))
	for s, all := range e {
		peers[s] = slices.DeleteFunc(slices.Clone(all), func(a netip.Addr) bool {
			return a.Is4() != address.Is4() || a == address || slices.Contains(own, a)
		})
	}
	return peers
}

// union are the addresses of all Services, sorted, each once.
func (e endpoints) union() []netip.Addr {
	all := []netip.Addr{}
	for _, some := range e {
		all = append(all, some...)
	}
	return sorted(all)
}

// change is what became different of one Service's peers.
type change struct {
	service Service
	deleted bool
	ips     []netip.Addr
}

// changes are those from one state to the next; of each Service those that are gone come first. A Service that is not asked for any more
// has none.
func changes(was, is endpoints) (all []change) {
	services := make([]Service, 0, len(is))
	for s := range is {
		services = append(services, s)
	}
	slices.SortFunc(services, func(a, b Service) int {
		return slices.Compare([]string{a.Namespace, a.Name}, []string{b.Namespace, b.Name})
	})
	for _, s := range services {
		if gone := difference(was[s], is[s]); len(gone) > 0 {
			all = append(all, change{s, true, gone})
		}
		if come := difference(is[s], was[s]); len(come) > 0 {
			all = append(all, change{s, false, come})
		}
	}
	return all
}

// difference are the addresses that only the first list has; both are sorted.
func difference(all, others []netip.Addr) (rest []netip.Addr) {
	for _, a := range all {
		if _, there := slices.BinarySearchFunc(others, a, netip.Addr.Compare); !there {
			rest = append(rest, a)
		}
	}
	return rest
}
