package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/pflag"

	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/evpn/bgp"
)

// evpnFlags are the flags of commands that speak BGP.
type evpnFlags struct {
	as       uint32
	routerID string
	peers    []string

	reflectors             string // name of a Service
	reflectorsPasswordFile string
}

func (f *evpnFlags) addAS(flags *pflag.FlagSet, name, without string) {
	flags.Uint32Var(&f.as, name, 0, "`number` of the autonomous system"+without)
}

func (f *evpnFlags) add(flags *pflag.FlagSet) {
	f.addAS(flags, "evpn-as", " for LANs with discovery evpn; 0: no EVPN")
	flags.StringVar(&f.routerID, "evpn-router-id", os.Getenv("NODE_IP"),
		"BGP identifier, an IPv4 `address` that no other router has (environment: NODE_IP); "+
			"empty or IPv6: derived from the node's name")
	flags.StringArrayVar(&f.peers, "evpn-peer", nil,
		"`router` to connect to: address=192.0.2.1[,port=179][,as=<the node's>][,hold-time=9s][,multihop=2]"+
			"[,password-file=...][,ipv6-vteps]; may be repeated")
	flags.StringVar(&f.reflectors, "evpn-reflectors", "",
		"`name` of a Service in the daemon's own namespace; "+
			"the daemon connects to all of its pods as route reflectors; empty: no route reflectors")
	flags.StringVar(&f.reflectorsPasswordFile, "evpn-reflectors-password-file", "",
		"`file` with the password of the sessions with them (TCP MD5); empty: none")
}

// evpn returns the configuration in the flags, without Kernel and Log. It returns nil without an AS.
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

// passwordFiles returns the password files that the flags name.
func (f *evpnFlags) passwordFiles() (files []string) {
	if f.reflectorsPasswordFile != "" {
		files = append(files, f.reflectorsPasswordFile)
	}
	return append(files, bgp.PasswordFiles(f.peers)...)
}

// followPasswords sets new passwords when their files change, until ctx ends.
func (f *evpnFlags) followPasswords(ctx context.Context, nodeName string, instance *evpn.Instance, log *slog.Logger) {
	followFiles(ctx, f.passwordFiles(), log, func() error {
		e, err := f.evpn(nodeName)
		if err != nil {
			return err
		}
		return instance.SetPeers(ctx, e.Peers, e.ReflectorPassword)
	})
}
