package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/metrics"
)

// reflectorFlags are the flags of k8slan reflector.
type reflectorFlags struct {
	daemonFlags
	evpnFlags
	listen       string
	from         []net.IPNet
	holdTime     time.Duration
	passwordFile string
}

func reflectorCommand() *cobra.Command {
	var f reflectorFlags
	cmd := &cobra.Command{
		Use:   "reflector",
		Short: "Run a BGP route reflector for LANs with discovery evpn",
		Long: `Run a BGP route reflector for LANs with discovery evpn. It advertises the routes of each node to all
other nodes, unchanged.

Nodes connect to it; it opens no connections. Two route reflectors do not exchange routes: configure both on every node.
When one stops, nodes keep its routes until it is back.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.as == 0 {
				return usageError{errors.New("the autonomous system is missing: give --as")}
			}
			return f.runReflector(cmd.Context())
		},
	}
	flags := cmd.Flags()
	f.addLog(flags)
	f.addAS(flags, "as", " of the nodes and the reflector")
	flags.StringVar(&f.routerID, "router-id", os.Getenv("POD_IP"),
		"BGP identifier, an IPv4 `address` that no other router has (environment: POD_IP); "+
			"empty or IPv6: derived from the host's name")
	flags.StringVar(&f.listen, "listen", ":179",
		"`address` to which nodes connect, host:port; without a host: all addresses of IPv4 and IPv6; "+
			"with 0.0.0.0: all addresses of IPv4")
	flags.IPNetSliceVar(&f.from, "from", nil, "`ranges` of the nodes' addresses; empty: any")
	flags.DurationVar(&f.holdTime, "hold-time", bgp.HoldTime, "BGP hold `time`: how long a node may be silent")
	flags.StringVar(&f.passwordFile, "password-file", "",
		"`file` with the password of every session (TCP MD5); empty: none")
	f.addHealth(flags)
	f.addMetrics(flags)
	return cmd
}

func (f *reflectorFlags) runReflector(ctx context.Context) error {
	log, err := f.logger()
	if err != nil {
		return err
	}
	listen, err := listenAddress(f.listen)
	if err != nil {
		return err
	}
	name, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("get the host's name: %w", err)
	}
	passwords := make(chan string)
	r := bgp.Reflector{
		AS: f.as, RouterID: bgp.RouterID(f.routerID, name),
		Listen: listen, From: prefixes(f.from), HoldTime: f.holdTime,
		Passwords: passwords, OnListen: registerReflectorMetrics, Log: log,
	}
	if f.passwordFile != "" {
		if r.Password, err = bgp.ReadPassword(f.passwordFile); err != nil {
			return err
		}
	}
	tasks, ctx := errgroup.WithContext(ctx)
	if f.passwordFile != "" {
		tasks.Go(func() error {
			f.followPassword(ctx, r.Password, passwords, log)
			return nil
		})
	}
	tasks.Go(func() error { return r.Run(ctx) })
	serve(ctx, tasks, f.healthAddress, healthHandler(nil), "/healthz and /readyz (--health-address)")
	serve(ctx, tasks, f.metricsAddress,
		promhttp.HandlerFor(ctrlmetrics.Registry, promhttp.HandlerOpts{}), "/metrics (--metrics-address)")
	log.Info("k8slan reflector starts", "version", version, "as", f.as, "routerID", r.RouterID, "listen", listen)
	return tasks.Wait()
}

// listenAddress parses the flag --listen.
func listenAddress(flag string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(flag)
	if err != nil {
		return netip.AddrPort{}, usageError{fmt.Errorf("--listen %s: %w", flag, err)}
	}
	if host == "" {
		host = "::" // and IPv4
	}
	address, err := netip.ParseAddrPort(net.JoinHostPort(host, port))
	if err != nil {
		return netip.AddrPort{}, usageError{fmt.Errorf("--listen %s: %w", flag, err)}
	}
	return address, nil
}

// followPassword sends the password to the reflector whenever it changes, until ctx ends.
func (f *reflectorFlags) followPassword(
	ctx context.Context, last string, passwords chan<- string, log *slog.Logger,
) {
	followFiles(ctx, []string{f.passwordFile}, log, func() error {
		next, err := bgp.ReadPassword(f.passwordFile)
		if err != nil || next == last {
			return err
		}
		select {
		case passwords <- next:
			last = next
			log.Info("the password changed; sessions that are up stay up")
		case <-ctx.Done():
		}
		return nil
	})
}

// registerReflectorMetrics adds the reflector's metrics to /metrics.
func registerReflectorMetrics(count func(context.Context) (bgp.Count, error)) error {
	return register(metrics.Reflector{Count: count})
}
