package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
	"github.com/k8slan/k8slan/lanmgr/metrics"
)

// evpnFlags are those of who speaks BGP.
type evpnFlags struct {
	as       uint32
	routerID string
	peers    []string

	reflectors             string // a Service
	reflectorsPasswordFile string
}

func (f *evpnFlags) addAS(flags *pflag.FlagSet, name, without string) {
	flags.Uint32Var(&f.as, name, 0, "`number` of the autonomous system"+without)
}

func (f *evpnFlags) add(flags *pflag.FlagSet) {
	f.addAS(flags, "evpn-as", " for LANs with discovery evpn; 0: there are none")
	flags.StringVar(&f.routerID, "evpn-router-id", os.Getenv("NODE_IP"),
		"IPv4 `address` that no other router has (environment: NODE_IP); empty or IPv6: one made from the node's name")
	flags.StringArrayVar(&f.peers, "evpn-peer", nil,
		"`router` to speak with: address=192.0.2.1[,port=179][,as=<that of the node>][,hold-time=9s][,multihop=2][,password-file=...][,ipv6-vteps]; may be repeated")
	flags.StringVar(&f.reflectors, "evpn-reflectors", "", "`name` of a Service in the daemon's own namespace whose pods are route reflectors to speak with, all of them; empty: there is none")
	flags.StringVar(&f.reflectorsPasswordFile, "evpn-reflectors-password-file", "", "`file` with the password of the sessions with them (TCP MD5); empty: none")
}

// evpn is what the flags come to, but for who hears the bridges; nil without an AS.
func (f *evpnFlags) evpn(nodeName string) (*evpn.Config, error) {
	if f.as == 0 {
		if len(f.peers) > 0 || f.reflectors != "" {
			return nil, usageError{errors.New("--evpn-peer and --evpn-reflectors need --evpn-as")}
		}
		return nil, nil
	}
	e := &evpn.Config{AS: f.as, RouterID: bgp.RouterID(f.routerID, nodeName)}
	if f.reflectorsPasswordFile != "" {
		var err error
		if e.ReflectorPassword, err = bgp.ReadPassword(f.reflectorsPasswordFile); err != nil {
			return nil, err
		}
	}
	var err error
	if e.Peers, err = bgp.ParsePeers(f.peers, f.as); err != nil {
		return nil, usageError{fmt.Errorf("--evpn-peer %w", err)}
	}
	return e, nil
}

// passwordFiles are those that the flags name.
func (f *evpnFlags) passwordFiles() (files []string) {
	if f.reflectorsPasswordFile != "" {
		files = append(files, f.reflectorsPasswordFile)
	}
	return append(files, bgp.PasswordFiles(f.peers)...)
}

// followPasswords has the fabric speak with other passwords when files have them, until ctx ends.
func (f *evpnFlags) followPasswords(ctx context.Context, nodeName string, joined *evpn.Instance, log *slog.Logger) {
	followFiles(ctx, f.passwordFiles(), log, func() error {
		e, err := f.evpn(nodeName)
		if err != nil {
			return err
		}
		return joined.SetPeers(ctx, e.Peers, e.ReflectorPassword)
	})
}

// followFiles calls changed at first and whenever there may be something else in one of the files, until ctx ends. It looks at their folders:
// kubelet renames what a Secret's volume shows (AtomicWriter in pkg/volume/util). What goes wrong is logged.
func followFiles(ctx context.Context, files []string, log *slog.Logger, changed func() error) {
	if len(files) == 0 {
		return
	}
	notify, err := fsnotify.NewWatcher()
	if err == nil {
		defer notify.Close()
	}
	for _, file := range files {
		if err == nil {
			err = notify.Add(filepath.Dir(file))
		}
	}
	if err != nil {
		log.Error("cannot hear of changes to files, restart this when one changes", "files", files, "err", err)
		return
	}
	for failed := ""; ; {
		said := ""
		if err := changed(); err != nil && ctx.Err() == nil {
			said = err.Error()
		}
		if said != "" && said != failed {
			log.Error("cannot take what has changed in a file, all stays as it was", "err", said)
		}
		failed = said
		select {
		case <-ctx.Done():
			return
		case <-notify.Events:
		case err := <-notify.Errors:
			log.Warn("some changes of files went unheard, reading them again", "err", err)
		}
	}
}

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
		Long: `Run a BGP route reflector for LANs with discovery evpn: what one node tells of its LANs it passes on to every other, as it is.

Nodes connect to it; it connects to nobody. Two of them know nothing of each other: give every node both. When one ends or is killed,
nodes keep what it has told until it is back.`,
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
	flags.StringVar(&f.routerID, "router-id", os.Getenv("POD_IP"), "IPv4 `address` that no other router has (environment: POD_IP); empty or IPv6: one made from the host's name")
	flags.StringVar(&f.listen, "listen", ":179", "`address` where nodes connect, host:port; without a host all, over IPv4 and IPv6, 0.0.0.0 over IPv4 alone")
	flags.IPNetSliceVar(&f.from, "from", nil, "`ranges` of the nodes' addresses; empty: any")
	flags.DurationVar(&f.holdTime, "hold-time", bgp.HoldTime, "how long a node may be silent")
	flags.StringVar(&f.passwordFile, "password-file", "", "`file` with the password of every session (TCP MD5); empty: none")
	flags.StringVar(&f.healthAddress, "health-address", ":8081", "`address` that answers /healthz and /readyz, host:port; 0 for none")
	f.addMetrics(flags)
	return cmd
}

func (f *reflectorFlags) runReflector(ctx context.Context) error {
	log, err := f.logger()
	if err != nil {
		return err
	}
	host, port, err := net.SplitHostPort(f.listen)
	if err != nil {
		return usageError{fmt.Errorf("--listen %s: %w", f.listen, err)}
	}
	if host == "" {
		host = "::" // and IPv4
	}
	at, err := netip.ParseAddrPort(net.JoinHostPort(host, port))
	if err != nil {
		return usageError{fmt.Errorf("--listen %s: %w", f.listen, err)}
	}
	name, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("ask for the host's name: %w", err)
	}
	r := bgp.Reflector{AS: f.as, RouterID: bgp.RouterID(f.routerID, name), Listen: at, From: prefixes(f.from), HoldTime: f.holdTime, Log: log, OnListen: reflectorMetrics}
	tasks, ctx := errgroup.WithContext(ctx)
	if f.passwordFile != "" {
		if r.Password, err = bgp.ReadPassword(f.passwordFile); err != nil {
			return err
		}
		passwords, last := make(chan string), r.Password
		r.Passwords = passwords
		tasks.Go(func() error {
			followFiles(ctx, []string{f.passwordFile}, log, func() error {
				next, err := bgp.ReadPassword(f.passwordFile)
				if err != nil || next == last {
					return err
				}
				select {
				case passwords <- next:
					last = next
					log.Info("there is a new password, sessions that stand go on")
				case <-ctx.Done():
				}
				return nil
			})
			return nil
		})
	}
	tasks.Go(func() error { return r.Run(ctx) })
	serve(ctx, tasks, f.healthAddress, healthHandler(nil), "/healthz and /readyz (--health-address)")
	serve(ctx, tasks, f.metricsAddress, promhttp.HandlerFor(ctrlmetrics.Registry, promhttp.HandlerOpts{}), "/metrics (--metrics-address)")
	log.Info("k8slan reflector starts", "version", version, "as", f.as, "routerID", r.RouterID, "listen", at)
	return tasks.Wait()
}

// reflectorMetrics has /metrics answer how much a reflector has to do.
func reflectorMetrics(count func(context.Context) (bgp.Count, error)) error {
	return register(metrics.Reflector{Count: count})
}

// serve answers what at an address until ctx ends; at 0 it does not.
func serve(ctx context.Context, tasks *errgroup.Group, address string, handler http.Handler, what string) {
	if address == "0" {
		return
	}
	srv := &http.Server{Addr: address, Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	tasks.Go(func() error {
		if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("answer %s: %w", what, err)
		}
		return nil
	})
	tasks.Go(func() error {
		<-ctx.Done()
		return srv.Close()
	})
}
