package sidecar

import (
	"maps"
	"net/netip"
	"slices"

	discoveryv1 "k8s.io/api/discovery/v1"
)

// endpoints holds the addresses of each Service's endpoints, sorted and without duplicates.
type endpoints map[Service][]netip.Addr

// endpointsOf returns the endpoints of these Services, with readyOnly only those that are ready.
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
				if a, err := netip.ParseAddr(text); err == nil { // an EndpointSlice may have names instead
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

// serviceOf returns the Service that an EndpointSlice belongs to.
func serviceOf(part discoveryv1.EndpointSlice) Service {
	return Service{part.Namespace, part.Labels[discoveryv1.LabelServiceName]}
}

// sorted sorts addresses in place and returns them without duplicates.
func sorted(all []netip.Addr) []netip.Addr {
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// peers returns the endpoints that a pod can send to from address: those of the same IP version that are not the pod
// itself. own are all addresses of the pod.
func (e endpoints) peers(address netip.Addr, own []netip.Addr) endpoints {
	peers := make(endpoints, len(e))
	for s, all := range e {
		peers[s] = slices.DeleteFunc(slices.Clone(all), func(a netip.Addr) bool {
			return a.Is4() != address.Is4() || a == address || slices.Contains(own, a)
		})
	}
	return peers
}

// union returns the addresses of all Services, sorted and without duplicates.
func (e endpoints) union() []netip.Addr {
	all := []netip.Addr{}
	for _, some := range e {
		all = append(all, some...)
	}
	return sorted(all)
}

// change says which endpoints one Service has lost or got.
type change struct {
	service Service
	deleted bool
	ips     []netip.Addr
}

// changes returns the changes from one set of endpoints to the next. Those that a Service has lost come before those
// that it has got. A Service that is not in the next set has no changes.
func changes(old, next endpoints) (all []change) {
	services := make([]Service, 0, len(next))
	for s := range next {
		services = append(services, s)
	}
	slices.SortFunc(services, func(a, b Service) int {
		return slices.Compare([]string{a.Namespace, a.Name}, []string{b.Namespace, b.Name})
	})
	for _, s := range services {
		if lost := difference(old[s], next[s]); len(lost) > 0 {
			all = append(all, change{s, true, lost})
		}
		if added := difference(next[s], old[s]); len(added) > 0 {
			all = append(all, change{s, false, added})
		}
	}
	return all
}

// apply returns the endpoints after a change.
func (e endpoints) apply(c change) endpoints {
	next := maps.Clone(e)
	if next == nil {
		next = endpoints{}
	}
	if c.deleted {
		next[c.service] = difference(next[c.service], c.ips)
	} else {
		next[c.service] = sorted(append(slices.Clone(next[c.service]), c.ips...))
	}
	return next
}

// difference returns the addresses in all that are not in others. Both are sorted.
func difference(all, others []netip.Addr) (rest []netip.Addr) {
	for _, a := range all {
		if _, found := slices.BinarySearchFunc(others, a, netip.Addr.Compare); !found {
			rest = append(rest, a)
		}
	}
	return rest
}
