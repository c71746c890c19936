package agent

import (
	"context"
	"fmt"

	discoveryv1 "k8s.io/api/discovery/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/k8slan/k8slan/lanmgr/evpn"
)

// setReflectors gives EVPN the addresses of the route reflectors. While the API server is away, these stay unchanged.
func (a *Agent) setReflectors(ctx context.Context) error {
	if a.EVPN == nil || a.Reflectors.Name == "" {
		return nil
	}
	var list discoveryv1.EndpointSliceList
	err := a.Client.List(ctx, &list, client.InNamespace(a.Reflectors.Namespace),
		client.MatchingLabels{discoveryv1.LabelServiceName: a.Reflectors.Name})
	if err != nil {
		return fmt.Errorf("list the EndpointSlices of Service %s: %w", a.Reflectors, err)
	}
	if err := a.EVPN.SetReflectors(ctx, evpn.ReflectorEndpoints(list.Items)); err != nil {
		a.Log.Error("cannot start a session with every reflector, trying again when one changes",
			"service", a.Reflectors, "err", err)
	}
	return nil
}
