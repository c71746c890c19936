package bgp

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/server"
)

// Reflector sends the routes of each node to all others, unchanged (RFC 4456).
type Reflector struct {
	AS       uint32
	RouterID netip.Addr     // an IPv4 address that no other router has as its ID
	Listen   netip.AddrPort // :: is all addresses, 0.0.0.0 all IPv4 addresses
	From     []netip.Prefix // where nodes may connect from; empty: from anywhere
	HoldTime time.Duration  // 0: HoldTime
	Password string         // of TCP MD5 (RFC 2385); empty: none
	// Passwords delivers later passwords. Sessions that are up go on.
	Passwords <-chan string
	// OnListen is called once nodes can connect, with a function that counts sessions and routes. Its error ends Run.
	// It may be nil.
	OnListen func(count func(context.Context) (Count, error)) error
	Log      *slog.Logger
}

// Count counts what a reflector holds.
type Count struct {
	Sessions int // that are up
	Routes   int // received, those kept for nodes that are away included
}

// peerGroup names the peer group of all nodes.
const peerGroup = "nodes"

// Run reflects routes until ctx ends. It does not stop gobgp's server: sessions and port end with the process, without
// a notification, so that nodes keep the routes. The server's own stop drops one node after the other, and withdraws
// the routes of those dropped from those that are still connected (deleteNeighbor in pkg/server/server.go).
func (r Reflector) Run(ctx context.Context) error {
	srv := newServer(r.Log)
	served := make(chan struct{})
	go func() { defer close(served); srv.Serve() }()
	err := r.start(ctx, srv)
	if err == nil && r.OnListen != nil {
		err = r.OnListen(func(ctx context.Context) (Count, error) { return count(ctx, srv) })
	}
	if err != nil {
		srv.Stop()
		<-served
		if ctx.Err() != nil {
			err = nil // the failure comes from the end of ctx
		}
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case r.Password = <-r.Passwords:
			if _, err := srv.UpdatePeerGroup(ctx, &api.UpdatePeerGroupRequest{PeerGroup: r.clients()}); err != nil {
				return fmt.Errorf("change the password: %w", err)
			}
			if err := r.accept(ctx, srv); err != nil { // sets the password of the listening socket, too
				return err
			}
		}
	}
}

func (r Reflector) start(ctx context.Context, srv *server.BgpServer) error {
	addresses := []string{r.Listen.Addr().String()}
	if r.Listen.Addr() == netip.IPv6Unspecified() { // one socket for both IP versions would have no passwords for IPv4
		addresses = append(addresses, netip.IPv4Unspecified().String())
	}
	err := srv.StartBgp(ctx, &api.StartBgpRequest{Global: &api.Global{
		Asn: r.AS, RouterId: r.RouterID.String(), ListenPort: int32(r.Listen.Port()), ListenAddresses: addresses,
	}})
	if err != nil {
		return fmt.Errorf("listen on %s as AS %d with router ID %s: %w", r.Listen, r.AS, r.RouterID, err)
	}
	if err := srv.AddPeerGroup(ctx, &api.AddPeerGroupRequest{PeerGroup: r.clients()}); err != nil {
		return fmt.Errorf("accept nodes of AS %d: %w", r.AS, err)
	}
	return r.accept(ctx, srv)
}

// clients returns the peer group of the nodes.
func (r Reflector) clients() *api.PeerGroup {
	return &api.PeerGroup{
		Conf:            &api.PeerGroupConf{PeerGroupName: peerGroup, PeerAsn: r.AS, AuthPassword: r.Password},
		Timers:          timers(r.HoldTime),
		Transport:       &api.Transport{PassiveMode: true},
		RouteReflector:  &api.RouteReflector{RouteReflectorClient: true, RouteReflectorClusterId: r.RouterID.String()},
		GracefulRestart: gracefulRestart(StaleTime),
		AfiSafis:        families(),
	}
}

// accept accepts connections of nodes that have the password.
func (r Reflector) accept(ctx context.Context, srv *server.BgpServer) error {
	from := r.From
	if len(from) == 0 {
		from = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	}
	for _, prefix := range from {
		neighbors := &api.DynamicNeighbor{Prefix: prefix.String(), PeerGroup: peerGroup}
		if err := srv.AddDynamicNeighbor(ctx, &api.AddDynamicNeighborRequest{DynamicNeighbor: neighbors}); err != nil {
			return fmt.Errorf("accept nodes from %s: %w", prefix, err)
		}
	}
	return nil
}

func count(ctx context.Context, srv *server.BgpServer) (c Count, err error) {
	if err := srv.ListPeer(ctx, &api.ListPeerRequest{}, func(p *api.Peer) {
		if p.State.SessionState == api.PeerState_SESSION_STATE_ESTABLISHED {
			c.Sessions++
		}
	}); err != nil {
		return c, fmt.Errorf("count the sessions: %w", err)
	}
	table, err := srv.GetTable(ctx, &api.GetTableRequest{
		TableType: api.TableType_TABLE_TYPE_GLOBAL, Family: families()[0].Config.Family,
	})
	if err != nil {
		return c, fmt.Errorf("count the routes: %w", err)
	}
	c.Routes = int(table.NumPath)
	return c, nil
}
