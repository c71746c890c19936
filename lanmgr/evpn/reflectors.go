package evpn

import (
	"net/netip"
	"slices"

	discoveryv1 "k8s.io/api/discovery/v1"
)

// ReflectorEndpoints are where the pods of a Service of reflectors answer, whether they do at the moment or not: sorted, each once.
func ReflectorEndpoints(parts []discoveryv1.EndpointSlice) []netip.AddrPort {
	var all []netip.AddrPort
	for _, part := range parts {
		for _, port := range part.Ports {
			for _, e := range part.Endpoints {
				// All addresses of an endpoint are those of one pod, and the first does (Endpoint.Addresses in k8s.io/api/discovery/v1).
				if len(e.Addresses) == 0 || port.Port == nil {
					continue
				}
				if address, err := netip.ParseAddr(e.Addresses[0]); err == nil {
					all = append(all, netip.AddrPortFrom(address.Unmap(), uint16(*port.Port)))
				}
			}
		}
	}
	slices.SortFunc(all, netip.AddrPort.Compare)
	return slices.Compact(all)
}
