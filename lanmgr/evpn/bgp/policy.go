package bgp

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/server"
)

// rejectReceivedRoutes keeps the routes of peers out of gobgp's own table, which then holds this node's only. From the
// routes of peers gobgp would make sequence numbers of its own (fixupApiPath in pkg/server/server.go). The watch
// reports what peers send before this policy applies.
func rejectReceivedRoutes(ctx context.Context, srv *server.BgpServer) error {
	policy := &api.Policy{Name: "local", Statements: []*api.Statement{{
		Name:       "local",
		Conditions: &api.Conditions{RouteType: api.Conditions_ROUTE_TYPE_LOCAL},
		Actions:    &api.Actions{RouteAction: api.RouteAction_ROUTE_ACTION_ACCEPT},
	}}}
	if err := assignPolicy(ctx, srv, policy, &api.PolicyAssignment{
		Direction: api.PolicyDirection_POLICY_DIRECTION_IMPORT, DefaultAction: api.RouteAction_ROUTE_ACTION_REJECT,
	}); err != nil {
		return fmt.Errorf("keep the routes of peers out of gobgp's table: %w", err)
	}
	return nil
}

// ipv6VTEPs names the set of peers that accept routes with an IPv6 VTEP.
const ipv6VTEPs = "ipv6-vteps"

// filterIPv6VTEPs advertises routes with an IPv6 VTEP only to the peers in the set. While the set is empty, no peer
// gets them (NeighborCondition.Evaluate in gobgp's internal/pkg/table).
func filterIPv6VTEPs(ctx context.Context, srv *server.BgpServer) error {
	policy := &api.Policy{Name: ipv6VTEPs, Statements: []*api.Statement{{
		Name: ipv6VTEPs,
		Conditions: &api.Conditions{
			NeighborSet:   &api.MatchSet{Type: api.MatchSet_TYPE_INVERT, Name: ipv6VTEPs},
			NextHopInList: []string{"::/0"},
		},
		Actions: &api.Actions{RouteAction: api.RouteAction_ROUTE_ACTION_REJECT},
	}}}
	set := &api.DefinedSet{DefinedType: api.DefinedType_DEFINED_TYPE_NEIGHBOR, Name: ipv6VTEPs}
	err := srv.AddDefinedSet(ctx, &api.AddDefinedSetRequest{DefinedSet: set})
	if err == nil {
		err = assignPolicy(ctx, srv, policy, &api.PolicyAssignment{
			Direction: api.PolicyDirection_POLICY_DIRECTION_EXPORT, DefaultAction: api.RouteAction_ROUTE_ACTION_ACCEPT,
		})
	}
	if err != nil {
		return fmt.Errorf("keep routes with an IPv6 VTEP from peers that cannot accept them: %w", err)
	}
	return nil
}

// assignPolicy adds a policy, and assigns it to gobgp's global table.
func assignPolicy(ctx context.Context, srv *server.BgpServer, p *api.Policy, a *api.PolicyAssignment) error {
	if err := srv.AddPolicy(ctx, &api.AddPolicyRequest{Policy: p}); err != nil {
		return err
	}
	a.Name, a.Policies = "global", []*api.Policy{p}
	return srv.AddPolicyAssignment(ctx, &api.AddPolicyAssignmentRequest{Assignment: a})
}

// ipv6VTEPsEntry returns the entry of the set for one peer. Entries are added and deleted one by one, because the
// policy does not follow a set that replaces this one.
func ipv6VTEPsEntry(p Peer) *api.DefinedSet {
	return &api.DefinedSet{
		DefinedType: api.DefinedType_DEFINED_TYPE_NEIGHBOR, Name: ipv6VTEPs,
		List: []string{netip.PrefixFrom(p.Address, p.Address.BitLen()).String()},
	}
}
