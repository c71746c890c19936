package node

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	discoveryv1 "k8s.io/api/discovery/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// setReflectors tells the fabric where the reflectors are. While the API server is away, they are where they were.
func (a *Agent) setReflectors(ctx context.Context) error {
	if a.Fabric == nil || a.Reflectors.Name == "" {
		return nil
	}
	var parts discoveryv1.EndpointSliceList
	err := a.Client.List(ctx, &parts, client.InNamespace(a.Reflectors.Namespace), client.MatchingLabels{discoveryv1.LabelServiceName: a.Reflectors.Name})
	if err != nil {
		return fmt.Errorf("list the EndpointSlices of Service %s: %w", a.Reflectors, err)
	}
	if err := a.Fabric.SetReflectors(ctx, endpoints(parts.Items)); err != nil {
		a.Log.Error("cannot speak with every reflector, trying again when one changes", "service", a.Reflectors, "err", err)
	}
	return nil
}

// endpoints are where a Service's pods answer, whether they do at the moment or not: sorted, each once.
func endpoints(parts []discoveryv1.EndpointSlice) []netip.AddrPort {
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
